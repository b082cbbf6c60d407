"""A frozen function gives the same outputs from constants, with batch normalisation folded into what it follows."""

import collections
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import aib_tf
from aib_tf.export.freezing import freeze
from tests.export.conftest import as_trained

IMAGES = tf.TensorSpec((None, 16, 16, 3), name="images")
NORMALISATION = {"FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3", "Rsqrt"}


def batch(*shape, seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=shape).astype("float32"))


def network(*layers, shape=(16, 16, 3)):
    x = images = keras.Input(shape)
    for layer in layers:
        x = layer(x)
    return as_trained(keras.Model(images, x))


def inference(model):
    return lambda images: model(images, training=False)


def ops_of(function):
    """How many nodes of each type the function has, with those of the functions that it calls."""
    graph_def = function.graph.as_graph_def()
    nodes = [*graph_def.node, *(node for each in graph_def.library.function for node in each.node_def)]
    return collections.Counter(node.op for node in nodes)


def assert_same(results, expected, tolerance=1e-5):
    tf.nest.assert_same_structure(results, expected)
    for result, right in zip(tf.nest.flatten(results), tf.nest.flatten(expected), strict=True):
        assert result.dtype == right.dtype
        assert result.shape == right.shape
        np.testing.assert_allclose(result, right, rtol=0, atol=tolerance * np.max(np.abs(right)))


def attention_and_logits(model):
    """What `explain` computes with the means, as a tuple and a dict."""

    def compute(images):
        features = model.features(images, training=False)
        mean, stddev = model.attention.distribution(features)
        quantized, index, *_ = aib_tf.ops.pure.nearest_anchor(mean, model.quantizer.anchors)
        code = model.encoder(features + features * quantized, training=False)
        latent, _ = model.bottleneck.distribution(code)
        return (mean, stddev), {"logits": model.decoder(latent, training=False), "anchor_index": index}

    return compute


# ------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("name", "width", "kept"),
    [
        ("vgg_aib_qt", 0.0625, 0),
        # Its blocks normalise sums, and before the first convolution: one scale and one shift each.
        ("wrn_10_2_aib_qt", 0.25, 5),
    ],
)
def test_a_frozen_model_gives_what_explain_gives(name, width, kept):
    model = as_trained(aib_tf.models.build(name, (32, 32, 3), classes=10, width=width, seed=0))
    images = batch(5, 32, 32, 3)
    frozen = freeze(attention_and_logits(model), [tf.TensorSpec((None, 32, 32, 3))])
    (mean, stddev), outputs = frozen(images)
    expected = model.explain(images)
    # A dozen layers, each in another order of operations than before.
    assert_same(mean[..., 0], expected["attention_mean"], tolerance=3e-5)
    assert_same(stddev[..., 0], expected["attention_stddev"], tolerance=3e-5)
    assert_same(outputs["logits"], expected["logits"], tolerance=3e-5)
    assert outputs["anchor_index"].shape == (5, 16, 16, 1)
    counts = ops_of(frozen)
    assert not NORMALISATION & set(counts)
    # One more product of maps is the modulation.
    assert counts["Mul"] == kept + 1
    # The anchors are constants, so that they need no check at run time.
    assert not {"ReadVariableOp", "If", "Assert", "IsFinite", "TopKV2"} & set(counts)


def test_a_backbone_of_keras_is_frozen():
    backbone = as_trained(keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, include_top=False, weights=None))
    nested = keras.Sequential([keras.Input((32, 32, 3)), backbone, keras.layers.GlobalAveragePooling2D()])
    frozen = freeze(inference(nested), [tf.TensorSpec((None, 32, 32, 3))])
    images = batch(2, 32, 32, 3)
    assert_same(frozen(images), nested(images, training=False), tolerance=1e-4)  # 52 layers deep
    counts = ops_of(frozen)
    assert not {"Mul", *NORMALISATION} & set(counts)
    assert counts["BiasAdd"] == counts["Conv2D"] + counts["DepthwiseConv2dNative"] == 52


# ------------------------------------------------------------------------------------------------------------ folding


