"""A stand-in for a model: its explanation is written down, image by image."""

import functools
import types

import keras
import numpy as np
import pytest

from aib_tf import layers, models


class FakeModel:
    """Image i of the data set holds the number i; `explain` looks up row i of each table."""

    def __init__(self, anchors=None, **tables):
        self.tables = {name: np.asarray(table, np.float32) for name, table in tables.items()}
        self.quantizer = None if anchors is None else types.SimpleNamespace(anchors=anchors)
        self.calls = []

    def explain(self, images, samples=0):
        rows = np.asarray(images)[:, 0, 0, 0].astype(int)
        self.calls.append((len(rows), samples))
        # Tables hold the images first; sampled maps have them on axis 1.
        return {
            name: np.moveaxis(table[rows], 0, 1) if name == "attention_quantized" else table[rows]
            for name, table in self.tables.items()
        }


def make_tiny_model(seed=0, channels=1, classes=3):
    """An AIB-qt classifier of images (8, 8, channels) that traces within a second: maps are (8, 8)."""

    def network(shape, *parts):
        return keras.Sequential([keras.Input(shape), *parts])

    dense = functools.partial(keras.layers.Dense, kernel_initializer=keras.initializers.GlorotUniform(seed))
    convolution = keras.layers.Conv2D(
        4, 3, padding="same", activation="relu", kernel_initializer=keras.initializers.HeNormal(seed)
    )
    return models.AIBClassifier(
        network((8, 8, channels), convolution),
        network((8, 8, 4), keras.layers.Flatten(), dense(12)),
        network((6,), dense(classes)),
        layers.VariationalSpatialAttention(seed=seed + 1),
        layers.AnchorQuantizer(5),
        layers.GaussianBottleneck(6, seed=seed + 2, kernel_initializer=keras.initializers.GlorotUniform(seed)),
    )


@pytest.fixture(scope="session")
def tiny_model():
    """One that no test changes."""
    return make_tiny_model()


@pytest.fixture
def fake_model():
    return FakeModel


@pytest.fixture
def batched():
    def batched(labels, batch_size=64, size=8, **fields):
        """Batches of numbered images (size, size, 1) as dicts, the last one a remainder."""
        labels = np.asarray(labels)
        numbers = np.arange(len(labels), dtype=np.float32)
        images = np.broadcast_to(numbers[:, None, None, None], (len(labels), size, size, 1))
        return [
            {"image": images[part], "label": labels[part]}
            | {name: np.asarray(values)[part] for name, values in fields.items()}
            for start in range(0, len(labels), batch_size)
            for part in [slice(start, start + batch_size)]
        ]

    return batched
