"""Checkpoints to continue training from, exactly."""

import dataclasses
import json
import logging
import math
import re
import threading
import zipfile
import zlib

import numpy as np

from aib_tf import files
from aib_tf.validation import check_count

_METRIC = "metric/"
# What zipfile, zlib, NumPy and JSON raise for a file that is cut short or changed.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError, NotImplementedError)
_NAME = re.compile(r"step-(\d{8,})\.npz")
_BYTES_OF_HEADER = 512  # of an array in the archive, with its name
_AUTOMATIC_NUMBER = re.compile(r"_\d+(?=/|$)")
_logger = logging.getLogger("aib_tf")


@dataclasses.dataclass
class Progress:
    """Where a run stands.

    Attributes:
        epoch: number of whole epochs behind it.
        batch: number of batches of the next epoch behind it.
        rows: a dict of metrics for each whole epoch.
        metrics: in the middle of an epoch, name -> value of each metric variable; else empty.
    """

    epoch: int = 0
    batch: int = 0
    rows: list = dataclasses.field(default_factory=list)
    metrics: dict = dataclasses.field(default_factory=dict)


class Checkpoints:
    """The last states of a run, in files named step-NNNNNNNN.npz.

    A file holds every variable of the model and of the optimizer, the states of the noise generators too, which
    Keras's own formats leave out and without which a continued run differs from an uninterrupted one. It is a zip
    archive with a checksum for each array, and is written whole or not at all.

    A thread of its own writes while training goes on; only the copying of the values holds training up. At most one
    write is under way. Python waits for it before it exits, after Ctrl-C too.

    `save` and `restore` are for one process. Where several train together, a value may be spread over them: each calls
    `values`, and `apply` with what the one that owns the folder got from `read_newest`; that one calls `write`.

    Args:
        folder: where they are, local or on any file system that `tf.io.gfile` knows.
        kept: how many stay. Training continues from the newest; the others serve where that one turns out to be
            damaged.

    Raises:
        ValueError: if `kept` is not an integer from 1 up.
    """

    def __init__(self, folder, kept=2):
        self.folder = files.path(folder)
        self.kept = check_count("kept", kept)
        self._thread = None
        self._error = None

    def paths(self):
        """Paths of the checkpoints, the oldest first, after the write under way.

        Raises:
            OSError: as `wait` does.
        """
        self.wait()
        return self._paths()

    def save(self, model, progress, step):
        """Copies the state, and begins to write it; removes all but the newest `kept` when it is written.

        Args:
            model: a compiled and built model. It may go on at once.
            progress: a `Progress`.
            step: training steps behind it, for the name.

        Raises:
            OSError: if the write before this one failed.
        """
        self.write(self.values(model, progress), progress, step)

    def values(self, model, progress):
        """Copies what a checkpoint holds to the memory of this process.

        Waits for the write under way, so that no more than one copy is in memory. Under a `tf.distribute` strategy
        reading a variable may take all processes.

        Args:
            model: a compiled and built model.
            progress: a `Progress`.

        Returns:
            Dict name -> NumPy array, which shares no memory with the model.

        Raises:
            OSError: if the write before this one failed.
        """
        self.wait()
        arrays = {name: _value(variable) for name, variable in _variables(model).items()}
        return arrays | {_METRIC + name: value for name, value in progress.metrics.items()}

    def write(self, arrays, progress, step):
        """Begins to write a checkpoint.

        Args:
            arrays: what `values` returned.
            progress: the `Progress` it was called with.
            step: training steps behind it, for the name.

        Raises:
            OSError: if the write before this one failed.
        """
        self.wait()
        # Training will append to the rows while the thread writes.
        position = json.dumps({"epoch": progress.epoch, "batch": progress.batch, "rows": progress.rows})
        # On more devices than before an epoch may have fewer batches. The newest has the largest number all the same.
        newest = max((_number(path) for path in self._paths()), default=-1)
        target = self.folder / f"step-{step if step > newest else newest + 1:08d}.npz"
        # Not a daemon: Python waits for it before it exits.
        self._thread = threading.Thread(target=self._write, args=(target, arrays, position), name="checkpoint")
        self._thread.start()

    def wait(self):
        """Returns when no write is under way.

        Raises:
            OSError: if the last one failed, as on a full disk; the checkpoints before it stay as they were.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def read_newest(self):
        """Reads the newest checkpoint that is whole; a damaged one is renamed and reported.

        Returns:
            Its arrays, dict name -> NumPy array, and its `Progress`; None if there is no checkpoint.

        Raises:
            OSError: if the last write failed, or one is there and cannot be read at all.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return _read(path)
            except _DAMAGE as error:
                aside = path.with_name(path.name + ".damaged")
                path.replace(aside)
                _logger.warning(
                    "Checkpoint %s is damaged (%s: %s); it is now %s, and %s.",
                    path,
                    type(error).__name__,
                    error,
                    aside.name,
                    "training starts over" if path == paths[0] else "the one before it is used",
                )
        return None

    def apply(self, model, arrays):
        """Gives the variables of a model and its optimizer the values of a checkpoint.

        Args:
            model: a compiled model whose optimizer is built.
            arrays: what `read_newest` returned, or `values` without metrics.

        Raises:
            ValueError: if the variables are not those of the model; nothing is changed.
        """
        try:
            values = _matching(arrays, _variables(model))
        except ValueError as error:
            raise ValueError(
                "The checkpoint is of another model, or of another version of Keras or aib_tf: "
                f"{error}. Continue with the versions that config.json names, or name another folder. "
                f"Received: {str(self.folder)!r}"
            ) from error
        # Everything has been compared: from here on nothing can fail halfway.
        for variable, value in values:
            variable.assign(value)

    def restore(self, model):
        """Loads the newest checkpoint that is whole; a damaged one is renamed and reported.

        Args:
            model: a compiled model whose optimizer is built.

        Returns:
            The `Progress` it was saved with; a fresh one if there is no checkpoint.

        Raises:
            ValueError: if the checkpoint is whole but its variables are not those of the model; nothing is changed.
            OSError: as `read_newest` does.
        """
        newest = self.read_newest()
        if newest is None:
            return Progress()
        arrays, progress = newest
        self.apply(model, arrays)
        return progress

    def _paths(self):
        found = [path for path in self.folder.glob("step-*.npz") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_number)

    def _write(self, target, arrays, position):
        try:
            with files.replacing(target) as path, open(path, "wb") as file:
                np.savez(file, progress=position, **arrays)
            for path in self._paths()[: -self.kept]:
                path.unlink(missing_ok=True)
        except OSError as error:
            self._error = OSError(
                f"A checkpoint could not be written ({error.strerror or error}); those before it stay. Mend the cause, "
                f"and repeat the command: it continues from the last one. Received: path={str(target)!r}"
            )
            self._error.__cause__ = error
        except BaseException as error:  # a defect; to be raised where somebody sees it
            self._error = error


