import keras
import numpy as np
import pytest
from scipy import stats

from aib_tf import maps, models
from aib_tf.evaluation import Subject, UnavailableError
from aib_tf.evaluation.faithfulness import RandomisedCopy, blur, faithfulness, spearman
from aib_tf.maps import cosine_similarity as cosine

# Channel 0 holds the picture, channel 1 the number of the image, which a blur does not change.
SIZE = 8


class PixelModel:
    """Class 0 has the probability 0.2 and 0.3 more for each bright pixel; or weights of pixels decide."""

    def __init__(self, weights=None):
        self.weights = weights
        self.calls = []

    def explain(self, images, samples=0):
        images = np.asarray(images, np.float64)
        self.calls.append((len(images), samples))
        if self.weights is None:
            share = 0.2 + 0.3 * (images[..., 0] > 0.5).sum(axis=(1, 2))
        else:
            share = 1 / (1 + np.exp(-(images[..., 0] * self.weights).sum(axis=(1, 2))))
        return {"logits": np.log(np.stack([share, 1 - share], axis=1))}


def numbered(pictures):
    pictures = np.asarray(pictures, np.float32)
    numbers = np.broadcast_to(np.arange(len(pictures), dtype=np.float32)[:, None, None], pictures.shape)
    return np.stack([pictures, numbers], axis=-1)


def batches_of(images, batch_size=64):
    return [
        {"image": images[start : start + batch_size], "label": np.zeros(len(images[start : start + batch_size]), int)}
        for start in range(0, len(images), batch_size)
    ]


def subject_of(table, weights=None):
    """A pixel model whose maps are looked up by the number of the image."""
    table = np.asarray(table, np.float64)
    return Subject(PixelModel(weights), maps=lambda images: table[images[:, 0, 0, 1].astype(int)])


def two_bright_pixels():
    picture = np.zeros((1, SIZE, SIZE))
    picture[0, 1, 1] = picture[0, 6, 5] = 1
    return picture


def test_areas_worked_out_by_hand():
    places = np.full(SIZE * SIZE, -1.0).reshape(SIZE, SIZE)
    # In falling order of the map one bright pixel has place 10, the other one place 40.
    rest = iter(number for number in range(SIZE * SIZE) if number not in (10, 40))
    for y in range(SIZE):
        for x in range(SIZE):
            places[y, x] = {(1, 1): 10, (6, 5): 40}.get((y, x), -1)
            if places[y, x] < 0:
                places[y, x] = next(rest)
    images = numbered(two_bright_pixels())
    assert blur(images)[..., 0].max() < 0.5  # No pixel is bright when it is blurred.
    result = faithfulness(subject_of(-places[None]), batches_of(images), steps=4)
    np.testing.assert_allclose(result.per_image["insertion_curve_attention"], [[0.2, 0.5, 0.5, 0.8, 0.8]])
    np.testing.assert_allclose(result.per_image["deletion_curve_attention"], [[0.8, 0.5, 0.5, 0.2, 0.2]])
    assert result["insertion_attention"].value == pytest.approx((0.35 + 0.5 + 0.65 + 0.8) / 4)
    assert result["deletion_attention"].value == pytest.approx((0.65 + 0.5 + 0.35 + 0.2) / 4)
    assert result["probability_original"].value == pytest.approx(0.8)
    assert result["probability_blurred"].value == pytest.approx(0.2)


def slow_curves(weights, image, order, steps):
    """Insertion and deletion of one image in an order of its pixels, pixel by pixel; their areas last."""
    blurred = blur(image[None])[0]
    curves = {}
    for kind, before, after in (("insertion", blurred, image), ("deletion", image, blurred)):
        curve, shares = [], []
        for step in range(steps + 1):
            mixed = before.copy()
            count = round(step / steps * len(order))
            for y, x in order[:count]:
                mixed[y, x] = after[y, x]
            score = float((mixed[..., 0].astype(np.float64) * weights).sum())
            full = float((image[..., 0].astype(np.float64) * weights).sum())
            curve.append(1 / (1 + np.exp(-score if full > 0 else score)))
            shares.append(count / len(order))
        area = sum((curve[i] + curve[i + 1]) / 2 * (shares[i + 1] - shares[i]) for i in range(steps))
        curves[kind] = curve, area
    return curves


