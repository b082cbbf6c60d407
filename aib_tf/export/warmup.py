"""Warm-up requests: what TensorFlow Serving runs on a model before it answers anyone.

The first request at each batch size pays for what TensorFlow does only once: optimising the graph, choosing
kernels, and with XLA compiling. A server that finds `assets.extra/tf_serving_warmup_requests` beside the SavedModel
sends those requests to the model while it loads it. It loads no model on which one of them fails, so each request
has to be one that the model answers.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from aib_tf import files
from aib_tf.validation import check_count

__all__ = ["WARMUP_BATCH_SIZES", "WARMUP_FILE", "warmup_requests", "write_warmup_requests"]

# The sizes that deploy/batching.config lets a server form, so that it runs no size for the first time under load.
WARMUP_BATCH_SIZES = (1, 8, 32)

# Where TensorFlow Serving looks, and how many records it takes (kRequestsFileName and kMaxNumRecords in
# tensorflow_serving/servables/tensorflow/saved_model_warmup_util.h).
WARMUP_FILE = "assets.extra/tf_serving_warmup_requests"
_MOST_RECORDS = 1000

_SAMPLES, _SEED = 2, 0
_SIDE_WITHOUT_IMAGES = 64  # pixels, where no signature says how large the model's images are


def write_warmup_requests(
    folder: str | os.PathLike,
    model_name: str,
    signatures: Mapping[str, Sequence[tf.TensorSpec]],
    batch_sizes: Sequence[int] = WARMUP_BATCH_SIZES,
) -> Path:
    """Writes one request for each signature and batch size, whole or not at all.

    A request of n float32 `images` holds 4 n H W C bytes, which with the default sizes is 0.5 MB a signature for images
    of 32x32x3, and 99 MB for 448x448x3: where that is too much, the file can be deleted.

    Args:
        folder: folder of one version of a SavedModel.
        model_name: as in `warmup_requests`.
        signatures: as in `warmup_requests`.
        batch_sizes: as in `warmup_requests`.

    Returns:
        Path of the file: a TFRecord of `tensorflow.serving.PredictionLog`.

    Raises:
        ValueError: as in `warmup_requests`, and unless there are 1 to 1,000 requests, which is what a server takes.
        tf.errors.OpError: if the file cannot be written, for example because the disk is full.
    """
    requests = warmup_requests(model_name, signatures, batch_sizes)
    check_count("len(signatures) * len(batch_sizes)", len(requests), maximum=_MOST_RECORDS)
    path = Path(folder) / WARMUP_FILE
    with files.replacing(path) as temporary, tf.io.TFRecordWriter(os.fspath(temporary)) as writer:
        for request in requests:
            log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
            writer.write(log.SerializeToString(deterministic=True))
    return path


def warmup_requests(
    model_name: str,
    signatures: Mapping[str, Sequence[tf.TensorSpec]],
    batch_sizes: Sequence[int] = WARMUP_BATCH_SIZES,
) -> list[predict_pb2.PredictRequest]:
    """Makes one request for each signature and batch size.

    The images are drawn, the same ones every time: a coloured gradient and a disc, each image with its own. Encoded
    ones are twice as high and wide as the model's images, so that resizing is warmed up as well; the first of a batch
    is a JPEG, the others are PNGs. `samples` and `seed` are vectors of one number for each image, the form that a
    server takes with batching and without.

    Args:
        model_name: what the requests call the model. A server warms up the model beside which it finds them, whatever
            its name is there; this one is a label of its metrics.
        signatures: of each signature, the specs of its inputs, by their names: `images` (B, H, W, C) of any real dtype,
            `image_bytes` (B,) string, `samples` and `seed`, of an integer dtype and any shape.
        batch_sizes: the numbers of images of a request, each 1 or more.

    Returns:
        Requests in the order of `signatures`, and for each of these in the order of `batch_sizes`.

    Raises:
        ValueError: if a batch size is not an integer from 1 up, an input has another name than these four, or the
            `images` of a signature have no fixed height, width and number of channels.
    """
    sizes = [check_count("batch_sizes", size) for size in batch_sizes]
    height, width = _encoded_size(signatures)
    requests = []
    for signature, specs in signatures.items():
        for size in sizes:
            request = predict_pb2.PredictRequest()
            request.model_spec.name = model_name
            request.model_spec.signature_name = signature
            for spec in specs:
                if spec.name == "images":
                    value = _pictures(size, *_image_shape(spec)).astype(spec.dtype.as_numpy_dtype)
                elif spec.name == "image_bytes":
                    value = _encoded(_pictures(size, height, width, 3))
                elif spec.name in ("samples", "seed"):
                    value = np.full(size, _SAMPLES if spec.name == "samples" else _SEED, spec.dtype.as_numpy_dtype)
                else:
                    raise ValueError(
                        "There is nothing to warm this input up with; the names are images, image_bytes, samples "
                        f"and seed. Received: signatures[{signature!r}] with an input named {spec.name!r}"
                    )
                request.inputs[spec.name].CopyFrom(tf.make_tensor_proto(value))
            requests.append(request)
    return requests


def _image_shape(spec):
    """(height, width, channels) of an `images` input."""
    shape = spec.shape[1:].as_list() if spec.shape.rank == 4 else [None]
    if None in shape:
        raise ValueError(
            "`images` must be (B, H, W, C) with fixed H, W and C: export the model with its input size. "
            f"Received: shape={spec.shape}"
        )
    return shape


def _encoded_size(signatures):
    """(height, width) of encoded pictures: twice that of the images of a signature that has them."""
    for specs in signatures.values():
        for spec in specs:
            if spec.name == "images":
                height, width, _ = _image_shape(spec)
                return 2 * height, 2 * width
    return _SIDE_WITHOUT_IMAGES, _SIDE_WITHOUT_IMAGES


def _pictures(count, height, width, channels):
    """Draws (count, height, width, channels) uint8 pictures, in integers: the same bits on every machine."""
    number, y, x, channel = np.ogrid[:count, :height, :width, :channels]
    # From 0 to 255 along both axes and back again, each channel and picture with a start of its own.
    ramp = (255 * y // height + 255 * x // width + 85 * channel + 37 * number) % 512
    gradient = np.minimum(ramp, 511 - ramp)
    # A disc of a quarter of the shorter side, at another place in each picture.
    side = min(height, width)
    centre_y, centre_x = height // 4 + 7 * number % (height // 2 + 1), width // 4 + 5 * number % (width // 2 + 1)
    disc = 16 * ((y - centre_y) ** 2 + (x - centre_x) ** 2) <= side**2
    return np.where(disc, 255 - gradient, gradient).astype(np.uint8)


def _encoded(pictures):
    """Encodes (count, height, width, 3) uint8 pictures as (count,) bytes: a JPEG, then PNGs."""
    encoders = [tf.io.encode_jpeg, *[tf.io.encode_png] * (len(pictures) - 1)]
    return np.array([encode(picture).numpy() for encode, picture in zip(encoders, pictures, strict=True)], object)
