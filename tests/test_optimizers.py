"""The optimizers against PyTorch's update rules, written out in NumPy."""

import keras
import numpy as np
import pytest

from aib_tf.config import OptimizationConfig
from aib_tf.optimizers import make_optimizer
from aib_tf.training import SGD, Adam, learning_rate_schedule

GRADIENTS = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")


class Rates(keras.optimizers.schedules.LearningRateSchedule):
    """A rate that changes, where Keras's momentum and PyTorch's part."""

    def __call__(self, step):
        return keras.ops.take(np.float32([0.1, 0.1, 0.01, 0.5, 0.5, 0.02]), keras.ops.cast(step, "int32"))

    def get_config(self):
        return {}


def variables():
    kernel = keras.Variable(np.float32([1, -2, 3, -4]), name="kernel")
    with keras.name_scope("quantizer"):
        anchors = keras.Variable(np.float32([1, -2, 3, -4]), name="anchors")
    return kernel, anchors


def trained(optimizer):
    kernel, anchors = variables()
    optimizer.build([kernel, anchors])
    for gradient in GRADIENTS:
        optimizer.apply([gradient, gradient], [kernel, anchors])
    return np.asarray(kernel), np.asarray(anchors)


def torch_sgd(rates, momentum, l2):
    value, buffer = np.float64([1, -2, 3, -4]), np.zeros(4)
    for rate, gradient in zip(rates, GRADIENTS, strict=True):
        buffer = momentum * buffer + gradient + l2 * value
        value = value - rate * buffer
    return value


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_sgd_is_that_of_pytorch_also_when_the_rate_changes(momentum, l2):
    rates = np.array([Rates()(step) for step in range(6)], np.float64)
    optimizer = SGD(Rates(), momentum=momentum, l2=l2, anchor_learning_rate_ratio=0.1, anchor_weight_decay=True)
    kernel, anchors = trained(optimizer)
    np.testing.assert_allclose(kernel, torch_sgd(rates, momentum, l2), rtol=1e-5)
    np.testing.assert_allclose(anchors, torch_sgd(0.1 * rates, momentum, l2), rtol=1e-5)


def test_weight_decay_spares_the_anchors_unless_asked_for():
    _, anchors = trained(SGD(0.1, l2=0.5))
    np.testing.assert_allclose(anchors, torch_sgd([0.1] * 6, 0.9, 0.0), rtol=1e-5)


def test_adam_with_l2_is_that_of_pytorch_and_moves_anchors_at_their_own_rate():
    def torch_adam(rate, l2):
        value, first, second = np.float64([1, -2, 3, -4]), np.zeros(4), np.zeros(4)
        for step, gradient in enumerate(GRADIENTS, start=1):
            gradient = gradient + l2 * value
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            value = value - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        return value

    kernel, anchors = trained(Adam(0.01, l2=0.3, anchor_learning_rate_ratio=0.01))
    np.testing.assert_allclose(kernel, torch_adam(0.01, 0.3), rtol=1e-4)
    np.testing.assert_allclose(anchors, torch_adam(0.0001, 0.0), rtol=1e-4)


def test_adam_adds_epsilon_where_pytorch_does():
    variable = keras.Variable(np.zeros(3, "float32"))
    optimizer = Adam(0.5, beta_1=0.5)
    optimizer.build([variable])
    gradient = np.float32([1e-5, 1e-7, 1e-8])
    optimizer.apply([gradient], [variable])
    np.testing.assert_allclose(variable, -0.5 * gradient / (gradient + 1e-8), rtol=1e-4)


@pytest.mark.parametrize("spared", [True, False])
@pytest.mark.parametrize("ratio", [1.0, 0.1])
def test_decoupled_weight_decay_shrinks_by_the_learning_rate_apart_from_momentum(spared, ratio):
    def decoupled_sgd(rate, decay):
        value, buffer = np.float64([1, -2, 3, -4]), np.zeros(4)
        for gradient in GRADIENTS:
            buffer = 0.9 * buffer + gradient
            value = value - rate * decay * value - rate * buffer
        return value

    optimizer = SGD(0.1, weight_decay=0.5, anchor_learning_rate_ratio=ratio, anchor_weight_decay=not spared)
    kernel, anchors = trained(optimizer)
    np.testing.assert_allclose(kernel, decoupled_sgd(0.1, 0.5), rtol=1e-5)
    np.testing.assert_allclose(anchors, decoupled_sgd(0.1 * ratio, 0.0 if spared else 0.5), rtol=1e-5)