def test_curves_and_areas_equal_plain_loops():
    random = np.random.default_rng(0)
    weights = random.normal(size=(SIZE, SIZE))
    images = numbered(random.normal(size=(5, SIZE, SIZE)))
    table = random.normal(size=(5, 4, 4))
    result = faithfulness(subject_of(table, weights), batches_of(images, 3), steps=7)
    for number, image in enumerate(images):
        enlarged = maps.upsample(table[number], SIZE, SIZE)
        pixels = [(y, x) for y in range(SIZE) for x in range(SIZE)]
        order = sorted(pixels, key=lambda pixel: -enlarged[pixel])
        for kind, (curve, area) in slow_curves(weights, image, order, 7).items():
            np.testing.assert_allclose(result.per_image[f"{kind}_curve_attention"][number], curve, rtol=1e-5)
            assert result.per_image[f"{kind}_attention"][number] == pytest.approx(area, rel=1e-5)
    for kind in ("insertion", "deletion"):
        assert result[f"{kind}_attention"].value == pytest.approx(result.per_image[f"{kind}_attention"].mean())
        line = result.charts[kind].lines["attention"]
        np.testing.assert_allclose(line.x, np.arange(8) / 7)
        np.testing.assert_allclose(line.y, result.per_image[f"{kind}_curve_attention"].mean(axis=0))
        assert all(low <= y <= high for low, y, high in zip(line.low, line.y, line.high, strict=True))
    assert list(result.metrics) == [
        f"{kind}_{name}" for kind in ("insertion", "deletion") for name in ("attention", "centred", "uniform")
    ] + ["probability_original", "probability_blurred"]


def test_a_constant_map_gives_the_numbers_of_the_uniform_one():
    random = np.random.default_rng(1)
    images = numbered(random.normal(size=(6, SIZE, SIZE)))
    weights = random.normal(size=(SIZE, SIZE))
    result = faithfulness(subject_of(np.full((6, 2, 2), 0.3), weights), batches_of(images))
    for kind in ("insertion", "deletion"):
        np.testing.assert_array_equal(
            result.per_image[f"{kind}_curve_attention"], result.per_image[f"{kind}_curve_uniform"]
        )
        np.testing.assert_allclose(result.per_image[f"{kind}_attention"], result.per_image[f"{kind}_uniform"])
    np.testing.assert_allclose(result.per_image["insertion_uniform"], result.per_image["deletion_uniform"])
    assert result.details["constant_maps_attention"] == 6


def test_equal_pixels_come_at_random_and_not_from_the_top():
    # Bright pixels in the first row only: in row order half a step would show them all.
    pictures = np.zeros((40, SIZE, SIZE))
    pictures[:, 0, [1, 6]] = 1
    result = faithfulness(subject_of(np.zeros((40, 1, 1))), batches_of(numbered(pictures)), steps=4)
    curve = result.per_image["insertion_curve_attention"].mean(axis=0)
    # Each of the two is shown with the share of the pixels.
    np.testing.assert_allclose(curve, 0.2 + 0.6 * np.array([0, 0.25, 0.5, 0.75, 1]), atol=0.1)
    assert len(np.unique(result.per_image["insertion_attention"])) > 3


def test_numbers_do_not_depend_on_how_images_are_batched():
    random = np.random.default_rng(2)
    images = numbered(random.normal(size=(7, SIZE, SIZE)))
    subject = subject_of(random.integers(0, 3, size=(7, 4, 4)), random.normal(size=(SIZE, SIZE)))
    found = [faithfulness(subject, batches_of(images, size)).per_image for size in (7, 3)]
    for name in found[0]:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-9)


def test_ends_of_the_curves_are_asked_for_once():
    images = numbered(np.random.default_rng(3).normal(size=(2, SIZE, SIZE)))
    subject = subject_of(np.random.default_rng(4).normal(size=(2, SIZE, SIZE)), np.ones((SIZE, SIZE)))
    faithfulness(subject, batches_of(images), steps=20, samples=3)
    # The images, their blurred form, and 19 states of 2 curves of 2 maps and of 1 random order.
    assert sum(count for count, _ in subject.model.calls) == 2 * (1 + 1 + 19 * 5)
    assert {samples for _, samples in subject.model.calls} == {3}


@pytest.mark.parametrize("steps", [1, 100])
def test_one_step_and_more_steps_than_pixels_are_areas_of_the_same_curve(steps):
    images = numbered(two_bright_pixels())
    falling = -np.arange(SIZE * SIZE).reshape(1, SIZE, SIZE)
    result = faithfulness(subject_of(falling), batches_of(images), steps=steps)
    # One step: from 0.2 to 0.8. One pixel at a time: the bright ones have the places 9 and 53 of 64.
    expected = 0.5 if steps == 1 else (0.2 * 9 + 0.35 + 0.5 * 43 + 0.65 + 0.8 * 10) / 64
    assert result["insertion_attention"].value == pytest.approx(expected)


