"""Anchor quantizer: each attention score goes to the nearest of a few learnable values."""

import keras
import numpy as np
from keras import ops

from aib_tf.layers.gaussian import loss_dtype
from aib_tf.layers.reporting import keeps_metrics
from aib_tf.metrics import AnchorPerplexity, AnchorsInUse, Mean
from aib_tf.ops import nearest_anchor
from aib_tf.ops.nearest_anchor import MAX_ANCHORS
from aib_tf.ops.replicas import mark_own
from aib_tf.validation import check_count, check_weight


@keras.saving.register_keras_serializable(package="aib_tf")
class AnchorQuantizer(keras.layers.Layer):
    """Replaces every score by its nearest anchor, with a straight-through gradient.

        output = anchors[argmin_k |x - anchors[k]|]                        (the lowest k on ties)
        loss   = codebook_weight * mean((anchor - stop(x))^2) + commitment_weight * mean((x - stop(anchor))^2)

    The first loss term moves the anchors towards the scores, the second the scores towards the anchors. Anchors start
    evenly spaced over [0, 1] and are kept and compared in float32 under mixed precision.

    Metrics, over an epoch: `codebook_loss` and `commitment_loss` (mean squared error, equal in value, without their
    weights), `anchors_in_use` and `anchor_perplexity`. (There are none on the JAX
    backend, where Keras does not keep metrics that a layer updates in its call.)

    Args:
        num_anchors: Q, from 1 to 65,536. The paper finds 20 to 50 best.
        codebook_weight: weight of the codebook loss, 0 or more; lambda_g in the paper.
        commitment_weight: weight of the commitment loss, 0 or more; lambda_c in the paper.
        **kwargs: `name`, `dtype`, `trainable` as for every Keras layer; `trainable=False` leaves the anchors in place.

    Call arguments:
        scores: float tensor of any shape.

    Returns:
        Tensor of the same shape, in the layer's compute dtype.

    Raises:
        ValueError: for a number of anchors out of range or a negative weight.

    Example:
        >>> quantizer = aib_tf.layers.AnchorQuantizer(num_anchors=3)  # anchors 0, 0.5, 1
        >>> np.asarray(quantizer(np.array([[0.1, 0.6, 0.9]], "float32"))).tolist()
        [[0.0, 0.5, 1.0]]

    Reference:
        - Lai et al., "Information Bottleneck Approach to Spatial Attention Learning", IJCAI 2021, section 3.
    """

    def __init__(self, num_anchors=20, codebook_weight=0.4, commitment_weight=0.1, **kwargs):
        super().__init__(**kwargs)
        self.num_anchors = check_count("num_anchors", num_anchors, maximum=MAX_ANCHORS)
        self.codebook_weight = check_weight("codebook_weight", codebook_weight)
        self.commitment_weight = check_weight("commitment_weight", commitment_weight)
        self._mean_losses = self._usage = ()
        if keeps_metrics():
            self._mean_losses = tuple(Mean(name=name, dtype="float32") for name in ("codebook_loss", "commitment_loss"))
            self._usage = tuple(kind(self.num_anchors, dtype="float32") for kind in (AnchorsInUse, AnchorPerplexity))

    def build(self, input_shape):
        """Makes the anchors."""
        dtype = "float64" if self.compute_dtype == "float64" else "float32"
        self.anchors = self.add_weight(
            name="anchors", shape=(self.num_anchors,), initializer=_evenly_spaced, dtype=dtype, autocast=False
        )

    def call(self, scores):
        """Returns the quantized scores and adds the two loss terms."""
        result = self.nearest(scores)
        images = ops.cast(ops.shape(result.index)[0], "float32") if len(scores.shape) else 1.0
        for metric in self._mean_losses:  # equal in value; they part in the gradient only
            metric.update_state(result.codebook_loss, sample_weight=images)
        for metric in self._usage:
            metric.update_state(result.index)
        self.add_loss(mark_own(self.codebook_weight * ops.cast(result.codebook_loss, loss_dtype())))
        self.add_loss(mark_own(self.commitment_weight * ops.cast(result.commitment_loss, loss_dtype())))
        return result.quantized

    def nearest(self, scores):
        """Quantizes without adding a loss: the `aib_tf.ops.NearestAnchor` of the scores and this layer's anchors."""
        return nearest_anchor(scores, self.anchors)

    def compute_output_shape(self, input_shape):
        """Returns the shape of the scores."""
        return input_shape

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "num_anchors": self.num_anchors,
            "codebook_weight": self.codebook_weight,
            "commitment_weight": self.commitment_weight,
        }


def _evenly_spaced(shape, dtype=None):
    return ops.convert_to_tensor(np.linspace(0.0, 1.0, shape[0]), dtype=dtype)
