import math

import numpy as np
import pytest

from aib_tf import evaluation


def ece_by_loops(confidences, corrects, bins=15):
    error = 0.0
    for b in range(bins):
        members = [
            (confidence, correct)
            for confidence, correct in zip(confidences, corrects, strict=True)
            if b / bins < confidence <= (b + 1) / bins
        ]
        if members:
            mean_confidence = sum(m[0] for m in members) / len(members)
            mean_correct = sum(m[1] for m in members) / len(members)
            error += len(members) / len(confidences) * abs(mean_confidence - mean_correct)
    return error


def test_all_metrics_equal_plain_loops_over_images(fake_model, batched):
    random = np.random.default_rng(0)
    labels = random.integers(0, 7, size=101)
    logits = random.normal(0, 2, size=(101, 7)).astype(np.float32)
    result = evaluation.accuracy(fake_model(logits=logits), batched(labels, 16))

    right, five, nll, brier, confidences = [], [], [], [], []
    for row, label in zip(logits.astype(float), labels, strict=True):
        weights = [math.exp(value) for value in row]
        probabilities = [weight / sum(weights) for weight in weights]
        order = sorted(range(7), key=lambda k: -row[k])
        right.append(order[0] == label)
        five.append(label in order[:5])
        nll.append(-math.log(probabilities[label]))
        brier.append(sum((p - (k == label)) ** 2 for k, p in enumerate(probabilities)))
        confidences.append(max(probabilities))
    expected = {
        "top_1": np.mean(right),
        "top_5": np.mean(five),
        "nll_nats": np.mean(nll),
        "nll_bits": np.mean(nll) / math.log(2),
        "brier": np.mean(brier),
        "ece": ece_by_loops(confidences, right),
    }
    assert {name: m.value for name, m in result.metrics.items()} == pytest.approx(expected)
    assert result.images == result["top_1"].images == 101
    assert all(m.low <= m.high for m in result.metrics.values())
    np.testing.assert_array_equal(result.per_image["rank"] == 0, right)
    np.testing.assert_allclose(result.per_image["nll_nats"], nll, rtol=1e-6)


def test_calibration_error_adds_gaps_of_both_signs_bin_by_bin(fake_model, batched):
    # Right below a confidence of 0.7 and wrong above it: the bins do not cancel.
    logits = np.stack([np.random.default_rng(0).uniform(0, 4, size=400), np.zeros(400)], axis=1)
    logits = logits.astype(np.float32).astype(float)
    confidences = 1 / (1 + np.exp(-logits[:, 0]))
    rights = confidences < 0.7
    result = evaluation.accuracy(fake_model(logits=logits), batched(1 - rights.astype(int)))
    assert result["ece"].value == pytest.approx(ece_by_loops(confidences, rights))
    assert result["ece"].value > 1.2 * abs(confidences.mean() - rights.mean())


def test_scikit_learn_agrees_on_likelihood_and_top_5(fake_model, batched):
    from sklearn import metrics

    random = np.random.default_rng(0)
    labels = np.arange(60) % 10
    logits = random.normal(size=(60, 10)).astype(np.float32)
    result = evaluation.accuracy(fake_model(logits=logits), batched(labels))
    probabilities = np.exp(logits.astype(float))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    assert result["nll_nats"].value == pytest.approx(metrics.log_loss(labels, probabilities))
    assert result["top_5"].value == pytest.approx(metrics.top_k_accuracy_score(labels, logits, k=5))


def test_batches_of_any_size_give_the_same_result(fake_model, batched):
    random = np.random.default_rng(0)
    labels, logits = random.integers(0, 3, size=10), random.normal(size=(10, 3))
    model = fake_model(logits=logits)
    whole = evaluation.accuracy(model, batched(labels, 10))
    assert evaluation.accuracy(model, batched(labels, 3)).to_dict() == whole.to_dict()
    pairs = [(part["image"], part["label"]) for part in batched(labels, 4)]
    assert evaluation.accuracy(model, pairs).to_dict() == whole.to_dict()


def test_a_tf_data_dataset_serves_as_well(fake_model, batched):
    import tensorflow as tf

    labels, logits = np.array([0, 1, 1, 0, 1]), np.eye(2)[[0, 1, 0, 0, 1]]
    (whole,) = batched(labels)
    dataset = tf.data.Dataset.from_tensor_slices(whole).batch(2)
    model = fake_model(logits=logits)
    assert evaluation.accuracy(model, dataset)["top_1"].value == pytest.approx(0.8)
    with pytest.raises(ValueError, match="repeat"):
        evaluation.accuracy(model, dataset.repeat())


@pytest.mark.parametrize(("classes", "expected"), [(5, False), (6, True)])
def test_top_5_needs_more_than_five_classes(fake_model, batched, classes, expected):
    result = evaluation.accuracy(fake_model(logits=np.eye(classes)), batched(np.arange(classes)))
    assert ("top_5" in result.metrics) is expected


def test_equal_logits_rank_the_lowest_class_first(fake_model, batched):
    result = evaluation.accuracy(fake_model(logits=np.zeros((6, 6))), batched(np.arange(6)))
    np.testing.assert_array_equal(result.per_image["rank"], np.arange(6))
    np.testing.assert_array_equal(result.per_image["prediction"], 0)
    assert result["nll_bits"].value == pytest.approx(math.log2(6))


def test_calibration_is_exact_at_certainty_and_at_bin_edges(fake_model, batched):
    certain = evaluation.accuracy(fake_model(logits=[[900.0, 0.0]] * 2), batched([0, 0]))
    assert certain["ece"].value == 0
    assert certain["nll_nats"].value == 0
    wrong = evaluation.accuracy(fake_model(logits=[[900.0, 0.0]] * 2), batched([1, 1]))
    assert wrong["ece"].value == 1
    assert wrong["nll_nats"].value == pytest.approx(900)
    assert wrong["brier"].value == 2


def test_one_image_is_enough(fake_model, batched):
    result = evaluation.accuracy(fake_model(logits=[[2.0, 0.0]]), batched([0]))
    assert (result["top_1"].low, result["top_1"].high) == (1.0, 1.0)


def test_the_samples_are_asked_of_the_model_and_recorded(fake_model, batched):
    model = fake_model(logits=np.eye(3))
    result = evaluation.accuracy(model, batched([0, 1, 2], 2), samples=4)
    assert model.calls == [(2, 4), (1, 4)]
    assert result.samples == 4


def test_nan_logits_are_counted_and_placed(fake_model, batched):
    logits = np.zeros((7, 3))
    logits[5] = logits[6, 1] = np.nan
    with pytest.raises(ValueError, match="2 of the 3 images of one batch, the first of them image 5"):
        evaluation.accuracy(fake_model(logits=logits), batched(np.zeros(7, int), 4))


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_refused(fake_model, batched, label):
    with pytest.raises(ValueError, match=f"label={label}"):
        evaluation.accuracy(fake_model(logits=np.zeros((2, 3))), batched([0, label]))
