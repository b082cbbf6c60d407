import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from aib_tf import maps
from aib_tf.evaluation import attacks
from aib_tf.evaluation.robustness import robustness
from aib_tf.evaluation.subject import Subject, UnavailableError
from aib_tf.layers import AnchorQuantizer, GaussianBottleneck, VariationalSpatialAttention
from aib_tf.models.aib import AIBClassifier

SHAPE = (5, 4, 2)
WEIGHTS = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
# A margin of 0 for medium grey, so that both classes occur.
OFFSET = -WEIGHTS.sum() / 2


class Rounded(keras.layers.Layer):
    """Keeps `levels` levels of each pixel: right for the eye, and without a gradient."""

    def __init__(self, levels=16):
        super().__init__()
        self.levels = levels

    def call(self, images):
        return ops.round(images * self.levels) / self.levels


def linear(*before, scale=1.0, classes=2):
    """Logits 0 and w.x + b, times a scale; any further class is never predicted."""
    dense = keras.layers.Dense(classes)
    model = keras.Sequential([keras.Input(SHAPE), *before, keras.layers.Flatten(), dense])
    kernel, bias = np.zeros((WEIGHTS.size, classes)), np.full(classes, -1e3)
    kernel[:, 1], bias[0], bias[1] = scale * WEIGHTS.ravel(), 0, scale * OFFSET
    dense.set_weights([kernel, bias])
    return model


def margins(pixels):
    return np.sum(pixels.astype(np.float64) * WEIGHTS, axis=(1, 2, 3)) + OFFSET