@pytest.mark.parametrize(
    "layers",
    [
        (keras.layers.Conv2D(4, 3, padding="same"), keras.layers.BatchNormalization(), keras.layers.ReLU()),
        (keras.layers.Conv2D(4, 3, strides=2, use_bias=False), keras.layers.BatchNormalization()),
        (keras.layers.Conv2D(1, 3), keras.layers.BatchNormalization(scale=False)),
        (keras.layers.Conv2D(4, 3, groups=1, dilation_rate=2), keras.layers.BatchNormalization(center=False)),
        (keras.layers.DepthwiseConv2D(3, depth_multiplier=2), keras.layers.BatchNormalization()),
        (keras.layers.SeparableConv2D(5, 3), keras.layers.BatchNormalization()),
        (keras.layers.Flatten(), keras.layers.Dense(4), keras.layers.BatchNormalization()),
        (keras.layers.Conv2D(4, 1), keras.layers.Rescaling(2.0, offset=-1.0), keras.layers.BatchNormalization()),
    ],
    ids=["conv", "strided", "one_channel", "dilated", "depthwise", "separable", "dense", "rescaled"],
)
def test_a_normalisation_is_folded_into_the_product_before_it(layers):
    model = network(*layers)
    frozen = freeze(inference(model), [IMAGES])
    images = batch(3, 16, 16, 3)
    assert_same(frozen(images), model(images, training=False))
    counts = ops_of(frozen)
    assert not {"Mul", "Sub", "AddV2", *NORMALISATION} & set(counts)
    assert counts["BiasAdd"] == 1


def test_a_fused_kernel_and_any_arithmetic_with_constants_are_folded():
    random = np.random.default_rng(2)
    kernel = tf.constant(random.normal(size=(3, 3, 3, 4)), tf.float32)
    scale, shift, mean = tf.unstack(tf.constant(random.normal(size=(3, 4)), tf.float32))
    variance = tf.constant(random.uniform(0.5, 2.0, 4), tf.float32)
    matrix = tf.constant(random.normal(size=(2, 4)), tf.float32)

    def compute(images):
        x = tf.nn.conv2d(images, kernel, 1, "SAME")
        x = 3.0 - x / tf.constant([1.0, 2.0, 4.0, 8.0])
        x = tf.raw_ops.FusedBatchNormV3(
            x=x, scale=scale, offset=shift, mean=mean, variance=variance, epsilon=1e-3, is_training=False
        ).y
        x = tf.nn.relu(x)
        return tf.matmul(tf.reshape(x, (-1, 4)), matrix, transpose_b=True) * [2.0, -1.0]

    frozen = freeze(compute, [IMAGES])
    images = batch(2, 16, 16, 3)
    assert_same(frozen(images), compute(images))
    counts = ops_of(frozen)
    assert counts["BiasAdd"] == 2
    assert not {"Sub", "RealDiv", "Mul", *NORMALISATION} & set(counts)


def test_what_another_layer_reads_stays_as_it_is():
    convolution, norm = keras.layers.Conv2D(4, 3, padding="same"), keras.layers.BatchNormalization()
    images = keras.Input((16, 16, 3))
    maps = convolution(images)
    model = as_trained(keras.Model(images, [norm(maps), keras.layers.GlobalMaxPooling2D()(maps), maps]))
    pictures = batch(3, 16, 16, 3)
    frozen = freeze(inference(model), [IMAGES])
    assert_same(frozen(pictures), model(pictures, training=False))
    assert ops_of(frozen)["Mul"] == 1


def test_a_layer_that_is_called_twice_is_folded_into_each():
    convolution, first, second = (
        keras.layers.Conv2D(3, 3, padding="same"),
        keras.layers.BatchNormalization(),
        keras.layers.BatchNormalization(),
    )
    model = network(convolution, first, convolution, second, keras.layers.ReLU(), convolution)
    pictures = batch(3, 16, 16, 3)
    frozen = freeze(inference(model), [IMAGES])
    assert_same(frozen(pictures), model(pictures, training=False))
    assert ops_of(frozen)["BiasAdd"] == ops_of(frozen)["Conv2D"] == 3


