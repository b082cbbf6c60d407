"""The VGG of "Learn To Pay Attention": its options, and that it agrees with the PyTorch reimplementation.

The numbers come from a folder that lies beside a development checkout; `tests/parity_data.py` says how it is found.
"""

import itertools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import aib_tf
from aib_tf.layers.pay_attention import PayAttention
from aib_tf.models.blocks import Blocks
from aib_tf.models.pay_attention import PayAttentionClassifier, build_pay_attention, pytorch_layers
from tests import parity_data, reference

CASE = "pay_attention_before"
OPTIONS = [
    dict(zip(("depths", "attention", "combine", "position", "normalize"), values, strict=True))
    for values in itertools.product(
        (2, 3), ("pc", "dp"), ("concat", "independent"), ("before", "after"), ("softmax", "sigmoid")
    )
]
MAP_SIZES = {"before": [32, 16, 8], "after": [16, 8, 4]}


def build(depths=3, input_shape=(32, 32, 3), classes=5, width=0.05, **options):
    seeds = itertools.count()
    return build_pay_attention(depths, input_shape, classes, Blocks(width, seed=lambda: next(seeds)), **options)


def images(batch=2, height=32, width=32):
    return np.random.default_rng(0).normal(size=(batch, height, width, 3)).astype("float32")


def numpy(values):
    return {name: np.asarray(value) for name, value in values.items()}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(str(value) for value in options.values()))
def test_every_variant_decides_by_what_it_explains_and_trains(options):
    model = build(**options)
    batch = images()
    seen = numpy(model.explain(batch))
    numbers = range(1, options["depths"] + 1)
    entries = [f"{kind}{number}" for kind in ("scores", "attention") for number in numbers]
    assert set(seen) == {"logits", "probabilities", *entries}
    assert model.attention_names == tuple(entries[len(numbers) :])

    *local, _ = model.features(batch)
    pooled = []
    for number, layer, maps, size in zip(
        numbers, model.attentions, local, MAP_SIZES[options["position"]][-options["depths"] :], strict=True
    ):
        attention = seen[f"attention{number}"]
        assert attention.shape == seen[f"scores{number}"].shape == (2, size, size)
        assert (layer.attention, layer.normalize) == (options["attention"], options["normalize"])
        maps = np.asarray(maps, np.float64)
        if layer.projection is not None:
            maps = reference.convolution(maps, layer.projection.kernel, 0)
        pool = np.sum if options["normalize"] == "softmax" else np.mean
        pooled.append(pool(attention[..., None] * maps, axis=(1, 2)))
        if options["normalize"] == "softmax":
            np.testing.assert_allclose(attention.sum((1, 2)), 1, rtol=1e-5)
    weights = [[np.asarray(weight, np.float64) for weight in layer.weights] for layer in model.classifiers]
    if options["combine"] == "concat":
        ((kernel, bias),) = weights
        probabilities = np.exp(reference.log_softmax(np.concatenate(pooled, -1) @ kernel + bias))
    else:
        each = [vector @ kernel + bias for vector, (kernel, bias) in zip(pooled, weights, strict=True)]
        probabilities = np.mean([np.exp(reference.log_softmax(logits)) for logits in each], axis=0)
    np.testing.assert_allclose(seen["probabilities"], probabilities, rtol=1e-4)
    np.testing.assert_array_equal(model(batch), seen["logits"])
    labels = np.array([1, 3])
    loss = aib_tf.losses.CrossEntropyBits()(labels, seen["logits"])
    np.testing.assert_allclose(loss, -np.log2(probabilities[[0, 1], labels]).mean(), rtol=1e-4)

    model.compile(keras.optimizers.SGD(0.1), loss=aib_tf.losses.CrossEntropyBits(), run_eagerly=True)
    before = {variable.path: np.array(variable) for variable in model.trainable_variables}
    assert np.isfinite(model.train_on_batch(batch, labels))
    moved = {v.path for v in model.trainable_variables if not np.array_equal(before[v.path], v)}
    for layer in (*model.classifiers, *model.attentions, model.features.get_layer("block1_conv1")):
        assert {variable.path for variable in layer.trainable_variables if "bias" not in variable.path} <= moved
    # Its softmax cancels what parametrised compatibility has of the global vector; see `PayAttention`.
    ignores_global = (options["attention"], options["normalize"]) == ("pc", "softmax")
    global_kernel = model.features.get_layer("global").kernel
    change = np.abs(before[global_kernel.path] - global_kernel).max()
    assert change < 1e-6 if ignores_global else change > 1e-6


