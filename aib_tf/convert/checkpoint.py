"""Reads and writes the checkpoint files of PyTorch, without PyTorch and without running code from them.

A file of `torch.save` is a pickle with the tensors' bytes beside it. Python's own unpickler calls whatever a pickle
names, so it is not used here: the instructions are decoded by `pickletools`, which only parses, and carried out on
plain containers and records of our own. A name is looked up in a table, `_GLOBALS`, and never imported.
"""

import contextlib
import dataclasses
import importlib
import io
import math
import mmap
import os
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aib_tf.files import replacing

__all__ = ["CheckpointError", "read_checkpoint", "strip_state_dict", "write_checkpoint"]


class CheckpointError(ValueError):
    """A file is no checkpoint that can be read, or wants what reading weights does not need."""


def read_checkpoint(path: str | os.PathLike, *, ema: bool = False) -> dict[str, np.ndarray]:
    """Reads the state dict of a PyTorch checkpoint as NumPy arrays.

    Files of `torch.save` are read in the zip format (PyTorch 1.6 and later) and in the format before it (0.1.10 and
    later), whatever they are called. The state dict is found in `model_states["net"]` (the released checkpoints of VGG
    and CUB), in `state_dict` (those of WideResNet, and most others), or is the whole file.

    Nothing that the file names is called. Where PyTorch 2.6 or later is installed, `torch.load(weights_only=True)`
    reads the tensors once the file was found harmless; otherwise this module does. The arrays are the same.

    Args:
        path: The file.
        ema: Read the moving average of the weights, `model_states["net_ema"]`, instead of the weights.

    Returns:
        State-dict name -> array, in the order of the file. Names are without the prefix `module.` that DataParallel
        gives to all. Arrays are C-contiguous copies in PyTorch's layouts (convolution OIHW, linear out x in) and in
        the type of the file, except that bfloat16, which NumPy does not have, becomes float32.

    Raises:
        CheckpointError: The file is damaged, is no checkpoint, holds no state dict or not the one asked for, names
            something else than tensors and plain containers, or has tensors that reach beyond their data.
        FileNotFoundError: There is no such file.
        IsADirectoryError: `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"A checkpoint of PyTorch is one file, not a folder. Received: path={str(path)!r}")
    if not path.exists():
        raise FileNotFoundError(f"There is no such file. Received: path={str(path)!r}")
    with _errors_name(path), open(path, "rb") as file, _open_container(file) as container:
        place = _find_state_dict(container.root, ema)
        tensors = _get(container.root, place)
        _check_types(tensors)
        _check_overlap(tensors, os.fstat(file.fileno()).st_size)
        state = _read_with_torch(path, place)
        if state is None:
            state = _read_tensors(container, tensors)
        else:
            for storage in {view.storage for view in tensors.values()}:
                container.read(storage)  # checks the CRC, which PyTorch does not
    return _without_prefix(state)


def strip_state_dict(checkpoint: Mapping, *, ema: bool = False) -> dict[str, np.ndarray]:
    """Finds the state dict in a checkpoint that is in memory already, and returns it as NumPy arrays.

    Args:
        checkpoint: A state dict of NumPy arrays or scalars, or PyTorch tensors on any device, or the dict of a released
            checkpoint around one.
        ema: As for `read_checkpoint`.

    Returns:
        As `read_checkpoint`. Arrays that are C-contiguous already are not copied.

    Raises:
        CheckpointError: There is no state dict, or not the one asked for, or it holds something else.
    """
    state = _get(checkpoint, _find_state_dict(checkpoint, ema))
    _check_types(state)
    return _without_prefix({name: _as_array(value) for name, value in state.items()})


def write_checkpoint(path: str | os.PathLike, state: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as a PyTorch checkpoint, whole or not at all.

    The file is that of `torch.save({"state_dict": OrderedDict(...)}, path)` in the zip format, which
    `torch.load(path, weights_only=True)` reads. The same state gives the same bytes.

    Args:
        path: The file. Missing folders above it are made.
        state: State-dict name -> array in PyTorch's layout: float16, float32, float64, complex64, complex128, bool,
            uint8, or a signed integer.

    Raises:
        ValueError: `state` is empty, or has a name that is no string, or an array of another type.
        IsADirectoryError: `path` is a folder.
    """
    if not state:
        raise ValueError(f"A checkpoint needs at least one array. Received: state={state!r}")
    arrays = {}
    for name, value in state.items():
        array = np.asarray(value)
        if not isinstance(name, str):
            raise ValueError(f"The names of a state dict are strings. Received: name={name!r}")
        if array.dtype.newbyteorder("<") not in _STORAGE_NAMES:
            known = ", ".join(str(dtype) for dtype in _STORAGE_NAMES)
            raise ValueError(f"The type of an array must be one of {known}. Received: {name}={array.dtype} array")
        arrays[name] = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    members = {"data.pkl": _pickled_state(arrays), "byteorder": b"little", "version": b"3\n"}
    with replacing(path) as temporary, open(temporary, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(_member_at(file.tell(), name), content)
        for key, array in enumerate(arrays.values()):
            archive.writestr(_member_at(file.tell(), f"data/{key}"), array.tobytes())


# ------------------------------------------------------------------------------------------------- records of a pickle

_BFLOAT16 = "bfloat16"
_DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype([(_BFLOAT16, "<u2")]),
    "ComplexFloatStorage": np.dtype("<c8"),
    "ComplexDoubleStorage": np.dtype("<c16"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_STORAGE_NAMES = {dtype: name for name, dtype in _DTYPES.items() if not dtype.names}


@dataclasses.dataclass(frozen=True)
class _StorageType:
    """The name of a class of storages, which says the type of its elements."""

    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Storage:
    """`numel` elements of the bytes that the file holds under `key`, from element `start`."""

    key: str
    dtype: np.dtype
    numel: int
    start: int = 0


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A strided view of a storage; `offset` and `stride` count elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def __post_init__(self):
        lengths = (self.offset, *self.size, *self.stride)
        if not isinstance(self.storage, _Storage) or not all(map(_is_length, lengths)):
            raise CheckpointError("A tensor of the checkpoint has no data, or an impossible offset, size or stride.")
        if len(self.size) != len(self.stride) or len(self.size) > 32:
            raise CheckpointError("A tensor of the checkpoint has not one stride for each of at most 32 dimensions.")
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        if self.numel and (last >= self.storage.numel or self.numel > self.storage.numel):
            raise CheckpointError(
                "A tensor of the checkpoint reaches beyond its data: "
                f"size {_short(self.size)}, stride {_short(self.stride)}, offset {_short(self.offset)} "
                f"over {self.storage.numel} elements."
            )


def _is_length(value) -> bool:
    return type(value) is int and 0 <= value < 2**63


class _Inert:
    """Stands for an object that is no weight. It takes whatever is put into it, and keeps nothing."""


_INERT = _Inert()


@dataclasses.dataclass(frozen=True, eq=False)
class _Global:
    """A function or class that the pickle names; `rebuild` is what we do instead of calling it."""

    rebuild: Callable


def _inert(*_):
    return _INERT


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    if metadata:
        raise CheckpointError("A tensor of the checkpoint is a conjugated or negated view; save a copy of it.")
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _parameter(data, *_):
    if not isinstance(data, _Tensor):
        raise CheckpointError("A parameter of the checkpoint has no data.")
    return data


def _from_type(function, kind, arguments, state):
    """A tensor with attributes, which are left out."""
    if not isinstance(function, _Global):
        raise CheckpointError("A tensor of the checkpoint is made in a way that is not PyTorch's.")
    return function.rebuild(*arguments)


def _size(sizes=()):
    return tuple(sizes)


def _dict(pairs=(), *_):
    # Python 2 pickled an OrderedDict with the list of its items, each of them a list.
    filled = {}
    for key, value in pairs if isinstance(pairs, list) else ():
        filled[_as_key(key)] = value
    return filled


# What training scripts keep beside the weights, and PyTorch does not know.
_INERT_GLOBALS = (
    "argparse.Namespace",
    "collections.deque",
    *(f"builtins.{name}" for name in ("bool", "float", "frozenset", "int", "list", "slice", "str", "tuple")),
    "numpy.dtype",
    "numpy.ndarray",
    *(f"{module}.multiarray.{name}" for module in ("numpy.core", "numpy._core") for name in ("_reconstruct", "scalar")),
    *(f"numpy.dtypes.{name}DType" for name in ("Bool", "Float16", "Float32", "Float64", "UInt8")),
    *(f"numpy.dtypes.{name}DType" for name in ("Int8", "Int16", "Int32", "Int64")),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")),
)
# What it knows by itself.
_INERT_GLOBALS_OF_PYTORCH = (
    "_codecs.encode",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.set",
    "collections.Counter",
    "torch.device",
    *(f"torch.{name}" for name in ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")),
    *(f"torch.{name}" for name in ("bool", "uint8", "int8", "int16", "int32", "int64")),
)
_GLOBALS = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.Size": _size,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _dict,
    "builtins.dict": _dict,
    **dict.fromkeys((*_INERT_GLOBALS, *_INERT_GLOBALS_OF_PYTORCH), _inert),
}
_TOKENS = {name: _Global(rebuild) for name, rebuild in _GLOBALS.items()} | {
    f"{module}.{name}": _StorageType(dtype) for module in ("torch", "torch.cuda") for name, dtype in _DTYPES.items()
}


def _token(module: str, name: str):
    """Returns what stands for a global; nothing is imported."""
    full = f"{module}.{name}".replace("__builtin__.", "builtins.", 1)  # as protocol 2 names it
    if full not in _TOKENS:
        raise CheckpointError(
            f"The checkpoint asks for {_short(full)}, which weights do not need. It was refused, and nothing was run. "
            "If you trust whoever made the file, load it with PyTorch there and save model.state_dict() alone."
        )
    return _TOKENS[full]


def _as_key(key):
    # A key of nested tuples would be hashed by recursion in C, without a limit. No state dict has one.
    return key if isinstance(key, (str, bytes, int, float, type(None))) else object()


def _short(value) -> str:
    text = str(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


class _Interpreter:
    """Carries out the instructions of a pickle on plain containers.

    Every instruction that protocols 2 to 5 write for such data has a method or is in `_PUSHED`. Those that name a
    class by other means (INST, OBJ, the EXT codes), or ask for what is outside the file (PERSID, NEXT_BUFFER), are
    refused.
    """

    _NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT")
    _STRINGS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING")
    _BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
    _PUSHED = frozenset((*_NUMBERS, *_STRINGS, *_BYTES))
    _NEW = {
        "NONE": lambda: None,
        "NEWTRUE": lambda: True,
        "NEWFALSE": lambda: False,
        "EMPTY_TUPLE": tuple,
        "EMPTY_LIST": list,
        "EMPTY_DICT": dict,
        "EMPTY_SET": _inert,
    }

    def __init__(self, load_storage: Callable):
        self._load_storage = load_storage
        self._stack = []
        self._marks = []
        self._memo = {}

    def run(self, stream) -> Any:
        """Reads one pickle from where the stream is."""
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in self._PUSHED:
                self._stack.append(argument)
            elif opcode.name in self._NEW:
                self._stack.append(self._NEW[opcode.name]())
            elif opcode.name in self._METHODS:
                self._METHODS[opcode.name](self, argument)
            elif opcode.name not in ("PROTO", "FRAME", "STOP"):
                if opcode.name == "INST":
                    _token(*argument.split(" ", 1))
                raise CheckpointError(
                    f"The checkpoint holds the pickle instruction {opcode.name}, which torch.save does not write. "
                    "It was refused, and nothing was run."
                )
        return self._pop()

    def _pop(self):
        if self._marks and len(self._stack) <= self._marks[-1]:
            raise CheckpointError("The pickle of the checkpoint is damaged: it takes more than it has put down.")
        return self._stack.pop()

    def _pop_to_mark(self) -> list:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _mark(self, _):
        self._marks.append(len(self._stack))

    def _pop_one(self, _):
        if self._marks and len(self._stack) == self._marks[-1]:
            self._marks.pop()
        else:
            self._pop()

    def _pop_mark(self, _):
        self._pop_to_mark()

    def _dup(self, _):
        self._stack.append(self._stack[-1])

    def _put(self, index):
        self._memo[index] = self._stack[-1]

    def _memoize(self, _):
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, index):
        self._stack.append(self._memo[index])

    def _tuple(self, _):
        self._stack.append(tuple(self._pop_to_mark()))

    def _tuple_of(self, count):
        items = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(items)))

    def _list(self, _):
        self._stack.append(self._pop_to_mark())

    def _frozenset(self, _):
        self._pop_to_mark()
        self._stack.append(_INERT)

    def _dict(self, _):
        items = self._pop_to_mark()
        self._stack.append({})
        self._set_items(items)

    def _append(self, _):
        self._extend([self._pop()])

    def _appends(self, _):
        self._extend(self._pop_to_mark())

    def _extend(self, items):
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif target is not _INERT:
            raise CheckpointError("The pickle of the checkpoint is damaged: it appends to what is no list.")

    def _set_item(self, _):
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _set_items_to_mark(self, _):
        self._set_items(self._pop_to_mark())

    def _set_items(self, items):
        target = self._stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[_as_key(key)] = value
        elif target is not _INERT:
            raise CheckpointError("The pickle of the checkpoint is damaged: it sets an item of what is no dict.")

    def _global(self, argument):
        self._stack.append(_token(*argument.split(" ", 1)))

    def _stack_global(self, _):
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise CheckpointError("The pickle of the checkpoint is damaged: a name in it is no string.")
        self._stack.append(_token(module, name))

    def _persistent(self, _):
        self._stack.append(self._load_storage(self._pop()))

    def _reduce(self, _):
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise CheckpointError("The pickle of the checkpoint is damaged: it calls what is no function.")
        self._stack.append(function.rebuild(*arguments))

    def _build(self, _):
        self._pop()
        # The state of a dict is PyTorch's `_metadata`: version numbers of the modules.
        if not isinstance(self._stack[-1], (dict, _Inert)):
            raise CheckpointError("The pickle of the checkpoint gives a state to what has none.")

    _METHODS = {
        "MARK": _mark,
        "POP": _pop_one,
        "POP_MARK": _pop_mark,
        "DUP": _dup,
        "BINPUT": _put,
        "LONG_BINPUT": _put,
        "MEMOIZE": _memoize,
        "BINGET": _get,
        "LONG_BINGET": _get,
        "TUPLE": _tuple,
        "TUPLE1": lambda self, _: self._tuple_of(1),
        "TUPLE2": lambda self, _: self._tuple_of(2),
        "TUPLE3": lambda self, _: self._tuple_of(3),
        "LIST": _list,
        "FROZENSET": _frozenset,
        "DICT": _dict,
        "APPEND": _append,
        "APPENDS": _appends,
        "ADDITEMS": _appends,
        "SETITEM": _set_item,
        "SETITEMS": _set_items_to_mark,
        "GLOBAL": _global,
        "STACK_GLOBAL": _stack_global,
        "BINPERSID": _persistent,
        "REDUCE": _reduce,
        "NEWOBJ": _reduce,
        "BUILD": _build,
    }