def test_what_broadcasts_over_places_is_not_folded():
    grid = batch(16, 16, 4)
    model = network(keras.layers.Conv2D(4, 3, padding="same", use_bias=False))
    pictures = batch(3, 16, 16, 3)

    def compute(images):
        return model(images, training=False) * grid, model(images, training=False)[..., :1] + tf.ones((1, 1, 1, 4))

    frozen = freeze(compute, [IMAGES])
    assert_same(frozen(pictures), compute(pictures))
    assert ops_of(frozen)["Mul"] == 1


def test_a_condition_on_data_stays_and_one_on_constants_goes():
    def compute(x, flag):
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(tf.constant([True])), ["never"])]):
            x = tf.identity(x)
        with tf.control_dependencies([tf.debugging.Assert(flag, ["flag is false"])]):
            return tf.cond(flag, lambda: x + 1.0, lambda: x - 1.0)

    frozen = freeze(compute, [tf.TensorSpec((None,)), tf.TensorSpec((), tf.bool)])
    np.testing.assert_array_equal(frozen(tf.constant([1.0, 2.0]), tf.constant(True)), [2.0, 3.0])
    with pytest.raises(tf.errors.InvalidArgumentError, match="flag is false"):
        frozen(tf.constant([1.0, 2.0]), tf.constant(False))
    assert ops_of(frozen)["Assert"] == 1


def test_a_constant_that_waits_for_a_check_is_folded_and_the_check_kept():
    def compute(x, flag):
        with tf.control_dependencies([tf.debugging.Assert(flag, ["flag is false"])]):
            return x + tf.cast(tf.range(4) * 2, tf.float32)

    frozen = freeze(compute, [tf.TensorSpec((None, 4)), tf.TensorSpec((), tf.bool)])
    assert "Range" not in ops_of(frozen)
    np.testing.assert_array_equal(frozen(tf.zeros((1, 4)), tf.constant(True)), [[0, 2, 4, 6]])
    with pytest.raises(tf.errors.InvalidArgumentError, match="flag is false"):
        frozen(tf.zeros((1, 4)), tf.constant(False))


# A server of TensorFlow Serving leaves XLA out, and what demands it fails there; Python's default does not.
WITHOUT_XLA = """
import ctypes, os, sys
import numpy as np
import tensorflow as tf

library = ctypes.CDLL(os.path.join(os.path.dirname(tf.__file__), "libtensorflow_cc.so.2"))
library._ZN10tensorflow21DisableXlaCompilationEv()
answer = tf.saved_model.load(sys.argv[1]).signatures["serving_default"](x=tf.constant(np.load(sys.argv[1] + "/x.npy")))
np.save(sys.argv[1] + "/y.npy", answer["y"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="The symbol that switches XLA off has its name of Linux.")
@pytest.mark.parametrize("onednn", ["0", "1"])
def test_grouped_convolutions_do_not_demand_xla(onednn, tmp_path):
    layers = keras.layers
    model = network(
        layers.Conv2D(8, 3, groups=2, padding="same"),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.Conv2D(16, 3, groups=4, strides=2),
        layers.Conv2D(16, 3, groups=16, dilation_rate=2),
        shape=(16, 16, 4),
    )
    x = batch(3, 16, 16, 4)
    frozen = freeze(inference(model), [tf.TensorSpec((None, 16, 16, 4), name="x")])

    @tf.function(input_signature=[tf.TensorSpec((None, 16, 16, 4), name="x")])
    def serve(x):
        return {"y": frozen(x)}

    tf.saved_model.save(tf.Module(), str(tmp_path), signatures=serve)
    np.save(tmp_path / "x.npy", x)
    environment = os.environ | {"TF_ENABLE_ONEDNN_OPTS": onednn, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", WITHOUT_XLA, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    assert_same(np.load(tmp_path / "y.npy"), model(x, training=False))


def test_residual_blocks_are_still_fused_by_tensorflow(capfd):
    images = x = keras.Input((16, 16, 8))
    for _ in range(2):
        shortcut = x
        x = keras.layers.Conv2D(8, 3, padding="same")(keras.layers.ReLU()(x))
        x = keras.layers.add([keras.layers.BatchNormalization()(x), shortcut])
    model = as_trained(keras.Model(images, keras.layers.ReLU()(x)))
    frozen = freeze(inference(model), [tf.TensorSpec((None, 16, 16, 8))])
    assert not NORMALISATION & set(ops_of(frozen))
    values = batch(3, 16, 16, 8)
    assert_same(tf.function(frozen)(values), model(values, training=False))
    assert "remapper failed" not in capfd.readouterr().err


def test_a_large_fill_is_not_stored():
    frozen = freeze(lambda x: x + tf.zeros((1000, 1000)), [tf.TensorSpec((1000, 1000))])
    assert frozen.graph.as_graph_def().ByteSize() < 10_000


# ------------------------------------------------------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("onednn", ["1", "0"])
def test_bfloat16_is_half_the_size_and_near(onednn):
    """In a process that may use the CPU's instructions for bfloat16, and in one that may not."""
    command = [sys.executable, "-W", "error", "-c", "from tests.export.test_freezing import compare; compare()"]
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": onednn}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr


