"""Keras callbacks of a training run; `BetaWarmup` serves `model.fit` in general."""

import contextlib
import logging
import math
import signal
import threading
import time

import keras
import numpy as np
import tensorflow as tf

from aib_tf import files
from aib_tf.layers import GaussianBottleneck
from aib_tf.training.checkpoints import Progress, assign_metrics, metric_values
from aib_tf.validation import check_count

_logger = logging.getLogger("aib_tf")


class NonFiniteLossError(FloatingPointError):
    """The loss, or another number of training, became NaN or infinite."""


class TrainingInterrupted(KeyboardInterrupt):
    """Training was asked to stop, and saved its state first.

    Attributes:
        signal: name of the signal that asked, such as "SIGTERM".
    """

    def __init__(self, message, signal="SIGINT"):
        super().__init__(message)
        self.signal = signal


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
        step = _steps(self.model) + 1
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
            step = _steps(self.model)
            raise NonFiniteLossError(
                f"{', '.join(bad)} became NaN or infinite {when}, at step {step}. Training stops; the last checkpoint "
                "and the best model stay as they were. Try a lower learning rate, or a longer beta warm-up, in another "
                "folder."
            )


class SharedStatistics(keras.callbacks.Callback):
    """Validates with the first replica's running statistics on all of them.

    Args:
        workers: the `Workers`.
    """

    def __init__(self, workers):
        super().__init__()
        self.workers = workers

    def on_test_begin(self, logs=None):
        self.workers.share_statistics(self.model)


class Recorder(keras.callbacks.Callback):
    """Keeps the run folder up to date: history, best model, checkpoints; saves when training is asked to stop.

    Of several workers each has one, since values of the model are read by all of them together; the chief's writes.

    Args:
        run: the `Run`.
        workers: the `Workers`.
        progress: the `Progress` to go on from; it is kept current.
        batches_per_epoch: batches in a whole epoch.
        steps_per_execution: batches from one call of a callback to the next.
        checkpoint_seconds: seconds between checkpoints within an epoch; there is also one at the end of each.
        monitor: the entry of the logs whose largest value marks the best model.
        learning_rate: number, or schedule from the step to the learning rate.
        stop: the `StopRequest` to obey.
    """

    def __init__(
        self,
        run,
        workers,
        progress,
        *,
        batches_per_epoch,
        steps_per_execution,
        checkpoint_seconds,
        monitor,
        learning_rate,
        stop,
    ):
        super().__init__()
        self.run = run
        self.workers = workers
        self.progress = progress
        self.batches_per_epoch = batches_per_epoch
        self.steps_per_execution = steps_per_execution
        self.checkpoint_seconds = checkpoint_seconds
        self.monitor = monitor
        self.learning_rate = learning_rate
        self.stop = stop
        self._saved = time.monotonic()
        self._began = time.monotonic()

    def on_epoch_begin(self, epoch, logs=None):
        self._began = time.monotonic()
        # An epoch that is continued in the middle: its first batches were counted before the interruption.
        assign_metrics(self.model, self.progress.metrics)
        self.progress.metrics = {}

    def on_train_batch_end(self, batch, logs=None):
        # Not `batch`, which is the first or the last one of an execution, depending on the version of Keras.
        self.progress.batch = min(self.progress.batch + self.steps_per_execution, self.batches_per_epoch)
        if self.progress.batch == self.batches_per_epoch:
            return  # the end of the epoch saves, after validation
        # All workers save, or none.
        due = time.monotonic() - self._saved > self.checkpoint_seconds
        asked, due = self.workers.any(self.stop.signal, due)
        if asked or due:
            self._save(metric_values(self.model), asked)

    def on_epoch_end(self, epoch, logs=None):
        last_step = (epoch + 1) * self.batches_per_epoch - 1
        rate = self.learning_rate(last_step) if callable(self.learning_rate) else self.learning_rate
        row = {"epoch": epoch + 1, "learning_rate": float(rate), **logs}
        row["seconds"] = round(time.monotonic() - self._began, 3)
        self.progress.epoch, self.progress.batch = epoch + 1, 0
        self.progress.rows.append({name: _plain(value) for name, value in row.items()})

        def write():
            self.run.write_history(self.progress.rows)
            self._keep_best(epoch + 1, float(logs[self.monitor]))

        self.workers.from_chief(write)
        (asked,) = self.workers.any(self.stop.signal)
        self._save({}, asked)

    def _keep_best(self, epoch, value):
        best = self.run.best
        earlier = [row[self.monitor] for row in self.progress.rows[:-1]]
        highest = best["value"] if best else max(earlier, default=-math.inf)
        if value > highest or not self.run.best_file.exists():
            with files.replacing(self.run.best_file) as path, averaged_weights(self.model):
                self.model.save(path)
            files.write_json(self.run.best_info_file, {"epoch": epoch, "monitor": self.monitor, "value": value})

    def _save(self, metrics, asked_to_stop):
        # Not the optimizer's count, which stands still when a float16 gradient overflows.
        step = self.progress.epoch * self.batches_per_epoch + self.progress.batch
        self.workers.from_chief(self.run.checkpoints.wait)  # where the last one failed, all are told
        self.workers.share_statistics(self.model)
        progress = Progress(self.progress.epoch, self.progress.batch, self.progress.rows, metrics)
        arrays = self.run.checkpoints.values(self.model, progress)
        bad = [
            name.split("/", 2)[2]
            for name, value in arrays.items()
            if name.startswith("model/") and not np.isfinite(value).all()
        ]
        if bad:
            raise NonFiniteLossError(
                f"{', '.join(bad[:3])} became NaN or infinite in training, at step {step}. The last checkpoint and the "
                "best model stay as they were. Try a lower learning rate in another folder."
            )

        def write():
            self.run.checkpoints.write(arrays, progress, step)
            if asked_to_stop:
                self.run.checkpoints.wait()

        self.workers.from_chief(write)
        self._saved = time.monotonic()
        if asked_to_stop:
            self.stop.saved_step = step


