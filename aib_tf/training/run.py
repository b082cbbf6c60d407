"""The folder of a training run: what lies where, and which run it belongs to."""

import contextlib
import csv
import dataclasses
import io
import json
import platform
import shlex
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import aib_tf
from aib_tf import files
from aib_tf.config import OBJECTIVES, Config, differences
from aib_tf.training.checkpoints import Checkpoints

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes out of one run folder there.
    fcntl = None


class RunMismatchError(ValueError):
    """A folder holds another run, something else, or no finished run where one is needed."""


class Run:
    """A run folder.

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
    """

    def __init__(self, path):
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.history_file = self.path / "history.csv"
        self.best_file = self.path / "best.keras"
        self.best_info_file = self.path / "best.json"
        self.metrics_file = self.path / "metrics.json"
        self.attention_file = self.path / "attention.png"
        self.curves_file = self.path / "curves.png"
        self.tensorboard_folder = self.path / "tensorboard"
        self.checkpoints = Checkpoints(self.path / "checkpoints")

    @property
    def config(self):
        """The `Config` that the run was made with.

        Raises:
            RunMismatchError: if there is none, or it cannot be read.
        """
        try:
            return Config.from_dict(json.loads(self.config_file.read_text())["config"])
        except FileNotFoundError:
            raise RunMismatchError(
                f"There is no run in this folder: {self.config_file} is missing. Train one with scripts/train.py "
                f"--output_dir, or name another folder. Received: {str(self.path)!r}"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunMismatchError(
                f"{self.config_file} cannot be read: {error}. It was changed, or written by another version of aib_tf."
            ) from error

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

    def create(self, config):
        """Writes config.json, unless the run is there already, and removes what a killed process left half-written."""
        files.remove_leftovers(self.path)
        files.remove_leftovers(self.checkpoints.folder)
        if not self.config_file.exists():
            record = {
                "config": config.to_dict(),
                "seed": config.seed,
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

    @contextlib.contextmanager
    def locked(self):
        """Keeps a second process out of the folder.

        Raises:
            RunMismatchError: if another process is training here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w") as lock:
            if fcntl is not None:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise RunMismatchError(
                        f"Another process is training in {self.path}. Wait for it, or name another folder."
                    ) from None
            yield

    def write_history(self, rows):
        """Writes history.csv from a list of dicts with the same keys."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        files.write_text(self.history_file, text.getvalue())

    def read_history(self):
        """Returns a dict name -> list of floats, one for each epoch."""
        with open(self.history_file, newline="") as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows] for name in rows[0]}

    @property
    def best(self):
        """Epoch (from 1), monitored metric and its value of the best model so far, as a dict, or None."""
        try:
            best = json.loads(self.best_info_file.read_text())
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
        try:
            return keras.saving.load_model(self.best_file)
        except Exception as error:  # Keras lets zipfile's, h5py's and its own errors through
            raise RunMismatchError(
                f"{self.best_file} is damaged ({type(error).__name__}: {error}). Delete it and repeat the command that "
                "trained it: the last checkpoint then takes its place."
            ) from error
