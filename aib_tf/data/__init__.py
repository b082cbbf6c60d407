"""Data sets and the input pipeline.

Importing this package registers the builder of `cluttered_digits`, so that `tfds.load` finds it by name.
"""

from aib_tf.data import cluttered_digits as _registered  # noqa: F401
from aib_tf.data.datasets import DATASETS, DatasetInfo, get
from aib_tf.data.gaze import load_gaze
from aib_tf.data.geometry import random_crop_and_flip
from aib_tf.data.locations import DatasetUnavailableError
from aib_tf.data.pipeline import (
    MEMORY_LIMIT,
    Shards,
    batches_per_epoch,
    check_examples,
    denormalize_images,
    label_counts,
    load,
    naming_bad_examples,
    normalize_images,
    num_examples,
    scale_and_offset,
    training_batches,
)
from aib_tf.data.reader import BadExample, BadExampleError

__all__ = [
    "DATASETS",
    "MEMORY_LIMIT",
    "BadExample",
    "BadExampleError",
    "DatasetInfo",
    "DatasetUnavailableError",
    "Shards",
    "batches_per_epoch",
    "check_examples",
    "denormalize_images",
    "get",
    "label_counts",
    "load",
    "load_gaze",
    "naming_bad_examples",
    "normalize_images",
    "num_examples",
    "random_crop_and_flip",
    "scale_and_offset",
    "training_batches",
]
