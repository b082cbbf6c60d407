import keras
import numpy as np
import pytest

from aib_tf.layers import AnchorQuantizer, GaussianBottleneck
from tests import reference


def vectors(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def built(latent_dim=4, inputs=6, **arguments):
    layer = GaussianBottleneck(latent_dim, seed=0, **arguments)
    layer.build((None, inputs))
    generator = np.random.default_rng(1)
    for variable in layer.trainable_variables:
        variable.assign(generator.normal(size=variable.shape))
    return layer


def expected_kl(mean, stddev):
    """Mean over the batch of the KL summed over dimensions, in nats."""
    mean, stddev = np.asarray(mean, np.float64), np.asarray(stddev, np.float64)
    per_dimension = np.vectorize(reference.kl_divergence_by_integration)(mean, stddev)
    return per_dimension.sum(-1).mean()


def test_mean_and_deviation_are_those_of_the_formula():
    layer = built()
    x = vectors(3, 6)
    mean, stddev = layer.distribution(x)
    scores = x @ np.asarray(layer._dense.kernel) + np.asarray(layer._dense.bias)
    np.testing.assert_allclose(mean, scores[:, :4], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stddev, reference.softplus(scores[:, 4:] - 5), rtol=1e-4)


def test_loss_is_the_weighted_mean_rate_in_bits():
    layer = built(beta=0.03, kl_weight=0.5)
    x = vectors(3, 6)
    layer(x)
    rate = expected_kl(*layer.distribution(x)) / np.log(2)
    np.testing.assert_allclose(layer.losses, [0.03 * 0.5 * rate], rtol=1e-4)
    np.testing.assert_allclose(layer._rate.result(), rate, rtol=1e-4)


def test_reference_form_changes_the_loss_and_not_the_reported_rate():
    layer = built(kl="reference", beta=1.0)
    x = vectors(3, 6)
    layer(x)
    mean, stddev = layer.distribution(x)
    np.testing.assert_allclose(layer.losses, [expected_kl(mean, np.exp(stddev)) / np.log(2)], rtol=1e-4)
    np.testing.assert_allclose(layer._rate.result(), expected_kl(mean, stddev) / np.log(2), rtol=1e-4)


def test_warmup_scales_the_loss_and_not_the_reported_rate():
    layer = built(beta=1.0)
    layer.warmup.assign(0.25)
    layer(vectors(3, 6))
    np.testing.assert_allclose(layer.losses[0], 0.25 * np.asarray(layer._rate.result()), rtol=1e-6)


def test_inference_returns_the_mean_and_training_draws():
    layer = built()
    x = vectors(3, 6)
    mean, _ = layer.distribution(x)
    np.testing.assert_array_equal(layer(x), mean)
    np.testing.assert_array_equal(layer(x, training=True, sample=False), mean)
    assert np.abs(layer(x, training=True) - mean).max() > 0
    assert np.abs(layer(x, sample=True) - mean).max() > 0


def test_samples_have_the_mean_and_the_deviation_of_the_distribution():
    layer = built()
    mean, stddev = layer.distribution(vectors(3, 6))
    samples = np.asarray(layer.sample(mean, stddev, 4000))
    assert samples.shape == (4000, 3, 4)
    np.testing.assert_allclose((samples.mean(0) - mean) / stddev, 0, atol=5 / np.sqrt(4000))
    np.testing.assert_allclose(samples.std(0) / stddev, 1, atol=5 / np.sqrt(2 * 4000))


def test_rate_and_its_gradient_stay_finite_for_extreme_scores():
    import tensorflow as tf

    layer = built()
    x = tf.constant(1e3 * vectors(3, 6))
    with tf.GradientTape() as tape:
        tape.watch(x)
        layer(x, training=True)
        loss = tf.add_n(layer.losses)
    assert np.isfinite(loss)
    assert np.isfinite(tape.gradient(loss, x)).all()


def test_an_empty_batch_costs_nothing_and_leaves_the_reported_rate():
    layer = built()
    layer(vectors(3, 6))
    rate = np.asarray(layer._rate.result())
    layer(np.zeros((0, 6), "float32"))
    assert float(layer.losses[0]) == 0
    np.testing.assert_array_equal(layer._rate.result(), rate)


def test_reported_rate_is_the_mean_over_images_not_over_batches():
    layer, whole = built(), built()
    x = vectors(5, 6)
    layer(x[:4])
    layer(x[4:])
    whole(x)
    np.testing.assert_allclose(layer._rate.result(), whole._rate.result(), rtol=1e-5)


@pytest.mark.parametrize("floatx", ["bfloat16", "float16"])
def test_the_loss_is_added_to_those_of_keras_in_half_precision_too(floatx):
    keras.config.set_floatx(floatx)
    try:
        inputs = keras.Input((3,))
        latent = GaussianBottleneck(2, dtype=floatx)(inputs)
        model = keras.Model(inputs, AnchorQuantizer(dtype=floatx)(latent))
        model.compile("sgd", loss="mse", jit_compile=False)
        history = model.fit(np.ones((2, 3)), np.ones((2, 2)), verbose=0).history
    finally:
        keras.config.set_floatx("float32")
    assert np.isfinite(np.float32(history["loss"])).all()


def test_numbers_of_numpy_are_taken_as_numbers():
    layer = GaussianBottleneck(np.int64(4), beta=np.float32(0.5), seed=np.int64(3))
    assert GaussianBottleneck.from_config(layer.get_config()).get_config() == layer.get_config()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent_dim": 0}, "latent_dim=0"),
        ({"latent_dim": 2.5}, "latent_dim=2.5"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"kl": "exact"}, "kl='exact'"),
        ({"kl_weight": float("inf")}, "kl_weight=inf"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianBottleneck(**{"latent_dim": 4, **arguments})


def test_maps_instead_of_vectors_are_refused():
    with pytest.raises(ValueError, match="flatten or pool first"):
        GaussianBottleneck(4)(vectors(2, 3, 3, 5))


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.skipif(keras.config.backend() == "jax", reason="layers report no metrics on JAX")
def test_reported_rate_is_a_sum_in_float32_under_mixed_precision(precision):
    layer = GaussianBottleneck(256, dtype=precision, seed=0)
    code = np.random.default_rng(0).normal(size=(32, 16)).astype("float32")
    rates = []
    for _ in range(40):
        layer(code, training=True)
        rates.append(float(layer.metrics[0].result()))
    # 40 batches of 32 rates above 1,000 bits: more than float16 can hold, and than bfloat16 can add to.
    assert rates[0] > 1000
    np.testing.assert_allclose(rates, rates[0], rtol=1e-5)
