import collections
import math

import numpy as np
import pytest

from aib_tf import evaluation


def entropy_of(things):
    counts = collections.Counter(things)
    shares = [count / len(things) for count in counts.values()]
    return -sum(share * math.log2(share) for share in shares)


def test_rate_and_label_information_equal_plain_loops(fake_model, batched):
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, size=37)
    logits, kl = random.normal(size=(37, 5)), random.gamma(2.0, 9.0, size=37)
    result = evaluation.bottleneck(fake_model(logits=logits, kl=kl), batched(labels, 8))
    cross_entropy = np.mean(
        [
            -math.log2(math.exp(row[label]) / sum(map(math.exp, row)))
            for row, label in zip(logits.astype(np.float32), labels, strict=True)
        ]
    )
    assert result["rate_bits"].value == pytest.approx(kl.mean() / math.log(2))
    assert result.details["label_entropy_bits"] == pytest.approx(entropy_of(labels.tolist()))
    assert result["cross_entropy_bits"].value == pytest.approx(cross_entropy)
    assert result["label_information_bits"].value == pytest.approx(entropy_of(labels.tolist()) - cross_entropy)
    assert "anchor_perplexity" not in result.metrics


def test_a_perfect_model_knows_all_of_the_label(fake_model, batched):
    labels = np.arange(8) % 4
    model = fake_model(logits=200 * np.eye(4)[labels], kl=np.zeros(8))
    result = evaluation.bottleneck(model, batched(labels))
    assert result["label_information_bits"].value == pytest.approx(2.0)


def test_a_single_label_has_no_entropy(fake_model, batched):
    result = evaluation.bottleneck(fake_model(logits=np.zeros((3, 2)), kl=np.ones(3)), batched([1] * 3))
    assert result.details["label_entropy_bits"] == 0
    assert result["label_information_bits"].value == pytest.approx(-1)


def test_anchor_use_equals_counting(fake_model, batched):
    random = np.random.default_rng(0)
    anchors = np.array([0.9, 0.1, 0.4, 0.6, 0.2], np.float32)  # unsorted
    index = random.choice(5, p=[0.5, 0.3, 0.2, 0, 0], size=(11, 3, 4, 4))
    model = fake_model(anchors, logits=np.zeros((11, 2)), kl=np.ones(11), attention_quantized=anchors[index])
    result = evaluation.bottleneck(model, batched(np.arange(11) % 2, 4), samples=3)
    assert result["anchors_in_use"].value == 3
    assert result["anchors_in_use_share"].value == pytest.approx(0.6)
    assert result["anchor_perplexity"].value == pytest.approx(2 ** entropy_of(index.ravel().tolist()))
    assert result.details["anchors"] == 5
    expected = [[np.mean(image == q) for q in range(5)] for image in index]
    np.testing.assert_allclose(result.per_image["anchor_share"], expected)


@pytest.mark.parametrize(
    ("anchors", "scores", "expected"),
    [
        ([0.5], [0.5, 0.5], [1.0]),
        ([0.5, 0.5, 1.0], [0.5, 1.0], [0.5, 0.0, 0.5]),  # duplicates: the lowest index
        ([1.0, 0.0], [-3.0, 7.0], [0.5, 0.5]),  # beyond both ends
    ],
)
def test_anchors_at_the_boundary_are_counted(fake_model, batched, anchors, scores, expected):
    model = fake_model(
        np.array(anchors),
        logits=np.zeros((1, 2)),
        kl=[1.0],
        attention_quantized=np.reshape(scores, (1, 1, 1, 2)),
    )
    result = evaluation.bottleneck(model, batched([0]))
    np.testing.assert_array_equal(result.per_image["anchor_share"], [expected])


def test_anchors_may_be_a_keras_variable(fake_model, batched):
    import keras

    model = fake_model(
        keras.Variable([0.0, 0.5, 1.0]),
        logits=np.zeros((1, 2)),
        kl=[1.0],
        attention_quantized=np.full((1, 1, 2, 2), 0.5),
    )
    assert evaluation.bottleneck(model, batched([0]))["anchor_perplexity"].value == 1


def test_a_model_without_a_bottleneck_is_named_as_such(fake_model, batched):
    with pytest.raises(evaluation.UnavailableError, match="no information bottleneck"):
        evaluation.bottleneck(fake_model(logits=np.zeros((1, 2))), batched([0]))
