"""A stand-in for a model: its explanation is written down, image by image."""

import types

import numpy as np
import pytest


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
