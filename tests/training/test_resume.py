"""A run that was stopped, in any way, ends like one that was not: real processes, real signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from aib_tf import training

ROOT = Path(__file__).resolve().parents[2]
# Twelve steps an epoch, so that there is a middle to stop in.
FLAGS = [
    "--dataset=cluttered_digits/train96_validation40_test40_seed0",
    "--width=0.05",
    "--latent_dim=8",
    "--num_anchors=5",
    "--batch_size=8",
    "--epochs=3",
    "--beta_warmup_epochs=2",
    "--ema_momentum=0.9",
    "--deterministic",
]
# Sends itself a signal in the middle of the second epoch, where a person or a cluster would from outside.
STOPPING = """
import os, runpy, signal, sys
sys.path.insert(0, os.path.join(sys.argv[1], "scripts"))
from aib_tf.training import callbacks
number, step = int(sys.argv[2]), int(sys.argv[3])
original = callbacks.Recorder.on_train_batch_end
def on_train_batch_end(self, batch, logs=None):
    if int(self.model.optimizer.iterations) == step:
        os.kill(os.getpid(), number)
    original(self, batch, logs)
callbacks.Recorder.on_train_batch_end = on_train_batch_end
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def train(folder, data_dir, prefix=()):
    script = str(ROOT / "scripts" / "train.py")
    command = [sys.executable, *prefix, script, *FLAGS, f"--data_dir={data_dir}", f"--output_dir={folder}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def final_arrays(folder):
    with np.load(training.Run(folder).checkpoints.paths()[-1]) as file:
        return {name: file[name] for name in file.files if name != "progress"}


def rows(folder):
    history = training.Run(folder).read_history()
    return {name: values for name, values in history.items() if name != "seconds"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data_dir):
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    result = train(folder, data_dir)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize(
    ("number", "code", "kept"),
    [
        (signal.SIGINT, 130, "step-00000017.npz"),
        (signal.SIGTERM, 75, "step-00000017.npz"),
        (signal.SIGKILL, -signal.SIGKILL, "step-00000012.npz"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_stopped_run_continues_to_the_same_weights_bit_for_bit(number, code, kept, uninterrupted, tmp_path, data_dir):
    folder = tmp_path / "run"
    stopped = train(folder, data_dir, prefix=["-c", STOPPING, str(ROOT), str(int(number)), "17"])
    assert stopped.returncode == code, stopped.stderr
    assert training.Run(folder).checkpoints.paths()[-1].name == kept
    if number != signal.SIGKILL:
        assert f"Stopped by {number.name} at step 17; the state is saved" in stopped.stderr
    continued = train(folder, data_dir)
    assert continued.returncode == 0, continued.stderr
    assert "Continuing" in continued.stderr
    expected, actual = final_arrays(uninterrupted), final_arrays(folder)
    assert list(actual) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
    # The epoch that was stopped in the middle counts all of its batches, too.
    assert rows(folder) == rows(uninterrupted)


def test_killed_at_any_moment_from_outside_nothing_is_half_written(tmp_path, data_dir):
    folder = tmp_path / "run"
    script = str(ROOT / "scripts" / "train.py")
    command = [sys.executable, script, *FLAGS, "--epochs=40", f"--data_dir={data_dir}", f"--output_dir={folder}"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 200
        run = training.Run(folder)
        while len(run.checkpoints.paths()) < 2 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    for path in run.checkpoints.paths():
        arrays, progress = training.checkpoints._read(path)
        assert progress.epoch == len(progress.rows)
        assert all(np.isfinite(array).all() for array in arrays.values())
    assert run.load_best().name == "vgg_aib_qt"
    assert os.path.exists(run.config_file)
