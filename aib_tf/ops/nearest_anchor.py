"""Anchor-nearest quantization with a straight-through gradient, in `keras.ops` for any Keras backend."""

import math
from typing import Any, NamedTuple

import keras
from keras import ops

MAX_ANCHORS = 65_536
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


class Implementation(NamedTuple):
    """Which path `nearest_anchor` takes, and why.

    Attributes:
        name: "tensorflow" for the pure path on the TensorFlow backend, otherwise the name of the Keras backend.
        reason: one sentence.
    """

    name: str
    reason: str


def implementation():
    """Says which implementation `nearest_anchor` uses.

    Returns:
        An `Implementation(name, reason)`.
    """
    backend = keras.config.backend()
    return Implementation(backend, f"aib_tf has only its pure path here, in keras.ops on the {backend} backend.")


def nearest_anchor(x, anchors):
    """Replaces each element of `x` by its nearest anchor.

        index     = argmin_k |x - anchors[k]|         (the lowest k on ties and duplicates)
        quantized = anchors[index]
        codebook_loss = commitment_loss = mean((x - anchors[index])^2)

    Distances are evaluated in float32 (float64 for float64 anchors). A NaN in `x` stays NaN with index 0; plus and
    minus infinity go to the largest and the smallest anchor. The losses of an empty `x` are 0, so that an empty
    batch, which tf.distribute can hand to a replica, costs nothing.

    The gradient is straight-through: with N elements in `x` and upstream gradients g,

        d_x          = g_quantized + g_commitment * 2 (x - anchors[index]) / N
        d_anchors[k] = g_codebook * 2 / N * sum over index = k of (anchors[k] - x)

    so the quantized values send no gradient to the anchors, the commitment loss none either, and the codebook loss
    none to `x`. `index` has no gradient.

    Time grows with N log Q, memory with N + Q log Q: there is no table of N x Q distances.

    Args:
        x: float16, bfloat16, float32 or float64 tensor of any shape, with N elements.
        anchors: finite numbers in any order, float32 (float64 when `x` is float64), shape (Q,), 1 <= Q <= 65,536.

    Returns:
        A `NearestAnchor(quantized, index, codebook_loss, commitment_loss)`.

    Raises:
        TypeError: if `x` or `anchors` is not of a dtype named above, or the two do not go together.
        ValueError: if `anchors` is not a vector of 1 to 65,536 elements.

    Reference:
        - Lai et al., "Information Bottleneck Approach to Spatial Attention Learning", IJCAI 2021.
        - van den Oord et al., "Neural Discrete Representation Learning", 2017, equation 3, for the two losses.
    """
    # `copy` reads variables: a custom gradient takes tensors. On TensorFlow it moves no data.
    x = ops.copy(ops.convert_to_tensor(x))
    anchors = ops.copy(ops.convert_to_tensor(anchors))
    _validate(x, anchors)
    return NearestAnchor(*_nearest_anchor(x, anchors))


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
    if len(anchors.shape) != 1:
        raise ValueError(f"`anchors` must be a vector (Q,). Received: anchors.shape={tuple(anchors.shape)}")
    count = anchors.shape[0]
    if count is not None and not 1 <= count <= MAX_ANCHORS:
        raise ValueError(f"`anchors` must have 1 to {MAX_ANCHORS} elements. Received: anchors.shape=({count},)")


@ops.custom_gradient
def _nearest_anchor(x, anchors):
    x_dtype = x.dtype
    wide_x = ops.cast(x, anchors.dtype)
    index = _nearest_index(wide_x, anchors)
    nearest = ops.where(ops.isnan(wide_x), wide_x, ops.take(anchors, index, axis=0))
    difference = wide_x - nearest
    # Dimensions are multiplied as floats: as int32, the element count of a very large tensor would overflow.
    count = math.prod(ops.cast(size, anchors.dtype) for size in ops.shape(x)) if len(x.shape) else 1.0
    scale = 1.0 / ops.maximum(ops.cast(count, anchors.dtype), 1.0)
    loss = ops.sum(ops.square(difference)) * scale

    def gradient(*upstream):
        # One for each output: TensorFlow passes them as arguments, JAX as one tuple.
        d_quantized, _, d_codebook, d_commitment = upstream[0] if len(upstream) == 1 else upstream
        d_x = ops.cast(d_quantized, anchors.dtype) + _weighted(d_commitment, 2.0 * scale, difference)
        per_anchor = ops.segment_sum(
            ops.reshape(-difference, (-1,)), ops.reshape(index, (-1,)), num_segments=ops.shape(anchors)[0]
        )
        return ops.cast(d_x, x_dtype), _weighted(d_codebook, 2.0 * scale, per_anchor)

    return (ops.cast(nearest, x_dtype), index, loss, ops.copy(loss)), gradient