@pytest.fixture(scope="module")
def pixels():
    """Sixty images in 0..1 of low contrast, so that a few levels matter."""
    return 0.5 + 0.15 * np.random.default_rng(1).uniform(-1, 1, size=(60, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def labels(pixels):
    """The right classes for 54 of them, and the wrong ones for every tenth."""
    found = (margins(pixels) > 0).astype(np.int64)
    found[::10] = 1 - found[::10]
    return found


def batches(images, labels, size=64):
    return [(images[start : start + size], labels[start : start + size]) for start in range(0, len(images), size)]


def worst_correct(pixels, labels, epsilon):
    """Whether the worst image in reach is right: each pixel goes as far as ball and range allow."""
    signs = np.where(labels == 1, 1, -1)
    worst = np.clip(pixels - epsilon / 255 * signs[:, None, None, None] * np.sign(WEIGHTS), 0, 1)
    return signs * margins(worst) > 0


@pytest.mark.parametrize("stddev", [1.0, (0.2, 0.7)])
def test_accuracies_of_a_linear_model_are_those_of_its_worst_images(pixels, labels, stddev):
    # The same classifier of pixels, whose images are normalised channel by channel.
    mean = np.float32([0.4, 0.6])
    stddev = np.broadcast_to(np.float32(stddev), (2,))
    model = keras.Sequential(
        [keras.Input(SHAPE), keras.layers.Rescaling(stddev.tolist(), mean.tolist()), *linear().layers]
    )
    result = robustness(
        Subject(model, mean=mean, stddev=stddev), batches((pixels - mean) / stddev, labels, 25), (8, 0.5, 2, 4), 10
    )
    correct = (margins(pixels) > 0) == labels
    assert result["accuracy_clean"].value == 0.9
    left = []
    for epsilon, label in ((0.5, "0_5"), (2, "2"), (4, "4"), (8, "8")):
        expected = correct & worst_correct(pixels, labels, epsilon)
        np.testing.assert_array_equal(result.per_image[f"correct_pgd_{label}"], expected)
        np.testing.assert_array_equal(result.per_image[f"correct_fgsm_{label}"], expected)
        assert result[f"accuracy_pgd_{label}"].value == pytest.approx(expected.mean())
        assert result[f"accuracy_noise_{label}"].value >= expected.mean()
        left.append(expected.sum())
    assert 54 > left[0] > left[1] > left[2] > left[3] > 0
    assert result["accuracy_pgd_128"].value == 0
    assert result["accuracy_pgd_8"].images == 60
    assert result.details["gradient_check"] == "passed"
    assert result.details["zero_gradient_share"] == 0
    assert result.details["epsilons"] == [0.5, 2, 4, 8]
    assert result.details["gradients"] == "through the means"
    chart = result.charts["accuracy"]
    assert list(chart.lines) == ["PGD", "FGSM", "random noise"]
    assert chart.lines["PGD"].x == [0, 0.5, 2, 4, 8]
    assert chart.lines["PGD"].y == [0.9, *(n / 60 for n in left)]
    assert chart.lines["PGD"].high[1] == result["accuracy_pgd_0_5"].high


def test_random_noise_changes_each_pixel_by_epsilon_either_way(pixels, labels):
    seen = []

    def maps(images):
        seen.append(np.asarray(images))
        return images[..., 0]

    robustness(Subject(linear(), maps=maps), batches(pixels, labels), (2,), 1)
    clean, _, noise = seen
    np.testing.assert_allclose(np.abs(noise - pixels), 2 / 255, atol=1e-6)
    assert abs(np.sign(noise - pixels).mean()) < 0.1
    np.testing.assert_array_equal(clean, pixels)


def test_the_result_depends_on_the_seed_but_not_on_the_batches(pixels, labels):
    # Without a gradient an image stays where it starts.
    subject = Subject(linear(Rounded()), maps=lambda images: images[..., 0])

    def values(size, seed):
        return robustness(subject, batches(pixels, labels, size), (3,), 2, seed=seed).per_image

    whole, parts, other = values(60, 0), values(13, 0), values(60, 1)
    for name, value in whole.items():
        np.testing.assert_array_equal(parts[name], value)
    for attack in ("pgd", "noise"):
        name = f"map_similarity_{attack}_3"
        assert (other[name] != whole[name]).sum() > 40


def test_gradients_that_are_rounded_away_are_called_masked(pixels, labels):
    result = robustness(linear(Rounded()), batches(pixels, labels), (2, 8), 10)
    assert result.details["zero_gradient_share"] == 1
    check = result.details["gradient_check"]
    assert check.startswith("masked gradients: ")
    assert f"PGD leaves {result['accuracy_pgd_128'].value:.1%} correct at 128/255" in check
    assert "the gradient of 100.0% of the images is exactly zero" in check
    assert result["accuracy_pgd_128"].value > 0.05


def test_a_saturated_softmax_is_called_masked(pixels, labels):
    result = robustness(linear(scale=1e5), batches(pixels, labels), (2,), 5)
    assert 0.5 < result.details["zero_gradient_share"] < 1
    assert "is exactly zero" in result.details["gradient_check"]
    assert result["accuracy_pgd_2"].value > worst_correct(pixels, labels, 2).mean()


def test_a_gradient_that_points_the_wrong_way_is_called_masked(pixels, labels):
    @tf.custom_gradient
    def turned(images):
        return tf.identity(images), lambda upstream: -upstream

    class Turned(keras.layers.Layer):
        def call(self, images):
            return turned(images)

    result = robustness(linear(Turned()), batches(pixels, labels), (4,), 10)
    pgd, noise = result["accuracy_pgd_4"].value, result["accuracy_noise_4"].value
    assert noise < pgd - 0.02
    check = result.details["gradient_check"]
    assert f"random noise at 4/255 leaves {noise:.1%} correct, PGD {pgd:.1%}" in check
    assert result.details["zero_gradient_share"] == 0


def test_fgsm_that_beats_pgd_is_called_masked(pixels, labels):
    # Right at the images themselves, where FGSM looks, and blind elsewhere, where PGD goes.
    @tf.custom_gradient
    def fading(images):
        known = tf.reduce_all(tf.abs(images * 255 - tf.round(images * 255)) < 1e-3, axis=(1, 2, 3), keepdims=True)
        return tf.identity(images), lambda upstream: tf.where(known, upstream, tf.zeros_like(upstream))

    class Fading(keras.layers.Layer):
        def call(self, images):
            return fading(images)

    whole = np.round(pixels * 255) / np.float32(255)
    result = robustness(linear(Fading()), batches(whole, labels), (4.5,), 10)
    check = result.details["gradient_check"]
    fgsm, pgd = result["accuracy_fgsm_4_5"].value, result["accuracy_pgd_4_5"].value
    assert f"FGSM at 4.5/255 leaves {fgsm:.1%} correct, PGD {pgd:.1%}" in check
    assert fgsm < pgd - 0.02


def test_attacks_on_the_baseline_that_beat_those_on_the_model_show_masked_gradients(pixels, labels):
    data = batches(pixels, labels)
    subject = Subject(linear(Rounded()), baseline=linear())
    result = robustness(subject, data, (2, 16), 10)
    transfer, pgd = result["accuracy_transfer_16"].value, result["accuracy_pgd_16"].value
    assert transfer < pgd - 0.02
    check = result.details["gradient_check"]
    assert f"PGD leaves {pgd:.1%} correct, gradients of the baseline bring that to {transfer:.1%}" in check
    # Turned around, the model's own gradients leave nothing for others to do.
    result = robustness(Subject(linear(), baseline=linear(Rounded())), data, (2, 4), 10)
    assert result["accuracy_transfer_4"].value == result["accuracy_pgd_4"].value > 0
    assert result.details["gradient_check"] == "passed"


def test_a_baseline_with_other_classes_attacks_nothing(pixels, labels):
    result = robustness(Subject(linear(), baseline=linear(classes=3)), batches(pixels, labels), (2,), 1)
    assert not any("transfer" in name for name in result.metrics)
    assert not any("transfer" in name for name in robustness(linear(), batches(pixels, labels), (2,), 1).metrics)


def test_a_trained_model_falls_to_pgd_and_not_to_noise():
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 200)
    images = random.normal(0.5, 0.05, size=(200, 8, 8, 1)).astype(np.float32)
    images[:, :, :4] += 0.06 * (2 * labels - 1)[:, None, None, None]
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Rescaling(5.0, -2.5),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss)
    model.fit(images, labels, batch_size=50, epochs=8, verbose=0)
    result = robustness(model, batches(images, labels), (4, 32), images=None)
    assert result.images == 200
    assert result["accuracy_clean"].value > 0.95
    assert result["accuracy_noise_32"].value > 0.9
    assert result["accuracy_pgd_4"].value > result["accuracy_pgd_32"].value == 0
    assert result.details["gradient_check"] == "passed"


