"""What every suite has in common: one pass over the data, values per image, a result."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from aib_tf.evaluation import intervals
from aib_tf.evaluation.chart import Chart
from aib_tf.evaluation.intervals import RESAMPLES, Estimate
from aib_tf.evaluation.subject import Subject, UnavailableError


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """One batch of the data, and what the model says about it.

    Attributes:
        subject: What is measured.
        first: Index of its first image among those that the suite looks at.
        images: (B, H, W, C), float32, as the model takes them.
        labels: (B,), int64.
        samples: Draws of attention for each image in `explanation`; 0 for the means.
        boxes: (B, 4), [ymin, xmin, ymax, xmax] as shares of the image sides, or None.
        masks: (B, H, W), bool, or None.
        fields: Other entries of the element, such as "fixations".
    """

    subject: Subject
    first: int
    images: np.ndarray
    labels: np.ndarray
    samples: int = 0
    boxes: np.ndarray | None = None
    masks: np.ndarray | None = None
    fields: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def explanation(self) -> Mapping[str, object]:
        """What `explain` returns for the images."""
        return self.subject.explain(self.images, self.samples)

    @functools.cached_property
    def _compared(self):
        found = {}
        if self.subject.has_maps:
            own = self.subject.attention_in(self.explanation)
            found["attention"] = self.subject.maps(self.images) if own is None else own
        try:
            found["grad_cam"] = self.subject.grad_cam(self.images)
        except UnavailableError:
            # Without a baseline, maps can still be measured; with nothing at all, they cannot.
            if not found:
                raise
        return {name: self._checked(name, maps, 3, 0) for name, maps in found.items()}

    def maps(self) -> dict[str, np.ndarray]:
        """The maps to compare, each (B, h, w) in float64 at its own resolution.

        Returns:
            "attention" where the subject has maps, "grad_cam" where gradients can be had.

        Raises:
            UnavailableError: There is neither.
            ValueError: A map has another shape, or holds NaN or an infinity.
        """
        return self._compared

    def finite(self, name: str, rank: int, axis: int = 0) -> np.ndarray:
        """The named part of the explanation in float64, checked.

        Args:
            name: Key of the explanation.
            rank: Number of axes that it must have.
            axis: The axis of the images.

        Raises:
            ValueError: It has another shape, holds NaN or an infinity, or is of logits that are probabilities.
        """
        values = self._checked(name, self.explanation[name], rank, axis)
        if name == "logits":
            self.subject.check_logits(values)
        return values

    def _checked(self, name, values, rank, axis):
        values = np.asarray(values).astype(np.float64)
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
        charts: Name to a chart.
        per_image: Name to values of shape (images, ...), in the order of the data set.
    """

    suite: str
    images: int
    samples: int
    resamples: int
    seed: int
    metrics: Mapping[str, Estimate]
    details: Mapping[str, object]
    charts: Mapping[str, Chart]
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
            "charts": {name: chart.to_dict() for name, chart in self.charts.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping, per_image: Mapping[str, np.ndarray]) -> "Result":
        """What `to_dict` returned, possibly read back from JSON, with the values per image."""
        return cls(
            values["suite"],
            values["images"],
            values["samples"],
            values["interval"]["resamples"],
            values["interval"]["seed"],
            {name: Estimate(**estimate) for name, estimate in values["metrics"].items()},
            values["details"],
            {name: Chart.from_dict(chart) for name, chart in values["charts"].items()},
            per_image,
        )


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A suite that the model or the data could not serve, and why."""

    suite: str
    reason: str

    def to_dict(self) -> dict:
        """The same as a dict that JSON can hold."""
        return {"suite": self.suite, "skipped": self.reason}


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a suite makes of the values of all images: metrics, and beside them details and charts of a `Result`."""

    metrics: Mapping[str, Estimate]
    details: Mapping[str, object] = dataclasses.field(default_factory=dict)
    charts: Mapping[str, Chart] = dataclasses.field(default_factory=dict)


class Suite:
    """One suite: values per image from each batch, then metrics from the values of all images.

    Only the values are kept from batch to batch, never images or maps, so that memory does not
    grow with their size.

    Attributes:
        name: Name of the suite.
        limit: How many images are looked at, at most; they are spread evenly over the data set.
            None for all.
        seed: Seed of what the suite draws, set by `run`.
    """

    name: str
    limit: int | None = None
    seed: int = 0

    def __init__(self, subject: Subject):
        self.subject = subject

    def measure(self, batch: Batch) -> dict[str, np.ndarray]:
        """Name to values of shape (B, ...); the same names for every batch.

        Raises:
            UnavailableError: The model or the data lacks what the suite needs.
        """
        raise NotImplementedError

    def summarise(self, values: Mapping[str, np.ndarray], resamples: int, seed: int) -> Summary:
        """Metrics, details and charts from the values of all images.

        Raises:
            UnavailableError: No image has what the suite needs.
        """
        raise NotImplementedError


