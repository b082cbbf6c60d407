import keras
import numpy as np
import pytest
import tensorflow as tf

from aib_tf import evaluation, layers, models
from aib_tf.evaluation import Subject
from tests.evaluation.conftest import make_tiny_model


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype(np.float32)


def dense(activation=None):
    model = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(3, activation)])
    model.set_weights([np.random.default_rng(1).normal(size=weight.shape) for weight in model.get_weights()])
    return model


def test_a_model_of_this_library_is_explained_as_it_is(model, images):
    subject = Subject(model)
    expected = model.explain(images)
    found = subject.explain(images)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(subject.maps(images), found["attention_mean"])
    np.testing.assert_allclose(subject.logits(images), expected["logits"], rtol=1e-4, atol=1e-5)


def test_any_keras_model_is_measured_with_maps_of_another_method():
    images = np.random.default_rng(0).uniform(size=(5, 4, 4, 1)).astype(np.float32)
    boxes = np.tile(np.float32([0, 0, 0.5, 0.5]), (5, 1))
    dataset = [{"image": images, "label": np.array([0, 1, 2, 0, 1]), "bbox": boxes}]
    network = dense()
    corner = np.zeros((5, 2, 2), np.float32)
    corner[:, 0, 0] = 1
    subject = Subject(network, maps=lambda images: corner[: len(images)])
    found = evaluation.localisation(subject, dataset)
    assert found["pointing_box_attention"].value == 1
    predicted = network.predict(images, verbose=0).argmax(axis=1)
    assert evaluation.accuracy(subject, dataset)["top_1"].value == np.mean(predicted == dataset[0]["label"])


def test_a_model_that_ends_in_probabilities_says_so():
    images = np.random.default_rng(0).uniform(size=(5, 4, 4, 1)).astype(np.float32)
    softmax = dense("softmax")
    plain = dense()
    found = Subject(softmax, probabilities=True).explain(images)
    np.testing.assert_allclose(found["probabilities"], tf.nn.softmax(plain(images)), rtol=1e-5)
    dataset = [(images, np.array([0, 1, 2, 0, 1]))]
    for suite in (evaluation.accuracy, evaluation.consistency, evaluation.faithfulness, evaluation.robustness):
        with pytest.raises(ValueError, match=r"probabilities=True.*of sum 1"):
            suite(Subject(softmax, maps=lambda images: images[..., 0]), dataset)
    wrapped = evaluation.accuracy(Subject(softmax, probabilities=True), dataset)
    assert wrapped["nll_nats"].value == pytest.approx(evaluation.accuracy(plain, dataset)["nll_nats"].value, rel=1e-5)


def test_gradients_reach_the_images(model, images):
    subject = Subject(model)
    for samples in (0, 2):
        with tf.GradientTape() as tape:
            pixels = tf.constant(images)
            tape.watch(pixels)
            loss = tf.reduce_sum(subject.logits(pixels, samples)[:, 0])
        gradient = tape.gradient(loss, pixels)
        assert np.abs(gradient).max() > 0


def test_the_scale_of_pixels_is_that_of_the_normalisation():
    subject = Subject(dense(), mean=(0.5, 0.25), stddev=(0.25, 0.5))
    low, high = subject.pixel_range
    np.testing.assert_allclose(low, [-2, -0.5])
    np.testing.assert_allclose(high, [2, 1.5])
    np.testing.assert_allclose(255 * subject.pixel, high - low)
    assert subject.pixels(np.stack([low, high, [0, 0]])).tolist() == [[0, 0], [255, 255], [128, 64]]


def test_noise_begins_anew_for_every_suite(model, images):
    dataset = [(images, np.arange(6) % 3)]
    once, again, other = (evaluation.accuracy(model, dataset, draws=(3,), seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(once.per_image["nll_nats_drawn_3"], again.per_image["nll_nats_drawn_3"])
    assert (once.per_image["nll_nats_drawn_3"] != other.per_image["nll_nats_drawn_3"]).any()


def test_training_goes_on_with_its_own_noise_after_an_evaluation(model, images):
    model.explain(images, samples=1)
    before = [np.array(layer.seed_generator.state) for layer in (model.attention, model.bottleneck)]
    assert all(state[1] > 0 for state in before)
    evaluation.accuracy(model, [(images, np.arange(6) % 3)], draws=(2,), seed=5)
    after = [np.array(layer.seed_generator.state) for layer in (model.attention, model.bottleneck)]
    np.testing.assert_array_equal(before, after)


def test_samples_are_those_that_are_drawn(model, images):
    dataset = [(images, np.arange(6) % 3)]
    plain = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(3)])
    local = models.build("vgg_att2", (32, 32, 1), 3, width=0.05)
    assert evaluation.accuracy(model, dataset, (), samples=2).samples == 2
    assert evaluation.accuracy(plain, dataset, samples=2).samples == 0
    larger = [(np.zeros((2, 32, 32, 1), np.float32), np.array([0, 1]))]
    assert evaluation.accuracy(local, larger, samples=2).samples == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float64])
def test_images_of_any_type_give_the_numbers_of_float32(model, dtype):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1)).astype(dtype)
    subject = Subject(model, stddev=1 / 255)
    found, expected = (
        evaluation.evaluate(
            subject,
            [(each, np.arange(6) % 3)],
            ["faithfulness", "robustness"],
            options={"faithfulness": {"steps": 2}, "robustness": {"steps": 2, "epsilons": (4,)}},
        )
        for each in (images, images.astype(np.float32))
    )
    for name, result in expected.items():
        assert found[name].to_dict() == result.to_dict()


def test_entries_that_are_not_one_for_each_image_do_no_harm(model, images):
    batch = {"image": images, "label": np.arange(6) % 3, "source": "here", "objects": {"kind": np.arange(2)}}
    assert evaluation.bottleneck(model, [batch]).images == 6


def test_grad_cam_is_that_of_the_baseline(model, images):
    plain = make_tiny_model(seed=3)
    own, other = Subject(model).grad_cam(images), Subject(model, baseline=plain).grad_cam(images)
    assert own.shape == other.shape == np.shape(Subject(model).maps(images))
    np.testing.assert_array_equal(other, Subject(plain).grad_cam(images))
    assert np.abs(own - other).max() > 0


def test_what_cannot_be_measured_is_refused(model, images, fake_model):
    with pytest.raises(TypeError, match="model=object"):
        Subject(object())
    with pytest.raises(TypeError, match="not a Subject"):
        Subject(Subject(model))
    with pytest.raises(ValueError, match=r"stddev=0"):
        Subject(model, stddev=0)
    with pytest.raises(evaluation.UnavailableError, match="no attention"):
        Subject(dense()).maps(np.zeros((1, 4, 4, 1), np.float32))
    with pytest.raises(ValueError, match=r"\(6, h, w\).*shape=\(6, 2, 2, 1\)"):
        Subject(model, maps=lambda images: np.zeros((6, 2, 2, 1))).maps(images)
    fake = Subject(fake_model(logits=np.eye(3)))
    assert not fake.differentiable
    with pytest.raises(evaluation.UnavailableError, match="TensorFlow backend"):
        fake.check_differentiable()


def test_a_model_with_an_attention_alone_is_drawn_from(model, images):
    decoder = keras.Sequential([keras.Input((12,)), keras.layers.Dense(3)])
    alone = models.AIBClassifier(model.features, model.encoder, decoder, layers.VariationalSpatialAttention(seed=0))
    found = evaluation.accuracy(alone, [(images, np.arange(6) % 3)], draws=(2,))
    assert "top_1_drawn_2" in found.metrics
