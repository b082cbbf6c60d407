"""Results in a folder, one file for each suite, so that an interrupted evaluation goes on where it was."""

import hashlib
import io
import json
import logging
import os
import zipfile

import numpy as np

from aib_tf import files
from aib_tf.evaluation.subject import Subject
from aib_tf.evaluation.suite import Result

_LOGGER = logging.getLogger("aib_tf")
# Raised whenever a suite comes to measure something else, so that older files are not taken for its results.
_FORMAT = 1


class Store:
    """Keeps results of one model on one data set.

    A result is given back only for what it was made from: the weights of the model and of the baseline, the first
    batch of the data, and all arguments. Where a caller's own function gives the maps, nobody can say whether it is
    the same one, and nothing is given back.

    Args:
        folder: where the files <suite>.npz lie; made when the first is written.
        subject: what is measured.
        dataset: the batches.
    """

    def __init__(self, folder: str | os.PathLike, subject: Subject, dataset):
        self.folder = files.path(folder)
        self._origin = _digest(subject, dataset)

    def load(self, name: str, arguments: dict) -> Result | None:
        """The result of a suite with these arguments, or None."""
        path = self.folder / f"{name}.npz"
        if self._origin is None or not path.exists():
            return None
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as data:
                head = json.loads(str(data["head"]))
                if head["key"] != self._key(name, arguments):
                    return None
                arrays = {key[len("image/") :]: data[key] for key in data.files if key.startswith("image/")}
                return Result.from_dict(head["result"], arrays)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            _LOGGER.warning("%s cannot be read (%s); %s is measured again.", path, error, name)
            return None

    def save(self, result: Result, arguments: dict) -> None:
        """Keeps a result, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        head = {"key": self._key(result.suite, arguments), "result": result.to_dict()}
        arrays = {f"image/{name}": values for name, values in result.per_image.items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, head=np.array(json.dumps(head, default=_plain)), **arrays)
        files.write_bytes(self.folder / f"{result.suite}.npz", buffer.getvalue())

    def _key(self, name, arguments):
        return json.dumps([_FORMAT, name, self._origin, arguments], sort_keys=True, default=_plain)


def _digest(subject, dataset):
    """What a result depends on beside its arguments, as text; None where that cannot be told."""
    models = [subject.model] if subject.baseline is subject.model else [subject.model, subject.baseline]
    if subject.has_own_maps or not all(hasattr(model, "weights") for model in models):
        return None
    found = hashlib.sha256()
    for model in models:
        found.update(model.name.encode())
        for weight in model.weights:
            found.update(f"{weight.path} {weight.shape}".encode())
            found.update(np.ascontiguousarray(weight).tobytes())
    for array in (subject.mean, subject.stddev):
        found.update(array.tobytes())
    first = next(iter(dataset), None)
    parts = first.values() if hasattr(first, "values") else first or ()
    for array in parts:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _plain(value):
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    # Data sets of another suite's arguments: their type has to do.
    return type(value).__name__
