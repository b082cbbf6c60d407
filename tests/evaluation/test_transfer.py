import importlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from aib_tf import data, models
from aib_tf.evaluation import Subject, UnavailableError
from aib_tf.evaluation.transfer import _as_model_takes, _features_of, _folds, _scale, shared_classes, transfer

SIZE = 4


class ColourModel:
    """Explains by a table: the logits of an image are row `first pixel` of it."""

    def __init__(self, table):
        self.table = np.asarray(table, np.float64)
        self.samples = []

    def explain(self, images, samples=0):
        self.samples.append(samples)
        return {"logits": self.table[np.rint(np.asarray(images)[:, 0, 0, 0] * 255).astype(int)]}


def batches_of(images, labels, batch_size=16):
    return [
        {"image": images[start : start + batch_size], "label": np.asarray(labels)[start : start + batch_size]}
        for start in range(0, len(images), batch_size)
    ]


def numbered(count, size=SIZE, channels=1):
    """Images whose first pixel is their number, and whose others are noise."""
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return images


def separable(count=60, classes=3, seed=0):
    """Images of noise, their labels, and a function of two features that tell them apart and a constant one."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    angle = 2 * np.pi * labels / classes
    table = np.stack([np.cos(angle), np.sin(angle), np.full(count, 7.1)], axis=1)
    table[:, :2] = 100 * (table[:, :2] + 0.1 * random.normal(size=(count, 2)))
    return numbered(count), labels, lambda images: table[np.rint(images[:, 0, 0, 0] * 255).astype(int)]


def test_features_that_tell_classes_apart_reach_full_accuracy_and_pixels_of_noise_do_not():
    images, labels, features = separable()
    pair = batches_of(images[:30], labels[:30]), batches_of(images[30:], labels[30:], 7)
    result = transfer(ColourModel(np.zeros((60, 2))), {"noise": pair}, features=features, resamples=200)
    assert result["svm_accuracy_noise"].value == 1
    assert result["pixels_svm_accuracy_noise"].value < 0.8
    assert result["majority_accuracy_noise"].value == pytest.approx(1 / 3)
    assert result.suite == "transfer" and result.images == 30
    assert "zero_shot_accuracy_noise" not in result.metrics
    assert result.details["chance_noise"] == pytest.approx(1 / 3)
    assert result.details["svm_features_noise"] == 3 and result.details["pixels_svm_features_noise"] == 16
    assert result.details["svm_unconverged_fits_noise"] == 0
    np.testing.assert_array_equal(result.per_image["svm_correct_noise"], np.ones(30))
    for estimate in result.metrics.values():
        assert estimate.images == 30 and estimate.low <= estimate.value <= estimate.high
    line = result.charts["cross_validation"].lines["svm_noise"]
    assert line.x == [-4, -3, -2, -1, 0]
    # The smallest C of the best ones.
    assert result.details["svm_c_noise"] == 10.0 ** line.x[int(np.argmax(line.y))]


def test_the_zero_shot_accuracy_worked_out_by_hand():
    # Source classes 0..3. Shared: 0 -> 5, 2 -> 1, 3 -> 1.
    table = [
        [3, 9, 1, 0],  # 9 is of no shared class: 0 wins, target class 5
        [0, 0, 1, 2],  # 3 wins, class 1
        [2, 0, 1, 0],  # 0 wins, class 5
        [0, 0, 4, 0],  # class 4 of the target is not shared
        [0, 0, 4, 5],  # class 1
    ]
    labels = [5, 1, 1, 4, 5]
    images = numbered(5)
    training = batches_of(numbered(6), [0, 1] * 3)
    model = ColourModel(table)
    result = transfer(
        model,
        {"hand": (training, batches_of(images, labels, 2))},
        classes={"hand": {0: 5, 2: 1, 3: 1}},
        features=lambda images: images[..., 0],
        samples=4,
    )
    np.testing.assert_array_equal(result.per_image["zero_shot_correct_hand"], [1, 1, 0, np.nan, 0])
    found = result["zero_shot_accuracy_hand"]
    assert found.value == 0.5 and found.images == 4
    assert result.details["zero_shot_chance_hand"] == 0.5 and result.details["zero_shot_classes_hand"] == 2
    assert set(model.samples) == {4}
    # Labels 4 and 5 were never trained on.
    assert result.details["classes_without_training_images_hand"] == 2
    assert result["svm_accuracy_hand"].value <= 2 / 5


def test_classes_are_shared_by_name_and_by_one_other_name():
    cifar10 = data.get("cifar10").class_names
    stl10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    assert shared_classes(cifar10, stl10) == {0: 0, 1: 2, 2: 1, 3: 3, 4: 4, 5: 5, 7: 6, 8: 8, 9: 9}
    assert {cifar10[source] for source in range(10)} - {
        cifar10[source] for source in shared_classes(cifar10, stl10)
    } == {"frog"}
    assert shared_classes(stl10, cifar10)[2] == 1
    assert shared_classes(["a", "b"], ["b", "c"], {}) == {1: 0}
    with pytest.raises(ValueError, match="share no class"):
        shared_classes(["automobile"], ["car"], {})


def test_features_are_what_the_classifier_reads():
    images = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
    aib = models.build("vgg_aib_qt", (32, 32, 3), 4, width=0.0625, latent_dim=8, seed=0)
    np.testing.assert_allclose(
        _features_of(Subject(aib))(images), aib.explain(images)["latent_mean"], rtol=1e-4, atol=1e-6
    )
    plain = models.build("vgg", (32, 32, 3), 4, width=0.0625, seed=0)
    np.testing.assert_allclose(
        _features_of(Subject(plain))(images), plain.encoder(plain.features(images)), rtol=1e-4, atol=1e-6
    )
    attended = models.build("vgg_att2", (32, 32, 3), 4, width=0.0625, combine="independent", seed=0)
    *local, query = attended.features(images)
    vectors = [layer(each, query) for layer, each in zip(attended.attentions, local, strict=True)]
    np.testing.assert_allclose(
        _features_of(Subject(attended))(images), tf.concat(vectors, axis=1), rtol=1e-4, atol=1e-6
    )


def test_features_of_any_keras_model_are_what_its_last_dense_layer_reads():
    inner_input = keras.Input((5,))
    inner = keras.Model(inner_input, keras.layers.Dense(2, activation="softmax")(inner_input))
    images = keras.Input((2, 2, 1))
    x = keras.layers.Dense(5, activation="tanh", name="hidden")(keras.layers.Flatten()(images))
    model = keras.Model(images, inner(x))
    pictures = np.random.default_rng(0).normal(size=(6, 2, 2, 1)).astype(np.float32)
    expected = keras.Model(images, x)(pictures)
    np.testing.assert_allclose(_features_of(Subject(model, probabilities=True))(pictures), expected, rtol=1e-5)
    convolutional = keras.Sequential([keras.Input((2, 2, 1)), keras.layers.Conv2D(2, 2), keras.layers.Flatten()])
    with pytest.raises(UnavailableError, match="name a function of the features"):
        _features_of(Subject(convolutional))
    with pytest.raises(UnavailableError, match="name a function of the features"):
        _features_of(Subject(ColourModel([[0]])))


def model_of(shape, mean=0.0, stddev=1.0):
    images = keras.Input(shape)
    return Subject(keras.Model(images, keras.layers.Dense(2)(keras.layers.Flatten()(images))), mean=mean, stddev=stddev)


def test_images_become_those_that_the_model_takes():
    grey = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1) * 17
    # The model's own size and channels: only the normalisation.
    found = _as_model_takes(grey, model_of((4, 4, 1), 0.5, 0.25))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, (grey / 255 - 0.5) / 0.25, rtol=1e-5)
    # Grey to colour, each channel by its own numbers.
    found = _as_model_takes(grey, model_of((4, 4, 3), (0.1, 0.2, 0.3), (1, 2, 4)))
    for channel, (mean, stddev) in enumerate(zip((0.1, 0.2, 0.3), (1, 2, 4), strict=True)):
        np.testing.assert_allclose(found[..., channel], (grey[..., 0] / 255 - mean) / stddev, rtol=1e-5, atol=1e-6)
    # Colour to grey.
    colour = np.array([255, 0, 100], np.uint8) * np.ones((1, 4, 4, 1), np.uint8)
    found = _as_model_takes(colour, model_of((4, 4, 1)))
    np.testing.assert_allclose(found, np.full((1, 4, 4, 1), 0.299 + 0.114 * 100 / 255), rtol=1e-5)
    # Another size: a half of each side gives about the mean of 2x2 pixels, and a constant image stays constant.
    found = _as_model_takes(np.repeat(np.repeat(grey, 2, axis=1), 2, axis=2), model_of((4, 4, 1)))
    assert found.shape == (1, 4, 4, 1)
    np.testing.assert_allclose(found.mean(), grey.mean() / 255, atol=1e-5)
    np.testing.assert_allclose(
        _as_model_takes(np.full((2, 9, 5, 1), 51, np.uint8), model_of((4, 4, 1))), 0.2, rtol=1e-5
    )
    # A model of any size takes images as they are.
    assert _as_model_takes(grey, model_of_any_size()).shape == (1, 4, 4, 1)
    with pytest.raises(ValueError, match="4 channels"):
        _as_model_takes(np.zeros((1, 4, 4, 4), np.uint8), model_of((4, 4, 1)))
    with pytest.raises(ValueError, match=r"normalize=False. Received: dtype=float32"):
        _as_model_takes(np.zeros((1, 4, 4, 1), np.float32), model_of((4, 4, 1)))


def model_of_any_size():
    images = keras.Input((None, None, 1))
    return Subject(keras.Model(images, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(images))))


def test_a_model_of_this_library_transfers_to_images_of_another_size_and_colour():
    model = models.build("vgg_aib", (32, 32, 3), 4, width=0.0625, latent_dim=8, seed=0)
    images, labels = numbered(24, size=40), np.arange(24) % 2
    images[labels == 1] //= 4  # dark and bright images, which even random features tell apart
    pair = batches_of(images[:16], labels[:16]), batches_of(images[16:], labels[16:])
    result = transfer(Subject(model, mean=(0.5,) * 3, stddev=(0.25,) * 3), {"grey": pair}, {"grey": {0: 0, 1: 1}})
    assert result.details["svm_features_grey"] == 8
    assert result["pixels_svm_accuracy_grey"].value == 1
    assert result["svm_accuracy_grey"].value > 0.7
    assert list(result.metrics) == [f"{kind}_accuracy_grey" for kind in ("svm", "pixels_svm", "majority", "zero_shot")]


def test_large_images_are_shrunk_and_brought_down_to_principal_components(monkeypatch):
    module = importlib.import_module("aib_tf.evaluation.transfer")
    monkeypatch.setattr(module, "PIXEL_SIDE", 8)
    monkeypatch.setattr(module, "PIXEL_COMPONENTS", 20)
    random = np.random.default_rng(0)
    labels = np.arange(120) % 2
    images = random.integers(0, 100, (120, 20, 18, 1), dtype=np.uint8)
    images[labels == 1, 5:15] += 60
    pair = batches_of(images[:100], labels[:100], 64), batches_of(images[100:], labels[100:])
    result = transfer(ColourModel(np.zeros((256, 2))), {"stripes": pair}, features=lambda images: images, resamples=50)
    assert result.details["pixels_svm_features_stripes"] == 20
    assert result.details["svm_features_stripes"] == 20 * 18
    assert result["pixels_svm_accuracy_stripes"].value == 1 and result["svm_accuracy_stripes"].value == 1
    # With fewer pixels than components there is nothing to bring down.
    monkeypatch.setattr(module, "PIXEL_COMPONENTS", 64)
    result = transfer(ColourModel(np.zeros((256, 2))), {"stripes": pair}, features=lambda images: images, resamples=50)
    assert result.details["pixels_svm_features_stripes"] == 64
    assert result["pixels_svm_accuracy_stripes"].value == 1


def test_rare_classes_are_spread_over_the_folds_as_far_as_they_reach():
    labels = np.array([0] * 23 + [1] * 3 + [2] * 1 + [3] * 10)
    folds = _folds(labels, seed=0)
    assert np.bincount(folds).tolist() == [8, 8, 7, 7, 7]
    for label, largest in ((0, 5), (1, 1), (2, 1), (3, 2)):
        counts = np.bincount(folds[labels == label], minlength=5)
        assert counts.max() == largest and counts.max() - counts.min() <= 1
    assert (_folds(labels, seed=1) != folds).any()
    np.testing.assert_array_equal(_folds(labels, seed=0), folds)


def test_a_class_of_one_image_and_one_without_any_are_no_obstacle():
    images, labels, features = separable()
    chosen = [0, 3, 6, 9, 12, 1]  # five of class 0, one of class 1, none of class 2
    pair = batches_of(images[chosen], labels[chosen]), batches_of(images[30:], labels[30:])
    result = transfer(ColourModel(np.zeros((60, 2))), {"rare": pair}, features=features, resamples=50)
    assert result["svm_accuracy_rare"].value == pytest.approx(2 / 3)
    assert result["majority_accuracy_rare"].value == pytest.approx(1 / 3)
    assert result.details["classes_without_training_images_rare"] == 1
    assert result.details["chance_rare"] == pytest.approx(1 / 3)


def test_constant_features_are_left_at_zero():
    values = np.array([[1.0, 0.1], [3.0, 0.1], [5.0, 0.1]], np.float32)
    mean, stddev = _scale(values)
    np.testing.assert_allclose(mean, [3, 0.1], rtol=1e-6)
    np.testing.assert_allclose(stddev, [np.sqrt(8 / 3), 1])
    images, labels, _ = separable()
    pair = batches_of(images[:30], labels[:30]), batches_of(images[30:], labels[30:])
    result = transfer(
        ColourModel(np.zeros((60, 2))),
        {"constant": pair},
        features=lambda images: np.full((len(images), 2), 0.3),
        resamples=50,
    )
    assert result["svm_accuracy_constant"].value == pytest.approx(1 / 3)


def test_a_fit_that_does_not_converge_is_counted_and_no_warning(monkeypatch):
    monkeypatch.setattr(importlib.import_module("aib_tf.evaluation.transfer"), "MAX_ITERATIONS", 1)
    images, labels, features = separable()
    pair = batches_of(images[:30], labels[:30]), batches_of(images[30:], labels[30:])
    result = transfer(ColourModel(np.zeros((60, 2))), {"hard": pair}, features=features, resamples=50)
    assert result.details["svm_unconverged_fits_hard"] > 0


def test_training_images_are_spread_evenly_and_test_images_are_all_used():
    images, labels, features = separable()
    seen = []

    def watched(batch):
        seen.extend(np.rint(batch[:, 0, 0, 0] * 255).astype(int).tolist())
        return features(batch)

    pair = batches_of(images, labels, 7), batches_of(images[:20], labels[:20])
    result = transfer(
        ColourModel(np.zeros((60, 2))), {"part": pair}, features=watched, training_images=12, resamples=50
    )
    assert seen[:12] == list(range(0, 60, 5))
    assert seen[12:] == list(range(20))
    assert result.details["training_images_part"] == 12 and result.images == 20


def test_several_targets_stand_side_by_side():
    images, labels, features = separable()
    one = batches_of(images[:30], labels[:30]), batches_of(images[30:], labels[30:])
    two = batches_of(images[:20], labels[:20]), batches_of(images[50:], labels[50:])
    result = transfer(ColourModel(np.zeros((60, 2))), {"one": one, "two": two}, features=features, resamples=50)
    assert result.images == 40
    assert result["svm_accuracy_one"].images == 30 and result["svm_accuracy_two"].images == 10
    assert set(result.charts["cross_validation"].lines) == {"svm_one", "pixels_svm_one", "svm_two", "pixels_svm_two"}


def test_bad_input_is_an_error_that_names_it():
    images, labels, features = separable(12)
    model = ColourModel(np.zeros((60, 2)))
    pair = batches_of(images, labels), batches_of(images, labels)

    def call(targets, **options):
        return transfer(model, targets, **{"features": features, **options})

    for nothing in (None, {}):
        with pytest.raises(UnavailableError, match="no target data set was named"):
            call(nothing)
    with pytest.raises(UnavailableError, match="'one' are all of one class"):
        call({"one": (batches_of(images, np.zeros(12, int)), pair[1])})
    with pytest.raises(ValueError, match=r"Received: name='STL-10'"):
        call({"STL-10": pair})
    with pytest.raises(ValueError, match=r"pair .*Received: t=dict"):
        call({"t": {"image": images}})
    with pytest.raises(ValueError, match=r"none of t. Received: name='u'"):
        call({"t": pair}, classes={"u": {0: 0}})
    with pytest.raises(ValueError, match=r"classes\['t'\]={}"):
        call({"t": pair}, classes={"t": {}})
    with pytest.raises(ValueError, match="Received: class=-1"):
        call({"t": pair}, classes={"t": {0: -1}})
    with pytest.raises(ValueError, match=r"0..1, the classes of the model. Received: class=2"):
        call({"t": pair}, classes={"t": {0: 0, 2: 1}})
    with pytest.raises(ValueError, match="No test image of 't' is of a shared class"):
        call({"t": pair}, classes={"t": {0: 7}})
    with pytest.raises(ValueError, match="Received: training_images=0"):
        call({"t": pair}, training_images=0)
    with pytest.raises(ValueError, match=r"shape \(12, ...\)"):
        call({"t": pair}, features=lambda images: np.zeros(3))
    with pytest.raises(ValueError, match="NaN or infinity in the features"):
        call({"t": pair}, features=lambda images: np.full((len(images), 2), np.nan))
    with pytest.raises(ValueError, match=r"training images. Received: images=0"):
        call({"t": ([], pair[1])})
    with pytest.raises(ValueError, match="test images of 't' are none"):
        call({"t": (pair[0], [])})