def test_flags_choose_between_coupled_and_decoupled_decay_and_set_the_rest():
    settings = {"weight_decay": 0.5, "anchor_learning_rate_ratio": 1.0, "anchor_weight_decay": False}
    coupled = make_optimizer(OptimizationConfig(**settings), 10)
    assert (coupled.l2, coupled.weight_decay, coupled.use_ema) == (0.5, None, False)
    settings |= {"decoupled_weight_decay": True, "adam_beta_1": 0.5, "ema_momentum": 0.99}
    decoupled = make_optimizer(OptimizationConfig(**settings), 10)
    assert (decoupled.l2, decoupled.weight_decay, decoupled.beta_1) == (0.0, 0.5, 0.5)
    assert (decoupled.use_ema, decoupled.ema_momentum) == (True, 0.99)


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_moving_average_is_that_of_the_weights_after_each_step(kind):
    optimizer = kind(0.1, use_ema=True, ema_momentum=0.5)
    kernel, anchors = variables()
    optimizer.build([kernel, anchors])
    average = None
    for gradient in GRADIENTS:
        optimizer.apply([gradient, gradient], [kernel, anchors])
        average = np.asarray(kernel) if average is None else 0.5 * average + 0.5 * np.asarray(kernel)
    optimizer.finalize_variable_values([kernel, anchors])
    np.testing.assert_allclose(np.asarray(kernel), average, rtol=1e-6)


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_optimizers_round_trip_through_their_config(kind):
    optimizer = kind(0.25, l2=0.5, anchor_learning_rate_ratio=0.125, anchor_weight_decay=True)
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert copy.get_config() == optimizer.get_config()
    np.testing.assert_array_equal(trained(copy), trained(optimizer))


def rate_in_epoch(schedule, epoch, steps_per_epoch):
    """The rate of the first and of the last step of an epoch, counted from 0, which must agree."""
    if isinstance(schedule, float):
        return schedule
    first, last = (float(schedule(step)) for step in (epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch - 1))
    assert first == last
    return first


def test_rate_of_the_vgg_recipe_is_halved_every_25_epochs_after_two_of_warmup():
    config = OptimizationConfig(
        learning_rate=0.1, schedule="steps", decay_every=25, warmup_learning_rates=(0.001, 0.01), epochs=60
    )
    schedule = learning_rate_schedule(config, 7)
    rates = [rate_in_epoch(schedule, epoch, 7) for epoch in (0, 1, 2, 24, 25, 49, 50, 59)]
    np.testing.assert_allclose(rates, [0.001, 0.01, 0.1, 0.1, 0.05, 0.05, 0.025, 0.025], rtol=1e-6)


def test_rate_of_the_wide_resnet_recipe_falls_at_named_epochs():
    config = OptimizationConfig(learning_rate=0.1, schedule="steps", decay_at=(6, 12), decay_factor=0.2, epochs=20)
    schedule = learning_rate_schedule(config, 3)
    rates = [rate_in_epoch(schedule, epoch, 3) for epoch in (0, 5, 6, 11, 12, 19)]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.02, 0.02, 0.004, 0.004], rtol=1e-6)


def test_the_learning_rate_grows_linearly_before_the_cosine_which_still_ends_with_the_last_epoch():
    config = OptimizationConfig(learning_rate=0.6, schedule="cosine", learning_rate_warmup_epochs=0.5, epochs=3)
    schedule = learning_rate_schedule(config, 10)
    rates = [float(schedule(step)) for step in range(30)]
    np.testing.assert_allclose(rates[:6], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], rtol=1e-6)
    np.testing.assert_allclose(rates[5:], [0.3 * (1 + np.cos(np.pi * step / 25)) for step in range(25)], rtol=1e-5)


def test_a_warm_up_of_nearly_all_epochs_leaves_the_cosine_a_step():
    config = OptimizationConfig(learning_rate=0.5, schedule="cosine", learning_rate_warmup_epochs=0.99, epochs=1)
    schedule = learning_rate_schedule(config, 5)
    np.testing.assert_allclose([float(schedule(step)) for step in range(5)], [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)


@pytest.mark.parametrize("recipe", [{"decay_every": 25, "schedule": "steps"}, {"warmup_learning_rates": (0.4,)}])
def test_a_run_too_short_for_its_first_change_keeps_one_rate(recipe):
    config = OptimizationConfig(**{"learning_rate": 0.4, "schedule": "constant", "epochs": 1, **recipe})
    assert learning_rate_schedule(config, 10) == 0.4


def test_cosine_ends_at_zero_and_constant_stays():
    cosine = learning_rate_schedule(OptimizationConfig(learning_rate=0.4, schedule="cosine", epochs=5), 10)
    np.testing.assert_allclose([cosine(0), cosine(25), cosine(50)], [0.4, 0.2, 0], atol=1e-7)
    assert learning_rate_schedule(OptimizationConfig(learning_rate=0.4, schedule="constant"), 10) == 0.4
