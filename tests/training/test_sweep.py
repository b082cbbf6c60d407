"""Sweeps: the file, what is run and what is not run again, and the table. The trainer here copies what is prepared."""

import inspect
import json
import math
import os
import re
import signal
import sys
import textwrap
import threading
import types

import pytest

from aib_tf import training
from aib_tf.evaluation import Estimate, Result
from aib_tf.evaluation.report import write_json
from aib_tf.training import sweep
from aib_tf.training.run import Run, RunMismatchError
from aib_tf.training.sweep import machine, processes

BASIC = """
    title: Two models
    flags: {dataset: cluttered_digits, width: 0.125, epochs: 2, beta: 1e-3}
    seeds: [0, 1]
    rows:
      plain: {model: vgg}
      aib: {model: vgg_aib, beta: 0.1}
    columns:
      "test error, %": {metric: accuracy.top_1, complement: true, scale: 100}
"""
EVALUATED = BASIC + "    evaluate: {suite: accuracy, images: 250}\n"

# Stands for scripts/train.py and scripts/evaluate.py: copies what lies prepared for the run, and can fail.
FAKE = """
import os, shutil, signal, sys, time
kind, prepared, *arguments = sys.argv[1:]
flags = dict(argument[2:].split("=", 1) for argument in arguments)
output = flags.get("output_dir") or flags["run"]
name = os.path.basename(output)
with open(os.path.join(prepared, "calls.txt"), "a") as calls:
    calls.write(kind + " " + name + "\\n")
with open(os.path.join(prepared, "environment.txt"), "w") as file:
    file.write(os.environ["OMP_NUM_THREADS"] + " " + os.environ["TF_NUM_INTRAOP_THREADS"])
print("working on", name, flush=True)
trouble = os.path.join(prepared, name + "." + kind)
if os.path.exists(trouble):
    what = open(trouble).read()
    os.remove(trouble)
    os.makedirs(output, exist_ok=True)
    if what != "fail":
        shutil.copy(os.path.join(prepared, name, "config.json"), output)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "wait":
        def save(number, frame):
            open(os.path.join(output, "saved.txt"), "w").close()
            os._exit(75)
        signal.signal(signal.SIGTERM, save)
        open(os.path.join(prepared, "waiting"), "w").close()
        time.sleep(60)
    if what == "fail":
        os.rmdir(output)
        sys.exit("no such data")
    if what == "nothing":
        sys.exit(0)
    sys.exit(3)
if kind == "train":
    shutil.copytree(os.path.join(prepared, name), output, dirs_exist_ok=True)
else:
    parts = ["evaluation", flags.get("split", "test")] + flags["suite"].split(",")
    shutil.copy(os.path.join(prepared, name + ".json"), os.path.join(output, "_".join(parts) + ".json"))
"""


def result(suite="accuracy", samples=0, **metrics):
    metrics = {name: Estimate(*values, 100) for name, values in metrics.items()}
    return {suite: Result(suite, 100, samples, 10, 0, metrics, {}, {}, {})}


def write_run(folder, cell, top_1=(0.9, 0.85, 0.95), **more):
    """Writes what scripts/train.py leaves of a finished run."""
    run = Run(folder)
    run.create(cell.config)
    run.best_file.write_bytes(f"model of {cell.run}".encode())
    epochs = range(1, 4)
    columns = {"val_accuracy": [0.5, 0.6, 0.7], "seconds": [9.0, 2.0, 3.0]}
    if cell.row != "plain":
        columns["val_rate_bits"] = [30.0, 20.0, 10.0]
    run.write_history(
        [{"epoch": epoch, **{name: column[epoch - 1] for name, column in columns.items()}} for epoch in epochs]
    )
    write_json(run.metrics_file, {**result(top_1=top_1), **more})


