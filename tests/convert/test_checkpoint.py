"""PyTorch's files are read as PyTorch reads them, and nothing in them runs.

`make_checkpoints.py` made the files in data/ with PyTorch. The hostile ones are made here, out of pickle instructions.
"""

import argparse
import collections
import importlib.util
import io
import os
import pickle
import random
import re
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from aib_tf.convert import checkpoint
from aib_tf.convert.checkpoint import CheckpointError, read_checkpoint, strip_state_dict, write_checkpoint

DATA = Path(__file__).with_name("data")
FILES = [f"{name}{kind}.pth" for name in ("bare", "released", "wide_resnet") for kind in ("", "_legacy")]
FORMATS = ["zip", "legacy"]


HAS_PYTORCH = importlib.util.find_spec("torch") is not None
needs_pytorch = pytest.mark.skipif(not HAS_PYTORCH, reason="PyTorch is not installed")


@pytest.fixture(params=["own reader", "PyTorch"] if HAS_PYTORCH else ["own reader"], autouse=True)
def reader(request, monkeypatch):
    """Every test runs as if there were no PyTorch, and where there is, with it too."""
    if request.param == "own reader":
        monkeypatch.setattr(checkpoint.importlib, "import_module", absent)
    return request.param


def absent(name):
    raise ImportError(name)


def expected_state():
    with np.load(DATA / "expected.npz") as arrays:
        return dict(arrays)


def assert_same(state, expected):
    assert list(state) == list(expected)
    for name, array in state.items():
        assert array.dtype == expected[name].dtype, name
        assert array.flags.c_contiguous, name
        assert array.flags.writeable, name
        np.testing.assert_array_equal(array, expected[name], err_msg=name, strict=True)


# ----------------------------------------------------------------------------------------------- what is made by hand


def literal(value):
    """The instructions that put down a number, a string or a tuple of them."""
    return pickle.dumps(value, 2)[2:-1]


def tensor(offset=0, size=(4,), stride=(1,), numel=4, storage="torch\nFloatStorage", key="0"):
    """The instructions that rebuild a tensor, as torch.save writes them."""
    storage = b"c" + storage.encode() + b"\n"
    identity = b"(" + literal("storage") + storage + literal(key) + literal("cpu") + literal(numel) + b"tQ"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    arguments = identity + literal(offset) + literal(size) + literal(stride) + literal(False) + literal(None)
    return rebuild + b"(" + arguments + b"tR"


def dict_of(**items):
    body = b"".join(literal(name) + item for name, item in items.items())
    return b"\x80\x02}(" + body + b"u."


def save(path, kind, instructions, data=b"\0" * 16, numel=4, **options):
    """Writes a checkpoint around a pickle, with one storage."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w", **options) as archive:
            archive.writestr("archive/data.pkl", instructions)
            archive.writestr("archive/byteorder", "little")
            archive.writestr("archive/data/0", data)
    else:
        heads = [checkpoint._Stream._MAGIC, 1001, {"little_endian": True}]
        head, keys = b"".join(pickle.dumps(each, 2) for each in heads), pickle.dumps(["0"], 2)
        path.write_bytes(head + instructions + keys + struct.pack("<q", numel) + data)
    return path


def assert_refused(path, message):
    """Reading ends in a CheckpointError that names the file, and takes next to no memory."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            read_checkpoint(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).endswith(f"Received: path={str(path)!r}")
    assert peak < 10_000_000
    return str(caught.value)


# --------------------------------------------------------------------------------------------------- files of PyTorch


@pytest.mark.parametrize("name", [*FILES, "protocol4.pth"])
def test_the_state_dict_of_a_file_that_pytorch_wrote_is_read_bit_for_bit(name):
    assert_same(read_checkpoint(DATA / name), expected_state())


def test_pytorch_itself_reads_where_it_is_installed(reader, monkeypatch):
    calls = []
    monkeypatch.setattr(checkpoint, "_read_tensors", lambda *_: calls.append("own reader") or {"a": np.zeros(1)})
    for name in FILES:
        read_checkpoint(DATA / name)
    # PyTorch refuses the defaultdict in what is released; this module reads it then.
    assert len(calls) == (6 if reader == "own reader" else 2)


@pytest.mark.parametrize("name", ["released.pth", "released_legacy.pth"])
def test_the_moving_average_is_read_when_it_is_asked_for(name):
    averaged = {key: array / 2 if array.dtype.kind == "f" else array for key, array in expected_state().items()}
    state = read_checkpoint(DATA / name, ema=True)
    for key in ("bfloat16", "bfloat16_scalar", "half"):  # halved in their own type, which is exact, too
        averaged[key] = averaged[key].astype(state[key].dtype)
    assert_same(state, averaged)


