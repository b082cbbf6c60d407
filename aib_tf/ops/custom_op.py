"""Finds, checks and loads the compiled op, once, when it is first needed.

Opening a library that was built for another TensorFlow, or that is damaged, can end the process where no `except`
catches it. So `_build.json`, which the build leaves beside the library, is compared with what is there before the
library is opened.
"""

import contextlib
import functools
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import keras

_BUILD_FILE = Path(__file__).with_name("_build.json")
_REBUILD = "Install aib_tf again beside this TensorFlow to rebuild it: pip install --force-reinstall --no-deps ."
_CHOICES = ("custom", "tensorflow")


class Implementation(NamedTuple):
    """Which path `nearest_anchor` takes, and why.

    Attributes:
        name: "custom_op" for the compiled op, "tensorflow" for the pure path on the TensorFlow backend, otherwise the
            name of the Keras backend, where the pure path runs too.
        reason: one sentence.
    """

    name: str
    reason: str


class Library(NamedTuple):
    """The two ops of the compiled library, both None where the pure path is to be taken."""

    implementation: Implementation
    nearest_anchor: Callable | None = None
    gradient: Callable | None = None


def implementation():
    """Says which implementation `nearest_anchor` uses. It is chosen once, when it is first needed.

    The environment variable AIB_TF_OPS forces one: `custom` the compiled op, `tensorflow` the pure path. Without it,
    the compiled op is used where it was built for the TensorFlow that runs.

    Returns:
        An `Implementation(name, reason)`.

    Raises:
        ImportError: if AIB_TF_OPS is `custom` and the compiled op cannot be used; the message says why.
        ValueError: if AIB_TF_OPS has another value.
    """
    return library().implementation


def library():
    """Returns the `Library`, loading it when it is first asked for."""
    with _LOCK:
        return _library()


_LOCK = threading.Lock()


@functools.cache
def _library():
    choice = os.environ.get("AIB_TF_OPS", "")
    if choice not in ("", *_CHOICES):
        raise ValueError(f"AIB_TF_OPS must be {' or '.join(_CHOICES)}, or not be set. Received: AIB_TF_OPS={choice}")
    backend = keras.config.backend()
    if choice == "tensorflow":
        return Library(Implementation(backend, "AIB_TF_OPS=tensorflow asks for the pure path, in keras.ops."))
    if backend != "tensorflow":
        problem = f"The compiled op is for the TensorFlow backend of Keras, and the backend is {backend}."
        return _without_op(problem, choice)
    file, problem, is_unexpected = _find()
    if file is not None:
        try:
            ops = _open(file)
        except Exception as error:  # whatever keeps a library from loading, the pure path does not need it
            problem, is_unexpected = f"The compiled op does not load ({error}). {_REBUILD}", True
        else:
            return Library(Implementation("custom_op", "The compiled op was built for this TensorFlow."), *ops)
    if is_unexpected and choice != "custom":
        warnings.warn(f"{problem} Until then aib_tf uses its slower pure path.", RuntimeWarning, stacklevel=5)
    return _without_op(problem, choice)


def _without_op(problem, choice):
    if choice == "custom":
        raise ImportError(f"AIB_TF_OPS=custom asks for the compiled op. {problem}")
    return Library(Implementation(keras.config.backend(), f"{problem} The pure path, in keras.ops, takes its place."))


def _find():
    """Returns the library, or None, why it is not to be opened, and whether that is worth a warning."""
    import tensorflow as tf

    try:
        build = json.loads(_BUILD_FILE.read_text(encoding="utf-8"))
        built, file = build["library"], None
        if built is not None:
            file = _BUILD_FILE.with_name(built["file"])
            size, checksum, built_for = built["size"], built["sha256"], dict(build["tensorflow"])
    except FileNotFoundError:
        return None, "The compiled op was not built.", False
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return None, f"{_BUILD_FILE} is damaged ({error!r}). {_REBUILD}", True
    if file is None:
        return None, f"The compiled op was not built. {build.get('problem') or ''}".strip(), False
    running = {
        "version": tf.version.VERSION,
        "git_version": tf.version.GIT_VERSION,
        "cxx11_abi": tf.sysconfig.CXX11_ABI_FLAG,
    }
    if built_for != running:
        differing = [name for name in running if built_for.get(name) != running[name]]
        here = ", ".join(f"{name} {running[name]}" for name in differing)
        there = ", ".join(f"{name} {built_for.get(name)}" for name in differing)
        return None, f"The compiled op was built for TensorFlow {there}, and this one is {here}. {_REBUILD}", True
    try:
        content = file.read_bytes()
    except OSError as error:
        return None, f"The compiled op cannot be read ({error}). {_REBUILD}", True
    if len(content) != size or hashlib.sha256(content).hexdigest() != checksum:
        return None, f"{file} is damaged: its checksum is not the one of the build. {_REBUILD}", True
    if tf.config.list_physical_devices("GPU") and not build.get("cuda"):
        return None, "TensorFlow uses a GPU, and the compiled op was built without CUDA.", False
    return file, None, False


def _open(file):
    """Opens the library and gives its op a gradient. Returns the op and the gradient op."""
    import tensorflow as tf

    ops = tf.load_op_library(str(file))

    def gradient(op, d_quantized, _, d_codebook_loss, d_commitment_loss):
        # Straight-through; `index` has none, being made of whole numbers.
        x, anchors = op.inputs
        return ops.aib_tf_nearest_anchor_grad(
            x=x,
            anchors=anchors,
            index=op.outputs[1],
            d_quantized=d_quantized,
            d_codebook_loss=d_codebook_loss,
            d_commitment_loss=d_commitment_loss,
        )

    for name, function in (("AibTf>NearestAnchor", gradient), ("AibTf>NearestAnchorGrad", _second_gradient)):
        # A process that imports this module anew has the gradients already.
        with contextlib.suppress(KeyError):
            tf.RegisterGradient(name)(function)
    return ops.aib_tf_nearest_anchor, ops.aib_tf_nearest_anchor_grad


def _second_gradient(op, on_d_x, on_d_anchors):
    """The gradient of the gradient, which penalties on gradients need: seldom, so TensorFlow's own ops will do."""
    import tensorflow as tf

    x, anchors, index, _, d_codebook_loss, d_commitment_loss = op.inputs
    dtype = anchors.dtype
    difference = tf.cast(x, dtype) - tf.gather(anchors, index)
    twice_mean = tf.cast(2 / tf.maximum(tf.size(x, tf.int64), 1), dtype)
    wide = tf.cast(on_d_x, dtype)
    gathered = tf.gather(on_d_anchors, index)

    def per_anchor(values):
        return tf.math.unsorted_segment_sum(tf.reshape(values, [-1]), tf.reshape(index, [-1]), tf.size(anchors))

    on_x = twice_mean * (d_commitment_loss * wide - d_codebook_loss * gathered)
    on_anchors = twice_mean * (d_codebook_loss * per_anchor(gathered) - d_commitment_loss * per_anchor(wide))
    on_d_codebook_loss = -twice_mean * tf.reduce_sum(gathered * difference)
    on_d_commitment_loss = twice_mean * tf.reduce_sum(wide * difference)
    return tf.cast(on_x, x.dtype), on_anchors, None, on_d_x, on_d_codebook_loss, on_d_commitment_loss
