"""Training attention towards given maps: with `model.fit`, with a config, and on two devices."""

import dataclasses
import os
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

import aib_tf
from aib_tf import data, losses, training
from aib_tf.models import attach_attention
from aib_tf.training import callbacks, distribution, supervision
from tests.data.windows import windows_of

CLASSES = 4
EAGER = {"run_eagerly": True}


def attached(quantize=False):
    """The AIB classifier of a network of two convolutions, with attention of 6x6 positions."""
    images = keras.Input((16, 16, 1))
    x = keras.layers.Conv2D(4, 3, 3, padding="same", activation="relu", name="first")(images)
    x = keras.layers.Conv2D(4, 3, 2, activation="relu", name="last")(x)
    backbone = keras.Model(images, x, name="mine")
    return attach_attention(backbone, "first", CLASSES, quantize, latent_dim=4, num_anchors=5, seed=0)


def quantized():
    return attached(quantize=True)


def pay_attention():
    """One of "Learn To Pay Attention" with two depths, of 8x8 and 4x4 positions."""
    images = keras.Input((16, 16, 1))
    first = keras.layers.Conv2D(4, 3, 2, padding="same", activation="relu")(images)
    last = keras.layers.Conv2D(6, 3, 2, padding="same", activation="relu")(first)
    features = keras.Model(images, [first, last, keras.layers.GlobalAveragePooling2D()(last)])
    attentions = [aib_tf.layers.PayAttention(), aib_tf.layers.PayAttention()]
    return aib_tf.models.PayAttentionClassifier(features, attentions, [keras.layers.Dense(CLASSES)])


MODELS = pytest.mark.parametrize("make", [attached, quantized, pay_attention])


def batch(count=6):
    """Images, masks of their upper half, and labels; the second image has no mask."""
    images = np.random.default_rng(0).normal(size=(count, 16, 16, 1)).astype("float32")
    masks = np.zeros((count, 16, 16, 1), "uint8")
    masks[:, :8] = 1
    masks[1] = 0
    return images, masks, np.arange(count) % CLASSES


def compiled(model, optimizer="sgd", **arguments):
    model.compile(optimizer, loss=losses.CrossEntropyBits(), **{"jit_compile": False, **arguments})
    return model


def supervised(make, kind="kl", weight=1.0, **arguments):
    model = make()
    model.supervise_attention(kind, weight)
    return compiled(model, **arguments)


def loss_of_attention(model, images, masks, kind="kl"):
    """Of each image, from what `explain` says of it."""
    return np.asarray(losses.attention_loss(model.explain(images)[model.attention_names[-1]], masks, kind))


@pytest.mark.parametrize("kind", losses.ATTENTION_LOSSES)
@MODELS
def test_the_loss_grows_by_the_weighted_loss_of_the_mean_map_and_is_reported_for_images_with_a_map(make, kind):
    images, masks, labels = batch()
    model = supervised(make, kind, weight=3.0, **EAGER)
    values = loss_of_attention(model, images, masks, kind)
    assert values[1] == 0 and values.sum() > 0
    without = model.evaluate(images, labels, verbose=0, return_dict=True)
    with_masks = model.evaluate((images, masks), labels, verbose=0, return_dict=True)
    np.testing.assert_allclose(with_masks["loss"] - without["loss"], 3.0 * values.mean(), rtol=1e-3)
    np.testing.assert_allclose(with_masks["attention_loss"], values.sum() / 5, rtol=1e-4)
    assert without["attention_loss"] == 0


