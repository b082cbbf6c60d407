"""Writes a model as a version folder for TensorFlow Serving."""

import contextlib
import logging
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from aib_tf import files
from aib_tf.export.inference import check_classifier, inference_of
from aib_tf.export.portability import check_stock_operations
from aib_tf.export.preprocessing import Preprocessing
from aib_tf.export.signatures import signatures_of
from aib_tf.export.warmup import warmup_requests, write_warmup_requests
from aib_tf.ops import implementation
from aib_tf.validation import check_choice, check_count

_logger = logging.getLogger(__name__)

_MAX_VERSION = 2**63 - 1  # TensorFlow Serving counts in int64


def saved_model(
    model,
    path,
    version=None,
    *,
    dataset=None,
    class_names=None,
    mean=None,
    stddev=None,
    dtype="float32",
    image_dtype="float32",
    fast_convolutions=True,
    jit_compile=False,
    compiled_op=False,
):
    """Writes a classifier as `path/<version>/`, a SavedModel that a stock TensorFlow Serving runs.

    Weights are constants, batch normalisation is folded into the convolutions, the normalisation of the images and the
    class names are inside, and all operations are TensorFlow's own. The signatures, H, W and C being the size and the
    channels of the images, and (h, w) that of attention maps:

    - serving_default: images (B, H, W, C), pixels 0..255 -> logits and probabilities, float32 (B, classes), label,
      int64 (B,), and class_name, string (B,).
    - serve_bytes: image_bytes, string (B,), JPEG or PNG of any size -> the same; of models of grey or RGB images.
    - explain: images -> the same, and attention (B, h, w), the same at the size of the images, attention_image
      (B, H, W), attention_quantized and anchor_index (B, h, w), rate_bits (B,); of the parts that the model has. Of
      "Learn To Pay Attention": attention1, attention1_image ... instead.
    - predict_mc: images, samples and seed, int32 scalars or (B,) -> probabilities (the mean over the samples) and
      probabilities_stddev (B, classes), entropy_bits and mutual_information_bits (B,), label and class_name. The same
      seed gives the same answer. Only of models that draw maps or latents.
    - preprocess: image_bytes -> images, what serve_bytes shows to the model.

    Everything but predict_mc uses the means, as `model.explain` does. The folder appears when it is whole.

    Args:
        model: an `AIBClassifier` or a `PayAttentionClassifier`.
        path: local folder of the versions; its name is that of the model in TensorFlow Serving.
        version: a number from 1 up; None for the one after the largest that is there.
        dataset: name or `DatasetInfo` of the data set that the model was trained on, for the statistics that normalise
            pixels, how pictures are resized, and the class names. None: the next three say so, and pictures are
            resized to the model's input.
        class_names: names of the classes, in the place of those of the data set; numbers where there is neither.
        mean: number, or one a channel. Without a data set the model reads (pixels / 255 - mean) / stddev, by default
            pixels / 255. Many of keras.applications read -1 to 1, which is mean=0.5, stddev=0.5, or 0 to 255, which is
            stddev=1/255.
        stddev: the same.
        dtype: "bfloat16" for convolutions and matrix products in bfloat16, with weights of half the size; all inputs
            and outputs stay as they are.
        image_dtype: type of `images`, "float32" or "uint8", which is a fourth of the bytes in a request.
        fast_convolutions: whether large float32 3x3 convolutions take half the multiplications and twice the weights
            (Winograd's minimal filtering), which is for CPUs; False for a GPU, whose libraries choose such ways
            themselves, and for the smallest folder.
        jit_compile: whether XLA compiles the model, once for each batch size; the server must have been started with
            it (`--xla_cpu_compilation_enabled` of TensorFlow Serving).
        compiled_op: keep the compiled op in the graph, for servers that were built with it.

    Returns:
        The `pathlib.Path` of the version folder.

    Raises:
        TypeError: if the model is of another class.
        ValueError: for unknown choices, a path that is not local, a data set, statistics or class names that do not fit
            the model, weights that are not finite.
        UnportableModelError: a ValueError, if a layer of the model makes operations that are not TensorFlow's own.
        ImportError: with `compiled_op`, if it cannot be used here; on another Keras backend than TensorFlow.
        FileExistsError: if the version is there already; it stays as it is.
        OSError: if the folder cannot be written; nothing half-written stays.
    """
    check_choice("dtype", dtype, ("float32", "bfloat16"))
    check_choice("image_dtype", image_dtype, ("float32", "uint8"))
    if version is not None:
        check_count("version", version, maximum=_MAX_VERSION)
    if compiled_op and implementation().name != "custom_op":
        raise ImportError(f"The compiled op cannot be used: {implementation().reason} Received: compiled_op=True")
    if keras.config.backend() != "tensorflow":
        raise ImportError(
            "A SavedModel is made by TensorFlow: save the model as .keras, and load it for the export in a process "
            f"with KERAS_BACKEND=tensorflow. Received: KERAS_BACKEND={keras.config.backend()}"
        )
    path = files.path(path)
    if isinstance(path, files.RemotePath):
        raise ValueError(
            "A SavedModel is written to a local folder: export to one, and copy the folder of the version to where the "
            f"server looks. Received: path={str(path)!r}"
        )
    check_classifier(model)
    preprocessing = Preprocessing.of(model, dataset, class_names, mean, stddev)
    _check_finite(model)

    def write(folder):
        inference = inference_of(model, preprocessing, dtype, fast_convolutions, jit_compile, compiled_op)
        signatures = signatures_of(inference, preprocessing, image_dtype)
        inputs = {name: signature.input_signature for name, signature in signatures.items()}
        # Nobody trains what is served: gradients stay out.
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
        with _as_os_error(path):
            tf.saved_model.save(tf.Module(), str(folder), signatures=signatures, options=options)
        if not compiled_op:
            check_stock_operations(folder, xla=jit_compile)
        with _as_os_error(path):
            write_warmup_requests(folder, path.resolve().name, inputs)
        _check_answers(folder, inputs)

    folder = _new_version(path, version, write)
    _logger.info("Wrote version %s of %s to %s.", folder.name, model.name, folder)
    return folder


