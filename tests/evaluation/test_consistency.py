import numpy as np
import pytest

from aib_tf.evaluation import alterations, suite
from aib_tf.evaluation.consistency import Consistency, consistency
from aib_tf.evaluation.subject import Subject, UnavailableError
from aib_tf.maps import cosine_similarity


class Looker:
    """Class 1 where the right half is the brighter one; the attention is the picture, two pixels in one."""

    def __init__(self, attention=None):
        self.attention = attention or (lambda images: images.reshape(len(images), -1, 2, images.shape[2]).mean(axis=2))

    def explain(self, images, samples=0):
        half = images.shape[2] // 2
        margins = images[:, :, half:].mean(axis=(1, 2, 3)) - images[:, :, :half].mean(axis=(1, 2, 3))
        return {
            "logits": np.stack([np.zeros_like(margins), margins], axis=1),
            "attention_mean": self.attention(images[..., 0]),
        }


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((21, 12, 10, 1)).astype(np.float32)


def batches(images, size=64):
    labels = np.zeros(len(images), int)
    return [(images[start : start + size], labels[start : start + size]) for start in range(0, len(images), size)]


def angle(first, second):
    first, second = first.ravel().astype(float), second.ravel().astype(float)
    return first @ second / np.sqrt((first @ first) * (second @ second))


def measured(values, thresholds=(0.85, 0.9, 0.95)):
    """What the suite makes of values per image of one map."""
    kind = Consistency(Subject(Looker()), thresholds=thresholds)
    kind._zero_maps = {"attention": 0}
    values = {name: np.asarray(value) for name, value in values.items()}
    values.setdefault("similarity_unrelated_attention", np.full(len(values["kept_digit"]), np.nan))
    return kind.summarise(values, 500, 0)


