"""What every suite has in common: one pass over the data, values per image, a result."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from aib_tf.evaluation import intervals
from aib_tf.evaluation.intervals import RESAMPLES, Estimate


class UnavailableError(ValueError):
    """The model or the data cannot serve a suite; the message is the reason."""


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """One batch of the data and what the model says about it.

    Attributes:
        first: Index of its first image in the data set.
        images: (B, H, W, C), as the model takes them.
        labels: (B,), int64.
        explanation: What `model.explain` returned for the images.
        boxes: (B, 4), [ymin, xmin, ymax, xmax] as shares of the image sides, or None.
        masks: (B, H, W), bool, or None.
    """

    first: int
    images: np.ndarray
    labels: np.ndarray
    explanation: Mapping[str, object]
    boxes: np.ndarray | None = None
    masks: np.ndarray | None = None

    def finite(self, name: str, rank: int, axis: int = 0) -> np.ndarray:
        """The named part of the explanation in float64, checked.

        Args:
            name: Key of the explanation.
            rank: Number of axes that it must have.
            axis: The axis of the images.

        Raises:
            ValueError: It has another shape, or holds NaN or an infinity.
        """
        values = np.asarray(self.explanation[name]).astype(np.float64)
        if values.ndim != rank or values.shape[axis] != len(self.labels):
            raise ValueError(
                f"explain() must return {name!r} with {rank} axes and {len(self.labels)} images on "
                f"axis {axis}. Received: shape={values.shape}"
            )
        others = tuple(i for i in range(rank) if i != axis)
        bad = np.flatnonzero(~np.isfinite(values).all(axis=others))
        if bad.size:
            raise ValueError(
                f"NaN or infinity in {name!r} of {bad.size} of the {len(self.labels)} images of "
                f"one batch, the first of them image {self.first + bad[0]} of the data set. "
                f"Received: images={(self.first + bad[:10]).tolist()}"
            )
        return values


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What a suite found.

    `result["top_1"]` is short for `result.metrics["top_1"]`.

    Attributes:
        suite: Name of the suite.
        images: How many images were looked at.
        samples: Draws of attention that the model made for each image; 0 for the means.
        resamples: Draws of the bootstrap.
        seed: Seed of the bootstrap.
        metrics: Name to estimate. A unit, where there is one, ends the name.
        details: Name to a number or text that needs no interval.
        per_image: Name to values of shape (images, ...), in the order of the data set.
    """

    suite: str
    images: int
    samples: int
    resamples: int
    seed: int
    metrics: Mapping[str, Estimate]
    details: Mapping[str, object]
    per_image: Mapping[str, np.ndarray]

    def __getitem__(self, metric: str) -> Estimate:
        if metric not in self.metrics:
            raise KeyError(
                f"{self.suite} has no such metric; it has {', '.join(self.metrics)}. Received: metric={metric!r}"
            )
        return self.metrics[metric]

    def to_dict(self) -> dict:
        """All but the values per image, as a dict that JSON can hold."""
        return {
            "suite": self.suite,
            "images": self.images,
            "samples": self.samples,
            "interval": {
                "level": intervals.LEVEL,
                "method": "percentile bootstrap over images",
                "resamples": self.resamples,
                "seed": self.seed,
            },
            "metrics": {name: value.to_dict() for name, value in self.metrics.items()},
            "details": dict(self.details),
        }


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A suite that the model or the data could not serve, and why."""

    suite: str
    reason: str

    def to_dict(self) -> dict:
        """The same as a dict that JSON can hold."""
        return {"suite": self.suite, "skipped": self.reason}


class Suite:
    """One suite: values per image from each batch, then metrics from the values of all images.

    Only the values are kept from batch to batch, never images or maps, so that memory does not
    grow with their size.
    """

    name: str

    def __init__(self, model):
        self.model = model

    def measure(self, batch: Batch) -> dict[str, np.ndarray]:
        """Name to values of shape (B, ...); the same names for every batch.

        Raises:
            UnavailableError: The model or the data lacks what the suite needs.
        """
        raise NotImplementedError

    def summarise(
        self, values: Mapping[str, np.ndarray], resamples: int, seed: int
    ) -> tuple[dict[str, Estimate], dict[str, object]]:
        """Metrics and details from the values of all images.

        Raises:
            UnavailableError: No image has what the suite needs.
        """
        raise NotImplementedError


def run(
    model,
    dataset: Iterable,
    suites: Sequence[Suite],
    samples: int = 0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Result | Skipped]:
    """Runs suites in one pass over the data.

    Args:
        model: Has `explain(images, samples)`.
        dataset: Batches, see `batches`. It is read once, so anything that can be iterated will
            do, one that shows progress as well.
        suites: The suites, made for this model.
        samples: Draws of attention for each image; 0 takes the means.
        resamples: Draws of the bootstrap.
        seed: Seed of the bootstrap.

    Returns:
        Name of the suite to its result, or to the reason why it was skipped. A suite that is alone
        is not skipped: its reason is raised.

    Raises:
        UnavailableError: There is one suite, and the model or the data cannot serve it.
        TypeError: The model has no `explain`, or the batches have another form.
        ValueError: A number is out of range, the data set is empty or endless, or the model
            returns NaN.
    """
    intervals.check_draws(resamples, seed)
    if samples < 0:
        raise ValueError(f"samples must be 0 or more. Received: samples={samples}")
    if not callable(getattr(model, "explain", None)):
        raise TypeError(
            f"The model must have a method explain(images, samples). Received: model={type(model).__name__}"
        )
    collected: dict[str, list[dict]] = {suite.name: [] for suite in suites}
    skipped: dict[str, Skipped] = {}
    images = 0

    def skip(suite, error):
        if len(suites) == 1:
            raise error
        skipped[suite.name] = Skipped(suite.name, str(error))

    for batch in batches(model, dataset, samples):
        for suite in suites:
            if suite.name not in skipped:
                try:
                    collected[suite.name].append(suite.measure(batch))
                except UnavailableError as error:
                    skip(suite, error)
        images += len(batch.labels)
        if len(skipped) == len(suites):
            break
    if images == 0:
        raise ValueError("The data set holds no images. Received: images=0")

    results: dict[str, Result | Skipped] = {}
    for suite in suites:
        if suite.name not in skipped:
            parts = collected[suite.name]
            values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            try:
                metrics, details = suite.summarise(values, resamples, seed)
            except UnavailableError as error:
                skip(suite, error)
            else:
                results[suite.name] = Result(suite.name, images, samples, resamples, seed, metrics, details, values)
        if suite.name in skipped:
            results[suite.name] = skipped[suite.name]
    return results


def batches(model, dataset: Iterable, samples: int) -> Iterator[Batch]:
    """Reads a data set and asks the model to explain each batch; empty batches are passed over.

    Args:
        model: Has `explain(images, samples)`.
        dataset: Batches as dicts with "image" (B, H, W, C) and "label" (B,), and optionally "bbox"
            (B, 4) and "mask" (B, H, W, 1), or as tuples (image, label).
        samples: Draws of attention for each image.

    Raises:
        TypeError: A batch is neither form.
        ValueError: A shape, label or box is impossible, or the data set is endless.
    """
    cardinality = getattr(dataset, "cardinality", None)
    if callable(cardinality) and int(cardinality()) == -1:  # tf.data.INFINITE_CARDINALITY
        raise ValueError("The data set must end: leave out repeat(). Received: cardinality=-1")
    first = 0
    for element in dataset:
        images, labels, boxes, masks = _parts(element)
        shape = tuple(images.shape)
        if len(shape) != 4:
            raise ValueError(f"Images must come in batches of shape (B, H, W, C). Received: shape={shape}")
        labels = _labels(labels, shape[0])
        if shape[0] == 0:
            continue
        explanation = model.explain(images, samples=samples)
        yield Batch(
            first,
            np.asarray(images),
            labels,
            explanation,
            None if boxes is None else _boxes(boxes, shape[0]),
            None if masks is None else _masks(masks, shape),
        )
        first += shape[0]


def _parts(element):
    if isinstance(element, Mapping) and {"image", "label"} <= element.keys():
        return element["image"], element["label"], element.get("bbox"), element.get("mask")
    if isinstance(element, tuple | list) and len(element) == 2:
        return element[0], element[1], None, None
    keys = sorted(element) if isinstance(element, Mapping) else None
    raise TypeError(
        "A batch must be a dict with 'image' and 'label' or a tuple (image, label). "
        f"Received: type={type(element).__name__}" + (f", keys={keys}" if keys else "")
    )


def _labels(labels, size):
    labels = np.asarray(labels)
    if labels.shape != (size,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"Labels must be integers of shape ({size},). Received: shape={labels.shape}, dtype={labels.dtype}"
        )
    return labels.astype(np.int64)


def _boxes(boxes, size):
    boxes = np.asarray(boxes).astype(np.float64)
    if boxes.shape != (size, 4):
        raise ValueError(f"Boxes must have shape ({size}, 4). Received: shape={boxes.shape}")
    # Rounding in float32 may put an edge a little outside.
    inside = (boxes >= -1e-3) & (boxes <= 1 + 1e-3)
    bad = ~inside.all(axis=1) | (boxes[:, :2] > boxes[:, 2:]).any(axis=1)
    if bad.any():
        raise ValueError(
            "Boxes must be [ymin, xmin, ymax, xmax] as shares of the image sides, with "
            f"0 <= min <= max <= 1. Received: bbox={boxes[bad][0].tolist()}"
        )
    return boxes


def _masks(masks, shape):
    masks = np.asarray(masks)
    if masks.shape != (*shape[:3], 1):
        raise ValueError(f"Masks must have shape {(*shape[:3], 1)}. Received: shape={masks.shape}")
    masks = masks[..., 0]
    # A mask that was resized holds shares of a pixel: more than half of it is inside.
    return masks > 0.5 if masks.dtype.kind == "f" else masks != 0
