"""How well maps agree with where people looked: CC, SIM, KL, NSS, AUC-Judd and shuffled AUC, batch by batch.

The values are those of pysaliency 0.2.22 (Kümmerer et al.), which scores one image at a time; the metrics are described
by Bylinskii et al., "What do different evaluation metrics tell us about saliency models?" (2019). Where pysaliency
gives NaN, an error or chance, the result is defined here, and the docstrings say how:

- a map that holds NaN or an infinity scores NaN;
- a map is constant when its largest value is its smallest, not when a rounded standard deviation happens to be 0;
- without fixations, or without pixels to compare them with, NSS and both AUC are NaN.

All arithmetic is in the dtype of the maps, float32 or float64. Every function may be called inside of a `tf.function`;
a program of its own is compiled by XLA for each shape, so batches of one size are best.
"""

import functools
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from aib_tf.validation import check_choice

REFERENCE_METRICS = ("cc", "sim", "kl_nats")
FIXATION_METRICS = ("nss", "auc_judd", "shuffled_auc")

# What pysaliency's MIT_KLDiv adds to the quotient of the densities and to its denominator: MATLAB's eps.
_KL_EPSILON = 2.2204e-16

# Pixels that a step of a pass over the maps takes, in rows of so many lanes: a step then stays in the cache, and XLA
# uses vector instructions for it, which it does not in a reduction over the last axis.
_BLOCK = 256
_LANES = 16

# Fixated pixels an image up to which comparing each with all pixels is faster than sorting the pixels.
_MOST_COMPARED = 512

# Twice as many fixations still fit into int32.
MOST_NONFIXATIONS = 2**30 - 1


