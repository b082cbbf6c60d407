"""Measures how training scales over the cores of this machine, and says what to expect of many GPUs.

    python benchmarks/scaling.py                                # all parts: about six minutes on an idle machine
    python benchmarks/scaling.py --part networks expected       # seconds: no step is timed

Two cores stand for two devices. `vgg_aib_qt` trains on drawn digits with as many images for each core (weak scaling):
in one process on one core, which is the baseline; as two replicas of `MirroredStrategy`; as two workers of
`MultiWorkerMirroredStrategy`, each pinned to a core; and, to tell what the cores cost each other from what the exchange
costs, on two cores without replicas, and as two processes that know nothing of each other. Efficiency is images/s over
those of the baseline for each of the cores. The processes take turns, and ratios are those of one turn. Images for each
second of the cores' time do not depend on what else the machine does; waiting is not in it.

First two replicas and two workers have to arrive at one device's losses over the same batches, with synchronised batch
normalisation and without noise, or the program ends with an error.

A share of a step is from the trace that `--profile` writes. On CPUs it is a share of the time that the cores spend in
operations, not of the time on a clock: what runs beside something else counts as well. What only waits is no work, and
stands apart.

`expected` computes the efficiency on 8, 64 and 512 GPUs from what a step of each network exchanges and computes, and
from assumptions about GPUs and networks, which it prints. No GPU was measured for it.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from launch import free_ports
from training import processor, version_of

HERE = Path(__file__).resolve().parent
# TensorFlow is imported in the processes that are measured, not in this one.

PARTS = ("scaling", "executions", "shares", "networks", "expected")
# Of losses, relative to the largest; and of what the steps take off the loss.
TOLERANCE, PROGRESS_TOLERANCE = 1e-4, 2e-2
BASELINE, MIRRORED, WORKERS = "1 replica, 1 core", "2 replicas, 2 cores", "2 workers, 1 core each"
NETWORKS = (
    ("vgg_aib_qt", (32, 32, 3), 10),
    ("vgg_att2", (32, 32, 3), 10),
    ("wrn_28_10_aib_qt", (32, 32, 3), 10),
    ("vgg16_cub_aib_qt", (224, 224, 3), 200),
    ("wrn_50_2_cub_aib_qt", (224, 224, 3), 200),
)


class Sizes(NamedTuple):
    """How much is measured."""

    name: str = "vgg_aib_qt"
    width: float = 0.25
    batch: int = 32  # images for each core
    rounds: int = 7
    steps: int = 8  # of a turn
    everything: bool = True  # whether there are the settings that only explain others
    small_width: float = 0.03125  # of the model whose steps are so short that calling them counts
    small_batch: int = 4


QUICK = Sizes("wrn_10_1_aib_qt", width=0.5, batch=4, rounds=1, steps=2, everything=False)


# ------------------------------------------------------------------------------------------------- processes to measure


class Process:
    """A `scaling_worker.py` on cores of its own.

    Args:
        cores: numbers of the cores.
        folder: where it writes its messages.
        name: of the file for them.
        tf_config: value of TF_CONFIG, or None for no cluster.
    """

    def __init__(self, cores, folder, name, tf_config=None):
        threads = dict.fromkeys(("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), len(cores))
        environment = {
            **{key: value for key, value in os.environ.items() if key != "TF_CONFIG"},
            **{key: str(count) for key, count in threads.items()},
            "CUDA_VISIBLE_DEVICES": "-1",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            **({"TF_CONFIG": tf_config} if tf_config else {}),
        }
        self._messages = Path(folder, f"{name}.txt")
        with open(self._messages, "w") as messages:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "scaling_worker.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                env=environment,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )

    def __enter__(self):
        return self

    def __exit__(self, failed, *_):
        if failed:
            self._process.kill()  # it may wait for another one
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()  # the end of its input ends it

    def tell(self, question, *arguments):
        """Asks, without waiting for the answer."""
        with contextlib.suppress(BrokenPipeError):  # `answer` says why
            print(json.dumps([question, *arguments]), file=self._process.stdin, flush=True)

    def answer(self):
        """Waits for the answer to the oldest question."""
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise RuntimeError(self.failure())
        return json.loads(line)

    def failure(self, seconds=0.0):
        """What it said if it ended with an error, or does so within some seconds; else an empty text."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process.wait(seconds):
                title = f"Process {self._messages.stem} ended with {self._process.returncode}"
                return f"{title}:\n{self._messages.read_text()}"
        return ""


