"""The metrics give pysaliency's values, values worked out by hand, and defined results where pysaliency has none."""

import functools
import math
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from aib_tf.evaluation import saliency_metrics
from aib_tf.evaluation.saliency_metrics import FIXATION_METRICS, REFERENCE_METRICS, Fixations, measure

METRICS = REFERENCE_METRICS + FIXATION_METRICS
CASES = ("random", "ties", "repeated", "negative", "peaked", "edges")


@pytest.fixture
def eagerly():
    """Where a handful of numbers is not worth a compiled program."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@functools.cache
def pysaliency():
    """The arrays that make_pysaliency_values.py wrote."""
    with np.load(pathlib.Path(__file__).with_name("pysaliency_values.npz")) as file:
        return dict(file)


def case(name, dtype):
    """Maps, references, fixations, and the values of pysaliency."""
    values = pysaliency()
    maps, references = values[f"{name}/maps"], values[f"{name}/references"]
    fixations = Fixations.from_points(values[f"{name}/points"], *maps.shape[1:])
    expected = {metric: values[f"{name}/{metric}"] for metric in METRICS}
    return maps.astype(dtype), references.astype(dtype), fixations, expected


def check(found, expected):
    assert list(found) == list(METRICS)
    for metric, values in found.items():
        np.testing.assert_allclose(values, expected[metric], rtol=1e-5, atol=1e-5, err_msg=metric)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CASES)
def test_every_metric_equals_pysaliency(name, dtype):
    *arguments, expected = case(name, dtype)
    found = measure(*arguments)
    assert {value.dtype.as_numpy_dtype for value in found.values()} == {dtype}
    check(found, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CASES)
def test_sorting_for_many_fixations_equals_pysaliency_as_well(name, dtype, monkeypatch):
    monkeypatch.setattr(saliency_metrics, "_MOST_COMPARED", 0)
    *arguments, expected = case(name, dtype)
    check(measure(*arguments), expected)


def test_the_committed_values_cover_what_is_not_defined():
    edges = {metric: np.isnan(pysaliency()[f"edges/{metric}"]) for metric in METRICS}
    # Constant references; no fixations; every pixel fixated.
    assert np.flatnonzero(edges["cc"]).tolist() == [3, 4, 5, 6]
    assert np.flatnonzero(edges["nss"]).tolist() == [5, 6]
    assert np.flatnonzero(edges["auc_judd"]).tolist() == [5, 6, 7]
    assert np.flatnonzero(edges["shuffled_auc"]).tolist() == [5, 6]
    assert not edges["sim"].any() and not edges["kl_nats"].any()
    assert str(pysaliency()["versions"][0]).startswith("pysaliency 0.2.22")


# ------------------------------------------------------------------------------------------------------- by hand

# A map of 1, 2, 3, 4, with mean 2.5 and variance 1.25, in each of three images.
MAPS = np.broadcast_to(np.float32([[1, 2], [3, 4]]), (3, 2, 2))
# Fixated are 3; 4 twice and 1; 4.
COUNTS = np.array([[[0, 0], [1, 0]], [[1, 0], [0, 2]], [[0, 0], [0, 1]]])


def test_correlation_similarity_and_divergence_worked_out_by_hand(eagerly):
    references = np.float32([[[1, 1], [1, 5]], [[4, 3], [2, 1]], [[0, 0], [0, 9]]])
    # Centred, the map is -1.5, -0.5, 0.5, 1.5, and the first reference -1, -1, -1, 3: 6 / sqrt(5 * 12).
    # The last one, centred, is a third of that times nine, so its correlation is the same.
    np.testing.assert_allclose(
        saliency_metrics.cc(MAPS, references), [6 / math.sqrt(60), -1, 6 / math.sqrt(60)], rtol=1e-6
    )
    # As densities 0.1, 0.2, 0.3, 0.4 and 1/8, 1/8, 1/8, 5/8.
    np.testing.assert_allclose(saliency_metrics.sim(MAPS, references), [0.75, 0.6, 0.4], rtol=1e-6)
    first = sum(q * math.log(q / p) for p, q in [(0.1, 0.125), (0.2, 0.125), (0.3, 0.125), (0.4, 0.625)])
    second = sum(q * math.log(q / p) for p, q in [(0.1, 0.4), (0.2, 0.3), (0.3, 0.2), (0.4, 0.1)])
    np.testing.assert_allclose(
        saliency_metrics.kl(MAPS, references), [first, second, math.log(1 / 0.4)], rtol=1e-5, atol=1e-6
    )


def test_scanpath_saliency_worked_out_by_hand(eagerly):
    found = saliency_metrics.nss(MAPS, Fixations.from_counts(COUNTS))
    deviation = math.sqrt(1.25)
    np.testing.assert_allclose(found, [0.5 / deviation, (1.5 + 1.5 - 1.5) / 3 / deviation, 1.5 / deviation], rtol=1e-6)


def test_auc_judd_worked_out_by_hand(eagerly):
    found = saliency_metrics.auc_judd(MAPS, Fixations.from_counts(COUNTS))
    # Fixated is 3, not 1, 2, 4: from (0, 0) to (1/3, 1) to (1, 1). Fixated are 4, 4, 1, not 2, 3: from (0, 0) to
    # (0, 2/3) to (1, 1). The last is perfect.
    np.testing.assert_allclose(found, [1 / 6 + 2 / 3, (2 / 3 + 1) / 2, 1], rtol=1e-6)


def test_shuffled_auc_worked_out_by_hand(eagerly):
    fixations = Fixations.from_counts(COUNTS)
    # 3 against 4, 4, 1, 4; 4 twice and 1 against 3, 4; 4 against 3, 4, 4, 1.
    expected = [1 / 4, (1.5 + 1.5 + 0) / 6, (1 + 0.5 + 0.5 + 1) / 4]
    np.testing.assert_allclose(saliency_metrics.shuffled_auc(MAPS, fixations), expected, rtol=1e-6)
    # And against 2 of an earlier image, three times.
    earlier = np.array([[0, 3], [0, 0]])
    expected = [(1 + 3) / 7, (1.5 + 1.5 + 3 + 3 + 0) / 15, (3 + 3) / 7]
    np.testing.assert_allclose(saliency_metrics.shuffled_auc(MAPS, fixations, earlier), expected, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------ properties


def test_the_scale_of_a_map_does_not_matter_down_to_tiny_and_up_to_huge_values():
    maps, references, fixations, _ = case("random", np.float32)
    expected = measure(maps, references, fixations)
    for factor in (1e-30, 1e30):
        found = measure(maps * np.float32(factor), references / np.float32(factor), fixations)
        for metric in METRICS:
            np.testing.assert_allclose(found[metric], expected[metric], rtol=1e-4, atol=1e-5, err_msg=metric)


def test_a_map_with_nan_or_infinity_scores_nan_and_leaves_the_others_alone():
    maps, references, fixations, expected = case("random", np.float32)
    for value in (np.nan, np.inf, -np.inf):
        spoiled = maps.copy()
        spoiled[3, 2, 5] = value
        for metric, values in measure(spoiled, references, fixations).items():
            assert np.flatnonzero(np.isnan(values)).tolist() == [3], metric
            np.testing.assert_allclose(np.delete(values, 3), np.delete(expected[metric], 3), rtol=1e-5, atol=1e-5)


def test_a_constant_map_is_at_chance_whatever_its_value(eagerly):
    _, references, fixations, _ = case("random", np.float32)
    # The mean of these many 0.1 is not 0.1 in floating point.
    for value in (0.1, -0.7, 0.0):
        found = measure(np.full(references.shape, value, np.float32), references, fixations)
        for metric, chance in {"cc": 0, "nss": 0, "auc_judd": 0.5, "shuffled_auc": 0.5}.items():
            np.testing.assert_array_equal(found[metric], chance)


def test_metrics_work_inside_of_a_function_with_any_batch_size():
    maps, references, fixations, expected = case("random", np.float32)

    @tf.function(input_signature=[tf.TensorSpec((None, *maps.shape[1:]))] * 2)
    def both(maps, references):
        return saliency_metrics.cc(maps, references), saliency_metrics.nss(maps, fixations)

    for found, metric in zip(both(maps, references), ("cc", "nss"), strict=True):
        np.testing.assert_allclose(found, expected[metric], rtol=1e-5, atol=1e-5)


def test_only_what_is_asked_for_is_returned(eagerly):
    maps, references, fixations, _ = case("random", np.float32)
    assert list(measure(maps, references)) == list(REFERENCE_METRICS)
    assert list(measure(maps, references, fixations, names=("nss", "cc"))) == ["nss", "cc"]
    with pytest.raises(ValueError, match=r"names.*nss.*cc"):
        measure(maps, fixations=fixations, names=("cc",))


# -------------------------------------------------------------------------------------------------------- fixations


def test_points_and_counts_say_the_same():
    random = np.random.default_rng(0)
    counts = random.poisson(0.4, (5, 6, 7))
    counts[2] = 0
    points = np.full((5, 60, 2), -1)
    for image, each in enumerate(counts):
        places = np.repeat(np.argwhere(each), each[each > 0], axis=0)
        points[image, random.permutation(60)[: len(places)]] = places
    from_points = Fixations.from_points(points, 6, 7)
    for found in (from_points, Fixations.from_counts(counts), Fixations.from_counts(counts.astype(float))):
        np.testing.assert_array_equal(found.pixels, from_points.pixels)
        np.testing.assert_array_equal(found.counts, from_points.counts)
        np.testing.assert_array_equal(found.total(), counts.sum(axis=0))
        assert found.shape == (6, 7)
    as_masks = Fixations.from_counts(counts > 0)
    np.testing.assert_array_equal(as_masks.counts, np.minimum(from_points.counts, 1))


def test_batches_with_about_as_many_fixations_share_a_program():
    def slots(most):
        return Fixations.from_counts(np.arange(1024).reshape(1, 32, 32) < most).pixels.shape[1]

    assert [slots(most) for most in (0, 1, 16, 17, 64, 65, 200, 1024)] == [16, 16, 16, 32, 64, 128, 256, 1024]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.ones((4, 4), int), r"\(B, H, W\).*\(4, 4\)"),
        (-np.ones((1, 4, 4), int), "0 or more.*-1"),
        (-np.ones((1, 4, 4)), "0 or more.*-1"),
        (np.full((1, 4, 4), 0.25), "a density is no count"),
        (np.full((1, 4, 4), np.nan), "whole numbers"),
    ],
)
def test_what_is_no_count_is_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        Fixations.from_counts(counts)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.zeros((1, 4), int), "row and column"),
        (np.zeros((1, 4, 2)), "row and column.*float64"),
        (np.array([[[0, 0], [0, 7]]]), r"6x7 pixels.*\[0, 7\]"),
        (np.array([[[6, 0], [-1, -1]]]), r"6x7 pixels.*\[6, 0\]"),
    ],
)
def test_points_outside_of_the_image_are_refused(points, message):
    with pytest.raises(ValueError, match=message):
        Fixations.from_points(points, 6, 7)


def test_shapes_that_do_not_fit_are_refused():
    maps = np.ones((3, 4, 5), np.float32)
    fixations = Fixations.from_counts(np.ones((3, 4, 4), bool))
    with pytest.raises(ValueError, match=r"References.*\(3, 4, 5\).*\(3, 5, 4\)"):
        saliency_metrics.cc(maps, np.ones((3, 5, 4)))
    with pytest.raises(ValueError, match=r"Fixations.*\(3, 4, 5\).*\(3, 4, 4\)"):
        saliency_metrics.nss(maps, fixations)
    for bad in (maps[0], maps[..., None], maps[:, :0]):
        with pytest.raises(ValueError, match=r"`maps` must have shape \(B, H, W\)"):
            saliency_metrics.cc(bad, bad)
    with pytest.raises(ValueError, match=r"`earlier`.*\(4, 4\)"):
        saliency_metrics.shuffled_auc(maps[..., :4], fixations, np.ones((5, 5), int))
    with pytest.raises(ValueError, match="leave some out"):
        saliency_metrics.shuffled_auc(maps[..., :4], fixations, np.full((4, 4), saliency_metrics.MOST_NONFIXATIONS))
