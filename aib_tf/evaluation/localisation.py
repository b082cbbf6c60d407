"""Does the attention lie on the object."""

import numpy as np

from aib_tf import maps
from aib_tf.evaluation import components, intervals, suite
from aib_tf.evaluation.intervals import RESAMPLES
from aib_tf.evaluation.subject import UnavailableError
from aib_tf.evaluation.suite import Result, Suite, Summary

# Where a map that is stretched to 0..1 is cut, and the overlaps that count as a hit.
THRESHOLDS = np.arange(20) / 20
OVERLAPS = (0.3, 0.5, 0.7)


def localisation(model, dataset, samples: int = 0, resamples: int = RESAMPLES, seed: int = 0) -> Result:
    """Pointing game, energy pointing, boxes and segmentation by the mean attention, beside baselines.

    Maps are enlarged to the image bilinearly with half-pixel centres. A pixel is in a box when its
    centre is. Metrics are named `<measure>_<object>_<map>`; for all of them more is better.

    Measures:

    - `pointing`: the share of images where the maximum of the map, the first in row order on ties,
      lies in the object (Zhang et al. 2018).
    - `energy`: the mean over images of the positive mass inside the object divided by all positive
      mass; 0 for a map without positive mass (such maps are counted in the details).
    - `iou`: the map is cut in two by Otsu's threshold (1979), which makes the variance between the
      two parts largest; the intersection of the upper part with the object over their union. A
      constant map cannot be cut, and is all upper part.
    - `box_accuracy_30`, `_50`, `_70`: the map is stretched to 0..1 and cut at a threshold; the box
      around the largest connected component (4 neighbours, the first on ties) is a hit where its
      intersection over union with the object's box is 0.3, 0.5, 0.7 or more. That is BoxAcc of
      Choe et al. 2020. Its threshold is chosen among 0, 0.05 .. 0.95 on the other half of the
      images (even and odd ones), the lowest on ties: no image has a say in its own threshold.
      `max_box_accuracy`: the mean of the three, MaxBoxAccV2. Only for the object `box`, which is the box of the mask
      where the data has none.

    Objects: `box` where the data has "bbox", `mask` where it has "mask". Images whose box or mask
    holds no pixel are left out of that object's metrics, and counted in the details.

    Maps: `attention`; `grad_cam`, that of `Subject.baseline`; `uniform`, the same value everywhere;
    `centred`, a Gaussian at the centre with a standard deviation of 0.25 of each image side. On the
    uniform map every pixel ties; instead of the first pixel, which would always be the corner,
    `pointing` of it is the expectation for a pixel drawn at random. That is the share of the image
    that the object covers, and so are its energy and its overlap; its box is the image.

    Args:
        model: A model or a `Subject`.
        dataset: Batches as dicts with "bbox" or "mask", see `aib_tf.evaluation.evaluate`.
        samples: Passed on to `explain`; the mean attention does not depend on it.
        resamples: Draws of the bootstrap.
        seed: Seed of the bootstrap.

    Returns:
        A `Result`. Values per image: `<metric>` as above, NaN where the object is missing;
        `overlap_<map>`, (images, 20), the intersection over union at each threshold;
        `positive_mass` of the enlarged attention.

    Raises:
        UnavailableError: The model has no maps, or the data no boxes and no masks.
        ValueError: A map holds NaN.
    """
    return suite.run(model, dataset, Localisation, None, samples, resamples, seed)


