"""Attention on models that are not ours."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import aib_tf
from aib_tf.models import attach_attention


def residual_backbone(pooling=False):
    """A small network with a shortcut, whose layers inside the block are no places to cut."""
    images = keras.Input((16, 20, 3))
    x = keras.layers.Conv2D(8, 3, 2, padding="same", name="stem")(images)
    y = keras.layers.Conv2D(8, 3, padding="same", name="block_conv1")(x)
    y = keras.layers.BatchNormalization(name="block_norm1")(y)
    x = keras.layers.Add(name="block_add")([x, y])
    x = keras.layers.Conv2D(12, 3, 2, padding="same", activation="relu", name="top")(x)
    if pooling:
        x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(images, x, name="mine")


def images(count=3):
    return np.random.default_rng(0).normal(size=(count, 16, 20, 3)).astype("float32")


@pytest.mark.parametrize("pooling", [False, True])
@pytest.mark.parametrize(("layer", "map_size"), [("stem", (8, 10)), ("block_add", (8, 10)), ("top", (4, 5))])
def test_attention_has_the_size_of_the_layer_and_the_model_trains(layer, map_size, pooling):
    model = attach_attention(residual_backbone(pooling), layer, classes=4, quantize=True, latent_dim=6, seed=0)
    assert model.explain(images())["attention_mean"].shape == (3, *map_size)
    model.compile("sgd", loss=aib_tf.losses.CrossEntropyBits(), jit_compile=False)
    before = [np.array(value) for value in model.trainable_weights]
    model.fit(images(), np.arange(3), verbose=0)
    assert all(not np.array_equal(a, b) for a, b in zip(model.trainable_weights, before, strict=True))


def test_the_backbone_gives_its_weights_and_stays_as_it_is():
    backbone = residual_backbone()
    before = [np.array(value) for value in backbone.get_weights()]
    model = attach_attention(backbone, "block_add", classes=4, seed=0)
    features = keras.Model(backbone.inputs[0], backbone.get_layer("block_add").output)
    np.testing.assert_allclose(model.features(images()), features(images()), rtol=1e-6)
    model.compile("sgd", loss=aib_tf.losses.CrossEntropyBits(), jit_compile=False)
    model.fit(images(), np.arange(3), verbose=0)
    for now, then in zip(backbone.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    attach_attention(backbone, "stem", classes=2)  # once more, elsewhere


def test_the_whole_is_the_backbone_with_modulated_features():
    """With attention at 0 everywhere, F + F A = F: the encoder sees what the backbone gives."""
    backbone = residual_backbone(pooling=True)
    head = keras.layers.Conv2D(1, 1, bias_initializer=keras.initializers.Constant(-200.0), kernel_initializer="zeros")
    model = attach_attention(backbone, "block_add", classes=4, head=head, seed=0)
    code = model.bottleneck.distribution(backbone(images()))[0]
    np.testing.assert_allclose(model.explain(images())["latent_mean"], code, rtol=1e-5, atol=1e-6)


def test_applications_of_keras_work():
    backbone = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, include_top=False, weights=None)
    model = attach_attention(backbone, "block_6_expand_relu", classes=5, seed=0)
    assert model.name == f"{backbone.name}_attention"
    logits = model(np.zeros((2, 32, 32, 3), "float32"))
    assert logits.shape == (2, 5)


def bare_operations(x):
    y = keras.layers.Conv2D(8, 3, padding="same", name="a")(x)
    y = keras.ops.relu(y) + 1.0
    y = keras.layers.Conv2D(8, 3, padding="same", name="b")(y) * 0.5 + y
    return keras.layers.Conv2D(8, 3, name="c")(y)


def nested(x):
    inner = keras.Sequential([keras.Input((16, 20, 3)), keras.layers.Conv2D(8, 3, name="inner")], name="b")
    return keras.layers.Conv2D(8, 3, name="c")(inner(x))


def normalized(x):
    layer = keras.layers.Normalization()
    layer.adapt(3 * images() + 1)
    return keras.layers.Conv2D(8, 3, name="c")(keras.layers.Conv2D(8, 3, name="b")(layer(x)))


@pytest.mark.parametrize("body", [bare_operations, nested, normalized])
def test_backbones_of_all_kinds_keep_what_they_compute(body, tmp_path):
    x = keras.Input((16, 20, 3))
    backbone = keras.Model(x, body(x), name="mine")
    layer = "a" if body is bare_operations else "b"
    model = attach_attention(backbone, layer, classes=4, seed=0)
    pooled = np.asarray(backbone(images())).mean((1, 2))
    np.testing.assert_allclose(model.encoder(model.features(images())), pooled, rtol=1e-4, atol=1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(images()), model(images()), rtol=1e-5, atol=1e-6)


def test_a_layer_at_work_on_both_sides_is_no_place_to_cut():
    x = keras.Input((16, 20, 3))
    shared = keras.layers.Conv2D(3, 3, padding="same", name="shared")
    y = keras.layers.Conv2D(3, 3, padding="same", name="between")(shared(x))
    backbone = keras.Model(x, keras.layers.Conv2D(4, 3, name="last")(shared(y)))
    with pytest.raises(ValueError, match=r"would do: shared, last\."):
        attach_attention(backbone, "between", classes=4)
    attach_attention(backbone, "shared", classes=4)  # its second work


def test_a_backbone_of_unknown_size_and_of_another_precision_works():
    x = keras.Input((None, None, 3))
    y = keras.layers.Conv2D(8, 3, dtype="mixed_float16", name="a")(x)
    backbone = keras.Model(x, keras.layers.Conv2D(8, 3, dtype="mixed_float16", name="b")(y))
    model = attach_attention(backbone, "a", classes=4, seed=0)
    assert model.explain(images(), samples=2)["attention"].shape == (2, 3, 14, 18)
    assert model.explain(images()[:, :10])["attention_mean"].shape == (3, 8, 18)


def test_samples_of_an_unknown_size_can_be_traced():
    x = keras.Input((None, None, 3))
    y = keras.layers.Conv2D(8, 3, name="a")(x)
    model = attach_attention(keras.Model(x, keras.layers.Conv2D(8, 3, name="b")(y)), "a", classes=4, seed=0)
    signature = [tf.TensorSpec((None, None, None, 3))]
    explain = tf.function(lambda pictures: model.explain(pictures, samples=2), input_signature=signature)
    assert explain(images())["attention"].shape == (2, 3, 14, 18)


def test_sequential_models_work():
    backbone = keras.Sequential(
        [keras.Input((16, 20, 3)), keras.layers.Conv2D(4, 3, name="a"), keras.layers.Conv2D(5, 3, name="b")]
    )
    assert attach_attention(backbone, "a", classes=4)(images()).shape == (3, 4)
    assert attach_attention(backbone, "b", classes=4)(images()).shape == (3, 4)


@pytest.mark.parametrize("samples", [0, 3])
def test_an_empty_batch_has_an_empty_explanation(samples):
    x = keras.Input((6, 5, 1))
    backbone = keras.Model(x, keras.layers.Rescaling(2.0, name="map")(x))
    model = attach_attention(backbone, "map", classes=4, quantize=True)
    explanation = model.explain(np.zeros((0, 6, 5, 1), "float32"), samples)
    assert explanation["logits"].shape == (0, 4)
    assert explanation["attention_quantized"].shape == (max(samples, 1), 0, 6, 5)


def test_a_map_is_averaged_over_its_positions_whatever_the_default_of_keras_is():
    backbone = residual_backbone()
    keras.config.set_image_data_format("channels_first")
    try:
        model = attach_attention(backbone, "stem", classes=4)
    finally:
        keras.config.set_image_data_format("channels_last")
    pooled = np.asarray(backbone(images())).mean((1, 2))
    np.testing.assert_allclose(model.encoder(model.features(images())), pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("block_ad", "near names are block_add.* Received: layer='block_ad'"),
        ("xyz", "the last ones are .*Received: layer='xyz'"),
        ("block_norm1", "Paths lead around 'block_norm1'.*would do: stem, block_add, top"),
        ("pool", r"gives no map.*Received: layer='pool'"),
    ],
)
def test_a_layer_that_is_not_there_or_that_attention_would_miss_is_named_with_others(layer, message):
    with pytest.raises(ValueError, match=message):
        attach_attention(residual_backbone(pooling=True), layer, classes=4)


def test_other_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"functional or sequential.*Received: backbone=<"):
        attach_attention(keras.layers.Dense(3), "a", classes=4)
    inputs = [keras.Input((8, 8, 1)), keras.Input((8, 8, 1))]
    two = keras.Model(inputs, [keras.layers.ReLU()(x) for x in inputs])
    with pytest.raises(ValueError, match="2 inputs, 2 outputs"):
        attach_attention(two, "a", classes=4)
    with pytest.raises(ValueError, match="Received: classes=1"):
        attach_attention(residual_backbone(), "stem", classes=1)
    with pytest.raises(TypeError, match=r"latent_dim.*Received: width=2"):
        attach_attention(residual_backbone(), "stem", classes=4, width=2)