class Profiler(keras.callbacks.Callback):
    """Writes a trace of training steps, for the profiler of TensorBoard.

    It is of one epoch at most: validation is not part of it.

    Args:
        folder: folder of the logs.
        first_step: calls of the training function before it, in which TensorFlow still traces and warms up.
        steps: calls of the training function in it, at most.
    """

    def __init__(self, folder, first_step=10, steps=20):
        super().__init__()
        self.folder = folder
        self._steps = range(first_step, first_step + steps)
        self._step = 0
        self._trace = None
        self._profile = None

    def on_train_batch_begin(self, batch, logs=None):
        if self._step == self._steps.start:
            self._profile = tf.profiler.experimental.Profile(str(self.folder))
            self._profile.__enter__()
        if self._profile is not None:
            # By its marks the profiler tells one step from the next.
            self._trace = tf.profiler.experimental.Trace("train", step_num=self._step, _r=1)
            self._trace.__enter__()

    def on_train_batch_end(self, batch, logs=None):
        self._step += 1
        if self._profile is not None:
            self._trace.__exit__(None, None, None)
        if self._step == self._steps.stop:
            self.close()

    def on_test_begin(self, logs=None):
        self.close()

    def on_train_end(self, logs=None):
        self.close()

    def close(self):
        """Writes the trace that is under way, if any."""
        if self._profile is None:
            return
        self._profile.__exit__(None, None, None)
        self._profile = None
        _logger.info("A trace of training steps is in %s; `tensorboard --logdir` shows it.", self.folder)


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
            # The signal may have come to another worker.
            name = self.stop.signal or "SIGTERM"
            raise TrainingInterrupted(
                f"Stopped by {name} at step {self.stop.saved_step}; the state is saved. The same command continues.",
                name,
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


def _steps(model):
    """How many steps the optimizer of a model has taken; a distributed variable knows no `int`."""
    return int(keras.ops.convert_to_numpy(model.optimizer.iterations))