@MODELS
def test_training_brings_attention_to_the_maps_and_leaves_the_classifier_plain(make, tmp_path):
    images, masks, labels = batch()
    model = make()
    before = loss_of_attention(model, images, masks).sum()
    parameters, config = model.count_params(), model.get_config()
    model.supervise_attention("kl", weight=100.0)
    compiled(model, keras.optimizers.Adam(0.01), **EAGER)
    model.fit((images, masks), labels, epochs=30, verbose=0)
    assert loss_of_attention(model, images, masks).sum() < 0.8 * before
    assert model.count_params() == parameters and model.get_config() == config
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(model)
    loaded.run_eagerly = True
    assert "attention_loss" not in loaded.test_on_batch(images, labels, return_dict=True)
    np.testing.assert_allclose(loaded(images), model(images), rtol=1e-5, atol=1e-5)
    loaded.supervise_attention("kl")
    result = loaded.test_on_batch((images, masks), labels, return_dict=True)
    np.testing.assert_allclose(result["attention_loss"], loss_of_attention(model, images, masks).sum() / 5, rtol=1e-4)


def test_the_features_are_computed_once_in_a_step():
    images, masks, labels = batch()
    model = supervised(attached, **EAGER)
    calls, call = [], model.features.call
    model.features.call = lambda *arguments, **options: calls.append(1) or call(*arguments, **options)
    model.train_on_batch((images, masks), labels)
    assert len(calls) == 1


@MODELS
def test_weight_zero_measures_and_changes_no_step(make):
    images, masks, labels = batch()
    plain, measured = compiled(make(), **EAGER), supervised(make, "cc", weight=0.0, **EAGER)
    measured.set_weights(plain.get_weights())
    for _ in range(2):
        plain.train_on_batch(images, labels)
        results = measured.train_on_batch((images, masks), labels, return_dict=True)
    assert results["attention_loss"] > 0
    for one, other in zip(plain.get_weights(), measured.get_weights(), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def test_another_kind_after_training_replaces_the_first():
    images, masks, labels = batch()
    model = supervised(attached, "kl")
    model.test_on_batch((images, masks), labels)  # traced
    model.supervise_attention("cosine")
    result = model.test_on_batch((images, masks), labels, return_dict=True)
    expected = loss_of_attention(model, images, masks, "cosine").sum() / 5
    np.testing.assert_allclose(result["attention_loss"], expected, rtol=1e-4)


@pytest.mark.parametrize(("policy", "xla"), [("mixed_bfloat16", True), ("mixed_float16", False)])
def test_mixed_precision_and_xla_train_with_a_loss_in_float32(policy, xla):
    images, masks, labels = batch()
    keras.config.set_dtype_policy(policy)
    try:
        model = quantized()
    finally:
        keras.config.set_dtype_policy("float32")
    model.supervise_attention("kl", 0.5)
    compiled(model, jit_compile=xla)
    model((images, masks))
    assert {loss.dtype for loss in model.losses} == {tf.float32} and len(model.losses) == 4
    result = model.train_on_batch((images, masks), labels, return_dict=True)
    assert all(np.isfinite(value) for value in result.values())
    model.reset_metrics()
    result = model.test_on_batch((images, masks), labels, return_dict=True)
    expected = loss_of_attention(model, images, masks).sum() / 5
    np.testing.assert_allclose(result["attention_loss"], expected, rtol=1e-3)


def test_two_replicas_take_the_steps_of_one_device():
    images, masks, labels = batch(16)
    models, histories, start = [], [], None
    for strategy in (tf.distribute.get_strategy(), distribution.strategy("mirrored")):
        with strategy.scope():
            models.append(supervised(pay_attention, weight=2.0, optimizer=training.SGD(0.01)))
        start = start or models[-1].get_weights()
        models[-1].set_weights(start)
        batches = tf.data.Dataset.from_tensors(((images, masks), labels)).repeat(3)
        histories.append(models[-1].fit(batches, shuffle=False, verbose=0).history)
    for name in ("loss", "attention_loss"):
        np.testing.assert_allclose(histories[1][name], histories[0][name], rtol=1e-4, err_msg=name)
    moved = [np.abs(new - old).max() for new, old in zip(models[0].get_weights(), start, strict=True)]
    assert max(moved) > 1e-3
    for one, two in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)


