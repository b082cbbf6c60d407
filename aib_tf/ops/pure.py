"""Anchor-nearest quantization in `keras.ops`: for any Keras backend, and where there is no compiled op.

The rules are those of custom_ops/nearest_anchor/nearest_anchor.h.
"""

import math

import keras
from keras import ops

MAX_ANCHORS = 65_536


def nearest_anchor(x, anchors):
    """Returns quantized, index and the two losses of tensors whose dtypes and static shapes are right."""
    anchors = _checked(anchors)
    if getattr(x.shape, "rank", 0) is not None:
        return _nearest_anchor(x, anchors)
    # A graph of TensorFlow that does not know how many dimensions x has: Keras cannot tell its shape, TensorFlow can.
    import tensorflow as tf

    quantized, index, *losses = _nearest_anchor(tf.reshape(x, [-1]), anchors)
    return tf.reshape(quantized, tf.shape(x)), tf.reshape(index, tf.shape(x)), *losses


def quantize(x, anchors):
    """Returns quantized and index alone, for models that are only served.

    There are no losses, no gradient and no check, and only operations that other runtimes which read TensorFlow's
    graphs know as well: OpenVINO has no `searchsorted`.

    Args:
        x: float tensor of a known number of dimensions.
        anchors: finite numbers, shape (Q,) with a known Q, of the dtype that goes with `x`.
    """
    wide_x = ops.cast(x, anchors.dtype)
    index = _nearest_index(wide_x, anchors, _bisect)
    nearest = ops.where(ops.isnan(wide_x), wide_x, ops.take(anchors, index, axis=0))
    return ops.cast(nearest, x.dtype), index


@ops.custom_gradient
def _nearest_anchor(x, anchors):
    x_dtype = x.dtype
    wide_x = ops.cast(x, anchors.dtype)
    are_finite = ops.all(ops.isfinite(anchors))
    index = ops.where(are_finite, _nearest_index(wide_x, anchors, _searchsorted), 0)
    nearest = ops.take(ops.where(are_finite, anchors, math.nan), index, axis=0)
    nearest = ops.where(ops.isnan(wide_x), wide_x, nearest)
    difference = wide_x - nearest
    count = _count(x)
    scale = 1.0 / ops.maximum(ops.cast(count, anchors.dtype), 1.0)
    # Other backends have no float64, or not always.
    sum_dtype = "float64" if keras.config.backend() == "tensorflow" else anchors.dtype
    total = ops.sum(ops.cast(ops.square(difference), sum_dtype))
    loss = ops.cast(total / ops.maximum(ops.cast(count, sum_dtype), 1.0), anchors.dtype)

    def gradient(*upstream):
        # One for each output: TensorFlow passes them as arguments, JAX as one tuple.
        d_quantized, _, d_codebook, d_commitment = upstream[0] if len(upstream) == 1 else upstream
        d_x = ops.cast(d_quantized, anchors.dtype) + _weighted(d_commitment, 2.0 * scale, difference)
        per_anchor = ops.segment_sum(
            ops.reshape(-difference, (-1,)), ops.reshape(index, (-1,)), num_segments=ops.shape(anchors)[0]
        )
        return ops.cast(d_x, x_dtype), _weighted(d_codebook, 2.0 * scale, per_anchor)

    return (ops.cast(nearest, x_dtype), index, loss, ops.copy(loss)), gradient


def _checked(anchors):
    """Returns the anchors, and raises if they are not finite, where TensorFlow can."""
    if keras.config.backend() != "tensorflow":
        return anchors
    import tensorflow as tf

    anchors = tf.ensure_shape(anchors, [None])
    are_finite = tf.math.is_finite(anchors)
    if not tf.executing_eagerly():
        message = "`anchors` must be finite. Received: anchors="
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(are_finite), [message, anchors])]):
            return tf.identity(anchors)
    if not tf.reduce_all(are_finite):
        position = int(tf.argmin(tf.cast(are_finite, tf.int32)))
        message = f"`anchors` must be finite. Received: anchors[{position}]={float(anchors[position])}"
        raise tf.errors.InvalidArgumentError(None, None, message)
    return anchors


def _count(x):
    """The number of elements, which an int32 could not hold."""
    if keras.config.backend() != "tensorflow":
        return math.prod(x.shape)
    import tensorflow as tf

    return tf.size(x, out_type=tf.int64)


def _weighted(upstream, scale, values):
    """Upstream * scale * values, and 0 where a loss is not used, also for infinite and NaN values."""
    return ops.where(upstream == 0, ops.zeros_like(values), (upstream * scale) * values)


def _nearest_index(x, anchors, count_not_above):
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

    above = count_not_above(ascending, position)
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


def _searchsorted(ascending, position):
    """How many of the ascending values are not above each position."""
    flat = ops.reshape(position, (-1,))
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        # That of Keras 3.10 takes the length of a tensor, which a graph does not have.
        above = tf.searchsorted(ascending, flat, side="right")
    else:
        above = ops.searchsorted(ascending, flat, side="right")
    return ops.reshape(ops.cast(above, "int32"), ops.shape(position))


def _bisect(ascending, position):
    """The same in steps of powers of two, by comparing alone; slower."""
    total = ascending.shape[0]
    count = ops.zeros_like(position, dtype="int32")
    for level in reversed(range(total.bit_length())):
        wider = count + 2**level
        # Those before this one are not above either, since they ascend.
        last = ops.take(ascending, ops.minimum(wider, total) - 1, axis=0)
        count = ops.where(ops.logical_and(wider <= total, last <= position), wider, count)
    return count