@pytest.mark.parametrize("name", ["bare.pth", "wide_resnet_legacy.pth"])
def test_a_file_without_moving_average_says_what_to_do(name):
    with pytest.raises(CheckpointError, match=r"no moving average.*ema=False.*Received: path="):
        read_checkpoint(DATA / name, ema=True)


def test_tensors_that_share_memory_become_arrays_of_their_own():
    state = read_checkpoint(DATA / "bare.pth")
    state["overlapping"][:] = 7
    assert_same({"conv.bias": state["conv.bias"]}, {"conv.bias": expected_state()["conv.bias"]})


def test_a_prefix_that_only_some_names_have_stays(tmp_path):
    state = {"module.a": np.zeros(1), "module.module.b": np.ones(1)}
    write_checkpoint(tmp_path / "all", state)
    write_checkpoint(tmp_path / "some", state | {"c": np.ones(2)})
    assert list(read_checkpoint(tmp_path / "all")) == ["a", "module.b"]
    assert list(read_checkpoint(tmp_path / "some")) == ["module.a", "module.module.b", "c"]


def test_the_byte_order_of_the_file_is_obeyed(tmp_path):
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        archive.writestr("archive/data.pkl", dict_of(a=tensor()))
        archive.writestr("archive/byteorder", "big")
        archive.writestr("archive/data/0", np.arange(4, dtype=">f4").tobytes())
    assert_same(read_checkpoint(tmp_path / "a"), {"a": np.arange(4, dtype=np.float32)})


def test_an_ordered_dict_that_python_2_pickled_is_read(tmp_path):
    # As a list of its items, with strings of bytes.
    items = b"](](U\x01a" + tensor(offset=1, size=(2,)) + b"ee"
    path = save(tmp_path / "a", "legacy", b"\x80\x02ccollections\nOrderedDict\n" + items + b"\x85R.", bytes(range(16)))
    assert_same(read_checkpoint(path), {"a": np.frombuffer(bytes(range(4, 12)), np.float32)})


def test_a_checkpoint_in_memory_is_taken_apart_like_a_file():
    state = {"module.a": np.zeros((2, 3)).T, "module.b": np.ones((), np.int64)}
    expected = {"a": np.zeros((3, 2)), "b": np.ones((), np.int64)}
    averaged = {"a": np.full(1, 7.0)}
    released = {"epoch": 1, "model_states": {"net": state, "net_ema": averaged}}
    for checkpoint_dict in (state, {"state_dict": collections.OrderedDict(state)}, released):
        assert_same(strip_state_dict(checkpoint_dict), expected)
    assert_same(strip_state_dict(released, ema=True), averaged)
    for wrong in ({}, {"a": 1}, [], {"state_dict": {"a": np.zeros(1), "b": None}}):
        with pytest.raises(CheckpointError, match=r"no state dict|no tensors|no tensor: b"):
            strip_state_dict(wrong)


@needs_pytorch
def test_a_checkpoint_that_pytorch_loaded_is_taken_apart():
    import torch

    loaded = torch.load(DATA / "bare.pth", weights_only=True)
    loaded["linear.weight"] = torch.nn.Parameter(loaded["linear.weight"])
    assert_same(strip_state_dict({"state_dict": loaded}), expected_state())


# ------------------------------------------------------------------------------------------------- what wants to run


class Runs:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_calls(marker):
    write = f"open({str(marker)!r}, 'w').close()"
    return {
        f"{os.system.__module__}.system": Runs(os.system, f"touch '{marker}'"),
        "builtins.eval": Runs(eval, write),
        "builtins.exec": Runs(exec, write),
    }


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", hostile_calls(""))
def test_a_pickle_that_wants_to_run_code_is_refused_by_name_and_does_not_run(tmp_path, kind, protocol, name):
    marker = tmp_path / "marker"
    instructions = pickle.dumps({"state_dict": {"a": hostile_calls(marker)[name]}}, protocol)
    assert_refused(save(tmp_path / "a", kind, instructions), f"asks for {re.escape(name)},.*nothing was run")
    assert not marker.exists()
    pickle.loads(instructions)  # It does run where pickles run.
    assert marker.exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_first_pickle_of_a_file_is_guarded_like_the_others(tmp_path, kind):
    marker = tmp_path / "marker"
    call = pickle.dumps(hostile_calls(marker)["builtins.eval"], 2)
    path = tmp_path / "a"
    if kind == "legacy":
        path.write_bytes(call)
    else:
        save(path, kind, call)
    assert_refused(path, r"asks for builtins\.eval,")
    assert not marker.exists()


