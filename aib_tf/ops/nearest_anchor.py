"""Anchor-nearest quantization with a straight-through gradient: the compiled op, or the pure path in its place."""

from typing import Any, NamedTuple

import keras
from keras import ops

from aib_tf.ops import custom_op, pure
from aib_tf.ops.pure import MAX_ANCHORS

_FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")


class NearestAnchor(NamedTuple):
    """What `nearest_anchor` returns.

    Attributes:
        quantized: the nearest anchor of each element; shape and dtype of `x`.
        index: int32, shape of `x`; which anchor that is.
        codebook_loss: scalar, float32 (float64 for float64 anchors); its gradient moves the anchors only.
        commitment_loss: the same value; its gradient moves `x` only.
    """

    quantized: Any
    index: Any
    codebook_loss: Any
    commitment_loss: Any


def nearest_anchor(x, anchors):
    """Replaces each element of `x` by its nearest anchor.

        index     = argmin_k |x - anchors[k]|         (the lowest k on ties and duplicates)
        quantized = anchors[index]
        codebook_loss = commitment_loss = mean((x - anchors[index])^2)

    Distances are evaluated in float32 (float64 for float64 anchors), and so are the squares, which are then summed in
    float64. A NaN in `x` stays NaN with index 0; plus and minus infinity go to the largest and the smallest anchor. The
    losses of an empty `x` are 0, so that an empty batch, which tf.distribute can hand to a replica, costs nothing.

    The gradient is straight-through: with N elements in `x` and upstream gradients g,

        d_x          = g_quantized + g_commitment * 2 (x - anchors[index]) / N
        d_anchors[k] = g_codebook * 2 / N * sum over index = k of (anchors[k] - x)

    so the quantized values send no gradient to the anchors, the commitment loss none either, and the codebook loss
    none to `x`. `index` has no gradient.

    The compiled op does the work where it was built for the TensorFlow that runs; `implementation()` tells. Otherwise
    the pure path, in `keras.ops`, gives the same results, more slowly. There is never a table of N x Q distances.

    Args:
        x: float16, bfloat16, float32 or float64 tensor of any shape, with N elements.
        anchors: finite numbers in any order, float32 (float64 when `x` is float64), shape (Q,), 1 <= Q <= 65,536.

    Returns:
        A `NearestAnchor(quantized, index, codebook_loss, commitment_loss)`.

    Raises:
        TypeError: if `x` or `anchors` is not of a dtype named above, or the two do not go together.
        ValueError: if `anchors` is not a vector of 1 to 65,536 elements.
        tf.errors.InvalidArgumentError: on the TensorFlow backend, if `anchors` are not finite, or turn out not to be a
            vector of 1 to 65,536 elements when they come; a kernel for GPUs or made by XLA cannot raise, and gives NaN.

    Reference:
        - Lai et al., "Information Bottleneck Approach to Spatial Attention Learning", IJCAI 2021.
        - van den Oord et al., "Neural Discrete Representation Learning", 2017, equation 3, for the two losses.
    """
    # `copy` reads variables: a custom gradient takes tensors. On TensorFlow it moves no data.
    x = ops.copy(ops.convert_to_tensor(x))
    anchors = ops.copy(ops.convert_to_tensor(anchors))
    _validate(x, anchors)
    quantize = custom_op.library().nearest_anchor or pure.nearest_anchor
    return NearestAnchor(*quantize(x, anchors))


def _validate(x, anchors):
    x_dtype = keras.backend.standardize_dtype(x.dtype)
    anchors_dtype = keras.backend.standardize_dtype(anchors.dtype)
    if x_dtype not in _FLOAT_DTYPES:
        raise TypeError(f"`x` must be one of {', '.join(_FLOAT_DTYPES)}. Received: x.dtype={x_dtype}")
    expected = "float64" if x_dtype == "float64" else "float32"
    if anchors_dtype != expected:
        raise TypeError(
            f"`anchors` must be {expected} when `x` is {x_dtype}; cast one of them. "
            f"Received: anchors.dtype={anchors_dtype}"
        )
    if getattr(anchors.shape, "rank", 1) is None:
        return  # a TensorFlow graph does not know it yet; the op will
    if len(anchors.shape) != 1:
        raise ValueError(f"`anchors` must be a vector (Q,). Received: anchors.shape={tuple(anchors.shape)}")
    count = anchors.shape[0]
    if count is not None and not 1 <= count <= MAX_ANCHORS:
        raise ValueError(f"`anchors` must have 1 to {MAX_ANCHORS} elements. Received: anchors.shape=({count},)")