def test_a_blur_keeps_constants_and_averages_by_a_gaussian():
    image = np.random.default_rng(0).normal(size=(1, 6, 10, 2)).astype(np.float32)
    np.testing.assert_allclose(blur(np.full((2, 5, 7, 1), 0.3, np.float32)), 0.3, rtol=1e-6)
    found = blur(image, 0.2)
    assert found.dtype == np.float32 and found.shape == image.shape
    for y, x in ((0, 0), (3, 4), (5, 9)):
        weights = np.array(
            [[np.exp(-0.5 * (((i - y) / 1.2) ** 2 + ((j - x) / 2.0) ** 2)) for j in range(10)] for i in range(6)]
        )
        expected = (image[0] * weights[..., None]).sum(axis=(0, 1)) / weights.sum()
        np.testing.assert_allclose(found[0, y, x], expected, rtol=1e-4, atol=1e-6)


def test_similarities_worked_out_by_hand():
    left = np.array([[[3.0, 4.0]], [[1.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]], [[2.0, 2.0]]])
    right = np.array([[[4.0, 3.0]], [[-2.0, 0.0]], [[0.0, 0.0]], [[1.0, 2.0]], [[5.0, 5.0]]])
    np.testing.assert_allclose(cosine(left, right), [24 / 25, -1, 1, 0, 1])
    np.testing.assert_allclose(spearman(left, right), [-1, -1, 1, 0, 1])


def test_rank_correlation_equals_scipy_on_maps_with_ties():
    random = np.random.default_rng(0)
    left, right = random.integers(0, 4, size=(2, 20, 5, 6))
    expected = [stats.spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(left, right, strict=True)]
    np.testing.assert_allclose(spearman(left, right), expected, rtol=1e-12)


