"""Minimal filtering is the same convolution with half the multiplications."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf

from aib_tf.export import winograd
from aib_tf.export.freezing import freeze


def ops_of(function):
    return collections.Counter(node.op for node in function.graph.as_graph_def().node)


def direct(x, kernel, bias, padding):
    """In float64."""
    x, kernel, bias = (np.asarray(each, np.float64) for each in (x, kernel, bias))
    if padding == "SAME":
        x = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    height, width = x.shape[1] - 2, x.shape[2] - 2
    return bias + sum(x[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3))


def test_six_products_make_four_outputs_of_three_taps():
    outputs, taps, tiles = winograd.minimal_filtering()
    assert outputs.shape == (4, 6)
    random = np.random.default_rng(0)
    d, g = random.normal(size=6), random.normal(size=3)
    np.testing.assert_allclose(outputs @ ((taps @ g) * (tiles @ d)), np.correlate(d, g), rtol=0, atol=1e-14)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("height", [3, 4, 5, 8, 9, 10, 11])
def test_a_convolution_is_the_direct_one(padding, height):
    random = np.random.default_rng(height)
    x = tf.constant(random.normal(size=(2, height, 7, 5)), tf.float32)
    kernel, bias = random.normal(size=(3, 3, 5, 4)), random.normal(size=4)
    result = winograd.convolution(x, kernel, bias, padding)
    expected = direct(x, kernel, bias, padding)
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_the_rounding_error_is_small_with_many_channels():
    """Behind a ReLU, with weights as they are initialised, and relative to the root mean square of the result."""
    random = np.random.default_rng(0)
    x = np.maximum(random.normal(size=(1, 16, 16, 256)), 0).astype("float32")
    kernel = (random.normal(size=(3, 3, 256, 128)) * np.sqrt(2 / 9 / 256)).astype("float32")
    expected = direct(x, kernel, np.zeros(128), "SAME")
    result = winograd.convolution(tf.constant(x), kernel, np.zeros(128), "SAME").numpy()
    assert np.sqrt(np.mean((result - expected) ** 2) / np.mean(expected**2)) < 2e-6


@pytest.mark.parametrize(
    ("shape", "kernel_shape", "suitable"),
    [
        ((None, 16, 8, 128), (3, 3, 128, 128), True),
        ((None, 15, 8, 128), (3, 3, 128, 128), False),
        ((None, 16, 8, 64), (3, 3, 64, 128), False),
        ((None, 16, 8, 128), (3, 3, 128, 64), False),
        ((None, 16, 8, 256), (3, 3, 128, 256), False),
        ((None, 16, 8, 128), (1, 3, 128, 128), False),
        ((None, None, 8, 128), (3, 3, 128, 128), False),
        ((None, 65, 9, 128), (3, 3, 128, 128), False),
        ((None, 65, 9, 256), (3, 3, 256, 256), True),
    ],
    ids=["large", "low", "few_inputs", "few_outputs", "groups", "flat", "unknown", "high", "high_and_wide"],
)
def test_what_is_suitable_is_large_and_of_known_size(shape, kernel_shape, suitable):
    assert winograd.is_suitable(shape, kernel_shape) == suitable


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (keras.layers.Conv2D(128, 3, padding="same"), 6),
        (keras.layers.Conv2D(128, 3, padding="valid", use_bias=False, activation="relu"), 6),
        (keras.layers.Conv2D(128, 3, strides=2, padding="same"), 1),
        (keras.layers.Conv2D(128, 3, dilation_rate=2), 1),
        (keras.layers.Conv2D(128, 1), 1),
    ],
    ids=["same", "valid", "strided", "dilated", "small"],
)
def test_a_frozen_function_may_use_it(layer, expected):
    images = keras.Input((18, 9, 128))
    model = keras.Model(images, keras.layers.Rescaling(2.0, offset=1.0)(layer(images)))
    if layer.use_bias:
        layer.bias.assign(np.random.default_rng(1).normal(size=128))
    x = tf.constant(np.random.default_rng(0).normal(size=(3, 18, 9, 128)), tf.float32)
    spec = [tf.TensorSpec((None, 18, 9, 128))]

    def inference(images):
        return model(images, training=False)

    frozen = freeze(inference, spec)
    assert ops_of(frozen)["Conv2D"] == expected
    right = inference(x)
    np.testing.assert_allclose(frozen(x), right, rtol=0, atol=1e-5 * np.max(np.abs(right)))
    assert ops_of(freeze(inference, spec, fast_convolutions=False))["Conv2D"] == 1


def test_a_map_that_others_read_without_its_bias_stays():
    convolution = keras.layers.Conv2D(128, 3, padding="same", use_bias=False)
    images = keras.Input((16, 8, 128))
    maps = convolution(images)
    model = keras.Model(images, [maps, keras.layers.ReLU()(maps + 1.0), maps * maps])
    x = tf.constant(np.random.default_rng(0).normal(size=(2, 16, 8, 128)), tf.float32)
    frozen = freeze(lambda x: model(x), [tf.TensorSpec((None, 16, 8, 128))])
    assert ops_of(frozen)["Conv2D"] == 6
    for result, expected in zip(frozen(x), model(x), strict=True):
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.max(np.abs(expected)))