class Workplace:
    """A folder with the file of a sweep, what the fake programs find prepared, and the runs."""

    def __init__(self, folder):
        self.folder = folder
        self.prepared = folder / "prepared"
        self.prepared.mkdir()
        self.runs = folder / "runs"
        program = folder / "fake.py"
        program.write_text(FAKE)
        self.commands = {
            kind: [sys.executable, "-I", "-S", str(program), kind, str(self.prepared)] for kind in ("train", "evaluate")
        }

    def read(self, text, **arguments):
        file = self.folder / "sweep.yaml"
        file.write_text(textwrap.dedent(text))
        return sweep.read(file, **arguments)

    def prepare(self, text, evaluated=(0.8, 0.7, 0.9)):
        planned = self.read(text)
        for cell in planned.cells:
            if cell.is_trained and not (self.prepared / cell.run).exists():
                write_run(self.prepared / cell.run, cell)
            if cell.evaluate is not None:
                samples = cell.evaluate.get("samples", 0)
                value = tuple(each + samples / 100 for each in evaluated)
                write_json(self.prepared / f"{cell.results}.json", result(top_1=value, samples=samples))
        return planned

    def execute(self, planned, **arguments):
        """Runs it, and gives what failed and which programs were started."""
        calls = self.prepared / "calls.txt"
        calls.write_text("")
        failures = sweep.execute(planned, self.runs, **self.commands, **arguments)
        return failures, sorted(calls.read_text().splitlines())

    def table(self, planned, **arguments):
        """Writes the table and gives its rows, name to heading to text."""
        path = sweep.write(planned, self.runs, **self.commands, command=["python", "sweep.py"], **arguments)
        lines = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in path.read_text().splitlines() if line[:2] == "| "]
        headings, _, *rows = lines
        return {row[0]: dict(zip(headings[1:], row[1:], strict=True)) for row in rows}

    def record(self, name):
        return json.loads((self.runs / name / "sweep.json").read_text())


@pytest.fixture
def workplace(tmp_path):
    return Workplace(tmp_path)


def test_every_row_is_trained_with_every_seed_by_the_common_flags_and_its_own(workplace):
    cells = workplace.read(BASIC).cells
    assert [cell.name for cell in cells] == ["plain-0", "plain-1", "aib-0", "aib-1"]
    assert all(cell.run == cell.results == cell.name and cell.is_trained for cell in cells)
    assert cells[1].flags == {
        "dataset": "cluttered_digits",
        "width": 0.125,
        "epochs": 2,
        "beta": 1e-3,
        "model": "vgg",
        "seed": 1,
    }
    assert [cell.config.objective.beta for cell in cells] == [1e-3, 1e-3, 0.1, 0.1]
    assert cells[3].config.seed == 1


def test_a_row_may_have_seeds_of_its_own_and_a_flag_may_be_taken_back(workplace):
    text = BASIC.replace("beta: 0.1}", "beta: 0.1, seeds: [5], latent_dim: null}").replace(
        "epochs: 2,", "epochs: 2, latent_dim: 8, jit_compile: false, decay_at: [1], schedule: steps,"
    )
    cells = workplace.read(text).cells
    assert [cell.name for cell in cells] == ["plain-0", "plain-1", "aib-5"]
    assert [cell.config.model.latent_dim for cell in cells] == [8, 8, 256]
    assert cells[0].config.jit_compile == "false" and cells[0].config.optimization.decay_at == (1,)


def test_the_example_of_the_documentation_is_a_sweep(workplace):
    example = re.search(r"The file is YAML:\n\n(.*?)\n\nArgs:", inspect.getdoc(sweep.read), re.DOTALL).group(1)
    rows = workplace.read(example).rows
    assert [len(cells) for cells in rows.values()] == [3, 2, 2]


def test_the_data_folder_of_the_command_goes_before_that_of_the_file(workplace, tmp_path):
    planned = workplace.read(BASIC.replace("epochs: 2", "epochs: 2, data_dir: /nowhere"), data_dir=str(tmp_path))
    assert planned.cells[0].config.data.data_dir == str(tmp_path)


def test_features_may_be_carried_to_a_folder_of_pictures(workplace, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / "train" / name).mkdir(parents=True)
    text = BASIC + '    evaluate: {suite: "accuracy,transfer", transfer_to: image_folder/pictures}\n'
    planned = workplace.read(text, data_dir=str(tmp_path))
    assert planned.cells[0].evaluate["transfer_to"] == ("image_folder/pictures",)
    with pytest.raises(FileNotFoundError, match="elsewhere/pictures"):
        workplace.read(text, data_dir=str(tmp_path / "elsewhere"))


