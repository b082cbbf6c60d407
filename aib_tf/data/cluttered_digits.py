"""Cluttered digits: a TFDS data set drawn from real handwritten digits, without a download.

Each image shows one handwritten digit at a random place of a black canvas, among fragments of
other digits. To name the digit, a model has to find it first; the box and the mask of the digit
tell whether it did. The task goes back to the cluttered MNIST of Mnih et al., "Recurrent models
of visual attention" (2014); the digits are the 1,797 of `sklearn.datasets.load_digits`, the test
part of the UCI set "Optical recognition of handwritten digits" (Alpaydin and Kaynak, 1998).

Importing this module registers the builder, so that `tfds.load("cluttered_digits")` finds it.
"""

import dataclasses
import re

import numpy as np
import tensorflow_datasets as tfds

from aib_tf.validation import check_count

CANVAS_SIZE = 32
DIGIT_SIZE = 16
FRAGMENT_SIZE = 6
FRAGMENTS = 8

# A pixel belongs to the stroke from a quarter of full brightness on. The fainter pixels around it
# come from smoothing, and a box around them would be wider than what a person calls the digit.
INK_THRESHOLD = 64

# A fragment shows at least this many pixels of stroke out of 36: an empty one would be no clutter.
FRAGMENT_INK = 9

# Black pixels kept between any brightness of the digit and the nearest fragment.
GAP = 1

# Shares of the source digits; training gets the rest.
VALIDATION_SHARE = 0.1
TEST_SHARE = 0.2

# The source digits are divided in the same way whatever the seed of a configuration is, so that
# nobody tests a model on the digits that it was trained on in another configuration.
_SPLIT_SEED = 20_210_414
SPLITS = ("train", "validation", "test")

_CONFIG_NAME = re.compile(r"train(\d+)_validation(\d+)_test(\d+)_seed(\d+)")


@dataclasses.dataclass(eq=False, kw_only=True)
class ClutteredDigitsConfig(tfds.core.BuilderConfig):
    """Sizes and seed of the drawing.

    Args:
        name: derived from the other arguments, such as
            `"train12000_validation2000_test2000_seed0"`; leave it out.
        train: number of drawn training images, at least 1.
        validation: number of drawn validation images, at least 1.
        test: number of drawn test images, at least 1.
        seed: integer in [0, 2**32). The first n images of a split are the same for every size.

    Raises:
        ValueError: if a size or the seed is out of range, or the name says something else.
    """

    name: str = ""
    train: int = 12_000
    validation: int = 2_000
    test: int = 2_000
    seed: int = 0

    def __post_init__(self):
        for split in SPLITS:
            check_count(split, getattr(self, split))
        check_count("seed", self.seed, minimum=0, maximum=2**32 - 1)
        name = f"train{self.train}_validation{self.validation}_test{self.test}_seed{self.seed}"
        if self.name not in ("", name):
            raise ValueError(f"The name must be {name!r} or left out. Received: name={self.name!r}")
        self.name = name
        self.description = (
            f"{self.train} training, {self.validation} validation and {self.test} test images "
            f"drawn with seed {self.seed}."
        )

    @classmethod
    def from_name(cls, name: str) -> "ClutteredDigitsConfig":
        """Reads sizes and seed from a name.

        Args:
            name: such as `"train600_validation100_test100_seed3"`.

        Returns:
            The configuration of this name.

        Raises:
            ValueError: if the name has another form, or a number is out of range.
        """
        match = _CONFIG_NAME.fullmatch(name)
        if not match:
            raise ValueError(
                "A configuration of cluttered_digits is named like "
                f"'train600_validation100_test100_seed3'. Received: name={name!r}"
            )
        train, validation, test, seed = (int(number) for number in match.groups())
        return cls(train=train, validation=validation, test=test, seed=seed)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Drawn images and where everything in them comes from.

    Args:
        images: uint8 (count, 32, 32, 1).
        masks: uint8 (count, 32, 32, 1), 1 on the stroke of the digit and 0 elsewhere.
        boxes: int64 (count, 4), the tight box of the mask in pixels: top, left, bottom, right,
            the last two exclusive.
        sources: int64 (count,), index of the digit in the array that was drawn from.
        fragment_sources: int64 (count, 8), index of the digit that each fragment was cut from.
    """

    images: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray
    sources: np.ndarray
    fragment_sources: np.ndarray


def source_digits() -> tuple[np.ndarray, np.ndarray]:
    """Reads scikit-learn's digits and enlarges them.

    Returns:
        digits: uint8 (1797, 16, 16), bilinearly enlarged from 8x8, black background.
        labels: int64 (1797,) in 0..9.
    """
    from sklearn import datasets  # Slow to import, and needed only while drawing.

    source = datasets.load_digits()
    small = source.images * (255.0 / 16.0)  # (1797, 8, 8); ink is stored as 0..16.
    enlarge = _bilinear_matrix(small.shape[1], DIGIT_SIZE)
    digits = enlarge @ small @ enlarge.T
    return np.rint(digits).astype(np.uint8), source.target.astype(np.int64)


def split_sources(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Divides the source digits into splits, class by class.

    Args:
        labels: integers (digits,).

    Returns:
        Sorted int64 indices of the digits of "train", "validation" and "test". Every digit is in
        exactly one of them, and the shares of the classes are equal up to rounding.
    """
    keys = np.random.default_rng(_SPLIT_SEED).random(len(labels))
    parts = {split: [] for split in SPLITS}
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(keys[members], kind="stable")]
        tests = round(TEST_SHARE * len(members))
        validations = round(VALIDATION_SHARE * len(members))
        parts["test"].append(members[:tests])
        parts["validation"].append(members[tests : tests + validations])
        parts["train"].append(members[tests + validations :])
    return {split: np.sort(np.concatenate(arrays)) for split, arrays in parts.items()}


