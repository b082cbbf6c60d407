"""Keras metrics of the information bottleneck and of the quantizer's anchors."""

import keras
from keras import ops

from aib_tf.losses import cross_entropy, integer_labels, nats_to_bits


@keras.saving.register_keras_serializable(package="aib_tf.metrics")
class CrossEntropyBits(keras.metrics.MeanMetricWrapper):
    """Mean cross-entropy of integer labels and logits, in bits, without the other terms of the loss.

    Args:
        name: name of the metric.
        dtype: dtype of its state.
    """

    def __init__(self, name="cross_entropy_bits", dtype=None):
        super().__init__(_cross_entropy_bits, name=name, dtype=dtype)
        self._direction = "down"

    def get_config(self):
        """Returns the constructor's arguments."""
        return {"name": self.name, "dtype": self.dtype}


def _cross_entropy_bits(y_true, y_pred):
    return nats_to_bits(cross_entropy(integer_labels(y_true, y_pred), y_pred))


@keras.saving.register_keras_serializable(package="aib_tf.metrics")
class LabelInformation(keras.metrics.Metric):
    """Lower bound on I(Z;Y), what the latent tells about the label, in bits: H(Y) - CE.

    H(Y) is the entropy of the labels seen since the last reset. Together with the rate of `GaussianBottleneck`, an
    upper bound on I(Z;X), it gives a point of the information plane for every epoch.

    Args:
        classes: number of classes.
        name: name of the metric.
        dtype: dtype of its state.

    Reference:
        - Alemi et al., "Deep Variational Information Bottleneck", 2017, equation 12: I(Z;Y) >= H(Y) - CE.
    """

    def __init__(self, classes, name="label_information_bits", dtype=None):
        super().__init__(name=name, dtype=dtype)
        self.classes = classes
        self._direction = "up"
        self.label_counts = self.add_weight(name="label_counts", shape=(classes,), initializer="zeros")
        self.cross_entropy_sum = self.add_weight(name="cross_entropy_sum", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Adds a batch.

        Args:
            y_true: (B,) or (B, 1) integer labels.
            y_pred: (B, classes) logits.
            sample_weight: None or (B,) weights.
        """
        labels = integer_labels(y_true, y_pred)
        bits = nats_to_bits(cross_entropy(labels, y_pred))
        weight = ops.ones_like(bits) if sample_weight is None else ops.reshape(sample_weight, (-1,))
        weight = ops.cast(weight, bits.dtype)
        counts = ops.segment_sum(weight, labels, num_segments=self.classes)
        self.label_counts.assign_add(ops.cast(counts, self.dtype))
        self.cross_entropy_sum.assign_add(ops.cast(ops.sum(weight * bits), self.dtype))

    def result(self):
        """Returns H(Y) - CE, in bits; 0 before the first update."""
        seen = ops.sum(self.label_counts)
        mean_cross_entropy = ops.divide_no_nan(self.cross_entropy_sum, seen)
        return entropy_bits(self.label_counts) - mean_cross_entropy

    def get_config(self):
        """Returns the constructor's arguments."""
        return {"classes": self.classes, "name": self.name, "dtype": self.dtype}


class _InLayer:
    """A metric that a layer updates in its call.

    Under mixed precision everything that is read there is cast to half precision, the sums of a metric too, unless they
    say otherwise: a mean of rates would be infinite after two batches in float16, and stand still in bfloat16.
    """

    def add_variable(self, *args, **kwargs):
        variable = super().add_variable(*args, **kwargs)
        variable._autocast = False  # Keras has an argument for it in its variables, but not here
        return variable


@keras.saving.register_keras_serializable(package="aib_tf.metrics")
class Mean(_InLayer, keras.metrics.Mean):
    """`keras.metrics.Mean` for a layer to update, in its own dtype also under mixed precision."""


class _AnchorCounts(_InLayer, keras.metrics.Metric):
    """Counts how often each anchor is the nearest one."""

    def __init__(self, num_anchors, name=None, dtype=None):
        super().__init__(name=name, dtype=dtype)
        self.num_anchors = num_anchors
        self.counts = self.add_weight(name="counts", shape=(num_anchors,), initializer="zeros")

    def update_state(self, index, sample_weight=None):
        """Adds the anchor indices of a batch.

        Args:
            index: integers of any shape, in [0, num_anchors).
            sample_weight: not used: every score counts once.
        """
        index = ops.reshape(index, (-1,))
        ones = ops.ones_like(index, dtype=self.dtype)
        self.counts.assign_add(ops.segment_sum(ones, index, num_segments=self.num_anchors))

    def get_config(self):
        """Returns the constructor's arguments."""
        return {"num_anchors": self.num_anchors, "name": self.name, "dtype": self.dtype}


@keras.saving.register_keras_serializable(package="aib_tf.metrics")
class AnchorsInUse(_AnchorCounts):
    """Number of anchors that are the nearest one of at least one score since the last reset.

    Args:
        num_anchors: number of anchors, Q.
        name: name of the metric.
        dtype: dtype of its state.
    """

    def __init__(self, num_anchors, name="anchors_in_use", dtype=None):
        super().__init__(num_anchors, name=name, dtype=dtype)

    def result(self):
        """Returns a number from 0 to Q."""
        return ops.sum(ops.cast(self.counts > 0, self.dtype))


@keras.saving.register_keras_serializable(package="aib_tf.metrics")
class AnchorPerplexity(_AnchorCounts):
    """Effective number of anchors, 2^H of their frequencies: Q when all are used alike, 1 when one takes all.

    Args:
        num_anchors: number of anchors, Q.
        name: name of the metric.
        dtype: dtype of its state.
    """

    def __init__(self, num_anchors, name="anchor_perplexity", dtype=None):
        super().__init__(num_anchors, name=name, dtype=dtype)

    def result(self):
        """Returns a number from 1 to Q; 1 before the first update."""
        return ops.power(ops.cast(2.0, self.dtype), entropy_bits(self.counts))


def entropy_bits(counts):
    """Entropy of the distribution that a histogram describes.

    Args:
        counts: (n,) non-negative float tensor.

    Returns:
        Scalar, in bits; 0 for an empty histogram.
    """
    counts = ops.convert_to_tensor(counts)
    probabilities = ops.divide_no_nan(counts, ops.sum(counts))
    # p ln p -> 0 as p -> 0; the inner `where` keeps the logarithm from ever seeing the zero.
    logarithms = ops.log(ops.where(probabilities > 0, probabilities, 1.0))
    return nats_to_bits(-ops.sum(probabilities * logarithms))