def test_a_row_that_looks_at_another_has_folders_for_results_where_it_evaluates_otherwise(workplace):
    text = EVALUATED.replace(
        "    columns:",
        "      aib, 4 samples: {run: aib, evaluate: {samples: 4}}\n      again: {run: aib, seeds: [1]}\n    columns:",
    )
    rows = workplace.read(text).rows
    drawn, again = rows["aib, 4 samples"], rows["again"]
    assert [(cell.run, cell.results) for cell in drawn] == [
        ("aib-0", "aib, 4 samples-0"),
        ("aib-1", "aib, 4 samples-1"),
    ]
    assert drawn[0].evaluate == {"suite": ("accuracy",), "images": 250, "samples": 4}
    assert [(cell.run, cell.results) for cell in again] == [("aib-1", "aib-1")]
    assert not drawn[0].is_trained and drawn[0].flags == rows["aib"][0].flags


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: Two models", "title: [", "cannot be read"),
        ("title: Two models", "title: 2026-02-30", "cannot be read: day .*out of range.* Received: file="),
        ("title: Two models", "name: x", "has the keys title, flags, seeds.*Received: name='x'"),
        ("title: Two models", "title: 3", "Received: title=3"),
        ("seeds: [0, 1]", "seeds: [0, 0]", r"each once. Received: \[0, 0\]"),
        ("seeds: [0, 1]", "seeds: [-1]", "Received: seeds=-1"),
        ("seeds: [0, 1]", "seeds: 3", "Received: 3"),
        ("epochs: 2", "epochs: 2, epochs: 3", "stands twice in one place. Received: epochs in line"),
        ("epochs: 2", "epochs: many", "`epochs` must be of type int. Received: epochs='many'"),
        ("epochs: 2", "epochs: 0", "Row 'plain': `epochs` must be an integer from 1 up. Received: epochs=0"),
        ("epochs: 2", "epochs: true", "Received: epochs=True"),
        ("epochs: 2", "epochs: null", "Received: epochs=None"),
        ("epochs: 2", "epoch: 2", "there is no flag of this name; there are model.*Received: epoch=2"),
        ("epochs: 2", "seed: 2", "one of `seeds`. Received: seed=2"),
        ("dataset: cluttered_digits", "dataset: mnist", "Row 'plain': .*mnist"),
        ("model: vgg}", "model: vgg_abi}", "Row 'plain': .*vgg_abi"),
        ("plain:", "a/b:", "Received: 'a/b'"),
        ("plain:", "3:", "Received: 3"),
        ("plain: {model: vgg}", "plain: {model: vgg}\n      plain: {model: vgg}", "twice.*Received: plain in line"),
        ("plain: {model: vgg}", "plain: vgg", "Row 'plain' must be a mapping.*Received: 'vgg'"),
        ("beta: 0.1}", "beta: 0.1, run: plain}", "leave out `run` or the flags. Received: model, beta"),
        ("{model: vgg_aib, beta: 0.1}", "{run: [plain]}", "one of plain. Received: run="),
        ("{model: vgg_aib, beta: 0.1}", "{run: other}", "one of plain. Received: run='other'"),
        ("{model: vgg_aib, beta: 0.1}", "{run: plain, seeds: [7]}", r"only \[0, 1\]. Received: seeds=\[7\]"),
        ("    columns:", "    evaluate: {suite: speed}\n    columns:", "suites must be one or more.*speed"),
        ("    columns:", "    evaluate: {images: -1}\n    columns:", "Received: images=-1"),
        ("    columns:", "    evaluate: {compare: x}\n    columns:", "Received: compare='x'"),
        ("    columns:", "    evaluate: {split: all}\n    columns:", "Received: split='all'"),
        ("accuracy.top_1", "speed.top_1", "Column 'test error, %': .*run.parameters.*Received: metric='speed.top_1'"),
        ("accuracy.top_1", "run.speed", "seconds_per_epoch.*run.speed|Received: .*speed"),
        ("accuracy.top_1", "consistency.kept_spatial", "no row is measured by the suite consistency"),
        ("scale: 100", "scale: 0", "Received: scale=0"),
        ("complement: true", "complement: 1", "Received: complement=1"),
        ("complement: true", "percent: true", "Received: percent=True"),
    ],
)
def test_what_is_wrong_with_a_file_is_named_before_anything_is_run(old, new, message, workplace):
    assert old in BASIC
    with pytest.raises(ValueError, match="(?s)" + message) as raised:
        workplace.read(BASIC.replace(old, new, 1))
    assert "sweep.yaml" in str(raised.value)


