"""Measures how fast `nearest_anchor` is beside other ways to write it, and how much memory each needs.

    python benchmarks/nearest_anchor.py
    python benchmarks/nearest_anchor.py --pytorch=PYTHON    # an interpreter that has PyTorch, for one rival more
    taskset -c 0,1 python benchmarks/nearest_anchor.py      # on two of many cores

First a check of the compiled op against NumPy, then tables. No rival is timed before its results are found to be those
of the op. Within a table all take turns, so that whatever else the machine does hits all alike, and each time is a
median. A wrong result ends the program with an error; a missed goal is only printed.

The goals, on 2 cores, for float32 and 8 to 1,024 anchors:

- forward, 3.2 million elements: 10 times as fast as searchsorted on midpoints, 20 times as fast as an argmin over a
  table of distances, 3 times as fast as the best that XLA makes of such formulas; at most 4 times what it takes to
  write two such outputs and do nothing else; no number of anchors takes twice as long as another;
- backward: 10 times as fast as TensorFlow's own gradient of gather and losses; at most 4 times what it takes to read
  three such arrays and write one;
- 32,768 elements, a training batch: 3 times as fast as the argmin;
- no memory beside inputs and outputs that grows with the number of elements;
- on a GPU, 100 million elements, float32 and bfloat16: 80% of the bandwidth of a copy.

It takes some minutes, and 8 GB of memory, most of it for the tables of the rivals.
"""

import argparse
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tensorflow as tf

from aib_tf.ops import custom_op, implementation, nearest_anchor, pure

PARTS = ("forward", "backward", "batch", "memory", "variants", "gpu")
LARGEST_TABLE = 4_000_000_000  # bytes; a larger table of distances is made in slices


class Sizes(NamedTuple):
    """How much is measured."""

    elements: int = 3_200_000
    batch: int = 32_768
    anchors: tuple[int, ...] = (8, 20, 50, 256, 1024)
    most_anchors: int = 65_536
    gpu: int = 100_000_000
    rounds: int = 25  # turns of each in a table
    seconds: float = 3.0  # a slow rival that has had three turns gets no more after these


QUICK = Sizes(elements=20_000, batch=2_048, anchors=(20,), most_anchors=1_024, gpu=20_000, rounds=3, seconds=0.1)


# ------------------------------------------------------------------------------------------------ what is computed


class Case(NamedTuple):
    """The inputs of forward and backward, as arrays or tensors."""

    x: Any
    anchors: Any
    d_quantized: Any
    d_codebook: Any
    d_commitment: Any


def make_case(elements: int, count: int) -> Case:
    """Draws attention scores, most of them between the outer anchors, and unevenly spaced anchors, ascending."""
    random = np.random.default_rng(0)
    return Case(
        random.normal(0.5, 0.3, elements).astype(np.float32),
        np.sort(random.random(count, dtype=np.float32)),
        random.normal(size=elements).astype(np.float32),
        # The usual weights, times the number of elements so that the commitment loss shows beside d_quantized.
        np.float32(0.4 * elements),
        np.float32(0.1 * elements),
    )


def as_tensors(case: Case, dtype=tf.float32) -> Case:
    """Returns the case for `x` of another type."""
    wide = tf.float64 if dtype == tf.float64 else tf.float32
    types = Case(x=dtype, anchors=wide, d_quantized=dtype, d_codebook=wide, d_commitment=wide)
    return Case(*(tf.cast(tf.constant(each), to) for each, to in zip(case, types, strict=True)))


def op_gradient(x, anchors, index, d_quantized, d_codebook, d_commitment):
    """The op's backward part by itself, which is an op too."""
    # TensorFlow puts the Python functions of all ops of a library into one module.
    module = sys.modules[custom_op.library().nearest_anchor.__module__]
    return tuple(
        module.aib_tf_nearest_anchor_grad(
            x=x,
            anchors=anchors,
            index=index,
            d_quantized=d_quantized,
            d_codebook_loss=d_codebook,
            d_commitment_loss=d_commitment,
        )
    )


def midpoints(anchors):
    return (anchors[1:] + anchors[:-1]) / 2


def searchsorted_index(x, anchors):
    return tf.searchsorted(midpoints(anchors), x)


