"""Optimizers with coupled weight decay and a learning rate of their own for the anchors, and schedules."""

import keras
from keras import ops

from aib_tf.validation import check_weight


class _AnchorGroup:
    """Adds what distinguishes the quantizer's anchors from the other weights, and L2 in the gradient."""

    def _set_group(self, l2, anchor_learning_rate_ratio, anchor_weight_decay):
        check_weight("l2", l2)
        check_weight("anchor_learning_rate_ratio", anchor_learning_rate_ratio)
        self.l2 = l2
        self.anchor_learning_rate_ratio = anchor_learning_rate_ratio
        self.anchor_weight_decay = anchor_weight_decay
        self._anchor_indices = frozenset()

    def build(self, variables):
        """Makes the optimizer's variables, and notes which of `variables` are anchors."""
        self._anchor_indices = frozenset(
            index for index, variable in enumerate(variables) if variable.path.split("/")[-1] == "anchors"
        )
        super().build(variables)

    def update_step(self, gradient, variable, learning_rate):
        """Updates one variable, an anchor vector at its own rate."""
        is_anchors = self._get_variable_index(variable) in self._anchor_indices
        if self.l2 and (self.anchor_weight_decay or not is_anchors):
            gradient = ops.add(gradient, ops.multiply(ops.cast(self.l2, gradient.dtype), variable))
        if is_anchors:
            learning_rate = learning_rate * self.anchor_learning_rate_ratio
        if self.weight_decay and (self.anchor_weight_decay or not is_anchors):
            share = ops.cast(learning_rate, variable.dtype) * ops.cast(self.weight_decay, variable.dtype)
            self.assign_sub(variable, ops.multiply(variable, share))
        super().update_step(gradient, variable, learning_rate)

    def _apply_weight_decay(self, variables):
        """Nothing: Keras would take the same rate for all weights; `update_step` takes each group's."""

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "l2": self.l2,
            "anchor_learning_rate_ratio": self.anchor_learning_rate_ratio,
            "anchor_weight_decay": self.anchor_weight_decay,
        }


class _TorchSGD(keras.optimizers.SGD):
    """SGD whose momentum buffer sums gradients, not steps, as PyTorch's does.

        buffer = momentum * buffer + gradient;  variable -= learning_rate * buffer

    Keras multiplies the learning rate into the buffer; the two part when the rate changes.
    """

    def update_step(self, gradient, variable, learning_rate):
        buffer = self.momentums[self._get_variable_index(variable)] if self.momentum else None
        gradient = ops.cast(gradient, variable.dtype)
        if buffer is not None:
            gradient = ops.add(ops.multiply(buffer, ops.cast(self.momentum, variable.dtype)), gradient)
            self.assign(buffer, gradient)
        self.assign_sub(variable, ops.multiply(gradient, ops.cast(learning_rate, variable.dtype)))


class _TorchAdam(keras.optimizers.Adam):
    """Adam whose epsilon is added where PyTorch adds it, to the corrected deviation.

        variable -= learning_rate * (m / (1 - beta_1^t)) / (sqrt(v / (1 - beta_2^t)) + epsilon)

    Keras adds it before the correction, which in the first steps makes it up to 30 times as large.
    """

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        mean, square = self._momentums[index], self._velocities[index]
        gradient = ops.cast(gradient, variable.dtype)
        step = ops.cast(self.iterations + 1, variable.dtype)
        self.assign_add(mean, ops.multiply(ops.subtract(gradient, mean), 1 - self.beta_1))
        self.assign_add(square, ops.multiply(ops.subtract(ops.square(gradient), square), 1 - self.beta_2))
        corrected = ops.divide(mean, 1 - ops.power(ops.cast(self.beta_1, variable.dtype), step))
        deviation = ops.sqrt(ops.divide(square, 1 - ops.power(ops.cast(self.beta_2, variable.dtype), step)))
        rate = ops.cast(learning_rate, variable.dtype)
        self.assign_sub(variable, ops.divide(ops.multiply(corrected, rate), ops.add(deviation, self.epsilon)))