def test_the_cosine_of_known_maps():
    first = np.array([[[3.0, 4.0]], [[1.0, 0.0]], [[1.0, 2.0]], [[1.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    second = np.array([[[4.0, 3.0]], [[0.0, 7.0]], [[-2.0, -4.0]], [[1.0, 0.0]], [[0.0, 0.0]], [[0.1, 0.0]]])
    expected = [24 / 25, 0, -1, 0.5**0.5, 1, 0]
    np.testing.assert_allclose(cosine_similarity(first, second), expected, atol=1e-12)
    np.testing.assert_allclose(cosine_similarity(second, first), expected, atol=1e-12)
    # Neither very small nor very large maps leave the range of numbers.
    np.testing.assert_allclose(cosine_similarity(1e-200 * first, 1e200 * second), expected, atol=1e-12)
    assert cosine_similarity(first, first).max() <= 1
    with pytest.raises(ValueError, match=r"one shape. Received: shapes \(6, 1, 2\) and \(2, 6\)"):
        cosine_similarity(first, np.zeros((2, 6)))


def test_every_metric_equals_plain_loops(images):
    windows, radii, thresholds = (3, 5), (2, 4.5), (0.85, 0.975)
    model, unit = Looker(), (0.0, 1.0)
    result = consistency(model, batches(images, 8), windows, radii, thresholds, resamples=10, seed=7)
    everyone = range(len(images))
    altered = {
        "window_3": alterations.recolour_window(images, 3, unit, 7, everyone),
        "window_5": alterations.recolour_window(images, 5, unit, 7, everyone),
        "digit": alterations.paste_digit(images, unit, 7, everyone),
        "low_pass_2": alterations.low_pass(images, 2, unit),
        "low_pass_4_5": alterations.low_pass(images, 4.5, unit),
        "high_pass_2": alterations.high_pass(images, 2, unit),
        "high_pass_4_5": alterations.high_pass(images, 4.5, unit),
    }
    groups = {name: [name] for name in altered}
    groups |= {"spatial": list(altered)[:3], "frequency": list(altered)[3:]}
    before, expected = model.explain(images), {}
    for group, names in groups.items():
        kept, cosines = 0, []
        for name in names:
            after = model.explain(altered[name])
            for k in everyone:
                if np.argmax(after["logits"][k]) == np.argmax(before["logits"][k]):
                    kept += 1
                    cosines.append(angle(before["attention_mean"][k], after["attention_mean"][k]))
        expected[f"kept_{group}"] = kept / len(images) / len(names)
        for threshold, label in zip(thresholds, ("85", "97_5"), strict=True):
            agree = sum(cosine >= threshold for cosine in cosines)
            expected[f"score_{label}_{group}_attention"] = agree / kept
    maps = before["attention_mean"]
    for threshold, label in zip(thresholds, ("85", "97_5"), strict=True):
        agree = [angle(maps[k], maps[k - 1]) >= threshold for k in everyone[1:]]
        expected[f"score_{label}_unrelated_attention"] = np.mean(agree)
    assert {name: estimate.value for name, estimate in result.metrics.items()} == pytest.approx(expected)
    scores = [value for name, value in expected.items() if name.startswith("score")]
    assert 0 < expected["kept_window_5"] < 1 and len({0.0, 1.0} | set(scores)) > 6
    assert result.details["alterations"] == list(altered)
    assert result.details["left_out"] == result.details["without_kept_pairs"] == []
    for estimate in result.metrics.values():
        assert estimate.low <= estimate.value <= estimate.high


def test_the_result_depends_on_the_seed_but_not_on_the_batches(images):
    def values(size, seed):
        return consistency(Looker(), batches(images, size), (4,), (4,), resamples=1, seed=seed).per_image

    whole, parts = values(64, 0), values(5, 0)
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-6)
    other = values(64, 1)
    for name in ("similarity_window_4_attention", "similarity_digit_attention"):
        assert not np.array_equal(other[name], whole[name], equal_nan=True)
    np.testing.assert_array_equal(other["similarity_low_pass_4_attention"], whole["similarity_low_pass_4_attention"])


def test_a_map_that_ignores_the_image_scores_one_everywhere(images):
    model = Looker(attention=lambda images: np.ones((len(images), 3, 3)))
    result = consistency(model, batches(images), windows=(4,), radii=(4,), resamples=20)
    for name, estimate in result.metrics.items():
        if name.startswith("score"):
            assert (estimate.value, estimate.low, estimate.high) == (1, 1, 1), name
    assert {name for name in result.metrics if "unrelated" in name} == {
        f"score_{label}_unrelated_attention" for label in (85, 90, 95)
    }
    assert result.details["score_uniform"] == result.details["score_centred"] == 1


def test_only_kept_pairs_count_in_the_score():
    summary = measured(
        {
            "kept_digit": [True, True, True, False],
            "similarity_digit_attention": [0.96, 0.9, 0.2, np.nan],
            "kept_low_pass_4": [False, False, True, False],
            "similarity_low_pass_4_attention": [np.nan, np.nan, 0.99, np.nan],
            "kept_high_pass_4": [True, True, True, True],
            "similarity_high_pass_4_attention": [0.1, 0.1, 0.1, 0.91],
        }
    )
    found = {name: estimate.value for name, estimate in summary.metrics.items()}
    assert found["kept_digit"] == found["kept_spatial"] == 0.75
    assert found["score_85_digit_attention"] == pytest.approx(2 / 3)
    assert found["score_90_digit_attention"] == pytest.approx(2 / 3)  # the threshold itself counts
    assert found["score_95_digit_attention"] == pytest.approx(1 / 3)
    assert found["score_90_low_pass_4_attention"] == 1
    # Pairs, not alterations, have equal weight: 2 of 5 at 0.9, 1 of 5 at 0.95.
    assert found["kept_frequency"] == 5 / 8
    assert found["score_90_frequency_attention"] == pytest.approx(2 / 5)
    assert found["score_95_frequency_attention"] == pytest.approx(1 / 5)
    # Many draws hold no pair of the low pass: they count as the value.
    estimate = summary.metrics["score_90_low_pass_4_attention"]
    assert (estimate.low, estimate.high) == (1, 1)
    assert 0 <= summary.metrics["score_95_digit_attention"].low < 1 / 3


def test_an_alteration_without_kept_pairs_has_no_score():
    summary = measured(
        {
            "kept_digit": [True, False],
            "similarity_digit_attention": [0.9, np.nan],
            "kept_high_pass_4": [False, False],
            "similarity_high_pass_4_attention": [np.nan, np.nan],
        },
        thresholds=(0.5,),
    )
    assert summary.metrics["kept_high_pass_4"].value == 0
    assert set(summary.metrics) == {
        "kept_digit",
        "kept_spatial",
        "kept_high_pass_4",
        "kept_frequency",
        "score_50_digit_attention",
        "score_50_spatial_attention",
        "score_50_unrelated_attention",
    }
    assert summary.details["without_kept_pairs"] == ["high_pass_4", "frequency"]
    assert list(summary.charts) == ["high_pass"]
    assert list(summary.charts["high_pass"].lines) == ["kept pairs"]


def test_charts_show_the_middle_threshold_against_window_and_radius(images):
    result = consistency(Looker(), batches(images), windows=(5, 2, 3), radii=(4, 1), resamples=20)
    assert list(result.charts) == ["window", "low_pass", "high_pass"]
    chart = result.charts["window"]
    assert "0.9" in chart.y_label and "pixels" in chart.x_label
    assert chart.lines["attention"].x == [2, 3, 5]
    assert chart.lines["attention"].y == [result[f"score_90_window_{w}_attention"].value for w in (2, 3, 5)]
    assert chart.lines["kept pairs"].low == [result[f"kept_window_{w}"].low for w in (2, 3, 5)]
    assert result.charts["high_pass"].lines["kept pairs"].x == [1, 4]


def test_what_does_not_fit_into_the_images_is_left_out_by_name(images):
    result = consistency(Looker(), batches(images[:, :4]), windows=(4, 5, 16), radii=(), resamples=5)
    assert result.details["alterations"] == ["window_4"]
    assert result.details["left_out"] == [
        "window_5: larger than images of 4 x 10",
        "window_16: larger than images of 4 x 10",
        "digit: larger than images of 4 x 10",
    ]
    assert result.charts["window"].lines["kept pairs"].x == [4]
    assert not any("frequency" in name for name in result.metrics)


def test_one_image_has_a_score_but_no_unrelated_one(images):
    result = consistency(Looker(lambda images: images**0), batches(images[:1]), (2,), (16,), resamples=5)
    assert result["score_85_low_pass_16_attention"].value == 1
    assert not any("unrelated" in name for name in result.metrics)


def test_maps_of_zeros_are_counted(images):
    model = Looker(lambda images: np.where(images[:, :1, :1] < 0.5, 0, images))
    result = consistency(model, batches(images, 8), (2,), (2,), resamples=5)
    zeros = images[:, 0, 0, 0] < 0.5
    assert 0 < zeros.sum() < 21
    assert result.details["zero_maps_attention"] == zeros.sum()
    # A neighbour of a map of zeros is one as well (1), or is not similar (0).
    both, one = zeros[1:] & zeros[:-1], zeros[1:] ^ zeros[:-1]
    np.testing.assert_array_equal(result.per_image["similarity_unrelated_attention"][1:][both], 1)
    np.testing.assert_array_equal(result.per_image["similarity_unrelated_attention"][1:][one], 0)


def test_grad_cam_stands_beside_the_maps_of_any_keras_model(images):
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((12, 10, 1)),
            keras.layers.Conv2D(4, 3, activation="relu", name="features"),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )
    subject = Subject(model, maps=lambda images: np.abs(np.asarray(images)[..., 0] - 0.5), mean=0.5, stddev=0.25)
    normalised = (images - 0.5) / 0.25
    result = consistency(subject, batches(normalised, 8), (5,), (3,), resamples=5)
    changed = alterations.low_pass(normalised, 3, subject.pixel_range)
    kept = model.predict(normalised, verbose=0).argmax(1) == model.predict(changed, verbose=0).argmax(1)
    assert 0 < kept.sum() < 21
    for name, expected in (
        ("grad_cam", cosine_similarity(subject.grad_cam(normalised), subject.grad_cam(changed))),
        ("attention", [angle(abs(a - 0.5), abs(b - 0.5)) for a, b in zip(normalised, changed, strict=True)]),
    ):
        found = result.per_image[f"similarity_low_pass_3_{name}"]
        np.testing.assert_allclose(found, np.where(kept, expected, np.nan), atol=1e-4)
        agree = found[kept] >= 0.9
        assert result[f"score_90_low_pass_3_{name}"].value == pytest.approx(agree.mean())
    assert "zero_maps_grad_cam" in result.details


def test_nan_in_the_map_of_an_altered_image_is_an_error(images):
    # Only the high pass makes an image so dark.
    def attention(images):
        return np.where(images.mean(axis=(1, 2), keepdims=True) < 0.3, np.nan, images)

    model = Looker(attention)
    consistency(model, batches(images), (2,), (), resamples=1)
    with pytest.raises(ValueError, match="NaN or infinity in the maps of"):
        consistency(model, batches(images), (2,), (1,), resamples=1)


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan])
def test_images_on_another_scale_than_the_subject_says_are_not_altered(images, value):
    images = images.copy()
    images[7, 3, 3] = value
    with pytest.raises(UnavailableError, match="not on the scale of the subject"):
        consistency(Looker(), batches(images))


def test_a_model_without_maps_and_gradients_is_named_as_such(fake_model, batched):
    model = fake_model(logits=np.ones((1, 2)))
    model.attention_names = ()
    with pytest.raises(UnavailableError, match="gradients need a Keras model"):
        consistency(model, batched([0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": (0,)}, r"`windows` must be an integer from 1 up. Received: windows=0"),
        ({"windows": (4, 4)}, r"Each of `windows` may be there once. Received: windows=\[4, 4\]"),
        ({"radii": (-1,)}, r"`radii` must be a finite number, 0 or more. Received: radii=-1"),
        ({"thresholds": ()}, r"There must be a threshold"),
        ({"thresholds": (1,)}, r"must lie between 0 and 1. Received: thresholds=1"),
        ({"thresholds": (0.9, 0.9)}, r"Each of `thresholds` may be there once"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        suite.run(Looker(), [], Consistency, options)