def test_an_empty_batch_costs_nothing():
    images = keras.Input((6, 5, 1))
    model = attach_attention(keras.Model(images, keras.layers.Rescaling(2.0, name="map")(images)), "map", CLASSES)
    model.supervise_attention()
    model((np.zeros((0, 6, 5, 1), "float32"), np.zeros((0, 6, 5), "float32")), training=True)
    assert [float(loss) for loss in model.losses] == [0.0, 0.0]


def test_what_does_not_fit_is_named():
    images, masks, labels = batch()
    plain = aib_tf.models.build("vgg", (32, 32, 1), CLASSES, width=0.02)
    with pytest.raises(ValueError, match=r"Only a model with attention.*Received: model='vgg'"):
        plain.supervise_attention()
    with pytest.raises(ValueError, match="Received: kind='mse'"):
        attached().supervise_attention("mse")
    with pytest.raises(ValueError, match="Received: weight=-1"):
        attached().supervise_attention("kl", -1)
    with pytest.raises(ValueError, match="Call `supervise_attention` before"):
        attached()((images, masks))
    with pytest.raises(ValueError, match="a pair of images and maps"):
        supervised(attached)((images, masks, masks))
    with pytest.raises(ValueError, match="training needs pairs of images and maps"):
        supervised(pay_attention, **EAGER).train_on_batch(images, labels)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_the_layers_give_their_map_in_a_functional_model(dtype):
    images = keras.Input((6, 5, 3))
    attention, mean = aib_tf.layers.VariationalSpatialAttention(seed=0, dtype=dtype)(images, return_mean=True)
    query = keras.layers.GlobalAveragePooling2D()(images)
    pooled, pay = aib_tf.layers.PayAttention(dtype=dtype)(images, query, return_attention=True)
    model = keras.Model(images, [attention, mean, pooled, pay])
    values = model(np.random.default_rng(0).normal(size=(2, 6, 5, 3)).astype("float32"))
    assert [value.shape for value in values] == [(2, 6, 5, 1), (2, 6, 5, 1), (2, 3), (2, 6, 5)]
    assert [value.dtype for value in values] == [output.dtype for output in model.outputs]
    assert values[1].dtype == values[3].dtype == "float32"
    np.testing.assert_array_equal(values[0], tf.cast(values[1], values[0].dtype))


