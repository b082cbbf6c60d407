"""Models in folders as a server has them, and both stand-ins for TensorFlow Serving around them."""

import pytest
import tensorflow as tf

import aib_tf
from aib_tf import export
from tests.serving import servers

CLASSES = ["naïve", "знак", "$3", "d", "e", "f", "g", "h", "i", "j"]
PROTOCOLS = {"grpc": servers.GrpcStandIn, "rest": servers.RestStandIn}


ECHOED = {
    "float32": tf.float32,
    "float64": tf.float64,
    "int32": tf.int32,
    "int64": tf.int64,
    "uint8": tf.uint8,
    "bool": tf.bool,
    "text": tf.string,
    "data_bytes": tf.string,
}


def save_echo(folder, version):
    """Saves a model that gives back what it gets, in every dtype that JSON has, and tells its version."""

    @tf.function(input_signature=[tf.TensorSpec(None, dtype, name) for name, dtype in ECHOED.items()])
    def everything(*values):
        return {name: tf.identity(value) for name, value in zip(ECHOED, values, strict=True)}

    @tf.function(input_signature=[tf.TensorSpec((None, 3), tf.float32, "rows")])
    def rows(rows):
        return {"rows": tf.identity(rows)}

    @tf.function(input_signature=[tf.TensorSpec((), tf.int32, "count")])
    def version_of(count):
        return {"version": tf.fill([count], tf.constant(version, tf.int64)), "count": tf.identity(count)}

    echo = tf.Module()
    echo.functions = [everything, rows, version_of]
    signatures = {"everything": everything, "rows": rows, "version": version_of}
    tf.saved_model.save(echo, str(folder / str(version)), signatures=signatures)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Folder with the versions of a small exported model."""
    path = tmp_path_factory.mktemp("models") / "small"
    model = aib_tf.models.build("vgg_aib_qt", (32, 32, 3), 10, width=0.0625)
    export.saved_model(model, path, class_names=CLASSES)
    return path


@pytest.fixture(scope="session")
def models(exported, tmp_path_factory):
    """Loaded models by name and version."""
    echo = tmp_path_factory.mktemp("models") / "echo"
    for version in (1, 2):
        save_echo(echo, version)
    return servers.load({"small": exported, "echo": echo})


@pytest.fixture(params=PROTOCOLS)
def server(request, models):
    """A stand-in for TensorFlow Serving, over either protocol."""
    with PROTOCOLS[request.param](models) as stand_in:
        yield stand_in


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """Keeps requests to this machine on it, whatever proxy the environment names."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "localhost,127.0.0.1")
