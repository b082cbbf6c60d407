import json
import os
import stat

import numpy as np
import pytest

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
