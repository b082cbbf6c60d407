"""Measures the latency of an exported `vgg_aib_qt` on a CPU, beside PyTorch.

    python benchmarks/serving.py --pytorch=PYTHON          # a Python that has PyTorch
    taskset -c 0,1 python benchmarks/serving.py --pytorch=PYTHON

`aib_tf.export.saved_model` writes the model, and a fresh process that knows nothing of aib_tf loads it with
`tf.saved_model.load` and calls `serving_default`: raw pixels in, logits, probabilities and class names out. The rival
is the network of `training_pytorch.py` with the same weights, in `torch.inference_mode`: eager, and compiled by
`torch.compile` for each batch size; normalised images in, logits out. All agree with `model.explain`, float32 to a
thousandth, or the program ends with an error before anything is timed.

Each runs in a process of its own and they take turns; p50 and p99 are over all calls of all turns. A missed goal is
only printed: by p50, in float32, 1.3 times as fast as PyTorch eager.

Run it on an idle machine: PyTorch's threads meet after every layer, and each waits until the last has had its turn.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from training import OURS, Worker, announce

# TensorFlow is imported in the workers alone.

HERE = Path(__file__).resolve().parent
BATCHES = (1, 8, 32)
GOAL = 1.3
EAGER, COMPILED = "PyTorch", "PyTorch, torch.compile"
# The difference that is allowed, relative to the largest logit.
TOLERANCES = {"float32": 1e-3, "bfloat16": 1e-1}
TURN = 0.5  # seconds of calls in a turn, and one call at least


class Sizes(NamedTuple):
    """How much is measured."""

    width: float = 1.0
    rounds: int = 15  # turns of each in a table


QUICK = Sizes(width=0.0625, rounds=1)


# ------------------------------------------------------------------------------------------------------ our processes


def export(folder: Path, width: float, dtypes: list[str]) -> None:
    """Makes the case: FOLDER/case.npz, and FOLDER/DTYPE/1 for each dtype."""
    sys.path.insert(0, str(HERE.parent))
    import aib_tf
    from aib_tf.convert import to_pytorch

    random = np.random.default_rng(0)
    model = aib_tf.models.build("vgg_aib_qt", (32, 32, 3), classes=10, width=width, seed=0)
    for variable in model.weights:  # as if trained
        name = variable.path.rpartition("/")[2]
        if name in ("moving_variance", "gamma"):
            variable.assign(random.uniform(0.8, 1.25, variable.shape))
        elif name in ("moving_mean", "beta", "bias"):
            variable.assign(random.normal(scale=0.1, size=variable.shape))
    pixels = random.integers(256, size=(max(BATCHES), 32, 32, 3)).astype(np.float32)
    state = {f"state/{name}": array for name, array in to_pytorch(model).items()}
    logits = np.asarray(model.explain(pixels / 255.0)["logits"])
    np.savez(folder / "case.npz", pixels=pixels, images=pixels / 255.0, logits=logits, **state)
    for dtype in dtypes:
        aib_tf.export.saved_model(model, folder / dtype, version=1, dtype=dtype)


def serve(folder: Path, dtype: str, name: str) -> None:
    """Loads FOLDER/DTYPE/1 and answers lines: "latency N" with the seconds of each call, "loading" with those of it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    begin = time.perf_counter()
    loaded = tf.saved_model.load(str(folder / dtype / "1"))
    infer = loaded.signatures["serving_default"]
    seconds = time.perf_counter() - begin
    with np.load(folder / "case.npz") as case:
        pixels = tf.constant(case["pixels"])
    begin = time.perf_counter()
    infer(pixels[:1])["logits"].numpy()
    first = time.perf_counter() - begin
    np.savez(folder / f"{name}.npz", logits=infer(pixels)["logits"].numpy())
    answer_latencies(lambda part: infer(part)["logits"].numpy(), pixels, f"{seconds} {first}")


def answer_latencies(infer, images, loading: str) -> None:
    """Answers the lines of stdin, for a function that returns when its result is there."""
    print("ready", flush=True)
    for line in sys.stdin:
        what, *count = line.split()
        print(loading if what == "loading" else " ".join(map(str, latencies(infer, images[: int(*count)]))), flush=True)


def latencies(infer, images) -> list[float]:
    """Seconds of each call in a turn; the first one wakes the threads and is left out."""
    infer(images)
    begin = now = time.perf_counter()
    result = []
    while not result or now - begin < TURN:
        before = now
        infer(images)
        now = time.perf_counter()
        result.append(now - before)
    return result