def ask(processes, question, *arguments):
    """Asks several processes at once, and returns their answers."""
    for process in processes:
        process.tell(question, *arguments)
    try:
        return [process.answer() for process in processes]
    except RuntimeError as error:
        # One that fails takes the others with it, and the cause may stand with any of them.
        raise RuntimeError("\n".join(filter(None, (each.failure(seconds=10.0) for each in processes)))) from error


class Setting(NamedTuple):
    """Processes that train together, or apart at the same time.

    Attributes:
        processes: each a `Process`.
        cores: of all of them.
        synchronized: whether batch normalisation is.
    """

    processes: list
    cores: int
    synchronized: bool = False


def start(sizes, folder, stack):
    """Starts all processes, and returns dict name -> `Setting`."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    ports = free_ports(2)
    cluster = {"worker": [f"localhost:{port}" for port in ports]}
    configs = [json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}) for index in range(2)]

    def process(name, cores, strategy, batch, tf_config=None):
        made = stack.enter_context(Process(cores, folder, name, tf_config))
        made.tell("start", strategy, str(Path(folder, "data")), sizes.name, sizes.width, batch)
        return made

    alone = process("alone", [first], "one_device", sizes.batch)
    # The first one draws the images, and the others find them.
    alone.answer()
    ask([alone], "load")
    mirrored = process("mirrored", [first, second], "mirrored", 2 * sizes.batch)
    workers = [
        process(f"worker{index}", [core], "multi_worker", 2 * sizes.batch, configs[index])
        for index, core in enumerate((first, second))
    ]
    settings = {
        BASELINE: Setting([alone], 1),
        MIRRORED: Setting([mirrored], 2),
        f"{MIRRORED}, sync. norm": Setting([mirrored], 2, synchronized=True),
        WORKERS: Setting(workers, 2),
        f"{WORKERS}, sync. norm": Setting(workers, 2, synchronized=True),
    }
    if sizes.everything:
        both = process("both", [first, second], "one_device", 2 * sizes.batch)
        beside = process("beside", [second], "one_device", sizes.batch)
        settings["1 replica, 2 cores"] = Setting([both], 2)
        settings["2 processes apart, 1 core each"] = Setting([alone, beside], 2)
        both.answer()
        beside.answer()
    else:
        settings = {name: setting for name, setting in settings.items() if not setting.synchronized}
    for each in (mirrored, *workers):
        each.answer()
    replicas = ask([mirrored, *workers], "load")
    if replicas != [2, 2, 2]:
        raise AssertionError(f"Replicas and workers should be two each, and are {replicas}")
    return settings


# --------------------------------------------------------------------------------------------------- what is measured


def require_same_losses(name, found, expected):
    """Raises AssertionError unless the losses of some steps agree, and so what the steps change."""
    largest = max(abs(value) for value in expected)
    error = max(abs(one - other) for one, other in zip(found, expected, strict=True)) / largest
    if not error <= TOLERANCE:
        raise AssertionError(f"{name}: losses {found} instead of {expected}, wrong by {error:.2g} of the largest")
    progress = [[after - before for before, after in itertools.pairwise(values)] for values in (found, expected)]
    largest = max(abs(value) for value in progress[1])
    # Where nothing changes, nothing is proved.
    wrong = max(abs(one - other) for one, other in zip(*progress, strict=True)) / largest if largest else float("inf")
    if not wrong <= PROGRESS_TOLERANCE:
        raise AssertionError(f"{name}: the steps change the loss by {progress[0]} instead of {progress[1]}")
    print(f"checked: {name}, losses as 1 replica, but for {error:.1g}; what steps change, but for {wrong:.1g}")


def check(settings, sizes):
    """Raises AssertionError unless two replicas and two workers train as one device does."""
    (expected,) = ask(settings[BASELINE].processes, "losses", False, 2 * sizes.batch)
    for name in (MIRRORED, WORKERS):
        for found in ask(settings[name].processes, "losses", True, 2 * sizes.batch):
            require_same_losses(name, found, expected)


def measure_scaling(settings, sizes):
    """Prints images/s and the efficiency of each setting."""
    rates, core_rates = ({name: [] for name in settings} for _ in range(2))
    for turn in range(sizes.rounds + 1):
        for name, setting in settings.items():
            answers = ask(setting.processes, "seconds", setting.synchronized, sizes.steps if turn else 1)
            images = sizes.batch * setting.cores
            if turn:  # the first one traces
                rates[name].append(images / max(seconds for seconds, _ in answers))
                core_rates[name].append(images / sum(cores for _, cores in answers))
    print(f"\n{'images a second':38}{'batch':>7}{'median':>9}{'slowest':>9}{'fastest':>9}{'efficiency':>12}", end="")
    print(f"{'per core-second':>17}{'/ first':>9}")
    for name, values in rates.items():
        cores = settings[name].cores
        efficiency = statistics.median(
            value / (cores * base) for value, base in zip(values, rates[BASELINE], strict=True)
        )
        columns = "".join(f"{f(values):9.1f}" for f in (statistics.median, min, max))
        of_cores = [statistics.median(core_rates[each]) for each in (name, BASELINE)]
        print(f"  {name:36}{sizes.batch * cores:7}{columns}{efficiency:12.0%}", end="")
        print(f"{of_cores[0]:17.1f}{of_cores[0] / of_cores[1]:9.0%}")
    seconds = max(ask(settings[WORKERS].processes, "seconds_to_agree", 30))
    print(f"  2 workers agree on saving and stopping, after each step of `fit`: {1e3 * seconds:.1f} ms more")


def measure_executions(settings, sizes):
    """Prints the time of a step of a small model, one and eight at a time."""
    process, samples = settings[BASELINE].processes, {1: [], 8: []}
    for turn in range(sizes.rounds + 1):
        for count, seconds in samples.items():
            arguments = (sizes.small_width, sizes.small_batch, count, 32 if turn else 8)
            ((answer, _),) = ask(process, "seconds_of_execution", *arguments)
            if turn:
                seconds.append(answer)
    title = f"step, width {sizes.small_width:g}, batch {sizes.small_batch}, 1 core"
    print(f"\n{title:43}{'ms':>9}{'fastest':>9}{'slowest':>9}{'/ first':>12}")
    for count, seconds in samples.items():
        ratio = statistics.median(one / other for one, other in zip(seconds, samples[1], strict=True))
        columns = "".join(f"{1e3 * f(seconds):9.2f}" for f in (statistics.median, min, max))
        print(f"  {f'steps_per_execution={count}':41}{columns}{ratio:12.2f}")


def measure_shares(settings, sizes):
    """Prints what a step consists of, by the profiler."""
    chosen = {
        "1 replica": settings[BASELINE],
        "2 replicas": settings[MIRRORED],
        # Workers of TensorFlow 2.21 that trace at the same time have died of freed memory now and then.
        "2 workers": settings[WORKERS] if sizes.everything else None,
        "2 workers, sync. norm": settings.get(f"{WORKERS}, sync. norm"),
    }
    columns = {}
    for name, setting in chosen.items():
        if setting is None:
            continue
        traces = ask(setting.processes, "trace", setting.synchronized)
        columns[name] = summary(traces, setting.cores)
    kinds = sorted({kind for column in columns.values() for kind in column["operations"]})
    kinds.sort(key=lambda kind: -columns["1 replica"]["operations"].get(kind, 0.0))
    print(f"\n{'ms of a core in a step (share)':36}" + "".join(f"{name:>23}" for name in columns))
    for kind in kinds:
        print(f"  {kind:34}" + "".join(_with_share(column, kind) for column in columns.values()))
    print(f"  {'together':34}" + "".join(f"{sum(column['operations'].values()):23.1f}" for column in columns.values()))
    rows = {
        "a step on the clock": "step",
        "waiting for the other in all-reduce": "exchange_wait",
        "waiting for images": "input_wait",
    }
    for title, key in rows.items():
        print(f"  {title:34}" + "".join(f"{column[key]:23.1f}" for column in columns.values()))
    print(f"  {'all-reduces in a step':34}" + "".join(f"{column['exchanges']:23.1f}" for column in columns.values()))


def _with_share(column, kind):
    value = column["operations"].get(kind, 0.0)
    return f"{value:14.2f} ({value / sum(column['operations'].values()):6.2%})"


def summary(traces, replicas):
    """Brings the traces of processes that train together to one replica.

    Of an all-reduce, the replica that comes last waits for nobody: its time is that of the exchange, and what the
    others are longer in it, they wait.

    Args:
        traces: what `scaling_worker.read_trace` says of each process.
        replicas: of all of them.

    Returns:
        Dict: `operations`, dict kind -> milliseconds of a step; `step`, `exchange_wait` and `input_wait`, milliseconds;
        `exchanges`, collective operations of a step.
    """
    count = len(traces)
    operations = {}
    for trace in traces:
        for kind, milliseconds in trace["operations"].items():
            operations[kind] = operations.get(kind, 0.0) + milliseconds / replicas
    exchanges = sorted((each for trace in traces for each in trace["exchanges"]), key=lambda each: each[1])
    if len(exchanges) % replicas:
        raise ValueError(f"Not all replicas took part in each exchange. Received: {len(exchanges)} of {replicas}")
    steps = traces[0]["steps"]
    moving = waiting = 0.0
    # They end together, so that those of one exchange are neighbours.
    for place in range(0, len(exchanges), replicas):
        times = [end - begin for begin, end in exchanges[place : place + replicas]]
        moving += min(times) / steps
        waiting += (statistics.mean(times) - min(times)) / steps
    if exchanges:
        operations["all-reduce"] = moving
    return {
        "operations": operations,
        "step": statistics.mean(trace["step"] for trace in traces),
        "exchange_wait": waiting,
        "input_wait": sum(trace["input_wait"] for trace in traces) / count,
        "exchanges": len(exchanges) / replicas / steps,
    }


# ---------------------------------------------------------------------------------------------------- what to expect


class Fabric(NamedTuple):
    """What connects GPUs: assumed.

    Attributes:
        node: GPUs of a machine.
        inner: bytes a second that a GPU sends to its neighbour in the machine.
        outer: bytes a second that each GPU sends to another machine while all of them do.
        inner_latency: seconds of a message in a machine.
        outer_latency: seconds of a message between two.
    """

    node: int = 8
    inner: float = 230e9
    outer: float = 25e9
    inner_latency: float = 5e-6
    outer_latency: float = 20e-6


# Fast: NVLink, and a network card of 200 Gbit/s for each GPU. Slow: NVLink, and one of 100 Gbit/s for all eight.
FABRICS = {"fast": Fabric(), "slow": Fabric(outer=12.5e9 / 8)}
# Floating point operations a second of a GPU in training, from the published images/s of ResNet-50 v1.5 on one A100
# with TensorFlow and XLA, 909 with TF32 and 2,375 in mixed precision (NVIDIA DeepLearningExamples), at 6 times 4.1e9
# multiplications an image.
PUBLISHED = {"float32 (TF32)": 909, "mixed": 2375}
_FLOPS_OF_IMAGE = 6 * 4.1e9
# Images of a GPU in a step: the batches of the papers' recipes, which were for one GPU.
GPU_BATCH = {32: 128, 224: 16}
GPUS = (8, 64, 512)
# Two sums forward and their two gradients backward; `shares` counts them.
EXCHANGES_OF_NORM = 4


def all_reduce_seconds(size, gpus, fabric):
    """Time of a ring all-reduce of `size` bytes, in each machine and then between them.

    In a ring of n, each sends 2 (n - 1) / n of the bytes in 2 (n - 1) messages. With several machines, each first
    scatters the sum of its g GPUs over them; then the machines exchange these parts, each GPU its own; then the parts
    are gathered.
    """
    inside = min(gpus, fabric.node)
    machines = -(-gpus // fabric.node)
    seconds = 2 * (inside - 1) / inside * size / fabric.inner + 2 * (inside - 1) * fabric.inner_latency
    part = size / inside
    return seconds + 2 * (machines - 1) / machines * part / fabric.outer + 2 * (machines - 1) * fabric.outer_latency


def expected_efficiency(compute, size, gpus, fabric, overlap=0.0, input_seconds=0.0):
    """Images/s of a GPU among `gpus`, over those of one alone.

    t = max(compute, input) + (1 - overlap) all_reduce; the efficiency is that without all_reduce over t.

    Args:
        compute: seconds of a step on one GPU.
        size: bytes of the gradients.
        gpus: number of GPUs.
        fabric: a `Fabric`.
        overlap: share of the exchange that runs beside computation.
        input_seconds: seconds in which the images of a step are read and decoded.
    """
    alone = max(compute, input_seconds)
    return alone / (alone + (1 - overlap) * all_reduce_seconds(size, gpus, fabric))


def show_networks(networks):
    """Prints what a step of each network exchanges and computes."""
    print(f"\n{'at full width':24}{'gradients, MB':>15}{'variables':>11}{'norms':>7}{'GFLOP an image, trained':>26}")
    for each in networks:
        flops = 6 * each["multiplications"] / 1e9
        print(f"  {each['name']:22}{each['bytes'] / 1e6:15.1f}{each['tensors']:11}{each['norms']:7}{flops:26.1f}")


def show_expected(networks):
    """Prints the expected efficiency, and what it assumes."""
    print(
        "\nexpected, not measured: t = max(compute, input) + (1 - overlap) all-reduce; overlap 0, no input waited for"
    )
    for name, fabric in FABRICS.items():
        inner = f"{fabric.inner / 1e9:g} GB/s and {1e6 * fabric.inner_latency:g} us a message"
        outer = f"{fabric.outer / 1e9:.3g} GB/s for each GPU and {1e6 * fabric.outer_latency:g} us a message"
        print(f"  {name}: {fabric.node} GPUs in a machine, {inner}; between machines {outer}")
    for precision, rate in PUBLISHED.items():
        print(
            f"  {precision}: {rate * _FLOPS_OF_IMAGE / 1e12:.1f} TFLOP/s, from {rate} images/s of ResNet-50 on an A100"
        )
    heads = "".join(f"{f'{gpus} GPUs':>16}" for gpus in GPUS)
    print(f"\n{'all-reduce in ms, efficiency':38}{'batch':>7}{'compute, ms':>13}{heads}")
    for each in networks:
        batch = GPU_BATCH[each["image"]]
        for (precision, rate), (name, fabric) in itertools.product(PUBLISHED.items(), FABRICS.items()):
            compute = batch * 6 * each["multiplications"] / (rate * _FLOPS_OF_IMAGE)
            cells = ""
            for gpus in GPUS:
                exchange = all_reduce_seconds(each["bytes"], gpus, fabric)
                cells += f"{1e3 * exchange:9.1f} {expected_efficiency(compute, each['bytes'], gpus, fabric):6.1%}"
            print(f"  {', '.join((each['name'], precision.split()[0], name)):36}{batch:7}{1e3 * compute:13.1f}{cells}")
    title = "synchronised normalisation adds, ms"
    print(f"\n{title:38}{'exchanges':>20}{heads}")
    for each in networks:
        exchanges = EXCHANGES_OF_NORM * each["norms"]
        # What they carry is so little that only their latency counts.
        times = [1e3 * exchanges * all_reduce_seconds(0, gpus, FABRICS["fast"]) for gpus in GPUS]
        print(f"  {each['name']:36}{exchanges:20}" + "".join(f"{time:16.1f}" for time in times))


def describe_networks(folder):
    """Returns what `scaling_worker.networks` says, and the height of an image."""
    with Process(sorted(os.sched_getaffinity(0)), folder, "networks") as process:
        (found,) = ask([process], "networks", NETWORKS)
    return [{**each, "image": shape[0]} for each, (_, shape, _) in zip(found, NETWORKS, strict=True)]


def main():
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="small: shows that it runs, measures nothing")
    parser.add_argument("--width", type=float, help="factor for all numbers of channels")
    parser.add_argument("--batch", type=int, help="images for each core in a step")
    parser.add_argument("--rounds", type=int, help="turns of each setting")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else Sizes()
    chosen = {name: getattr(arguments, name) for name in ("width", "batch", "rounds") if getattr(arguments, name)}
    sizes = sizes._replace(**chosen)

    sys.stdout.reconfigure(line_buffering=True)
    measured = {"scaling", "executions", "shares"} & {*arguments.part}
    if measured and (not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2):
        parser.error(
            "two cores, and a system that pins processes to them (Linux), are needed; --part networks expected"
        )
    print(f"TensorFlow {version_of('tensorflow', sys.executable)}, {processor()}, width {sizes.width:g}")
    if measured and os.getloadavg()[0] > 0.5:
        print(f"This machine is busy: load {os.getloadavg()[0]:.1f}. Cores that others use say nothing of scaling.")
    with tempfile.TemporaryDirectory() as folder:
        if measured:
            with contextlib.ExitStack() as stack:
                settings = start(sizes, folder, stack)
                check(settings, sizes)
                if "scaling" in arguments.part:
                    measure_scaling(settings, sizes)
                if "executions" in arguments.part:
                    measure_executions(settings, sizes)
                if "shares" in arguments.part:
                    measure_shares(settings, sizes)
        if {"networks", "expected"} & {*arguments.part}:
            networks = describe_networks(folder)
            if "networks" in arguments.part:
                show_networks(networks)
            if "expected" in arguments.part:
                show_expected(networks)


if __name__ == "__main__":
    main()
