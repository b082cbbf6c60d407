import numpy as np
import pytest

from aib_tf.evaluation import intervals


def mean_of(values, **options):
    return intervals.estimates({"x": values}, {"x": lambda mean: mean["x"]}, **options)["x"]


def test_the_interval_equals_a_loop_over_the_same_draws():
    values = np.random.default_rng(1).normal(size=50)
    draws = np.random.default_rng(7).integers(0, 50, size=(300, 50))
    means = sorted(values[draw].mean() for draw in draws)
    found = mean_of(values, resamples=300, seed=7)
    assert found.value == pytest.approx(values.mean(), abs=1e-12)
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=1e-12)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=1e-12)
    assert found.images == 50


def test_the_interval_covers_the_true_mean_about_95_times_in_100():
    random = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        found = mean_of(random.normal(3.0, 1.0, size=80), resamples=400, seed=trial)
        held += found.low <= 3.0 <= found.high
    assert 180 <= held <= 199


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(1).normal(size=50)
    assert mean_of(values, seed=3) == mean_of(values, seed=3)
    assert mean_of(values, seed=3).low != mean_of(values, seed=4).low


def test_draws_in_several_pieces_equal_draws_in_one(monkeypatch):
    values = np.random.default_rng(1).normal(size=50)
    whole = mean_of(values, resamples=101)
    monkeypatch.setattr(intervals, "_CHUNK", 50 * 7)
    parts = mean_of(values, resamples=101)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=1e-12)


def test_one_image_gives_an_interval_of_no_width():
    found = mean_of(np.array([0.25]))
    assert (found.value, found.low, found.high, found.images) == (0.25, 0.25, 0.25, 1)


def test_metrics_of_one_call_see_the_same_draws():
    values = np.random.default_rng(1).normal(size=(30, 2))
    found = intervals.estimates(
        {"x": values, "y": values[:, 0]},
        {"difference": lambda mean: mean["x"][:, 0] - mean["y"]},
    )["difference"]
    assert (found.low, found.high) == pytest.approx((0, 0), abs=1e-12)


@pytest.mark.parametrize(
    ("terms", "options", "message"),
    [
        ({"x": []}, {}, "images=0"),
        ({"x": [1.0], "y": [1.0, 2.0]}, {}, "same images"),
        ({"x": [1.0]}, {"resamples": 0}, "resamples=0"),
        ({"x": [1.0]}, {"seed": -1}, "seed=-1"),
    ],
)
def test_an_interval_that_cannot_be_drawn_is_refused(terms, options, message):
    with pytest.raises(ValueError, match=message):
        intervals.estimates(terms, {"x": lambda mean: mean["x"]}, **options)