def compare():
    model = network(
        *(keras.layers.Conv2D(64, 3), keras.layers.BatchNormalization(), keras.layers.ReLU()),
        *(keras.layers.DepthwiseConv2D(3), keras.layers.BatchNormalization(), keras.layers.ReLU(6.0)),
        *(keras.layers.MaxPooling2D(), keras.layers.Conv2D(64, 3, padding="same")),
        *(keras.layers.Flatten(), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)),
    )
    images = batch(4, 16, 16, 3)
    narrow = freeze(inference(model), [IMAGES], dtype="bfloat16")
    expected = model(images, training=False)
    result = narrow(images)
    assert result.dtype == tf.float32
    assert_same(result, expected, tolerance=2e-2)
    assert np.max(np.abs(result - expected)) > 0
    wide = freeze(inference(model), [IMAGES])
    sizes = [function.graph.as_graph_def().ByteSize() for function in (narrow, wide)]
    assert sizes[0] < 0.55 * sizes[1]
    types = {
        node.name: node.attr["T"].type for node in narrow.graph.as_graph_def().node if node.op in ("Conv2D", "MatMul")
    }
    # The last product's result is an output.
    assert collections.Counter(types.values()) == {tf.bfloat16.as_datatype_enum: 3, tf.float32.as_datatype_enum: 1}
    # Into bfloat16, and back for the last product: what lies between stays in it.
    assert ops_of(narrow)["Cast"] == 2, ops_of(narrow)


def test_bfloat16_alone_changes_nothing_else():
    frozen = freeze(lambda x: (tf.nn.relu(x), x * 2.0), [tf.TensorSpec((None, 3))], dtype="bfloat16")
    assert "Cast" not in ops_of(frozen)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match=r"`dtype` must be one of float32, bfloat16\. Received: dtype='float16'"):
        freeze(lambda x: x, [tf.TensorSpec(())], dtype="float16")


# ---------------------------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 2 * x), lambda x: {"b": x, "a": [x, (x,)]}])
def test_outputs_keep_their_structure(wrap):
    x = batch(3, 2)
    frozen = freeze(wrap, [tf.TensorSpec((None, 2))])
    assert_same(frozen(x), wrap(x), tolerance=0)


def test_arguments_keep_their_names_and_an_unused_one_its_place():
    specs = [tf.TensorSpec((None, 3), name="first"), tf.TensorSpec((), tf.int32), tf.TensorSpec((None, 3))]
    frozen = freeze(lambda x, unused, y: x - y, specs)
    assert [tensor.op.name for tensor in frozen.inputs] == ["first", "unused", "y"]
    result = frozen(tf.ones((2, 3)), tf.constant(5), tf.zeros((2, 3)))
    np.testing.assert_array_equal(result, np.ones((2, 3)))


def test_variables_are_frozen_as_they_are_and_tensors_from_outside_too():
    variable, tensor = tf.Variable([1.0, 2.0]), tf.constant(np.arange(2000.0, dtype="float32"))
    frozen = freeze(lambda x: x * variable + tensor[-2:], [tf.TensorSpec((2,))])
    variable.assign([100.0, 100.0])
    np.testing.assert_array_equal(frozen(tf.constant([1.0, 1.0])), [1999.0, 2001.0])
    assert not frozen.captured_inputs