def counting_index(x, anchors):
    return tf.reduce_sum(tf.cast(x[:, tf.newaxis] > midpoints(anchors), tf.int32), axis=-1)


def argmin_index(x, anchors):
    return tf.argmin(tf.abs(x[:, tf.newaxis] - anchors), axis=-1, output_type=tf.int32)


def argmin_index_in_slices(x, anchors):
    """The same with a table that fits, which the slices use one after the other."""
    slices = 1
    while 4 * x.shape[0] * anchors.shape[0] > slices * LARGEST_TABLE:
        slices *= 2
    if slices == 1:
        return argmin_index(x, anchors)
    parts = tf.reshape(x, (slices, -1))
    index = tf.map_fn(lambda part: argmin_index(part, anchors), parts, tf.int32, parallel_iterations=1)
    return tf.reshape(index, (-1,))


def straight_through(x, anchors, index):
    """The quantizer as one writes it in TensorFlow, once the index is known."""
    nearest = tf.gather(anchors, index)
    codebook_loss = tf.reduce_mean(tf.square(tf.stop_gradient(x) - nearest))
    commitment_loss = tf.reduce_mean(tf.square(x - tf.stop_gradient(nearest)))
    return x + tf.stop_gradient(nearest - x), codebook_loss, commitment_loss


def forward_by(index_of: Callable, **options) -> Callable:
    """Returns what computes quantized and index, and not the losses, which the op computes too."""

    @tf.function(**options)
    def forward(x, anchors):
        index = index_of(x, anchors)
        return tf.gather(anchors, index), index

    return forward


def training_with(quantize: Callable, **options) -> Callable:
    """Returns what computes quantized, index, the losses, d_x and d_anchors."""

    @tf.function(**options)
    def training(x, anchors, *upstream):
        with tf.GradientTape() as tape:
            tape.watch([x, anchors])
            quantized, index, *losses = quantize(x, anchors)
        d_x, d_anchors = tape.gradient([quantized, *losses], [x, anchors], upstream)
        return quantized, index, *losses, d_x, tf.convert_to_tensor(d_anchors)

    return training


def training_by(index_of: Callable, **options) -> Callable:
    """Returns the same for a quantizer in TensorFlow."""

    def quantize(x, anchors):
        index = index_of(x, anchors)
        quantized, *losses = straight_through(x, anchors, index)
        return quantized, index, *losses

    return training_with(quantize, **options)


def tensorflow_gradient(x, anchors, index, *upstream):
    """TensorFlow's own gradient. Of the forward part it computes what the gradient needs: the differences."""
    return kept_gradient(x, anchors, index, *upstream)()


def kept_gradient(x, anchors, index, *upstream) -> Callable:
    """Returns TensorFlow's own gradient without any forward part, whose results a tape has kept."""
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x, anchors])
        outputs = straight_through(x, anchors, index)

    def gradient():
        d_x, d_anchors = tape.gradient(outputs, [x, anchors], upstream)
        return d_x, tf.convert_to_tensor(d_anchors)

    return gradient


@tf.function
def write_two(x):
    return x + 1, x + 2


@tf.function
def write_outputs(x, *_):
    """Makes what is as large as the outputs of forward and backward."""
    return x + 1, tf.cast(x, tf.int32), x + 2


@tf.function
def read_three(x, y, z):
    return tf.add_n([x, y, z])


# ---------------------------------------------------------------------------------------------- what has to be right

OF_THE_OP = 1e-6  # the rounding of a sum for each anchor, beside the sum of absolute values
OF_FLOAT32 = 1e-3  # the same when one number after the other is added in float32


def require(condition, message: str) -> None:
    """Raises AssertionError, with `python -O` too."""
    if not condition:
        raise AssertionError(message)


def as_array(tensor) -> np.ndarray:
    """Returns an array that NumPy can compute with: 16-bit numbers as float32."""
    array = np.asarray(tensor)
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def require_equal(name: str, result, expected) -> None:
    """Index and quantized are those expected, to the last bit."""
    require(np.array_equal(result[1], expected[1]), f"{name}: index is wrong")
    same = np.array_equal(as_array(result[0]), as_array(expected[0]), equal_nan=True)
    require(same, f"{name}: quantized is wrong")


