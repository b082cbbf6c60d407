"""The networks' own building blocks, against NumPy and the published wiring."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import aib_tf
from aib_tf.models import cbam
from aib_tf.models.blocks import AdaptiveAveragePooling2D, BatchNormalization, Blocks


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 5, 4), (7, 1, 1, 4), (1, 1, 1, 4)])
def test_running_variance_is_unbiased_and_normalisation_is_not(shape):
    values = np.random.default_rng(0).normal(2.0, 3.0, shape).astype("float32")
    layer = BatchNormalization()
    output = layer(values, training=True)
    axes = tuple(range(len(shape) - 1))
    mean, biased = values.mean(axes), values.var(axes)
    count = values.size // shape[-1]
    np.testing.assert_allclose(output, (values - mean) / np.sqrt(biased + 1e-5), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(layer.moving_mean, 0.1 * mean, rtol=1e-4)
    unbiased = biased * count / max(count - 1, 1)
    np.testing.assert_allclose(layer.moving_variance, 0.9 + 0.1 * unbiased, rtol=1e-5)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_fused_kernel_gives_the_statistics_of_the_plain_way_also_under_xla(jit_compile, monkeypatch):
    values = np.random.default_rng(0).normal(2.0, 3.0, (2, 3, 3, 4)).astype("float32")
    weights = tf.reshape(tf.range(72.0), values.shape)
    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr("aib_tf.models.blocks.fused_batch_normalization", lambda *arguments: None)
        layer = BatchNormalization(gamma_initializer=keras.initializers.RandomUniform(0, 1, seed=1))
        layer.build(values.shape)

        @tf.function(jit_compile=jit_compile)
        def step(layer=layer):
            with tf.GradientTape() as tape:
                tape.watch(x := tf.constant(values))
                output = layer(x, training=True)
                loss = tf.reduce_sum(output * weights)
            return output, *tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])

        results.append([*step(), layer.moving_mean, layer.moving_variance])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("graph", [False, True])
def test_an_empty_batch_leaves_the_statistics_and_has_no_gradient(graph):
    layer = BatchNormalization()
    layer.build((None, 3, 3, 4))

    def step(values):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(values, training=True))
        return tape.gradient(loss, [layer.gamma.value, layer.beta.value])

    if graph:
        step = tf.function(step, input_signature=[tf.TensorSpec((None, 3, 3, 4))])
    np.testing.assert_array_equal(step(tf.zeros((0, 3, 3, 4))), np.zeros((2, 4)))
    np.testing.assert_array_equal(layer.moving_mean, np.zeros(4))
    np.testing.assert_array_equal(layer.moving_variance, np.ones(4))


def test_a_frozen_normalisation_keeps_its_statistics():
    layer = BatchNormalization(trainable=False)
    layer(np.ones((3, 2), "float32"), training=True)
    np.testing.assert_array_equal(layer.moving_variance, [1, 1])


@pytest.mark.parametrize("size", [(14, 14), (2, 3), (7, 9), (3, 3), (1, 5)])
def test_adaptive_pooling_averages_pytorch_s_windows(size):
    values = np.random.default_rng(0).normal(size=(2, *size, 4)).astype("float32")
    expected = np.empty((2, 3, 3, 4))
    for i in range(3):
        for j in range(3):
            rows = slice(i * size[0] // 3, -(-(i + 1) * size[0] // 3))
            columns = slice(j * size[1] // 3, -(-(j + 1) * size[1] // 3))
            expected[:, i, j] = values[:, rows, columns].mean((1, 2))
    layer = AdaptiveAveragePooling2D(3)
    np.testing.assert_allclose(layer(values), expected, rtol=1e-5, atol=1e-6)
    assert layer.compute_output_shape((2, *size, 4)) == (2, 3, 3, 4)


def test_adaptive_pooling_of_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="known size"):
        AdaptiveAveragePooling2D(3)(keras.Input((None, 8, 2)))


@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("vgg", 32, (16, 16, 256)),
        ("wrn_28_2", 32, (16, 16, 64)),
        ("vgg16_cub", 224, (14, 14, 512)),
        ("wrn_50_2_cub", 224, (14, 14, 1024)),
    ],
)
def test_attention_reads_features_of_the_published_shape(name, size, features):
    model = aib_tf.models.build(name, (size, size, 3), 10)
    assert model.features.output_shape == (None, *features)


@pytest.mark.parametrize("name", ["vgg_aib_qt", "wrn_10_1_aib_qt", "vgg16_cub_aib_qt", "wrn_50_2_cub_aib", "vgg_att3"])
@pytest.mark.parametrize("size", [(33, 47), (64, 96)])
def test_other_sizes_than_the_papers_work(name, size):
    model = aib_tf.models.build(name, (*size, 3), 5, width=0.0625, latent_dim=8, seed=0)
    explanation = model.explain(np.zeros((2, *size, 3), "float32"))
    assert explanation["logits"].shape == (2, 5)
    assert np.isfinite(explanation["logits"]).all()


@pytest.mark.parametrize("name", ["vgg_aib_qt", "wrn_10_1_aib_qt", "wrn_50_2_cub", "vgg_att2"])
def test_images_have_their_channels_last_whatever_the_default_of_keras_is(name):
    images = np.random.default_rng(0).normal(size=(2, 64, 32, 3)).astype("float32")
    options = {"classes": 5, "width": 0.0625, "latent_dim": 8, "initializers": "released", "seed": 0}
    expected = aib_tf.models.build(name, images.shape[1:], **options)(images)
    keras.config.set_image_data_format("channels_first")
    try:
        model = aib_tf.models.build(name, images.shape[1:], **options)
    finally:
        keras.config.set_image_data_format("channels_last")
    np.testing.assert_allclose(model(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vgg", 31, "needs 32x32 pixels or more. Received: input_shape=\\(31, 31, 3\\)"),
        ("vgg16_cub", 15, "needs 16x16"),
        ("wrn_50_2_cub", 31, "needs 32x32"),
        ("wrn_10_1", 3, "needs 4x4"),
        ("vgg_att3", 31, "needs 32x32"),
        ("wrn_27_10", 32, "6 n \\+ 4.*Received: depth=27"),
        ("wrn_4_10", 32, "Received: depth=4"),
        ("wrn_10_0", 32, "Received: name='wrn_10_0'"),
        (["vgg"], 32, "Received: name=\\['vgg'\\]"),
        ("vgg_aib_quantized", 32, "there are vgg, vgg16_cub.*Received: name='vgg_aib_quantized'"),
    ],
)
def test_too_small_images_and_unknown_names_are_refused(name, size, message):
    with pytest.raises(ValueError, match=message):
        aib_tf.models.build(name, (size, size, 3), 10)


def test_latent_dimensions_are_those_of_each_network_s_paper_unless_given():
    for name, expected in (("vgg_aib", 256), ("wrn_10_1_aib", 512)):
        assert aib_tf.models.build(name, (32, 32, 3), 10, width=0.1).bottleneck.latent_dim == expected
    assert aib_tf.models.build("wrn_10_1_aib", (32, 32, 3), 10, latent_dim=7).bottleneck.latent_dim == 7


def test_released_initial_values_have_uniform_scales_and_a_random_head():
    models = {
        kind: aib_tf.models.build("vgg_aib", (32, 32, 3), 10, initializers=kind, seed=0)
        for kind in ("default", "released")
    }
    scales = {kind: np.asarray(model.features.get_layer("block3_norm1").gamma) for kind, model in models.items()}
    np.testing.assert_array_equal(scales["default"], np.ones(256))
    assert 0 <= scales["released"].min() < 0.1 < 0.9 < scales["released"].max() <= 1
    heads = {kind: np.asarray(model.attention._scores.kernel) for kind, model in models.items()}
    assert np.unique(heads["default"]).size == 1
    bound = np.sqrt(3 * 2 / ((256 * 9 + 9) / 2))  # Xavier with gain sqrt(2)
    assert 0.9 * bound < np.abs(heads["released"]).max() <= bound


def test_wide_resnet_starts_with_he_s_deviation_by_fan_out():
    model = aib_tf.models.build("wrn_10_4", (32, 32, 3), 10, seed=0)
    kernel = np.asarray(model.features.get_layer("group2_block1_conv2").kernel)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 128)), rtol=0.02)


def test_dropout_acts_in_training_alone():
    model = aib_tf.models.build("wrn_10_1", (32, 32, 3), 10, dropout=0.5, seed=0)
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype("float32")
    first, second = (np.asarray(model.features(images, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 0.01
    np.testing.assert_array_equal(model.features(images), model.features(images))


def test_cbam_scales_features_by_the_attentions_of_its_equations():
    random = np.random.default_rng(0)
    F = random.normal(size=(2, 9, 8, 5)).astype("float32")
    features = keras.Input(F.shape[1:])
    model = keras.Model(features, cbam.attend(features, Blocks(), "block"))
    weights = {variable.path: random.normal(0, 0.5, variable.shape) for variable in model.trainable_variables}
    for variable in model.trainable_variables:
        variable.assign(weights[variable.path])

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def mlp(x):
        hidden = x @ weights["block_channel_hidden/kernel"] + weights["block_channel_hidden/bias"]
        return np.maximum(hidden, 0) @ weights["block_channel_score/kernel"] + weights["block_channel_score/bias"]

    M_c = sigmoid(mlp(F.mean((1, 2))) + mlp(F.max((1, 2))))[:, None, None]
    attended = F * M_c
    pooled = np.stack([attended.mean(-1), attended.max(-1)], axis=-1)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(pooled, ((0, 0), (3, 3), (3, 3), (0, 0))), (7, 7), (1, 2))
    scores = np.einsum("bhwcij,ijc->bhw", windows, weights["block_spatial_score/kernel"][..., 0])[..., None]
    # At inference, with the statistics that a normalisation starts with.
    scores = scores / np.sqrt(1 + 1e-5) * weights["block_spatial_norm/gamma"] + weights["block_spatial_norm/beta"]
    np.testing.assert_allclose(model(F), attended * sigmoid(scores), rtol=1e-4, atol=1e-5)


def test_cbam_stands_behind_the_five_blocks_of_a_plain_vgg():
    model = aib_tf.models.build("vgg_cbam", (32, 32, 3), 10, width=0.25)
    layers = {layer.name: layer for layer in (*model.features.layers, *model.encoder.layers)}
    shapes = [layers[f"block{number}_spatial_attention"].output.shape[1:] for number in range(1, 6)]
    assert shapes == [(32, 32, 1), (32, 32, 1), (32, 32, 1), (16, 16, 1), (8, 8, 1)]
    assert "block6_spatial_attention" not in layers
    with pytest.raises(ValueError, match="Received: name='vgg_cbam_aib'"):
        aib_tf.models.build("vgg_cbam_aib", (32, 32, 3), 10)
