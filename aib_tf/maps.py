"""Arithmetic of maps that suites and pictures share."""

import numpy as np

# Two standard deviations reach the edge of the image: as broad as a Gaussian can be that still
# falls to near nothing (0.14) there, and a place prior that has seen no image.
CENTRED_SIGMA = 0.25


def upsample(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes maps bilinearly with half-pixel centres, edges repeated, without antialiasing.

    The same as `tf.image.resize(..., "bilinear")`, in float64: a constant map stays exactly
    constant, and float32 maps enlarged by a power of two keep exact ties.

    Args:
        maps: (..., h, w).
        height: Rows of the result.
        width: Columns of the result.

    Returns:
        (..., height, width), float64.
    """
    maps = np.asarray(maps, np.float64)
    low, high, share = _neighbours(maps.shape[-2], height)
    rows = maps[..., low, :] + share[:, None] * (maps[..., high, :] - maps[..., low, :])
    low, high, share = _neighbours(maps.shape[-1], width)
    return rows[..., low] + share * (rows[..., high] - rows[..., low])


def centred_gaussian(height: int, width: int, sigma: float = CENTRED_SIGMA) -> np.ndarray:
    """A Gaussian at the centre of the image, (height, width), with peak about 1.

    Args:
        height: Rows.
        width: Columns.
        sigma: Standard deviation along each side, as a share of that side.
    """
    # (2i + 1 - n) / 2n is exactly antisymmetric, so the middle pixels tie exactly.
    y = (2 * np.arange(height) + 1 - height) / (2 * height * sigma)
    x = (2 * np.arange(width) + 1 - width) / (2 * width * sigma)
    return np.exp(-0.5 * (y[:, None] ** 2 + x[None, :] ** 2))


def boxes_to_masks(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels whose centres lie in each box.

    Args:
        boxes: (B, 4), [ymin, xmin, ymax, xmax] as shares of the image sides.
        height: Rows of the image.
        width: Columns of the image.

    Returns:
        (B, height, width), bool.
    """
    ymin, xmin, ymax, xmax = (edge[:, None] for edge in boxes.T)
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    rows, columns = (ymin <= y) & (y <= ymax), (xmin <= x) & (x <= xmax)
    return rows[:, :, None] & columns[:, None, :]


def cosine_similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine of the angle between maps that are flattened.

    Args:
        first: (B, ...).
        second: (B, ...).

    Returns:
        (B,) float64 in -1..1; 1 where both maps are all zeros, 0 where one of them is.

    Raises:
        ValueError: The shapes differ.
    """
    if np.shape(first) != np.shape(second):
        raise ValueError(
            f"Maps to compare must have one shape. Received: shapes {np.shape(first)} and {np.shape(second)}"
        )
    flats, norms = [], []
    for each in (first, second):
        flat = np.asarray(each, np.float64).reshape(len(each), -1)
        # The squares of very small or large entries would leave the range. A power of two rounds nothing.
        _, exponent = np.frexp(np.abs(flat).max(axis=1, keepdims=True, initial=0))
        flats.append(np.ldexp(flat, -exponent))
        norms.append(np.linalg.norm(flats[-1], axis=1))
    product = norms[0] * norms[1]
    cosine = np.divide((flats[0] * flats[1]).sum(axis=1), product, out=np.zeros(len(product)), where=product > 0)
    return np.where((norms[0] == 0) & (norms[1] == 0), 1.0, np.clip(cosine, -1, 1))


def _neighbours(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    centres = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    floor = np.floor(centres)
    low = np.clip(floor, 0, size - 1).astype(int)
    high = np.clip(floor + 1, 0, size - 1).astype(int)
    return low, high, centres - floor
