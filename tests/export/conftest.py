"""Models as training leaves them, and their exports."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from aib_tf import data, export, models


def as_trained(model):
    """Gives a new model the statistics, scales and biases that training would: none of them 0 or 1."""
    random = np.random.default_rng(7)
    for variable in model.weights:
        name = variable.path.rsplit("/")[-1]
        if name in ("moving_mean", "beta", "bias"):
            variable.assign(random.normal(0, 0.1, variable.shape))
        elif name in ("moving_variance", "gamma"):
            variable.assign(random.uniform(0.5, 2, variable.shape))
    return model


def build(name, input_shape=(32, 32, 3), classes=10, **overrides):
    return as_trained(models.build(name, input_shape, classes, seed=1, **overrides))


def attached():
    backbone = keras.applications.MobileNetV2((32, 32, 3), include_top=False, weights=None, alpha=0.35)
    return as_trained(models.attach_attention(backbone, "block_6_expand_relu", 10, quantize=True, latent_dim=8, seed=1))


MODELS = {
    "vgg": lambda: build("vgg", width=0.05),
    "vgg_aib": lambda: build("vgg_aib", width=0.05, latent_dim=8),
    "vgg_aib_qt": lambda: build("vgg_aib_qt", width=0.05, latent_dim=8, num_anchors=5),
    "wrn_10_1_aib_qt": lambda: build("wrn_10_1_aib_qt", latent_dim=8),
    "vgg_att2": lambda: build("vgg_att2", width=0.05, attention="dp", combine="independent"),
    "vgg_att3": lambda: build("vgg_att3", width=0.05, normalize="sigmoid"),
    "attached to MobileNetV2": attached,
}


@pytest.fixture(scope="session")
def pixels():
    """Five images, uint8 (5, 32, 32, 3)."""
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


def operations_of(folder):
    """The types of all operations of a SavedModel and its functions."""
    saved_model = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    graph = saved_model.meta_graphs[0].graph_def
    return [node.op for nodes in (graph.node, *(each.node_def for each in graph.library.function)) for node in nodes]


def normalized(pixels, name="cifar10"):
    return data.normalize_images(pixels, data.get(name))


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A model of `MODELS` by its name, its version folder, and what TensorFlow loads from that; made once."""
    made = {}

    def make(name):
        if name not in made:
            model = MODELS[name]()
            folder = export.saved_model(model, tmp_path_factory.mktemp("models") / "model", dataset="cifar10")
            made[name] = model, folder, tf.saved_model.load(str(folder))
        return made[name]

    return make
