"""Writes files whole or not at all, to local folders and to every file system that TensorFlow knows."""

import contextlib
import errno
import fnmatch
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

__all__ = [
    "RemotePath",
    "absolute",
    "local_copy",
    "new_folder",
    "path",
    "remove_leftovers",
    "replacing",
    "write_bytes",
    "write_json",
    "write_text",
]

_MARK = ".tmp."
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)


def path(name: "str | os.PathLike") -> "Path | RemotePath":
    """Gives a path that has the methods the library needs, wherever its file lies.

    Args:
        name: A local path, also one that begins with ~ or file://, or one on a file system that `tf.io.gfile` knows:
            gs://bucket/folder, hdfs://host/folder.

    Returns:
        A `pathlib.Path` for a local path, else a `RemotePath`. Never pass a name with a scheme to `pathlib.Path`: it
        makes one slash of two.

    Raises:
        ValueError: TensorFlow has no file system of this scheme, or nothing stands after the scheme.
    """
    remote = _remote(name)
    return Path(_local(name)) if remote is None else remote


def absolute(name: "str | os.PathLike") -> str:
    """Gives a path as it has to be kept in a file that is read from other working directories.

    Args:
        name: A local path, also one that begins with ~, or one with a scheme.

    Returns:
        The absolute path; one with a scheme as it is.
    """
    name = os.fspath(name)
    return name if "://" in name else os.path.abspath(os.path.expanduser(name))


class RemotePath(os.PathLike):
    """A path on a file system that TensorFlow reaches by a scheme, with some of the methods of `pathlib.Path`.

    They do what pathlib's do, and raise the same errors (`OSError` and its subclasses, not TensorFlow's). An object
    store has no folders: there, one exists while there is a file below it.

    Args:
        name: such as "gs://bucket/folder".
    """

    def __init__(self, name: str):
        scheme, rest = _SCHEME.fullmatch(name).groups()
        if not rest.strip("/"):
            raise ValueError(f"A file system alone is no path: name a folder on it. Received: path={name!r}")
        schemes = sorted(filter(None, _gfile().get_registered_schemes()))
        if scheme not in schemes:
            raise ValueError(
                f"TensorFlow has no file system for {scheme}:// here, but for {', '.join(schemes)}. Others come with "
                f"a plugin that has to be imported first, or mount the store as a folder. Received: path={name!r}"
            )
        self._scheme = scheme
        self._path = PurePosixPath(rest)

    def __fspath__(self):
        return f"{self._scheme}://{self._path}"

    __str__ = __fspath__

    def __repr__(self):
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other):
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self):
        return hash(str(self))

    def __lt__(self, other):
        return str(self) < str(other) if isinstance(other, RemotePath) else NotImplemented

    def __truediv__(self, other):
        return self._at(self._path / other)

    @property
    def name(self) -> str:
        return self._path.name

    @property
    def suffix(self) -> str:
        return self._path.suffix

    @property
    def parent(self) -> "RemotePath":
        parent = self._path.parent
        return self if parent.name == "" else self._at(parent)  # a bucket or a host is the topmost

    def with_name(self, name: str) -> "RemotePath":
        return self._at(self._path.with_name(name))

    def exists(self) -> bool:
        with _os_errors(self):
            return _gfile().exists(str(self))

    def is_dir(self) -> bool:
        with _os_errors(self):
            return _gfile().isdir(str(self))

    def is_file(self) -> bool:
        return self.exists() and not self.is_dir()

    def iterdir(self) -> "Iterator[RemotePath]":
        with _os_errors(self):
            names = _gfile().listdir(str(self))
        # An object store ends the names of folders in a slash, and may list the folder itself.
        return iter([self / name.rstrip("/") for name in names if name.rstrip("/")])

    def glob(self, pattern: str) -> "Iterator[RemotePath]":
        """Entries of this folder whose name matches; unlike pathlib's, for a pattern without slashes."""
        if not self.is_dir():
            return iter(())
        return iter([entry for entry in self.iterdir() if fnmatch.fnmatchcase(entry.name, pattern)])

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        if not exist_ok and self.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self))
        with _os_errors(self):
            gfile = _gfile()
            (gfile.makedirs if parents else gfile.mkdir)(str(self))

    def read_bytes(self) -> bytes:
        with _os_errors(self), _gfile().GFile(str(self), "rb") as file:
            return file.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def unlink(self, missing_ok: bool = False) -> None:
        with contextlib.suppress(*[FileNotFoundError] * missing_ok), _os_errors(self):
            _gfile().remove(str(self))

    def replace(self, target: "RemotePath") -> "RemotePath":
        with _os_errors(self):
            _gfile().rename(str(self), str(target), overwrite=True)
        return target

    def _at(self, path):
        other = object.__new__(RemotePath)
        other._scheme, other._path = self._scheme, path
        return other


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path whose file takes the place of `path` when the block ends well.

    The temporary file lies in the same folder (a rename across file systems is not atomic) and its
    name ends with the name of the target, since many writers choose a format by the ending. It
    begins with a dot: shells and `glob.glob` pass over it, `pathlib.Path.glob` does not. The data
    is on the disk before the name changes. When the block raises, Ctrl-C included, the temporary
    file is removed and the target stays as it was. A target that is a symbolic link stays a link;
    the file that it names is replaced.

    For a path with a scheme, such as gs://, the block writes to a file in the local temporary folder. At its end that
    is copied to a temporary name beside the target, which then is renamed. On HDFS and the like the rename makes the
    file visible at once; on an object store it is a copy within the store, and an object appears whole or not at all.

    Args:
        path: The file to write. Missing folders above it are made.

    Yields:
        The local path to write to. The block must have closed it at its end.

    Raises:
        FileNotFoundError: The block wrote nothing.
        IsADirectoryError: `path` is a folder.

    Example:
        with replacing("run/model.weights.h5") as temporary:
            model.save_weights(temporary)
    """
    remote = _remote(path)
    if remote is not None:
        with _uploading(remote) as temporary:
            yield temporary
        return
    target = Path(os.path.realpath(_local(path)))
    _check_no_folder(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile.mkstemp: it makes the file unreadable for others whatever the umask says.
    temporary = target.with_name(_temporary_name(target))
    try:
        yield temporary
        _check_written(temporary, target)
        _flush(temporary, os.O_RDWR)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # Windows has no handle of a folder to flush.
        _flush(target.parent, os.O_RDONLY | os.O_DIRECTORY)


@contextlib.contextmanager
def local_copy(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a local file with the content of `path`, for readers that know no other file systems.

    Args:
        path: The file to read.

    Yields:
        The path itself if it is local, else that of a copy with the same name, which is removed after the block.

    Raises:
        OSError: A file that is not local is missing or cannot be copied.
    """
    remote = _remote(path)
    if remote is None:
        yield Path(_local(path))
        return
    with tempfile.TemporaryDirectory(prefix="aib_tf-") as folder:
        copy = Path(folder, remote.name)
        with _os_errors(remote):
            _gfile().copy(str(remote), str(copy))
        yield copy


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary folder that becomes the new local folder `path` when the block ends well.

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
    temporary = target.with_name(_temporary_name(target))
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


