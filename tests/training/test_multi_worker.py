"""Several processes train together as one: real processes and signals, through the launcher."""

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from aib_tf import data, training

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = str(Path(__file__).with_name("multi_worker_program.py"))
DATASET = "cluttered_digits/train96_validation41_test40_seed0"  # 41 images are shared by no two workers alike
BATCHES, EPOCHS = 12, 3
FLAGS = [
    f"--dataset={DATASET}",
    "--width=0.05",
    "--latent_dim=8",
    "--num_anchors=5",
    "--batch_size=8",
    f"--epochs={EPOCHS}",
    "--beta_warmup_epochs=2",
    "--ema_momentum=0.9",
    "--deterministic",
    "--checkpoint_minutes=0",
]
# Only a hang takes this long, on whatever machine.
TIMEOUT_SECONDS = 600
# Of sums of float32 that were parted otherwise.
ROUNDING = 1e-6


class Result:
    """What a cluster, or a process alone, ended with.

    Attributes:
        code: exit code of the launcher, or of the process.
        text: all that was written.
        launcher: what the launcher itself wrote.
        codes: exit code of each worker, or name of the signal that killed it.
        outputs: what each worker wrote to its standard output and error.
    """

    def __init__(self, code, text, workers):
        self.code = code
        self.text = text
        lines = text.splitlines()
        self.launcher = "\n".join(line for line in lines if line.startswith("launch.py: "))
        self.outputs, self.codes, self._told = [], [], []
        for index in range(workers):
            prefix = f"[worker {index}] "
            own = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
            told = [line for line in own if line.startswith('{"name": ')]
            self.outputs.append("\n".join(line for line in own if line not in told))
            self._told.append([json.loads(line) for line in told])
            ended = re.search(rf"^launch.py: worker {index} (?:ended with exit code|was killed by) (\w+)", text, re.M)
            self.codes.append(0 if ended is None else int(ended[1]) if ended[1].isdigit() else ended[1])

    def told(self, index, name, epoch=EPOCHS):
        """What worker `index` told of its model after an epoch."""
        (value,) = (each["value"] for each in self._told[index] if each["name"] == name and each["epoch"] == epoch)
        return value


def launch(cases, workers):
    """Runs the program with cases in each of several workers, or, with 0, in one process without the launcher."""
    launcher = [str(ROOT / "scripts" / "launch.py"), f"--workers={workers}", "--"] if workers else []
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, *launcher, PROGRAM, json.dumps(cases)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
        errors="replace",
    )
    try:
        text, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # the launcher's guard then kills the workers
        text, _ = process.communicate()
        raise AssertionError(f"Not ended after {TIMEOUT_SECONDS} s:\n{text}") from None
    return Result(process.returncode, text, workers)


def train(folder, data_dir, *more, workers=2, **case):
    """Trains in folder/0; worker 1 is given folder/1, which it must not touch."""
    arguments = [*FLAGS, f"--data_dir={data_dir}", *more]
    own = {str(index): [f"--output_dir={folder / str(index)}"] for index in range(2)}
    return launch([{"arguments": arguments, "own": own, "last": True, **case}], workers)


def arrays_of(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files if name != "progress"}


def assert_same_state(path, expected_path):
    """Compares checkpoints: model and optimizer bit for bit, the sums of the epoch's metrics to rounding."""
    actual, expected = arrays_of(path), arrays_of(expected_path)
    assert list(actual) == list(expected)
    for name in expected:
        # All replicas get an equal share of what the sums were, and go on from there.
        tolerance = ROUNDING if name.startswith("metric/") else 0.0
        np.testing.assert_allclose(actual[name], expected[name], tolerance, err_msg=f"{path.name}: {name}")


