"""One table of every public layer and model: `tests/test_conformance.py` goes over it."""

import dataclasses
from collections.abc import Callable

import keras

import aib_tf
from aib_tf import layers


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """A layer or model.

    Attributes:
        name: what the test calls it; the part before a space is the public name.
        make: makes it, with a fixed seed; a layer's takes `dtype`.
        input_shape: shape of its input without the batch.
    """

    name: str
    make: Callable
    input_shape: tuple

    def __str__(self):
        return self.name.replace(" ", "-")


def _head():
    return keras.Sequential(
        [keras.layers.Conv2D(4, 3, padding="same", activation="relu"), keras.layers.Conv2D(1, 3, padding="same")]
    )


LAYERS = (
    Descriptor("AnchorQuantizer", lambda **kw: layers.AnchorQuantizer(7, **kw), (6, 5, 1)),
    Descriptor("GaussianBottleneck", lambda **kw: layers.GaussianBottleneck(8, seed=1, **kw), (12,)),
    Descriptor(
        "GaussianBottleneck with the reference KL",
        lambda **kw: layers.GaussianBottleneck(8, beta=0.5, kl="reference", kl_weight=0.5, seed=1, **kw),
        (12,),
    ),
    Descriptor(
        "VariationalSpatialAttention",
        lambda **kw: layers.VariationalSpatialAttention(seed=1, **kw),
        (6, 5, 3),
    ),
    Descriptor(
        "VariationalSpatialAttention with a head",
        lambda **kw: layers.VariationalSpatialAttention(head=_head(), seed=1, **kw),
        (6, 5, 3),
    ),
)


def _model(name, input_shape=(32, 32, 1), **overrides):
    overrides = {"width": 0.05, "latent_dim": 16, "num_anchors": 5, "seed": 1, **overrides}
    return Descriptor(
        " with ".join([name, *(["other overrides"] if len(overrides) > 4 else [])]),
        lambda: aib_tf.models.build(name, input_shape, classes=4, **overrides),
        input_shape,
    )


MODELS = (
    _model("vgg"),
    _model("vgg_aib"),
    _model("vgg_aib_qt"),
    _model(
        "vgg_aib_qt", (36, 40, 3), beta=0.1, kl="reference", kl_weight=0.5, codebook_weight=0.2, commitment_weight=1
    ),
)
