"""The benchmark of the saliency metrics does not time what computes something else, and judges its goal rightly."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # it imports its neighbour
    spec = importlib.util.spec_from_file_location("benchmark_of_saliency", BENCHMARKS / "saliency.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_computes_the_same_is_accepted(benchmark, capsys):
    benchmark.check("cc", np.array([0.5, 0.250004]), np.array([0.5, 0.25]))
    assert "checked: cc of 2 images as pysaliency, but for 4e-06" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [[0.5, 0.2501], [0.5, np.nan], [0.5]])
def test_what_computes_something_else_is_not_timed(benchmark, wrong):
    with pytest.raises(AssertionError, match="cc: "):
        benchmark.check("cc", np.array(wrong), np.array([0.5, 0.25]))


def samples(benchmark, ours, theirs):
    """Six equal metrics of theirs, and ours for all six."""
    mine = dict.fromkeys(benchmark.METRICS, (ours, ours)) | {benchmark.ALL: (ours, 2 * ours)}
    return {benchmark.OURS: mine, benchmark.RIVAL: dict.fromkeys(benchmark.METRICS, (theirs / 6, theirs / 6))}


@pytest.mark.parametrize(("theirs", "reached"), [(2.02, True), (1.98, False)])
def test_the_goal_compares_all_six_at_once_with_the_sum_of_theirs(benchmark, theirs, reached, capsys):
    assert benchmark.table("2 maps", samples(benchmark, 0.1, theirs), 2) is reached
    printed = capsys.readouterr().out
    assert ("reached" in printed, "MISSED" in printed) == (reached, not reached)
    # Seconds of a call in microseconds an image, and the ratio of CPU seconds.
    *_, last = printed.splitlines()
    assert last.split()[2] == "50000.0"
    assert float(last.split()[5]) == pytest.approx(theirs / 0.2, abs=0.1)


def test_without_a_rival_there_is_no_goal(benchmark):
    mine = {benchmark.OURS: dict.fromkeys((*benchmark.METRICS, benchmark.ALL), (0.1, 0.1))}
    assert benchmark.table("2 maps", mine, 2) is None


def test_a_turn_calls_once_at_least(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "TURN", 0.0)
    calls = []
    seconds, _ = benchmark.turn(lambda: calls.append(1))
    assert calls == [1] and seconds > 0


def test_what_is_drawn_has_the_size_that_was_asked_for(benchmark):
    case = benchmark.draw(benchmark.QUICK, 8, 9)
    assert case["maps"].shape == case["references"].shape == (6, 8, 9)
    there = case["points"][..., 0] >= 0
    assert ((there.sum(axis=1) >= 2) & (there.sum(axis=1) <= 6)).all()
    assert case["points"][there].max(axis=0).tolist() <= [7, 8]
    assert (case["points"][~there] == -1).all()
