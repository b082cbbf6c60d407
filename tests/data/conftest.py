"""Small prepared data sets for all tests of this folder: one tiny drawing, and stand-ins for published sets."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from aib_tf import data

TINY = "cluttered_digits/train60_validation20_test20_seed3"

TRAIN, TEST = 20, 6  # examples of each stand-in


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


def _bird_example(number):
    image, (top, left, bottom, right) = bird(number)
    height, width, _ = image.shape
    return {
        "image": image,
        "image/filename": f"{number}.jpg",
        "label": 9 * number % 200,
        "label_name": "bird",
        "bbox": tfds.features.BBox(ymin=top / height, xmin=left / width, ymax=bottom / height, xmax=right / width),
        "segmentation_mask": np.zeros((height, width, 1), np.uint8),
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
        builder._split_generators = lambda downloads, example=example: {
            "train": ((number, example(number)) for number in range(TRAIN)),
            "test": ((number, example(number)) for number in range(TRAIN, TRAIN + TEST)),
        }
        builder.download_and_prepare()
    return folder