def test_a_network_of_a_mixed_policy_stays_what_it_is():
    model = network(
        keras.layers.Conv2D(4, 3, dtype="mixed_bfloat16"),
        keras.layers.BatchNormalization(dtype="mixed_bfloat16"),
        keras.layers.Dense(2, dtype="float32"),
    )
    images = batch(3, 16, 16, 3)
    assert_same(freeze(inference(model), [IMAGES])(images), model(images, training=False), tolerance=2e-2)


def test_several_signatures_share_the_constants_of_a_piece(tmp_path):
    model = network(keras.layers.Conv2D(64, 3), keras.layers.BatchNormalization(), keras.layers.Conv2D(64, 3))
    weights = 4 * sum(np.prod(layer.kernel.shape) for layer in model.layers if hasattr(layer, "kernel"))
    module = tf.Module()
    piece = freeze(inference(model), [IMAGES])
    spec = [tf.TensorSpec((None, 16, 16, 3), name="images")]
    module.plain = tf.function(lambda images: {"maps": piece(images)}, input_signature=spec)
    module.mean = tf.function(lambda images: {"mean": tf.reduce_mean(piece(images), axis=(1, 2))}, input_signature=spec)
    module.bright = tf.function(lambda images: {"maps": piece(images + 1.0)}, input_signature=spec)
    signatures = {name: getattr(module, name) for name in ("plain", "mean", "bright")}
    tf.saved_model.save(module, tmp_path, signatures=signatures)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1.5 * weights
    loaded = tf.saved_model.load(tmp_path)
    images = batch(3, 16, 16, 3)
    expected = model(images, training=False)
    assert_same(loaded.signatures["plain"](images), {"maps": expected})
    assert_same(loaded.signatures["mean"](images), {"mean": tf.reduce_mean(expected, axis=(1, 2))})
    assert_same(loaded.signatures["bright"](images), {"maps": model(images + 1.0, training=False)})


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_function_that_updates_a_metric_is_refused():
    model = aib_tf.models.build("vgg_aib_qt", (32, 32, 3), classes=10, width=0.0625)
    with pytest.raises(ValueError, match=r"Received: stateful op Assign\w*VariableOp '.*' of variable '.+'"):
        freeze(lambda images: model(images, training=False), [tf.TensorSpec((None, 32, 32, 3))])


def test_a_function_that_draws_from_a_generator_is_refused():
    with pytest.raises(ValueError, match="Received: stateful op RandomUniform 'draw/RandomUniform'"):
        freeze(lambda x: x + tf.random.uniform((), name="draw"), [tf.TensorSpec(())])


def test_state_inside_a_condition_is_refused():
    variable = tf.Variable(1.0, name="count")

    def compute(x):
        return tf.cond(x > 0.0, lambda: variable.assign_add(x), lambda: x)

    with pytest.raises(ValueError, match="stateful op AssignAddVariableOp"):
        freeze(compute, [tf.TensorSpec(())])


def test_a_table_is_refused():
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer([1], [2.0]), 0.0)
    with pytest.raises(ValueError, match="stateful op LookupTableFindV2"):
        freeze(table.lookup, [tf.TensorSpec((None,), tf.int32)])


def test_statistics_of_the_batch_are_refused():
    def compute(images):
        ones = tf.ones(3)
        empty = tf.zeros(0)
        return tf.raw_ops.FusedBatchNormV3(
            x=images, scale=ones, offset=ones, mean=empty, variance=empty, is_training=True
        ).y

    with pytest.raises(ValueError, match="Received: FusedBatchNormV3 'FusedBatchNormV3'"):
        freeze(compute, [IMAGES])


@pytest.mark.parametrize("result", [None, ()])
def test_a_function_without_tensors_is_refused(result):
    with pytest.raises(TypeError, match="must return tensors"):
        freeze(lambda x: result, [tf.TensorSpec(())])
