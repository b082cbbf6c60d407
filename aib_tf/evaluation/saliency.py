"""Does the attention lie where people look."""

import numpy as np

from aib_tf import maps
from aib_tf.evaluation import intervals, suite
from aib_tf.evaluation.intervals import RESAMPLES
from aib_tf.evaluation.subject import UnavailableError
from aib_tf.evaluation.suite import Result, Suite, Summary
from aib_tf.validation import check_choice

REFERENCES = ("saliency", "fixations", "mask")
MEASURES = ("cc", "sim", "kl_nats", "nss", "auc_judd", "shuffled_auc")


def saliency(
    model, dataset, reference: str | None = None, samples: int = 0, resamples: int = RESAMPLES, seed: int = 0
) -> Result:
    """Agreement of the mean attention with human gaze, or with any reference map, beside baselines.

    Maps are enlarged bilinearly, with half-pixel centres, to the size of what they are compared with. Metrics are named
    `<measure>_<map>`; less is better for `kl_nats`, more for the others. `aib_tf.evaluation.saliency_metrics` defines
    the measures, as pysaliency does:

    - `cc`, `sim`, `kl_nats`: correlation, similarity and KL divergence, with a reference map;
    - `nss`, `auc_judd`, `shuffled_auc`: normalised scanpath saliency and two areas under the curve, with fixations.
      Shuffled AUC compares with the fixations of other images: all others of the same batch and all of the batches
      before, so that one pass is enough and memory does not grow. The first images have the fewest to be compared with;
      `nonfixations_fewest` and `nonfixations_most` of the details say how many. Data in one batch give pysaliency's
      value exactly; another batch size changes the value a little.

    References: "saliency", a map (B, h, w) of the data, serves the first three; "fixations", counts (B, h, w), the
    others. Where the data have neither, the mask of the object plays the human: it is the reference map, and each of
    its pixels is fixated once.

    Maps: `attention`; `grad_cam`, that of `Subject.baseline`; `uniform`, the same value everywhere; `centred`, a
    Gaussian at the centre with a standard deviation of 0.25 of each image side.

    Images where a measure is not defined (a constant reference for `cc`; no fixations; no pixel or no fixation to
    compare with) are left out of it, and counted in the details as `<measure>_left_out`. Constant maps do have values:
    a CC and an NSS of 0, an AUC of 0.5, SIM and KL those of the uniform map; they are counted, too.

    Args:
        model: A model or a `Subject`.
        dataset: Batches as dicts with "saliency", "fixations" or "mask", such as those of `aib_tf.data.load_gaze`. It
            needs no classes.
        reference: "saliency", "fixations" or "mask" takes that alone; None takes the first two, those that there are,
            or else the mask.
        samples: Passed on to `explain`; the mean attention does not depend on it.
        resamples: Draws of the bootstrap.
        seed: Seed of the bootstrap.

    Returns:
        A `Result`. Values per image: `<measure>_<map>` as above, NaN where it is not defined; `nonfixations`, how many
        fixations of other images it was compared with, where there are fixations.

    Raises:
        UnavailableError: The model has no maps, or the data nothing to compare them with.
        ValueError: The reference is unknown; a map or a reference holds NaN; or fixations are no counts.

    Reference:
        Bylinskii et al., "What do different evaluation metrics tell us about saliency models?" (2019); Lai et al.,
        "Understanding more about human and machine attention in deep neural networks" (2019).
    """
    return suite.run(model, dataset, Saliency, {"reference": reference}, samples, resamples, seed)