class TestMaps:
    """What of a data set becomes the maps."""

    def test_masks_come_before_boxes_and_without_either_there_is_an_error(self):
        assert supervision.maps_field(data.get("cluttered_digits"), augment=True) == "mask"
        assert supervision.maps_field(data.get("caltech_birds2011"), augment=True) == "mask"
        birds = dataclasses.replace(data.get("caltech_birds2011"), fields=("image", "label", "bbox"))
        assert supervision.maps_field(birds, augment=False) == "bbox"
        with pytest.raises(ValueError, match=r"has neither.*Received: dataset=cifar10"):
            supervision.maps_field(data.get("cifar10"), augment=False)
        with pytest.raises(ValueError, match=r"cuts the images.*Received: augment=True"):
            supervision.maps_field(birds, augment=True)

    def test_a_box_is_the_pixels_whose_centres_it_holds(self):
        boxes = np.float32([[0, 0, 1, 1], [0.25, 0.5, 0.75, 1], [0.5, 0.5, 0.5, 0.5], [0.2, 0, 1, 0.3]])
        maps = supervision.boxes_to_maps(tf.constant(boxes), (4, 2))
        assert maps.shape == (4, 4, 2, 1) and maps.dtype == tf.uint8
        expected = [[1] * 8, [0, 0, 0, 1, 0, 1, 0, 0], [0] * 8, [0, 0, 1, 0, 1, 0, 1, 0]]
        np.testing.assert_array_equal(tf.reshape(maps, (4, 8)), expected)

    def test_boxes_become_maps_as_large_as_the_images(self):
        batches = tf.data.Dataset.from_tensors(
            {"image": tf.zeros((2, 6, 4, 3)), "label": [0, 1], "bbox": [[0.0, 0, 1, 1], [0, 0, 0.5, 0.5]]}
        )
        (images, maps), labels = next(iter(supervision.with_maps(batches, "bbox")))
        assert images.shape == (2, 6, 4, 3) and maps.shape == (2, 6, 4, 1) and list(labels) == [0, 1]
        np.testing.assert_array_equal(tf.reduce_sum(maps, axis=(1, 2, 3)), [24, 6])

    @pytest.mark.parametrize("memory_limit", [data.pipeline.MEMORY_LIMIT, 0])
    def test_augmentation_moves_a_mask_with_its_image(self, data_dir, tiny, monkeypatch, memory_limit):
        name = tiny().data.name
        # The table augments digits by nothing; here they are cropped and mirrored.
        info = dataclasses.replace(data.get(name), crop_padding=4, horizontal_flip=True)
        monkeypatch.setattr(data.datasets, "get", lambda *_: info)
        arguments = {"seed": 0, "epochs": 1, "data_dir": data_dir, "memory_limit": memory_limit}
        batches = [
            data.training_batches(name, "train", 16, fields=("image", "mask"), augment=augment, **arguments)
            for augment in (True, False)
        ]
        moved = 0
        for after, before in zip(*batches, strict=True):
            after, before = (np.concatenate([b["image"], b["mask"]], axis=-1)[:4] for b in (after, before))
            for pair, whole in zip(after, before, strict=True):
                assert any(np.array_equal(pair, window) for window in windows_of(whole, 4, flip=True))
                moved += not np.array_equal(pair[..., 1], whole[..., 1])
        assert moved > 20  # of 24


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """A finished run of one epoch; read only."""
    config = aib_tf.config.Config.from_flat(
        {
            "dataset": "cluttered_digits/train96_validation40_test40_seed0",
            "data_dir": data_dir,
            "model": "vgg_aib",
            "width": 0.02,
            "latent_dim": 8,
            "batch_size": 16,
            "epochs": 1,
            "attention_supervision": "kl",
            "attention_supervision_weight": 2.0,
        }
    )
    folder = tmp_path_factory.mktemp("runs") / "supervised"
    return folder, config, training.fit(config, folder, verbose=0)


def test_the_history_of_a_run_has_the_loss_of_both_splits_with_the_masks(finished):
    folder, config, history = finished
    assert history["attention_loss"][0] > 0
    fields = ("image", "label", "mask")
    values = next(iter(data.load(config.data.name, "validation", 40, config.data.data_dir, fields=fields)))
    expected = loss_of_attention(training.Run(folder).load_best(), values["image"], values["mask"]).mean()
    np.testing.assert_allclose(history["val_attention_loss"], [expected], rtol=1e-3)
    assert history["val_loss"][0] > history["val_cross_entropy_bits"][0] + 2.0 * expected


def test_a_stopped_run_continues_as_if_it_had_not_been(finished, tmp_path, monkeypatch):
    _, config, expected = finished
    end_of_batch = callbacks.Recorder.on_train_batch_end

    def stop_in_the_middle(recorder, step, logs=None):
        if int(recorder.model.optimizer.iterations) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        end_of_batch(recorder, step, logs)

    monkeypatch.setattr(callbacks.Recorder, "on_train_batch_end", stop_in_the_middle)
    with pytest.raises(training.TrainingInterrupted, match="at step 3"):
        training.fit(config, tmp_path / "run", verbose=0)
    monkeypatch.undo()
    history = training.fit(config, tmp_path / "run", verbose=0)
    for name in set(expected) - {"seconds"}:
        np.testing.assert_allclose(history[name], expected[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dataset": "cifar10"}, "cifar10 has neither"),
        ({"model": "vgg"}, "Only a model with attention"),
    ],
)
def test_what_cannot_be_supervised_is_refused_before_anything_is_written(tiny, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        training.fit(tiny(attention_supervision="kl", **flags), tmp_path / "run", verbose=0)
    assert not (tmp_path / "run").exists()