def run(
    model,
    dataset: Iterable,
    kind: Callable[..., Suite],
    options: Mapping[str, object] | None = None,
    samples: int = 0,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[int, int | None], None] | None = None,
) -> Result:
    """Runs one suite in one pass over the data.

    Args:
        model: A model or a `Subject`.
        dataset: Batches, see `batches`. Anything that can be iterated will do.
        kind: The class of the suite.
        options: Arguments of the suite beside the subject.
        samples: Draws of attention for each image; 0 takes the means.
        resamples: Draws of the bootstrap.
        seed: Seed of the bootstrap, and of what the model draws.
        progress: Called after each batch with the number of images so far, and the number there
            will be where the suite does not look at all of them, else None.

    Raises:
        UnavailableError: The model or the data cannot serve the suite.
        TypeError: The model is of another kind, or the batches have another form.
        ValueError: A number is out of range, the data set is empty or endless, or the model
            returns NaN.
    """
    check_numbers(samples, resamples, seed)
    subject = Subject.of(model)
    samples = subject.drawn(samples)
    suite = kind(subject, **(options or {}))
    suite.seed = seed
    parts: list[dict[str, np.ndarray]] = []
    images = 0
    _check_ends(dataset)
    total = chosen = None
    if suite.limit is not None:
        total = count_images(dataset)
        if total is None or total > suite.limit:
            # Where nobody knows how many there are, the first.
            chosen = Spread(suite.limit, suite.limit if total is None else total)
            total = suite.limit
    with subject.noise_from(seed):
        for batch in batches(subject, dataset, samples, chosen):
            batch = dataclasses.replace(batch, images=np.asarray(batch.images, np.float32))
            parts.append(suite.measure(batch))
            images += len(batch.labels)
            if progress is not None:
                progress(images, total)
    if images == 0:
        raise ValueError("The data set holds no images. Received: images=0")
    values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    found = suite.summarise(values, resamples, seed)
    return Result(suite.name, images, samples, resamples, seed, found.metrics, found.details, found.charts, values)


def check_numbers(samples: int, resamples: int, seed: int) -> None:
    """Raises ValueError where a number is out of range."""
    intervals.check_draws(resamples, seed)
    if samples < 0:
        raise ValueError(f"samples must be 0 or more. Received: samples={samples}")


def batches(subject: Subject, dataset: Iterable, samples: int = 0, chosen: "Spread | None" = None) -> Iterator[Batch]:
    """Reads a data set; empty batches are passed over.

    Args:
        subject: What is measured.
        dataset: Batches as dicts with "image" (B, H, W, C) and "label" (B,), and optionally "bbox"
            (B, 4) and "mask" (B, H, W, 1), or as tuples (image, label).
        samples: Draws of attention for each image.
        chosen: Which images; None for all.

    Raises:
        TypeError: A batch is neither form.
        ValueError: A shape, label or box is impossible, or the data set is endless.
    """
    _check_ends(dataset)
    first = seen = 0
    for element in dataset:
        parts = _parts(element)
        shape = tuple(parts["image"].shape)
        if len(shape) != 4:
            raise ValueError(f"Images must come in batches of shape (B, H, W, C). Received: shape={shape}")
        labels = _labels(parts.pop("label"), shape[0])
        images = np.asarray(parts.pop("image"))
        boxes, masks = parts.pop("bbox", None), parts.pop("mask", None)
        boxes = None if boxes is None else _boxes(boxes, shape[0])
        masks = None if masks is None else _masks(masks, shape)
        rows = np.arange(shape[0])
        if chosen is not None:
            if chosen.is_over(seen):
                return
            rows = rows[chosen(seen + rows)]
        seen += shape[0]
        if not len(rows):
            continue
        if len(rows) < shape[0]:
            images, labels = images[rows], labels[rows]
            boxes, masks = (None if value is None else value[rows] for value in (boxes, masks))
        fields = {name: _rows_of(value, rows, shape[0]) for name, value in parts.items()}
        yield Batch(subject, first, images, labels, samples, boxes, masks, fields)
        first += len(rows)


class Spread:
    """Which images of `total` make `count` that are spread evenly: the k-th is floor(k * total / count)."""

    def __init__(self, count, total):
        self.count, self.total = count, total

    def __call__(self, indices):
        """Whether each index is chosen."""
        # The first k whose image is not before the index: it is the index itself, or none is.
        k = -(-indices * self.count // self.total)
        return (k < self.count) & (k * self.total // self.count == indices)

    def is_over(self, index):
        """Whether no image from the index on is chosen."""
        return index > (self.count - 1) * self.total // self.count


def _check_ends(dataset):
    cardinality = getattr(dataset, "cardinality", None)
    if callable(cardinality) and int(cardinality()) == -1:  # tf.data.INFINITE_CARDINALITY
        raise ValueError("The data set must end: leave out repeat(). Received: cardinality=-1")


def count_images(dataset) -> int | None:
    """How many images a data set holds, by reading it; None for what can be read only once."""
    if iter(dataset) is dataset:
        return None
    return sum(len(_parts(element)["label"]) for element in dataset)


def _parts(element) -> dict:
    if isinstance(element, Mapping) and {"image", "label"} <= element.keys():
        return dict(element)
    if isinstance(element, tuple | list) and len(element) == 2:
        return {"image": element[0], "label": element[1]}
    keys = sorted(element) if isinstance(element, Mapping) else None
    raise TypeError(
        "A batch must be a dict with 'image' and 'label' or a tuple (image, label). "
        f"Received: type={type(element).__name__}" + (f", keys={keys}" if keys else "")
    )


def _rows_of(value, rows, size):
    """The rows of an entry that has one for each image; any other entry as it is."""
    array = np.asarray(value)
    return array[rows] if array.ndim and len(array) == size else value


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
