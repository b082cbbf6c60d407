"""Keras callbacks of a training run; `BetaWarmup` serves `model.fit` in general."""

import contextlib
import logging
import math
import signal
import threading
import time

import keras
import numpy as np

from aib_tf import files
from aib_tf.layers import GaussianBottleneck
from aib_tf.training.checkpoints import Progress, metric_variables
from aib_tf.validation import check_count

_CHECKPOINT_SECONDS = 600  # within an epoch; there is also one at the end of each
_logger = logging.getLogger("aib_tf")


class NonFiniteLossError(FloatingPointError):
    """The loss, or another number of training, became NaN or infinite."""


class TrainingInterrupted(KeyboardInterrupt):
    """Training was asked to stop, and saved its state first."""


class BetaWarmup(keras.callbacks.Callback):
    """Raises the weight of the rate linearly from 0 to its full value over the first training steps.

    Sets the `warmup` weight of every `GaussianBottleneck` of the model to min(1, step / steps), where step counts
    from 1 and is the optimizer's, so that a continued training goes on where it was.

    Args:
        steps: training steps until the full weight; 0 leaves it at full weight.

    Raises:
        ValueError: if `steps` is not an integer from 0 up.

    Example:
        >>> model.fit(images, labels, callbacks=[aib_tf.training.BetaWarmup(steps=1000)])
    """

    def __init__(self, steps):
        super().__init__()
        check_count("steps", steps, minimum=0)
        self.steps = steps
        self._bottlenecks = []

    def on_train_begin(self, logs=None):
        """Finds the bottlenecks."""
        self._bottlenecks = [layer for layer in self.model._flatten_layers() if isinstance(layer, GaussianBottleneck)]

    def on_train_batch_begin(self, batch, logs=None):
        """Sets the factor of the next step."""
        if not self._bottlenecks:
            return
        step = int(self.model.optimizer.iterations) + 1
        factor = min(1.0, step / self.steps) if self.steps else 1.0
        for layer in self._bottlenecks:
            layer.warmup.assign(factor)
        if factor == 1.0:
            self._bottlenecks = []


def keeps_average(model):
    """Whether the optimizer of a model keeps a moving average of its weights."""
    # Under mixed_float16, Keras wraps the optimizer in one that scales the loss.
    return getattr(model.optimizer, "inner_optimizer", model.optimizer).use_ema


@contextlib.contextmanager
def averaged_weights(model):
    """Puts the optimizer's moving average of the weights, if it keeps one, in their place for a while."""
    if not keeps_average(model):
        yield
        return
    variables = model.trainable_variables
    weights = [keras.ops.copy(variable) for variable in variables]
    model.optimizer.finalize_variable_values(variables)
    try:
        yield
    finally:
        for variable, value in zip(variables, weights, strict=True):
            variable.assign(value)


class AveragedWeights(keras.callbacks.Callback):
    """Validates with the moving average of the weights where the optimizer keeps one."""

    def __init__(self):
        super().__init__()
        self._swapped = contextlib.ExitStack()

    def on_test_begin(self, logs=None):
        self._swapped.enter_context(averaged_weights(self.model))

    def on_test_end(self, logs=None):
        self._swapped.close()


class StopAtNonFinite(keras.callbacks.Callback):
    """Raises `NonFiniteLossError` at the first step, or the first validation, whose numbers are not finite."""

    def on_train_batch_end(self, batch, logs=None):
        self._check(logs, "in training")

    def on_epoch_end(self, epoch, logs=None):
        self._check(logs, f"after epoch {epoch + 1}")

    def _check(self, logs, when):
        bad = [name for name, value in (logs or {}).items() if not math.isfinite(value)]
        if bad:
            step = int(self.model.optimizer.iterations)
            raise NonFiniteLossError(
                f"{', '.join(bad)} became NaN or infinite {when}, at step {step}. Training stops; the last checkpoint "
                "and the best model stay as they were. Try a lower learning rate, or a longer beta warm-up, in another "
                "folder."
            )