def test_similarity_of_maps_is_over_the_images_that_are_classified_correctly(pixels, labels):
    subject = Subject(linear(), maps=lambda images: images[..., 0])
    result = robustness(subject, batches(pixels, labels), (4, 8), 10)
    correct = (margins(pixels) > 0) == labels
    for attack in ("pgd", "noise"):
        found = result.per_image[f"map_similarity_{attack}_8"]
        np.testing.assert_array_equal(np.isnan(found), ~correct)
        assert result[f"map_similarity_{attack}_8"].value == pytest.approx(found[correct].mean())
        assert result[f"map_similarity_{attack}_8"].images == 54
    # Images that withstand PGD end in the corner of the ball.
    stands = worst_correct(pixels, labels, 8) & correct
    corner = attacks.fgsm(linear(), pixels, labels, 8 / 255, 0.0, 1.0).numpy()
    expected = maps.cosine_similarity(pixels[..., 0], corner[..., 0])
    np.testing.assert_allclose(result.per_image["map_similarity_pgd_8"][stands], expected[stands], atol=1e-6)
    # Those that broke in the smaller ball are left as they are there.
    broke = ~worst_correct(pixels, labels, 4) & correct
    small, large = (result.per_image[f"map_similarity_pgd_{epsilon}"] for epsilon in (4, 8))
    np.testing.assert_array_equal(small[broke], large[broke])
    assert stands.any() and broke.any()
    assert list(result.charts) == ["accuracy", "map_similarity"]
    assert "map_similarity_pgd_8" not in robustness(linear(), batches(pixels, labels), (8,), 1).metrics


def quantized_model(quantizer):
    keras.utils.set_random_seed(0)
    features = [keras.layers.Rescaling(8.0, -4.0), keras.layers.Conv2D(4, 3, padding="same", activation="relu")]
    return AIBClassifier(
        keras.Sequential([keras.Input(SHAPE), *features]),
        keras.Sequential([keras.Input((5, 4, 4)), keras.layers.Reshape((80,)), keras.layers.Dense(6)]),
        keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)]),
        VariationalSpatialAttention(),
        quantizer,
        GaussianBottleneck(3),
    )


def test_a_quantized_model_is_attacked_without_its_quantizer_too(pixels):
    model = quantized_model(AnchorQuantizer(4))
    labels = np.asarray(model.explain(pixels)["logits"]).argmax(axis=1)
    result = robustness(model, batches(pixels, labels), (8,), 5)
    assert result["accuracy_clean"].value == 1
    assert 0 < result["accuracy_unquantized_8"].value <= result["accuracy_pgd_8"].value < 1
    assert 0 < result["map_similarity_pgd_8"].value < 1
    assert result.details["gradients"] == "through the means"
    assert result.details["gradient_check"] == "passed"


def test_a_quantizer_that_spoils_the_gradient_is_found_out(pixels):
    @tf.custom_gradient
    def spoilt(scores):
        return tf.identity(scores), lambda upstream: -100 * upstream

    class Spoiling(AnchorQuantizer):
        def nearest(self, scores):
            found = super().nearest(scores)
            return found._replace(quantized=spoilt(found.quantized))

    model = quantized_model(Spoiling(4))
    labels = np.asarray(model.explain(pixels)["logits"]).argmax(axis=1)
    result = robustness(model, batches(pixels, labels), (8,), 5)
    other, pgd = result["accuracy_unquantized_8"].value, result["accuracy_pgd_8"].value
    assert other < pgd - 0.02
    expected = f"PGD leaves {pgd:.1%} correct, gradients of the model without its quantizer bring that to {other:.1%}"
    assert expected in result.details["gradient_check"]