@keras.saving.register_keras_serializable(package="aib_tf")
class SGD(_AnchorGroup, _TorchSGD):
    """SGD with momentum as in PyTorch, L2 in the gradient, and a learning rate of their own for anchors.

    Args:
        learning_rate: number or `keras.optimizers.schedules.LearningRateSchedule`.
        momentum: from 0 to below 1.
        l2: coupled weight decay: l2 * variable is added to the gradient before the momentum, where Keras's
            `weight_decay` shrinks the variable apart from it.
        anchor_learning_rate_ratio: factor of the learning rate for weights named "anchors".
        anchor_weight_decay: whether `l2` and `weight_decay` apply to them.
        **kwargs: as for `keras.optimizers.SGD`; its `weight_decay` is the decoupled one.
    """

    def __init__(
        self,
        learning_rate=0.1,
        momentum=0.9,
        l2=0.0,
        anchor_learning_rate_ratio=1.0,
        anchor_weight_decay=False,
        **kwargs,
    ):
        super().__init__(learning_rate=learning_rate, momentum=momentum, **kwargs)
        if self.nesterov:
            raise ValueError("Nesterov momentum is not what the recipes use. Received: nesterov=True")
        self._set_group(l2, anchor_learning_rate_ratio, anchor_weight_decay)


@keras.saving.register_keras_serializable(package="aib_tf")
class Adam(_AnchorGroup, _TorchAdam):
    """Adam as in PyTorch, with L2 in the gradient and a learning rate of their own for anchors.

    Args:
        learning_rate: number or `keras.optimizers.schedules.LearningRateSchedule`.
        l2: coupled weight decay, added to the gradient as l2 * variable.
        anchor_learning_rate_ratio: factor of the learning rate for weights named "anchors".
        anchor_weight_decay: whether `l2` and `weight_decay` apply to them.
        epsilon: what keeps the division finite, PyTorch's by default.
        **kwargs: as for `keras.optimizers.Adam`, but without AMSGrad; its `weight_decay` is the decoupled one.
    """

    def __init__(
        self,
        learning_rate=1e-3,
        l2=0.0,
        anchor_learning_rate_ratio=1.0,
        anchor_weight_decay=False,
        epsilon=1e-8,
        **kwargs,
    ):
        super().__init__(learning_rate=learning_rate, epsilon=epsilon, **kwargs)
        if self.amsgrad:
            raise ValueError("AMSGrad is not what the recipes use. Received: amsgrad=True")
        self._set_group(l2, anchor_learning_rate_ratio, anchor_weight_decay)


def make_optimizer(config, steps_per_epoch):
    """Makes the optimizer that an `aib_tf.config.OptimizationConfig`, resolved, describes."""
    kind, arguments = {"adam": (Adam, {"beta_1": config.adam_beta_1}), "sgd": (SGD, {})}[config.optimizer]
    if config.decoupled_weight_decay:
        arguments["weight_decay"] = config.weight_decay
    else:
        arguments["l2"] = config.weight_decay
    if config.ema_momentum:
        arguments |= {"use_ema": True, "ema_momentum": config.ema_momentum}
    return kind(
        learning_rate_schedule(config, steps_per_epoch),
        anchor_learning_rate_ratio=config.anchor_learning_rate_ratio,
        anchor_weight_decay=config.anchor_weight_decay,
        **arguments,
    )


def learning_rate_schedule(config, steps_per_epoch):
    """Makes the learning rate as a function of the step.

    Args:
        config: an `aib_tf.config.OptimizationConfig`.
        steps_per_epoch: training steps in an epoch.

    Returns:
        A number, or a `keras.optimizers.schedules.LearningRateSchedule`.
    """
    rates = list(config.warmup_learning_rates)
    if config.schedule == "cosine":
        return _cosine(config, steps_per_epoch)
    if config.schedule == "constant" and not rates:
        return config.learning_rate
    for epoch in range(len(rates), config.epochs):
        decays = epoch // config.decay_every if config.decay_every else sum(epoch >= at for at in config.decay_at)
        rates.append(config.learning_rate * config.decay_factor**decays)
    changes = [epoch for epoch in range(1, len(rates)) if rates[epoch] != rates[epoch - 1]]
    if not changes:
        return rates[0]
    # Keras keeps a value up to and including its boundary, and counts steps from 0.
    return keras.optimizers.schedules.PiecewiseConstantDecay(
        [epoch * steps_per_epoch - 1 for epoch in changes], [rates[epoch] for epoch in [0, *changes]]
    )


def _cosine(config, steps_per_epoch):
    steps, highest = config.epochs * steps_per_epoch, config.learning_rate
    warmup = min(round(config.learning_rate_warmup_epochs * steps_per_epoch), steps - 1)  # one is left to the cosine
    if not warmup:
        return keras.optimizers.schedules.CosineDecay(highest, steps)
    # The first step, number 0, is to move the weights too.
    return keras.optimizers.schedules.CosineDecay(
        highest / (warmup + 1), steps - warmup, warmup_target=highest, warmup_steps=warmup
    )