@pytest.mark.parametrize("text", ["", "[]", "title: x", "title: x\nrows: {}", BASIC.partition("columns:")[0]])
def test_a_file_that_lacks_a_part_is_refused(text, workplace):
    with pytest.raises(ValueError, match="Received: "):
        workplace.read(text)


def test_runs_and_evaluations_that_are_there_are_not_started_again(workplace):
    planned = workplace.prepare(EVALUATED)
    names = ["aib-0", "aib-1", "plain-0", "plain-1"]
    assert workplace.execute(planned, jobs=2) == (
        {},
        [f"{kind} {name}" for kind in ("evaluate", "train") for name in names],
    )
    assert workplace.execute(planned, jobs=2) == ({}, [])
    log = (workplace.runs / "aib-0.log").read_text()
    assert log.count("working on aib-0") == 2 and "--beta=0.1 --model=vgg_aib --seed=0" in log


def test_what_a_run_took_is_recorded_with_its_command_and_machine(workplace):
    planned = workplace.prepare(EVALUATED)
    workplace.execute(planned)
    record = workplace.record("aib-1")
    trained = record["training"]
    assert trained["seed"] == 1 and trained["processes"] == 1 and not trained["running"]
    assert trained["command"] == [
        *workplace.commands["train"],
        f"--output_dir={workplace.runs / 'aib-1'}",
        *["--dataset=cluttered_digits", "--width=0.125", "--epochs=2", "--beta=0.1", "--model=vgg_aib", "--seed=1"],
    ]
    assert trained["seconds"] > 0 and record["evaluation"]["seconds"] > 0
    assert record["evaluation"]["command"][-2:] == ["--suite=accuracy", "--images=250"]
    (described,) = trained["machines"]
    assert described["cores"] == machine.cores() and described["cpu"] and described["tensorflow"]


def test_runs_at_the_same_time_share_the_cores(workplace, monkeypatch):
    for name in machine.THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "cores", lambda: 7)
    planned = workplace.prepare(BASIC)
    workplace.execute(planned, jobs=2)
    assert (workplace.prepared / "environment.txt").read_text() == "3 3"
    assert workplace.record("aib-0")["training"]["machines"][0]["threads"] == 3


def test_a_run_that_was_trained_by_hand_is_taken_as_it_is(workplace):
    planned = workplace.prepare(BASIC)
    for cell in planned.cells:
        write_run(workplace.runs / cell.run, cell)
    assert workplace.execute(planned) == ({}, [])
    row = workplace.table(planned)["aib"]
    assert (row["training"], row["evaluation"], row["machine"], row["seeds"]) == ("-", "-", "-", "0, 1")


def test_a_run_with_other_flags_is_an_error_that_names_them_and_nothing_is_started(workplace):
    planned = workplace.prepare(BASIC)
    workplace.execute(planned)
    changed = workplace.read(BASIC.replace("beta: 0.1", "beta: 0.2").replace("seeds: [0, 1]", "seeds: [0, 1, 2]"))
    with pytest.raises(RunMismatchError, match=r"(?s)aib-0 holds.*beta: 0.1 -> 0.2.*aib-1 holds.*beta: 0.1 -> 0.2"):
        workplace.execute(changed)
    assert (workplace.prepared / "calls.txt").read_text() == ""
    with pytest.raises(RunMismatchError, match=r"beta: 0\.1 -> 0\.2"):
        workplace.table(changed)