def test_gradients_and_predictions_may_be_averaged_over_samples(pixels, monkeypatch):
    model = quantized_model(None)
    labels = np.asarray(model.explain(pixels)["logits"]).argmax(axis=1)
    traced = []

    def explain(images, samples=0):
        traced.append(samples)
        return AIBClassifier.explain(model, images, samples)

    monkeypatch.setattr(model, "explain", explain)
    subject = Subject(model)
    results = [robustness(subject, batches(pixels, labels), (8,), 3, samples=2) for _ in range(2)]
    assert results[0].to_dict() == results[1].to_dict()
    assert results[0].details["gradients"] == "of logits averaged over 2 draws"
    assert results[0]["accuracy_pgd_8"].value < results[0]["accuracy_clean"].value
    # Clean predictions, gradients, PGD twice and attacked predictions are drawn; the maps are the means.
    assert traced.count(2) >= 5 and traced.count(0) == 1


def test_images_are_spread_evenly_up_to_the_limit(pixels, labels):
    result = robustness(linear(), batches(pixels, labels, 25), (2,), 1, images=20)
    whole = robustness(linear(), batches(pixels, labels, 25), (2,), 1, images=None)
    assert (result.images, whole.images) == (20, 60)
    np.testing.assert_array_equal(result.per_image["correct_fgsm_2"], whole.per_image["correct_fgsm_2"][::3])


def test_a_model_that_is_never_right_cannot_be_checked(pixels):
    labels = (margins(pixels) <= 0).astype(np.int64)
    result = robustness(Subject(linear(), maps=lambda images: images[..., 0]), batches(pixels, labels), (2,), 1)
    assert result["accuracy_clean"].value == result["accuracy_pgd_2"].value == result["accuracy_fgsm_2"].value == 0
    assert result.details["gradient_check"] == "not possible: no image is classified correctly as it is"
    assert not any("map" in name for name in result.metrics)
    assert list(result.charts) == ["accuracy"]


def test_without_gradients_the_suite_is_unavailable(fake_model, batched, pixels, labels):
    with pytest.raises(UnavailableError, match="gradients need a Keras model"):
        robustness(fake_model(logits=np.ones((2, 2))), batched([0, 1]))

    class Factorised(keras.layers.Layer):
        def call(self, images):
            return tf.raw_ops.Lu(input=images[:, :4, :, 0])[0]

        def compute_output_shape(self, shape):
            return (shape[0], 4, 4)

    model = keras.Sequential([keras.Input(SHAPE), Factorised(), keras.layers.Flatten(), keras.layers.Dense(2)])
    with pytest.raises(UnavailableError, match="cannot differentiate an operation"):
        robustness(model, batches(pixels, labels), (2,), 1)


def test_images_on_another_scale_than_the_subject_says_are_not_attacked(pixels, labels):
    normalised = (pixels - 0.5) / 0.1
    with pytest.raises(UnavailableError, match=r"Subject\(model, mean=.., stddev=..\). Received: images in -1.5..1.5"):
        robustness(linear(), batches(normalised, labels), (2,), 1)
    result = robustness(Subject(linear(), mean=0.5, stddev=0.1), batches(normalised, labels), (2,), 1)
    assert result.images == 60


def test_what_the_model_does_not_know_or_cannot_say_is_refused(pixels, labels):
    with pytest.raises(ValueError, match=r"classes of the model. Received: label=2"):
        robustness(linear(), batches(pixels, labels + 1), (2,), 1)
    with pytest.raises(ValueError, match="NaN or infinity in 'logits' of 60"):
        robustness(linear(scale=np.nan), batches(pixels, labels), (2,), 1)
    subject = Subject(linear(), maps=lambda images: images[..., 0] * np.nan)
    with pytest.raises(ValueError, match="NaN or infinity in the maps of 60"):
        robustness(subject, batches(pixels, labels), (2,), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilons": ()}, r"There must be an epsilon, each of them once. Received: epsilons=\(\)"),
        ({"epsilons": (1, 2, 1)}, r"each of them once. Received: epsilons=\(1, 2, 1\)"),
        ({"epsilons": (0,)}, r"`epsilons` must be a finite number, more than 0. Received: epsilons=0"),
        ({"epsilons": (256,)}, r"none can change by more. Received: epsilons=256"),
        ({"steps": 0}, r"`steps` must be an integer from 1 up. Received: steps=0"),
        ({"images": 0}, r"`images` must be an integer from 1 up. Received: images=0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        robustness(linear(), [], **options)
