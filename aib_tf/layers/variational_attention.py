"""Variational spatial attention: a Gaussian over 2-D attention maps."""

import math

import keras
from keras import ops

from aib_tf.layers.freezing import freeze_inner_layers
from aib_tf.layers.gaussian import reparameterize, statistics_dtype, stddev_from_scores
from aib_tf.ops.replicas import SeedGenerator
from aib_tf.validation import check_seed

# The head's first bias: attention starts low, and a place has to earn more. Where nothing is at stake, such as on an
# empty background, no gradient would take a high start back.
_FIRST_BIAS = -2.0


@keras.saving.register_keras_serializable(package="aib_tf")
class VariationalSpatialAttention(keras.layers.Layer):
    """Reads a feature map and draws a 2-D attention map.

        mean      m = sigmoid(head(F))
        deviation s = softplus(conv3x3(m) - 5)
        attention A = m + s * e,  e ~ N(0, 1)

    The deviation's convolution reads the mean map: one channel in, one out. A is not clipped and has no loss term of
    its own. In training a map is drawn; at inference the mean is returned unless `sample=True`. Mean and deviation
    are computed in float32 under mixed precision, and the deviation is at least 1e-6.

    The layer returns the map only. Modulate the features with it as the paper does:

        features = features + features * attention

    Args:
        head: a layer from (B, H, W, C) features to (B, H, W, 1) raw scores. None stands for one 3x3 convolution, which
            starts as the mean of its window with a bias of -2: attention starts low.
        seed: integer seed of the noise, or None for a random one.
        **kwargs: `name`, `dtype`, `trainable` as for every Keras layer.

    Call arguments:
        features: (B, H, W, C) float tensor.
        training: bool; the default of `sample`, and what `head` sees.
        sample: True draws a map, False returns the mean, None draws in training only.
        return_mean: whether to return the mean map, too, for a loss of it.

    Returns:
        (B, H, W, 1) attention map in the layer's compute dtype; with `return_mean` a pair of it and the mean map
        (B, H, W, 1), float32 (float64 under a float64 policy).

    Raises:
        ValueError: if the features are not a batch of maps, or `head` does not keep their size and give one channel.

    Example:
        >>> features = keras.random.normal((8, 16, 16, 64))
        >>> attention = aib_tf.layers.VariationalSpatialAttention(seed=0)(features)
        >>> (features + features * attention).shape
        (8, 16, 16, 64)

    Reference:
        - Lai et al., "Information Bottleneck Approach to Spatial Attention Learning", IJCAI 2021, section 3.
    """

    def __init__(self, head=None, seed=None, **kwargs):
        super().__init__(**kwargs)
        if head is not None and not isinstance(head, keras.layers.Layer):
            raise TypeError(f"`head` must be a keras.layers.Layer or None. Received: head={head!r}")
        self.head = head
        self.seed = check_seed(seed)
        self.seed_generator = SeedGenerator(self.seed)
        self._scores = head or keras.layers.Conv2D(
            1,
            3,
            padding="same",
            data_format="channels_last",
            kernel_initializer=_averaging,
            bias_initializer=keras.initializers.Constant(_FIRST_BIAS),
            dtype=self.dtype_policy,
            name="head",
        )
        self._stddev_scores = keras.layers.Conv2D(
            1, 3, padding="same", data_format="channels_last", dtype=statistics_dtype(self), name="stddev"
        )
        freeze_inner_layers(self)

    def build(self, input_shape):
        """Builds the two convolutions for features (B, H, W, C)."""
        if len(input_shape) != 4 or input_shape[-1] is None:
            raise ValueError(
                "VariationalSpatialAttention expects features (batch, height, width, channels) with a known number of "
                f"channels. Received: features.shape={tuple(input_shape)}"
            )
        expected = (*input_shape[:3], 1)
        # A symbolic call builds any layer and tells its output shape, also where it does not define these itself.
        scores_shape = tuple(self._scores(keras.KerasTensor(input_shape, dtype=self.compute_dtype)).shape)
        if scores_shape[1:] != expected[1:]:
            raise ValueError(
                f"`head` must turn features {tuple(input_shape)} into scores {expected}: one channel, the same size. "
                f"Received: head={self._scores.name!r} with output shape {scores_shape}"
            )
        self._stddev_scores.build(expected)

    def call(self, features, training=None, sample=None, return_mean=False):
        """Returns the (B, H, W, 1) attention map, or a pair of it and the mean map."""
        mean, stddev = self.distribution(features)
        if sample is None:
            sample = training
        attention = ops.cast(self.sample(mean, stddev) if sample else mean, self.compute_dtype)
        return (attention, mean) if return_mean else attention

    def distribution(self, features):
        """Computes the Gaussian over maps.

        Args:
            features: (B, H, W, C) float tensor.

        Returns:
            mean and stddev, (B, H, W, 1) each, float32 (float64 under a float64 policy).
        """
        # Inside `call`, Keras hands `training` down to the head by itself.
        mean = ops.sigmoid(ops.cast(self._scores(features), statistics_dtype(self)))
        return mean, stddev_from_scores(self._stddev_scores(mean))

    def sample(self, mean, stddev, samples=None):
        """Draws maps from the Gaussian that `distribution` returned.

        Args:
            mean: (B, H, W, 1) float tensor.
            stddev: (B, H, W, 1) float tensor.
            samples: None for one map per image, or a number n for a leading axis of n.

        Returns:
            (B, H, W, 1), or (n, B, H, W, 1).
        """
        return reparameterize(mean, stddev, samples, self.seed_generator)

    def compute_output_shape(self, input_shape):
        """Returns (B, H, W, 1)."""
        return (*input_shape[:-1], 1)

    def compute_output_spec(self, features, training=None, sample=None, return_mean=False):
        """Returns shapes and dtypes of what `call` returns."""
        shape = self.compute_output_shape(features.shape)
        attention = keras.KerasTensor(shape, dtype=self.compute_dtype)
        return (attention, keras.KerasTensor(shape, dtype=statistics_dtype(self))) if return_mean else attention

    def get_config(self):
        """Returns the constructor's arguments."""
        head = None if self.head is None else keras.saving.serialize_keras_object(self.head)
        return {**super().get_config(), "head": head, "seed": self.seed}

    @classmethod
    def from_config(cls, config):
        """Makes the layer that `get_config` describes."""
        config = dict(config)
        if config.get("head") is not None:
            config["head"] = keras.saving.deserialize_keras_object(config["head"])
        return cls(**config)


def _averaging(shape, dtype=None):
    """A kernel that takes the mean of its window.

    A random head starts with arbitrary structure in its maps, and about as often as not with less attention on strong
    features than on weak ones; a fast optimizer then saturates that. The mean starts from how active a place is.
    """
    return ops.full(shape, 1.0 / math.prod(shape[:-1]), dtype=dtype)