def test_where_data_lie_and_how_a_run_is_computed_may_change(workplace, tmp_path):
    planned = workplace.prepare(BASIC)
    workplace.execute(planned)
    moved = workplace.read(BASIC.replace("epochs: 2", "epochs: 2, checkpoints_kept: 1"), data_dir=str(tmp_path))
    assert workplace.execute(moved) == ({}, [])


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("fail", "training ended with exit code 1.*plain-1.log.*no such data"),
        ("kill", "training was killed by SIGKILL, perhaps for want of memory.*working on plain-1"),
        ("nothing", "training ended well and left no results"),
    ],
)
def test_a_run_that_fails_is_reported_and_does_not_stop_the_others(trouble, message, workplace):
    planned = workplace.prepare(EVALUATED)
    (workplace.prepared / "plain-1.train").write_text(trouble)
    failures, calls = workplace.execute(planned)
    assert list(failures) == ["plain-1"] and re.search("(?s)" + message, failures["plain-1"])
    assert "evaluate plain-1" not in calls and len(calls) == 7
    table = workplace.table(planned, failures=failures)
    assert table["plain"]["seeds"] == "0" and table["aib"]["seeds"] == "0, 1"
    assert "Missing: plain-1." in (workplace.runs / "table.md").read_text()
    assert json.loads((workplace.runs / "table.json").read_text())["failures"] == failures
    assert workplace.execute(planned) == ({}, ["evaluate plain-1", "train plain-1"])


def test_an_evaluation_that_fails_is_repeated_without_training(workplace):
    planned = workplace.prepare(EVALUATED)
    (workplace.prepared / "aib-0.evaluate").write_text("crash")
    failures, _ = workplace.execute(planned)
    assert list(failures) == ["aib-0"] and "evaluation ended with exit code 3" in failures["aib-0"]
    first = workplace.record("aib-0")["evaluation"]["seconds"]
    assert workplace.execute(planned) == ({}, ["evaluate aib-0"])
    assert workplace.record("aib-0")["evaluation"]["seconds"] > first


def test_the_durations_of_a_run_that_was_resumed_are_summed(workplace):
    planned = workplace.prepare(BASIC)
    (workplace.prepared / "aib-0.train").write_text("crash")  # after it has begun
    failures, _ = workplace.execute(planned)
    first = workplace.record("aib-0")["training"]
    assert "exit code 3" in failures["aib-0"] and first["processes"] == 1
    workplace.execute(planned)
    second = workplace.record("aib-0")["training"]
    assert second["processes"] == 2 and second["seconds"] > first["seconds"] > 0
    assert second["started"] == first["started"] and len(second["machines"]) == 1


@pytest.mark.parametrize("record", [None, {"running": True}])
def test_of_a_run_that_was_begun_otherwise_nobody_knows_how_long_it_took(record, workplace):
    planned = workplace.prepare(BASIC)
    (workplace.prepared / "aib-0.train").write_text("crash")
    workplace.execute(planned)
    file = workplace.runs / "aib-0" / "sweep.json"
    if record is None:
        file.unlink()
    else:  # as a sweep leaves it that is killed
        found = json.loads(file.read_text())
        file.write_text(json.dumps({"training": {**found["training"], **record}}))
    assert workplace.execute(planned) == ({}, ["train aib-0"])
    known = workplace.record("aib-0")["training"]
    assert known["seconds"] is None and known["peak_memory_bytes"] is None
    assert workplace.table(planned)["aib"]["training"] == "-"


def test_other_flags_of_the_evaluation_or_another_model_mean_another_evaluation(workplace):
    planned = workplace.prepare(EVALUATED)
    workplace.execute(planned)
    more = workplace.prepare(EVALUATED.replace("images: 250", "images: 500"))
    assert workplace.execute(more)[1] == [f"evaluate {cell.name}" for cell in sorted(more.cells, key=lambda c: c.name)]
    (workplace.runs / "aib-1" / "best.keras").write_bytes(b"another model")
    assert workplace.execute(more) == ({}, ["evaluate aib-1"])


def test_results_that_were_there_before_are_not_counted_as_found_in_no_time(workplace):
    planned = workplace.prepare(EVALUATED)
    for cell in planned.cells:
        write_run(workplace.runs / cell.run, cell)
    kept = workplace.runs / "aib-0" / "evaluation" / "test" / "accuracy.npz"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"")
    workplace.execute(planned)
    assert workplace.record("aib-0")["evaluation"]["seconds"] is None
    assert workplace.record("aib-1")["evaluation"]["seconds"] > 0