HOSTILE = {
    "a chain of attributes": (
        b"\x80\x02cbuiltins\ngetattr\nccollections\nOrderedDict\nX\x04\0\0\0__eq\x86R.",
        "getattr",
    ),
    "an attribute of an allowed class": (
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
        r"collections\.OrderedDict\.__init__",
    ),
    "INST": (b"(X\x04\0\0\0trueios\nsystem\n.", r"os\.system"),
    "INST of an allowed class": (b"(icollections\nOrderedDict\n.", "instruction INST"),
    "OBJ": (b"(ccollections\nOrderedDict\no.", "instruction OBJ"),
    "OBJ of a function": (b"(cos\nsystem\nX\x04\0\0\0trueo.", r"os\.system"),
    "EXT1": (b"\x80\x02\x82\x01.", "instruction EXT1"),
    "EXT2": (b"\x80\x02\x83\x01\0.", "instruction EXT2"),
    "EXT4": (b"\x80\x02\x84\x01\0\0\0.", "instruction EXT4"),
    "NEWOBJ": (b"\x80\x02csubprocess\nPopen\n)\x81.", r"subprocess\.Popen"),
    "NEWOBJ_EX": (b"\x80\x04cargparse\nNamespace\n)}\x92.", "instruction NEWOBJ_EX"),
    "PERSID": (b"Psomething\n.", "instruction PERSID"),
    "NEXT_BUFFER": (b"\x80\x05\x97.", "instruction NEXT_BUFFER"),
    "a persistent id that is no storage": (b"\x80\x02X\x04\0\0\0/etcQ.", "outside of it"),
    "a persistent id of a module": (b"\x80\x02(X\x06\0\0\0module" + b"NNNNtQ.", "outside of it"),
    "a storage that is called": (b"\x80\x02ctorch\nFloatStorage\n\x8a\x06\0\0\0\0\0\x10\x85R.", "no function"),
    "a string that is called": (b"\x80\x02X\x04\0\0\0eval)R.", "no function"),
    "a container that is called": (b"\x80\x02])R.", "no function"),
    "a tensor from a type that is no function": (
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(X\x01\0\0\0aN)NtR.",
        "not PyTorch's",
    ),
    "a tensor without storage": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\0K\x01\x85K\x01\x85\x89NtR.",
        "no data",
    ),
    "state for an allowed class": (b"\x80\x02cargparse\nNamespace\n}X\x08\0\0\0__init__Nsb.", "gives a state"),
    "state for an allowed function": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.", "gives a state"),
    "a whole module": (b"\x80\x02cmodels.vgg\nVGG\n)\x81}b.", r"models\.vgg\.VGG.*state_dict\(\) alone"),
    "a long string that is not there": (b"\x80\x04\x8d\0\0\0\0\0\0\0\x40abc.", "damaged"),
    "long bytes that are not there": (b"\x80\x04\x8e\0\0\0\0\0\0\0\x40abc.", "damaged"),
    "a long bytearray that is not there": (b"\x80\x05\x96\0\0\0\0\0\0\0\x40abc.", "damaged"),
    "a long frame that is not there": (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.", "no state dict"),
    "a far place in the memo": (b"\x80\x02Nr\xff\xff\xff\xff.", "no state dict"),
    "what was never put down": (b"\x80\x02h\x07.", "damaged"),
    "an empty stack": (b"\x80\x02R.", "damaged"),
    "no end": (b"\x80\x02}", "damaged"),
    "an odd number of items": (b"\x80\x02}(Nu.", "damaged"),
    "items of a number": (b"\x80\x02K\x01(K\x01K\x02u.", "sets an item of what is no dict"),
    "a deep tuple as a key": (b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.", "no tensors"),
    "a deep list": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "no state dict"),
    "a list in itself": (b"\x80\x02]q\0h\0a.", "no state dict"),
    "a dict in itself": (b"\x80\x02}q\0X\x01\0\0\0ah\0s.", "no tensors"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_instruction_does_more_than_fill_containers(tmp_path, name):
    instructions, message = HOSTILE[name]
    assert_refused(save(tmp_path / "a", "zip", instructions), message)


def test_a_hostile_file_leaves_the_classes_that_it_names_as_they_were(tmp_path):
    before = dict(vars(argparse.Namespace)), dict(vars(collections.OrderedDict)), dict(checkpoint._TOKENS)
    instructions = (
        b"\x80\x02cargparse\nNamespace\n)\x81}(X\x0c\0\0\0__setstate__cargparse\nNamespace\nubccollections\n"
        b"OrderedDict\n)R}X\x06\0\0\0__eq__Nsb\x86."
    )
    assert_refused(save(tmp_path / "a", "zip", instructions), "no state dict")
    assert (dict(vars(argparse.Namespace)), dict(vars(collections.OrderedDict)), dict(checkpoint._TOKENS)) == before
    assert vars(checkpoint._INERT) == {}


# --------------------------------------------------------------------------------------- what would read out of bounds

TOO_MUCH = {
    "offset": ({"offset": 1}, "beyond"),
    "offset far away": ({"offset": 2**62}, "beyond"),
    "negative offset": ({"offset": -1}, "impossible"),
    "size": ({"size": (5,)}, "beyond"),
    "gigantic size": ({"size": (2**40,)}, "beyond"),
    "size times size": ({"size": (2**40, 2**40, 2**40), "stride": (0, 0, 0)}, "beyond"),
    "stride": ({"size": (2, 2), "stride": (3, 1)}, "beyond"),
    "negative stride": ({"stride": (-1,), "offset": 3}, "impossible"),
    "no stride": ({"size": (2**30,), "stride": (0,)}, "beyond"),
    "too few strides": ({"size": (2, 2)}, "one stride for each"),
    "size of True": ({"size": (True,)}, "impossible"),
    "size of a string": ({"size": ("4",)}, "impossible"),
    "size beyond 64 bits": ({"size": (0, 2**70), "stride": (1, 1)}, "impossible"),
    "empty, with a gigantic size": ({"size": (0, 2**62), "stride": (1, 1)}, "damaged"),
    "64 dimensions": ({"size": (1,) * 64, "stride": (1,) * 64}, "32 dimensions"),
    "storage": ({"numel": 5}, "16 bytes|has 4 elements"),
    "gigantic storage": ({"numel": 2**61}, "16 bytes|has 4 elements"),
    "negative storage": ({"numel": -4}, "not PyTorch's"),
    "storage of another type": ({"storage": "torch\nDoubleStorage"}, "16 bytes|incomplete"),
    "storage that is missing": ({"key": "1"}, "missing|does not list"),
    "storage outside": ({"key": "../byteorder"}, "missing|does not list"),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_tensor_beyond_its_data_is_refused(tmp_path, kind, name):
    arguments, message = TOO_MUCH[name]
    assert_refused(save(tmp_path / "a", kind, dict_of(a=tensor(**arguments))), message)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_tensor_up_to_the_end_of_its_data_is_read(tmp_path, kind):
    data = np.arange(4, dtype=np.float32)
    instructions = dict_of(
        a=tensor(offset=1, size=(2, 2), stride=(1, 1)), b=tensor(offset=3, size=(1, 1), stride=(2**62, 7))
    )
    state = read_checkpoint(save(tmp_path / "a", kind, instructions, data.tobytes()))
    assert_same(state, {"a": np.float32([[1, 2], [2, 3]]), "b": np.float32([[3]])})


def test_many_views_of_one_storage_do_not_fill_the_memory(tmp_path):
    data = b"\0" * 400_000
    views = {f"a{place}": tensor(offset=place, size=(90_000,), numel=100_000) for place in range(200)}
    path = save(tmp_path / "a", "zip", dict_of(**views), data)
    assert_refused(path, "overlap")


@pytest.mark.parametrize("numel", [3, 5, -1, 2**40, 2**62])
def test_a_storage_whose_length_differs_from_what_the_pickle_says_is_refused(tmp_path, numel):
    assert_refused(save(tmp_path / "a", "legacy", dict_of(a=tensor()), numel=numel), "damaged or incomplete")


# ------------------------------------------------------------------------------------------------------ other files


@pytest.mark.parametrize("name", ["bare.pth", "bare_legacy.pth"])
def test_a_file_that_was_cut_anywhere_is_refused(tmp_path, name):
    whole = (DATA / name).read_bytes()
    for length in range(0, len(whole), 89):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="Received: path="):
            read_checkpoint(tmp_path / "cut")


@pytest.mark.parametrize("name", ["released.pth", "released_legacy.pth"])
def test_a_file_with_changed_bytes_is_read_or_refused(tmp_path, name):
    whole, chance = (DATA / name).read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        changed = bytearray(whole)
        for _ in range(chance.choice([1, 3])):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        (tmp_path / "changed").write_bytes(changed)
        try:
            state = read_checkpoint(tmp_path / "changed")
        except CheckpointError:
            refused += 1
        else:
            assert all(isinstance(array, np.ndarray) for array in state.values())
    assert 0 < refused < 150


def test_changed_data_in_a_zip_archive_is_found(tmp_path):
    path = tmp_path / "a"
    write_checkpoint(path, {"a": np.full(8, 3, np.uint8)})
    path.write_bytes(path.read_bytes().replace(b"\3" * 8, b"\3" * 7 + b"\4"))
    assert_refused(path, "CRC")


def test_compressed_members_are_refused(tmp_path):
    zeros = b"\0" * 40_000_000
    path = save(tmp_path / "a", "zip", dict_of(a=tensor(numel=10**7)), zeros, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    assert_refused(path, "compressed")
    # Also where they would fit.
    assert_refused(save(path, "zip", dict_of(a=tensor()), compression=zipfile.ZIP_DEFLATED), "compressed")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path):
    path = save(tmp_path / "a", "zip", dict_of(a=tensor()))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", b"\0" * 16)
    assert_refused(path, "two members of one name")


def test_other_files_are_told_apart(tmp_path):
    path = tmp_path / "a"
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    assert_refused(tmp_path / "a.npz", "zip archive, but not one of torch.save")
    assert_refused(DATA / "torchscript.pt", r"TorchScript program.*torch\.jit\.load")
    path.write_bytes(pickle.dumps({"a": 1}, 2))
    assert_refused(path, "a pickle, but not one of torch.save")
    for content in (b"", b"\x89HDF\r\n\x1a\n", b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(content)
        assert_refused(path, "not a checkpoint")
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert_refused(path, "tar archive.*before 0.1.10")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file.*Received: path='.*nothing'"):
        read_checkpoint(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError, match=r"one file.*Received: path="):
        read_checkpoint(tmp_path)


def test_a_file_without_state_dict_says_what_it_has(tmp_path):
    assert_refused(save(tmp_path / "a", "zip", dict_of(epoch=literal(3), model=b"}")), "which has epoch, model")
    assert_refused(save(tmp_path / "a", "zip", dict_of()), "which has nothing")
    assert_refused(save(tmp_path / "a", "zip", dict_of(state_dict=b"}")), "no tensor: nothing")
    mixed = dict_of(a=tensor(), extra_state=literal(3))
    assert_refused(save(tmp_path / "a", "zip", mixed), "no tensor: extra_state")


# ----------------------------------------------------------------------------------------------------------- writing


def every_type():
    arrays = {f"{dtype}": np.arange(-3, 3).reshape(2, 3).astype(dtype) for dtype in ("f2", "f4", "f8", "c8", "c16")}
    arrays |= {f"{dtype}": np.arange(6).astype(dtype) for dtype in ("i1", "i2", "i4", "i8", "u1", "?")}
    return arrays | {
        "big": np.arange(3, dtype=">f4"),
        "columns": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "reversed": np.arange(4, dtype=np.float32)[::-1],
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(2, np.int64),
        "größe": np.float32([1]),
    }


def test_what_is_written_is_read(tmp_path):
    state = every_type()
    write_checkpoint(tmp_path / "new" / "a.pth", state)
    assert_same(
        read_checkpoint(tmp_path / "new" / "a.pth"),
        {name: array.astype(array.dtype.newbyteorder("=")) for name, array in state.items()},
    )


@needs_pytorch
def test_what_is_written_is_what_pytorch_reads(tmp_path):
    import torch

    state = every_type()
    write_checkpoint(tmp_path / "a.pth", state)
    for options in ({}, {"mmap": True}):
        loaded = torch.load(tmp_path / "a.pth", weights_only=True, **options)
        assert list(loaded) == ["state_dict"]
        assert type(loaded["state_dict"]) is collections.OrderedDict
        assert_same(
            {name: each.numpy() for name, each in loaded["state_dict"].items()},
            {name: array.astype(array.dtype.newbyteorder("=")) for name, array in state.items()},
        )
        for name, each in loaded["state_dict"].items():
            assert each.is_contiguous(), name
            assert not options or not each.numel() or each.data_ptr() % 64 == 0, name


def test_the_same_state_gives_the_same_bytes(tmp_path):
    write_checkpoint(tmp_path / "a", every_type())
    write_checkpoint(tmp_path / "b", every_type())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "at least one array"),
        ({3: np.zeros(1)}, "name=3"),
        ({"a": np.zeros(1), "b": np.array(["text"])}, "Received: b=<U4 array"),
        ({"a": None}, "Received: a=object array"),
    ],
)
def test_what_has_no_form_in_a_checkpoint_is_refused_and_the_old_file_stays(tmp_path, state, message):
    write_checkpoint(tmp_path / "a", {"old": np.zeros(1)})
    with pytest.raises(ValueError, match=message):
        write_checkpoint(tmp_path / "a", state)
    assert list(read_checkpoint(tmp_path / "a")) == ["old"]
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
