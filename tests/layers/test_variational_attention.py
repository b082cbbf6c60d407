import keras
import numpy as np
import pytest

from aib_tf.layers import VariationalSpatialAttention
from tests import reference


def features(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def built(channels=3, **arguments):
    """A layer with kernels that are not symmetric and biases that are not zero."""
    layer = VariationalSpatialAttention(seed=0, **arguments)
    layer.build((None, None, None, channels))
    generator = np.random.default_rng(1)
    for variable in layer.trainable_variables:
        variable.assign(generator.normal(size=variable.shape))
    return layer


def test_mean_and_deviation_are_those_of_the_formula():
    layer = built()
    images = features(2, 5, 6, 3)
    mean, stddev = layer.distribution(images)
    (kernel, bias), (stddev_kernel, stddev_bias) = layer._scores.weights, layer._stddev_scores.weights
    expected = reference.sigmoid(reference.convolution(images, kernel, bias))
    np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-6)
    # The deviation reads the mean map, not the features.
    scores = reference.convolution(expected, stddev_kernel, stddev_bias)
    np.testing.assert_allclose(stddev, reference.softplus(scores - 5), rtol=1e-4, atol=1e-6)


def test_inference_returns_the_mean_and_training_draws():
    layer = built()
    images = features(2, 5, 5, 3)
    mean, _ = layer.distribution(images)
    np.testing.assert_array_equal(layer(images), mean)
    np.testing.assert_array_equal(layer(images, training=True, sample=False), mean)
    assert np.abs(layer(images, training=True) - mean).max() > 0
    assert np.abs(layer(images, sample=True) - mean).max() > 0


def test_samples_have_the_mean_and_the_deviation_of_the_distribution():
    layer = built()
    mean, stddev = layer.distribution(features(2, 4, 4, 3))
    samples = np.asarray(layer.sample(mean, stddev, 4000))
    assert samples.shape == (4000, 2, 4, 4, 1)
    np.testing.assert_allclose((samples.mean(0) - mean) / stddev, 0, atol=5 / np.sqrt(4000))
    np.testing.assert_allclose(samples.std(0) / stddev, 1, atol=5 / np.sqrt(2 * 4000))


def test_equal_seeds_draw_equal_maps_and_each_call_another():
    one, other = built(), built()
    images = features(1, 4, 4, 3)
    first = np.asarray(one(images, sample=True))
    np.testing.assert_array_equal(first, other(images, sample=True))
    assert np.abs(first - one(images, sample=True)).max() > 0


def test_gradient_reaches_the_features_the_head_and_the_deviation():
    import tensorflow as tf

    layer = built()
    images = tf.constant(features(2, 4, 4, 3))
    with tf.GradientTape() as tape:
        tape.watch(images)
        loss = tf.reduce_sum(tf.square(layer(images, training=True)))
    watched = [images, *(variable.value for variable in layer.trainable_variables)]
    for gradient in tape.gradient(loss, watched):
        assert np.abs(gradient).max() > 0


def test_deviation_has_a_floor():
    layer = built()
    layer._stddev_scores.bias.assign([-1e4])
    _, stddev = layer.distribution(features(1, 4, 4, 3))
    np.testing.assert_allclose(stddev, 1e-6)


def test_a_head_of_ones_own_is_used_and_saved():
    head = keras.Sequential([keras.layers.Conv2D(4, 3, padding="same", activation="relu"), keras.layers.Conv2D(1, 1)])
    layer = VariationalSpatialAttention(head=head, seed=0)
    images = features(2, 5, 5, 3)
    attention = layer(images)
    np.testing.assert_allclose(attention, reference.sigmoid(head(images)), rtol=1e-5)
    copy = VariationalSpatialAttention.from_config(layer.get_config())
    assert [type(inner).__name__ for inner in copy.head.layers] == ["Conv2D", "Conv2D"]


def test_a_head_that_is_an_ordinary_subclass_is_built_by_a_symbolic_call():
    class Head(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.convolution = keras.layers.Conv2D(1, 3, padding="same")

        def call(self, features):
            return self.convolution(features)

    layer = VariationalSpatialAttention(head=Head())
    assert layer(features(2, 5, 6, 3)).shape == (2, 5, 6, 1)


def test_first_map_is_low_and_higher_where_features_are_active():
    images = np.zeros((1, 8, 8, 3), "float32")
    images[0, 4, 4] = 9.0
    layer = VariationalSpatialAttention()
    layer.build(images.shape)
    mean, _ = layer.distribution(images)
    assert mean[0, 0, 0, 0] < 0.2
    assert mean[0, 4, 4, 0] > mean[0, 0, 0, 0]


def test_batch_norm_in_the_head_sees_training():
    head = keras.Sequential([keras.layers.Conv2D(1, 1), keras.layers.BatchNormalization()])
    layer = VariationalSpatialAttention(head=head)
    layer(features(8, 4, 4, 3) + 5.0)
    before = np.array(head.layers[1].moving_mean)
    layer(features(8, 4, 4, 3) + 5.0, training=True)
    assert np.abs(head.layers[1].moving_mean - before).max() > 0


@pytest.mark.parametrize(
    ("arguments", "shape", "error", "message"),
    [
        ({}, (None, 10), ValueError, r"features.shape=\(None, 10\)"),
        ({}, (None, 4, 4, None), ValueError, "known number of"),
        ({"head": keras.layers.Conv2D(2, 3, padding="same")}, (None, 8, 8, 3), ValueError, r"\(None, 8, 8, 2\)"),
        ({"head": keras.layers.Conv2D(1, 3)}, (None, 8, 8, 3), ValueError, r"\(None, 6, 6, 1\)"),
        ({"head": "conv"}, (None, 8, 8, 3), TypeError, "head='conv'"),
    ],
)
def test_impossible_arguments_are_named(arguments, shape, error, message):
    with pytest.raises(error, match=message):
        VariationalSpatialAttention(**arguments).build(shape)
