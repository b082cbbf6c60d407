"""Batch normalisation in training: as one kernel where there is one, and over the batches of all replicas."""

import keras
from keras import ops

from aib_tf.ops.replicas import sum_over_replicas

_TYPES = ("float16", "bfloat16", "float32")


def fused_batch_normalization(x, scale, offset, epsilon):
    """Normalises maps by the statistics of their batch, as PyTorch's training mode does.

        y = scale (x - mean) / sqrt(variance + epsilon) + offset

    with the mean and the variance (divided by n) over all axes but the last, computed in float32.

    Args:
        x: (B, H, W, C) float16, bfloat16 or float32 tensor.
        scale: (C,) tensor.
        offset: (C,) tensor.
        epsilon: number.

    Returns:
        y of x's shape and dtype, the mean (C,), and the unbiased variance (C,), divided by n - 1; or None where there
        is no such kernel: on another backend than TensorFlow, for another rank or dtype.
    """
    if keras.config.backend() != "tensorflow" or len(x.shape) != 4:
        return None
    if keras.backend.standardize_dtype(x.dtype) not in _TYPES:
        return None
    import tensorflow as tf

    # Not tf.compat.v1.nn.fused_batch_norm, which raises epsilon to 1.001e-5.
    result = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=tf.cast(scale, "float32"),
        offset=tf.cast(offset, "float32"),
        mean=tf.zeros((0,)),
        variance=tf.zeros((0,)),
        epsilon=epsilon,
        is_training=True,
    )
    return result.y, result.batch_mean, result.batch_variance


def synchronized_batch_normalization(x, scale, offset, epsilon):
    """Normalises by the statistics of the batches of all replicas of `tf.distribute`, as if they were one batch.

    The formula is that of `fused_batch_normalization`. There are two exchanges: of sums, then of sums of squares around
    the common mean. (Keras subtracts the square of the mean from the mean of the squares, of which little is left in
    float32 where a channel hardly varies.)

    Args:
        x: (..., C) float tensor.
        scale: (C,) tensor.
        offset: (C,) tensor.
        epsilon: number.

    Returns:
        y of x's shape and dtype, the mean (C,), and the unbiased variance (C,), both in float32 (float64 for float64).
    """
    dtype = "float64" if keras.backend.standardize_dtype(x.dtype) == "float64" else "float32"
    values = ops.reshape(ops.cast(x, dtype), (-1, x.shape[-1]))
    # Replicas may have a different number of images.
    sums = ops.concatenate([ops.sum(values, axis=0), ops.sum(ops.ones_like(values[:, :1]), axis=0)], axis=0)
    sums = sum_over_replicas(sums)
    count = sums[-1]
    mean = sums[:-1] / count
    squares = sum_over_replicas(ops.sum(ops.square(values - mean), axis=0))
    factor = ops.cast(scale, dtype) * ops.rsqrt(squares / count + epsilon)
    y = (ops.cast(x, dtype) - mean) * factor + ops.cast(offset, dtype)
    # A single value has no variance.
    return ops.cast(y, x.dtype), mean, squares / ops.maximum(count - 1.0, 1.0)
