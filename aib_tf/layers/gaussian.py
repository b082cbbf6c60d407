"""What the two Gaussian layers share: a standard deviation from raw scores, and reparameterised samples."""

import keras
from keras import ops

# softplus(r) is exactly 0 in float32 from about r = -104 on, and its logarithm minus infinity. The floor is far below
# where training goes: softplus(-5) = 0.0067 is the start.
STDDEV_FLOOR = 1e-6
_STDDEV_SHIFT = 5.0


def statistics_dtype(layer):
    """The dtype for means and standard deviations: float32 also under mixed precision, float64 where asked for."""
    return "float64" if layer.compute_dtype == "float64" else "float32"


def loss_dtype():
    """The dtype of the loss terms that layers add: that of Keras's own losses, which Keras adds them to."""
    return keras.config.floatx()


def stddev_from_scores(scores):
    """Standard deviation max(softplus(scores - 5), 1e-6)."""
    return ops.maximum(ops.softplus(scores - _STDDEV_SHIFT), STDDEV_FLOOR)


def reparameterize(mean, stddev, samples, seed_generator):
    """Draws mean + stddev * noise with standard normal noise (Kingma and Welling, 2014).

    Args:
        mean: float tensor of any shape.
        stddev: float tensor of the same shape.
        samples: None for one sample in the shape of `mean`, or a number n for a new leading axis of n samples.
        seed_generator: the `SeedGenerator` of the layer that owns the noise.

    Returns:
        Float tensor, the shape of `mean` or (samples, *shape of mean).
    """
    shape = ops.shape(mean) if samples is None else (samples, *ops.shape(mean))
    return mean + stddev * keras.random.normal(shape, dtype=mean.dtype, seed=seed_generator)
