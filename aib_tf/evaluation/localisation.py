"""Does the attention lie on the object."""

import numpy as np

from aib_tf.evaluation import intervals, maps, suite
from aib_tf.evaluation.intervals import RESAMPLES
from aib_tf.evaluation.suite import Result, Suite, UnavailableError

# Two standard deviations reach the edge of the image: as broad as a Gaussian can be that still
# falls to near nothing (0.14) there, and a place prior that has seen no image.
SIGMA = 0.25


def localisation(model, dataset, samples: int = 0, resamples: int = RESAMPLES, seed: int = 0) -> Result:
    """Pointing game and energy pointing of the mean attention, beside two baselines.

    Maps are enlarged to the image bilinearly with half-pixel centres. A pixel is in a box when its
    centre is. Metrics are named `<measure>_<object>_<map>`:

    - measure `pointing`: the share of images where the maximum of the map, the first in row order
      on ties, lies in the object. `energy`: the mean over images of the positive mass inside the
      object divided by all positive mass; 0 for a map without positive mass (such maps are counted
      in the details).
    - object `box` where the data has "bbox", `mask` where it has "mask". Images whose box or mask
      holds no pixel are left out of that object's metrics, and counted in the details.
    - map `attention`; `uniform`, the same value everywhere; `centred`, a Gaussian at the centre
      with a standard deviation of 0.25 of each image side. On the uniform map every pixel ties;
      instead of the first pixel, which would always be the corner, `uniform` reports the
      expectation for a pixel drawn at random. That is the share of the image that the object
      covers, and so is its energy.

    Args:
        model: Has `explain(images, samples)` with "attention_mean" (B, h, w), or with the maps that its
            `attention_names` name, of which the last is taken.
        dataset: Batches as dicts with "bbox" or "mask", see `aib_tf.evaluation.evaluate`.
        samples: Passed on to `explain`; the mean attention does not depend on it.
        resamples: Draws of the bootstrap.
        seed: Seed of the bootstrap.

    Returns:
        A `Result`. Values per image: `<metric>` as above, NaN where the object is missing, and
        `positive_mass` of the enlarged map.

    Raises:
        UnavailableError: The model has no attention, or the data no boxes and no masks.
        ValueError: An attention map holds NaN.
    """
    return suite.run(model, dataset, [Localisation(model)], samples, resamples, seed)[Localisation.name]


class Localisation(Suite):
    """The suite behind `localisation`."""

    name = "localisation"

    def measure(self, batch):
        # Of several maps, the deepest.
        names = getattr(self.model, "attention_names", ("attention_mean",))
        if not names or names[-1] not in batch.explanation:
            raise UnavailableError("the model has no attention")
        height, width = batch.images.shape[1:3]
        objects = {}
        if batch.boxes is not None:
            objects["box"] = maps.boxes_to_masks(batch.boxes, height, width)
        if batch.masks is not None:
            objects["mask"] = batch.masks
        if not objects:
            raise UnavailableError("the data has neither boxes nor masks")

        attention = maps.upsample(batch.finite(names[-1], rank=3), height, width)
        centred = maps.centred_gaussian(height, width, SIGMA)
        values = {"positive_mass": np.maximum(attention, 0).sum(axis=(1, 2))}
        for name, inside in objects.items():
            area = inside.mean(axis=(1, 2))
            found = {
                f"pointing_{name}_attention": _pointing(attention, inside),
                f"pointing_{name}_uniform": area,
                f"pointing_{name}_centred": _pointing(centred[None], inside),
                f"energy_{name}_attention": _energy(attention, inside),
                f"energy_{name}_uniform": area,
                f"energy_{name}_centred": _energy(centred[None], inside),
            }
            for metric, value in found.items():
                values[metric] = np.where(area > 0, value, np.nan)
        return values

    def summarise(self, values, resamples, seed):
        found, details = {}, {"centred_sigma": SIGMA}
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
        return found, details


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