@keras.saving.register_keras_serializable(package="test_faithfulness")
class Stubborn(keras.Model):
    """A classifier whose attention is how bright the image is, whatever its weights are."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(2, name="dense")
        self.build((None, SIZE, SIZE, 2))

    def build(self, input_shape):
        self.dense.build((None, SIZE))

    def call(self, images, training=None):
        return self.dense(keras.ops.mean(images, axis=(2, 3)))

    def explain(self, images, samples=0):
        return {"logits": self(images), "attention_mean": images[..., 0]}


def small_network():
    """Two convolutions with batch normalisation, and a nested head."""
    head_input = keras.Input((4, 4, 6))
    head = keras.Model(
        head_input, keras.layers.Dense(3, name="logits")(keras.layers.Flatten()(head_input)), name="head"
    )
    images = keras.Input((SIZE, SIZE, 2))
    x = keras.layers.BatchNormalization(name="input_norm")(images)
    x = keras.layers.Conv2D(5, 3, padding="same", name="conv1")(x)
    x = keras.layers.BatchNormalization(name="norm1")(x)
    x = keras.layers.DepthwiseConv2D(3, padding="same", activation="relu", name="conv2")(x)
    x = keras.layers.MaxPooling2D(name="pool")(x)
    x = keras.layers.Conv2D(6, 1, name="conv3")(x)
    return keras.Model(images, head(x))


@pytest.fixture
def network():
    keras.utils.set_random_seed(0)
    model = small_network()
    random = np.random.default_rng(0)
    # Trained, as far as a test can see: no weight is what it began with.
    model.set_weights([random.uniform(0.5, 1.5, weight.shape) for weight in model.get_weights()])
    return model


def weights_of(model):
    return {weight.path: np.array(weight) for weight in model.weights}


def test_layers_become_random_from_the_top_and_normalisations_with_them(network):
    images = numbered(np.random.default_rng(1).normal(size=(3, SIZE, SIZE)))
    copied = RandomisedCopy(network, ["grad_cam"])
    assert copied.groups == ["logits", "conv3", "conv2", "conv1"]
    assert copied.shares == [0, 0.25, 0.5, 0.75, 1]
    trained, seen = weights_of(network), []
    before = Subject(network).grad_cam(images)
    copied.check(images, {"grad_cam": before})
    copied._maps["grad_cam"] = lambda images, classes: seen.append(weights_of(copied._copy)) or before
    curves = copied.similarities(images, {"grad_cam": before})["grad_cam"]
    np.testing.assert_allclose(curves["cosine"], np.ones((3, 5)))
    layers = ["logits", "conv3", "conv2", "conv1"]
    for stage, found in enumerate(seen, start=1):
        for path, value in found.items():
            layer = {"norm1": "conv1", "input_norm": "conv1"}.get(path.split("/")[-2], path.split("/")[-2])
            changed = not np.array_equal(value, trained[path])
            assert changed == (layer in layers[:stage]), (stage, path)
    last = seen[-1]
    for path, value in last.items():
        if path.endswith(("beta", "bias", "moving_mean")):
            np.testing.assert_array_equal(value, np.zeros_like(value))
        elif path.endswith(("gamma", "moving_variance")):
            np.testing.assert_array_equal(value, np.ones_like(value))
    # He et al.: fan-in 96 of the dense layer, 18 of the convolution, 9 of the one that sees one channel at a time.
    for path, fan_in in (("logits/kernel", 96), ("conv1/kernel", 18), ("conv2/kernel", 9)):
        (kernel,) = (value for name, value in last.items() if name.endswith(path))
        assert kernel.std() == pytest.approx(np.sqrt(2 / fan_in), rel=0.25)


def test_the_model_of_the_caller_is_not_touched_even_when_it_is_interrupted(network):
    images = numbered(np.random.default_rng(1).normal(size=(4, SIZE, SIZE)))
    trained = weights_of(network)
    first = faithfulness(network, batches_of(images, 2), steps=2)
    second = faithfulness(network, batches_of(images, 4), steps=2)
    # Random weights are the same in every call, and each batch begins with the trained ones.
    for name in first.per_image:
        np.testing.assert_allclose(first.per_image[name], second.per_image[name], rtol=1e-4, atol=1e-5)

    copied = RandomisedCopy(network, ["grad_cam"])

    def interrupt(images, classes):
        raise KeyboardInterrupt

    copied._maps["grad_cam"] = interrupt
    with pytest.raises(KeyboardInterrupt):
        copied.similarities(images, {"grad_cam": np.ones((4, SIZE, SIZE))})
    for path, value in weights_of(network).items():
        np.testing.assert_array_equal(value, trained[path])


def test_grad_cam_of_a_network_that_becomes_random_changes(network):
    images = numbered(np.random.default_rng(1).normal(size=(20, SIZE, SIZE)))
    result = faithfulness(network, batches_of(images), steps=2)
    curve = result.per_image["spearman_curve_grad_cam"]
    np.testing.assert_array_equal(curve[:, 0], 1)
    np.testing.assert_array_equal(curve[:, -1], result.per_image["randomised_spearman_grad_cam"])
    assert result["randomised_spearman_grad_cam"].high < 0.9
    assert result.details["randomised_verdict_grad_cam"] == "The map changes when all layers are random."
    assert result.details["randomised_layers_grad_cam"] == ["logits", "conv3", "conv2", "conv1"]
    for kind in ("spearman", "cosine"):
        line = result.charts[f"randomised_{kind}"].lines["grad_cam"]
        assert line.x == [0, 0.25, 0.5, 0.75, 1]
        np.testing.assert_allclose(line.y, result.per_image[f"{kind}_curve_grad_cam"].mean(axis=0))
    assert {f"insertion_{name}" for name in ("grad_cam", "centred", "uniform")} <= set(result.metrics)


@keras.saving.register_keras_serializable(package="test_faithfulness")
class Counting(keras.layers.Layer):
    """Passes on what it gets, and counts its calls even at inference."""

    def build(self, input_shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, inputs):
        self.calls.assign_add(1.0)
        return inputs


@pytest.mark.parametrize("counting", [False, True])
def test_probabilities_of_mixed_images_are_those_of_the_model(network, counting):
    if counting:  # Such a model cannot be turned into a graph of constants.
        network = keras.Model(network.inputs[0], Counting()(network.outputs[0]))
    images = numbered(np.random.default_rng(1).normal(size=(5, SIZE, SIZE)))
    # The trained weights of the fixture are large; a tenth of the logits is no certainty.
    head = network.get_layer("head").get_layer("logits")
    head.set_weights([weight / 100 for weight in head.get_weights()])
    result = faithfulness(network, batches_of(images, 2), steps=2).per_image
    scores = [network(each, training=False) for each in (images, blur(images))]
    original, blurred = (keras.ops.convert_to_numpy(keras.ops.softmax(each)) for each in scores)
    classes = original.argmax(axis=1)
    assert 0.4 < original.max(axis=1).mean() < 0.99
    np.testing.assert_allclose(result["probability_original"], original.max(axis=1), rtol=1e-4)
    np.testing.assert_allclose(result["probability_blurred"], blurred[np.arange(5), classes], rtol=1e-4)


def test_attention_changes_when_a_layer_before_it_does_and_not_earlier(network):
    backbone = keras.Model(network.inputs[0], network.get_layer("conv3").output)
    model = models.attach_attention(backbone, "pool", classes=3, quantize=True, latent_dim=8, seed=0)
    images = numbered(np.random.default_rng(1).normal(size=(6, SIZE, SIZE)))
    result = faithfulness(model, batches_of(images), steps=2)
    groups = result.details["randomised_layers_attention"]
    # Attention reads the pooled second convolution: its own layer is the third from below.
    assert groups[-3:] == ["attention", "conv2", "conv1"]
    curve = result.per_image["cosine_curve_attention"]
    np.testing.assert_allclose(curve[:, :-3], 1, atol=1e-5)
    assert (curve[:, -3] < 0.99).any()
    # The gradient reads the layers behind it as well.
    assert (result.per_image["cosine_curve_grad_cam"][:, 1] < 0.999).any()


def test_a_map_that_no_weight_changes_is_said_to_explain_nothing():
    images = numbered(np.random.default_rng(1).normal(size=(5, SIZE, SIZE)))
    model = Stubborn()
    subject = Subject(model, baseline=small_network())
    result = faithfulness(subject, batches_of(images), steps=2)
    assert result["randomised_spearman_attention"].low == pytest.approx(1)
    assert "explains nothing that the model has learned" in result.details["randomised_verdict_attention"]
    # The Grad-CAM beside it is that of the baseline, whose layers it is that become random.
    assert result.details["randomised_layers_attention"] == ["dense"]
    assert result.details["randomised_layers_grad_cam"] == ["logits", "conv3", "conv2", "conv1"]
    assert result.charts["randomised_spearman"].lines["attention"].x == [0, 1]


def test_what_cannot_be_copied_is_left_out_with_a_reason(network):
    class Closed(keras.Model):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.build((None, SIZE, SIZE, 2))

        def build(self, input_shape):
            pass

        def call(self, images, training=None):
            return self.inner(images, training=training)

    images = numbered(np.random.default_rng(1).normal(size=(3, SIZE, SIZE)))
    subject = Subject(Closed(network), maps=lambda images: images[..., 0])
    result = faithfulness(subject, batches_of(images), steps=2)
    assert result.details["randomised_left_out_attention"].startswith("its maps come from a function")
    assert result.details["randomised_left_out_grad_cam"].startswith("the model cannot be copied (")
    assert not any(name.startswith("randomised_") for name in (*result.metrics, *result.charts))
    assert {"insertion_attention", "insertion_grad_cam"} <= set(result.metrics)


def test_a_copy_that_gives_other_maps_is_not_trusted(network):
    images = numbered(np.random.default_rng(1).normal(size=(2, SIZE, SIZE)))
    copied = RandomisedCopy(network, ["grad_cam"])
    with pytest.raises(ValueError, match="its copy gives other maps"):
        copied.check(images, {"grad_cam": np.random.default_rng(0).normal(size=(2, 4, 4))})
    with pytest.raises(ValueError, match="it has no kernels"):
        RandomisedCopy(keras.Sequential([keras.Input((2, 2, 1)), keras.layers.GlobalAveragePooling2D()]), [])


def test_bad_options_and_models_without_maps_are_errors():
    images = numbered(two_bright_pixels())
    with pytest.raises(ValueError, match="Received: steps=0"):
        faithfulness(subject_of(np.zeros((1, 2, 2))), batches_of(images), steps=0)
    with pytest.raises(ValueError, match="Received: images=0"):
        faithfulness(subject_of(np.zeros((1, 2, 2))), batches_of(images), images=0)
    model = PixelModel()
    model.attention_names = ()
    with pytest.raises(UnavailableError):
        faithfulness(model, batches_of(images))


def test_no_more_images_are_looked_at_than_asked_for():
    images = numbered(np.random.default_rng(0).normal(size=(9, SIZE, SIZE)))
    subject = subject_of(np.random.default_rng(0).normal(size=(9, 2, 2)), np.ones((SIZE, SIZE)))
    assert faithfulness(subject, batches_of(images, 4), steps=2, images=5).images == 5
    assert faithfulness(subject, batches_of(images, 4), steps=2, images=None).images == 9


def test_logits_of_mixed_images_that_are_no_numbers_are_an_error():
    images = numbered(two_bright_pixels())
    subject = subject_of(np.zeros((1, 2, 2)))
    explain = subject.model.explain

    def broken(images, samples=0):
        logits = explain(images, samples)["logits"]
        return {"logits": np.where((np.asarray(images)[..., 0] > 0.5).sum() == 2, logits, np.nan)}

    subject.model.explain = broken
    with pytest.raises(ValueError, match=r"partly blurred images. Received: images=0..0"):
        faithfulness(subject, batches_of(images))
