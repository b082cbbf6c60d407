"""Does a map stay where it is while small changes leave the prediction as it is."""

import dataclasses

import numpy as np

from aib_tf import maps
from aib_tf.evaluation import alterations, intervals, suite
from aib_tf.evaluation.chart import Chart, Line
from aib_tf.evaluation.intervals import RESAMPLES
from aib_tf.evaluation.subject import UnavailableError
from aib_tf.evaluation.suite import Result, Suite, Summary
from aib_tf.validation import check_count, check_weight

WINDOWS = RADII = (4, 8, 12, 16)
THRESHOLDS = (0.85, 0.9, 0.95)


def consistency(
    model,
    dataset,
    windows=WINDOWS,
    radii=RADII,
    thresholds=THRESHOLDS,
    samples: int = 0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Result:
    """The interpretability score of Lai et al. 2021: the map of an image and of the altered image.

        score_t = #{kept pairs whose maps have cosine similarity >= t} / #{kept pairs}

    A pair is an image and an altered copy of it; it is kept where the model predicts the same class
    for both. The maps, flattened, are compared at their own resolution. The script that evaluates
    the score in the paper is not public: this is read from the paper and from the flags of the
    code that is.

    Alterations, see `aib_tf.evaluation.alterations`: spatial ones, `window_<w>`, a window of w x w
    pixels in another colour at a random place, and `digit`, a small digit written at a random
    place; ones of frequency, `low_pass_<r>` and `high_pass_<r>`, which keep the spatial frequencies
    within a radius of r periods per image side, or those outside. Windows, and the digit, that do
    not fit into the images are left out and named in the details.

    Metrics, for all of which but the last more is better:

    - `kept_<alteration>`: the share of pairs that are kept.
    - `score_<100 t>_<alteration>_<map>`: the score. It is missing where no pair is kept, and the
      alteration then named in the details; a bootstrap draw without a kept pair counts as the value
      over all images.
    - `kept_spatial`, `kept_frequency`, `score_<100 t>_spatial_<map>`, `.._frequency_<map>`: the
      same over the pairs of all alterations of the kind together.
    - `score_<100 t>_unrelated_<map>`: the share of pairs of an image and the image before it whose
      maps are as similar: what the map scores for images that have nothing in common. A score says
      something about the map as far as it lies above this number.

    Maps: `attention`, and `grad_cam`, that of `Subject.baseline` for the class that it predicts
    itself. The uniform map and the centred Gaussian do not depend on the image, so they score
    exactly 1 on every pair, related or not; that stands in the details. A map of all zeros has no
    direction: two of them count as similar (1), like any two maps that are the same, and one of
    them with another map as not similar (0). How many images have such a map is in the details.

    Args:
        model: A model or a `Subject`.
        dataset: Batches, see `aib_tf.evaluation.evaluate`.
        windows: Sides of windows in pixels.
        radii: Radii in periods per image side.
        thresholds: Cosine similarities, in 0..1.
        samples: Draws of attention for each prediction; 0 takes the means. With draws, some pairs
            are lost to chance, and the share of kept pairs is lower for it.
        resamples: Draws of the bootstrap.
        seed: Seed of places, colours and digits, of what the model draws, and of the bootstrap.

    Returns:
        A `Result`. Values per image: `kept_<alteration>`, `similarity_<alteration>_<map>` (NaN where
        the pair is not kept) and `similarity_unrelated_<map>` (NaN for the first image).

    Raises:
        UnavailableError: The model has neither attention nor gradients, or the images are not in the
            range of pixels that the `Subject` says.
        ValueError: An argument is out of range, or a map holds NaN.

    Reference:
        - Lai et al., "Information Bottleneck Approach to Spatial Attention Learning", IJCAI 2021,
          section 4.
    """
    options = dict(windows=windows, radii=radii, thresholds=thresholds)
    return suite.run(model, dataset, Consistency, options, samples, resamples, seed)


class Consistency(Suite):
    """The suite behind `consistency`."""

    name = "consistency"

    def __init__(self, subject, windows=WINDOWS, radii=RADII, thresholds=THRESHOLDS):
        super().__init__(subject)
        self.windows = _each_once("windows", [check_count("windows", window) for window in windows])
        self.radii = _each_once("radii", [check_weight("radii", radius) for radius in radii])
        self.thresholds = _each_once("thresholds", [_check_threshold(threshold) for threshold in thresholds])
        if not self.thresholds:
            raise ValueError("There must be a threshold. Received: thresholds=()")
        self.left_out: list[str] = []
        self._zero_maps: dict[str, int] = {}
        # Maps of the last image so far: the first of the next batch is compared with them.
        self._last: dict[str, np.ndarray] = {}

    def measure(self, batch):
        check_pixel_range(self.subject, batch.images)
        predictions = batch.finite("logits", rank=2).argmax(axis=1)
        compared = batch.maps()
        values = {}
        for name, images in self._altered(batch):
            altered = dataclasses.replace(batch, images=images)
            kept = altered.finite("logits", rank=2).argmax(axis=1) == predictions
            values[f"kept_{name}"] = kept
            for kind in compared:
                similarity = np.full(len(kept), np.nan)
                if kept.any():
                    similarity[kept] = maps.cosine_similarity(compared[kind][kept], self._maps(altered, kept, kind))
                values[f"similarity_{name}_{kind}"] = similarity
        for kind, found in compared.items():
            before = np.concatenate([self._last.get(kind, found[:1]), found[:-1]])
            values[f"similarity_unrelated_{kind}"] = maps.cosine_similarity(found, before)
            if kind not in self._last:
                values[f"similarity_unrelated_{kind}"][0] = np.nan
            self._last[kind] = found[-1:]
            self._zero_maps[kind] = self._zero_maps.get(kind, 0) + int((~found.any(axis=(1, 2))).sum())
        return values

    def summarise(self, values, resamples, seed):
        kinds = list(self._zero_maps)
        names = [name[len("kept_") :] for name in values if name.startswith("kept_")]
        groups = {name: [name] for name in names}
        for group, members in (
            ("spatial", [name for name in names if name.startswith(("window", "digit"))]),
            ("frequency", [name for name in names if name.startswith(("low", "high"))]),
        ):
            if members:
                groups[group] = members
        # One column a pair: whether it is kept, and whether its maps agree as well.
        kept = {group: np.stack([values[f"kept_{name}"] for name in members], 1) for group, members in groups.items()}
        terms = {f"kept_{group}": pairs.mean(axis=1) for group, pairs in kept.items()}
        metrics = {name: _mean_of(name) for name in terms}
        scored = {}
        for threshold in self.thresholds:
            for group, members in groups.items():
                for kind in kinds if kept[group].any() else ():
                    similar = np.stack([values[f"similarity_{name}_{kind}"] for name in members], 1) >= threshold
                    name = f"score_{_label(100 * threshold)}_{group}_{kind}"
                    terms[name] = (kept[group] & similar).mean(axis=1)
                    metrics[name] = _ratio_of(name, f"kept_{group}", terms)
                    scored[name] = group
        found = intervals.estimates(terms, metrics, resamples, seed) if terms else {}
        for name, group in scored.items():
            # A ratio says something of the images that have a kept pair.
            found[name] = dataclasses.replace(found[name], images=int(kept[group].any(axis=1).sum()))
        found |= self._unrelated(values, kinds, resamples, seed)
        details = {
            "thresholds": list(self.thresholds),
            "alterations": names,
            "left_out": list(self.left_out),
            "without_kept_pairs": [group for group, pairs in kept.items() if not pairs.any()],
            # Their maps are the same for every image.
            "score_uniform": 1.0,
            "score_centred": 1.0,
        }
        details |= {f"zero_maps_{kind}": count for kind, count in self._zero_maps.items()}
        return Summary(found, details, self._charts(found, kinds))

    def _maps(self, altered, kept, kind):
        """Maps of the altered images that are kept; a map costs a gradient for Grad-CAM."""
        if kind == "grad_cam":
            return check_finite(self.subject.grad_cam(altered.images[kept]))
        own = self.subject.attention_in(altered.explanation)
        return check_finite(self.subject.maps(altered.images[kept]) if own is None else np.asarray(own)[kept])

    def _altered(self, batch):
        """Pairs of the name of an alteration and the altered images."""
        images, numbers = batch.images, batch.first + np.arange(len(batch.images))
        pixel_range = self.subject.pixel_range
        side = min(images.shape[1:3])
        size = f"images of {images.shape[1]} x {images.shape[2]}"
        self.left_out = [f"window_{window}: larger than {size}" for window in self.windows if window > side]
        for window in self.windows:
            if window <= side:
                yield f"window_{window}", alterations.recolour_window(images, window, pixel_range, self.seed, numbers)
        if alterations.digit_size(*images.shape[1:3]) <= side:
            yield "digit", alterations.paste_digit(images, pixel_range, self.seed, numbers)
        else:
            self.left_out.append(f"digit: larger than {size}")
        for radius in self.radii:
            yield f"low_pass_{_label(radius)}", alterations.low_pass(images, radius, pixel_range)
        for radius in self.radii:
            yield f"high_pass_{_label(radius)}", alterations.high_pass(images, radius, pixel_range)

    def _unrelated(self, values, kinds, resamples, seed):
        terms = {
            f"score_{_label(100 * threshold)}_unrelated_{kind}": values[f"similarity_unrelated_{kind}"][1:] >= threshold
            for threshold in self.thresholds
            for kind in kinds
        }
        if not all(map(len, terms.values())):
            return {}
        return intervals.estimates(terms, {name: _mean_of(name) for name in terms}, resamples, seed)

    def _charts(self, found, kinds):
        """The score at the middle threshold, and the share of kept pairs, against window and radius."""
        threshold = self.thresholds[len(self.thresholds) // 2]
        charts = {}
        for family, places, x_label in (
            ("window", self.windows, "side of the window (pixels)"),
            ("low_pass", self.radii, "radius of what is kept (periods per image side)"),
            ("high_pass", self.radii, "radius of what is taken away (periods per image side)"),
        ):
            lines = {}
            for line, start, end in (
                *((kind, f"score_{_label(100 * threshold)}_", f"_{kind}") for kind in kinds),
                ("kept pairs", "kept_", ""),
            ):
                points = [(x, found.get(f"{start}{family}_{_label(x)}{end}")) for x in sorted(places)]
                points = [(x, estimate) for x, estimate in points if estimate is not None]
                if points:
                    places_there, estimates = zip(*points, strict=True)
                    lines[line] = Line(places_there, *zip(*((e.value, e.low, e.high) for e in estimates), strict=True))
            if lines:
                charts[family] = Chart(x_label, f"share of pairs (cosine similarity >= {threshold:g})", lines)
        return charts


def check_finite(found) -> np.ndarray:
    """Maps as an array; a ValueError where one holds NaN or an infinity."""
    found = np.asarray(found)
    bad = ~np.isfinite(found).all(axis=(1, 2))
    if bad.any():
        raise ValueError(
            f"NaN or infinity in the maps of {bad.sum()} of {len(found)} changed images of one batch. "
            f"Received: images={np.flatnonzero(bad)[:10].tolist()} of the batch"
        )
    return found


def check_pixel_range(subject, images) -> None:
    """Raises UnavailableError where images are no pictures on the scale that the subject says.

    Clipping such images to its range would change them beyond recognition, without a word.
    """
    low, high = (end - sign * subject.pixel / 2 for end, sign in zip(subject.pixel_range, (1, -1), strict=True))
    if not ((images >= low) & (images <= high)).all():
        raise UnavailableError(
            "the images are not on the scale of the subject: give the mean and standard deviation of the pixels, as in "
            "Subject(model, mean=.., stddev=..). "
            f"Received: images in {images.min():.3g}..{images.max():.3g}, "
            f"pixels in {subject.pixel_range[0].min() + 0:.3g}..{subject.pixel_range[1].max():.3g}"
        )


def _mean_of(name):
    return lambda mean: mean[name]


def _ratio_of(name, kept, terms):
    """Metric: one mean over another; over all images where a draw has none of the latter."""
    overall = terms[name].mean() / terms[kept].mean()

    def ratio(mean):
        return np.divide(mean[name], mean[kept], out=np.full_like(mean[kept], overall), where=mean[kept] > 0)

    return ratio


def _label(number):
    """A number as part of a name: 90, 92_5."""
    return f"{number:g}".replace(".", "_")


def _check_threshold(threshold):
    if not 0 < check_weight("thresholds", threshold) < 1:
        raise ValueError(f"Thresholds must lie between 0 and 1. Received: thresholds={threshold!r}")
    return float(threshold)


def _each_once(name, values):
    if len({_label(value) for value in values}) < len(values):
        raise ValueError(f"Each of `{name}` may be there once. Received: {name}={values}")
    return tuple(values)
