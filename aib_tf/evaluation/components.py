"""Maps cut at a threshold: Otsu's, and the boxes around what is left of a map."""

import numpy as np


def upper_part(maps: np.ndarray) -> np.ndarray:
    """Where each map is above Otsu's threshold, the cut that makes the variance between both parts largest.

        threshold = argmax_t w0(t) w1(t) (mean0(t) - mean1(t))^2         (Otsu 1979, equation 14)

    Every cut between two different values is tried, without a histogram; the lowest of equally good ones is taken.

    Args:
        maps: (B, H, W).

    Returns:
        (B, H, W), bool. All of a constant map, which has no cut.
    """
    flat = np.sort(maps.reshape(len(maps), -1), axis=1)
    count = flat.shape[1]
    below = np.arange(1, count)
    sums = np.cumsum(flat, axis=1)
    lower, total = sums[:, :-1], sums[:, -1:]
    between = below * (count - below) * np.square(lower / below - (total - lower) / (count - below))
    between[flat[:, 1:] == flat[:, :-1]] = -1.0  # No cut parts equal values.
    best = between.argmax(axis=1)
    rows = np.arange(len(flat))
    threshold = np.where(flat[:, 0] < flat[:, -1], flat[rows, best], -np.inf)
    return maps > threshold[:, None, None]


def largest_boxes(maps: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """The box around the largest connected component of each map, at each threshold.

    A map is stretched to 0..1 and what is at the threshold or above is kept. Pixels are connected
    with their 4 neighbours. Of equally large components the first in row order counts.

    Args:
        maps: (B, H, W). A constant map is kept whole at every threshold.
        thresholds: (T,), below 1.

    Returns:
        (B, T, 4), [ymin, xmin, ymax, xmax] in pixels, the far edges behind the last pixel.
    """
    from scipy import ndimage

    low = maps.min(axis=(1, 2), keepdims=True)
    spread = maps.max(axis=(1, 2), keepdims=True) - low
    stretched = np.divide(maps - low, spread, out=np.ones_like(maps, dtype=np.float64), where=spread > 0)
    # Neighbours within an image, none from image to image.
    cross = np.zeros((3, 3, 3), bool)
    cross[1] = ndimage.generate_binary_structure(2, 1)
    boxes = np.empty((len(maps), len(thresholds), 4))
    for column, threshold in enumerate(thresholds):
        labels, count = ndimage.label(stretched >= threshold, cross)
        sizes = np.bincount(labels.ravel(), minlength=count + 1)
        places = ndimage.find_objects(labels)
        image = np.array([place[0].start for place in places])
        # By image, then by size; the sort is stable and ends with the first of the largest.
        order = np.lexsort((-np.arange(count), sizes[1:], image))
        last = order[np.flatnonzero(np.append(np.diff(image[order]) > 0, True))]
        boxes[image[last], column] = [
            (places[i][1].start, places[i][2].start, places[i][1].stop, places[i][2].stop) for i in last
        ]
    return boxes


def bounding_boxes(masks: np.ndarray) -> np.ndarray:
    """The boxes around masks (B, H, W): (B, 4) in pixels as of `largest_boxes`; zeros for an empty mask."""
    boxes = np.zeros((len(masks), 4))
    for axis, (low, high) in ((2, (0, 2)), (1, (1, 3))):
        line = masks.any(axis=axis)
        size = line.shape[1]
        boxes[:, low] = np.where(line.any(axis=1), line.argmax(axis=1), 0)
        boxes[:, high] = np.where(line.any(axis=1), size - line[:, ::-1].argmax(axis=1), 0)
    return boxes


def box_overlaps(found: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (B or 1, T, 4) with one box for each image (B, 4): (B, T)."""
    true = boxes[:, None]
    corner, far = np.maximum(found[..., :2], true[..., :2]), np.minimum(found[..., 2:], true[..., 2:])
    both = np.prod(np.maximum(far - corner, 0), axis=-1)
    union = _area(found) + _area(true) - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def _area(boxes):
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
