"""Batch normalisation in training as one kernel, on the backend that has one."""

import keras

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
