"""Do maps show what the model decides by: insertion, deletion, and randomised parameters."""

import functools
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from aib_tf import maps
from aib_tf.evaluation import intervals, suite
from aib_tf.evaluation.accuracy import log_softmax
from aib_tf.evaluation.chart import Chart, Line
from aib_tf.evaluation.grad_cam import GradCAM
from aib_tf.evaluation.intervals import RESAMPLES
from aib_tf.evaluation.networks import layers_in_order
from aib_tf.evaluation.subject import Subject
from aib_tf.evaluation.suite import Result, Suite, Summary
from aib_tf.export.freezing import freeze
from aib_tf.validation import check_count

# Of the Gaussian that blurs, as a share of the image side: 4 pixels of 32. Half of it already takes all that digits of
# 10 to 20 pixels are told by; objects of photographs are larger.
BLUR_SIGMA = 0.125

# Groups of layers that become random one after the other, at most.
STAGES = 6

# Above this rank correlation a map of a random network is called the same as before.
UNCHANGED = 0.9

# Of the orders of pixels and of the random weights: the same in every call, so that models are compared on them.
DRAWS_SEED = 0

# Pixels of the images that the model is asked about at once: 256 images of 32x32, a few of 224x224.
_CHUNK = 2**18


def faithfulness(
    model,
    dataset,
    steps: int = 20,
    images: int | None = 500,
    samples: int = 0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Result:
    """Whether the pixels that a map ranks first decide, and whether the map depends on what the model has learned.

    Metrics, for each map: `attention`; `grad_cam`; `centred`, a Gaussian at the centre with a standard deviation of
    0.25 of each image side; `uniform`, which has no order and stands for a random one:

    - `insertion_<map>`: the area under the probability of the predicted class, while the pixels of a blurred image are
      replaced by those of the image, the highest of the map first. Higher is better.
    - `deletion_<map>`: the same while the pixels of the image are blurred, the highest first. Lower is better.
    - `randomised_cosine_<map>`, `randomised_spearman_<map>`, of attention and Grad-CAM: the cosine similarity and the
      rank correlation of the map before and after all layers became random. A map that does not change explains
      nothing: what it shows was not learned. The details say so where the whole interval of the rank correlation lies
      above 0.9.
    - `probability_original`, `probability_blurred`: the probability of the predicted class, which both curves of
      every map begin and end at.

    Areas are by the trapezoid rule over the share of the pixels, in 0..1, in `steps` equal steps. Maps are enlarged to
    the image bilinearly. Pixels of equal value come in an order that is random, and the same for all maps of an image
    (row order would favour the top), and in deletion in the reverse of it, so that a map without any order gives the
    numbers of `uniform`: and there both areas are equal, since a random order read backwards is one, too.

    Both curves use the same blurred image: Petsiuk et al. blur for insertion and delete to grey, and a grey pixel in
    an image is an edge, which is evidence of its own. The Gaussian has a standard deviation of 0.125 of each image
    side and is cut off and renormalised at the border.

    Layers become random from the top, in up to 6 groups of as equal numbers of layers as possible, and those that are
    random stay so (cascading). Kernels are drawn from a normal distribution of variance 2 / fan-in (He et al. 2015),
    whatever the model started from: some begin as an average, which is no random draw, and a saved model need not
    tell. All else returns to what it was before training. For batch normalisation that means its statistics, too
    (mean 0, variance 1, so that it does nothing): those of the trained network on random features would drive
    activations to where nothing is left of them. Grad-CAM is that for the class that was predicted before. A map only
    changes when a layer before it does: attention does not depend on the layers that read it.

    The caller's model is not touched: layers become random in a copy. Where none can be made, or the maps come from a
    function, the randomisation of this map is left out, and the details say why. Constant maps have the similarity 1
    among themselves, by both measures (all zeros, for the cosine), and 0 to others.

    Args:
        model: A model or a `Subject`.
        dataset: Batches, see `aib_tf.evaluation.evaluate`.
        steps: Steps of the curves, 1 or more.
        images: How many images to look at, at most, spread evenly over the data set; None for all.
        samples: Draws of attention that logits are averaged over; 0 takes the means.
        resamples: Draws of the bootstrap.
        seed: Seed of the bootstrap. Orders and random weights are the same whatever it is.

    Returns:
        A `Result`. Values per image: the metrics, and behind `insertion_curve_`, `deletion_curve_` (images, steps + 1)
        and `cosine_curve_`, `spearman_curve_` (images, stages + 1) the curves of each map; `constant_<map>`, bool.

    Raises:
        UnavailableError: There is neither attention nor Grad-CAM.
        ValueError: A number is out of range, or the model returns NaN.

    References:
        - Petsiuk et al., "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018, section 4.3.
        - Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018, section 3.
    """
    return suite.run(model, dataset, Faithfulness, {"steps": steps, "images": images}, samples, resamples, seed)


class Faithfulness(Suite):
    """The suite behind `faithfulness`."""

    name = "faithfulness"

    def __init__(self, subject, steps: int = 20, images: int | None = 500):
        super().__init__(subject)
        self.steps = check_count("steps", steps)
        self.limit = None if images is None else check_count("images", images)
        self._graphs: dict[tuple, Callable | None] = {}
        self._copies: list[RandomisedCopy] | None = None
        self._reasons: dict[str, str] = {}

    def measure(self, batch):
        compared = batch.maps()
        values = self._insert_and_delete(batch, compared)
        for name, found in compared.items():
            values[f"constant_{name}"] = found.max(axis=(1, 2)) == found.min(axis=(1, 2))
        return values | self._randomise(batch, compared)

    def _insert_and_delete(self, batch, compared):
        count, height, width, _ = batch.images.shape
        pixels = height * width
        probabilities = np.exp(log_softmax(batch.finite("logits", rank=2)))
        classes = probabilities.argmax(axis=1)
        blurred = blur(batch.images)
        probability = functools.partial(self._probability, batch, blurred, classes)
        original = probabilities[np.arange(count), classes]
        lowest = probability(np.zeros((1, count, pixels), bool))[0]
        values = {"probability_original": original, "probability_blurred": lowest}

        # The same order for an image, whatever batch it comes in.
        random = np.stack(
            [np.random.default_rng([DRAWS_SEED, batch.first + row]).permutation(pixels) for row in range(count)]
        )
        flat = {name: maps.upsample(found, height, width).reshape(count, -1) for name, found in compared.items()}
        flat["centred"] = np.broadcast_to(maps.centred_gaussian(height, width).ravel(), (count, pixels))
        counts = np.rint(np.linspace(0, pixels, self.steps + 1)).astype(int)
        between = counts[1:-1, None, None]
        for name, found in flat.items():
            places = _places(found, random)
            inserted = probability(places < between)
            places = _places(found, -random)
            deleted = probability(places >= between)
            values[f"insertion_curve_{name}"] = np.stack([lowest, *inserted, original], axis=1)
            values[f"deletion_curve_{name}"] = np.stack([original, *deleted, lowest], axis=1)
        inserted = probability(random < between)
        values["insertion_curve_uniform"] = np.stack([lowest, *inserted, original], axis=1)
        # What is left after k pixels of the reversed order is what is there after all but k of the order.
        values["deletion_curve_uniform"] = values["insertion_curve_uniform"][:, ::-1]
        for name in (*flat, "uniform"):
            for kind in ("insertion", "deletion"):
                shares = counts / pixels
                if kind == "deletion" and name == "uniform":
                    shares = 1 - shares[::-1]
                values[f"{kind}_{name}"] = _area(values[f"{kind}_curve_{name}"], shares)
        return values

    def _probability(self, batch, blurred, classes, shown):
        """Probabilities (states, B) of the classes when only the pixels shown (states, B, H * W) are not blurred."""
        images, rows = batch.images, np.arange(len(classes))
        found = np.empty((len(shown), len(rows)))
        step = max(1, _CHUNK // int(np.prod(shown.shape[1:])))
        for start in range(0, len(shown), step):
            part = shown[start : start + step].reshape(-1, *images.shape[:3], 1)
            mixed = np.where(part, images, blurred).reshape(-1, *images.shape[1:])
            logits = np.asarray(self._logits(mixed, batch.samples)).astype(np.float64)
            if not np.isfinite(logits).all():
                raise ValueError(
                    "NaN or infinity in the logits of partly blurred images. "
                    f"Received: images={batch.first}..{batch.first + len(rows) - 1}"
                )
            probabilities = np.exp(log_softmax(logits)).reshape(len(part), len(rows), -1)
            found[start : start + step] = probabilities[:, rows, classes]
        return found

    def _logits(self, images, samples):
        if samples == 0 and self.subject.differentiable:
            frozen = self._frozen(images.shape[1:])
            if frozen is not None:
                return frozen(tf.convert_to_tensor(images))
        return self.subject.explain(images, samples)["logits"]

    def _frozen(self, shape):
        """The logits of the model as a graph of constants, in three quarters of the time; None where that cannot be.

        This suite asks for a hundred times as many logits as there are images.
        """
        if shape not in self._graphs:
            specs = [tf.TensorSpec((None, *shape), tf.float32)]
            try:
                self._graphs[shape] = freeze(
                    lambda images: self.subject.explain(images)["logits"], specs, fast_convolutions=False
                )
            except (TypeError, ValueError):
                # It draws numbers, or changes a variable, even at inference.
                self._graphs[shape] = None
        return self._graphs[shape]

    def _randomise(self, batch, compared):
        if self._copies is None:
            self._copies = self._copy_models(batch, compared)
        values = {}
        for copy in self._copies:
            for name, found in copy.similarities(batch.images, compared).items():
                values |= {f"{kind}_curve_{name}": curve for kind, curve in found.items()}
                values |= {f"randomised_{kind}_{name}": curve[:, -1] for kind, curve in found.items()}
        return values

    def _copy_models(self, batch, compared):
        """A copy of each model that maps come from, and reasons where there is none."""
        copies, sources = [], {}
        if "attention" in compared:
            if self.subject.attention_in(batch.explanation) is None:
                self._reasons["attention"] = "its maps come from a function, which reads the model and not a copy of it"
            else:
                sources["attention"] = self.subject.model
        if "grad_cam" in compared:
            sources["grad_cam"] = self.subject.baseline
        by_model = {}
        for name, model in sources.items():
            by_model.setdefault(id(model), (model, []))[1].append(name)
        for model, names in by_model.values():
            own = model is self.subject.model
            try:
                copy = RandomisedCopy(model, names, probabilities=own and self.subject.probabilities)
                copy.check(batch.images, compared)
            # Whatever a model of somebody else's raises while it is taken apart and put together again.
            except Exception as error:
                for name in names:
                    self._reasons[name] = f"the model cannot be copied ({type(error).__name__}: {error})"
            else:
                copies.append(copy)
        return copies

    def summarise(self, values, resamples, seed):
        names = [
            name
            for name in values
            if name.startswith(("insertion_", "deletion_", "randomised_", "probability_")) and "_curve_" not in name
        ]
        terms = {name: values[name] for name in sorted(names, key=_metric_order)}
        metrics = {name: lambda mean, name=name: mean[name] for name in terms}
        found = intervals.estimates(terms, metrics, resamples, seed)
        details = {
            "steps": self.steps,
            "blur_sigma": BLUR_SIGMA,
            "centred_sigma": maps.CENTRED_SIGMA,
            "draws_seed": DRAWS_SEED,
        }
        for name in ("attention", "grad_cam"):
            if f"constant_{name}" in values:
                details[f"constant_maps_{name}"] = int(values[f"constant_{name}"].sum())
        for copy in self._copies:
            for name in copy.names:
                details[f"randomised_layers_{name}"] = copy.groups
                verdict = _verdict(found[f"randomised_spearman_{name}"])
                if values[f"constant_{name}"].all():
                    verdict = "All maps are constant: there is nothing in them to change."
                details[f"randomised_verdict_{name}"] = verdict
        for name, reason in self._reasons.items():
            details[f"randomised_left_out_{name}"] = reason
        charts = {}
        for kind, label in (("insertion", "share of pixels shown"), ("deletion", "share of pixels blurred")):
            charts[kind] = _chart(
                values, f"{kind}_curve_", label, "probability of the predicted class", resamples, seed
            )
        shares = {name: copy.shares for copy in self._copies for name in copy.names}
        for kind, label in (("spearman", "rank correlation"), ("cosine", "cosine similarity")):
            if shares:
                x_label = "share of layers randomised, from the top"
                label += " with the map before"
                charts[f"randomised_{kind}"] = _chart(values, f"{kind}_curve_", x_label, label, resamples, seed, shares)
        return Summary(found, details, charts)


class RandomisedCopy:
    """A copy of a Keras model whose layers become random from the top, and the similarity of its maps to before.

    Args:
        model: the model, which is only read.
        names: "attention", for the attention of a model of this library, "grad_cam", or both.
        probabilities: whether the model returns probabilities.

    Attributes:
        names: as given.
        groups: names of the layers that become random together, from the top, one text for each stage.
        shares: share of the layers that are random after each stage, from 0 on.

    Raises:
        TypeError, ValueError: The model cannot be copied, or has no kernels.
    """

    def __init__(self, model, names, probabilities=False):
        self.names = list(names)
        self._model = model
        self._copy = keras.models.clone_model(model)
        if not self._copy.built:
            self._copy.build(model.input_shape)
        if [weight.shape for weight in self._copy.weights] != [weight.shape for weight in model.weights]:
            raise ValueError("its copy has other weights")
        draws = {id(variable): _drawn(variable, layer, at) for at, (layer, variable) in enumerate(_kernels(self._copy))}
        layers = _layers_from_the_top(self._copy, draws)
        if not layers:
            raise ValueError("it has no kernels")
        groups = [list(group) for group in np.array_split(np.arange(len(layers)), min(STAGES, len(layers)))]
        self._stages = [
            [
                # What was drawn for a kernel; all else as it is in a copy that has not been given any weights yet.
                (variable, draws.get(id(variable), np.asarray(variable)))
                for number in group
                for layer in layers[number]
                for variable in layer.weights
            ]
            for group in groups
        ]
        self.groups = [", ".join(layers[number][0].name for number in group) for group in groups]
        self.shares = [0.0, *np.cumsum([len(group) for group in groups]) / len(layers)]
        self._restore()
        for layer in self._copy._flatten_layers():
            if isinstance(layer, keras.layers.Normalization):
                layer.finalize_state()  # set_weights alone leaves what it computes with
        self._subject = Subject(self._copy, probabilities=probabilities)
        self._maps = {}
        if "attention" in names:
            self._maps["attention"] = lambda images, classes: self._subject.maps(images)
        if "grad_cam" in names:
            self._maps["grad_cam"] = GradCAM(self._copy, probabilities=probabilities)

    def check(self, images, before):
        """ValueError unless the copy gives the maps (B, h, w) that the model gives."""
        classes = self._classes(images)
        for name, function in self._maps.items():
            if not np.allclose(
                maps.cosine_similarity(before[name], np.asarray(function(images, classes))), 1, atol=1e-3
            ):
                raise ValueError("its copy gives other maps")

    def similarities(self, images, before):
        """Curves over the stages.

        Args:
            images: (B, H, W, C).
            before: name to maps (B, h, w) of the model.

        Returns:
            Name of the map to "cosine" and "spearman", (B, stages + 1) each, the first of them 1.
        """
        self._restore()
        classes = self._classes(images)
        same = np.ones(len(images))
        curves = {name: {"cosine": [same], "spearman": [same]} for name in self._maps}
        for stage in self._stages:
            for variable, value in stage:
                variable.assign(value)
            for name, function in self._maps.items():
                # A deep random network may overflow; what is no number is no evidence.
                after = np.nan_to_num(np.asarray(function(images, classes)).astype(np.float64), posinf=0, neginf=0)
                curves[name]["cosine"].append(maps.cosine_similarity(before[name], after))
                curves[name]["spearman"].append(spearman(before[name], after))
        return {
            name: {kind: np.stack(curve, axis=1) for kind, curve in found.items()} for name, found in curves.items()
        }

    def _restore(self):
        self._copy.set_weights(self._model.get_weights())

    def _classes(self, images):
        return np.asarray(self._subject.explain(images)["logits"]).argmax(axis=1)


def blur(images: np.ndarray, sigma: float = BLUR_SIGMA) -> np.ndarray:
    """Blurs images (B, H, W, C) by a Gaussian that is cut off and renormalised at the border.

    Args:
        images: (B, H, W, C).
        sigma: Standard deviation along each side, as a share of that side.

    Returns:
        The same shape and type.
    """
    rows, columns = (_gaussian_average(size, sigma) for size in images.shape[1:3])
    blurred = np.einsum("ih,bhwc->biwc", rows, images, optimize=True)
    return np.einsum("jw,biwc->bijc", columns, blurred, optimize=True).astype(images.dtype)


def spearman(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Rank correlation of maps (B, h, w), ties at their mean rank: (B,); 1 of two constant maps, 0 of one."""
    return maps.cosine_similarity(*(_centred_ranks(np.asarray(each).reshape(len(each), -1)) for each in (left, right)))


def _centred_ranks(values):
    """Ranks of each row less their mean, equal values at their mean rank; exactly 0 in a constant row."""
    count, size = values.shape
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    starts = np.ones((count, size), bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # Runs of equal values, numbered over all rows: a run from a to b has the mean rank (a + b) / 2.
    runs = np.cumsum(starts.ravel()) - 1
    first = np.flatnonzero(starts) % size
    last = first + np.bincount(runs) - 1
    ranks = np.empty((count, size))
    np.put_along_axis(ranks, order, ((first + last) / 2)[runs].reshape(count, size), axis=1)
    return ranks - (size - 1) / 2


def _places(values, ties):
    """Place of each pixel of (B, P) in the order of falling values, and of rising `ties` among equal ones."""
    order = np.lexsort((ties, -values), axis=-1)
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), axis=1)
    return places


def _area(curve, shares):
    """Trapezoid rule over curves (B, k) at the shares (k,)."""
    return ((curve[:, 1:] + curve[:, :-1]) / 2 * np.diff(shares)).sum(axis=1)


def _gaussian_average(size, sigma):
    """(size, size) matrix whose row i averages around i."""
    distance = (np.arange(size)[:, None] - np.arange(size)) / (sigma * size)
    weights = np.exp(-0.5 * distance**2)
    return weights / weights.sum(axis=1, keepdims=True)


def _layers_from_the_top(model, kernels):
    """Lists of a layer with kernels and those without that follow it, from the top."""
    groups, seen, waiting = [], set(), []
    for layer in layers_in_order(model):
        if id(layer) in seen or not layer.weights:
            continue
        seen.add(id(layer))
        if any(id(variable) in kernels for variable in layer.weights):
            # What comes before the first kernel, such as a normalisation, goes with it.
            groups.append([layer, *waiting])
            waiting = []
        else:
            (groups[-1] if groups else waiting).append(layer)
    return groups[::-1]


def _kernels(model):
    """Pairs of a layer and a variable, for all variables that are a matrix or more and belong to no preprocessing."""
    for layer in layers_in_order(model):
        if not isinstance(layer, keras.layers.Normalization):
            for variable in layer.weights:
                if len(variable.shape) >= 2:
                    yield layer, variable


def _drawn(kernel, layer, number):
    inputs = kernel.shape[:-1]
    if isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)):
        inputs = inputs[:-1]  # each channel is convolved alone
    deviation = np.sqrt(2 / max(1, int(np.prod(inputs))))
    random = np.random.default_rng([DRAWS_SEED, number])
    return random.normal(scale=deviation, size=kernel.shape).astype(np.float32)


def _verdict(correlation):
    if correlation.low > UNCHANGED:
        return (
            "The map hardly changes when all layers are random "
            f"(the rank correlation is above {UNCHANGED}): it explains nothing that the model has learned."
        )
    if correlation.high < UNCHANGED:
        return "The map changes when all layers are random."
    return f"It is open whether the map changes when all layers are random (the interval holds {UNCHANGED})."


def _metric_order(name):
    order = ("insertion", "deletion", "randomised_cosine", "randomised_spearman", "probability")
    return next(number for number, start in enumerate(order) if name.startswith(start))


def _chart(values, prefix, x_label, y_label, resamples, seed, shares=None):
    lines = {}
    for key, curves in values.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            mean, low, high = intervals.bands(curves, resamples, seed)
            lines[name] = Line(shares[name] if shares else np.linspace(0, 1, len(mean)), mean, low, high)
    return Chart(x_label, y_label, lines)
