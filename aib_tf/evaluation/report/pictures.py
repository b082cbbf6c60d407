"""The images that a report shows, what each model says about them, and how both fit into a page."""

import base64
import contextlib
import dataclasses
import io
from collections.abc import Iterable, Sequence

import numpy as np

from aib_tf.evaluation import suite
from aib_tf.evaluation.accuracy import log_softmax
from aib_tf.evaluation.subject import Subject, UnavailableError
from aib_tf.validation import check_count

# Pixels of the longer side of a picture in the page; larger ones are made smaller.
LARGEST = 256
# Classes whose probabilities are shown.
SHOWN_CLASSES = 5

KINDS = ("attention", "quantized", "samples", "grad_cam")


@dataclasses.dataclass(frozen=True, eq=False)
class Gallery:
    """Images of a data set, the same for all models of a report.

    Attributes:
        pictures: uint8, (N, H, W, 1) or (N, H, W, 3), N from 1 up.
        labels: (N,), the true classes.
        class_names: Names of the classes, or None for their numbers.
        boxes: (N, 4), [ymin, xmin, ymax, xmax] as shares of the image sides, or None.
        indices: (N,), their places in the data set; 0, 1, .. by default.

    Raises:
        ValueError: A shape is impossible, or a label has no name.
        TypeError: The pictures are not uint8.
    """

    pictures: np.ndarray
    labels: np.ndarray
    class_names: Sequence[str] | None = None
    boxes: np.ndarray | None = None
    indices: np.ndarray | None = None

    def __post_init__(self):
        pictures = np.asarray(self.pictures)
        if pictures.ndim != 4 or pictures.shape[-1] not in (1, 3) or 0 in pictures.shape:
            raise ValueError(f"pictures must have shape (N, H, W, 1 or 3). Received: shape={pictures.shape}")
        if pictures.dtype != np.uint8:
            raise TypeError(f"pictures must be uint8 in 0..255. Received: dtype={pictures.dtype}")
        count = len(pictures)
        labels = _integers("labels", self.labels, count)
        indices = np.arange(count) if self.indices is None else _integers("indices", self.indices, count)
        names = None if self.class_names is None else [str(name) for name in self.class_names]
        if (labels < 0).any() or (names is not None and (labels >= len(names)).any()):
            raise ValueError(
                "labels must be 0 or more and have a name each. "
                f"Received: labels from {labels.min()} to {labels.max()}, names={names and len(names)}"
            )
        boxes = None if self.boxes is None else np.asarray(self.boxes, np.float64)
        if boxes is not None and boxes.shape != (count, 4):
            raise ValueError(f"boxes must have shape ({count}, 4). Received: shape={boxes.shape}")
        for name, value in dict(
            pictures=pictures, labels=labels, indices=indices, class_names=names, boxes=boxes
        ).items():
            object.__setattr__(self, name, value)


@dataclasses.dataclass(frozen=True, eq=False)
class GalleryMaps:
    """What one model says about the images of a `Gallery`. All maps are larger where it matters more.

    Attributes:
        probabilities: (N, classes).
        attention: (N, h, w), or None. Each kind of map may have a resolution of its own.
        quantized: (N, h, w), attention after quantization, or None.
        samples: (n, N, h, w), draws of the attention, or None.
        grad_cam: (N, h, w), or None.

    Raises:
        ValueError: A shape is impossible, or a number is NaN or infinite.
    """

    probabilities: np.ndarray
    attention: np.ndarray | None = None
    quantized: np.ndarray | None = None
    samples: np.ndarray | None = None
    grad_cam: np.ndarray | None = None

    def __post_init__(self):
        probabilities = np.asarray(self.probabilities)
        count = len(probabilities) if probabilities.ndim else 0
        for name, rank in dict(probabilities=2, attention=3, quantized=3, samples=4, grad_cam=3).items():
            values = getattr(self, name)
            if values is None and name != "probabilities":
                continue
            values = np.asarray(values, np.float64)
            if values.ndim != rank or 0 in values.shape or values.shape[-3 if rank > 2 else 0] != count:
                axes = {2: f"({count}, classes)", 3: f"({count}, h, w)", 4: f"(n, {count}, h, w)"}[rank]
                raise ValueError(f"{name} must have shape {axes}. Received: shape={values.shape}")
            bad = np.count_nonzero(~np.isfinite(values))
            if bad:
                raise ValueError(f"{name} must be finite. Received: values={bad} of {values.size} NaN or infinite")
            object.__setattr__(self, name, values)