# ------------------------------------------------------------------------------------------------- what is measured


def check(name: str, logits: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Raises AssertionError unless both agree, with `python -O` too."""
    error = np.max(np.abs(logits - expected)) / np.max(np.abs(expected))
    if not error <= tolerance:
        raise AssertionError(f"{name}: logits are {logits} instead of {expected}, wrong by {error:.2g} of the largest")
    print(f"checked: {name}, logits as model.explain, but for {error:.1g} of the largest")


def table(title: str, samples: dict[str, list[float]]) -> bool | None:
    """Prints p50 and p99 of each, and how many times as long as ours it takes; returns whether the goal is reached."""
    print(f"\n{title:32}{'p50 ms':>10}{'p99 ms':>10}{'calls':>8}{'/ ours':>9}{'goal':>9}")
    reached = None
    ours = np.percentile(samples[OURS], 50)
    for name, seconds in samples.items():
        p50, p99 = np.percentile(seconds, [50, 99])
        verdict = ""
        if name == EAGER:
            reached = bool(p50 / ours >= GOAL)
            verdict = f"{f'>= {GOAL}':>9}  {'reached' if reached else 'MISSED'}"
        print(f"  {name:30}{1e3 * p50:10.1f}{1e3 * p99:10.1f}{len(seconds):8}{p50 / ours:9.2f}{verdict}")
    return reached


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(sizes: Sizes, dtypes: list[str], pytorch: str | None) -> None:
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        command = [sys.executable, __file__, "--worker", "export", folder, str(sizes.width), *dtypes]
        exported = subprocess.run([str(each) for each in command], capture_output=True, text=True)
        if exported.returncode:
            raise RuntimeError(f"The export failed:\n{exported.stderr}")
        tolerances = {OURS if dtype == "float32" else f"{OURS}, {dtype}": TOLERANCES[dtype] for dtype in dtypes}
        commands = {
            name: [sys.executable, __file__, "--worker", "serve", folder, dtype, name]
            for name, dtype in zip(tolerances, dtypes, strict=True)
        }
        for name, mode in ((EAGER, "eager"), (COMPILED, "compile")) if pytorch else ():
            commands[name] = [pytorch, HERE / "serving_pytorch.py", folder, mode, name]
        workers = [stack.enter_context(Worker(command, folder, name)) for name, command in commands.items()]
        with np.load(folder / "case.npz") as case:
            expected = case["logits"]
        for worker in workers:
            check(worker.name, worker.results["logits"], expected, tolerances.get(worker.name, TOLERANCES["float32"]))
        verdicts = []
        for batch in BATCHES:
            samples = {worker.name: [] for worker in workers}
            for _ in range(sizes.rounds):
                for worker in workers:
                    samples[worker.name] += worker.ask(f"latency {batch}")
            verdicts.append(table(f"latency, batch {batch}", samples))
        print(f"\n{'loading':32}{'MB':>10}{'load s':>10}{'first answer s':>17}")
        for worker, dtype in zip(workers, dtypes, strict=False):
            seconds, first = worker.ask("loading")
            print(f"  {worker.name:30}{size_of(folder / dtype) / 1e6:10.1f}{seconds:10.2f}{first:17.2f}")
        judged = [verdict for verdict in verdicts if verdict is not None]
        print(f"\n{sum(judged)} of {len(judged)} goals reached")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small: shows that it runs, measures nothing")
    parser.add_argument("--pytorch", metavar="PYTHON", help="a Python with PyTorch; this one, unless it has none")
    parser.add_argument("--width", type=float, help="factor for all numbers of channels")
    parser.add_argument("--rounds", type=int, help="turns of each in a table")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        task, folder, *rest = arguments.worker
        if task == "export":
            export(Path(folder), float(rest[0]), rest[1:])
        else:
            serve(Path(folder), *rest)
        return

    sizes = QUICK if arguments.quick else Sizes()
    sizes = sizes._replace(**{name: getattr(arguments, name) for name in sizes._fields if getattr(arguments, name)})
    sys.stdout.reconfigure(line_buffering=True)
    pytorch = announce(sizes.width, arguments.quick, arguments.pytorch)
    measure(sizes, list(TOLERANCES), pytorch)


if __name__ == "__main__":
    main()
