"""Loss terms of the information bottleneck, as pure functions, and the classification loss in bits.

Symbols are those of Lai et al., IJCAI 2021: Z ~ N(mean, stddev^2) is the latent, beta the weight of its rate. The
codebook and commitment losses of the quantizer come out of `aib_tf.ops.nearest_anchor`.
"""

import math

import keras
from keras import ops

KL_FORMS = ("closed_form", "reference")


def nats_to_bits(nats):
    """Converts an amount of information from nats to bits: nats / ln 2."""
    return nats / math.log(2.0)


def kl_divergence(mean, stddev, form="closed_form"):
    """KL divergence of a diagonal Gaussian from the standard normal, summed over the latent dimensions.

    With form="closed_form":

        KL(N(mean, stddev^2) || N(0, 1)) = sum_k (mean_k^2 + stddev_k^2 - 1) / 2 - ln stddev_k

    form="reference" is what the authors' released code evaluates: the same with exp(stddev) in the place of stddev.
    As exp(stddev) >= 1, its minimum is at stddev = 0: it removes the noise and leaves little more than an L2 penalty
    on the mean. It is there for comparison with published numbers and is no rate.

    Args:
        mean: (..., K) float tensor.
        stddev: (..., K) float tensor, positive.
        form: "closed_form" or "reference".

    Returns:
        (...) tensor, in nats, in float32 (float64 for float64 inputs).

    Raises:
        ValueError: if `form` is neither.
    """
    check_kl_form(form)
    mean, stddev = _widen(mean), _widen(stddev)
    if form == "reference":
        log_stddev, stddev = stddev, ops.exp(stddev)
    else:
        log_stddev = ops.log(stddev)
    return ops.sum(0.5 * (ops.square(mean) + ops.square(stddev) - 1.0) - log_stddev, axis=-1)


def check_kl_form(form):
    """Raises ValueError unless `form` is one of `KL_FORMS`."""
    if form not in KL_FORMS:
        raise ValueError(f"The form of the KL divergence must be one of {', '.join(KL_FORMS)}. Received: kl={form!r}")


def cross_entropy(labels, logits):
    """Cross-entropy -ln softmax(logits)[label] of integer labels.

    Args:
        labels: (B,) integers.
        logits: (B, classes) float tensor.

    Returns:
        (B,) tensor, in nats, in float32 (float64 for float64 logits).
    """
    return ops.sparse_categorical_crossentropy(labels, _widen(logits), from_logits=True)


@keras.saving.register_keras_serializable(package="aib_tf.losses")
class CrossEntropyBits(keras.losses.Loss):
    """Cross-entropy of integer labels and logits, in bits: the first term of the AIB objective.

    The layers of this library add their own terms in bits, so with this loss `model.fit` minimises

        CE / ln 2 + beta * KL / ln 2 + codebook_weight * codebook + commitment_weight * commitment

    Call arguments:
        y_true: (B,) or (B, 1) integer labels.
        y_pred: (B, classes) logits.

    Example:
        >>> loss = aib_tf.losses.CrossEntropyBits()
        >>> float(loss([1], [[0.0, 0.0, 0.0, 0.0]]))  # four equally likely classes
        2.0
    """

    def __init__(self, reduction="sum_over_batch_size", name="cross_entropy_bits", **kwargs):
        super().__init__(name=name, reduction=reduction, **kwargs)

    def call(self, y_true, y_pred):
        """Returns the (B,) cross-entropies, in bits."""
        if len(y_true.shape) == len(y_pred.shape):
            y_true = ops.squeeze(y_true, axis=-1)
        return nats_to_bits(cross_entropy(ops.cast(y_true, "int32"), y_pred))

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "reduction": self.reduction}


def _widen(x):
    """Casts half precision to float32: sums of squares and logarithms lose too much in it."""
    x = ops.convert_to_tensor(x)
    return x if keras.backend.standardize_dtype(x.dtype) == "float64" else ops.cast(x, "float32")