class Localisation(Suite):
    """The suite behind `localisation`."""

    name = "localisation"

    def measure(self, batch):
        height, width = batch.images.shape[1:3]
        objects = {}
        if batch.boxes is not None:
            objects["box"] = maps.boxes_to_masks(batch.boxes, height, width)
        if batch.masks is not None:
            objects["mask"] = batch.masks
        if not objects:
            raise UnavailableError("the data has neither boxes nor masks")

        compared = {name: maps.upsample(found, height, width) for name, found in batch.maps().items()}
        compared["uniform"] = np.ones((1, height, width))
        compared["centred"] = maps.centred_gaussian(height, width)[None]
        values = {"positive_mass": np.maximum(next(iter(compared.values())), 0).sum(axis=(1, 2))}
        for name, inside in objects.items():
            area = inside.mean(axis=(1, 2))
            for kind, found in compared.items():
                pointing = area if kind == "uniform" else _pointing(found, inside)
                for measure, value in (
                    ("pointing", pointing),
                    ("energy", _energy(found, inside)),
                    ("iou", _overlap(components.upper_part(found), inside)),
                ):
                    values[f"{measure}_{name}_{kind}"] = np.where(area > 0, value, np.nan)
        if batch.boxes is not None:
            boxes = batch.boxes * [height, width, height, width]
        else:
            boxes = components.bounding_boxes(batch.masks)
        present = objects.get("box", batch.masks).any(axis=(1, 2))
        for kind, found in compared.items():
            overlap = components.box_overlaps(components.largest_boxes(found, THRESHOLDS), boxes)
            values[f"overlap_{kind}"] = np.where(present[:, None], overlap, np.nan)
        return values

    def summarise(self, values, resamples, seed):
        found, details = {}, {"centred_sigma": maps.CENTRED_SIGMA}
        kinds = [name[len("overlap_") :] for name in values if name.startswith("overlap_")]
        for kind in kinds:
            hits = _box_hits(values[f"overlap_{kind}"])
            values.update({f"{measure}_box_{kind}": hit for measure, hit in hits.items()})
        for name in ("box", "mask"):
            terms = {key: value for key, value in values.items() if f"_{name}_" in key}
            if not terms:
                continue
            present = ~np.isnan(next(iter(terms.values())))
            details[f"images_without_{name}"] = int((~present).sum())
            if not present.any():
                continue
            terms = {key: value[present] for key, value in terms.items()}
            metrics = {key: lambda mean, key=key: mean[key] for key in terms}
            found |= intervals.estimates(terms, metrics, resamples, seed)
        if not found:
            raise UnavailableError("no image has a box or mask that holds a pixel")
        details["maps_without_positive_mass"] = int((values["positive_mass"] == 0).sum())
        return Summary(found, details)


def _box_hits(overlaps: np.ndarray) -> dict[str, np.ndarray]:
    """Measure to hits (images,), each at the threshold that is best for the other half of the images; NaN stays."""
    found = {}
    half = np.arange(len(overlaps)) % 2
    for least in OVERLAPS:
        hits = np.where(np.isnan(overlaps), np.nan, overlaps >= least)
        own = np.full(len(hits), np.nan)
        for part in (0, 1):
            others = hits[(half != part) & ~np.isnan(hits[:, 0])]
            # Alone, an image has nobody to choose for it.
            best = others.mean(axis=0).argmax() if len(others) else 0
            own[half == part] = hits[half == part, best]
        found[f"box_accuracy_{round(100 * least)}"] = own
    found["max_box_accuracy"] = np.mean(list(found.values()), axis=0)
    return found


def _overlap(part: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Intersection over union of pixels: (B or 1, H, W) with (B, H, W)."""
    union = (part | inside).sum(axis=(1, 2))
    return np.divide((part & inside).sum(axis=(1, 2)), union, out=np.zeros(len(inside)), where=union > 0)


def _pointing(attention: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """1 where the first maximum of the map lies inside; maps (B or 1, H, W), inside (B, H, W)."""
    flat = inside.reshape(len(inside), -1)
    peak = attention.reshape(len(attention), -1).argmax(axis=1)
    return np.take_along_axis(flat, np.broadcast_to(peak, len(flat))[:, None], axis=1)[:, 0] * 1.0


def _energy(attention: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Share of the positive mass that lies inside; 0 where there is none."""
    positive = np.maximum(attention, 0)
    total = np.broadcast_to(positive.sum(axis=(1, 2)), len(inside))
    mass = (positive * inside).sum(axis=(1, 2))
    return np.divide(mass, total, out=np.zeros_like(mass), where=total > 0)
