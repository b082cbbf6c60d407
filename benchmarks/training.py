"""Measures a training step and inference of `vgg_aib_qt` on a CPU, beside PyTorch.

    python benchmarks/training.py --pytorch=PYTHON          # a Python that has PyTorch
    taskset -c 0,1 python benchmarks/training.py --pytorch=PYTHON

The rival is a plain rewrite of the network in PyTorch, `training_pytorch.py`, as the released code computes it and with
`channels_last` memory. All have the same weights, images, labels and, for the check, the same noise: their logits and
the loss agree to a thousandth, and what the first training steps take off the loss to a twentieth, or the program ends
with an error before anything is timed.

Ours trains by the function that `model.fit` calls for each batch, without metrics of the accuracy, and classifies by
`tf.function` of the model. Both train by SGD with momentum 0.9, in float32. Each runs in a process of its own, they
take turns, and a time is the median. A missed goal is only printed: 1.15 times as fast as PyTorch, in training and in
inference.

Run it on an idle machine: PyTorch's threads meet after every layer, and each waits until the last has had its turn.
"""

import argparse
import contextlib
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

# TensorFlow is imported in the worker alone: a process begins with the peak of memory of the one that started it.

HERE = Path(__file__).resolve().parent
OURS = "aib_tf"
LAYOUTS = {"PyTorch": "contiguous", "PyTorch, channels_last": "channels_last"}
GOAL = 1.15
# Of what must agree, relative to the largest. Where rounding decides on which side of 0 a ReLU is, a gradient changes.
TOLERANCES = {"logits": 1e-3, "loss": 1e-3, "progress": 5e-2}
STEPS = 3  # of training whose losses are compared


class Sizes(NamedTuple):
    """How much is measured."""

    width: float = 1.0
    batch: int = 32
    rounds: int = 11  # turns of each in a table


QUICK = Sizes(width=0.0625, batch=4, rounds=2)


# ---------------------------------------------------------------------------------------------------- our own process


def work(folder: Path, task: str, width: float, batch: int, jit_compile: str) -> None:
    """Makes the case, writes FOLDER/case.npz and FOLDER/aib_tf.npz, and answers lines as training_pytorch.py does."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.path.insert(0, str(HERE.parent))
    import keras
    import tensorflow as tf

    import aib_tf
    from aib_tf.convert import to_pytorch
    from aib_tf.training import SGD

    before = peak_memory()
    random = np.random.default_rng(0)
    model = aib_tf.models.build("vgg_aib_qt", (32, 32, 3), classes=10, width=width, seed=0)
    case = {
        "images": random.normal(size=(batch, 32, 32, 3)).astype(np.float32),
        "labels": random.integers(10, size=batch),
        "attention_noise": random.normal(size=(batch, 16, 16, 1)).astype(np.float32),
        "latent_noise": random.normal(size=(batch, 256)).astype(np.float32),
        "learning_rate": np.float32(5e-5),
    }
    np.savez(folder / "case.npz", **case, **{f"state/{name}": array for name, array in to_pytorch(model).items()})

    images = tf.constant(case["images"])
    compiled = {"auto": "auto", "true": True, "false": False}[jit_compile]
    if task == "training":
        batches = tf.data.Dataset.from_tensors((images, tf.constant(case["labels"]))).repeat()
        iterator = iter(batches)
        model.compile(
            SGD(float(case["learning_rate"]), momentum=0.9),
            loss=aib_tf.losses.CrossEntropyBits(),
            jit_compile=compiled,
        )
        noise = {
            model.attention.seed_generator: case["attention_noise"],
            model.bottleneck.seed_generator: case["latent_noise"],
        }
        random_normal = keras.random.normal
        keras.random.normal = lambda shape, dtype, seed: tf.constant(noise[seed], dtype)
        losses = []
        for _ in range(STEPS):
            losses.append(float(model.train_on_batch(case["images"], case["labels"], return_dict=True)["loss"]))
            model.reset_metrics()
        keras.random.normal = random_normal
        results = {"loss": losses[0], "progress": np.diff(losses)}
        model.optimizer.learning_rate = 1e-6  # as much work, and the weights stay where they are
        model.make_train_function(force=True)
        answers = {"training": lambda: seconds_of(lambda: model.train_function(iterator))}
    else:
        infer = tf.function(lambda images: model(images, training=False), jit_compile=compiled is True)
        results = {"logits": infer(images).numpy()}
        answers = {
            f"inference {len(part)}": lambda part=part: seconds_of(lambda: infer(part)) for part in (images[:1], images)
        }
        for answer in answers.values():
            answer()  # traces
    answers["memory"] = lambda: f"{peak_memory()} {before}"
    np.savez(folder / f"{OURS}.npz", **results)
    print("ready", flush=True)
    for line in sys.stdin:
        print(answers[line.strip()](), flush=True)


# ------------------------------------------------------------------------------------------------ what a process does


def peak_memory() -> int:
    """Bytes of memory that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seconds_of(function: Callable) -> float:
    """The mean of as many calls as take 0.2 s. The first one wakes the threads, and counts if it is long by itself."""
    begin = time.perf_counter()
    function()
    once = time.perf_counter() - begin
    if once > 0.2:
        return once
    calls = math.ceil(0.2 / once)
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


