"""Checkpoints to continue training from, exactly."""

import dataclasses
import json
import logging
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np

from aib_tf import files

_KEPT = 2
_METRIC = "metric/"
# What zipfile, zlib, NumPy and JSON raise for a file that is cut short or changed.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError, NotImplementedError)
_NAME = re.compile(r"step-(\d+)\.npz")
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
    """The last two states of a run, in files named step-NNNNNNNN.npz.

    A file holds every variable of the model and of the optimizer, the states of the noise generators too, which
    Keras's own formats leave out and without which a continued run differs from an uninterrupted one. It is a zip
    archive with a checksum for each array, and is written whole or not at all.

    Args:
        folder: where they are.
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    def paths(self):
        """Paths of the checkpoints, the oldest first."""
        found = [path for path in self.folder.glob("step-*.npz") if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name).group(1)))

    def save(self, model, progress, step):
        """Writes a checkpoint, then removes all but the last two.

        Args:
            model: a compiled and built model.
            progress: a `Progress`.
            step: training steps behind it, for the name.
        """
        arrays = {name: _value(variable) for name, variable in _variables(model).items()}
        arrays |= {_METRIC + name: value for name, value in progress.metrics.items()}
        position = {"epoch": progress.epoch, "batch": progress.batch, "rows": progress.rows}
        with files.replacing(self.folder / f"step-{step:08d}.npz") as path, open(path, "wb") as file:
            np.savez(file, progress=json.dumps(position), **arrays)
        for path in self.paths()[:-_KEPT]:
            path.unlink()

    def restore(self, model):
        """Loads the newest checkpoint that is whole; a damaged one is renamed and reported.

        Args:
            model: a compiled model whose optimizer is built.

        Returns:
            The `Progress` it was saved with; a fresh one if there is no checkpoint.

        Raises:
            ValueError: if the checkpoint is whole but its variables are not those of the model; nothing is changed.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                arrays, progress = _read(path)
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
                continue
            try:
                values = _matching(arrays, _variables(model))
            except ValueError as error:
                raise ValueError(
                    f"{path} is of another model, or of another version of Keras or aib_tf: {error}. Continue with the "
                    f"versions that config.json names, or name another folder. Received: {str(path)!r}"
                ) from error
            # Everything has been read and compared: from here on nothing can fail halfway.
            for variable, value in values:
                variable.assign(value)
            return progress
        return Progress()


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
    # npz has no bfloat16; float32 holds every value of it.
    value = np.asarray(variable)
    return value.astype("float32") if value.dtype.kind == "V" or value.dtype.name == "bfloat16" else value


def _read(path):
    # NumPy leaves a file open that it opened itself and found damaged.
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
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
