"""Loss terms of the information bottleneck and of given attention, as pure functions; classification loss in bits.

Symbols are those of Lai et al., IJCAI 2021: Z ~ N(mean, stddev^2) is the latent, beta the weight of its rate. The
codebook and commitment losses of the quantizer come out of `aib_tf.ops.nearest_anchor`.
"""

import math

import keras
import numpy as np
from keras import ops

from aib_tf.validation import check_choice

ATTENTION_LOSSES = ("kl", "cc", "cosine")
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


def integer_labels(y_true, y_pred):
    """Returns labels (B,) or (B, 1) as int32 (B,); ValueError for others, such as one-hot ones."""
    y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
    if len(y_true.shape) == len(y_pred.shape):
        if y_true.shape[-1] not in (1, None):
            raise ValueError(
                "Labels must be the numbers of the classes, (batch,) or (batch, 1): of one-hot labels take the argmax. "
                f"Received: y_true.shape={tuple(y_true.shape)}, y_pred.shape={tuple(y_pred.shape)}"
            )
        y_true = ops.squeeze(y_true, axis=-1)
    return ops.cast(y_true, "int32")


# Added to each position of an attention map before it is divided by its sum: the logarithm stays finite where a map
# has underflowed to 0, and through a sigmoid or softmax its gradient stays below 1.
_POSITION_FLOOR = 1e-7
# Added to mean squares of maps whose mean is 1: one that varies by less than about 0.1% counts as constant.
_SQUARE_FLOOR = 1e-6


def attention_loss(attention, reference, kind="kl"):
    """How far attention maps are from given ones, such as maps of where people looked, for each image.

    The reference is first averaged over the area of each position of the attention. Then, with the distributions
    p = A / sum(A) and q = R / sum(R) over the N positions,

        kl:      KL(q || p) = sum_i q_i log2(q_i / p_i)                       from 0, in bits
        cc:      1 - cov(p, q) / (stddev(p) stddev(q)), Pearson's             0 to 2; 1 where a map is constant
        cosine:  1 - <p, q> / (|p| |q|)                                       0 to 1

    All three are 0 for maps in proportion, and do not change with the scale of either map. Uniform attention is log2 N
    bits from a single position. "kl" is large where attention misses a part of the reference. Values and gradients
    are finite for constant maps and for maps of zeros: 1e-7 is added to A, and 1e-6 to the mean squares (variances)
    of N p and N q, so that zero is reached to about 1e-6.

    A reference of zeros says nothing: the loss of that image is 0, and it has no gradient.

    Args:
        attention: (B, h, w) or (B, h, w, 1) float tensor, 0 or more.
        reference: (B, H, W) or (B, H, W, 1) tensor of any size and type, 0 or more, such as a mask.
        kind: "kl", "cc" or "cosine".

    Returns:
        (B,) tensor in float32 (float64 for float64 attention).

    Raises:
        ValueError: for another `kind`, or if one of the two is no batch of maps of a known size.

    Example:
        >>> uniform, corner = np.ones((1, 2, 2)), np.float64([[[1, 0], [0, 0]]])
        >>> round(float(aib_tf.losses.attention_loss(uniform, corner)[0]), 3)  # log2 4
        2.0

    Reference:
        - Lai et al., "Understanding More about Human and Machine Attention in Deep Neural Networks", 2019.
        - Bylinskii et al., "What do different evaluation metrics tell us about saliency models?", 2019, for KL and CC.
    """
    check_attention_loss("kind", kind)
    attention = _as_maps("attention", _widen(attention))
    reference = ops.cast(_as_maps("reference", ops.convert_to_tensor(reference)), attention.dtype)
    reference = _average_over_positions(reference, attention.shape[1:])
    positions = attention.shape[1] * attention.shape[2]
    attention = ops.reshape(attention, (-1, positions)) + _POSITION_FLOOR
    reference = ops.reshape(reference, (-1, positions))
    mass = ops.sum(reference, axis=1, keepdims=True)
    p = attention / ops.sum(attention, axis=1, keepdims=True)
    q = ops.divide_no_nan(reference, mass)
    if kind == "kl":
        loss = nats_to_bits(ops.sum(q * (ops.log(ops.where(q > 0, q, 1.0)) - ops.log(p)), axis=1))
    elif kind == "cc":
        loss = 1.0 - _cosine(positions * p - 1.0, positions * q - 1.0)
    else:
        loss = 1.0 - _cosine(positions * p, positions * q)
    return ops.where(mass[:, 0] > 0, loss, 0.0)


def check_attention_loss(name, kind, others=()):
    """Raises ValueError unless `kind` is one of `ATTENTION_LOSSES` or of `others`."""
    check_choice(name, kind, (*others, *ATTENTION_LOSSES))


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
        >>> float(loss(np.array([1]), np.zeros((1, 4))))  # four equally likely classes
        2.0
    """

    def __init__(self, reduction="sum_over_batch_size", name="cross_entropy_bits", **kwargs):
        super().__init__(name=name, reduction=reduction, **kwargs)

    def call(self, y_true, y_pred):
        """Returns the (B,) cross-entropies, in bits."""
        return nats_to_bits(cross_entropy(integer_labels(y_true, y_pred), y_pred))

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "reduction": self.reduction}


def _cosine(x, y):
    """The cosine of the angle between vectors (B, N) whose mean squares are of the order of 1; 0 for one of zeros."""
    squares = (ops.mean(ops.square(x), axis=1) + _SQUARE_FLOOR) * (ops.mean(ops.square(y), axis=1) + _SQUARE_FLOOR)
    return ops.mean(x * y, axis=1) / ops.sqrt(squares)


def _as_maps(name, maps):
    """(B, h, w) or (B, h, w, 1) -> (B, h, w)."""
    shape = tuple(maps.shape)
    if len(shape) == 4 and shape[-1] == 1:
        maps, shape = ops.squeeze(maps, axis=-1), shape[:-1]
    if len(shape) != 3 or None in shape[1:]:
        raise ValueError(
            f"`{name}` must be maps (batch, height, width) or (batch, height, width, 1) of known height and width. "
            f"Received: {name}.shape={tuple(maps.shape)}"
        )
    return maps


def _average_over_positions(maps, size):
    """Averages maps (B, H, W) over the areas of `size` positions that divide them; shares of pixels count as such."""
    for axis, positions in ((1, size[0]), (2, size[1])):
        pixels = maps.shape[axis]
        if pixels != positions:
            edges = np.arange(positions + 1)[:, None] * pixels / positions
            pixel = np.arange(pixels)
            overlap = np.minimum(edges[1:], pixel + 1) - np.maximum(edges[:-1], pixel)
            weights = ops.convert_to_tensor(np.maximum(overlap, 0.0) * positions / pixels, dtype=maps.dtype)
            maps = ops.einsum("bij,ki->bkj" if axis == 1 else "bij,kj->bik", maps, weights)
    return maps


def _widen(x):
    """Casts half precision to float32: sums of squares and logarithms lose too much in it."""
    x = ops.convert_to_tensor(x)
    return x if keras.backend.standardize_dtype(x.dtype) == "float64" else ops.cast(x, "float32")
