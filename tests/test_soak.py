"""A long run neither fills memory nor leaves files open. The full length is that of `benchmarks/soak.py` alone."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[1] / "benchmarks" / "soak.py"


def samples(epochs, resident=900.0, leaked=0.0, left_open=0):
    return [
        {"epoch": epoch, "resident MB": resident + leaked * epoch, "descriptors": 9 + left_open * (epoch > epochs // 2)}
        for epoch in range(1, epochs + 1)
    ]


@pytest.mark.parametrize(
    ("grown", "leak"),
    [([], {}), ([], {"leaked": 0.2}), (["resident MB"], {"leaked": 0.4}), (["descriptors"], {"left_open": 1})],
)
def test_growth_after_the_warm_up_is_found(grown, leak, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script puts this checkout in front
    spec = importlib.util.spec_from_file_location("soak", SOAK)
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    assert soak.grown(samples(200, **leak)) == grown


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_run_of_many_epochs_does_not_grow():
    command = [sys.executable, str(SOAK), "--epochs=24"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "The process did not grow." in result.stdout
    assert result.stdout.count("\n            ") >= 20  # a line for each epoch, or nearly
