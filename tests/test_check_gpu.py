import subprocess
import sys
from pathlib import Path


def test_tests_that_are_meant_for_a_gpu_do_not_pass_without_one(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    here = Path(__file__)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--check_gpu",
        "-p",
        "no:cacheprovider",
        str(here.with_name("test_files.py")),
    ]
    done = subprocess.run(command, cwd=here.parents[1], capture_output=True, text=True)
    assert done.returncode == 4
    assert "TensorFlow sees no GPU" in done.stderr
    assert "passed" not in done.stdout
