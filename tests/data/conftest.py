"""Small prepared data sets for all tests of this folder: one tiny drawing, and stand-ins for published sets."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from aib_tf import data

TINY = "cluttered_digits/train60_validation20_test20_seed3"

TRAIN, TEST = 20, 6  # examples of each stand-in
EXTRA = 8  # of that for svhn_cropped, after them


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    data.num_examples(TINY, "train", folder)  # Draws it.
    return folder


def small_image(number, size=32):
    """An image of a stand-in for cifar100, svhn_cropped and stl10: no two alike, nor like their mirror images."""
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)


def bird(number):
    """A dark image of a size of its own with a bright rectangle; its top, left, bottom and right in pixels."""
    random = np.random.default_rng(number)
    height, width = random.integers(60, 140, 2)
    top, left = random.integers(0, (height // 2, width // 2))
    bottom, right = random.integers((top + height // 3, left + width // 3), (height + 1, width + 1))
    image = random.integers(0, 20, (height, width, 3), dtype=np.uint8)
    image[top:bottom, left:right] = random.integers(200, 256, (bottom - top, right - left, 3), dtype=np.uint8)
    return image, (top, left, bottom, right)


def _small_example(number):
    return {"image": small_image(number), "label": number % 10, "id": f"{number:05d}"}


def bird_mask(number):
    """What people agree on to be the bird: all on its rectangle, few of them on the rest of the image."""
    image, (top, left, bottom, right) = bird(number)
    mask = np.full((*image.shape[:2], 1), 51, np.uint8)
    mask[top:bottom, left:right] = 204
    return mask


def _bird_example(number):
    image, (top, left, bottom, right) = bird(number)
    height, width, _ = image.shape
    return {
        "image": image,
        "image/filename": f"{number:05d}.jpg",
        "label": 9 * number % 200,
        "label_name": "bird",
        "bbox": tfds.features.BBox(ymin=top / height, xmin=left / width, ymax=bottom / height, xmax=right / width),
        "segmentation_mask": bird_mask(number),
    }


@pytest.fixture(scope="session")
def published_dir(tmp_path_factory):
    """Stand-ins with the real builders' features: train holds numbers 0 to TRAIN - 1, test the TEST after them."""
    folder = tmp_path_factory.mktemp("published")
    examples = {
        "cifar100": lambda number: {**_small_example(number), "coarse_label": number % 20},
        "svhn_cropped": _small_example,
        "stl10": lambda number: {"image": small_image(number, 96), "label": number % 10},
        "caltech_birds2011": _bird_example,
    }
    for name, example in examples.items():
        builder = tfds.builder(name, data_dir=folder)
        numbers = {"train": range(TRAIN), "test": range(TRAIN, TRAIN + TEST)}
        if name == "svhn_cropped":
            numbers["extra"] = range(TRAIN + TEST, TRAIN + TEST + EXTRA)
        builder._split_generators = lambda downloads, example=example, numbers=numbers: {
            split: ((number, example(number)) for number in range_) for split, range_ in numbers.items()
        }
        builder.download_and_prepare()
    return folder
