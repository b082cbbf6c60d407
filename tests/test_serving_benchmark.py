"""The benchmark of serving runs, and does not time what computes something else."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def serving(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # it imports its neighbour
    spec = importlib.util.spec_from_file_location("benchmark_of_serving", BENCHMARKS / "serving.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_exported_model_is_timed():
    command = [sys.executable, str(BENCHMARKS / "serving.py"), "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    for title in ("latency, batch 1", "latency, batch 8", "latency, batch 32", "loading"):
        assert f"\n{title} " in result.stdout
    # Beside PyTorch where it is installed.
    checks, goals = (4, 3) if importlib.util.find_spec("torch") else (2, 0)
    assert result.stdout.count("checked: ") == checks
    assert f" of {goals} goals reached" in result.stdout


def test_what_computes_the_same_is_accepted(serving, capsys):
    serving.check("PyTorch", np.array([[2.0, -10.004]]), np.array([[2.0, -10.0]]), 1e-3)
    assert "checked: PyTorch, logits as model.explain, but for 0.0004 of the largest" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [10.1, np.nan, np.inf])
def test_what_computes_something_else_is_not_timed(serving, wrong):
    with pytest.raises(AssertionError, match="PyTorch: logits are"):
        serving.check("PyTorch", np.array([wrong]), np.array([10.0]), 1e-3)


@pytest.mark.parametrize(("theirs", "reached"), [(0.14, True), (0.12, False)])
def test_the_goal_compares_medians(serving, theirs, reached, capsys):
    samples = {serving.OURS: [0.1] * 9 + [5.0], serving.EAGER: [theirs] * 9 + [0.01]}
    assert serving.table("latency, batch 1", samples) is reached
    printed = capsys.readouterr().out
    assert ("reached" in printed) is reached
    assert ("MISSED" in printed) is not reached
    # Of ten calls, the slowest one is near the 99th percentile.
    assert "4559.0" in printed


def test_without_a_rival_there_is_no_goal(serving):
    assert serving.table("latency, batch 1", {serving.OURS: [0.1]}) is None


def test_a_turn_leaves_out_its_first_call_and_has_one_at_least(serving, monkeypatch):
    monkeypatch.setattr(serving, "TURN", 0.0)
    calls = []
    assert len(serving.latencies(calls.append, "images")) == 1
    assert calls == ["images", "images"]


def test_the_size_of_a_folder_counts_the_files_below_it(serving, tmp_path):
    (tmp_path / "variables").mkdir()
    (tmp_path / "saved_model.pb").write_bytes(b"123")
    (tmp_path / "variables" / "index").write_bytes(b"45")
    assert serving.size_of(tmp_path) == 5