def next_version(path):
    """The number after the largest version folder in `path`, 1 where there is none."""
    return 1 + max(_versions(path), default=0)


def _versions(path):
    path = Path(path)
    entries = path.iterdir() if path.is_dir() else ()
    return [int(entry.name) for entry in entries if entry.name.isdecimal()]


def _new_version(path, version, write):
    """Makes the folder of a version, or of the next one, which another exporter may have taken meanwhile."""
    while True:
        number = next_version(path) if version is None else version
        if number in _versions(path):
            raise FileExistsError(
                f"This version exists, and a server may be using it. The next free one is {next_version(path)}. "
                f"Received: path={str(path)!r}, version={version}"
            )
        target = path / str(number)
        try:
            with files.new_folder(target) as folder:
                write(folder)
        except FileExistsError:
            if version is None and number in _versions(path):
                continue
            raise
        return target


def _check_finite(model):
    for variable in model.weights:
        values = keras.ops.convert_to_numpy(variable)
        if not np.isfinite(values.astype(np.float32)).all():
            raise ValueError(
                "A weight of the model is NaN or infinite, and so would every answer be: take weights from before the "
                f"training diverged. Received: {variable.path}"
            )


def _check_answers(folder, inputs):
    """Loads what was written and sends it one request of each kind: a server that finds one refused loads no model."""
    loaded = tf.saved_model.load(str(folder))
    for request in warmup_requests("", inputs, batch_sizes=[1]):
        signature = loaded.signatures[request.model_spec.signature_name]
        signature(**{name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()})


@contextlib.contextmanager
def _as_os_error(path):
    """TensorFlow has its own errors for disks that are full or cannot be written to."""
    try:
        yield
    except tf.errors.OpError as error:
        raise OSError(
            f"The model could not be written, and nothing of it stays: {error.message}. Free the disk, or name another "
            f"folder. Received: path={str(path)!r}"
        ) from error
