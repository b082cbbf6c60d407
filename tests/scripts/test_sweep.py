"""scripts/sweep.py in this process, with programs in the place of its neighbours that take no time."""

import sys
import types

import pytest

from tests.scripts import in_process

SWEEP = """
title: Nothing to see
flags: {dataset: cluttered_digits}
rows: {plain: {model: vgg}}
columns: {accuracy: accuracy.top_1}
"""


@pytest.fixture(scope="module")
def script():
    return in_process.load("sweep")


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    """Calls the script as if it lay in `tmp_path`, with the text of a sweep."""

    def run(text, arguments=()):
        (tmp_path / "sweep.yaml").write_text(text)
        values = {"_FILE": tmp_path / "sweep.yaml", "_OUTPUT_DIR": tmp_path / "runs", "_DATA_DIR": None, "_JOBS": 1}
        for name, value in values.items():
            monkeypatch.setattr(script, name, types.SimpleNamespace(value=value))
        monkeypatch.setattr(sys, "argv", [str(tmp_path / "sweep.py"), "--jobs=1"])
        script.main(list(arguments))

    return run


def test_runs_that_failed_are_listed_below_the_table_and_the_exit_code_is_1(run, tmp_path, capsys):
    (tmp_path / "train.py").write_text("raise SystemExit('no such data')")
    with pytest.raises(SystemExit, match=r"(?s)plain-0: training ended with exit code 1;.*no such data") as raised:
        run(SWEEP)
    assert isinstance(raised.value.code, str)  # which Python prints, and ends with 1
    printed = capsys.readouterr().out
    assert "| plain | - | - | - | - | - | see the paper |" in printed
    assert f"python {tmp_path / 'sweep.py'} --jobs=1" in printed
    assert printed.strip() == (tmp_path / "runs" / "table.md").read_text().strip()
    assert not (tmp_path / "runs" / "plain-0").exists()


def test_arguments_that_are_no_flags_are_refused(run):
    with pytest.raises(ValueError, match=r"Only flags are expected.*Received: more"):
        run(SWEEP, ["more"])


def test_a_file_that_is_wrong_starts_nothing(run, tmp_path):
    with pytest.raises(ValueError, match=r"sweep\.yaml: .*Received: colour='red'"):
        run(SWEEP + "colour: red\n")
    assert not (tmp_path / "runs").exists()
