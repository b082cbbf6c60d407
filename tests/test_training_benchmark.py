"""The benchmark of training runs, and does not time what computes something else."""

import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "training.py"


@pytest.fixture(scope="module")
def training():
    spec = importlib.util.spec_from_file_location("benchmark_of_training", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_training_step_and_inference_are_timed():
    command = [sys.executable, str(PATH), "--quick", "--rounds=1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    for title in ("training step, batch 4", "memory of training", "inference, batch 4", "inference, batch 1"):
        assert f"\n{title} " in result.stdout
    # Beside PyTorch where it is installed.
    checks, goals = (6, 3) if importlib.util.find_spec("torch") else (0, 0)
    assert result.stdout.count("checked: ") == checks
    assert f" of {goals} goals reached" in result.stdout


def worker(name, **results):
    return types.SimpleNamespace(name=name, results={what: np.array(value) for what, value in results.items()})


def test_what_computes_the_same_is_accepted(training, capsys):
    ours = worker("aib_tf", loss=9.0, progress=[-0.2, -0.1])
    training.check([ours, worker("PyTorch", loss=9.004, progress=[-0.205, -0.1])])
    printed = capsys.readouterr().out
    assert "checked: PyTorch, loss as aib_tf, but for 0.0004 of the largest" in printed
    assert "checked: PyTorch, progress as aib_tf, but for 0.02 of the largest" in printed


@pytest.mark.parametrize(
    ("what", "value"),
    [("loss", 9.02), ("loss", np.nan), ("progress", [-0.22, -0.1]), ("progress", [0.0, 0.0]), ("progress", [0.2, 0.1])],
)
def test_what_computes_something_else_is_not_timed(training, what, value):
    right = {"loss": 9.0, "progress": [-0.2, -0.1]}
    with pytest.raises(AssertionError, match=f"PyTorch: {what} is"):
        training.check([worker("aib_tf", **right), worker("PyTorch", **right | {what: value})])


def test_steps_that_change_nothing_prove_nothing(training):
    still = {"progress": [0.0, 0.0]}
    with pytest.raises(AssertionError, match="PyTorch: progress is"):
        training.check([worker("aib_tf", **still), worker("PyTorch", **still)])


def test_a_process_that_fails_shows_its_message(training, tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such rival')"]
    with pytest.raises(RuntimeError, match="no such rival"), training.Worker(command, tmp_path, "rival"):
        pass
