"""Results in a folder, one file for each suite, so that an interrupted evaluation goes on where it was."""

import hashlib
import io
import json
import logging
import os

import numpy as np
import tensorflow as tf

from aib_tf import files
from aib_tf.evaluation.subject import Subject
from aib_tf.evaluation.suite import Result

_LOGGER = logging.getLogger("aib_tf")
# Raised whenever a suite comes to measure something else, so that older files are not taken for its results.
_FORMAT = 2


class Store:
    """Keeps results of one model on one data set.

    A result is given back only for what it was made from: config and weights of the model and of the baseline, the
    first batch of the data and the number of batches, and all arguments. Where a caller's own function is among them,
    or a model has no config, nobody can say whether it is the same one, and nothing is kept.

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
        key = self._key(name, arguments)
        if key is None or not path.exists():
            return None
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as data:
                head = json.loads(str(data["head"]))
                if head["key"] != key:
                    return None
                arrays = {key[len("image/") :]: data[key] for key in data.files if key.startswith("image/")}
                return Result.from_dict(head["result"], arrays)
        except Exception as error:  # NumPy, zipfile and tokenize have many kinds of them for a file that is damaged
            _LOGGER.warning("%s cannot be read (%s); %s is measured again.", path, error, name)
            return None

    def save(self, result: Result, arguments: dict) -> None:
        """Keeps a result, whole or not at all; one that would never be given back is not kept."""
        key = self._key(result.suite, arguments)
        if key is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        head = {"key": key, "result": result.to_dict()}
        arrays = {f"image/{name}": values for name, values in result.per_image.items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, head=np.array(json.dumps(head, default=_plain)), **arrays)
        files.write_bytes(self.folder / f"{result.suite}.npz", buffer.getvalue())

    def _key(self, name, arguments):
        """What a result belongs to, as text; None where an argument, such as a function, has none."""
        if self._origin is None:
            return None
        try:
            return json.dumps([_FORMAT, name, self._origin, arguments], sort_keys=True, default=_plain)
        except TypeError:
            return None


def _digest(subject, dataset):
    """What a result depends on beside its arguments, as text; None where that cannot be told."""
    models = [subject.model] if subject.baseline is subject.model else [subject.model, subject.baseline]
    if subject.has_own_maps or not all(hasattr(model, "weights") for model in models):
        return None
    found = hashlib.sha256(f"{subject.probabilities}".encode())
    for model in models:
        try:
            found.update(json.dumps(model.get_config(), sort_keys=True).encode())
        except (NotImplementedError, TypeError):
            return None  # what it computes cannot be told
        found.update(f"{model.name} {model.dtype_policy.name}".encode())
        for weight in model.weights:
            found.update(f"{weight.path} {weight.shape}".encode())
            found.update(np.ascontiguousarray(weight).tobytes())
    for array in (subject.mean, subject.stddev):
        found.update(array.tobytes())
    return f"{found.hexdigest()} {_fingerprint(dataset)}"


def _fingerprint(dataset):
    """How many batches a data set has, where that is known, and what its first one holds."""
    found = hashlib.sha256()
    for part in tf.nest.flatten(next(iter(dataset), ())):
        array = np.asarray(part)
        # The bytes of texts are where they lie.
        found.update(
            repr(array.tolist()).encode() if array.dtype.kind == "O" else np.ascontiguousarray(array).tobytes()
        )
    return f"{_length(dataset)} {found.hexdigest()}"


def _length(dataset):
    cardinality = getattr(dataset, "cardinality", None)
    return int(cardinality()) if callable(cardinality) else len(dataset) if hasattr(dataset, "__len__") else None


def _plain(value):
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, range):
        return list(value)
    if isinstance(value, tf.data.Dataset):
        return _fingerprint(value)
    raise TypeError(f"No text can stand for it. Received: type={type(value).__name__}")
