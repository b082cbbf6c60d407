"""Estimates with bootstrap intervals over images."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

RESAMPLES = 2_000
LEVEL = 0.95

# Entries of the matrix (resamples, images) that are held at once: 32 MB in float64.
_CHUNK = 4_000_000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number over images and its 95% interval.

    Attributes:
        value: The number over all images.
        low: Lower end of the interval.
        high: Upper end of the interval.
        images: How many images it is over.
    """

    value: float
    low: float
    high: float
    images: int

    def to_dict(self) -> dict:
        """The same as a dict that JSON can hold."""
        return dataclasses.asdict(self)


def estimates(
    terms: Mapping[str, np.ndarray],
    metrics: Mapping[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Percentile bootstrap of metrics that are functions of means over images.

    Images are drawn with replacement, as many as there are. Every metric sees the same draws, so
    that metrics of one call, or of two calls with the same seed and number of images, are paired.
    The percentile interval of a metric that is biased under resampling (calibration error upwards,
    anchors in use downwards) is biased the same way, and need not hold the value. With one image
    the interval is the value itself.

    Args:
        terms: Name to values per image, shape (images,) or (images, k).
        metrics: Name to a function that takes the means of all terms, of shape (draws,) or
            (draws, k), and returns the metric, of shape (draws,).
        resamples: Number of draws.
        seed: Seed of the draws.

    Returns:
        Name to estimate, in the order of `metrics`.

    Raises:
        ValueError: There are no images, the terms differ in length, or `resamples` is below 1.
    """
    check_draws(resamples, seed)
    lengths = {len(values) for values in terms.values()}
    if len(lengths) != 1:
        raise ValueError(
            "All terms must be over the same images. "
            f"Received: lengths={ {name: len(values) for name, values in terms.items()} }"
        )
    (images,) = lengths
    if images == 0:
        raise ValueError("An estimate needs at least one image. Received: images=0")
    arrays = {name: np.asarray(values, np.float64) for name, values in terms.items()}
    columns = np.concatenate([a.reshape(images, -1) for a in arrays.values()], axis=1)
    drawn = _split(_resampled_means(columns, resamples, seed), arrays)
    plain = _split(columns.mean(axis=0, keepdims=True), arrays)
    tail = 100 * (1 - LEVEL) / 2
    result = {}
    for name, metric in metrics.items():
        low, high = np.percentile(metric(drawn), [tail, 100 - tail])
        result[name] = Estimate(float(metric(plain)[0]), float(low), float(high), images)
    return result


def bands(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Percentile bootstrap of the means of several columns, for curves.

    Args:
        values: (images, k).
        resamples: Number of draws.
        seed: Seed of the draws, which are those of `estimates`.

    Returns:
        Means, lower and upper ends of the 95% intervals of each column for itself, (k,) each.

    Raises:
        ValueError: There are no images, or `resamples` is below 1.
    """
    check_draws(resamples, seed)
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("An estimate needs at least one image. Received: images=0")
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(_resampled_means(values, resamples, seed), [tail, 100 - tail], axis=0)
    return values.mean(axis=0), low, high


def check_draws(resamples: int, seed: int) -> None:
    """Raises ValueError where a bootstrap could not be drawn."""
    if resamples < 1:
        raise ValueError(f"resamples must be 1 or more. Received: resamples={resamples}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more. Received: seed={seed}")


def _resampled_means(columns: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of columns (images, k) over draws with replacement: (resamples, k)."""
    images = len(columns)
    random = np.random.default_rng(seed)
    step = max(1, _CHUNK // images)
    means = []
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = random.integers(0, images, size=(rows, images))
        drawn += images * np.arange(rows)[:, None]
        # How often each image was drawn: one matrix product then gives the sums of all columns.
        counts = np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images)
        means.append(counts.astype(np.float64) @ columns / images)
    return np.concatenate(means)


def _split(means: np.ndarray, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    parts, start = {}, 0
    for name, array in arrays.items():
        width = int(np.prod(array.shape[1:]))
        part = means[:, start : start + width]
        parts[name] = part[:, 0] if array.ndim == 1 else part
        start += width
    return parts
