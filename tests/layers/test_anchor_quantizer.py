import numpy as np
import pytest
import tensorflow as tf

from aib_tf.layers import AnchorQuantizer


def scores(*shape):
    return np.random.default_rng(0).normal(0.5, 0.3, size=shape).astype("float32")


def test_anchors_start_evenly_spaced_over_zero_to_one():
    layer = AnchorQuantizer(5)
    layer.build((None, 4, 4, 1))
    np.testing.assert_allclose(layer.anchors, [0, 0.25, 0.5, 0.75, 1])


def test_output_holds_nearest_anchors_and_both_losses_are_weighted():
    layer = AnchorQuantizer(5, codebook_weight=2.0, commitment_weight=3.0)
    x = scores(2, 4, 4, 1)
    quantized = layer(x)
    expected = np.round(np.clip(x, 0, 1) * 4) / 4
    np.testing.assert_allclose(quantized, expected)
    error = np.mean((x - expected) ** 2)
    np.testing.assert_allclose(layer.losses, [2 * error, 3 * error], rtol=1e-5)


def test_codebook_loss_moves_the_anchors_towards_the_scores_they_stand_for():
    layer = AnchorQuantizer(3, codebook_weight=1.0, commitment_weight=0.0)
    x = tf.constant([[0.1, 0.4, 0.9, 0.8]])
    with tf.GradientTape() as tape:
        layer(x)
        loss = tf.add_n(layer.losses)
    gradient = tape.gradient(loss, layer.anchors.value)
    np.testing.assert_allclose(gradient, 2 / 4 * np.array([0 - 0.1, 0.5 - 0.4, (1 - 0.9) + (1 - 0.8)]), rtol=1e-5)


def test_metrics_follow_the_scores_of_an_epoch_and_reset():
    layer = AnchorQuantizer(4)
    layer(np.float32([[0.0, 0.1]]))
    layer(np.float32([[1.0, 1.0]]))
    values = {metric.name: float(metric.result()) for metric in layer.metrics}
    assert values["anchors_in_use"] == 2
    np.testing.assert_allclose(values["anchor_perplexity"], 2, rtol=1e-6)
    np.testing.assert_allclose(values["codebook_loss"], (0.1**2 / 2 + 0) / 2, rtol=1e-5)
    for metric in layer.metrics:
        metric.reset_state()
    assert float(layer.metrics[2].result()) == 0


def test_frozen_anchors_take_no_gradient():
    layer = AnchorQuantizer(4, trainable=False)
    layer.build((None, 3))
    assert layer.trainable_variables == []


def test_anchors_stay_float32_under_half_precision():
    layer = AnchorQuantizer(20, dtype="mixed_float16")
    quantized = layer(scores(2, 4))
    assert quantized.dtype == "float16"
    assert layer.anchors.dtype == "float32"
    assert layer.losses[0].dtype == "float32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_anchors": 0}, "from 1 to 65536. Received: num_anchors=0"),
        ({"num_anchors": 65_537}, "num_anchors=65537"),
        ({"num_anchors": True}, "num_anchors=True"),
        ({"codebook_weight": -1}, "codebook_weight=-1"),
        ({"commitment_weight": "much"}, "commitment_weight='much'"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AnchorQuantizer(**arguments)
