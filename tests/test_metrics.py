import keras
import numpy as np
import pytest

from aib_tf import metrics
from tests import reference


def batches(classes=4, count=5, seed=0):
    generator = np.random.default_rng(seed)
    for size in range(1, count + 1):
        yield generator.integers(0, classes, size), generator.normal(size=(size, classes)).astype("float32")


def test_label_information_is_label_entropy_less_cross_entropy_over_all_batches():
    metric = metrics.LabelInformation(4)
    seen = list(batches())
    for labels, logits in seen:
        metric.update_state(labels, logits)
    labels = np.concatenate([labels for labels, _ in seen])
    logits = np.concatenate([logits for _, logits in seen])
    entropy = reference.entropy_bits(np.bincount(labels))
    np.testing.assert_allclose(
        metric.result(), entropy - reference.cross_entropy_bits(labels, logits).mean(), rtol=1e-5
    )


def test_label_information_counts_an_example_of_weight_two_twice():
    labels, logits = np.array([0, 1, 1]), np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    weighted, repeated = metrics.LabelInformation(4), metrics.LabelInformation(4)
    weighted.update_state(labels, logits, sample_weight=[2.0, 1.0, 0.0])
    repeated.update_state(labels[[0, 0, 1]], logits[[0, 0, 1]])
    np.testing.assert_allclose(weighted.result(), repeated.result(), rtol=1e-6)


def test_cross_entropy_bits_is_the_mean_over_images_not_over_batches():
    metric = metrics.CrossEntropyBits()
    seen = list(batches())
    for labels, logits in seen:
        metric.update_state(labels, logits)
    expected = np.concatenate([reference.cross_entropy_bits(*batch) for batch in seen]).mean()
    np.testing.assert_allclose(metric.result(), expected, rtol=1e-5)


def test_anchor_metrics_count_over_batches():
    in_use, perplexity = metrics.AnchorsInUse(5), metrics.AnchorPerplexity(5)
    for index in ([[0, 0], [3, 3]], [[3], [0]]):
        in_use.update_state(np.int32(index))
        perplexity.update_state(np.int32(index))
    assert float(in_use.result()) == 2
    np.testing.assert_allclose(perplexity.result(), 2.0, rtol=1e-6)


def test_perplexity_is_two_to_the_entropy():
    perplexity = metrics.AnchorPerplexity(4)
    perplexity.update_state(np.int32([0, 0, 0, 1]))
    np.testing.assert_allclose(perplexity.result(), 2 ** reference.entropy_bits([3, 1]), rtol=1e-6)


@pytest.mark.parametrize(
    ("metric", "empty"),
    [
        (metrics.LabelInformation(3), 0),
        (metrics.AnchorsInUse(3), 0),
        (metrics.AnchorPerplexity(3), 1),
        (metrics.CrossEntropyBits(), 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_metrics_have_a_value_before_the_first_batch_and_round_trip(metric, empty):
    assert float(metric.result()) == empty
    copy = keras.metrics.deserialize(keras.metrics.serialize(metric))
    assert copy.get_config() == metric.get_config()