def require_as_near(name: str, case: Case, result, expected) -> None:
    """Quantized is the anchor of `index`, and that one is as near as the expected one, but for rounding."""
    x, anchors, index = case.x.numpy().astype(np.float64), case.anchors.numpy(), np.asarray(result[1])
    rounding = 4 * np.finfo(np.float32).eps * np.max(np.abs(x))
    error = np.max(np.abs(as_array(result[0]) - anchors[index]))
    require(error <= rounding, f"{name}: quantized is wrong by up to {error:g}")
    excess = np.max(np.abs(x - anchors[index]) - np.abs(x - anchors[np.asarray(expected[1])]))
    require(excess <= rounding, f"{name}: an anchor is {excess:g} farther than the nearest")


def require_gradients(name: str, case: Case, index, result, of_sums: float) -> None:
    """d_x and d_anchors are what NumPy computes in float64, but for rounding."""
    x, anchors, d_quantized, d_codebook, d_commitment = (as_array(each).astype(np.float64) for each in case)
    index, dtype = np.asarray(index), tf.as_dtype(result[0].dtype)
    difference = x - anchors[index]
    d_x = d_quantized + d_commitment * 2 / x.size * difference
    error = np.nanmax(np.abs(as_array(result[0]) - d_x) / np.maximum(1, np.abs(d_x)))
    rounding = {tf.float16: 2e-3, tf.bfloat16: 2e-2}.get(dtype, 2e-6)
    require(np.array_equal(np.isnan(as_array(result[0])), np.isnan(d_x)), f"{name}: d_x is NaN at other places")
    require(error <= rounding, f"{name}: d_x is wrong by up to {error:g}")

    factor = d_codebook * 2 / x.size
    d_anchors = factor * np.bincount(index, -difference, minlength=anchors.size)
    size = factor * np.nanmax(np.bincount(index, np.abs(difference), minlength=anchors.size))
    close = np.allclose(result[1], d_anchors, rtol=0, atol=of_sums * size, equal_nan=True)
    error = np.nanmax(np.abs(np.asarray(result[1]) - d_anchors)) / size
    require(close, f"{name}: d_anchors is wrong, by up to {error:g} of the sums' size")


def check() -> None:
    """Raises AssertionError unless the op agrees with NumPy, also on ties, duplicates, far, infinite and NaN x."""
    random = np.random.default_rng(1)
    anchors = random.permutation(np.concatenate([random.random(40), np.linspace(0, 1, 17), np.linspace(0, 1, 17)]))
    middle = np.float32(midpoints(np.sort(anchors)))
    edges = [anchors, middle, np.nextafter(middle, np.float32(-9)), np.nextafter(middle, np.float32(9))]
    ordinary = np.concatenate([random.normal(0.5, 0.5, 20_000), *edges, [-0.0, 1e-40]])
    special = np.concatenate([ordinary, [3e4, -3e4, np.inf, -np.inf, np.nan]])
    checked = 0
    for dtype in (tf.float16, tf.bfloat16, tf.float32, tf.float64):
        for x in (ordinary, special):
            name = f"nearest_anchor, {dtype.name}"
            case = as_tensors(Case(x, anchors, random.normal(size=x.size), 0.4 * x.size, 0.1 * x.size), dtype)
            quantized, index, *losses = nearest_anchor(case.x, case.anchors)
            wide, values = tf.cast(case.x, case.anchors.dtype).numpy(), case.anchors.numpy()
            place = np.where(np.isposinf(wide), values.max(), np.where(np.isneginf(wide), values.min(), wide))
            true_index = np.argmin(np.abs(place[:, np.newaxis] - values), axis=1)  # where all distances are NaN, 0
            nearest = np.where(np.isnan(wide), wide, values[true_index])
            require_equal(name, (quantized, index), (tf.cast(nearest, dtype), true_index))
            true_loss = np.mean(np.square(wide.astype(np.float64) - nearest))
            require(np.allclose(losses, true_loss, rtol=1e-6, equal_nan=True), f"{name}: a loss is wrong")
            if x is ordinary:
                require_gradients(name, case, index, op_gradient(*case[:2], index, *case[2:]), OF_THE_OP)
            checked += x.size
    print(f"checked: {checked:,} elements of 4 types, on ties too, give what NumPy gives, and so do the gradients")


# --------------------------------------------------------------------------------------------------- how it is timed


