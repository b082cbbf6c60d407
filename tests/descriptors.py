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
        like_another: whether a smaller one, which is in the table too, is made of the same layers: the slowest tests
            (XLA, precisions, replicas, saving) leave it out.
    """

    name: str
    make: Callable
    input_shape: tuple
    like_another: bool = False

    def __str__(self):
        return self.name.replace(" ", "-")


def _head():
    return keras.Sequential(
        [keras.layers.Conv2D(4, 3, padding="same", activation="relu"), keras.layers.Conv2D(1, 3, padding="same")]
    )


def _pay_attention(attention, normalize, name=None, **arguments):
    """A model of one input, from which it makes the query too: a descriptor has one input."""
    local = keras.Input((6, 5, 3))
    query = keras.layers.GlobalAveragePooling2D()(local)
    if attention == "dp":  # of another width, so that there is a projection
        query = keras.layers.Dense(4, kernel_initializer=keras.initializers.GlorotUniform(seed=2))(query)
    layer = layers.PayAttention(
        attention,
        normalize,
        kernel_initializer=keras.initializers.GlorotUniform(seed=3),
        projection_initializer=keras.initializers.GlorotUniform(seed=4),
        **arguments,
    )
    return keras.Model(local, layer(local, query), name=name)


LAYERS = (
    Descriptor("AnchorQuantizer", lambda **kw: layers.AnchorQuantizer(7, **kw), (6, 5, 1)),
    Descriptor("GaussianBottleneck", lambda **kw: layers.GaussianBottleneck(8, seed=1, **kw), (12,)),
    Descriptor(
        "GaussianBottleneck with the reference KL",
        lambda **kw: layers.GaussianBottleneck(8, beta=0.5, kl="reference", kl_weight=0.5, seed=1, **kw),
        (12,),
    ),
    Descriptor("PayAttention", lambda **kw: _pay_attention("pc", "softmax", **kw), (6, 5, 3)),
    Descriptor("PayAttention with a projection", lambda **kw: _pay_attention("dp", "sigmoid", **kw), (6, 5, 3)),
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


def _model(name, input_shape=(32, 32, 1), stand_in_for=None, like_another=False, **overrides):
    overrides = {"width": 0.05, "latent_dim": 16, "num_anchors": 5, "seed": 1, **overrides}
    # A network of the same family that is small enough to be traced many times.
    title = f"{stand_in_for} as {name}" if stand_in_for else name
    return Descriptor(
        " with ".join([title, *(["other overrides"] if len(overrides) > 4 else [])]),
        lambda: aib_tf.models.build(name, input_shape, classes=4, **overrides),
        input_shape,
        like_another,
    )


def _attached():
    images = keras.Input((32, 32, 1))
    x = images
    for number in (1, 2, 3):
        initializer = keras.initializers.GlorotUniform(seed=number)
        x = keras.layers.Conv2D(
            4, 3, 2, activation="relu", kernel_initializer=initializer, name=f"convolution{number}"
        )(x)
    backbone = keras.Model(images, x, name="backbone")
    return aib_tf.models.attach_attention(
        backbone, "convolution2", 4, quantize=True, latent_dim=16, num_anchors=5, seed=1
    )


MODELS = (
    _model("vgg"),
    _model("vgg_aib", like_another=True),
    _model("vgg_aib_qt"),
    _model(
        "vgg_aib_qt",
        (36, 40, 3),
        beta=0.1,
        kl="reference",
        kl_weight=0.5,
        codebook_weight=0.2,
        commitment_weight=1,
        initializers="released",
    ),
    _model("vgg_cbam", width=0.1, like_another=True),  # a vgg, and layers of Keras
    # With "pc" and softmax, nothing behind the last attention learns: see `PayAttention`.
    _model("vgg_att2", attention="dp", combine="independent", position="after"),
    _model("vgg_att3", normalize="sigmoid"),
    _model("wrn_10_1", stand_in_for="wrn_28_10", like_another=True, width=0.25),
    _model("wrn_10_1_aib", stand_in_for="wrn_28_10_aib", like_another=True, width=0.25),
    _model("wrn_10_1_aib_qt", (24, 20, 3), stand_in_for="wrn_28_10_aib_qt", width=0.25, dropout=0.3),
    _model("vgg16_cub", like_another=True),
    _model("vgg16_cub_aib", like_another=True),
    _model("vgg16_cub_aib_qt", (48, 40, 3)),
    _model("wrn_50_2_cub", like_another=True),
    _model("wrn_50_2_cub_aib", like_another=True),
    _model("wrn_50_2_cub_aib_qt", like_another=True),
    Descriptor("attach_attention", _attached, (32, 32, 1)),
)