def gallery(
    model,
    dataset: Iterable,
    count: int = 36,
    *,
    samples: int = 4,
    class_names: Sequence[str] | None = None,
    indices: Sequence[int] | None = None,
    seed: int = 0,
) -> tuple[Gallery, GalleryMaps]:
    """Chooses images of a data set, and asks a model about them.

    The images are spread evenly over the classes and the data set. A good model is seldom wrong: of those that it
    gets wrong there are up to a quarter, where there are as many. For several models in one report, choose with the
    first, and give its `indices` to the others.

    Args:
        model: A model or a `Subject`, which says how pixels were normalised.
        dataset: Batches of normalised images, see `aib_tf.evaluation.evaluate`. Read twice where `indices` is None.
        count: How many images at most.
        samples: Draws of the attention for each image, where the model can draw; 0 for none.
        class_names: Names of the classes, or None for their numbers.
        indices: Places in the data set, ascending, in the place of a choice of its own.
        seed: Seed of the draws.

    Returns:
        The images, and what the model says about them.

    Raises:
        ValueError: A number is out of range, or the data set is empty, too short, or can be read only once.
    """
    check_count("count", count)
    check_count("samples", samples, minimum=0)
    subject = Subject.of(model)
    if indices is None:
        if iter(dataset) is dataset:
            raise ValueError(
                "The data set is read twice, to choose images and to take them: it must be one that can be read "
                f"again, or name `indices`. Received: dataset={type(dataset).__name__}"
            )
        labels, right = [], []
        for batch in suite.batches(subject, dataset):
            labels.append(batch.labels)
            right.append(np.asarray(subject.explain(batch.images)["logits"]).argmax(axis=-1) == batch.labels)
        if not labels:
            raise ValueError("The data set holds no images. Received: images=0")
        indices = choose(np.concatenate(labels), np.concatenate(right), count)
    indices = np.asarray(indices, np.int64)
    if indices.ndim != 1 or not len(indices) or indices[0] < 0 or (np.diff(indices) <= 0).any():
        raise ValueError(f"`indices` must be ascending, from 0 up. Received: indices={indices.tolist()}")

    found = {}
    with subject.noise_from(seed):
        for batch in suite.batches(subject, dataset, chosen=_Chosen(indices)):
            parts = {
                "pictures": subject.pixels(batch.images),
                "labels": batch.labels,
                **_explained(subject, batch, samples),
            }
            if batch.boxes is not None:
                parts["boxes"] = batch.boxes
            for name, values in parts.items():
                found.setdefault(name, []).append(values)
    taken = sum(map(len, found.get("labels", ())))
    if taken != len(indices):
        raise ValueError(
            f"The data set must hold all `indices`. Received: {len(indices)} indices up to {indices[-1]}, "
            f"of which {taken} are there"
        )
    joined = {name: np.concatenate(values, axis=1 if name == "samples" else 0) for name, values in found.items()}
    pictures = Gallery(joined.pop("pictures"), joined.pop("labels"), class_names, joined.pop("boxes", None), indices)
    return pictures, GalleryMaps(**joined)


def choose(labels: np.ndarray, right: np.ndarray, count: int) -> np.ndarray:
    """Which images to show: spread evenly, with up to a quarter that the model gets wrong.

    Args:
        labels: (images,), the classes that the choice is spread over.
        right: (images,), bool, whether the prediction is right.
        count: How many at most.

    Returns:
        Ascending indices.
    """
    # In the order of the classes, and in each class in that of the data set.
    order = np.argsort(labels, kind="stable")
    wrong, right = order[~right[order]], order[right[order]]
    total = min(count, len(order))
    # A single image is a right one, if any is.
    of_wrong = max(min(len(wrong), total // 4), total - len(right))
    return np.sort(np.concatenate([_spread(wrong, of_wrong), _spread(right, total - of_wrong)]))


def encode_pictures(pictures: np.ndarray) -> list[str]:
    """Pictures (N, H, W, 1 or 3), uint8, as data URIs of PNG files, made smaller where they are large."""
    from PIL import Image

    found = []
    for picture in pictures:
        image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        found.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    return found


def encode_maps(maps: np.ndarray) -> dict:
    """Maps (..., h, w) as JSON can hold them: each as uint8 between its own minimum and maximum.

    A map keeps 8 bits of its own range this way, also where that is narrow beside the range of all.

    Returns:
        height and width; count, the number of maps; low and high, for each map the values of 0 and 255; data, base64
        of count * height * width bytes.
    """
    height, width = maps.shape[-2:]
    flat = maps.reshape(-1, height, width)
    low, high = flat.min(axis=(1, 2), keepdims=True), flat.max(axis=(1, 2), keepdims=True)
    scaled = (flat - low) / np.where(high > low, high - low, 1)
    return {
        "height": height,
        "width": width,
        "count": len(flat),
        "low": [_rounded(value) for value in low.ravel()],
        "high": [_rounded(value) for value in high.ravel()],
        "data": base64.b64encode(np.rint(scaled * 255).astype(np.uint8).tobytes()).decode(),
    }


def _explained(subject, batch, samples):
    """The probabilities of a batch, and those maps that the model has."""
    explanation = batch.explanation
    found = {"probabilities": np.exp(log_softmax(batch.finite("logits", rank=2)))}
    # Each for itself, since a model may well have one of the two.
    with contextlib.suppress(UnavailableError):
        found["attention"] = np.asarray(subject.maps(batch.images))
    with contextlib.suppress(UnavailableError):
        found["grad_cam"] = subject.grad_cam(batch.images)
    if "attention_quantized" in explanation:
        found["quantized"] = batch.finite("attention_quantized", rank=4, axis=1)[0]
    if samples and "attention_stddev" in explanation:
        drawn = subject.explain(batch.images, samples)
        # What the classifier sees of a draw: its quantized form, where there is one.
        name = "attention_quantized" if "attention_quantized" in drawn else "attention"
        found["samples"] = np.asarray(drawn[name], np.float64)
    return found


class _Chosen:
    """Images by their indices, as `suite.batches` takes it."""

    def __init__(self, indices):
        self._indices = indices

    def __call__(self, indices):
        return np.isin(indices, self._indices)

    def is_over(self, index):
        return index > self._indices[-1]


def _spread(indices, count):
    """`count` of the indices: the middles of as many equal parts."""
    return indices[((np.arange(count) + 0.5) * len(indices) / max(count, 1)).astype(int)]


def _rounded(value):
    return float(f"{value:.6g}")


def _integers(name, values, count):
    values = np.asarray(values)
    if values.shape != (count,) or values.dtype.kind not in "iu":
        raise ValueError(f"{name} must be {count} integers. Received: shape={values.shape}, dtype={values.dtype}")
    return values.astype(np.int64)