def test_rows_that_look_at_a_run_are_evaluated_also_where_its_own_evaluation_fails(workplace):
    text = EVALUATED.replace("    columns:", "      drawn: {run: aib, evaluate: {samples: 4}}\n    columns:")
    planned = workplace.prepare(text)
    (workplace.prepared / "aib-0.evaluate").write_text("crash")
    failures, calls = workplace.execute(planned)
    assert list(failures) == ["aib-0"] and "evaluate drawn-0" in calls
    table = workplace.table(planned, failures=failures)
    assert table["aib"]["seeds"] == "1" and table["drawn"]["seeds"] == "0, 1"


def test_results_that_somebody_has_overwritten_are_not_shown_but_found_again(workplace):
    planned = workplace.prepare(EVALUATED)
    workplace.execute(planned)
    write_json(workplace.runs / "aib-0" / "evaluation_test_accuracy.json", result(top_1=(0.1, 0.1, 0.1), samples=4))
    assert workplace.table(planned)["aib"]["seeds"] == "1"
    assert workplace.execute(planned) == ({}, ["evaluate aib-0"])
    assert workplace.table(planned)["aib"]["test error, %"] == "20 (20 to 20)"


def test_the_time_of_evaluating_another_model_is_not_counted(workplace):
    planned = workplace.prepare(EVALUATED)
    workplace.execute(planned)
    record = workplace.record("aib-1")
    record["evaluation"]["seconds"] = 1e6
    (workplace.runs / "aib-1" / "sweep.json").write_text(json.dumps(record))
    (workplace.runs / "aib-1" / "best.keras").write_bytes(b"another model")
    workplace.execute(planned)
    assert 0 < workplace.record("aib-1")["evaluation"]["seconds"] < 1e6


def test_the_folder_of_one_run_is_not_taken_for_that_of_a_sweep(workplace):
    planned = workplace.prepare(BASIC)
    write_run(workplace.runs, planned.cells[0])
    with pytest.raises(RunMismatchError, match="is the folder of one run"):
        workplace.execute(planned)


def test_a_signal_that_comes_while_another_is_passed_on_is_passed_on_too(monkeypatch):
    passed = []

    def killpg(pid, number):
        passed.append(number)
        if len(passed) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(processes.os, "killpg", killpg)
    started = processes.Processes({})
    started._live.add(1)
    with started:
        os.kill(os.getpid(), signal.SIGINT)
    assert sorted(passed) == [signal.SIGINT, signal.SIGTERM] and started.signal == "SIGINT"


def test_a_remote_data_folder_stays_as_it_is(workplace):
    planned = workplace.read(BASIC, data_dir="gs://bucket/sets")
    assert planned.cells[0].flags["data_dir"] == "gs://bucket/sets"


def test_a_signal_lets_the_runs_save_and_the_same_command_goes_on(workplace):
    planned = workplace.prepare(BASIC)
    (workplace.prepared / "plain-0.train").write_text("wait")
    handler = signal.getsignal(signal.SIGTERM)
    over = threading.Event()

    def stop():
        while not over.wait(0.01):
            if (workplace.prepared / "waiting").exists():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    with pytest.raises(training.TrainingInterrupted, match="Stopped by SIGTERM") as raised:
        workplace.execute(planned)
    over.set()
    thread.join()
    assert raised.value.signal == "SIGTERM" and signal.getsignal(signal.SIGTERM) == handler
    assert (workplace.runs / "plain-0" / "saved.txt").exists()
    assert (workplace.prepared / "calls.txt").read_text() == "train plain-0\n"
    failures, calls = workplace.execute(planned)
    assert not failures and len(calls) == 4
    assert workplace.record("plain-0")["training"]["processes"] == 2


def test_a_damaged_record_is_an_error_before_anything_is_started(workplace):
    planned = workplace.prepare(BASIC)
    (workplace.runs / "aib-0").mkdir(parents=True)
    write_run(workplace.runs / "aib-0", planned.cells[2])
    (workplace.runs / "aib-0" / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"delete it\. Received: file=.*sweep\.json"):
        workplace.execute(planned)
    assert not (workplace.prepared / "calls.txt").read_text()