def _weighted(upstream, scale, values):
    """Upstream * scale * values, and 0 where a loss is not used, also for infinite and NaN values."""
    return ops.where(upstream == 0, ops.zeros_like(values), (upstream * scale) * values)


def _nearest_index(x, anchors):
    """Computes argmin_k |x - anchors[k]|, lowest k on ties, without a table of all distances.

    In the sorted anchors, the nearest ones form one run around the place where `x` would be inserted. The run is
    longer than one only at a midpoint, at duplicates, or where rounding makes several distances equal (x far outside
    of closely spaced anchors). Its lowest original index is found by widening it in steps of powers of two, from the
    largest that fits: distances do not fall on the way out, so that an equal distance at the end of a step means equal
    distances all along it, and a table of the lowest index of every 2^k neighbours answers for them at once. Where no
    run is longer than its first two places, which is almost always, nothing of that is computed.
    """
    order = ops.cast(ops.argsort(anchors), "int32")
    ascending = ops.take(anchors, order, axis=0)
    last = ops.shape(anchors)[0] - 1
    smallest, largest = ascending[0], ascending[-1]

    # An infinite x is as far from one anchor as from another: let it stand on the extreme anchor instead.
    position = ops.where(x == math.inf, largest, ops.where(x == -math.inf, smallest, x))
    position = ops.where(ops.isnan(x), smallest, position)

    above = ops.cast(ops.searchsorted(ascending, ops.reshape(position, (-1,)), side="right"), "int32")
    above = ops.reshape(above, ops.shape(x))
    below = ops.maximum(above - 1, 0)
    above = ops.minimum(above, last)

    def distance(slot):
        return ops.abs(position - ops.take(ascending, slot, axis=0))

    distance_below, distance_above = distance(below), distance(above)
    shortest = ops.minimum(distance_below, distance_above)
    low = ops.where(distance_below == shortest, below, above)
    high = ops.where(distance_above == shortest, above, below)

    def equally_near(slot):
        inside = ops.logical_and(slot >= 0, slot <= last)
        return ops.logical_and(inside, distance(ops.clip(slot, 0, last)) == shortest)

    index = ops.minimum(ops.take(order, low, axis=0), ops.take(order, high, axis=0))
    longer = ops.any(ops.logical_or(equally_near(low - 1), equally_near(high + 1)))

    def widened():
        lowest = order  # lowest[i] is the lowest original index of the slots i to i + step - 1
        tables = []
        for level in range(((anchors.shape[0] or MAX_ANCHORS) - 1).bit_length()):
            step = 2**level
            tables.append((step, lowest))
            following = ops.minimum(ops.arange(ops.shape(order)[0], dtype="int32") + step, last)
            lowest = ops.minimum(lowest, ops.take(lowest, following, axis=0))
        start, end, best = low, high, index
        for step, lowest in reversed(tables):
            down, up = equally_near(start - step), equally_near(end + step)
            on_the_way_down = ops.take(lowest, ops.maximum(start - step, 0), axis=0)
            on_the_way_up = ops.take(lowest, ops.minimum(end + 1, last), axis=0)
            best = ops.where(down, ops.minimum(best, on_the_way_down), best)
            best = ops.where(up, ops.minimum(best, on_the_way_up), best)
            start = ops.where(down, start - step, start)
            end = ops.where(up, end + step, end)
        return best

    index = ops.cond(longer, widened, lambda: index)
    return ops.where(ops.isnan(x), 0, index)