class Fixations(NamedTuple):
    """Which pixels of each image were fixated, and how often.

    Attributes:
        pixels: int32 (B, F), indices into the rows of the image laid end to end, each at most once an image.
        counts: int32 (B, F), fixations of that pixel; 0 fills up the rows of images with fewer than F.
        shape: (H, W) of the images.
    """

    pixels: np.ndarray
    counts: np.ndarray
    shape: tuple[int, int]

    @classmethod
    def from_counts(cls, counts) -> "Fixations":
        """From counts (B, H, W): whole numbers of any type, or bool.

        Raises:
            ValueError: The counts have another rank, or are negative or no whole numbers.
        """
        counts = np.asarray(counts)
        if counts.ndim != 3:
            raise ValueError(f"Counts of fixations must have shape (B, H, W). Received: shape={counts.shape}")
        if counts.dtype.kind not in "biu":
            whole = counts.astype(np.int32) if np.isfinite(counts).all() else None
            if whole is None or (whole != counts).any():
                raise ValueError(
                    "Counts of fixations must be whole numbers; a density is no count. "
                    f"Received: dtype={counts.dtype}, largest={counts.max()}"
                )
            counts = whole
        if counts.dtype.kind == "i" and counts.size and counts.min() < 0:
            raise ValueError(f"Counts of fixations must be 0 or more. Received: smallest={counts.min()}")
        flat = counts.reshape(len(counts), -1)
        images, pixels = np.nonzero(flat)
        return cls._padded(images, pixels, flat[images, pixels], len(counts), counts.shape[1:])

    @classmethod
    def from_points(cls, points, height: int, width: int) -> "Fixations":
        """From integers (B, F, 2), the row and column of each fixation, in any order and with repeats.

        A point with a negative row or column fills up the list of an image with fewer than F fixations.

        Raises:
            ValueError: The points have another shape or type, or lie below or to the right of the image.
        """
        points = np.asarray(points)
        if points.ndim != 3 or points.shape[2] != 2 or points.dtype.kind not in "iu":
            raise ValueError(
                "Points must be integers of shape (B, F, 2), row and column. "
                f"Received: shape={points.shape}, dtype={points.dtype}"
            )
        rows, columns = points[..., 0].astype(np.int64), points[..., 1].astype(np.int64)
        there = (rows >= 0) & (columns >= 0)
        outside = there & ((rows >= height) | (columns >= width))
        if outside.any():
            first = points[outside][0].tolist()
            raise ValueError(f"Points must lie in the image of {height}x{width} pixels. Received: point={first}")
        # Images and pixels in one number, so that repeats are counted in one go.
        keys = (np.arange(len(points))[:, None] * (height * width) + rows * width + columns)[there]
        keys, counts = np.unique(keys, return_counts=True)
        return cls._padded(keys // (height * width), keys % (height * width), counts, len(points), (height, width))

    @classmethod
    def _padded(cls, images, pixels, counts, size, shape):
        """From the image, pixel and count of each fixated pixel, sorted by image."""
        each = np.bincount(images, minlength=size)
        slots = _rounded(int(each.max(initial=1)))
        place = np.arange(len(images)) - (np.cumsum(each) - each)[images]
        padded = np.zeros((2, size, slots), np.int32)
        padded[0, images, place], padded[1, images, place] = pixels, counts
        return cls(padded[0], padded[1], tuple(shape))

    def total(self) -> np.ndarray:
        """Fixations of all images together at each pixel: int64 (H, W)."""
        sums = np.bincount(self.pixels.ravel(), self.counts.ravel(), minlength=self.shape[0] * self.shape[1])
        return sums.astype(np.int64).reshape(self.shape)


def cc(maps, references):
    """Pearson's correlation coefficient of each map with its reference, as `pysaliency.metrics.CC`.

    A constant map correlates with nothing: 0. A constant reference leaves it undefined: NaN.

    Args:
        maps: (B, H, W), float32 or float64; other types become float32.
        references: (B, H, W), such as densities of fixations.

    Returns:
        (B,), from -1 to 1, in the dtype of the maps. More is better.

    Raises:
        ValueError: The shapes differ, or are not (B, H, W).
    """
    return measure(maps, references, names=("cc",))["cc"]


def sim(maps, references):
    """Similarity, the mass that both densities share: sum_i min(p_i, q_i), as `pysaliency.metrics.SIM`.

    A map becomes a density as there: its minimum is subtracted if that is negative, and it is divided by its sum; if
    all of it is 0, it is the uniform density.

    Args:
        maps: as in `cc`.
        references: as in `cc`.

    Returns:
        (B,), from 0 to 1, in the dtype of the maps. More is better.

    Raises:
        ValueError: as in `cc`.
    """
    return measure(maps, references, names=("sim",))["sim"]


def kl(maps, references):
    """KL divergence in nats of the map's density p from the reference's q, as `pysaliency.metrics.MIT_KLDiv`.

    KL = sum_i q_i log(eps + q_i / (eps + p_i)), eps = 2.2204e-16: the regularised form of the MIT/Tübingen saliency
    benchmark, finite where p is 0. Maps become densities as in `sim`.

    Args:
        maps: as in `cc`.
        references: as in `cc`.

    Returns:
        (B,), 0 or more but for rounding, in the dtype of the maps. Less is better.

    Raises:
        ValueError: as in `cc`.
    """
    return measure(maps, references, names=("kl_nats",))["kl_nats"]


def nss(maps, fixations: Fixations):
    """Normalised scanpath saliency: the map, at mean 0 and standard deviation 1, averaged over the fixations.

    As `pysaliency.metrics.NSS`: the standard deviation divides by the number of pixels, and a constant map scores 0.

    Args:
        maps: as in `cc`.
        fixations: fixated pixels of each image; a pixel counts as often as it was fixated.

    Returns:
        (B,), in standard deviations, in the dtype of the maps; NaN without fixations. More is better.

    Raises:
        ValueError: The shapes differ, or are not (B, H, W).
    """
    return measure(maps, fixations=fixations, names=("nss",))["nss"]


def auc_judd(maps, fixations: Fixations):
    """AUC-Judd: how well the value of the map tells fixated from unfixated pixels.

    As `pysaliency.SaliencyMapModel.AUC_Judd(..., jitter=False)`, of which it is the value for one image. The positives
    are the fixations, repeats included; the negatives are all pixels without any. Thresholds are the values at
    fixations, with straight lines between the points of the curve, so that negatives between two thresholds count
    in part. pysaliency by default adds noise of 1e-7 to the map to break ties at random; here ties count half, so a
    constant map scores 0.5 each time.

    Args:
        maps: as in `cc`.
        fixations: as in `nss`.

    Returns:
        (B,), from 0 to 1, chance 0.5, in the dtype of the maps; NaN without fixations, or where every pixel is
        fixated. More is better.

    Raises:
        ValueError: as in `nss`.

    Reference:
        Judd et al., "Learning to predict where humans look" (2009).
    """
    return measure(maps, fixations=fixations, names=("auc_judd",))["auc_judd"]


def shuffled_auc(maps, fixations: Fixations, earlier=None):
    """Shuffled AUC: how well the map tells an image's fixations from those of other images.

    What all images share, such as that people look at the middle, earns nothing. As
    `pysaliency.SaliencyMapModel.AUC_per_image(..., nonfixations="shuffled")` with thresholds at all values: the
    probability that the map is larger at a fixation than at a fixation of another image, where ties count half.

    Args:
        maps: as in `cc`.
        fixations: as in `nss`. Nonfixations of an image are the fixations of all other images of the batch, repeats
            included, whether or not the image itself is fixated there, and those in
        earlier: whole numbers (H, W), fixations of images that are not in this batch; None for none.

    Returns:
        (B,), from 0 to 1, chance 0.5, in the dtype of the maps; NaN without fixations or without nonfixations. More is
        better.

    Raises:
        ValueError: as in `nss`; or there are more nonfixations than `MOST_NONFIXATIONS`.

    Reference:
        Zhang et al., "SUN: A Bayesian framework for saliency using natural statistics" (2008).
    """
    return measure(maps, fixations=fixations, earlier=earlier, names=("shuffled_auc",))["shuffled_auc"]


def measure(maps, references=None, fixations: Fixations | None = None, earlier=None, names=None) -> dict:
    """Several of the metrics above at once, which share their passes over the maps.

    Args:
        maps: as in `cc`.
        references: as in `cc`, for `REFERENCE_METRICS`; None leaves them out.
        fixations: as in `nss`, for `FIXATION_METRICS`; None leaves them out.
        earlier: as in `shuffled_auc`.
        names: which metrics; None for all that there is something for.

    Returns:
        Name to (B,), in the dtype of the maps.

    Raises:
        ValueError: as in the metrics; or one is unknown, or what it needs is missing.
    """
    maps = _as_maps("maps", maps)
    possible = (REFERENCE_METRICS if references is not None else ()) + (FIXATION_METRICS if fixations else ())
    names = tuple(possible if names is None else names)
    for name in names:
        check_choice("names", name, possible)
    shape = tuple(maps.shape)
    flat = _flat(maps)
    found = {}
    wanted = tuple(name for name in REFERENCE_METRICS if name in names)
    if wanted:
        references = _as_maps("references", references, maps.dtype)
        if not maps.shape.is_compatible_with(references.shape):
            raise ValueError(
                f"References must have the shape of the maps, {shape}. Received: shape={tuple(references.shape)}"
            )
        found |= _against_references(flat, _flat(references), wanted)
    wanted = tuple(name for name in FIXATION_METRICS if name in names)
    if wanted:
        own = (fixations.pixels.shape[0], *fixations.shape)
        if not maps.shape.is_compatible_with(own):
            raise ValueError(f"Fixations must be of images of the shape of the maps, {shape}. Received: shape={own}")
        pool = _pool(fixations, earlier) if "shuffled_auc" in wanted else tf.zeros(own[1] * own[2], tf.int32)
        few = fixations.pixels.shape[1] <= _MOST_COMPARED
        arguments = flat, tf.constant(fixations.pixels), tf.constant(fixations.counts), pool, wanted
        found |= (_against_few if few else _against_many)(*arguments)
    return {name: found[name] for name in names}


# ------------------------------------------------------------------------------------------------- maps and references


@functools.partial(tf.function, jit_compile=True)
def _against_references(maps, references, names):
    """CC, SIM and KL of maps with references, (B, P) each."""
    pixels = maps.shape[1]
    (low, spread), (other_low, other_spread) = _ranges(maps), _ranges(references)
    a, b = _Units(maps, low, spread), _Units(references, other_low, other_spread)
    mean, other_mean = (total / pixels for total in _sums(lambda a, b: (a, b), (a, b)))

    # What must be added to numbers in 0..1 to get the map, but for a factor, if its minimum is 0 or more.
    def density(low, spread, mean):
        offset = tf.maximum(low, 0.0) / tf.where(spread == 0, tf.ones_like(spread), spread)
        total = pixels * (mean + offset)
        constant = spread == 0
        uniform = tf.fill(tf.shape(total), tf.constant(1 / pixels, maps.dtype))
        # A constant map is uniform, whether it is 0 or not.
        return lambda unit: tf.where(constant, uniform, (unit + offset) / tf.where(constant, uniform, total))

    p, q = density(low, spread, mean), density(other_low, other_spread, other_mean)

    def terms(unit, other):
        x, y = unit - mean, other - other_mean
        terms = {}
        if "cc" in names:
            terms |= {"xx": x * x, "yy": y * y, "xy": x * y}
        if "sim" in names:
            terms["sim"] = tf.minimum(p(unit), q(other))
        if "kl_nats" in names:
            terms["kl_nats"] = q(other) * tf.math.log(_KL_EPSILON + q(other) / (_KL_EPSILON + p(unit)))
        return tuple(terms.values())

    sums = [tf.squeeze(total, 1) for total in _sums(terms, (a, b))]
    found = {}
    if "cc" in names:
        xx, yy, xy, *sums = sums
        constant, other_constant = tf.squeeze(spread == 0, 1), tf.squeeze(other_spread == 0, 1)
        nan = tf.constant(np.nan, maps.dtype)
        found["cc"] = xy / (tf.sqrt(tf.where(constant, tf.ones_like(xx), xx)) * tf.sqrt(yy))
        found["cc"] = tf.where(constant & tf.math.is_finite(yy), tf.zeros_like(xx), found["cc"])
        found["cc"] = tf.where(other_constant, nan, found["cc"])
    return found | dict(zip([name for name in names if name != "cc"], sums, strict=True))


class _Units(NamedTuple):
    """Maps (B, P), brought to 0..1 on the way, so that neither tiny nor huge values leave the range of the dtype."""

    maps: tf.Tensor
    low: tf.Tensor
    spread: tf.Tensor

    def block(self, blocks, index):
        return (blocks[:, index] - self.low) / tf.where(self.spread == 0, tf.ones_like(self.spread), self.spread)


def _ranges(maps):
    """The minimum and the range of each map, (B, 1) each; the range is NaN where a pixel is not finite."""
    blocks = _blocks(maps)

    def step(index, low, high, finite):
        block = blocks[:, index]
        # Minima and maxima may pass over NaN.
        return tf.minimum(low, block), tf.maximum(high, block), finite & tf.math.is_finite(block)

    start = blocks[:, 0]
    low, high, finite = _fold(step, (start, start, tf.ones_like(start, tf.bool)), blocks.shape[1])
    low, high = tf.reduce_min(low, axis=1, keepdims=True), tf.reduce_max(high, axis=1, keepdims=True)
    finite = tf.reduce_all(finite, axis=1, keepdims=True)
    return low, tf.where(finite, high - low, tf.constant(np.nan, maps.dtype))


def _sums(terms, maps):
    """Sums over pixels of the terms made of maps (several `_Units`): (B, 1) each."""
    blocks = [_blocks(each.maps) for each in maps]
    steps = blocks[0].shape[1]
    inside = tf.constant(np.arange(steps * _BLOCK).reshape(steps, _BLOCK) < maps[0].maps.shape[1])

    def of_block(index):
        found = terms(*(each.block(block, index) for each, block in zip(maps, blocks, strict=True)))
        return [tf.where(inside[index], term, tf.zeros_like(term)) for term in found]

    def step(index, *sums):
        return tuple(total + term for total, term in zip(sums, of_block(index), strict=True))

    sums = _fold(step, tuple(tf.zeros_like(term) for term in of_block(0)), steps)
    return [tf.reduce_sum(total, axis=1, keepdims=True) for total in sums]


# -------------------------------------------------------------------------------------------------- maps and fixations


def _against_fixations(maps, pixels, counts, pool, names, exceeding, own_exceeding):
    """NSS and both AUC, given how to count what exceeds the values at fixations."""
    dtype = maps.dtype
    low, spread = _ranges(maps)
    values = tf.gather(maps, pixels, batch_dims=1)
    weights = tf.cast(counts, dtype)
    every = tf.reduce_sum(counts, axis=1)
    fixations = tf.cast(every, dtype)
    nan = tf.constant(np.nan, dtype)
    finite = tf.squeeze(tf.math.is_finite(spread), 1)
    found = {}
    if "nss" in names:
        units = _Units(maps, low, spread)
        [total] = _sums(lambda unit: (unit,), (units,))
        mean = total / maps.shape[1]
        [square] = _sums(lambda unit: ((unit - mean) ** 2,), (units,))
        deviation = tf.sqrt(square / maps.shape[1])
        safe = tf.where(spread == 0, tf.ones_like(spread), spread)
        scores = ((values - low) / safe - mean) / tf.where(spread == 0, tf.ones_like(deviation), deviation)
        scores = tf.where(spread == 0, tf.zeros_like(scores), scores)
        found["nss"] = tf.where(finite, tf.reduce_sum(scores * weights, axis=1) / fixations, nan)
    if "auc_judd" not in names and "shuffled_auc" not in names:
        return found
    # What only fills up exceeds everything, and has no weight.
    values = tf.where(counts > 0, values, tf.constant(np.inf, dtype))
    judd, shuffled = exceeding(maps, values, pool, names)
    own_judd, own_hits, own_shuffled = own_exceeding(values, counts)
    if "auc_judd" in names:
        distinct = tf.reduce_sum(tf.cast(counts > 0, tf.int32), axis=1)
        unfixated = tf.cast(maps.shape[1] - distinct, dtype)
        false_alarms = tf.cast(judd - own_judd, dtype) / unfixated[:, None]
        hits = tf.cast(own_hits, dtype) / fixations[:, None]
        # Both grow as the threshold falls, so sorting each by itself pairs them.
        area = _area(tf.sort(false_alarms, axis=1), tf.sort(hits, axis=1))
        found["auc_judd"] = tf.where(finite & (unfixated > 0) & (every > 0), area, nan)
    if "shuffled_auc" in names:
        negatives = tf.reduce_sum(pool) - every
        # At twice the weight, since ties count half.
        below = 2 * negatives[:, None] - (shuffled - own_shuffled)
        shares = tf.cast(below, dtype) / tf.cast(2 * negatives[:, None], dtype)
        area = tf.reduce_sum(tf.where(counts > 0, shares, tf.zeros_like(shares)) * weights, axis=1) / fixations
        found["shuffled_auc"] = tf.where(finite & (negatives > 0) & (every > 0), area, nan)
    return found


@functools.partial(tf.function, jit_compile=True)
def _against_few(maps, pixels, counts, pool, names):
    """Every fixated pixel is compared with every pixel."""
    return _against_fixations(maps, pixels, counts, pool, names, _exceeding_by_comparing, _own_by_comparing)


@tf.function
def _against_many(maps, pixels, counts, pool, names):
    """The pixels are sorted, which TensorFlow's own kernel does faster than XLA."""
    return _against_fixations(maps, pixels, counts, pool, names, _exceeding_by_sorting, _own_by_sorting)


def _exceeding_by_comparing(maps, values, pool, names):
    """Pixels that are at least as large as each value, and the fixations of the pool there.

    Args:
        maps: (B, P).
        values: (B, F).
        pool: int32 (P,).
        names: which of the two are needed.

    Returns:
        int32 (B, F): how many pixels of the map are at least the value; and
        int32 (B, F): the fixations of the pool at such pixels and, once more, at pixels that are more than the value.
    """
    blocks = _blocks(maps)
    steps = blocks.shape[1]
    blocks = tf.reshape(blocks, (-1, steps, _BLOCK // _LANES, 1, _LANES))
    inside = np.arange(steps * _BLOCK) < maps.shape[1]
    shape = (steps, _BLOCK // _LANES, 1, 1, _LANES)
    inside = tf.constant(inside.reshape(shape).astype(np.int32))
    pool = tf.reshape(tf.pad(pool, [[0, steps * _BLOCK - maps.shape[1]]]), shape)
    values = values[:, :, None]
    none = tf.zeros((1, 1, _LANES), tf.int32) + tf.zeros_like(values, tf.int32)

    def step(index, judd, shuffled):
        block, weight, here = blocks[:, index], pool[index], inside[index]
        for row in range(_BLOCK // _LANES):
            at_least = block[:, row] >= values
            if "auc_judd" in names:
                judd += tf.where(at_least, here[row], 0)
            if "shuffled_auc" in names:
                shuffled += tf.where(at_least, weight[row], 0) + tf.where(block[:, row] > values, weight[row], 0)
        return judd, shuffled

    return [tf.reduce_sum(total, axis=2) for total in _fold(step, (none, none), steps)]


def _own_by_comparing(values, counts):
    """Of the fixated pixels themselves: how many are at least the value; their fixations; and as for the pool."""
    at_least, more = values[:, None] >= values[:, :, None], values[:, None] > values[:, :, None]
    here, weights = tf.cast(counts > 0, tf.int32)[:, None], counts[:, None]
    judd = tf.reduce_sum(tf.where(at_least, here, 0), axis=2)
    hits = tf.reduce_sum(tf.where(at_least, weights, 0), axis=2)
    return judd, hits, hits + tf.reduce_sum(tf.where(more, weights, 0), axis=2)


def _exceeding_by_sorting(maps, values, pool, names):
    """As `_exceeding_by_comparing`."""
    order = tf.argsort(maps, axis=1)
    judd, at_least, more = _sorted_counts(tf.gather(maps, order, batch_dims=1), tf.gather(pool, order), values)
    return judd, at_least + more


def _own_by_sorting(values, counts):
    """As `_own_by_comparing`."""
    order = tf.argsort(values, axis=1)
    weights = tf.gather(counts, order, batch_dims=1)
    ordered = tf.gather(values, order, batch_dims=1)
    _, hits, more = _sorted_counts(ordered, weights, values)
    _, judd, _ = _sorted_counts(ordered, tf.cast(weights > 0, tf.int32), values)
    return judd, hits, hits + more


def _sorted_counts(ordered, weights, values):
    """How many of the ordered numbers are at least each value, their weight, and the weight of those that are more."""
    first, last = tf.searchsorted(ordered, values, side="left"), tf.searchsorted(ordered, values, side="right")
    before = tf.pad(tf.cumsum(weights, axis=1), [[0, 0], [1, 0]])
    total = before[:, -1:]
    at_least = total - tf.gather(before, first, batch_dims=1)
    return tf.shape(ordered)[1] - first, at_least, total - tf.gather(before, last, batch_dims=1)


def _area(x, y):
    """The area under straight lines from (0, 0) by way of the points (B, F), in their order, to (1, 1)."""
    x = tf.concat([tf.zeros_like(x[:, :1]), x, tf.ones_like(x[:, :1])], axis=1)
    y = tf.concat([tf.zeros_like(y[:, :1]), y, tf.ones_like(y[:, :1])], axis=1)
    return tf.reduce_sum((x[:, 1:] - x[:, :-1]) * (y[:, 1:] + y[:, :-1]), axis=1) / 2


def _pool(fixations, earlier):
    """The fixations of the batch and of earlier images at each pixel, int32 (P,)."""
    total = fixations.total()
    if earlier is not None:
        earlier = np.asarray(earlier)
        if earlier.shape != fixations.shape or earlier.dtype.kind not in "iu" or earlier.min(initial=0) < 0:
            raise ValueError(
                f"`earlier` must be whole numbers of shape {fixations.shape}, 0 or more. "
                f"Received: shape={earlier.shape}, dtype={earlier.dtype}"
            )
        total = total + earlier
    if total.sum() > MOST_NONFIXATIONS:
        raise ValueError(
            f"There may be {MOST_NONFIXATIONS} fixations to compare with: leave some out. "
            f"Received: fixations={total.sum()}"
        )
    return tf.constant(total.ravel(), tf.int32)


# ----------------------------------------------------------------------------------------------------------- both


def _fold(step, start, steps):
    """The state after `step(index, *state) -> state` for each index from 0 to steps - 1."""
    after = tf.while_loop(
        lambda index, *_: index < steps,
        lambda index, *state: (index + 1, *step(index, *state)),
        (tf.constant(0), *start),
        maximum_iterations=steps,
    )
    return after[1:]


def _blocks(maps):
    """(B, P) -> (B, N, _BLOCK); the first pixel, which changes no minimum or maximum, fills up the last block."""
    pixels = maps.shape[1]
    missing = -pixels % _BLOCK
    if missing:
        maps = tf.concat([maps, tf.repeat(maps[:, :1], missing, axis=1)], axis=1)
    return tf.reshape(maps, (-1, (pixels + missing) // _BLOCK, _BLOCK))


def _flat(maps):
    return tf.reshape(maps, (-1, maps.shape[1] * maps.shape[2]))


def _as_maps(name, maps, dtype=None):
    maps = tf.convert_to_tensor(maps)
    if maps.shape.rank != 3 or None in maps.shape[1:] or 0 in maps.shape[1:]:
        raise ValueError(f"`{name}` must have shape (B, H, W) with at least one pixel. Received: shape={maps.shape}")
    if dtype is None:
        dtype = maps.dtype if maps.dtype in (tf.float32, tf.float64) else tf.float32
    return tf.cast(maps, dtype)


def _rounded(slots):
    """A few more slots, so that batches with about as many fixated pixels share a compiled program."""
    return -(-slots // 16) * 16 if slots <= 64 else 1 << (slots - 1).bit_length()