@pytest.mark.parametrize("arguments", [{"jobs": 0}, {"output_dir": "gs://bucket/runs"}])
def test_impossible_arguments_are_refused(arguments, workplace):
    planned = workplace.read(BASIC)
    values = {"output_dir": workplace.runs, **arguments}
    with pytest.raises(ValueError, match="Received: "):
        sweep.execute(planned, **workplace.commands, **values)


def test_the_peak_memory_is_told_unless_that_of_this_process_hides_it(tmp_path, monkeypatch):
    command = [sys.executable, "-I", "-S", "-c", "x = b'x' * 50_000_000; print('end')"]
    for floor, known in ((0, True), (2**60, False)):
        usage = types.SimpleNamespace(ru_maxrss=floor)
        monkeypatch.setattr(processes.resource, "getrusage", lambda who, usage=usage: usage)
        ended = processes.Processes({}).run(command, tmp_path / "log")
        assert ended.code == 0 and ended.last_lines == "end"
        assert ended.peak_memory_bytes > 50_000_000 if known else ended.peak_memory_bytes is None


TABLE = """
    title: Known numbers
    flags: {dataset: cluttered_digits}
    seeds: [0, 1]
    rows:
      plain: {model: vgg}
      aib | β: {model: vgg_aib, seeds: [3]}
    columns:
      "test error, %": {metric: accuracy.top_1, complement: true, scale: 100}
      "rate, bits": bottleneck.rate_bits
      "s per epoch": run.seconds_per_epoch
      "memory, GB": {metric: run.peak_memory_bytes, scale: 1e-9}
"""


def known_runs(workplace, text=TABLE):
    planned = workplace.read(text)
    rate = result("bottleneck", rate_bits=(20.5, 19.5, 21.5))
    tops = {"plain-0": (0.9, 0.88, 0.92), "plain-1": (0.94, 0.92, 0.96), "aib | β-3": (0.745, 0.7, 0.79)}
    for cell in planned.cells:
        write_run(workplace.runs / cell.run, cell, tops[cell.name], **(rate if cell.row != "plain" else {}))
    return planned


