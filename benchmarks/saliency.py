"""Measures the saliency metrics on batches, beside pysaliency, which scores one image at a time.

    python benchmarks/saliency.py --pysaliency=PYTHON      # a Python that has pysaliency 0.2.22
    python benchmarks/saliency.py --pysaliency=PYTHON --threads=2

Both get the same float32 maps and reference maps and the same fixations as points, and both return a number an image
for each metric: CC, SIM and KL by `pysaliency.metrics`, in a loop; NSS as well; both AUC by `AUC_per_image` of a
`SaliencyMapModel` that looks the map up. Ours is `aib_tf.evaluation.saliency_metrics.measure`, for one metric and for
all six, from NumPy to NumPy and with the points made into `Fixations` each time; with one thread, as pysaliency has,
unless `--threads` says otherwise. All values agree to 1e-5, or the
program ends with an error before anything is timed. Compiling is not timed, and printed.

Each runs in a process of its own and they take turns; times are medians over all turns. Beside the ratio of times
stands that of CPU seconds, which a busy machine changes less. A missed goal is only printed: all six metrics at once,
20 times as fast as one after the other by pysaliency.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from training import OURS, Worker

# TensorFlow and pysaliency are imported in the workers alone.

HERE = Path(__file__).resolve().parent
RIVAL = "pysaliency"
GOAL = 20.0
TOLERANCE = 1e-5
METRICS = ("cc", "sim", "kl_nats", "nss", "auc_judd", "shuffled_auc")
ALL = "all six"
TURN = 0.3  # seconds of calls in a turn, and one call at least


class Sizes(NamedTuple):
    """How much is measured."""

    images: int = 256
    shapes: tuple = ((96, 128), (32, 32))
    fixations: int = 40  # an image, on average
    rounds: int = 5  # turns of each
    threads: int = 1  # of ours


QUICK = Sizes(images=6, shapes=((8, 8),), fixations=4, rounds=1)


def draw(sizes: Sizes, height: int, width: int) -> dict[str, np.ndarray]:
    """A case: maps and references (images, height, width), and points (images, most, 2), -1 where there is none."""
    random = np.random.default_rng(0)
    shape = (sizes.images, height, width)
    least, most = sizes.fixations // 2, sizes.fixations * 3 // 2
    points = np.stack([random.integers(0, side, (sizes.images, most)) for side in (height, width)], axis=-1)
    points[np.arange(most) >= random.integers(least, most + 1, (sizes.images, 1))] = -1
    maps, references = random.random(shape, np.float32), random.random(shape, np.float32) ** 3
    return {"maps": maps, "references": references, "points": points}


# ------------------------------------------------------------------------------------------------------ the processes


def ours(maps, references, points, threads):
    """Metric to a function without arguments that returns (images,)."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.path.insert(0, str(HERE.parent))
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    from aib_tf.evaluation.saliency_metrics import REFERENCE_METRICS, Fixations, measure

    def scores(names):
        densities = references if set(names) & set(REFERENCE_METRICS) else None
        fixations = Fixations.from_points(points, *maps.shape[1:]) if set(names) - set(REFERENCE_METRICS) else None
        return {name: values.numpy() for name, values in measure(maps, densities, fixations, names=names).items()}

    return {name: lambda name=name: scores((name,))[name] for name in METRICS} | {ALL: lambda: scores(METRICS)}


def theirs(maps, references, points, threads):
    """The same by pysaliency."""
    import pysaliency
    from pysaliency import metrics

    class Maps(pysaliency.SaliencyMapModel):
        def _saliency_map(self, stimulus):
            return maps[int(stimulus[0, 0]) + 256 * int(stimulus[0, 1])]

    model = Maps(caching=False)
    images = [np.zeros(maps.shape[1:], np.uint8) for _ in maps]
    for number, image in enumerate(images):
        image[0, 0], image[0, 1] = number % 256, number // 256
    stimuli = pysaliency.Stimuli(images)
    there = points[..., 0] >= 0
    number = np.nonzero(there)[0]
    fixations = pysaliency.Fixations.create_without_history(points[there][:, 1], points[there][:, 0], number)
    own = [each[each[:, 0] >= 0].T for each in points]
    pairs = list(zip(maps, references, strict=True))

    def auc(**arguments):
        return np.array(model.AUC_per_image(stimuli, fixations, **arguments))

    return {
        "cc": lambda: np.array([metrics.CC(a, b) for a, b in pairs]),
        "sim": lambda: np.array([metrics.SIM(a, b) for a, b in pairs]),
        "kl_nats": lambda: np.array([metrics.MIT_KLDiv(a, b) for a, b in pairs]),
        "nss": lambda: np.array([metrics.NSS(a, x, y).mean() for a, (y, x) in zip(maps, own, strict=True)]),
        "auc_judd": lambda: auc(nonfixations="unfixated", thresholds="fixations"),
        "shuffled_auc": lambda: auc(nonfixations="shuffled"),
    }