def _number(path):
    return int(_NAME.fullmatch(path.name).group(1))


def size_of(model):
    """Bytes of a checkpoint of a model and its optimizer, from the shapes of their variables; a little too many."""
    return sum(_BYTES_OF_HEADER + _bytes(variable) for variable in _variables(model).values())


def metric_values(model):
    """Dict name -> NumPy array of a model's metrics; under a `tf.distribute` strategy over all replicas."""
    return {name: _value(variable) for name, variable in metric_variables(model).items()}


def assign_metrics(model, values):
    """Gives a model's metrics what `metric_values` returned.

    Under a `tf.distribute` strategy each replica has sums of its own. All get an equal share, so that together they
    are what they were, to rounding unless the number of replicas is a power of two.
    """
    variables = metric_variables(model)
    for name, value in values.items():
        variables[name].assign(value)


def metric_variables(model):
    """Dict name -> variable of a model's metrics, which Keras lists in another order before the first step."""
    return {_AUTOMATIC_NUMBER.sub("", variable.path): variable for variable in model.metrics_variables}


def _variables(model):
    """Dict from a name that is the same in every process to each variable of the model and of the optimizer."""
    named = {}
    for owner, variables in (("model", model.variables), ("optimizer", model.optimizer.variables)):
        for number, variable in enumerate(variables):
            # Keras numbers layers without a name of their own through all models of a process.
            named[f"{owner}/{number}/{_AUTOMATIC_NUMBER.sub('', variable.path)}"] = variable
    return named


def _value(variable):
    """A copy of a variable's value as npz can hold it."""
    value = np.asarray(variable)
    if not value.flags.owndata:  # TensorFlow copies already; a view of its buffer would change with the variable
        value = value.copy()
    # npz has no bfloat16; float32 holds every value of it.
    return value.astype("float32") if value.dtype.kind == "V" or value.dtype.name == "bfloat16" else value


def _bytes(variable):
    size = math.prod(variable.shape)
    return size * (4 if variable.dtype == "bfloat16" else np.dtype(variable.dtype).itemsize)


def _read(path):
    # NumPy leaves a file open that it opened itself and found damaged.
    with files.local_copy(path) as local, open(local, "rb") as file, np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    position = json.loads(str(arrays.pop("progress")))
    metrics = {name: arrays.pop(name) for name in list(arrays) if name.startswith(_METRIC)}
    metrics = {name.removeprefix(_METRIC): value for name, value in metrics.items()}
    return arrays, Progress(**position, metrics=metrics)


def _matching(arrays, variables):
    if list(arrays) != list(variables):
        odd = sorted(set(arrays) ^ set(variables))
        raise ValueError(f"its variables are not those of this model; {len(odd)} differ, such as {odd[:3]}")
    for name, variable in variables.items():
        if arrays[name].shape != tuple(variable.shape):
            raise ValueError(f"{name} has shape {arrays[name].shape}, not {tuple(variable.shape)}")
    return [(variable, arrays[name]) for name, variable in variables.items()]
