"""The folder of a training run: what lies where, and which run it belongs to."""

import contextlib
import csv
import dataclasses
import io
import json
import logging
import platform
import secrets
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import aib_tf
from aib_tf import files
from aib_tf.config import OBJECTIVES, Config, differences
from aib_tf.training.checkpoints import Checkpoints, size_of

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes out of one run folder there.
    fcntl = None


# Both are above what was measured: TensorBoard's logs take 0.18 MB an epoch for images of 32x32, and all that is
# neither log nor checkpoint nor weights 0.5 MB.
_BYTES_OF_EPOCH = 0.5e6
_BYTES_OF_OTHER_FILES = 10e6

_logger = logging.getLogger("aib_tf")


class RunMismatchError(ValueError):
    """A folder holds another run, something else, or no finished run where one is needed."""


class Run:
    """A run folder, local or on any file system that `tf.io.gfile` knows, such as gs://bucket/run.

    A local folder is kept for one process at a time by a lock. Other file systems have none: there, two processes with
    the same folder overwrite each other's files, each of them whole.

    Attributes:
        path: the folder.
        config_file: config.json, the resolved config with versions and command.
        history_file: history.csv, a row for each epoch.
        best_file: best.keras, the model that was best on the selection split.
        best_info_file: best.json, its epoch and value.
        metrics_file: metrics.json, the best model measured on the test split.
        attention_file: attention.png, test images with their attention.
        curves_file: curves.png, the course of training.
        tensorboard_folder: tensorboard/, logs for TensorBoard.
        checkpoints: the `Checkpoints` in checkpoints/, to continue from.

    Args:
        path: the folder; it need not exist.
        checkpoints_kept: how many checkpoints stay in it.

    Raises:
        ValueError: if TensorFlow has no file system for the path, or `checkpoints_kept` is not an integer from 1 up.
    """

    def __init__(self, path, checkpoints_kept=2):
        self.path = files.path(path)
        self.config_file = self.path / "config.json"
        self.history_file = self.path / "history.csv"
        self.best_file = self.path / "best.keras"
        self.best_info_file = self.path / "best.json"
        self.metrics_file = self.path / "metrics.json"
        self.attention_file = self.path / "attention.png"
        self.curves_file = self.path / "curves.png"
        self.tensorboard_folder = self.path / "tensorboard"
        self.checkpoints = Checkpoints(self.path / "checkpoints", checkpoints_kept)

    @property
    def config(self):
        """The `Config` that the run was made with.

        Raises:
            RunMismatchError: if there is none, or it cannot be read.
        """
        try:
            return Config.from_dict(json.loads(self.config_file.read_text(encoding="utf-8"))["config"])
        except FileNotFoundError:
            raise RunMismatchError(
                f"There is no run in this folder: {self.config_file} is missing. Train one with scripts/train.py "
                f"--output_dir, or name another folder. Received: {str(self.path)!r}"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunMismatchError(
                f"{self.config_file} cannot be read: {error}. It was changed, or written by another version of aib_tf."
            ) from error

    @property
    def is_finished(self):
        """Whether nothing is left to train or to measure."""
        return self.metrics_file.exists() and self.best_file.exists() and self.history_file.exists()

    def resolve(self, config):
        """Checks that a config may train in this folder, without writing anything.

        Args:
            config: a `Config`.

        Returns:
            The resolved config; a seed that was left to chance is the one of the run that is here.

        Raises:
            RunMismatchError: if the folder holds a run with another config, which is named difference by difference,
                or holds other files.
        """
        if not self.path.exists():
            return config.resolved()
        if not self.path.is_dir():
            raise RunMismatchError(f"The run folder must be a folder. Received: {str(self.path)!r}")
        if not self.config_file.exists():
            foreign = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
            if foreign:
                raise RunMismatchError(
                    f"{self.path} is no run folder, and holds {', '.join(foreign[:5])}. Name an empty or a new folder."
                )
            return config.resolved()
        old = self.config
        if config.seed is None and OBJECTIVES[config.objective.objective]["seed"] is None:
            config = dataclasses.replace(config, seed=old.seed)
        new = config.resolved()
        changes = differences(old, new)
        if changes:
            raise RunMismatchError(
                f"{self.path} holds a run with another config. Name another folder, or use the same config. "
                "Different (there -> now): " + "; ".join(changes)
            )
        return new

    def check_storage(self, model, epochs):
        """Checks that the folder can be written to, and that its disk has room for what a run writes.

        That is one checkpoint more than are kept, and two best models, since files are replaced only when the new one
        is whole; what is there already is counted. How much an object store or another remote file system has is not
        known: for these it is the room in the temporary folder, where each file is written before it is copied.

        Args:
            model: a compiled model whose optimizer is built.
            epochs: how many are to be trained at most, for the logs.

        Raises:
            OSError: if the folder cannot be made or written to, or there is too little room.
        """
        checkpoint = best = size_of(model)  # best.keras holds the optimizer, too
        kept = self.checkpoints.kept
        if isinstance(self.path, Path):
            folder = next(folder for folder in (self.path.absolute(), *self.path.absolute().parents) if folder.exists())
            there = [path.stat().st_size for path in (*self.checkpoints.paths(), self.best_file) if path.exists()]
            logs = _BYTES_OF_EPOCH * epochs + _BYTES_OF_OTHER_FILES
            # There may be more than are kept: removing comes after writing.
            needed = logs + max((kept + 1) * checkpoint + 2 * best - sum(there), checkpoint + best)
            what = (
                f"{kept} checkpoints and one in writing, {_megabytes(checkpoint)} MB each, the best model twice, "
                f"{_megabytes(best)} MB each, and {_megabytes(logs)} MB of logs, less what is there"
            )
            remedy = "name another folder, or keep fewer with checkpoints_kept"
        else:
            folder, needed = Path(tempfile.gettempdir()), checkpoint + best
            what = "a checkpoint and the best model, which are written there before they are copied"
            remedy = "or name another temporary folder with the environment variable TMPDIR"
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(
                f"{folder} has {_megabytes(free)} MB free, and the run needs {_megabytes(needed)} MB: {what}. "
                f"Make room, {remedy}. Received: path={str(self.path)!r}"
            )
        trial = self.path / f".{secrets.token_hex(6)}.trial"
        try:
            files.write_bytes(trial, b"")
            trial.unlink()
        except OSError as error:
            raise OSError(
                f"The run folder cannot be written to ({error.strerror or error}). Change its rights, or name another "
                f"folder. Received: path={str(self.path)!r}"
            ) from error

    def create(self, config, replicas=1):
        """Writes config.json, unless the run is there already, and removes what a killed process left half-written.

        A run that a bad example stopped may go on without it: config.json is then changed, which the evaluation reads.

        Args:
            config: the resolved `Config`.
            replicas: on how many devices it is computed.

        Raises:
            RunMismatchError: if the run was begun on another number of devices, and its learning rate depends on it.
        """
        if self.config_file.exists() and config.optimization.learning_rate_scaling != "none":
            begun = json.loads(self.config_file.read_text(encoding="utf-8")).get("replicas", 1)
            if begun != replicas:
                raise RunMismatchError(
                    f"This run was begun on {begun} devices, which its learning rate was scaled for. Continue it on as "
                    f"many, or name another folder. Received: {replicas} devices, learning_rate_scaling="
                    f"{config.optimization.learning_rate_scaling}"
                )
        files.remove_leftovers(self.path)
        files.remove_leftovers(self.checkpoints.folder)
        if not self.config_file.exists():
            record = {
                "config": config.to_dict(),
                "seed": config.seed,
                "replicas": replicas,
                "command": shlex.join([sys.executable, *sys.argv]),
                "versions": {
                    "aib_tf": aib_tf.__version__,
                    "keras": keras.__version__,
                    "tensorflow": tf.__version__,
                    "numpy": np.__version__,
                    "python": platform.python_version(),
                    "platform": platform.platform(),
                },
            }
            files.write_json(self.config_file, record)
        elif self.config.data.bad_examples != config.data.bad_examples:
            record = json.loads(self.config_file.read_text(encoding="utf-8"))
            record["config"]["data"]["bad_examples"] = config.data.bad_examples
            files.write_json(self.config_file, record)

    @contextlib.contextmanager
    def locked(self):
        """Keeps a second process out of a local folder; at the end waits for the checkpoint that is being written.

        Raises:
            RunMismatchError: if another process is training here.
            OSError: if the last checkpoint could not be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock():
            try:
                yield
            finally:
                self.checkpoints.wait()

    @contextlib.contextmanager
    def _lock(self):
        if not isinstance(self.path, Path):
            yield
            return
        with open(self.path / ".lock", "w") as lock:
            if fcntl is not None:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RunMismatchError(
                        f"Another process is training in {self.path}. Wait for it, or name another folder."
                    ) from None
                except OSError as error:  # the network file systems of some clusters
                    _logger.warning("%s cannot be locked (%s): start no second process there.", self.path, error)
            yield

    def write_history(self, rows):
        """Writes history.csv from a list of dicts with the same keys."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        files.write_text(self.history_file, text.getvalue())

    def read_history(self):
        """Returns a dict name -> list of floats, one for each epoch.

        Raises:
            RunMismatchError: if history.csv cannot be read.
        """
        try:
            rows = list(csv.DictReader(io.StringIO(self.history_file.read_text(encoding="utf-8"))))
            return {name: [float(row[name]) for row in rows] for name in rows[0]}
        except (ValueError, TypeError, IndexError, csv.Error) as error:
            raise RunMismatchError(
                f"{self.history_file} cannot be read ({type(error).__name__}: {error}). It was changed: delete it and "
                "repeat the command that trained the run, which writes it from the last checkpoint."
            ) from error

    @property
    def best(self):
        """Epoch (from 1), monitored metric and its value of the best model so far, as a dict, or None."""
        try:
            best = json.loads(self.best_info_file.read_text(encoding="utf-8"))
            return {"epoch": int(best["epoch"]), "monitor": str(best["monitor"]), "value": float(best["value"])}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def load_best(self):
        """Loads the model that was best on the selection split.

        Returns:
            A compiled `keras.Model`.

        Raises:
            RunMismatchError: if it is missing or damaged.
        """
        if not self.best_file.exists():
            raise RunMismatchError(
                f"This run has no best model: {self.best_file} is missing. It is written after each epoch that is the "
                "best so far; repeat the command that started the run."
            )
        with files.local_copy(self.best_file) as path:
            try:
                return keras.saving.load_model(path)
            except Exception as error:  # Keras lets zipfile's, h5py's and its own errors through
                raise RunMismatchError(
                    f"{self.best_file} is damaged ({type(error).__name__}: {error}). Delete it and repeat the command "
                    "that trained it: the last checkpoint then takes its place."
                ) from error


def _megabytes(count):
    return f"{count / 1e6:,.1f}"
