"""How far what was learned on one data set carries on another: linear classifiers on frozen features, and zero-shot."""

import contextlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from aib_tf.evaluation import intervals, suite
from aib_tf.evaluation.chart import Chart, Line
from aib_tf.evaluation.intervals import RESAMPLES, Estimate
from aib_tf.evaluation.networks import layers_in_order, logits_of, observed
from aib_tf.evaluation.subject import Subject, UnavailableError
from aib_tf.evaluation.suite import Result
from aib_tf.models.aib import AIBClassifier
from aib_tf.models.pay_attention import PayAttentionClassifier
from aib_tf.validation import check_count

# The grid for the C of the SVM, for standardised features.
C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 5
MAX_ITERATIONS = 1_000

# What pixels are brought down to before the SVM: a side of the image, then principal components, about as many as a
# model has features. Solving for thousands would take longer than all else.
PIXEL_SIDE = 32
PIXEL_COMPONENTS = 256

# Names of one class in different data sets.
ALIASES = {"automobile": "car"}

# Rec. 601
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def transfer(
    model,
    targets: Mapping[str, tuple] | None = None,
    classes: Mapping[str, Mapping[int, int]] | None = None,
    features: Callable | None = None,
    training_images: int = 5_000,
    samples: int = 0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Result:
    """Accuracy on other data sets, of a linear SVM on the model's frozen features and of the model as it is.

    Metrics, for each target, all of them accuracies over its test images:

    - `svm_accuracy_<target>`: of a linear SVM on the features before the classifier, in inference mode.
    - `pixels_svm_accuracy_<target>`: of the same SVM on the pixels that the model sees, of images that are shrunk to
      32x32 where they are larger, in up to 256 principal components of the standardised pixels.
    - `majority_accuracy_<target>`: of always naming the class that most training images have.
    - `zero_shot_accuracy_<target>`: of the model's own classifier, where `classes` says what classes are shared. Test
      images of other classes are left out, and the class is the shared one with the largest logit. The metric stands
      on its own: it does not need, nor change, the SVM.

    The chance of a guess, 1 / classes, stands in the details as `chance_<target>` and `zero_shot_chance_<target>`.

    Features are standardised by the training images; one that is constant there stays 0. The SVM is scikit-learn's
    `LinearSVC` (one against the rest, squared hinge loss). Its C is chosen from 1e-4, 1e-3, 1e-2, 0.1 and 1 by the
    accuracy in 5-fold cross-validation on the training images alone (the smallest on ties), folds holding each class
    in proportion, as far as there are images; all training images are then fitted with it. Fits that stopped before
    they converged are counted in the details.

    The features are, of an `AIBClassifier`, the mean of the latent (without a bottleneck, the vector of the encoder);
    of a `PayAttentionClassifier`, the attended vectors of all depths; of other Keras models, the input of the last
    dense layer.

    Target images are pixels, uint8. They are resized to the size of the model's images bilinearly (with antialiasing
    where they shrink), grey becomes colour by repetition and colour grey by its luma (Rec. 601), and they are
    normalised as the model's own images are.

    Args:
        model: A model or a `Subject`, whose `mean` and `stddev` normalise the targets.
        targets: Name to (training data set, test data set), each of batches as for `aib_tf.evaluation.evaluate`, with
            images in uint8, such as `aib_tf.data.load("stl10", "train", 250, normalize=False)`. Names are of lower
            case letters, digits and underscores.
        classes: Name of a target to a mapping from class of the model to class of the target, see `shared_classes`.
            Several classes of the model may stand for one of the target.
        features: Function from images (B, H, W, C), as the model takes them, to features (B, ...); None for the above.
        training_images: How many training images to fit, at most, spread evenly: features of 5,000 images of 256
            numbers take 10 MB, and a minute of one core.
        samples: Draws of attention that the logits of the zero-shot classifier are averaged over; 0 takes the means.
            Features are always those of the means.
        resamples: Draws of the bootstrap.
        seed: Seed of the bootstrap and of the folds.

    Returns:
        A `Result`, of which `images` counts the test images of all targets. Values per image, whose number differs
        between targets: `svm_correct_<target>`, `pixels_svm_correct_<target>`, `majority_correct_<target>` and
        `zero_shot_correct_<target>`, NaN where the class is not shared.

    Raises:
        UnavailableError: No target was named, the training images of a target are all of one class, or the model has
            no layer whose input are features.
        ValueError: Images are not uint8, a class is impossible, no test image is of a shared class, a number is out
            of range, or features hold NaN.

    References:
        - Jetley et al., "Learn To Pay Attention", ICLR 2018, section 4 (cross-domain classification).
        - Lai et al., "Information Bottleneck Approach to Spatial Attention Learning", IJCAI 2021.
    """
    intervals.check_draws(resamples, seed)
    check_count("samples", samples, minimum=0)
    check_count("training_images", training_images)
    if not targets:
        raise UnavailableError("no target data set was named (`targets`, on the command line --transfer_to)")
    _check_targets(targets, classes or {})
    subject = Subject.of(model)
    samples = subject.drawn(samples)
    extract = features or _features_of(subject)
    metrics: dict[str, Estimate] = {}
    details: dict[str, object] = {
        "folds": FOLDS,
        "c_grid": list(C_GRID),
        "pixel_components": PIXEL_COMPONENTS,
        "pixel_side": PIXEL_SIDE,
    }
    lines, per_image, images = {}, {}, 0
    for name, (training, test) in targets.items():
        shared = (classes or {}).get(name)
        target = _Target(subject, extract, training_images, samples, seed)
        with subject.noise_from(seed):
            found = target.measure(training, test, shared, details, name)
        for kind, correct in found.correct.items():
            per_image[f"{kind}_correct_{name}"] = correct
            seen = correct[~np.isnan(correct)]
            key = f"{kind}_accuracy_{name}"
            metrics |= intervals.estimates({key: seen}, {key: lambda mean, key=key: mean[key]}, resamples, seed)
        lines |= {f"{kind}_{name}": Line(np.log10(C_GRID), scores) for kind, scores in found.scores.items()}
        images += found.images
    charts = {"cross_validation": Chart("C, as a power of ten", "accuracy in cross-validation", lines)}
    return Result("transfer", images, samples, resamples, seed, metrics, details, charts, per_image)


def shared_classes(
    source: Sequence[str], target: Sequence[str], aliases: Mapping[str, str] = ALIASES
) -> dict[int, int]:
    """Which classes of two data sets are the same, by their names.

    CIFAR-10 and STL-10 share nine: all but the frog of the one and the monkey of the other.

    Args:
        source: Names of the classes of the model, in the order of its labels.
        target: Names of the classes of the target.
        aliases: Name to the other name that the same class has elsewhere.

    Returns:
        Class of the source to class of the target.

    Raises:
        ValueError: They share none.

    Example:
        >>> cifar10, stl10 = (aib_tf.data.get(name).class_names for name in ("cifar10", "stl10"))
        >>> shared_classes(cifar10, stl10)
        {0: 0, 1: 2, 2: 1, 3: 3, 4: 4, 5: 5, 7: 6, 8: 8, 9: 9}
    """
    places = {aliases.get(name, name): place for place, name in enumerate(target)}
    names = [aliases.get(name, name) for name in source]
    shared = {place: places[name] for place, name in enumerate(names) if name in places}
    if not shared:
        raise ValueError(
            f"The data sets share no class by name. Received: source={list(source)[:5]}, target={list(target)[:5]}"
        )
    return shared


class _Target:
    """What is measured on one target.

    Attributes:
        correct: Kind of classifier to whether it is right, (test images,) floats.
        scores: Kind of SVM to its accuracy in cross-validation for each C.
        images: Number of test images.
    """

    def __init__(self, subject, extract, training_images, samples, seed):
        self._subject = subject
        self._extract = extract
        self._training_images = training_images
        self._samples = samples
        self._seed = seed
        self.correct, self.scores, self.images = {}, {}, 0

    def measure(self, training, test, shared, details, name):
        """Fits on the training images and measures on the test images; adds to the details."""
        vectors, labels = self._training_vectors(training)
        seen, counts = np.unique(labels, return_counts=True)
        if len(seen) < 2:
            raise UnavailableError(f"the training images of {name!r} are all of one class")
        majority = seen[counts.argmax()]
        classifiers = {}
        for kind, values in vectors.items():
            classifiers[kind] = _LinearClassifier(values, labels, self._seed, kind == "pixels_svm")
            self.scores[kind] = classifiers[kind].scores
        parts, test_labels = [], []
        for images, batch_labels in self._batches(test, None):
            part = {"majority": batch_labels == majority}
            found = self._vectors(images)
            part |= {kind: each.predict(found[kind]) == batch_labels for kind, each in classifiers.items()}
            if shared is not None:
                part["zero_shot"] = self._zero_shot(images, batch_labels, shared)
            parts.append(part)
            test_labels.append(batch_labels)
        if not parts:
            raise ValueError(f"The test images of {name!r} are none. Received: images=0")
        test_labels = np.concatenate(test_labels)
        self.images = len(test_labels)
        order = ("svm", "pixels_svm", "majority", "zero_shot")
        self.correct = {kind: np.concatenate([part[kind] for part in parts]) * 1.0 for kind in order if kind in part}
        classes = np.union1d(seen, test_labels)
        details[f"training_images_{name}"] = len(labels)
        details[f"chance_{name}"] = 1 / len(classes)
        details[f"classes_without_training_images_{name}"] = len(np.setdiff1d(test_labels, seen))
        for kind, each in classifiers.items():
            details[f"{kind}_features_{name}"] = each.features
            details[f"{kind}_c_{name}"] = each.c
            details[f"{kind}_unconverged_fits_{name}"] = each.unconverged
        if shared is not None:
            zero_shot = self.correct["zero_shot"]
            if np.isnan(zero_shot).all():
                raise ValueError(
                    f"No test image of {name!r} is of a shared class. Received: classes={dict(shared)}, "
                    f"labels={np.unique(test_labels)[:10].tolist()}"
                )
            details[f"zero_shot_chance_{name}"] = 1 / len(set(shared.values()))
            details[f"zero_shot_classes_{name}"] = len(set(shared.values()))
        return self

    def _training_vectors(self, training):
        limit, total, chosen = self._training_images, suite.count_images(training), None
        if total is None or total > limit:
            chosen = suite.Spread(limit, limit if total is None else total)
        parts, labels = [], []
        for images, batch_labels in self._batches(training, chosen):
            parts.append(self._vectors(images))
            labels.append(batch_labels)
        if not parts:
            raise ValueError("A target needs training images. Received: images=0")
        return {kind: np.concatenate([part[kind] for part in parts]) for kind in parts[0]}, np.concatenate(labels)

    def _vectors(self, images):
        """Features and pixels of images, (B, D) each."""
        features = np.asarray(self._extract(images), np.float32)
        if not features.ndim or len(features) != len(images):
            raise ValueError(
                f"Features must have shape ({len(images)}, ...), one for each image. Received: shape={features.shape}"
            )
        if not np.isfinite(features).all():
            raise ValueError(f"NaN or infinity in the features. Received: shape={features.shape}")
        pixels = _resized(images, *(min(side, PIXEL_SIDE) for side in images.shape[1:3]))
        return {"svm": features.reshape(len(images), -1), "pixels_svm": pixels.reshape(len(images), -1)}

    def _batches(self, dataset, chosen):
        """Pairs of images, as the model takes them, and labels."""
        for batch in suite.batches(self._subject, dataset, chosen=chosen):
            yield _as_model_takes(batch.images, self._subject), batch.labels

    def _zero_shot(self, images, labels, shared):
        logits = np.asarray(self._subject.explain(images, self._samples)["logits"]).astype(np.float64)
        bad = [source for source in shared if source >= logits.shape[1]]
        if bad:
            raise ValueError(
                f"Shared classes must lie in 0..{logits.shape[1] - 1}, the classes of the model. "
                f"Received: class={bad[0]}"
            )
        sources, counterparts = np.array(list(shared)), np.array(list(shared.values()))
        if not np.isfinite(logits[:, sources]).all():
            raise ValueError(f"NaN or infinity in the logits. Received: shape={logits.shape}")
        predicted = counterparts[logits[:, sources].argmax(axis=1)]
        return np.where(np.isin(labels, counterparts), predicted == labels, np.nan)


class _LinearClassifier:
    """Standardises, and fits a linear SVM whose C is chosen by cross-validation.

    Args:
        values: (images, D).
        labels: (images,), of at least two classes.
        seed: seed of the folds.
        reduce: whether to go over to principal components first.

    Attributes:
        scores: accuracy in cross-validation for each C of the grid.
        c: the C that was chosen.
        features: numbers that the SVM reads.
        unconverged: fits that stopped at the limit of iterations.
    """

    def __init__(self, values, labels, seed, reduce=False):
        self.unconverged = 0
        self._reduction = None
        mean, stddev = _scale(values)
        if reduce and min(values.shape) > PIXEL_COMPONENTS:
            from sklearn.decomposition import PCA

            self._reduction = PCA(PIXEL_COMPONENTS, svd_solver="randomized", random_state=seed)
            self._reduction.fit((values - mean) / stddev)
            self._before = mean, stddev
            values = self._reduced(values)
        self.features = values.shape[1]
        folds = _folds(labels, seed)
        self.scores = []
        for c in C_GRID:
            right = 0
            for fold in np.unique(folds):
                inside = folds != fold
                predict = self._fit(values[inside], labels[inside], c)
                right += (predict(values[~inside]) == labels[~inside]).sum()
            self.scores.append(float(right / len(labels)))
        self.c = C_GRID[int(np.argmax(self.scores))]
        self._predict = self._fit(values, labels, self.c)

    def predict(self, values):
        """Classes of values (B, D)."""
        return self._predict(self._reduced(values))

    def _reduced(self, values):
        if self._reduction is None:
            return values
        mean, stddev = self._before
        return self._reduction.transform((values - mean) / stddev)

    def _fit(self, values, labels, c):
        """Fits and returns a function from values to classes."""
        # It takes a second to import.
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.svm import LinearSVC

        classes = np.unique(labels)
        if len(classes) == 1:
            # A fold may hold all images of a rare class.
            return lambda values: np.full(len(values), classes[0])
        mean, stddev = _scale(values)
        machine = LinearSVC(C=c, dual="auto", max_iter=MAX_ITERATIONS, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            machine.fit((values - mean) / stddev, labels)
        self.unconverged += int(np.max(machine.n_iter_) >= MAX_ITERATIONS)
        return lambda values: machine.predict((values - mean) / stddev)


def _scale(values):
    """Mean and standard deviation of the columns; 1 for a constant one."""
    mean = values.mean(axis=0, dtype=np.float64)
    stddev = values.std(axis=0, dtype=np.float64)
    # Rounding leaves a constant column with a deviation of its own.
    constant = np.ptp(values, axis=0) == 0
    return mean, np.where(constant | (stddev == 0), 1.0, stddev)


def _folds(labels, seed):
    """Fold of each image, (images,): those of a class go round the folds, and the next class goes on from there."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    folds = np.empty(len(labels), int)
    folds[order] = np.arange(len(labels)) % FOLDS
    return folds


def _as_model_takes(images, subject):
    """Pixels (B, H, W, C) in uint8 as images that the model takes, float32."""
    if images.dtype != np.uint8:
        raise ValueError(
            "Images of a target must be pixels in uint8, since they are normalised as those of the model's own data "
            f"set are: load them with normalize=False. Received: dtype={images.dtype}"
        )
    height, width, channels = _image_shape(subject, images.shape[1:])
    pixels = images.astype(np.float32)
    if pixels.shape[-1] == 3 and channels == 1:
        pixels = pixels @ _LUMA[:, None]
    elif pixels.shape[-1] == 1 and channels == 3:
        pixels = np.repeat(pixels, 3, axis=-1)
    elif pixels.shape[-1] != channels:
        raise ValueError(
            f"Images of {pixels.shape[-1]} channels cannot be turned into those of {channels} that the model takes; "
            f"1 and 3 can. Received: shape={images.shape}"
        )
    pixels = _resized(pixels, height, width)
    return ((pixels / 255 - subject.mean) / subject.stddev).astype(np.float32)


def _resized(images, height, width):
    if images.shape[1:3] == (height, width):
        return images
    return tf.image.resize(images, (height, width), "bilinear", antialias=True).numpy()


def _image_shape(subject, given):
    """Height, width and channels of the model's images; those given where it takes any."""
    model = subject.model
    if isinstance(model, (AIBClassifier, PayAttentionClassifier)):
        model = model.features
    shape = getattr(model, "input_shape", None)
    shape = shape[1:] if isinstance(shape, tuple) and len(shape) == 4 else (None, None, None)
    return tuple(own or other for own, other in zip(shape, given, strict=True))


def _features_of(subject):
    """Function from images to the features before the classifier."""
    model = subject.model
    if isinstance(model, AIBClassifier):
        readers = [model.decoder]
    elif isinstance(model, PayAttentionClassifier):
        readers = model.classifiers
    elif isinstance(model, keras.Model):
        readers = [layer for layer in layers_in_order(model) if isinstance(layer, keras.layers.Dense)][-1:]
    else:
        readers = []
    if not readers:
        raise UnavailableError("the model has no dense layer whose input are features; name a function of the features")

    def features(images):
        with contextlib.ExitStack() as stack:
            calls = [stack.enter_context(observed(reader)) for reader in readers]
            logits_of(model, images)
        read = [each[-1].arguments[0] for each in calls]
        return keras.ops.concatenate(
            [keras.ops.reshape(each, (keras.ops.shape(each)[0], -1)) for each in read], axis=-1
        )

    return tf.function(features, reduce_retracing=True) if subject.differentiable else features


def _check_targets(targets, classes):
    for name, sets in targets.items():
        if not re.fullmatch("[a-z0-9_]+", str(name)):
            raise ValueError(
                "Names of targets are of lower case letters, digits and underscores, since metrics are named by them. "
                f"Received: name={name!r}"
            )
        if not isinstance(sets, (tuple, list)) or len(sets) != 2:
            raise ValueError(
                f"A target is a pair (training data set, test data set). Received: {name}={type(sets).__name__}"
            )
    unknown = [name for name in classes if name not in targets]
    if unknown:
        raise ValueError(
            f"`classes` names a target that is none of {', '.join(targets)}. Received: name={unknown[0]!r}"
        )
    for name, shared in classes.items():
        if not shared:
            raise ValueError(f"A mapping of shared classes must hold one. Received: classes[{name!r}]={shared!r}")
        for source, counterpart in shared.items():
            check_count("class", source, minimum=0)
            check_count("class", counterpart, minimum=0)