def sampler(function: Callable, *arguments, finish: Callable = lambda: None) -> Callable[[], float]:
    """Returns what measures the seconds of a call, as the mean of as many calls as take 10 ms."""

    def sample(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            function(*arguments)
        finish()
        return (time.perf_counter() - begin) / calls

    sample(1)  # traces and compiles
    once = sample(1)
    if once < 0.01:
        once = min(sample(1) for _ in range(5))
    calls = max(1, round(0.01 / once))
    return lambda: sample(calls)


def race(samplers: dict, sizes: Sizes) -> dict:
    """Lets all take turns, and returns the median seconds of each."""
    samples = {name: [] for name in samplers}
    spent = dict.fromkeys(samplers, 0.0)
    for turn in range(sizes.rounds):
        for name, sample in samplers.items():
            if turn < 3 or spent[name] < sizes.seconds:
                begin = time.perf_counter()
                samples[name].append(sample())
                spent[name] += time.perf_counter() - begin
    return {name: statistics.median(seconds) for name, seconds in samples.items()}


class Worker:
    """A process that computes FOLDER/result.npz from FOLDER/case.npz, and then measures a call when it is asked to.

    In between it waits, so that it can take turns with what this process measures.
    """

    def __init__(self, command: list, case: Case, **environment):
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        np.savez(folder / "case.npz", **case._asdict())
        with open(folder / "stderr.txt", "w") as messages:
            self._process = subprocess.Popen(
                [*map(str, command), str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                env=os.environ | environment,
            )

    def __enter__(self):
        folder = Path(self._folder.name)
        if self._process.stdout.readline() != "ready\n":
            messages = (folder / "stderr.txt").read_text()
            self.__exit__()
            raise RuntimeError(f"{' '.join(self._process.args)} failed:\n{messages}")
        with np.load(folder / "result.npz") as results:
            self.results = dict(results)
        return self

    def __exit__(self, *_):
        self._process.communicate()  # the end of its input ends it
        self._folder.cleanup()

    def sampler(self, what: str) -> Callable[[], float]:
        """Returns what asks for the seconds of a call."""

        def sample() -> float:
            print(what, file=self._process.stdin, flush=True)
            return float(self._process.stdout.readline())

        return sample


def read_case(folder: Path) -> Case:
    with np.load(folder / "case.npz") as arrays:
        return as_tensors(Case(**arrays))


def time_worker(folder: Path) -> None:
    """The op as a `Worker`: which instructions it uses is settled when a process starts."""
    case = read_case(folder)
    results = training_with(nearest_anchor)(*case)
    names = ("quantized", "index", "codebook_loss", "commitment_loss", "d_x", "d_anchors")
    np.savez(folder / "result.npz", **dict(zip(names, results, strict=True)))
    samplers = op_samplers(case)
    print("ready", flush=True)
    for line in sys.stdin:
        print(samplers[line.strip()](), flush=True)


def memory_worker(folder: Path, way: str) -> None:
    """The memory at the peak of one way to compute forward and backward, as a `Worker`.

    One to a process, since TensorFlow keeps what is freed, and another one would take of it unseen.
    """

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

    case = read_case(folder)
    ways = {WRITE_OUTPUTS: write_outputs, OP: training_with(nearest_anchor), **other_trainings()}
    training = ways[way]
    traced = training.get_concrete_function(*case)
    training(*as_tensors(make_case(1, 2)))  # what is loaded once is loaded now
    before = status("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, starts again from here
    outputs = traced(*case)
    peak = status("VmHWM:") - before - sum(output.dtype.size * output.shape.num_elements() for output in outputs)
    np.savez(folder / "result.npz", peak=peak)
    print("ready", flush=True)


class Report:
    """Prints tables, and remembers the goals."""

    def __init__(self):
        self._goals = 0
        self._missed = []

    def verdict(self, what: str, value: float, at_least: float | None = None, at_most: float | None = None) -> str:
        """Returns the columns that say what the goal is, and whether it is reached."""
        reached = value >= at_least if at_most is None else value <= at_most
        goal = f">= {at_least:g}" if at_most is None else f"<= {at_most:.3g}"
        self._goals += 1
        if not reached:
            self._missed.append(f"{what}: {value:.2f}, goal {goal}")
        return f"{goal:>9}  {'reached' if reached else 'MISSED'}"

    def table(self, title: str, seconds: dict[str, float], goals: dict[str, float]) -> None:
        """Prints what each takes, and how many times as long as the op that is; a goal is the least of these."""
        print(f"\n{title:62}{'ms':>10}{'/ op':>9}{'goal':>9}")
        for name, took in seconds.items():
            ratio = took / seconds[OP]
            verdict = self.verdict(f"{title}, {name}", ratio, goals[name]) if name in goals else ""
            print(f"  {name:60}{1e3 * took:10.3f}{ratio:9.2f}{verdict}")

    def summary(self) -> None:
        print(f"\n{self._goals - len(self._missed)} of {self._goals} goals reached")
        for what in self._missed:
            print(f"  missed: {what}")


# -------------------------------------------------------------------------------------------------- what is measured

OP = "nearest_anchor"
COMPILED = "the same in a function that XLA compiles"
PURE = "the same without the compiled op: aib_tf's pure path"
SEARCHSORTED = "searchsorted on midpoints, gather"
ARGMIN = "argmin over a table of distances, gather"
XLA = {
    "XLA: midpoints below x counted, gather": counting_index,
    "XLA: searchsorted on midpoints, gather": searchsorted_index,
    "XLA: argmin over distances, gather": argmin_index,
}
WRITE_OUTPUTS = "floor: three such outputs, written and nothing else"
PYTORCH = "PyTorch: the quantizer of the reference"


def op_samplers(case: Case) -> dict[str, Callable]:
    """Returns what measures forward and backward by themselves."""
    forward = tf.function(nearest_anchor)
    index = forward(case.x, case.anchors).index
    return {
        "forward": sampler(forward, case.x, case.anchors),
        "backward": sampler(tf.function(op_gradient), case.x, case.anchors, index, *case[2:]),
    }


def other_forwards() -> dict[str, Callable]:
    return {
        COMPILED: tf.function(nearest_anchor, jit_compile=True),
        PURE: tf.function(pure.nearest_anchor),
        SEARCHSORTED: forward_by(searchsorted_index),
        ARGMIN: forward_by(argmin_index_in_slices),
        **{name: forward_by(index_of, jit_compile=True) for name, index_of in XLA.items()},
    }


def other_trainings() -> dict[str, Callable]:
    return {
        COMPILED: training_with(nearest_anchor, jit_compile=True),
        PURE: training_with(pure.nearest_anchor),
        SEARCHSORTED: training_by(searchsorted_index),
        ARGMIN: training_by(argmin_index_in_slices),
        **{name: training_by(index_of, jit_compile=True) for name, index_of in XLA.items()},
    }


def checked_forwards(case: Case) -> dict[str, Callable]:
    """Returns the samplers of the op and all that computes the same in TensorFlow, once they agree."""
    op = tf.function(nearest_anchor)
    expected = op(case.x, case.anchors)
    samplers = {OP: sampler(op, case.x, case.anchors)}
    for name, forward in other_forwards().items():
        result = forward(case.x, case.anchors)
        if name in (COMPILED, PURE, ARGMIN):
            require_equal(name, result, expected)
        else:  # a midpoint is rounded, and then is not quite where the nearest anchor changes
            require_as_near(name, case, result, expected)
        samplers[name] = sampler(forward, case.x, case.anchors)
    return samplers


def checked_trainings(case: Case) -> dict[str, Callable]:
    """Returns the same for forward and backward."""
    op = training_with(nearest_anchor)
    expected = op(*case)
    require_gradients(OP, case, expected[1], expected[-2:], OF_THE_OP)
    samplers = {OP: sampler(op, *case)}
    for name, training in other_trainings().items():
        result = training(*case)
        require_as_near(name, case, result, expected)
        require(np.allclose(result[2:4], expected[2:4], rtol=1e-3), f"{name}: a loss is wrong")
        require_gradients(name, case, result[1], result[-2:], OF_FLOAT32)
        samplers[name] = sampler(training, *case)
    return samplers


@contextlib.contextmanager
def checked_pytorch(pytorch: str | None, case: Case, what: str) -> Iterator[dict[str, Callable]]:
    """Yields the sampler of the PyTorch quantizer; none where there is no PyTorch or where its tables do not fit."""
    bytes_of_an_entry = 4 + 8 + 4  # of distances, one-hot rows, and these as float32
    if pytorch is None or bytes_of_an_entry * case.x.shape[0] * case.anchors.shape[0] > LARGEST_TABLE:
        yield {}
        return
    with Worker([pytorch, Path(__file__).with_name("nearest_anchor_pytorch.py")], case) as worker:
        result = worker.results
        expected = nearest_anchor(case.x, case.anchors)
        require_as_near(PYTORCH, case, (result["quantized"], result["index"]), expected)
        require_gradients(PYTORCH, case, result["index"], (result["d_x"], result["d_anchors"]), OF_FLOAT32)
        yield {PYTORCH: worker.sampler(what)}


def measure_forward(report: Report, sizes: Sizes, pytorch: str | None) -> None:
    floor = "floor: x + 1 and x + 2, which write two outputs"
    took = []
    for count in sizes.anchors:
        case = as_tensors(make_case(sizes.elements, count))
        samplers = {floor: sampler(write_two, case.x), **checked_forwards(case)}
        with checked_pytorch(pytorch, case, "forward") as other:
            seconds = race(samplers | other, sizes)
        goals = {SEARCHSORTED: 10, ARGMIN: 20, min(XLA, key=seconds.get): 3, floor: 0.25}
        report.table(f"forward, {sizes.elements:,} elements, Q = {count}", seconds, goals)
        took.append(seconds[OP])
    spread = max(took) / min(took)
    print(f"\n{'forward, slowest Q / fastest':72}{spread:9.2f}{report.verdict('flat in Q', spread, at_most=2)}")


def measure_backward(report: Report, sizes: Sizes) -> None:
    floor = "floor: x + y + z, which reads three and writes one"
    in_function = "TensorFlow's gradient, in tf.function"
    kept = "TensorFlow's gradient, with differences kept from forward"
    both, less = f"{OP}, forward and backward", "  less forward"
    for count in sizes.anchors:
        case = as_tensors(make_case(sizes.elements, count))
        arguments = (case.x, case.anchors, nearest_anchor(case.x, case.anchors).index, *case[2:])
        gradients = {
            OP: (tf.function(op_gradient), arguments),
            COMPILED: (tf.function(op_gradient, jit_compile=True), arguments),
            in_function: (tf.function(tensorflow_gradient), arguments),
            kept: (kept_gradient(*arguments), ()),
            "XLA: TensorFlow's gradient": (tf.function(tensorflow_gradient, jit_compile=True), arguments),
        }
        samplers = {floor: sampler(read_three, case.x, tf.reverse(case.x, [0]), case.d_quantized)}
        for name, (gradient, inputs) in gradients.items():
            rounding = OF_THE_OP if name == OP else OF_FLOAT32
            require_gradients(name, case, arguments[2], gradient(*inputs), rounding)
            samplers[name] = sampler(gradient, *inputs)
        samplers[both] = sampler(training_with(nearest_anchor), *case)
        samplers[less] = op_samplers(case)["forward"]
        seconds = race(samplers, sizes)
        seconds[less] = seconds[both] - seconds[less]
        goals = {min(in_function, kept, key=seconds.get): 10, floor: 0.25}
        report.table(f"backward, {sizes.elements:,} elements, Q = {count}", seconds, goals)


def measure_batch(report: Report, sizes: Sizes, pytorch: str | None) -> None:
    for count in sizes.anchors:
        case = as_tensors(make_case(sizes.batch, count))
        for what, samplers in (("forward", checked_forwards(case)), ("training", checked_trainings(case))):
            with checked_pytorch(pytorch, case, what) as other:
                seconds = race(samplers | other, sizes)
            title = "forward" if what == "forward" else "forward and backward"
            report.table(f"{title}, {sizes.batch:,} elements, Q = {count}", seconds, {ARGMIN: 3})


def measure_memory(report: Report, sizes: Sizes) -> None:
    if not sys.platform.startswith("linux"):
        print("\nmemory: not measured, since only Linux tells the peak of a part of a process")
        return
    count = max(each for each in sizes.anchors if each <= 256)
    case = make_case(sizes.elements, count)
    print(f"\nforward and backward, {sizes.elements:,} elements, Q = {count}: memory at the peak,")
    print(f"{'beside inputs and outputs':62}{'MB':>10}{'':9}{'goal':>9}")
    peaks = {}
    others = (ARGMIN,) if sizes is QUICK else (PURE, SEARCHSORTED, ARGMIN)
    ways = (WRITE_OUTPUTS, OP, *others)
    workers = {name: Worker([sys.executable, __file__, "--worker", name], case) for name in ways}
    for name, worker in workers.items():
        with worker:
            peaks[name] = float(worker.results["peak"]) / 1e6
        verdict = ""
        if name == OP:
            # Less than one byte an element: nothing that is kept has as many elements. The allocator rounds up.
            verdict = report.verdict("memory, MB", peaks[OP], at_most=peaks[WRITE_OUTPUTS] + sizes.elements / 1e6)
        print(f"  {name:60}{peaks[name]:10,.1f}{verdict and ' ' * 9 + verdict}")


def measure_variants(sizes: Sizes) -> None:
    """Other types, anchors, x and instruction sets; there are no goals for them."""
    random = np.random.default_rng(2)
    plain = make_case(sizes.elements, 256)
    far = plain.x.copy()
    far[random.random(far.size) < 0.03] = 1e9
    far[random.random(far.size) < 0.01] = np.nan
    # Ever closer to one another towards 0, and as many elements there as anywhere.
    geometric = plain._replace(
        x=np.exp(random.uniform(np.log(1e-6), 0, sizes.elements)).astype(np.float32),
        anchors=np.geomspace(1e-6, 1, 256, dtype=np.float32),
    )
    cases = {
        "float32": as_tensors(plain),
        "float16": as_tensors(plain, tf.float16),
        "bfloat16": as_tensors(plain, tf.bfloat16),
        "float64": as_tensors(plain, tf.float64),
        "anchors in random order": as_tensors(plain._replace(anchors=random.permutation(plain.anchors))),
        "anchors and x in geometric progression, 1e-6 to 1": as_tensors(geometric),
        "3% of x at 1e9, 1% NaN": as_tensors(plain._replace(x=far)),
        f"{sizes.most_anchors:,} anchors": as_tensors(make_case(sizes.elements, sizes.most_anchors)),
    }
    samplers = {}
    for name, case in cases.items():
        result = nearest_anchor(case.x, case.anchors)
        require_equal(name, result, pure.nearest_anchor(case.x, case.anchors))
        gradients = op_gradient(case.x, case.anchors, result.index, *case[2:])
        require_gradients(name, case, result.index, gradients, OF_THE_OP)
        samplers |= {(name, what): sample for what, sample in op_samplers(case).items()}
    expected = training_with(nearest_anchor)(*cases["float32"])
    instructions = ("baseline",) if sizes is QUICK else ("avx2", "baseline")
    if platform.machine() != "x86_64":
        instructions = ()
    command = [sys.executable, __file__, "--worker", "time"]
    workers = {f"float32, AIB_TF_CPU={name}": Worker(command, plain, AIB_TF_CPU=name) for name in instructions}
    with contextlib.ExitStack() as stack:
        for name, worker in workers.items():
            results = stack.enter_context(worker).results
            for part, one in zip(results, expected, strict=True):
                require(np.array_equal(results[part], one), f"{name}: {part} is not the same")
            samplers |= {(name, what): worker.sampler(what) for what in ("forward", "backward")}
        seconds = race(samplers, sizes)
    print(f"\n{f'variants, {sizes.elements:,} elements, Q = 256':62}{'forward ms':>12}{'/ first':>9}", end="")
    print(f"{'backward ms':>13}{'/ first':>9}")
    for name in dict.fromkeys(name for name, _ in samplers):
        print(f"  {name:60}", end="")
        for what, width in (("forward", 12), ("backward", 13)):
            took = seconds[name, what]
            print(f"{1e3 * took:{width}.3f}{took / seconds['float32', what]:9.2f}", end="")
        print()


def measure_gpu(report: Report, sizes: Sizes, device: str) -> None:
    """How much of the bandwidth of a copy is reached, when each input is read and each output written once."""
    finish = tf.test.experimental.sync_devices
    print(f"\n{f'{device}, {sizes.gpu:,} elements':62}{'ms':>10}{'GB/s':>9}{'/ copy':>9}{'goal':>9}")
    drawn = make_case(sizes.gpu, 256)
    for dtype in (tf.float32, tf.bfloat16):
        for count in (count for count in sizes.anchors if count <= 256):
            on_cpu = as_tensors(drawn._replace(anchors=make_case(1, count).anchors), dtype)
            expected = nearest_anchor(on_cpu.x, on_cpu.anchors)
            with tf.device(device):
                case = Case(*map(tf.identity, on_cpu))
                forward, backward = tf.function(nearest_anchor), tf.function(op_gradient)
                result = forward(case.x, case.anchors)
                arguments = (case.x, case.anchors, result.index, *case[2:])
                name = f"{dtype.name}, Q = {count}"
                require(device in result.index.device, f"{name}: was computed on {result.index.device}")
                require_equal(name, result, expected)
                require(np.allclose(result[2:], expected[2:], rtol=1e-6), f"{name}: a loss is wrong")
                require_gradients(name, on_cpu, expected.index, backward(*arguments), OF_THE_OP)
                copy = tf.function(lambda x: tf.raw_ops.DeepCopy(x=x))
                samplers = {
                    "copy": sampler(copy, case.x, finish=finish),
                    "forward": sampler(forward, case.x, case.anchors, finish=finish),
                    "backward": sampler(backward, *arguments, finish=finish),
                }
                seconds = race(samplers, sizes)
            per_element = {"copy": 2 * dtype.size, "forward": 2 * dtype.size + 4, "backward": 3 * dtype.size + 4}
            rates = {what: per_element[what] * sizes.gpu / took / 1e9 for what, took in seconds.items()}
            for what, rate in rates.items():
                share = rate / rates["copy"]
                verdict = "" if what == "copy" else report.verdict(f"GPU, {name}, {what}", share, at_least=0.8)
                print(f"  {f'{name}: {what}':60}{1e3 * seconds[what]:10.3f}{rate:9.0f}{share:9.2f}{verdict}")


def processor() -> str:
    """Returns what this runs on."""
    if not sys.platform.startswith("linux"):
        return f"{os.cpu_count()} cores, {platform.processor()}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{len(os.sched_getaffinity(0))} cores, {model}"


def find_pytorch(python: str | None) -> str | None:
    """Returns the interpreter to run PyTorch with, or None where none was named and this one has none."""
    command = [python or sys.executable, "-c", "import torch; print(torch.__version__, torch.get_num_threads())"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode == 0:
        version, threads = found.stdout.split()
        print(f"PyTorch {version}, {threads} threads, in a process of its own")
        return command[0]
    if python is not None:
        raise SystemExit(f"{python} cannot import PyTorch:\n{found.stderr}")
    print("PyTorch: not measured, it is not installed here; --pytorch names a Python that has it")
    return None


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="measure only these parts")
    parser.add_argument("--quick", action="store_true", help="few and small: shows that it runs, measures nothing")
    parser.add_argument("--pytorch", metavar="PYTHON", help="a Python with PyTorch; this one, unless it has none")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tf.get_logger().setLevel("ERROR")  # or it warns that functions are traced again and again
    if implementation().name != "custom_op":
        raise SystemExit(f"There is nothing to measure. {implementation().reason}")
    if arguments.worker:
        with tf.device("/CPU:0"):
            what, folder = arguments.worker
            time_worker(Path(folder)) if what == "time" else memory_worker(Path(folder), what)
        return

    sizes, report = QUICK if arguments.quick else Sizes(), Report()
    gpus = tf.config.list_logical_devices("GPU")
    sys.stdout.reconfigure(line_buffering=True)
    print(f"TensorFlow {tf.__version__}, {processor()}")
    if arguments.quick:
        print("quick: so small that no goal can be judged")
    with tf.device("/CPU:0"):
        check()
        pytorch = find_pytorch(arguments.pytorch)
        if "forward" in arguments.part:
            measure_forward(report, sizes, pytorch)
        if "backward" in arguments.part:
            measure_backward(report, sizes)
        if "batch" in arguments.part:
            measure_batch(report, sizes, pytorch)
        if "memory" in arguments.part:
            measure_memory(report, sizes)
        if "variants" in arguments.part:
            measure_variants(sizes)
        if "gpu" in arguments.part:
            if gpus:
                measure_gpu(report, sizes, "GPU:0")
            else:
                print("\nGPU: not measured, TensorFlow sees none")
    report.summary()


if __name__ == "__main__":
    main()
