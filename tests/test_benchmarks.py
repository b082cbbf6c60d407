"""The benchmarks run, and find right what they measure."""

import subprocess
import sys
from pathlib import Path

import pytest

from aib_tf.ops import implementation

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize("parts", [["forward", "backward", "batch", "gpu"], ["memory", "variants"]], ids=" ".join)
def test_nearest_anchor_is_compared_with_its_rivals(parts):
    command = [sys.executable, str(BENCHMARKS / "nearest_anchor.py"), "--quick", "--part", *parts]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    if implementation().name != "custom_op":
        assert result.returncode == 1
        assert implementation().reason in result.stderr
        return
    assert result.returncode == 0, result.stderr
    assert "give what NumPy gives" in result.stdout
    assert "goals reached" in result.stdout
    tables = {
        "forward": "\nforward, 20,000 elements, Q = 20 ",
        "backward": "\nbackward, 20,000 elements, Q = 20 ",
        "batch": "\nforward and backward, 2,048 elements, Q = 20 ",
        "memory": "\nforward and backward, 20,000 elements, Q = 20: memory",
        "variants": "\nvariants, 20,000 elements, Q = 256 ",
        "gpu": "\nGPU",
    }
    for part, title in tables.items():
        assert (title in result.stdout) == (part in parts), part
