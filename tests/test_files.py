import errno
import json
import os
import secrets
import stat

import numpy as np
import pytest
import tensorflow as tf

from aib_tf import files


def test_text_bytes_and_json_come_back_as_written(tmp_path):
    files.write_text(tmp_path / "new" / "a.txt", "ä\r\nb\n")
    files.write_bytes(tmp_path / "b", b"\0\1")
    data = {"a": np.float32(0.5), "b": np.arange(3), "c": tmp_path, "d": None}
    files.write_json(tmp_path / "c.json", data)
    assert (tmp_path / "new" / "a.txt").read_bytes() == "ä\r\nb\n".encode()
    assert (tmp_path / "b").read_bytes() == b"\0\1"
    expected = {"a": 0.5, "b": [0, 1, 2], "c": str(tmp_path), "d": None}
    assert json.loads((tmp_path / "c.json").read_text()) == expected


def test_a_path_that_is_kept_in_a_file_holds_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.absolute("a/../b") == str(tmp_path / "b")
    assert files.absolute("~/a") == str(tmp_path / "home" / "a")
    assert files.absolute(tmp_path / "a") == str(tmp_path / "a")
    assert files.absolute("gs://bucket/a") == "gs://bucket/a"


def test_a_path_that_begins_with_a_tilde_lies_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.path("~/a") == tmp_path / "home" / "a"
    files.write_text("~/a", "here")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(error), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_target_is_untouched_until_the_block_ends(tmp_path):
    path = tmp_path / "model.weights.h5"
    files.write_text(path, "old")
    with files.replacing(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.name.endswith(".model.weights.h5")
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_new_file_has_the_rights_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_link_stays_a_link(tmp_path):
    files.write_text(tmp_path / "target", "old")
    (tmp_path / "link").symlink_to("target")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_json_without_a_form_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a", {"loss": float("nan")})
    with pytest.raises(TypeError, match="type=object"):
        files.write_json(tmp_path / "a", object())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_and_an_empty_block_are_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match="path="):
        files.write_text(tmp_path, "")
    with (
        pytest.raises(FileNotFoundError, match="Nothing was written"),
        files.replacing(tmp_path / "a"),
    ):
        pass


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    pid = os.fork() if hasattr(os, "fork") else pytest.skip("needs fork")
    if pid == 0:
        with files.replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            os._exit(9)
    os.waitpid(pid, 0)
    for name in ("b.txt", ".hidden", "c.tmp.d"):
        files.write_text(tmp_path / name, "")
    (leftover,) = files.remove_leftovers(tmp_path)
    assert leftover.name.endswith("a.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "b.txt", "c.tmp.d"]


def test_a_new_folder_appears_whole(tmp_path):
    path = tmp_path / "model" / "1"
    with files.new_folder(path) as temporary:
        assert temporary.parent == path.parent and temporary.name.startswith(".")
        (temporary / "variables").mkdir()
        (temporary / "variables" / "a").write_text("new")
        assert not path.exists()
    assert (path / "variables" / "a").read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_of_a_failed_folder_nothing_stays(tmp_path, error):
    with pytest.raises(error), files.new_folder(tmp_path / "1") as temporary:
        (temporary / "a").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_of_a_killed_process_is_removed(tmp_path):
    (tmp_path / ".0123456789ab.tmp.1" / "variables").mkdir(parents=True)
    (tmp_path / "1").mkdir()
    files.remove_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["1"]


def test_a_new_folder_takes_the_place_of_none(tmp_path):
    (tmp_path / "1").mkdir()
    with pytest.raises(FileExistsError, match="path="), files.new_folder(tmp_path / "1"):
        raise AssertionError("The block must not run.")
    with pytest.raises(FileExistsError, match="path="), files.new_folder(tmp_path / "2") as temporary:
        (temporary / "a").write_text("late")
        (tmp_path / "2").mkdir()  # another process was faster
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1", "2"]
    assert list((tmp_path / "2").iterdir()) == []


class TestRemotePath:
    """Paths with a scheme, on the file system that TensorFlow keeps in memory."""

    @pytest.fixture
    def folder(self):
        folder = files.path(f"ram://bucket-{secrets.token_hex(4)}/a")
        folder.mkdir(parents=True)
        return folder

    def test_a_name_tells_where_the_file_lies(self, tmp_path):
        assert files.path(tmp_path) == files.path(str(tmp_path)) == files.path(f"file://{tmp_path}") == tmp_path
        remote = files.path("gs://bucket/run/")
        assert files.path(remote) is remote
        assert str(remote) == os.fspath(remote) == "gs://bucket/run"
        assert repr(remote / "a.txt") == "RemotePath('gs://bucket/run/a.txt')"
        assert (remote / "a.txt").parent == remote and (remote / "a.txt").suffix == ".txt"
        assert remote.with_name("b") == files.path("gs://bucket/b") and remote.name == "run"
        assert remote.parent.parent == remote.parent == files.path("gs://bucket")
        assert len({remote, files.path("gs://bucket/run"), files.path("ram://bucket/run")}) == 2

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("s4://bucket/run", r"no file system for s4:// here, but for .*gs.*path='s4://bucket/run'"),
            ("gs://", "gs://"),
        ],
    )
    def test_a_path_that_leads_nowhere_is_refused(self, name, message):
        with pytest.raises(ValueError, match=message):
            files.path(name)

    def test_methods_do_what_those_of_pathlib_do(self, folder):
        assert folder.exists() and folder.is_dir() and not folder.is_file()
        assert list(folder.iterdir()) == []
        path = folder / "b" / "a.txt"
        files.write_text(path, "ä\r\nb\n")
        assert path.exists() and path.is_file() and not path.is_dir()
        assert path.read_bytes() == "ä\r\nb\n".encode() and path.read_text(encoding="utf-8") == "ä\r\nb\n"
        for name in ("step-2.npz", "step-1.npz", "other.npz"):
            files.write_bytes(folder / name, b"")
        assert sorted(folder.iterdir()) == [folder / name for name in ("b", "other.npz", "step-1.npz", "step-2.npz")]
        assert sorted(found.name for found in folder.glob("step-*")) == ["step-1.npz", "step-2.npz"]
        assert list((folder / "missing").glob("*")) == []
        assert (folder / "step-1.npz").replace(folder / "step-2.npz") == folder / "step-2.npz"
        (folder / "step-2.npz").unlink()
        (folder / "step-2.npz").unlink(missing_ok=True)
        assert sorted(entry.name for entry in folder.iterdir()) == ["b", "other.npz"]
        folder.mkdir(parents=True, exist_ok=True)

    def test_errors_are_those_of_pathlib(self, folder):
        missing = folder / "missing"
        for call in (missing.read_bytes, missing.unlink, missing.iterdir, lambda: missing.replace(folder / "a")):
            with pytest.raises(FileNotFoundError) as error:
                call()
            assert error.value.filename == str(missing) and error.value.strerror
        with pytest.raises(FileNotFoundError), files.local_copy(missing):
            raise AssertionError("The block must not run.")
        with pytest.raises(FileExistsError):
            folder.mkdir()
        with pytest.raises(IsADirectoryError, match="path="):
            files.write_text(folder, "")

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_a_failed_write_leaves_the_old_file_and_nothing_else(self, folder, error):
        path = folder / "model.keras"
        files.write_text(path, "old")
        with pytest.raises(error), files.replacing(path) as temporary:
            assert temporary.name.endswith("model.keras")
            temporary.write_text("half")
            raise error
        assert not temporary.parent.exists()
        with pytest.raises(FileNotFoundError, match="Nothing was written"), files.replacing(path):
            pass
        assert path.read_text() == "old" and list(folder.iterdir()) == [path]
        with files.replacing(path) as temporary:
            temporary.write_text("new")
            assert path.read_text() == "old"
        assert path.read_text() == "new" and list(folder.iterdir()) == [path]

    @pytest.mark.parametrize("step", ["copy", "rename"])
    def test_a_failed_upload_leaves_the_old_file_and_nothing_else(self, folder, step, monkeypatch):
        path = folder / "a.txt"
        files.write_text(path, "old")
        original = getattr(tf.io.gfile, step)

        def failing(source, target, **options):
            original(source, target, **options) if step == "copy" else None
            raise tf.errors.ResourceExhaustedError(None, None, "quota")

        with monkeypatch.context() as patch:
            patch.setattr(tf.io.gfile, step, failing)
            with pytest.raises(OSError, match="quota") as error:
                files.write_text(path, "new")
        assert error.value.errno == errno.ENOSPC
        assert path.read_text() == "old" and list(folder.iterdir()) == [path]

    def test_a_reader_gets_a_local_copy_for_as_long_as_it_needs(self, folder, tmp_path):
        files.write_text(folder / "a.txt", "remote")
        with files.local_copy(folder / "a.txt") as copy:
            assert copy.name == "a.txt" and copy.read_text() == "remote"
        assert not copy.exists()
        files.write_text(tmp_path / "a.txt", "local")
        with files.local_copy(tmp_path / "a.txt") as copy:
            assert copy == tmp_path / "a.txt"
        assert copy.exists()

    def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(self, folder):
        for name in (".0123456789ab.tmp.a.txt", ".hidden", "c.tmp.d"):
            files.write_text(folder / name, "")
        assert files.remove_leftovers(folder) == [folder / ".0123456789ab.tmp.a.txt"]
        assert sorted(entry.name for entry in folder.iterdir()) == [".hidden", "c.tmp.d"]
        assert files.remove_leftovers(folder / "missing") == []