def draw(digits: np.ndarray, count: int, seed: int | tuple[int, ...]) -> Drawing:
    """Draws cluttered digits.

    The digit is placed uniformly on the canvas. Each of the eight fragments is a 6x6 window of
    another digit, uniform among all windows with enough ink; it is placed uniformly among the
    places that leave the bounding box of the digit, and one pixel around it, free. So no fragment
    hides a stroke, closes a gap (a 3 would become an 8) or lengthens a stroke (a 1 would become
    a 7), and the label stays true. Where fragments overlap each other, the brighter pixel stays.

    Args:
        digits: uint8 (digits, 16, 16), at least two, to take the digits and the fragments from.
        count: number of images.
        seed: non-negative integers. Image k depends on `digits`, `seed` and k, not on `count`.

    Returns:
        The images with boxes, masks and sources.

    Raises:
        ValueError: if there are fewer than two digits, or one without ink.
    """
    if len(digits) < 2:
        raise ValueError(
            "Fragments are cut from other digits than the one shown, so that at least two are "
            f"needed. Received: len(digits)={len(digits)}"
        )
    windows, first_window = _inked_windows(digits)
    # One row of uniform numbers an image, whatever is then done with it: this is what makes image
    # k independent of `count`. Generator.random is the one method whose stream is as stable as
    # the bit generator itself; integers and shuffles are derived from it here.
    uniforms = np.random.default_rng(seed).random((count, 3 + 2 * FRAGMENTS))
    sources = _index(uniforms[:, 0], len(digits))
    places = _index(uniforms[:, 1:3], CANVAS_SIZE - DIGIT_SIZE + 1)

    images = np.zeros((count, CANVAS_SIZE, CANVAS_SIZE, 1), np.uint8)
    masks = np.zeros_like(images)
    boxes = np.zeros((count, 4), np.int64)
    fragment_sources = np.zeros((count, FRAGMENTS), np.int64)
    for k in range(count):
        canvas = images[k, :, :, 0]
        source = sources[k]
        top, left = places[k]
        canvas[top : top + DIGIT_SIZE, left : left + DIGIT_SIZE] = digits[source]
        masks[k, :, :, 0] = canvas >= INK_THRESHOLD
        if not masks[k].any():
            raise ValueError(f"A digit has no ink. Received: digits[{source}]")
        boxes[k] = _bounding_box(masks[k, :, :, 0])
        free = _free_places(_bounding_box(canvas))

        # Windows are sorted by digit: leaving out those of `source` is a jump over its range.
        start, stop = first_window[source], first_window[source + 1]
        choices = _index(uniforms[k, 3::2], len(windows) - (stop - start))
        choices += np.where(choices >= start, stop - start, 0)
        corners = free[_index(uniforms[k, 4::2], len(free))]
        fragment_sources[k] = windows[choices, 0]
        for (digit, row, column), (y, x) in zip(windows[choices], corners, strict=True):
            fragment = digits[digit, row : row + FRAGMENT_SIZE, column : column + FRAGMENT_SIZE]
            target = canvas[y : y + FRAGMENT_SIZE, x : x + FRAGMENT_SIZE]
            np.maximum(target, fragment, out=target)
    return Drawing(images, masks, boxes, sources, fragment_sources)