def test_the_table_holds_means_over_seeds_and_the_interval_of_a_single_one(workplace):
    planned = known_runs(workplace)
    described = {**machine.describe(2), "cpu": "Some CPU", "cores": 4}
    for name, seconds in (("plain-0", 60.0), ("plain-1", 90.0)):
        record = {"seconds": seconds, "peak_memory_bytes": 2_500_000_000, "machines": [described]}
        (workplace.runs / name / "sweep.json").write_text(json.dumps({"training": record}))
    table = workplace.table(planned)
    assert table == {
        "plain": {
            "test error, %": "8.0 (6.0 to 10.0)",
            "rate, bits": "-",
            "s per epoch": "3",
            "memory, GB": "2.5",
            "seeds": "0, 1",
            "training": "1 min 15 s",
            "evaluation": "-",
            "machine": "1",
            "paper": "see the paper",
        },
        "aib \\| β": {
            "test error, %": "25.5 (21.0 to 30.0)",
            "rate, bits": "20.5 (19.5 to 21.5)",
            "s per epoch": "3",
            "memory, GB": "-",
            "seeds": "3",
            "training": "-",
            "evaluation": "-",
            "machine": "-",
            "paper": "see the paper",
        },
    }
    text = (workplace.runs / "table.md").read_text()
    assert text.startswith("# Known numbers\n\n    python sweep.py\n")
    assert "Machine 1: Some CPU, 2 of 4 cores for each run" in text
    assert "--dataset=cluttered_digits --model=vgg --seed=0" in text and "curves.png" in text
    assert (workplace.runs / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_name_of_a_row_may_hold_dollar_signs(workplace):
    planned = workplace.prepare(BASIC.replace("aib:", '"from $_$ to $2":'))
    workplace.execute(planned)
    assert "from $_$ to $2" in workplace.table(planned)
    assert (workplace.runs / "curves.png").exists()


@pytest.mark.parametrize("content", ["", "{}", '{"suites": {"accuracy": {"metrics": {"top_1": 0.9}}}}'])
def test_results_that_were_changed_are_named(content, workplace):
    planned = known_runs(workplace)
    (workplace.runs / "plain-1" / "metrics.json").write_text(content)
    with pytest.raises(RunMismatchError, match=r"plain-1.metrics\.json cannot be read .*delete it"):
        workplace.table(planned)


def test_table_json_has_every_number_in_full_precision(workplace):
    planned = known_runs(workplace)
    workplace.table(planned)
    rows = json.loads((workplace.runs / "table.json").read_text())["rows"]
    error = rows["aib | β"]["columns"]["test error, %"]["3"]
    assert error == pytest.approx({"value": 25.5, "low": 21.0, "high": 30.0, "images": 100}, rel=1e-12)
    assert rows["plain"]["columns"]["rate, bits"] == {"0": None, "1": None}
    run = rows["plain"]["runs"]["1"]
    assert run["suites"]["accuracy"]["metrics"]["top_1"]["value"] == 0.94
    assert run["facts"]["seconds_per_epoch"] == 3.0 and run["flags"]["seed"] == 1


def test_a_metric_that_no_row_has_is_an_error_that_lists_what_there_is(workplace):
    planned = known_runs(workplace, TABLE.replace("rate_bits", "rate_bit"))
    with pytest.raises(ValueError, match=r"the suite bottleneck has rate_bits\. Received: metric=bottleneck\.rate_bit"):
        workplace.table(planned)
    assert not (workplace.runs / "table.md").exists()
    assert workplace.table(planned, failures={"plain-7": "lost"})["plain"]["rate, bits"] == "-"


def test_what_was_evaluated_goes_before_what_training_measured(workplace):
    planned = workplace.prepare(EVALUATED)
    workplace.execute(planned)
    assert workplace.table(planned)["aib"]["test error, %"] == "20 (20 to 20)"
    assert workplace.table(workplace.read(BASIC))["aib"]["test error, %"] == "10.0 (10.0 to 10.0)"


def test_numbers_with_other_samples_are_those_of_their_own_evaluation_alone(workplace):
    text = EVALUATED.replace(
        "    columns:",
        "      drawn: {run: aib, evaluate: {samples: 4}}\n    columns:\n      rate: bottleneck.rate_bits",
    )
    planned = workplace.prepare(text)
    for cell in planned.cells:
        if cell.row == "aib":
            rate = result("bottleneck", rate_bits=(20.5, 19.5, 21.5))
            write_run(workplace.prepared / cell.run, cell, **rate)
    failures, calls = workplace.execute(planned)
    assert not failures and [call for call in calls if "drawn" in call] == ["evaluate drawn-0", "evaluate drawn-1"]
    table = workplace.table(planned)
    assert table["aib"]["test error, %"] == "20 (20 to 20)" and table["drawn"]["test error, %"] == "16 (16 to 16)"
    assert table["aib"]["rate"] == "20.5 (20.5 to 20.5)" and table["drawn"]["rate"] == "-"
    assert workplace.execute(planned) == ({}, [])


def test_a_real_run_is_recognised_and_its_parameters_are_counted(workplace, data_dir):
    planned = workplace.read(
        """
        title: Real
        flags: {dataset: cluttered_digits/train96_validation40_test40_seed0, width: 0.05, latent_dim: 8, epochs: 1}
        rows:
          aib: {model: vgg_aib}
        columns:
          error: {metric: accuracy.top_1, complement: true}
          rate: bottleneck.rate_bits
          parameters: run.parameters
          seconds: run.seconds_per_epoch
        """,
        data_dir=data_dir,
    )
    folder = workplace.runs / "aib-0"
    history = training.fit(planned.cells[0].config, folder, verbose=0)
    assert workplace.execute(planned) == ({}, [])
    (row,) = workplace.table(planned).values()
    count = sum(math.prod(weight.shape) for weight in Run(folder).load_best().trainable_weights)
    assert row["parameters"] == f"{count:,}"
    assert re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", row["error"]) and row["rate"] != "-"
    facts = json.loads((workplace.runs / "table.json").read_text())["rows"]["aib"]["runs"]["0"]["facts"]
    assert facts["seconds_per_epoch"] == history["seconds"][0]