class Worker:
    """A process that writes FOLDER/NAME.npz, and then waits for lines to answer."""

    def __init__(self, command: list, folder: Path, name: str):
        self.name = name
        self._messages = folder / f"{name}.txt"
        self._results = folder / f"{name}.npz"
        with open(self._messages, "w") as messages:
            self._process = subprocess.Popen(
                [str(each) for each in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
            )

    def __enter__(self):
        if self._process.stdout.readline() != "ready\n":
            raise self._failed()
        with np.load(self._results) as results:
            self.results = dict(results)
        return self

    def __exit__(self, *_):
        self._process.communicate()  # the end of its input ends it

    def ask(self, what: str) -> list[float]:
        """Returns the numbers of its answer."""
        print(what, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise self._failed()
        return [float(number) for number in answer.split()]

    def _failed(self):
        self._process.communicate()
        return RuntimeError(f"{' '.join(self._process.args)} failed:\n{self._messages.read_text()}")


# ------------------------------------------------------------------------------------------------- what is measured


def require_close(name: str, what: str, result: np.ndarray, expected: np.ndarray) -> None:
    """Raises AssertionError unless both agree, with `python -O` too."""
    # Where nothing is expected to change, this is NaN or infinite, and no result is accepted.
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.max(np.abs(result - expected)) / np.max(np.abs(expected))
    if not error <= TOLERANCES[what]:
        raise AssertionError(f"{name}: {what} is {result} instead of {expected}, wrong by {error:.2g} of the largest")
    print(f"checked: {name}, {what} as {OURS}, but for {error:.1g} of the largest")


def check(workers: list[Worker]) -> None:
    """Raises AssertionError unless all compute the same."""
    ours, *others = workers
    for other in others:
        for what, expected in ours.results.items():
            require_close(other.name, what, other.results[what], expected)


class Report:
    """Prints tables, and remembers the goals."""

    def __init__(self):
        self._goals = 0
        self._missed = []

    def table(self, title: str, samples: dict[str, list[float]]) -> None:
        """Prints medians, the fastest and the slowest of each, and how many times as long as ours a rival takes."""
        print(f"\n{title:32}{'ms':>10}{'fastest':>10}{'slowest':>10}{'/ ours':>9}{'goal':>9}")
        ours = statistics.median(samples[OURS])
        for name, seconds in samples.items():
            ratio = statistics.median(seconds) / ours
            verdict = self._verdict(title, ratio) if name == "PyTorch" else ""
            columns = "".join(f"{1e3 * f(seconds):10.1f}" for f in (statistics.median, min, max))
            print(f"  {name:30}{columns}{ratio:9.2f}{verdict}")

    def memory(self, task: str, peaks: dict[str, list[float]]) -> None:
        """Prints the memory at the peak of each process."""
        print(f"\n{f'memory of {task}':32}{'MB':>10}{'imports':>10}{'':10}{'/ ours':>9}")
        for name, (peak, before) in peaks.items():
            print(f"  {name:30}{peak / 1e6:10,.0f}{before / 1e6:10,.0f}{'':10}{peak / peaks[OURS][0]:9.2f}")

    def summary(self) -> None:
        print(f"\n{self._goals - len(self._missed)} of {self._goals} goals reached")
        for what in self._missed:
            print(f"  missed: {what}")

    def _verdict(self, what: str, ratio: float) -> str:
        self._goals += 1
        if ratio < GOAL:
            self._missed.append(f"{what}: {ratio:.2f} times as fast as PyTorch, goal >= {GOAL}")
        return f"{f'>= {GOAL}':>9}  {'reached' if ratio >= GOAL else 'MISSED'}"


def measure(report: Report, task: str, sizes: Sizes, pytorch: str | None, jit_compile: str) -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        ours = [sys.executable, __file__, "--worker", folder, task, sizes.width, sizes.batch, jit_compile]
        workers = [stack.enter_context(Worker(ours, folder, OURS))]
        for name, layout in LAYOUTS.items() if pytorch else ():
            command = [pytorch, HERE / "training_pytorch.py", folder, task, layout, name]
            workers.append(stack.enter_context(Worker(command, folder, name)))
        check(workers)
        titles = {"training": f"training step, batch {sizes.batch}"}
        if task == "inference":
            titles = {f"inference {count}": f"inference, batch {count}" for count in (sizes.batch, 1)}
        for what, title in titles.items():
            samples = {worker.name: [] for worker in workers}
            for turn in range(sizes.rounds + 1):
                for worker in workers:
                    seconds = worker.ask(what)
                    if turn:  # the first one of each sets up its memory
                        samples[worker.name] += seconds
            report.table(title, samples)
        report.memory(task, {worker.name: worker.ask("memory") for worker in workers})


def processor() -> str:
    """Returns what this runs on."""
    if not sys.platform.startswith("linux"):
        return f"{os.cpu_count()} cores, {platform.processor()}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{len(os.sched_getaffinity(0))} cores, {model}"


def version_of(module: str, python: str) -> str | None:
    """Returns the version of a module that an interpreter has, or None."""
    command = [python, "-c", f"import importlib.metadata as m; print(m.version({module!r}))"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


def announce(width, quick, pytorch):
    """Prints what is about to be measured where; returns the Python of the rival, or None where there is none."""
    print(f"TensorFlow {version_of('tensorflow', sys.executable)}, {processor()}, width {width:g}")
    if os.getloadavg()[0] > 0.5:
        print(
            f"This machine is busy: load {os.getloadavg()[0]:.1f}. PyTorch's threads then wait for one another, up to "
            "100 times as long as they compute, and no ratio says anything."
        )
    if quick:
        print("quick: so small that no goal can be judged")
    rival = pytorch or sys.executable
    version = version_of("torch", rival)
    if version is None and pytorch:
        raise SystemExit(f"{pytorch} has no PyTorch")
    if version is None:
        print("PyTorch: not measured, it is not installed here; --pytorch names a Python that has it")
    else:
        print(f"PyTorch {version}")
    return rival if version else None


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="+", choices=("training", "inference"), default=("training", "inference"))
    parser.add_argument("--quick", action="store_true", help="small: shows that it runs, measures nothing")
    parser.add_argument("--pytorch", metavar="PYTHON", help="a Python with PyTorch; this one, unless it has none")
    parser.add_argument("--jit_compile", choices=("auto", "true", "false"), default="auto", help="XLA, for ours")
    parser.add_argument("--width", type=float, help="factor for all numbers of channels")
    parser.add_argument("--batch", type=int, help="images in a training step, and in the larger batch of inference")
    parser.add_argument("--rounds", type=int, help="turns of each in a table")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        folder, task, width, batch, jit_compile = arguments.worker
        work(Path(folder), task, float(width), int(batch), jit_compile)
        return

    sizes = QUICK if arguments.quick else Sizes()
    chosen = {name: getattr(arguments, name) for name in ("width", "batch", "rounds") if getattr(arguments, name)}
    sizes, report = sizes._replace(**chosen), Report()
    sys.stdout.reconfigure(line_buffering=True)
    pytorch = announce(sizes.width, arguments.quick, arguments.pytorch)
    for task in arguments.task:
        measure(report, task, sizes, pytorch, arguments.jit_compile)
    report.summary()


if __name__ == "__main__":
    main()
