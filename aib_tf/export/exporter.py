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
from aib_tf.export.warmup import write_warmup_requests
from aib_tf.ops import implementation
from aib_tf.validation import check_choice, check_count

_logger = logging.getLogger(__name__)


def saved_model(
    model,
    path,
    version=None,
    *,
    dataset=None,
    class_names=None,
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
    - serve_bytes: image_bytes, string (B,), JPEG or PNG of any size -> the same.
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
        path: folder of the versions; its name is that of the model in TensorFlow Serving.
        version: a number from 1 up; None for the one after the largest that is there.
        dataset: name or `DatasetInfo` of the data set that the model was trained on, for the statistics that normalise
            pixels, how pictures are resized, and the class names. None: the model reads pixels / 255, pictures are
            resized to its input, and classes are called by their numbers.
        class_names: names of the classes in the place of those of the data set.
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
        ValueError: for unknown choices, a data set or class names that do not fit the model, weights that are not
            finite.
        UnportableModelError: a ValueError, if a layer of the model makes operations that are not TensorFlow's own.
        ImportError: with `compiled_op`, if it cannot be used here; on another Keras backend than TensorFlow.
        FileExistsError: if the version is there already; it stays as it is.
        OSError: if the folder cannot be written; nothing half-written stays.
    """
    check_choice("dtype", dtype, ("float32", "bfloat16"))
    check_choice("image_dtype", image_dtype, ("float32", "uint8"))
    path = Path(path)
    version = next_version(path) if version is None else check_count("version", version)
    if (path / str(version)).exists():
        raise FileExistsError(
            f"This version exists, and a server may be using it. The next free one is {next_version(path)}. "
            f"Received: path={str(path)!r}, version={version}"
        )
    if compiled_op and implementation().name != "custom_op":
        raise ImportError(f"The compiled op cannot be used: {implementation().reason} Received: compiled_op=True")
    if keras.config.backend() != "tensorflow":
        raise ImportError(
            "A SavedModel is made by TensorFlow: save the model as .keras, and load it for the export in a process "
            f"with KERAS_BACKEND=tensorflow. Received: KERAS_BACKEND={keras.config.backend()}"
        )
    check_classifier(model)
    preprocessing = Preprocessing.of(model, dataset, class_names)
    _check_finite(model)
    with files.new_folder(path / str(version)) as folder:
        inference = inference_of(model, preprocessing, dtype, fast_convolutions, jit_compile, compiled_op)
        module = tf.Module()
        signatures = signatures_of(inference, preprocessing, image_dtype)
        with _as_os_error(path):
            # Nobody trains what is served: gradients stay out.
            options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
            tf.saved_model.save(module, str(folder), signatures=signatures, options=options)
            if not compiled_op:
                check_stock_operations(folder)
            inputs = {name: signature.input_signature for name, signature in signatures.items()}
            write_warmup_requests(folder, path.resolve().name, inputs)
    _logger.info("Wrote version %d of %s to %s.", version, model.name, path / str(version))
    return path / str(version)


def next_version(path):
    """The number after the largest version folder in `path`, 1 where there is none."""
    path = Path(path)
    entries = path.iterdir() if path.is_dir() else ()
    return 1 + max((int(entry.name) for entry in entries if entry.name.isdecimal()), default=0)


def _check_finite(model):
    for variable in model.weights:
        values = keras.ops.convert_to_numpy(variable)
        if not np.isfinite(values.astype(np.float32)).all():
            raise ValueError(
                "A weight of the model is NaN or infinite, and so would every answer be: take weights from before the "
                f"training diverged. Received: {variable.path}"
            )


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