def remove_leftovers(folder: str | os.PathLike) -> "list[Path | RemotePath]":
    """Removes the temporary files and folders that a killed process left in `folder`.

    Call it only while no other process writes there.

    Returns:
        The paths that were removed, sorted.
    """
    leftovers = sorted(path(folder).glob(f".*{_MARK}*"))
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover)  # of `new_folder`, which is local
        else:
            leftover.unlink(missing_ok=True)
    return leftovers


@contextlib.contextmanager
def _uploading(target):
    """`replacing` for a `RemotePath`."""
    _check_no_folder(target)
    with tempfile.TemporaryDirectory(prefix="aib_tf-") as folder:
        local = Path(folder, target.name)
        yield local
        _check_written(local, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(_temporary_name(target))
        try:
            with _os_errors(target):
                _gfile().copy(str(local), str(temporary))
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error says more
                temporary.unlink()
            raise


def _temporary_name(target):
    return f".{secrets.token_hex(6)}{_MARK}{target.name}"


def _check_no_folder(target):
    if target.is_dir():
        raise IsADirectoryError(f"A file cannot replace a folder. Received: path={str(target)!r}")


def _check_written(temporary, target):
    if not temporary.exists():
        raise FileNotFoundError(f"Nothing was written to the temporary file. Received: path={str(target)!r}")


def _remote(name):
    """The `RemotePath` of a name, None for that of a local file."""
    if isinstance(name, RemotePath):
        return name
    name = os.fspath(name)
    match = _SCHEME.fullmatch(name)
    return RemotePath(name) if match is not None and match.group(1) != "file" else None


def _local(name):
    return os.path.expanduser(os.fspath(name).removeprefix("file://"))


def _gfile():
    # Most users of this module never need it, and some run without TensorFlow.
    import tensorflow as tf

    return tf.io.gfile


@contextlib.contextmanager
def _os_errors(path):
    """Raises the errors of TensorFlow's file systems as those that Python's have."""
    import tensorflow as tf

    numbers = {
        tf.errors.NotFoundError: errno.ENOENT,
        tf.errors.AlreadyExistsError: errno.EEXIST,
        tf.errors.PermissionDeniedError: errno.EACCES,
        tf.errors.UnauthenticatedError: errno.EACCES,
        tf.errors.ResourceExhaustedError: errno.ENOSPC,
    }
    try:
        yield
    except tf.errors.OpError as error:
        number = numbers.get(type(error), errno.EIO)
        raise OSError(number, error.message or os.strerror(number), str(path)) from error


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