class Saliency(Suite):
    """The suite behind `saliency`."""

    name = "saliency"

    def __init__(self, subject, reference: str | None = None):
        super().__init__(subject)
        if reference is not None:
            check_choice("reference", reference, REFERENCES)
        self.reference = reference
        # Fixations of the images of earlier batches at each pixel, by the size of the image.
        self.earlier: dict[tuple[int, int], np.ndarray] = {}
        self.used: tuple[str, ...] = ()

    def measure(self, batch):
        # It imports TensorFlow, which the other suites do without.
        from aib_tf.evaluation import saliency_metrics

        found = self._references(batch)
        self.used = tuple(found)
        compared = batch.maps()
        values = {f"is_constant_{name}": np.ptp(each, axis=(1, 2)) == 0 for name, each in compared.items()}

        def enlarged(height, width):
            everywhere = (len(batch.labels), height, width)
            yield from ((name, maps.upsample(each, height, width)) for name, each in compared.items())
            yield "uniform", np.ones(everywhere)
            yield "centred", np.broadcast_to(maps.centred_gaussian(height, width), everywhere)

        density = found.get("saliency", found.get("mask"))
        if density is not None:
            density = density.astype(np.float32)
            for name, each in enlarged(*density.shape[1:]):
                scores = saliency_metrics.measure(each.astype(np.float32), density)
                values |= {f"{measure}_{name}": np.float64(score) for measure, score in scores.items()}
        counts = found.get("fixations", found.get("mask"))
        if counts is not None:
            fixations = saliency_metrics.Fixations.from_counts(counts)
            earlier = self.earlier.get(fixations.shape, np.zeros(fixations.shape, np.int64))
            for name, each in enlarged(*fixations.shape):
                scores = saliency_metrics.measure(each.astype(np.float32), fixations=fixations, earlier=earlier)
                values |= {f"{measure}_{name}": np.float64(score) for measure, score in scores.items()}
            total = earlier + fixations.total()
            values["nonfixations"] = total.sum() - fixations.counts.sum(axis=1, dtype=np.int64)
            # Half of what may be compared with is left to the batches to come; a larger pool would change nothing.
            if total.sum() <= saliency_metrics.MOST_NONFIXATIONS // 2:
                self.earlier[fixations.shape] = total
        return values

    def summarise(self, values, resamples, seed):
        found, details = {}, {"reference": " and ".join(self.used), "centred_sigma": maps.CENTRED_SIGMA}
        for measure in MEASURES:
            terms = {name: value for name, value in values.items() if name.startswith(f"{measure}_")}
            if not terms:
                continue
            # Whether a measure is defined depends on the reference, so it is for all maps or for none.
            present = ~np.isnan(next(iter(terms.values())))
            details[f"{measure}_left_out"] = int((~present).sum())
            if present.any():
                terms = {name: value[present] for name, value in terms.items()}
                metrics = {name: lambda mean, name=name: mean[name] for name in terms}
                found |= intervals.estimates(terms, metrics, resamples, seed)
        if not found:
            raise UnavailableError("no image has fixations, or a reference map that is not constant")
        for name in [name for name in values if name.startswith("is_constant_")]:
            details[f"constant_maps_{name.removeprefix('is_constant_')}"] = int(values.pop(name).sum())
        if "nonfixations" in values:
            details["nonfixations_fewest"] = int(values["nonfixations"].min())
            details["nonfixations_most"] = int(values["nonfixations"].max())
        return Summary(found, details)

    def _references(self, batch) -> dict[str, np.ndarray]:
        """What maps are compared with, by the name of the field, (B, h, w) each."""
        there = {name: batch.fields[name] for name in ("saliency", "fixations") if name in batch.fields}
        if batch.masks is not None:
            there["mask"] = batch.masks
        if self.reference is not None:
            if self.reference not in there:
                raise UnavailableError(f"the data has no {self.reference}")
            there = {self.reference: there[self.reference]}
        if not there:
            raise UnavailableError("the data has neither fixations nor reference maps nor masks")
        if len(there) > 1:
            there.pop("mask", None)
        for name, values in there.items():
            values = np.asarray(values)
            if values.ndim != 3 or len(values) != len(batch.labels):
                raise ValueError(
                    f"{name!r} must have shape ({len(batch.labels)}, h, w). Received: shape={values.shape}"
                )
            bad = np.flatnonzero(~np.isfinite(values).all(axis=(1, 2)))
            if bad.size:
                raise ValueError(
                    f"NaN or infinity in {name!r} of {bad.size} of the {len(values)} images of one batch. "
                    f"Received: images={(batch.first + bad[:10]).tolist()}"
                )
        return there