def _storage_fields(identity) -> tuple[str, np.dtype, int, tuple]:
    """Checks what a pickle says of a storage; returns key, dtype, numel and what else there is."""
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise CheckpointError("The checkpoint refers to something outside of it that is no tensor data.")
    _, kind, key, _, numel, *rest = identity
    if not isinstance(kind, _StorageType) or not isinstance(key, str) or not _is_length(numel):
        raise CheckpointError("The checkpoint describes the data of a tensor in a way that is not PyTorch's.")
    return key, kind.dtype, numel, tuple(rest)


# --------------------------------------------------------------------------------------------------------- containers


class _Zip:
    """The zip format, PyTorch 1.6 and later: NAME/data.pkl, and NAME/data/KEY for each storage."""

    def __init__(self, file):
        self._archive = zipfile.ZipFile(file)
        members = self._archive.infolist()
        self._members = {member.filename: member for member in members}
        if len(self._members) != len(members):
            raise CheckpointError("The archive holds two members of one name.")
        pickles = [name for name in self._members if name.count("/") <= 1 and name.split("/")[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise CheckpointError("This is a zip archive, but not one of torch.save: it has no data.pkl.")
        self._folder = pickles[0].removesuffix("data.pkl")
        if any(name.startswith((f"{self._folder}code/", f"{self._folder}constants.pkl")) for name in self._members):
            raise CheckpointError(
                "This is a TorchScript program, not a checkpoint. "
                "Write its weights with PyTorch: torch.save(torch.jit.load(path).state_dict(), new_path)."
            )
        # Stored data cannot be larger than the file; that which is packed, or listed twice, can.
        size = os.fstat(file.fileno()).st_size
        if any(not 0 <= member.header_offset < size for member in members):
            raise CheckpointError("The archive places a member outside of the file: it is damaged or incomplete.")
        if sum(member.file_size for member in members) > size or any(map(_is_packed, members)):
            raise CheckpointError("The archive is compressed, which torch.save never does, or lies about its sizes.")
        self._order = self._member("byteorder") if f"{self._folder}byteorder" in self._members else b"little"
        if self._order not in (b"little", b"big"):
            raise CheckpointError(f"The byte order must be little or big, and is {_short(self._order)}.")
        self._dtypes = {}
        self.root = _Interpreter(self._load_storage).run(io.BytesIO(self._member("data.pkl")))

    def read(self, storage: _Storage) -> np.ndarray:
        data = np.frombuffer(self._member(f"data/{storage.key}"), storage.dtype)
        return data if self._order == b"little" else data.view(data.dtype.newbyteorder(">"))

    def close(self):
        self._archive.close()

    def _member(self, name: str) -> bytes:
        return self._archive.read(self._members[self._folder + name])  # checks the CRC

    def _load_storage(self, identity) -> _Storage:
        key, dtype, numel, _ = _storage_fields(identity)
        member = self._members.get(f"{self._folder}data/{key}")
        if member is None:
            raise CheckpointError(f"The data of a tensor is missing: data/{_short(key)}.")
        if member.file_size != numel * dtype.itemsize or self._dtypes.setdefault(key, dtype) != dtype:
            raise CheckpointError(
                f"The data of a tensor, data/{_short(key)}, has {member.file_size} bytes, "
                f"and should have {_short(numel)} elements of {dtype.itemsize}."
            )
        return _Storage(key, dtype, numel)


def _is_packed(member: zipfile.ZipInfo) -> bool:
    encrypted = member.flag_bits & 1
    return bool(encrypted) or member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size


class _Stream:
    """The format before it: pickles one after the other, then for each storage its length and its bytes."""

    _MAGIC = 0x1950A86A20F9469CFC6C
    _PROTOCOL = 1001

    def __init__(self, file):
        self._numel = {}
        self._dtypes = {}
        # Mapped, a read of more than there is gives what there is, and takes no memory for what the pickle promises.
        self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._pickle() != self._MAGIC or self._pickle() != self._PROTOCOL:
            raise CheckpointError("This is a pickle, but not one of torch.save.")
        self._pickle()  # the sizes of C types on the machine that wrote it, which nobody reads
        self.root = self._pickle()
        keys = self._pickle()
        if not isinstance(keys, list) or set(map(_as_key, keys)) != set(self._numel) or len(keys) != len(self._numel):
            raise CheckpointError("The file does not list the data of its tensors.")
        self._places = {}
        position = self._bytes.tell()
        for key in keys:
            (numel,) = struct.unpack_from("<q", self._bytes, position)
            self._places[key] = position + 8
            position += 8 + numel * self._dtypes[key].itemsize
            if numel != self._numel[key] or position > len(self._bytes):
                raise CheckpointError(
                    f"The data of a tensor, {_short(key)}, ends at byte {_short(position)} of {len(self._bytes)}, and "
                    f"has {_short(numel)} elements of {_short(self._numel[key])}: the file is damaged or incomplete."
                )

    def read(self, storage: _Storage) -> np.ndarray:
        begin = self._places[storage.key] + storage.start * storage.dtype.itemsize
        return np.frombuffer(self._bytes[begin : begin + storage.numel * storage.dtype.itemsize], storage.dtype)

    def close(self):
        self._bytes.close()

    def _pickle(self):
        return _Interpreter(self._load_storage).run(self._bytes)

    def _load_storage(self, identity) -> _Storage:
        key, dtype, numel, rest = _storage_fields(identity)
        if self._numel.setdefault(key, numel) != numel or self._dtypes.setdefault(key, dtype) != dtype:
            raise CheckpointError(f"The file describes the data {_short(key)} in two ways.")
        if rest == () or rest[0] is None:
            return _Storage(key, dtype, numel)
        _, start, count = rest[0]  # a part of a storage, from before storages were shared
        if not _is_length(start) or not _is_length(count) or start + count > numel:
            raise CheckpointError(f"A part of the data {_short(key)} reaches beyond it.")
        return _Storage(key, dtype, count, start)


@contextlib.contextmanager
def _open_container(file) -> Iterator[_Zip | _Stream]:
    head = file.read(512)
    if head[257:262] == b"ustar":
        raise CheckpointError(
            "This is a tar archive. Unpack it; or, if PyTorch before 0.1.10 wrote it, load and save it with PyTorch."
        )
    if head[:4] != b"PK\x03\x04" and head[:1] != pickle.PROTO:
        file.seek(0)
        try:
            # A pickle of the oldest protocol begins like any text. What it asks for is worth a name.
            _Interpreter(_refuse_storage).run(file)
        except CheckpointError as error:
            if "asks for" in str(error):
                raise
        except (ValueError, EOFError, IndexError, KeyError, struct.error):
            pass
        raise CheckpointError("This is not a checkpoint: PyTorch's begin as a zip archive or a pickle does.")
    container = _Zip(file) if head[:2] == b"PK" else _Stream(file)
    with contextlib.closing(container):
        yield container


def _refuse_storage(identity):
    raise EOFError(identity)


@contextlib.contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Lets every error of reading be a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error} Received: path={str(path)!r}") from error.__cause__
    except (
        zipfile.BadZipFile,
        struct.error,
        EOFError,
        LookupError,
        ArithmeticError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:
        raise CheckpointError(
            f"The checkpoint is damaged or incomplete: {_short(str(error))}. Fetch or copy it again. "
            f"Received: path={str(path)!r}"
        ) from error


# --------------------------------------------------------------------------------------------------------- state dicts


def _find_state_dict(root, ema: bool) -> tuple[str, ...]:
    """Returns the keys that lead to the state dict."""
    if not isinstance(root, Mapping):
        raise CheckpointError("The checkpoint holds no state dict: it is no dict at all.")
    states = root.get("model_states")
    if ema:
        if not isinstance(states, Mapping) or not isinstance(states.get("net_ema"), Mapping):
            raise CheckpointError(
                "The checkpoint has no moving average of the weights, model_states['net_ema']; read it with ema=False."
            )
        return "model_states", "net_ema"
    if isinstance(states, Mapping) and isinstance(states.get("net"), Mapping):
        return "model_states", "net"
    if isinstance(root.get("state_dict"), Mapping):
        return ("state_dict",)
    if any(map(_is_tensor, root.values())):
        return ()
    raise CheckpointError(
        "The checkpoint holds no tensors where a state dict is looked for: in model_states['net'], in state_dict, or "
        f"in the file itself, which has {_short(', '.join(map(str, root)) or 'nothing')}."
    )


def _get(root, keys: tuple[str, ...]):
    for key in keys:
        root = root[key]
    return root


def _is_tensor(value) -> bool:
    return isinstance(value, _Tensor) or hasattr(value, "__array__")  # arrays and scalars of NumPy, PyTorch, others


def _check_types(state: Mapping) -> None:
    others = [str(name) for name, value in state.items() if not isinstance(name, str) or not _is_tensor(value)]
    if others or not state:
        raise CheckpointError(f"The state dict holds what is no tensor: {_short(', '.join(others) or 'nothing')}.")


def _without_prefix(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    while all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): array for name, array in state.items()}
    return state


def _check_overlap(state: dict[str, _Tensor], file_size: int) -> None:
    """Raises CheckpointError if the tensors of a file together are much more than the file."""
    views = set(state.values())
    storages = {view.storage for view in views}
    total = sum(view.numel * view.storage.dtype.itemsize for view in views)
    total = max(total, sum(storage.numel * storage.dtype.itemsize for storage in storages))
    if total > _MOST_OVERLAP * file_size:
        raise CheckpointError(f"The tensors overlap: together they have {total} bytes, and the file {file_size}.")


_MOST_OVERLAP = 4  # a state dict has 1; without a limit, views of one storage could fill the memory


def _read_tensors(container: _Zip | _Stream, tensors: dict[str, _Tensor]) -> dict[str, np.ndarray]:
    views = {}
    for view in tensors.values():
        views.setdefault(view.storage, set()).add(view)
    arrays = {}
    for storage, parts in views.items():  # each is read once, and one after the other
        data = container.read(storage)
        arrays |= {view: _copy(view, data) for view in parts}
    return {name: arrays[view] for name, view in tensors.items()}


def _copy(view: _Tensor, data: np.ndarray) -> np.ndarray:
    """Returns the elements of a view, whose bounds were checked, as an array of its own."""
    if view.numel:
        # The stride of a dimension of length 1 is free, and may be any number.
        strides = [stride if size > 1 else 0 for size, stride in zip(view.size, view.stride, strict=True)]
        strides = [data.itemsize * stride for stride in strides]
        data = np.lib.stride_tricks.as_strided(data[view.offset :], view.size, strides, writeable=False)
    else:
        data = np.empty(view.size, data.dtype)
    if data.dtype.names:
        # The upper half of a float32 is a bfloat16.
        return np.asarray(np.left_shift(data[_BFLOAT16], 16, dtype=np.uint32, order="C")).view(np.float32)
    return data.astype(data.dtype.newbyteorder("="), order="C")


# ------------------------------------------------------------------------------------------------------------- PyTorch


class _StandIn:
    """What PyTorch makes of a class or function of `_INERT_GLOBALS`."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


def _read_with_torch(path: Path, place: tuple[str, ...]) -> dict[str, np.ndarray] | None:
    """Reads a file that was found harmless with PyTorch; None where that is absent, or knows less than this module."""
    try:
        torch = importlib.import_module("torch")  # not a dependency: for those who have it anyway
    except ImportError:
        return None
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 6):  # weights_only ran code until then (CVE-2025-32434)
        return None
    # Stand-ins here as well: a NumPy data type from a file, for one, can make NumPy take numbers for addresses.
    stand_ins = [(_StandIn, name) for name in _INERT_GLOBALS]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = _get(torch.load(path, map_location="cpu", weights_only=True), place)
    except Exception:
        # Its restricted unpickler knows protocol 2 alone. This module then reads the file, or says why it does not.
        return None
    return {name: np.array(_as_array(tensor)) for name, tensor in state.items()}  # of its own: views share memory


def _as_array(tensor) -> np.ndarray:
    """Returns an array or a PyTorch tensor as a C-contiguous array."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        tensor = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
    return np.asarray(tensor, order="C")


# ------------------------------------------------------------------------------------------------------------- writing


def _pickled_state(arrays: dict[str, np.ndarray]) -> bytes:
    """Returns the pickle of {"state_dict": OrderedDict(name -> tensor)}, as `torch.save` writes it, without memo."""
    out = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, _text("state_dict"), _ORDERED_DICT, pickle.MARK]
    for key, (name, array) in enumerate(arrays.items()):
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        out += [
            _text(name),
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            pickle.MARK,
            *(pickle.MARK, _text("storage"), f"ctorch\n{_STORAGE_NAMES[array.dtype]}\n".encode(), _text(str(key))),
            *(_text("cpu"), _integer(array.size), pickle.TUPLE, pickle.BINPERSID),
            *(_integer(0), _integers(array.shape), _integers(strides), pickle.NEWFALSE, _ORDERED_DICT),
            pickle.TUPLE,
            pickle.REDUCE,
        ]
    return b"".join([*out, pickle.SETITEMS, pickle.SETITEM, pickle.STOP])


_ORDERED_DICT = b"ccollections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE


def _text(text: str) -> bytes:
    data = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", value)


def _integers(values) -> bytes:
    return pickle.MARK + b"".join(map(_integer, values)) + pickle.TUPLE


def _member_at(position: int, name: str) -> zipfile.ZipInfo:
    """Returns the head of a member whose data begins at a multiple of 64 bytes, so that PyTorch can map it."""
    member = zipfile.ZipInfo(f"archive/{name}")
    begin = position + 30 + len(member.filename) + 4  # the fixed part of the head, the name, the head of the padding
    padding = -begin % 64
    member.extra = b"FB" + struct.pack("<H", padding) + b"\0" * padding
    return member
