"""Trains and evaluates what a sweep lacks, each run in processes of its own."""

import concurrent.futures
import datetime
import hashlib
import json
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from aib_tf import files
from aib_tf.training.callbacks import TrainingInterrupted
from aib_tf.training.run import Run, RunMismatchError
from aib_tf.training.sweep import machine
from aib_tf.training.sweep.plan import Cell, Sweep, evaluate_arguments, train_arguments
from aib_tf.training.sweep.processes import Processes, StoppedError
from aib_tf.validation import check_count

RECORD = "sweep.json"

_logger = logging.getLogger("aib_tf")


class _RunError(Exception):
    """One run failed; the message says how."""


def execute(
    sweep: Sweep, output_dir: str | os.PathLike, train: Sequence[str], evaluate: Sequence[str], jobs: int = 1
) -> dict[str, str]:
    """Trains and evaluates what is not there yet.

    Each run lies in `output_dir`/ROW-SEED. Beside it, ROW-SEED.log has what its processes wrote; in it, sweep.json has
    how it came about. A run that was trained otherwise, by the same flags, is taken as it is.

    Args:
        sweep: What to run.
        output_dir: A local folder.
        train: Command that trains, such as ["python", "scripts/train.py"].
        evaluate: Command that evaluates, such as ["python", "scripts/evaluate.py"].
        jobs: How many runs at a time. Each gets its share of the cores.

    Returns:
        Name of each run or evaluation that failed to what happened; empty when all is there.

    Raises:
        ValueError: `jobs` is below 1, or the folder is not a local one.
        RunMismatchError: A folder holds a run with other flags, or something else; nothing was started.
        TrainingInterrupted: On Ctrl-C or SIGTERM, after the processes saved and ended.
    """
    return _Execution(sweep, output_dir, train, evaluate, jobs).run()


def is_evaluated(cell: Cell, folder: os.PathLike) -> bool:
    """Whether the results of a cell are there: of its model, with its flags, as sweep.json says."""
    if cell.evaluate is None:
        return True
    done = read_record(folder / cell.results).get("evaluation")
    return (
        done is not None
        and done["flags"] == _plain(cell.evaluate)
        and done.get("results_sha256") is not None
        and done["results_sha256"] == _sha256(folder / cell.results / cell.results_file)
        and done["model_sha256"] == _sha256(folder / cell.run / "best.keras")
    )


def read_record(folder: os.PathLike) -> dict:
    """What sweep.json of a folder holds; empty where there is none.

    Raises:
        ValueError: It cannot be read.
    """
    file = folder / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it is no object")
        return record
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(
            f"This file cannot be read ({error}). Without it the durations are unknown and nothing else is lost: "
            f"delete it. Received: file={str(file)!r}"
        ) from error