class Recorder(keras.callbacks.Callback):
    """Keeps the run folder up to date: history, best model, checkpoints; saves when training is asked to stop.

    Args:
        run: the `Run`.
        progress: the `Progress` to go on from; it is kept current.
        batches_per_epoch: batches in a whole epoch.
        monitor: the entry of the logs whose largest value marks the best model.
        learning_rate: number, or schedule from the step to the learning rate.
        stop: the `StopRequest` to obey.
    """

    def __init__(self, run, progress, batches_per_epoch, monitor, learning_rate, stop):
        super().__init__()
        self.run = run
        self.progress = progress
        self.batches_per_epoch = batches_per_epoch
        self.monitor = monitor
        self.learning_rate = learning_rate
        self.stop = stop
        self._saved = time.monotonic()
        self._began = time.monotonic()
        self._skipped = 0

    def on_epoch_begin(self, epoch, logs=None):
        self._began = time.monotonic()
        # An epoch that is continued in the middle: its first batches were counted before the interruption.
        self._skipped = self.progress.batch
        if self.progress.metrics:
            variables = metric_variables(self.model)
            for name, value in self.progress.metrics.items():
                variables[name].assign(value)
            self.progress.metrics = {}

    def on_train_batch_end(self, batch, logs=None):
        self.progress.batch = self._skipped + batch + 1
        if self.progress.batch == self.batches_per_epoch:
            return  # the end of the epoch saves, after validation
        if self.stop.signal or time.monotonic() - self._saved > _CHECKPOINT_SECONDS:
            self._save({name: np.asarray(variable) for name, variable in metric_variables(self.model).items()})

    def on_epoch_end(self, epoch, logs=None):
        last_step = (epoch + 1) * self.batches_per_epoch - 1
        rate = self.learning_rate(last_step) if callable(self.learning_rate) else self.learning_rate
        row = {"epoch": epoch + 1, "learning_rate": float(rate), **logs}
        row["seconds"] = round(time.monotonic() - self._began, 3)
        self.progress.epoch, self.progress.batch = epoch + 1, 0
        self.progress.rows.append({name: _plain(value) for name, value in row.items()})
        self.run.write_history(self.progress.rows)
        self._keep_best(epoch + 1, float(logs[self.monitor]))
        self._save({})

    def _keep_best(self, epoch, value):
        best = self.run.best
        earlier = [row[self.monitor] for row in self.progress.rows[:-1]]
        highest = best["value"] if best else max(earlier, default=-math.inf)
        if value > highest or not self.run.best_file.exists():
            with files.replacing(self.run.best_file) as path, averaged_weights(self.model):
                self.model.save(path)
            files.write_json(self.run.best_info_file, {"epoch": epoch, "monitor": self.monitor, "value": value})

    def _save(self, metrics):
        # Not the optimizer's count, which stands still when a float16 gradient overflows.
        step = self.progress.epoch * self.batches_per_epoch + self.progress.batch
        asked_to_stop = self.stop.signal is not None
        bad = [variable.path for variable in self.model.variables if not np.isfinite(np.asarray(variable)).all()]
        if bad:
            raise NonFiniteLossError(
                f"{', '.join(bad[:3])} became NaN or infinite in training, at step {step}. The last checkpoint and the "
                "best model stay as they were. Try a lower learning rate in another folder."
            )
        progress = Progress(self.progress.epoch, self.progress.batch, self.progress.rows, metrics)
        self.run.checkpoints.save(self.model, progress, step)
        self._saved = time.monotonic()
        if asked_to_stop:
            self.stop.saved_step = step


class StopWhenAsked(keras.callbacks.Callback):
    """Ends training after a `StopRequest`. It comes last, so that the others have finished the step or the epoch.

    Args:
        stop: the `StopRequest`.
    """

    def __init__(self, stop):
        super().__init__()
        self.stop = stop

    def on_train_batch_end(self, batch, logs=None):
        self._raise_if_saved()

    def on_epoch_end(self, epoch, logs=None):
        self._raise_if_saved()

    def _raise_if_saved(self):
        # Not at once when the signal came: it may have come after the `Recorder` looked for it.
        if self.stop.saved_step is not None:
            raise TrainingInterrupted(
                f"Stopped by {self.stop.signal} at step {self.stop.saved_step}; the state is saved. The same command "
                "continues."
            )


class StopRequest:
    """Notes Ctrl-C and SIGTERM instead of dying of them; a second one is no longer held back.

    Attributes:
        signal: name of the signal that came, or None.
        saved_step: the step whose state was saved in answer to it, or None.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.signal = None
        self.saved_step = None
        self._previous = {}

    def listen(self):
        """Begins to hold signals back. Only the main thread can; elsewhere this does nothing."""
        if threading.current_thread() is threading.main_thread() and not self._previous:
            self._previous = {number: signal.signal(number, self._note) for number in self._SIGNALS}

    def close(self):
        """Puts the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number, frame):
        self.signal = signal.Signals(number).name
        _logger.warning("%s: finishing the step and saving. Once more stops at once.", self.signal)
        self.close()


def _plain(value):
    value = float(value)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value