def rows_of(run):
    """The rows of history.csv, without the seconds that each epoch took."""
    with open(run.history_file, newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def digits(data_dir):
    data.num_examples(DATASET, "train", data_dir)  # draws them
    return data_dir


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, digits):
    """A run of two workers that keeps the checkpoint of each step, and what they wrote."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = train(folder, digits, "--checkpoints_kept=100")
    assert result.code == 0, result.text
    return folder, training.Run(folder / "0"), result


# In the middle of an epoch each, the later ones in the epoch after.
INTERRUPTIONS = {
    "worker killed": {"step": 5, "worker": 1, "signal": "SIGKILL"},
    "launcher asked": {"step": 9, "worker": 0, "signal": "SIGTERM", "launcher": True},
    "worker asked": {"step": 17, "worker": 1, "signal": "SIGTERM"},
    "chief killed": {"step": 29, "worker": 0, "signal": "SIGKILL"},
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, digits):
    """A run of two workers that the same command starts again after each interruption.

    Returns:
        Its folder, dict from an interruption to what the workers wrote and a copy of the last checkpoint, and what they
        wrote in the end.
    """
    folder = tmp_path_factory.mktemp("interrupted")
    run, stops = training.Run(folder / "0"), {}
    for name, interruption in INTERRUPTIONS.items():
        result = train(folder, digits, interruption=interruption)
        copy = folder / name
        shutil.copytree(run.path, copy)
        stops[name] = result, training.Run(copy)
    return folder, stops, train(folder, digits)


def test_every_worker_ends_with_the_same_variables_and_they_are_those_of_the_last_checkpoint(undisturbed):
    _, run, result = undisturbed
    for epoch in range(1, EPOCHS + 1):
        assert result.told(0, "trainable", epoch) == result.told(1, "trainable", epoch)
        assert result.told(0, "fixed", epoch) == result.told(1, "fixed", epoch)
    assert result.told(0, "trainable", 1) != result.told(0, "trainable", 2)
    saved = arrays_of(run.checkpoints.paths()[-1]).items()
    saved = {hashlib.sha256(array.tobytes()).hexdigest() for name, array in saved if name.startswith("model/")}
    assert set(result.told(1, "trainable")) <= saved


def test_only_the_chief_writes_and_speaks(undisturbed):
    folder, run, result = undisturbed
    assert [path.name for path in folder.iterdir()] == ["0"]
    assert run.best_file.exists() and run.metrics_file.exists()
    steps = [f"step-{step:08d}.npz" for step in range(1, BATCHES * EPOCHS + 1)]
    assert [path.name for path in run.checkpoints.paths()] == steps
    assert json.loads(run.config_file.read_text())["replicas"] == 2
    assert "Epoch 3/3" in result.outputs[0] and "The best model is that of epoch" in result.outputs[0]
    assert "poch" not in result.outputs[1]


def test_noise_differs_between_workers(undisturbed):
    _, _, result = undisturbed
    assert result.told(0, "mean") == result.told(1, "mean")
    difference = np.abs(np.subtract(result.told(0, "sample"), result.told(1, "sample")))
    assert difference.max() > 1e-3


def test_validation_on_two_workers_is_that_of_one_process(undisturbed, digits):
    _, run, _ = undisturbed
    row = rows_of(run)[run.best["epoch"] - 1]
    alone = run.load_best().evaluate(data.load(DATASET, "validation", 7, digits), return_dict=True, verbose=0)
    assert {f"val_{name}" for name in alone} == {name for name in row if name.startswith("val_")}
    for name, value in alone.items():
        np.testing.assert_allclose(float(row[f"val_{name}"]), value, rtol=1e-5, atol=1e-5, err_msg=name)
    keras.utils.clear_session()


@pytest.mark.parametrize(("name", "killed", "left"), [("worker killed", 1, 0), ("chief killed", 0, 1)])
def test_who_is_left_when_a_worker_is_killed_ends_within_a_minute_and_says_what_to_do(name, killed, left, interrupted):
    result, _ = interrupted[1][name]
    assert result.codes[killed] == "SIGKILL", result.text
    assert result.codes[left] == 75, result.text
    assert result.code == 128 + 9
    assert "SIGTERM" not in result.launcher  # which is what the launcher sends after a minute
    assert f"Worker {killed} was lost" in result.outputs[left]
    assert "the same command, for all workers, continues" in result.outputs[left]


@pytest.mark.parametrize(("name", "step"), [("launcher asked", 9), ("worker asked", 17)])
def test_all_workers_save_and_stop_when_the_launcher_or_one_of_them_is_asked_to(name, step, interrupted):
    result, run = interrupted[1][name]
    assert result.codes == [75, 75] and result.code == 75, result.text
    for output in result.outputs:
        assert f"Stopped by SIGTERM at step {step}; the state is saved. The same command continues." in output
    assert run.checkpoints.paths()[-1].name == f"step-{step:08d}.npz"


def test_after_each_interruption_the_same_command_continues_from_the_last_checkpoint(undisturbed, interrupted):
    _, run, _ = undisturbed
    expected = {path.name: path for path in run.checkpoints.paths()}
    folder, stops, final = interrupted
    assert [path.name for path in folder.iterdir() if path.name.isdigit()] == ["0"]
    results = [result for result, _ in stops.values()]
    last = 0
    for name, (_, stopped), following in zip(stops, stops.values(), [*results[1:], final], strict=True):
        newest = stopped.checkpoints.paths()[-1]
        assert_same_state(newest, expected[newest.name])
        step = int(newest.stem.removeprefix("step-"))
        assert last < step <= INTERRUPTIONS[name]["step"]
        epoch, batch = divmod(step, BATCHES)
        said = f"Continuing {folder / '0'} after epoch {epoch} of {EPOCHS}, batch {batch} of {BATCHES}."
        assert said in following.outputs[0]
        last = step
    assert final.code == 0, final.text


def test_an_interrupted_run_ends_like_an_undisturbed_one_bit_for_bit(undisturbed, interrupted):
    _, run, result = undisturbed
    folder, _, final = interrupted
    again = training.Run(folder / "0")
    assert_same_state(again.checkpoints.paths()[-1], run.checkpoints.paths()[-1])
    for index in range(2):
        for name in ("trainable", "fixed", "sample"):  # the last one with the noise of each worker
            assert final.told(index, name) == result.told(index, name)
    assert again.best == run.best
    for expected, actual in zip(run.load_best().weights, again.load_best().weights, strict=True):
        np.testing.assert_array_equal(actual, expected, err_msg=expected.path)
    for row, expected in zip(rows_of(again), rows_of(run), strict=True):
        assert list(row) == list(expected)
        for name, value in expected.items():
            # What was counted in training before and after an interruption is added up in another order, and label
            # information is the difference of two such numbers.
            tolerance = 0.0 if name in ("epoch", "learning_rate") or name.startswith("val_") else 10 * ROUNDING
            np.testing.assert_allclose(float(row[name]), float(value), tolerance, tolerance, err_msg=name)
    measured = [json.loads(each.metrics_file.read_text()) for each in (again, run)]
    assert measured[0].pop("run") != measured[1].pop("run")
    assert measured[0] == measured[1]
    assert {path.name for path in again.path.iterdir()} == {path.name for path in run.path.iterdir()}
    keras.utils.clear_session()


def test_a_run_goes_from_two_workers_to_one_process_and_back(interrupted, tmp_path, digits):
    _, begun = interrupted[1]["worker asked"]
    shutil.copytree(begun.path, tmp_path / "0")
    run = training.Run(tmp_path / "0")
    interruption = {"step": 29, "worker": 0, "signal": "SIGTERM"}
    alone = train(tmp_path, digits, "--strategy=one_device", workers=0, interruption=interruption)
    assert alone.code == 75, alone.text
    assert "after epoch 1 of 3, batch 5 of 12" in alone.text
    assert run.checkpoints.paths()[-1].name == "step-00000029.npz"
    pair = train(tmp_path, digits, "--strategy=multi_worker")
    assert pair.code == 0, pair.text
    assert "after epoch 2 of 3, batch 5 of 12" in pair.outputs[0]
    assert pair.told(0, "trainable") == pair.told(1, "trainable")
    (steps,) = (
        array
        for name, array in arrays_of(run.checkpoints.paths()[-1]).items()
        if name.startswith("optimizer/") and name.endswith("/iteration")
    )
    assert steps == BATCHES * EPOCHS
    rows = rows_of(run)
    assert rows[0] == rows_of(begun)[0]
    # What was counted of an epoch on other devices counts in full.
    for row in rows:
        assert float(row["accuracy"]) * BATCHES * 8 == pytest.approx(round(float(row["accuracy"]) * 96), abs=1e-3)
    assert run.metrics_file.exists()


# Name -> (a case, and of each worker exit code and words). DIGITS, RUN, FINISHED, FOREIGN and NOWHERE stand for paths.
CASES = {
    "other versions": (
        {"versions": {"1": "2.0.1"}},
        [(1, ["tensorflow is", "on worker 0", "2.0.1 on worker 1", "Install the same versions everywhere"])] * 2,
    ),
    "a busy port": (
        {"busy": 1},
        [(1, ["Worker 1 ", "cannot start: its port", "is in use", "Stop what listens", "Received: address="])] * 2,
    ),
    "other flags": (
        {"own": {"1": ["--learning_rate=0.5"]}},
        [(1, ["Give all of them the same flags", "worker 0 -> worker 1", "learning_rate: 0.001 -> 0.5"])] * 2,
    ),
    "images that one worker has not": (
        {"own": {"1": ["--data_dir=NOWHERE"]}},
        [(1, ["Another worker cannot go on", "worker 1: DatasetUnavailableError", "NOWHERE"]), (1, ["NOWHERE"])],
    ),
    "a folder of something else": (
        {"arguments": ["--output_dir=FOREIGN"]},
        [
            (1, ["is no run folder, and holds letter.txt"]),
            (1, ["Another worker cannot go on", "worker 0: RunMismatchError", "holds letter.txt"]),
        ],
    ),
    "a folder of another run": (
        {"arguments": ["--output_dir=FINISHED", "--batch_size=16"]},
        [
            (1, ["holds a run with another config", "batch_size: 8 -> 16"]),
            (1, ["Another worker cannot go on", "worker 0: RunMismatchError", "batch_size: 8 -> 16"]),
        ],
    ),
    "a finished run": (
        {"arguments": ["--output_dir=FINISHED"]},
        [(0, ["This run is finished. Its results are in FINISHED"]), (0, [])],
    ),
    "what Keras cannot do": (
        {"arguments": ["--jit_compile=true"]},
        [(2, ["jit_compile=auto", "strategy=one_device", "Received: jit_compile=true on 2 devices"])] * 2,
    ),
    # The last one ends the workers, as an error does.
    "a batch that cannot be shared": (
        {"arguments": ["--batch_size=9"], "last": True},
        [(2, ["must be a multiple of 2, such as 8 or 10", "Received: batch_size=9"])] * 2,
    ),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory, digits, undisturbed):
    """Runs all cases in one cluster.

    Returns:
        Its `Result`, dict from the name of a case to exit code and output of each worker, dict of the paths, and what
        is in their folder afterwards.
    """
    folder = tmp_path_factory.mktemp("answers")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "letter.txt").write_text("")
    (folder / "file").write_text("")
    _, finished, _ = undisturbed
    paths = {
        "DIGITS": digits,
        "RUN": str(folder / "run"),
        "FINISHED": str(finished.path),
        "FOREIGN": str(folder / "foreign"),
        "NOWHERE": str(folder / "file" / "none"),
    }
    flags = [*FLAGS, "--data_dir=DIGITS", "--output_dir=RUN"]
    cases = [{**case, "arguments": [*flags, *case.get("arguments", [])]} for case, _ in CASES.values()]
    before = {path: path.stat().st_mtime_ns for path in sorted(finished.path.rglob("*"))}
    result = launch(json.loads(_with_paths(json.dumps(cases), paths)), workers=2)
    after = {path: path.stat().st_mtime_ns for path in sorted(finished.path.rglob("*"))}
    each = {name: [] for name in CASES}
    for output, last in zip(result.outputs, result.codes, strict=True):
        parts = re.split(r"^exit code (\d+)$", output, flags=re.M)
        codes = [*map(int, parts[1::2]), last]
        for name, code, text in zip(CASES, codes, parts[::2], strict=True):
            each[name].append((code, text))
    assert after == before
    return result, each, paths, sorted(path.name for path in folder.rglob("*"))


def _with_paths(text, paths):
    for name, path in paths.items():
        text = text.replace(name, path)
    return text


@pytest.mark.parametrize("name", CASES)
def test_every_worker_is_told_what_they_cannot_do_together(name, answers):
    _, each, paths, _ = answers
    for (code, output), (expected_code, words) in zip(each[name], CASES[name][1], strict=True):
        assert code == expected_code, output
        assert "Traceback" not in output
        for word in words:
            assert _with_paths(word, paths) in output


def test_nothing_is_written_before_all_that_can_be_wrong_was_looked_at(answers):
    result, _, _, names = answers
    assert result.code == 2
    assert names == ["file", "foreign", "letter.txt"]


def test_a_strategy_without_its_devices_or_workers_is_refused_before_anything_is_written(tmp_path, digits):
    flags = [*FLAGS, f"--data_dir={digits}", f"--output_dir={tmp_path / 'run'}"]
    cases = [
        (
            {"arguments": [*flags, "--strategy=multi_worker"], "environment": {"TF_CONFIG": None}},
            ["Start them with scripts/launch.py, set TF_CONFIG for each", "Received: strategy='multi_worker'"],
        ),
        (
            {"arguments": flags, "environment": {"TF_CONFIG": '{"cluster": {"worker": ["a:1", "b:1"]}'}},
            ["TF_CONFIG is not JSON", "It looks like", 'Received: TF_CONFIG={"cluster": {"worker": ["a:1", "b:1"]}'],
        ),
        (
            {"arguments": flags, "environment": {"TF_CONFIG": '{"cluster": {"worker": ["a:1"]}, "task": {}}'}},
            ["TF_CONFIG does not say which worker this is", "Received: TF_CONFIG="],
        ),
        (
            {"arguments": [*flags, "--strategy=mirrored"], "last": True},
            ["mirrored needs two devices or more, and TensorFlow finds 1 CPU", "Use --strategy=one_device"],
        ),
    ]
    result = launch([case for case, _ in cases], workers=0)
    outputs = re.split(r"^exit code 1$", result.text, flags=re.M)
    assert result.code == 1, result.text
    for output, (_, words) in zip(outputs, cases, strict=True):
        assert "Traceback" not in output
        for word in words:
            assert word in output
    assert not (tmp_path / "run").exists()