class _Execution:
    """One call of `execute`."""

    def __init__(self, sweep, output_dir, train, evaluate, jobs):
        self.sweep = sweep
        self.folder = files.path(output_dir)
        if not isinstance(self.folder, Path):
            raise ValueError(f"A sweep needs a local folder. Received: output_dir={str(output_dir)!r}")
        self.train = list(train)
        self.evaluate = list(evaluate)
        self.jobs = check_count("jobs", jobs)
        own = max(machine.cores() // self.jobs, 1)
        self.environment = dict.fromkeys(machine.THREADS, str(own))
        # The first run would otherwise take nearly all memory of a GPU.
        self.environment["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"
        set_by_user = os.environ.get("TF_NUM_INTRAOP_THREADS", "")
        self.machine = machine.describe(int(set_by_user) if set_by_user.isdecimal() else own)
        self.failures = {}
        self._finished = 0
        self._lock = threading.Lock()

    def run(self):
        waiting = self._plan()
        if not waiting:
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        processes = Processes(self.environment)
        with processes, concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            started = [pool.submit(self._advance, cells, processes, len(waiting)) for cells in waiting]
            concurrent.futures.wait(started)
        for future in started:
            if not isinstance(future.exception(), StoppedError):
                future.result()  # an error of this program
        if processes.signal is not None:
            raise TrainingInterrupted(
                f"Stopped by {processes.signal}; what was trained is saved. The same command continues.",
                processes.signal,
            )
        return dict(self.failures)

    def _plan(self):
        """Checks every folder, and gives the cells that lack something, those of one run together."""
        if Run(self.folder).config_file.exists():
            raise RunMismatchError(
                f"{self.folder} is the folder of one run, and a sweep keeps a folder for each run in its own. Name "
                "another one."
            )
        mismatches, runs = [], {}
        counts = {"trained": 0, "to train": 0, "to continue": 0, "to evaluate": 0}
        for cell in self.sweep.cells:
            runs.setdefault(cell.run, []).append(cell)
        waiting = []
        for name, cells in runs.items():
            run = Run(self.folder / name)
            try:
                run.resolve(cells[0].config)
            except RunMismatchError as error:
                mismatches.append(str(error))
                continue
            read_record(run.path)
            finished = run.is_finished
            counts["trained" if finished else "to continue" if run.config_file.exists() else "to train"] += 1
            lacking = [cell for cell in cells if not finished or not is_evaluated(cell, self.folder)]
            counts["to evaluate"] += len({cell.results for cell in lacking if cell.evaluate is not None})
            if lacking:
                waiting.append(cells)
        if mismatches:
            raise RunMismatchError("\n".join(mismatches))
        shown = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        _logger.info("%s: %d runs, %s.", self.sweep.title, len(runs), shown)
        return waiting

    def _advance(self, cells, processes, total):
        """Trains one run and evaluates it for every row that asks for it."""
        processes.check_signal()
        if self._succeeds(cells[0].run, self._train, cells[0], processes):
            tried = set()
            for cell in cells:  # rows that ask for the same evaluation have the first one's
                if cell.results not in tried and not is_evaluated(cell, self.folder):
                    tried.add(cell.results)
                    self._succeeds(cell.results, self._evaluate, cell, processes)
        with self._lock:
            self._finished += 1
            _logger.info("%d of %d runs are done.", self._finished, total)

    def _succeeds(self, name, step, cell, processes):
        """Whether a step of a run does what it should; if not, the failure is kept and told."""
        try:
            step(cell, processes)
        except (_RunError, OSError) as error:
            with self._lock:
                self.failures[name] = str(error)
            _logger.error("%s: %s", name, error)
            return False
        return True

    def _train(self, cell, processes):
        run = Run(self.folder / cell.run)
        if run.is_finished:
            return
        command = [*self.train, *train_arguments(cell, run.path)]
        record = read_record(run.path)
        done = record.get("training")
        if run.config_file.exists():
            # Of what was trained by hand, or by a sweep that was killed, nobody knows how long it took.
            known = done is not None and not done["running"]
            done = {**(done or _new_training(command, cell.seed)), "running": True}
            done["seconds"] = done["seconds"] if known else None
            self._write(run.path, {**record, "training": done})
        else:
            done = _new_training(command, cell.seed)
        _logger.info("%s: training", cell.run)
        try:
            ended = processes.run(command, self._log(cell.run))
        except BaseException:
            if record:
                self._write(run.path, record)  # nothing was running
            raise
        if run.config_file.exists():  # else the folder would be taken for something else than a new run
            peaks = [peak for peak in (done["peak_memory_bytes"], ended.peak_memory_bytes) if peak is not None]
            done["running"] = False
            done["seconds"] = None if done["seconds"] is None else done["seconds"] + ended.seconds
            done["peak_memory_bytes"] = None if done["seconds"] is None else max(peaks, default=None)
            done["processes"] += 1
            if self.machine not in done["machines"]:
                done["machines"] = [*done["machines"], self.machine]
            self._write(run.path, {**record, "training": done})
        self._check(ended, "training", cell.run, run.is_finished, processes)
        _logger.info("%s: trained, %.0f s", cell.run, ended.seconds)

    def _evaluate(self, cell, processes):
        results = self.folder / cell.results
        results.mkdir(exist_ok=True)
        command = [*self.evaluate, *evaluate_arguments(cell, self.folder)]
        model = _sha256(self.folder / cell.run / "best.keras")
        before = read_record(results).get("evaluation")
        if before is not None and before["model_sha256"] != model:
            seconds = 0.0  # nothing of another model is used again
        elif before is not None:
            seconds = before["seconds"]
        else:
            # Results that lie there already were not found in the time that is measured here.
            seconds = None if any((results / "evaluation").glob("*/*.npz")) else 0.0
        _logger.info("%s: evaluating", cell.results)
        ended = processes.run(command, self._log(cell.results))
        file = results / cell.results_file
        complete = ended.code == 0 and file.exists()
        done = {
            "command": command,
            "flags": _plain(cell.evaluate) if complete else None,
            "results_sha256": _sha256(file) if complete else None,
            "model_sha256": model,
            "seconds": None if seconds is None else seconds + ended.seconds,
            "machine": self.machine,
        }
        self._write(results, {**read_record(results), "evaluation": done})
        self._check(ended, "evaluation", cell.results, complete, processes)

    def _check(self, ended, what, name, complete, processes):
        """Raises where a process did not do what it was started for."""
        if ended.code == 0 and complete:
            return
        if processes.signal is not None:
            raise StoppedError(processes.signal)
        how = ended.how if ended.code else "ended well and left no results"
        raise _RunError(f"{what} {how}; all of its output is in {self._log(name)}\n{ended.last_lines}")

    def _log(self, name):
        return self.folder / f"{name}.log"

    def _write(self, folder, record):
        files.write_json(folder / RECORD, record)


def _new_training(command, seed):
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {
        "command": list(command),
        "seed": seed,
        "started": now,
        "seconds": 0.0,
        "peak_memory_bytes": None,
        "processes": 0,
        "running": False,
        "machines": [],
    }


def _plain(flags):
    """Flags as they come back from JSON."""
    return json.loads(json.dumps(flags))


def _sha256(file):
    try:
        with open(file, "rb") as content:
            found = hashlib.sha256()
            while chunk := content.read(2**20):
                found.update(chunk)
    except FileNotFoundError:
        return None
    return found.hexdigest()
