"""Writes files whole or not at all, so that a reader never meets half a file."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = ["new_folder", "remove_leftovers", "replacing", "write_bytes", "write_json", "write_text"]

_MARK = ".tmp."


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path whose file takes the place of `path` when the block ends well.

    The temporary file lies in the same folder (a rename across file systems is not atomic) and its
    name ends with the name of the target, since many writers choose a format by the ending. It
    begins with a dot: shells and `glob.glob` pass over it, `pathlib.Path.glob` does not. The data
    is on the disk before the name changes. When the block raises, Ctrl-C included, the temporary
    file is removed and the target stays as it was. A target that is a symbolic link stays a link;
    the file that it names is replaced.

    Args:
        path: The file to write. Missing folders above it are made.

    Yields:
        The path to write to. The block must have closed it at its end.

    Raises:
        FileNotFoundError: The block wrote nothing.
        IsADirectoryError: `path` is a folder.

    Example:
        with replacing("run/model.weights.h5") as temporary:
            model.save_weights(temporary)
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"A file cannot replace a folder. Received: path={str(path)!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile.mkstemp: it makes the file unreadable for others whatever the umask says.
    temporary = target.with_name(f".{secrets.token_hex(6)}{_MARK}{target.name}")
    try:
        yield temporary
        if not temporary.exists():
            raise FileNotFoundError(f"Nothing was written to the temporary file. Received: path={str(path)!r}")
        _flush(temporary, os.O_RDWR)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # Windows has no handle of a folder to flush.
        _flush(target.parent, os.O_RDONLY | os.O_DIRECTORY)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary folder that becomes the new folder `path` when the block ends well.

    It lies beside `path`, with a name that begins with a dot. All its files are on the disk before the name changes.
    When the block raises, Ctrl-C included, the temporary folder is removed.

    Args:
        path: The folder to make. Missing folders above it are made.

    Yields:
        The folder to write to, which exists and is empty.

    Raises:
        FileExistsError: `path` exists, before the block or at its end; what is there stays as it was.
        OSError: the folder above cannot be made or written to.
    """
    target = Path(os.path.realpath(path))
    taken = FileExistsError(f"There is something of this name already. Received: path={str(path)!r}")
    if target.exists():
        raise taken
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{secrets.token_hex(6)}{_MARK}{target.name}")
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _flush(Path(folder, name), os.O_RDONLY)
        if target.exists():
            raise taken
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if hasattr(os, "O_DIRECTORY"):
        _flush(target.parent, os.O_RDONLY | os.O_DIRECTORY)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes `data` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` to `path` as UTF-8 with line ends as they are, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike, data) -> None:
    """Writes `data` to `path` as indented JSON, whole or not at all.

    NumPy scalars and arrays become numbers and lists, paths become strings.

    Raises:
        TypeError: JSON has no form for something in `data`.
        ValueError: `data` holds NaN or an infinity, which JSON does not have and strict readers
            refuse. Write None instead.
    """
    text = json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False, default=_plain)
    write_text(path, text + "\n")


def remove_leftovers(folder: str | os.PathLike) -> list[Path]:
    """Removes the temporary files and folders that a killed process left in `folder`.

    Call it only while no other process writes there.

    Returns:
        The paths that were removed, sorted.
    """
    leftovers = sorted(Path(folder).glob(f".*{_MARK}*"))
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
    return leftovers


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value):
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"JSON has no form for this type. Received: type={type(value).__name__}")
