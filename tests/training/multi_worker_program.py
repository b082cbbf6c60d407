"""What each worker of test_multi_worker.py does: it runs scripts/train.py, with what a test does to it on the way.

The argument is a JSON list of cases, which are run one after the other. A case is a dict with some of

- arguments: the command line of scripts/train.py;
- own: dict from the index of a worker to what is put behind that;
- environment: variables that are set, or removed where the value is None;
- interruption: {"step": s, "worker": w, "signal": name, "launcher": bool}: worker w sends the signal to itself, or to
  the launcher, when training step s has been computed and nothing else has been done;
- busy: the worker whose port is in use;
- versions: dict from the index of a worker to the version of TensorFlow that it is made to believe in;
- last: whether scripts/train.py ends the process. Else a line with its exit code is printed.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import command_line
import keras
import numpy as np
import tensorflow as tf
import train
from absl import flags

from aib_tf.training.callbacks import Recorder

INDEX = json.loads(os.environ["TF_CONFIG"])["task"]["index"] if "TF_CONFIG" in os.environ else 0
_TIMEOUT_SECONDS = 120  # Only a hang takes this long.


class _Interruption(keras.callbacks.Callback):
    """Sends a signal after a training step, before any other callback knows of the step."""

    def __init__(self, stop, interruption):
        super().__init__()
        self._stop = stop
        self._interruption = interruption

    def on_train_batch_end(self, batch, logs=None):
        step = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))
        if (INDEX, step) != (self._interruption["worker"], self._interruption["step"]):
            return
        process = os.getppid() if self._interruption.get("launcher") else os.getpid()
        os.kill(process, getattr(signal, self._interruption["signal"]))
        end = time.monotonic() + _TIMEOUT_SECONDS
        while self._stop.signal is None:
            assert time.monotonic() < end, "The signal has not come."
            time.sleep(0.01)


class _Digests(keras.callbacks.Callback):
    """Prints what every variable of the model is after an epoch."""

    def on_epoch_end(self, epoch, logs=None):
        _tell("trainable", epoch + 1, [_digest(variable) for variable in self.model.trainable_variables])
        _tell("fixed", epoch + 1, [_digest(variable) for variable in self.model.non_trainable_variables])


def _fit(original, interruption):
    def fit(model, *args, callbacks, **kwargs):
        before = []
        if interruption:
            (recorder,) = (callback for callback in callbacks if isinstance(callback, Recorder))
            before = [_Interruption(recorder.stop, interruption)]
        result = original(model, *args, callbacks=[*before, *callbacks, _Digests()], **kwargs)
        if kwargs["epochs"] == flags.FLAGS.epochs:
            _tell("mean", kwargs["epochs"], _output(model, training=False))
            _tell("sample", kwargs["epochs"], _output(model, training=True))
        return result

    return fit


def _output(model, training):
    """The logits for images that are the same on all workers; the model stays as it was."""
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 1)).astype("float32")
    values = [np.array(variable) for variable in model.variables]
    outputs = model.distribute_strategy.run(tf.function(lambda: model(tf.constant(images), training=training)))
    for variable, value in zip(model.variables, values, strict=True):
        variable.assign(value)
    return np.asarray(model.distribute_strategy.experimental_local_results(outputs)[0], "float64").tolist()


def _digest(variable):
    return hashlib.sha256(np.ascontiguousarray(variable).tobytes()).hexdigest()


def _tell(name, epoch, value):
    print(json.dumps({"name": name, "epoch": epoch, "value": value}), flush=True)


def _version(original, version):
    return lambda name: version if name == "tensorflow" else original(name)


@contextlib.contextmanager
def _prepared(case):
    with contextlib.ExitStack() as stack:
        environment = case.get("environment", {})
        stack.enter_context(mock.patch.dict(os.environ, {k: v for k, v in environment.items() if v is not None}))
        for name in environment:
            if environment[name] is None:
                os.environ.pop(name, None)
        stack.enter_context(mock.patch.object(keras.Model, "fit", _fit(keras.Model.fit, case.get("interruption"))))
        version = case.get("versions", {}).get(str(INDEX))
        if version is not None:
            patched = _version(importlib.metadata.version, version)
            stack.enter_context(mock.patch.object(importlib.metadata, "version", patched))
        if case.get("busy") == INDEX:
            address = json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"][INDEX]
            stack.enter_context(socket.create_server(("", int(address.rpartition(":")[2]))))
        yield


def main():
    for case in json.loads(sys.argv[1]):
        for name in flags.FLAGS:
            flags.FLAGS[name].unparse()
        with _prepared(case):
            sys.argv = ["train.py", *case.get("arguments", []), *case.get("own", {}).get(str(INDEX), [])]
            try:
                command_line.run(train.main)
            except SystemExit as end:
                if case.get("last"):
                    raise
                print(f"exit code {end.code or 0}", flush=True)


if __name__ == "__main__":
    main()