def work(side: str, folder: Path, name: str, threads: int) -> None:
    """Writes the values, and answers lines, each the name of a metric: seconds and CPU seconds a call, in turns."""
    with np.load(folder / "case.npz") as case:
        functions = {"ours": ours, "theirs": theirs}[side](**case, threads=threads)
    begin = time.perf_counter()
    values = {metric: functions[metric]() for metric in METRICS}
    if ALL in functions:
        functions[ALL]()
    seconds = time.perf_counter() - begin
    np.savez(folder / f"{name}.npz", **values)
    print("ready", flush=True)
    for line in sys.stdin:
        answer = [seconds] if line.strip() == "first" else turn(functions[line.strip()])
        print(*answer, flush=True)


def turn(function) -> tuple[float, float]:
    """Seconds and CPU seconds of a call, the mean over a turn."""
    begin, cpu, calls = time.perf_counter(), time.process_time(), 0
    while not calls or time.perf_counter() - begin < TURN:
        function()
        calls += 1
    return (time.perf_counter() - begin) / calls, (time.process_time() - cpu) / calls


# --------------------------------------------------------------------------------------------------- what is measured


def check(metric: str, values: np.ndarray, expected: np.ndarray) -> None:
    """Raises AssertionError unless both agree, with `python -O` too."""
    error = np.max(np.abs(values - expected)) if values.shape == expected.shape else np.inf
    if not error <= TOLERANCE:
        raise AssertionError(f"{metric}: {values} instead of {expected}, wrong by {error:.2g}")
    print(f"checked: {metric} of {len(values)} images as {RIVAL}, but for {error:.1g}")


def table(title: str, samples: dict[str, dict[str, tuple[float, float]]], images: int) -> bool | None:
    """Prints microseconds an image and ratios for each metric; returns whether the goal is reached.

    `samples`: worker to metric to seconds and CPU seconds of a call.
    """
    print(f"\n{title:32}{OURS + ' us':>12}{RIVAL + ' us':>16}{'ratio':>8}{'CPU ratio':>11}{'goal':>9}")
    theirs = dict(samples.get(RIVAL, {}))
    if theirs:
        theirs[ALL] = tuple(sum(column) for column in zip(*theirs.values(), strict=True))
    reached = None
    for metric, (seconds, cpu) in samples[OURS].items():
        line = f"  {metric:30}{1e6 * seconds / images:12.1f}"
        if theirs:
            other, other_cpu = theirs[metric]
            line += f"{1e6 * other / images:16.1f}{other / seconds:8.1f}{other_cpu / cpu:11.1f}"
            if metric == ALL:
                reached = bool(other / seconds >= GOAL)
                line += f"{f'>= {GOAL:g}':>9}  {'reached' if reached else 'MISSED'}"
        print(line)
    return reached


def measure(sizes: Sizes, height: int, width: int, pysaliency: str | None) -> bool | None:
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        np.savez(folder / "case.npz", **draw(sizes, height, width))
        commands = {OURS: (sys.executable, "ours")}
        if pysaliency:
            commands[RIVAL] = (pysaliency, "theirs")
        workers = [
            stack.enter_context(Worker([python, __file__, "--worker", side, folder, name, sizes.threads], folder, name))
            for name, (python, side) in commands.items()
        ]
        for metric in METRICS if pysaliency else ():
            check(metric, workers[0].results[metric], workers[1].results[metric])
        found = {worker.name: {} for worker in workers}
        for metric in (*METRICS, ALL):
            asked = workers if metric != ALL else workers[:1]
            answers = {worker.name: [] for worker in asked}
            for _ in range(sizes.rounds):
                for worker in asked:
                    answers[worker.name].append(worker.ask(metric))
            for name, turns in answers.items():
                found[name][metric] = tuple(statistics.median(column) for column in zip(*turns, strict=True))
        reached = table(f"{sizes.images} maps of {height}x{width}", found, sizes.images)
        print(f"  the first call of each, compiled: {workers[0].ask('first')[0]:.1f} s")
        return reached


def version_of_pysaliency(python: str) -> str | None:
    """The version that a Python has, or None."""
    command = [python, "-c", "import importlib.metadata as m; print(m.version('pysaliency'))"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small: shows that it runs, measures nothing")
    parser.add_argument("--pysaliency", metavar="PYTHON", help="a Python with pysaliency; this one, unless it has none")
    parser.add_argument("--images", type=int, help="images in a batch")
    parser.add_argument("--fixations", type=int, help="fixations an image")
    parser.add_argument("--rounds", type=int, help="turns of each")
    parser.add_argument("--threads", type=int, help="threads of ours; pysaliency has one")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        side, folder, name, threads = arguments.worker
        work(side, Path(folder), name, int(threads))
        return

    sizes = QUICK if arguments.quick else Sizes()
    chosen = {name: getattr(arguments, name) for name in sizes._fields if getattr(arguments, name, None)}
    sizes = sizes._replace(**chosen)
    sys.stdout.reconfigure(line_buffering=True)
    rival = arguments.pysaliency or sys.executable
    version = version_of_pysaliency(rival)
    if version is None and arguments.pysaliency:
        raise SystemExit(f"{rival} has no pysaliency")
    said = "not measured, it is not installed here; --pysaliency names a Python that has it"
    print(f"{RIVAL}: {version or said}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
    verdicts = [measure(sizes, *shape, rival if version else None) for shape in sizes.shapes]
    judged = [verdict for verdict in verdicts if verdict is not None]
    print(f"\n{sum(judged)} of {len(judged)} goals reached")


if __name__ == "__main__":
    main()
