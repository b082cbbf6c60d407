import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from aib_tf.layers.pay_attention import PayAttention
from tests import reference

OPTIONS = list(itertools.product(["pc", "dp"], ["softmax", "sigmoid"]))


def inputs(*local_shape, size=4, dtype="float32"):
    """Local features (B, H, W, C) and a query (B, size)."""
    generator = np.random.default_rng(0)
    local, query = generator.normal(size=local_shape), generator.normal(size=(local_shape[0], size))
    return local.astype(dtype), query.astype(dtype)


def built(channels=3, size=4, seed=1, **arguments):
    layer = PayAttention(**arguments)
    layer.build((None, None, None, channels), (None, size))
    generator = np.random.default_rng(seed)
    for variable in layer.trainable_variables:
        variable.assign(generator.normal(size=variable.shape))
    return layer


def expected(layer, local, query):
    """Pooled features, scores and attention by the formula, in the order in which it is written."""
    features, query = np.asarray(local, np.float64), np.asarray(query, np.float64)
    if layer.projection is not None:
        features = reference.convolution(features, layer.projection.kernel, 0)
    query = query[:, None, None]
    if layer.attention == "pc":
        scores = reference.convolution(features + query, layer.scores.kernel, 0)[..., 0]
    else:
        scores = (features * query).sum(-1)
    if layer.normalize == "softmax":
        rows = scores.reshape(len(scores), np.prod(scores.shape[1:]))
        attention = np.exp(reference.log_softmax(rows)).reshape(scores.shape)
        return (attention[..., None] * features).sum((1, 2)), scores, attention
    attention = reference.sigmoid(scores)
    return (attention[..., None] * features).mean((1, 2)), scores, attention


@pytest.mark.parametrize("channels", [3, 4], ids=["projected", "as wide as the query"])
@pytest.mark.parametrize(("attention", "normalize"), OPTIONS)
def test_pooled_features_scores_and_attention_are_those_of_the_formula(attention, normalize, channels):
    layer = built(channels, attention=attention, normalize=normalize)
    local, query = inputs(2, 5, 6, channels)
    pooled, scores, maps = layer.attend(local, query)
    expected_pooled, expected_scores, expected_maps = expected(layer, local, query)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(maps, expected_maps, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pooled, expected_pooled, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(layer(local, query), pooled)


@pytest.mark.parametrize(("attention", "normalize"), OPTIONS)
def test_gradients_are_those_of_the_formula(attention, normalize):
    layer = built(attention=attention, normalize=normalize, dtype="float64")
    local, query = (tf.Variable(x) for x in inputs(2, 3, 2, 3, dtype="float64"))
    variables = [local, query, *layer.trainable_variables]
    weights = np.random.default_rng(2).normal(size=(2, 4))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(weights * layer(local, query))
    step = 1e-6
    for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
        values = np.array(variable)
        differences = np.zeros(values.shape)
        for position in np.ndindex(values.shape):
            for sign in (1, -1):
                moved = values.copy()
                moved[position] += sign * step
                variable.assign(moved)
                differences[position] += sign * (weights * expected(layer, local, query)[0]).sum() / (2 * step)
        variable.assign(values)
        np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-8)


def test_only_features_of_another_width_are_projected():
    assert built(3, 4).projection.kernel.shape == (1, 1, 3, 4)
    assert built(4, 4).projection is None


def test_only_parametrised_compatibility_has_a_kernel():
    assert [tuple(variable.shape) for variable in built(4, 4).trainable_variables] == [(1, 1, 4, 1)]
    assert built(4, 4, attention="dp").trainable_variables == []


@pytest.mark.parametrize(("attention", "normalize"), OPTIONS)
def test_only_parametrised_softmax_attention_ignores_the_query(attention, normalize):
    layer = built(attention=attention, normalize=normalize)
    local, query = inputs(2, 5, 6, 3)
    change = np.abs(layer(local, query) - layer(local, query[::-1])).max()
    assert change < 1e-6 if (attention, normalize) == ("pc", "softmax") else change > 1e-2


@pytest.mark.parametrize(("attention", "normalize"), OPTIONS)
def test_one_layer_takes_maps_of_any_size_also_when_traced(attention, normalize):
    layer = built(attention=attention, normalize=normalize)
    signature = [tf.TensorSpec((None, None, None, 3)), tf.TensorSpec((None, 4))]
    traced = tf.function(layer, input_signature=signature)
    for shape in ((2, 1, 1, 3), (1, 7, 2, 3), (0, 5, 5, 3)):
        local, query = inputs(*shape)
        np.testing.assert_allclose(traced(local, query), expected(layer, local, query)[0], rtol=1e-5, atol=1e-6)


def test_it_joins_a_functional_model_of_unknown_size():
    local, query = keras.Input((None, None, 3)), keras.Input((4,))
    model = keras.Model([local, query], PayAttention()(local, query))
    assert model.output_shape == (None, 4)
    assert model(inputs(2, 5, 6, 3)).shape == (2, 4)


@pytest.mark.parametrize("normalize", ["softmax", "sigmoid"])
def test_scores_far_from_zero_give_finite_attention(normalize):
    layer = built(attention="dp", normalize=normalize)
    local, query = inputs(2, 5, 6, 3)
    pooled, _, attention = layer.attend(1e4 * local, 1e4 * query)
    assert np.isfinite(pooled).all()
    assert np.max(attention) == 1


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize(("attention", "normalize"), OPTIONS)
def test_mixed_precision_rounds_inputs_kernels_and_output_and_nothing_else(attention, normalize, policy):
    half = policy.removeprefix("mixed_")
    layer, exact = (built(attention=attention, normalize=normalize, dtype=dtype) for dtype in (policy, "float32"))
    for variable in exact.trainable_variables:
        variable.assign(keras.ops.cast(keras.ops.cast(variable, half), "float32"))
    local, query = (keras.ops.cast(x, half) for x in inputs(2, 30, 30, 3))
    results = layer.attend(local, query)
    for result, expected_result in zip(results, exact.attend(local, query), strict=True):
        assert result.dtype == "float32"
        np.testing.assert_allclose(result, expected_result, rtol=1e-6, atol=1e-6)
    output = layer(local, query)
    assert output.dtype == half
    np.testing.assert_array_equal(output, keras.ops.cast(results[0], half))


def test_config_makes_the_same_layer():
    layer = PayAttention(
        "dp",
        "sigmoid",
        kernel_initializer=keras.initializers.HeNormal(seed=1),
        projection_initializer="zeros",
        name="pay",
    )
    copy = PayAttention.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    assert (copy.attention, copy.normalize, copy.kernel_initializer.seed) == ("dp", "sigmoid", 1)
    copy.build((None, 2, 2, 3), (None, 4))
    assert not np.any(copy.projection.kernel)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "dot"}, "pc, dp.*attention='dot'"),
        ({"normalize": "mean"}, "softmax, sigmoid.*normalize='mean'"),
    ],
)
def test_unknown_choices_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PayAttention(**arguments)


@pytest.mark.parametrize(
    ("local_shape", "query_shape", "message"),
    [
        ((None, 5, 3), (None, 4), r"local.shape=\(None, 5, 3\)"),
        ((None, 5, 5, None), (None, 4), "known number of channels"),
        ((None, 5, 5, 3), (None, 1, 1, 4), r"flatten or pool first.*query.shape=\(None, 1, 1, 4\)"),
        ((None, 5, 5, 3), (None, None), "known number of features"),
    ],
)
def test_inputs_of_the_wrong_form_are_named(local_shape, query_shape, message):
    with pytest.raises(ValueError, match=message):
        PayAttention().build(local_shape, query_shape)