class ClutteredDigits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits among fragments of other digits, with box and mask.

    The configuration is part of the name, and any will do:
    `tfds.load("cluttered_digits/train600_validation100_test100_seed3")`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First drawing."}
    BUILDER_CONFIGS = [ClutteredDigitsConfig()]

    # Nothing is fetched. TFDS would look for a list of checksums beside this file.
    url_infos = None

    def _create_builder_config(self, builder_config, version=None):
        # TFDS knows only listed configurations by name; here every valid name is one.
        if isinstance(builder_config, str):
            return ClutteredDigitsConfig.from_name(builder_config)
        if isinstance(builder_config, ClutteredDigitsConfig):
            return builder_config
        return super()._create_builder_config(builder_config, version)

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (CANVAS_SIZE, CANVAS_SIZE, 1)
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "One of scikit-learn's handwritten digits, enlarged to 16x16, at a random place "
                "of a 32x32 canvas among eight 6x6 fragments of other digits. The source digits "
                "are divided into training, validation and test before anything is drawn."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=shape, encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "bbox": tfds.features.BBoxFeature(doc="Tight box of the mask, in shares of the canvas."),
                    "mask": tfds.features.Image(
                        shape=shape,
                        encoding_format="png",
                        doc="1 on the stroke of the digit, 0 elsewhere.",
                    ),
                    "id": tfds.features.Scalar(np.int64, doc="Index of the digit in sklearn.datasets.load_digits."),
                    "fragment_ids": tfds.features.Tensor(
                        shape=(FRAGMENTS,),
                        dtype=np.int64,
                        doc="Indices of the digits that the fragments were cut from.",
                    ),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            citation=(
                "@misc{optdigits, author={Alpaydin, E. and Kaynak, C.}, title={Optical "
                "Recognition of Handwritten Digits}, publisher={UCI Machine Learning Repository}, "
                "year={1998}, doi={10.24432/C50P49}}"
            ),
            disable_shuffling=True,  # Drawn in random order already; image k stays at place k.
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # Nothing to download.
        digits, labels = source_digits()
        sources = split_sources(labels)
        return {split: self._generate_examples(split, digits, labels, sources[split]) for split in SPLITS}

    def _generate_examples(self, split, digits, labels, sources):
        config = self.builder_config
        seed = (config.seed, SPLITS.index(split))
        drawing = draw(digits[sources], getattr(config, split), seed)
        for k, box in enumerate(drawing.boxes / CANVAS_SIZE):
            source = sources[drawing.sources[k]]
            yield (
                k,
                {
                    "image": drawing.images[k],
                    "label": int(labels[source]),
                    "bbox": tfds.features.BBox(*(float(edge) for edge in box)),
                    "mask": drawing.masks[k],
                    "id": source,
                    "fragment_ids": sources[drawing.fragment_sources[k]],
                },
            )


def _index(uniforms: np.ndarray, size: int) -> np.ndarray:
    """Uniform numbers in [0, 1) -> uniform int64 in [0, size)."""
    return (uniforms * size).astype(np.int64)


def _bilinear_matrix(size: int, new_size: int) -> np.ndarray:
    """The linear map (new_size, size) that resamples a line, pixel centres at the halves."""
    centres = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    distances = np.abs(np.clip(centres, 0, size - 1)[:, np.newaxis] - np.arange(size))
    return np.maximum(0.0, 1.0 - distances)


def _bounding_box(image: np.ndarray) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of the pixels that are not zero, the last two exclusive."""
    rows = np.flatnonzero(image.any(axis=1))
    columns = np.flatnonzero(image.any(axis=0))
    return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


def _inked_windows(digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All fragments with enough ink.

    Returns:
        windows: int64 (windows, 3), digit, row and column of the corner, sorted by digit.
        first_window: int64 (digits + 1,), the windows of digit d are first_window[d:d + 2].
    """
    view = np.lib.stride_tricks.sliding_window_view(
        digits >= INK_THRESHOLD, (FRAGMENT_SIZE, FRAGMENT_SIZE), axis=(1, 2)
    )
    windows = np.argwhere(view.sum(axis=(3, 4)) >= FRAGMENT_INK)
    return windows, np.searchsorted(windows[:, 0], np.arange(len(digits) + 1))


def _free_places(box: tuple[int, int, int, int]) -> np.ndarray:
    """Corners (places, 2) where a fragment stays off the box and the gap around it.

    There is always one: a box of at most 16 leaves at least 8 pixels on one side of the canvas.
    """
    top, left, bottom, right = box
    places = CANVAS_SIZE - FRAGMENT_SIZE + 1
    free = np.ones((places, places), bool)
    reach = FRAGMENT_SIZE + GAP - 1
    free[max(0, top - reach) : bottom + GAP, max(0, left - reach) : right + GAP] = False
    return np.argwhere(free)
