"""How accurate a model stays when its images are changed against it, and whether to believe that."""

import numpy as np

from aib_tf import maps
from aib_tf.evaluation import intervals, suite
from aib_tf.evaluation.accuracy import check_labels
from aib_tf.evaluation.chart import Chart, Line
from aib_tf.evaluation.consistency import check_finite, check_pixel_range
from aib_tf.evaluation.intervals import RESAMPLES
from aib_tf.evaluation.subject import Subject, UnavailableError
from aib_tf.evaluation.suite import Result, Suite, Summary
from aib_tf.validation import check_count, check_weight

EPSILONS = (1, 2, 4, 8)
STEPS = 20
IMAGES = 500

# Half of the range of a pixel: any image can become plain grey, so no classifier withstands it.
UNBOUNDED = 128

# What is left after that, more of which an attack that works does not leave.
UNBOUNDED_ACCURACY = 0.05

# By how much one attack must beat another one to be called stronger; a second random start of the
# same attack changes the accuracy by less.
TOLERANCE = 0.02

# Share of images whose gradient is exactly zero from which on an attack is held to be blind.
ZERO_GRADIENTS = 0.05

# Keeps the signs of random noise apart from what else is drawn from a seed.
_NOISE = 2


def robustness(
    model,
    dataset,
    epsilons=EPSILONS,
    steps: int = STEPS,
    images: int | None = IMAGES,
    samples: int = 0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Result:
    """Accuracy under attacks that may change every pixel by epsilon, and a check of the attacks.

    The attacks know the model and the label (white box, untargeted), raise the cross-entropy, and
    stay within `epsilon` levels of each pixel (of 255, in every channel, before normalisation) and
    within the range of pixels. FGSM and PGD are those of `aib_tf.evaluation.attacks`, PGD with steps
    of 2.5 epsilon / `steps` from a random start.

    The undisturbed image belongs to every ball, so an image that is misclassified as it is counts
    as misclassified under every attack. So does, for PGD, one for which any iterate at this epsilon
    or at a smaller one is misclassified: `accuracy_pgd_<epsilon>` is a worst case and can only fall
    with epsilon.

    Gradients go through the means, or, with samples = n, are those of the cross-entropy of logits
    that are averaged over n draws; the predictions are those of the same logits, drawn anew each
    time, so an image near the boundary may be lost to chance in one of the `steps` + 1 looks. An
    anchor quantizer passes gradients straight through.

    Metrics; epsilon stands in pixel levels, with an underscore for a decimal point:

    - `accuracy_clean`, `accuracy_fgsm_<epsilon>`, `accuracy_pgd_<epsilon>`: more is better, where
      the check below has passed.
    - `accuracy_noise_<epsilon>`: under plus or minus epsilon at random, for comparison.
    - `map_similarity_pgd_<epsilon>`, `map_similarity_noise_<epsilon>`: where there are maps, the mean
      cosine similarity between the maps of the image and of the attacked image, over the images that
      are classified correctly as they are. The attacked image is the first iterate that is
      misclassified, at the smallest epsilon that has one, else the last iterate.

    The check asks whether the attacks fail because the model is robust or because its gradients are
    of no use to them (Athalye et al. 2018). Its figures are metrics as well:

    - `accuracy_pgd_128` after PGD with an epsilon (128, or the largest if that is more) at which any
      image can become plain grey: it must be 0.05 or less.
    - FGSM, and random noise, must not leave an accuracy lower than PGD at the same epsilon, by more
      than 0.02 (as below).
    - `accuracy_transfer_<epsilon>`, where `Subject.baseline` is another Keras model with the same
      classes: at the largest epsilon, the images that withstood are attacked again, with gradients
      of that model. It must not be lower than the accuracy under PGD.
    - `accuracy_unquantized_<epsilon>`, for an AIB model with a quantizer: the same, with gradients
      of the model without its quantizer, for which the straight-through gradient is exact.
    - The detail `zero_gradient_share`, the share of images where the gradient of the loss is exactly
      zero in every pixel, or not finite: it must be 0.05 or less.

    The detail `gradient_check` is "passed", or "masked gradients: " and what spoke for that. The
    accuracies are then no measure of robustness, only an upper bound that a better attack would
    lower.

    Args:
        model: A Keras model or a `Subject` of one, which knows the scale of the pixels.
        dataset: Batches, see `aib_tf.evaluation.evaluate`.
        epsilons: Largest changes in pixel levels, more than 0 and at most 255.
        steps: Steps of PGD.
        images: How many images are attacked at most, spread evenly over the data; None for all.
        samples: Draws of attention that gradients and predictions are averaged over; 0 attacks the
            means.
        resamples: Draws of the bootstrap.
        seed: Seed of random starts and noise, of what the model draws, and of the bootstrap.

    Returns:
        A `Result`. Values per image: `correct_clean`, `correct_<attack>_<epsilon>`,
        `map_similarity_<attack>_<epsilon>` (NaN for images that are misclassified as they are) and
        `zero_gradient`.

    Raises:
        UnavailableError: Gradients cannot be had, or the images are not in the range of pixels that
            the `Subject` says.
        ValueError: An argument is out of range, a label is no class of the model, or the model
            returns NaN.

    Reference:
        - Athalye, Carlini and Wagner, "Obfuscated Gradients Give a False Sense of Security", ICML
          2018, section 3.1.
    """
    options = dict(epsilons=epsilons, steps=steps, images=images)
    return suite.run(model, dataset, Robustness, options, samples, resamples, seed)


class Robustness(Suite):
    """The suite behind `robustness`."""

    name = "robustness"

    def __init__(self, subject, epsilons=EPSILONS, steps=STEPS, images=IMAGES):
        super().__init__(subject)
        self.epsilons = tuple(sorted(_check_epsilon(epsilon) for epsilon in epsilons))
        if not self.epsilons or len(set(map(_label, self.epsilons))) < len(self.epsilons):
            raise ValueError(f"There must be an epsilon, each of them once. Received: epsilons={epsilons}")
        self.steps = check_count("steps", steps)
        self.limit = None if images is None else check_count("images", images)
        self.unbounded = max(UNBOUNDED, self.epsilons[-1])
        subject.check_differentiable()
        self._compiled = {}
        self._others = None
        self._samples = 0

    def measure(self, batch):
        check_pixel_range(self.subject, batch.images)
        self._samples = batch.samples
        logits = batch.finite("logits", rank=2)
        labels = check_labels(batch.labels, logits)
        correct = logits.argmax(axis=1) == labels
        gradients = self._gradients(batch.images, labels)
        usable = np.isfinite(gradients) & (gradients != 0)
        values = {"correct_clean": correct, "zero_gradient": ~usable.any(axis=(1, 2, 3))}

        signs = _random_signs(batch.images.shape, self.seed, batch.first)
        before = self._maps(batch.images)
        attacked, standing = batch.images.copy(), correct.copy()
        for epsilon in self.epsilons:
            label = _label(epsilon)
            fgsm = self._step(batch.images, gradients, epsilon)
            noise = self._step(batch.images, signs, epsilon)
            values[f"correct_fgsm_{label}"] = correct & (self._predictions(fgsm) == labels)
            values[f"correct_noise_{label}"] = correct & (self._predictions(noise) == labels)
            # Images that are broken stay broken in a larger ball, and need no further attack.
            self._attack("own", batch, labels, standing, epsilon, attacked)
            values[f"correct_pgd_{label}"] = standing.copy()
            if before is not None:
                for attack, changed in (("pgd", attacked), ("noise", noise)):
                    similarity = maps.cosine_similarity(before, self._maps(changed))
                    values[f"map_similarity_{attack}_{label}"] = np.where(correct, similarity, np.nan)
        largest = self.epsilons[-1]
        for source in self._sources(batch.images.shape, logits.shape[1]):
            left = standing.copy()
            self._attack(source, batch, labels, left, largest)
            values[f"correct_{source}_{_label(largest)}"] = left
        if self.unbounded > largest:
            self._attack("own", batch, labels, standing, self.unbounded)
            values[f"correct_pgd_{_label(self.unbounded)}"] = standing
        return values

    def summarise(self, values, resamples, seed):
        terms = {
            name.replace("correct", "accuracy"): values[name]
            for attack in ("clean", "fgsm", "pgd", "noise", "transfer", "unquantized")
            for name in values
            if name.startswith(f"correct_{attack}")
        }
        accuracies = list(terms)
        found = intervals.estimates(terms, {name: _mean_of(name) for name in terms}, resamples, seed)
        correct = values["correct_clean"].astype(bool)
        if correct.any():
            terms = {name: value[correct] for name, value in values.items() if name.startswith("map_similarity")}
            if terms:
                found |= intervals.estimates(terms, {name: _mean_of(name) for name in terms}, resamples, seed)
        zero = float(values["zero_gradient"].mean())
        details = {
            "gradient_check": self._verdict({name: found[name].value for name in accuracies}, zero),
            "zero_gradient_share": zero,
            "epsilons": list(self.epsilons),
            "steps": self.steps,
            "gradients": f"of logits averaged over {self._samples} draws" if self._samples else "through the means",
        }
        return Summary(found, details, self._charts(found))

    def _verdict(self, accuracy, zero_gradients):
        """What the check of the gradients found, in words."""
        if accuracy["accuracy_clean"] == 0:
            return "not possible: no image is classified correctly as it is"
        reasons = []
        for epsilon in self.epsilons:
            pgd = accuracy[f"accuracy_pgd_{_label(epsilon)}"]
            for name, title in (("fgsm", "FGSM"), ("noise", "random noise")):
                other = accuracy[f"accuracy_{name}_{_label(epsilon)}"]
                if other < pgd - TOLERANCE:
                    reasons.append(f"{title} at {epsilon:g}/255 leaves {other:.1%} correct, PGD {pgd:.1%}")
        largest = self.epsilons[-1]
        pgd = accuracy[f"accuracy_pgd_{_label(largest)}"]
        for source, title in (
            ("transfer", "gradients of the baseline"),
            ("unquantized", "gradients of the model without its quantizer"),
        ):
            other = accuracy.get(f"accuracy_{source}_{_label(largest)}", pgd)
            if other < pgd - TOLERANCE:
                reasons.append(f"at {largest:g}/255 PGD leaves {pgd:.1%} correct, {title} bring that to {other:.1%}")
        left = accuracy[f"accuracy_pgd_{_label(self.unbounded)}"]
        if left > UNBOUNDED_ACCURACY:
            reasons.append(
                f"PGD leaves {left:.1%} correct at {self.unbounded:g}/255, where any image can become plain grey"
            )
        if zero_gradients > ZERO_GRADIENTS:
            reasons.append(f"the gradient of {zero_gradients:.1%} of the images is exactly zero or not finite")
        return f"masked gradients: {'; '.join(reasons)}" if reasons else "passed"

    def _charts(self, found):
        charts = {}
        for chart, y_label, attacks, start in (
            ("accuracy", "share of images classified correctly", ("pgd", "fgsm", "noise"), found["accuracy_clean"]),
            ("map_similarity", "cosine similarity of the maps", ("pgd", "noise"), None),
        ):
            lines = {}
            for attack in attacks:
                points = {0: start} if start else {}
                points |= {e: found.get(f"{chart}_{attack}_{_label(e)}") for e in self.epsilons}
                if None not in points.values():
                    ends = zip(*((point.value, point.low, point.high) for point in points.values()), strict=True)
                    lines[{"pgd": "PGD", "fgsm": "FGSM", "noise": "random noise"}[attack]] = Line(list(points), *ends)
            if lines:
                charts[chart] = Chart("epsilon (pixel levels of 255)", y_label, lines)
        return charts

    def _attack(self, source, batch, labels, standing, epsilon, attacked=None):
        """PGD on the images that stand; writes down in place which still do, and the attacked images."""
        rows = np.flatnonzero(standing)
        if not len(rows):
            return
        found, broken = self._pgd(source, batch.images.shape)(
            batch.images[rows], labels[rows], (batch.first + rows).astype(np.int32), self._radius(epsilon)
        )
        standing[rows] = ~broken.numpy()
        if attacked is not None:
            attacked[rows] = found.numpy()

    def _sources(self, shape, classes):
        """Name to logits of the models, beside the measured one, whose gradients attack it."""
        if self._others is None:
            model, baseline = self.subject.model, self.subject.baseline
            scale = dict(mean=self.subject.mean, stddev=self.subject.stddev)
            self._others = {}
            if baseline is not model:
                plain = Subject(baseline, **scale)
                if plain.differentiable and self._classes(plain.logits, shape) == classes:
                    self._others["transfer"] = plain.logits
            if _has_quantizer(model):
                unquantized = Subject(_without_quantizer(model), **scale)
                self._others["unquantized"] = lambda images: unquantized.logits(images, self._samples)
        return self._others

    def _classes(self, logits, shape):
        return self._function("baseline", logits, shape).get_concrete_function().structured_outputs.shape[-1]

    def _pgd(self, source, shape):
        import tensorflow as tf

        from aib_tf.evaluation import attacks

        low, high = self.subject.pixel_range

        def attack(images, labels, indices, epsilon):
            return attacks.pgd(
                self._logits,
                images,
                labels,
                epsilon,
                low,
                high,
                steps=self.steps,
                seed=self.seed,
                indices=indices,
                source_fn=None if source == "own" else self._others[source],
            )

        return self._function(source, attack, shape, tf.int64, tf.int32, tf.TensorSpec([None]))

    def _gradients(self, images, labels):
        import tensorflow as tf

        from aib_tf.evaluation import attacks

        def gradients(images, labels):
            return attacks.loss_gradient(self._logits, images, labels)[1]

        try:
            return self._function("gradients", gradients, images.shape, tf.int64)(images, labels).numpy()
        except NotImplementedError as error:
            raise UnavailableError("TensorFlow cannot differentiate an operation of the model") from error

    def _predictions(self, images):
        logits = self._function("logits", self._logits, images.shape)(images)
        return np.asarray(logits).argmax(axis=1)

    def _function(self, name, function, shape, *rest):
        """The function compiled once for any batch size: images, then values per image of these types."""
        import tensorflow as tf

        if name not in self._compiled:
            signature = [tf.TensorSpec([None, *shape[1:]])]
            signature += [kind if isinstance(kind, tf.TensorSpec) else tf.TensorSpec([None], kind) for kind in rest]
            self._compiled[name] = tf.function(function, input_signature=signature)
        return self._compiled[name]

    def _logits(self, images):
        return self.subject.logits(images, self._samples)

    def _step(self, images, directions, epsilon):
        from aib_tf.evaluation import attacks

        return attacks.signed_step(images, directions, self._radius(epsilon), *self.subject.pixel_range).numpy()

    def _radius(self, epsilon):
        return epsilon * self.subject.pixel

    def _maps(self, images):
        return check_finite(self.subject.maps(images)) if self.subject.has_maps else None


def _random_signs(shape, seed, first):
    """Plus or minus 1 for each pixel, each image from a generator of its own: float32 (B, H, W, C)."""
    rows = [np.random.default_rng((seed, _NOISE, first + row)).random(shape[1:]) for row in range(shape[0])]
    return np.where(np.stack(rows) < 0.5, -1, 1).astype(np.float32)


def _has_quantizer(model):
    from aib_tf.models.aib import AIBClassifier

    return isinstance(model, AIBClassifier) and model.quantizer is not None


def _without_quantizer(model):
    """The same AIB model, layers and weights, without its quantizer."""
    from aib_tf.models.aib import AIBClassifier

    return AIBClassifier(model.features, model.encoder, model.decoder, model.attention, None, model.bottleneck)


def _mean_of(name):
    return lambda mean: mean[name]


def _label(number):
    """A number as part of a name: 8, 0_5."""
    return f"{number:g}".replace(".", "_")


def _check_epsilon(epsilon):
    if check_weight("epsilons", epsilon, positive=True) > 255:
        raise ValueError(f"A pixel has 255 levels; none can change by more. Received: epsilons={epsilon}")
    return epsilon