@pytest.mark.parametrize("position", ["before", "after"])
def test_larger_images_and_other_forms_work(position):
    model = build(2, (64, 40, 3), position=position)
    assert model.features.get_layer("global").kernel.shape[:2] == (2, 1)
    seen = model.explain(images(1, 64, 40))
    sizes = {"before": [(32, 20), (16, 10)], "after": [(16, 10), (8, 5)]}[position]
    assert [tuple(seen[name].shape[1:]) for name in model.attention_names] == sizes


def test_width_1_has_the_channels_of_the_paper():
    model = build(width=1.0, classes=100)
    assert [shape[-1] for shape in model.features.output_shape] == [256, 512, 512, 512]
    assert model.classifiers[0].kernel.shape == (1536, 100)
    assert [layer.projection is not None for layer in model.attentions] == [True, False, False]


def test_explanation_can_be_traced():
    model = build(combine="independent")
    expected = model.explain(images())
    traced = tf.function(model.explain)(images())
    for name, value in expected.items():
        np.testing.assert_allclose(traced[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_there_is_nothing_to_sample():
    with pytest.raises(ValueError, match=r"deterministic.*samples=4"):
        build().explain(images(), samples=4)


@pytest.mark.parametrize("options", [{}, {"depths": 2, "combine": "independent", "attention": "dp"}], ids=str)
def test_saved_model_predicts_the_same(options, tmp_path):
    model = build(**options, name="saved")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, PayAttentionClassifier)
    assert json.dumps(loaded.get_config()) == json.dumps(model.get_config())
    np.testing.assert_array_equal(loaded(images()), model(images()))


@pytest.mark.parametrize("combine", ["concat", "independent"])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_logits_are_float32_under_mixed_precision(policy, combine):
    global_policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = build(combine=combine)
    finally:
        keras.config.set_dtype_policy(global_policy)
    logits = model(images())
    assert logits.dtype == "float32"
    np.testing.assert_array_equal(model.explain(images())["logits"], logits)


def _parts(**changes):
    model = build(2)
    parts = {name: getattr(model, name) for name in ("features", "attentions", "classifiers", "combine")}
    return {**parts, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"combine": "sum"}, ValueError, "combine='sum'"),
        ({"attentions": []}, ValueError, "3 outputs, attentions of length 0"),
        ({"attentions": [PayAttention()]}, ValueError, "3 outputs, attentions of length 1"),
        ({"attentions": [PayAttention(), keras.layers.ReLU()]}, TypeError, "must be PayAttention layers"),
        ({"combine": "independent"}, ValueError, "takes classifiers of length 2.*classifiers of length 1"),
    ],
)
def test_parts_that_do_not_belong_together_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        PayAttentionClassifier(**_parts(**changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": 4}, "depths=4"),
        ({"position": "inside"}, "before, after.*position='inside'"),
        ({"combine": "sum"}, "concat, independent.*combine='sum'"),
        ({"attention": "dot"}, "attention='dot'"),
        ({"normalize": "mean"}, "normalize='mean'"),
        ({"input_shape": (32, 31, 3)}, r"32x32.*input_shape=\(32, 31, 3\)"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def _head_names(**options):
    return [name for name, _ in pytorch_layers(build(**options)) if not name.startswith("conv_block")]


def test_pytorch_names_keep_the_number_of_the_depth():
    attentions = ["attn1.op", "attn2.op", "attn3.op"]
    assert _head_names() == ["dense", "projector.op", *attentions, "classify"]
    assert _head_names(attention="dp") == ["dense", "projector.op", "classify"]
    assert _head_names(depths=2) == ["dense", *attentions[1:], "classify"]
    assert _head_names(depths=2, combine="independent") == ["dense", *attentions[1:], "classify2", "classify3"]


@pytest.mark.parametrize("options", [{}, {"depths": 2, "combine": "independent", "attention": "dp"}], ids=str)
def test_pytorch_names_cover_every_variable_once(options):
    model = build(**options)
    named = [variable.path for _, layer in pytorch_layers(model) for variable in layer.variables]
    assert sorted(named) == sorted(variable.path for variable in model.variables)


def test_running_variance_is_pytorchs_unbiased_one():
    model = build()
    batch = images(3)
    layer, norm = (model.features.get_layer(f"block1_{name}1") for name in ("conv", "norm"))
    outputs = reference.convolution(batch, layer.kernel, layer.bias)
    model(batch, training=True)
    np.testing.assert_allclose(norm.moving_mean, 0.1 * outputs.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norm.moving_variance, 0.9 + 0.1 * outputs.var((0, 1, 2), ddof=1), rtol=1e-6)


def make_case(dtype="float32"):
    """The case's model with its weights, a dict from PyTorch's names to variables, the numbers, images and labels."""
    numbers, recipe = parity_data.load(CASE)
    global_policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    model = build(classes=100, width=1.0)
    keras.config.set_dtype_policy(global_policy)
    seed = int(numbers["meta/seed"])
    state = recipe.state_dict(parity_data.spec(CASE), seed)
    variables = {}
    for prefix, layer in pytorch_layers(model):
        if hasattr(layer, "gamma"):
            variables[f"{prefix}.weight"] = layer.gamma
            variables[f"{prefix}.bias"] = layer.beta
            variables[f"{prefix}.running_mean"] = layer.moving_mean
            variables[f"{prefix}.running_var"] = layer.moving_variance
            del state[f"{prefix}.num_batches_tracked"]
        else:
            variables[f"{prefix}.weight"] = layer.kernel
            if layer.bias is not None:
                variables[f"{prefix}.bias"] = layer.bias
    assert list(variables) == list(state)
    for name, array in state.items():
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        assert array.shape == variables[name].shape, name
        variables[name].assign(array)
    batch = recipe.images(seed, (4, 32, 32, 3)).astype(dtype)
    return model, variables, numbers, batch, recipe.labels(seed, 4, 100)


@pytest.fixture(scope="module")
def case():
    return make_case()


def assert_close(actual, expected, relative=1e-4):
    expected = np.asarray(expected)
    actual = np.reshape(np.asarray(actual), expected.shape)
    np.testing.assert_allclose(actual, expected, rtol=relative, atol=relative * np.abs(expected).max())


def test_parameter_count_is_that_of_the_pytorch_model(case):
    model, *_ = case
    counted = sum(np.prod(entry["shape"], dtype=int) for entry in parity_data.spec(CASE).values() if entry["shape"])
    assert model.count_params() == counted


def test_logits_and_scores_agree(case):
    model, _, numbers, batch, _ = case
    seen = model.explain(batch)
    for name in ("logits", "scores1", "scores2", "scores3"):
        assert_close(seen[name], numbers[f"eval/{name}"])


def test_training_mode_loss_and_every_gradient_agree():
    # In float64: in float32, batch normalisation and pooling maxima that flip by rounding move the gradient norms of
    # the first blocks by up to 0.2% in this batch of four (measured; in float64 0.04%).
    model, variables, numbers, batch, labels = make_case("float64")
    with tf.GradientTape() as tape:
        logits = model(batch, training=True)
        loss = aib_tf.losses.CrossEntropyBits(dtype="float64")(labels, logits) * np.log(2)
    assert_close(logits, numbers["train/logits"])
    assert_close(loss, numbers["train/loss"])
    trained = {name: variable for name, variable in variables.items() if "running" not in name}
    gradients = tape.gradient(loss, [variable.value for variable in trained.values()])
    compared = 0
    for name, gradient in zip(trained, gradients, strict=True):
        norm, expected = np.linalg.norm(gradient), numbers[f"grad/norm/{name}"]
        if expected < 1e-6:
            # Zero by the formula: a bias before batch normalisation, and all that only the global vector depends on.
            assert norm < 1e-12, name
        else:
            np.testing.assert_allclose(norm, expected, rtol=1e-3, err_msg=name)
            compared += 1
    assert compared == 45
