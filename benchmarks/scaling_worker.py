"""One process of `scaling.py`: trains on the cores that it is given, and answers what it is asked.

A line of its input is a JSON list, the name of a question and its arguments; a line of its output is the answer, as
JSON. Cores and numbers of threads are set before this program starts, since TensorFlow reads them once.
"""

import contextlib
import json
import math
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import tensorflow as tf

from aib_tf import data, losses, metrics, models
from aib_tf.training import SGD, distribution
from aib_tf.training.callbacks import Profiler

DATASET = "cluttered_digits/train512_validation40_test40_seed0"
CHECKED_STEPS = 3
TRACED_STEPS = 8
# The rate of the checked steps is that of the released code's start; at the other one the weights stay where they are.
CHECKED_LEARNING_RATE, TIMED_LEARNING_RATE = 5e-5, 1e-6

# "path/of/the/operation:Type", as TensorFlow's executors name what they run.
_OPERATION = re.compile(r"(?P<path>[^:\s]*):(?P<type>_?[A-Z][\w>]*)")
_KINDS = (
    ("quantizer", lambda path, kind: "/quantizer" in path or "NearestAnchor" in kind),
    ("optimizer", lambda path, kind: re.search(r"/sgd(_\d+)?/", path)),
    ("convolutions, matrix products", lambda path, kind: "Conv2D" in kind or "MatMul" in kind),
    ("batch normalisation", lambda path, kind: "BatchNorm" in kind or re.search(r"/\w*norm\d*(_\d+)?/", path)),
    ("other operations", lambda path, kind: True),
)
_EXECUTOR = "TensorFlow's executor"
_INPUT = "input pipeline"
# Operations that only wait for others: what is behind them is counted there.
_WAITING = ("CollectiveReduceV2", "IteratorGetNext", "MultiDeviceIteratorGetNextFromShard", "RemoteCall")


class Process:
    """What a process can be asked.

    Args:
        strategy: as for `distribution.strategy`.
        data_dir: folder where the drawn images are, or will be.
        name: of the model.
        width: of the model.
        batch: images in a step of all processes together.
    """

    def __init__(self, strategy, data_dir, name, width, batch):
        if strategy == "mirrored":
            cpu = tf.config.list_physical_devices("CPU")[0]
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        self._workers = distribution.Workers(distribution.strategy(strategy))
        self._batch = batch
        self._data_dir = data_dir
        self._name = name
        self._width = width
        self._models = {}
        self._batches = {}

    def load(self):
        """Draws the images, where they are not there yet; returns the number of replicas."""
        self._stream(self._batch)
        return self._workers.replicas

    def losses(self, synchronized, batch):
        """Losses of some steps without noise, at which any number of replicas has to arrive."""
        model = self._model(synchronized)
        sampling = [layer for layer in model._flatten_layers() if hasattr(layer, "sample")]
        for layer in sampling:
            layer.sample = lambda mean, stddev, samples=None: mean + 0.0 * stddev
        model.optimizer.learning_rate = CHECKED_LEARNING_RATE
        batches, values = self._iterator(batch), []
        model.make_train_function()
        for _ in range(CHECKED_STEPS):
            model.reset_metrics()
            values.append(float(model.train_function(batches)["loss"]))
        for layer in sampling:
            del layer.sample
        model.optimizer.learning_rate = TIMED_LEARNING_RATE
        model.make_train_function(force=True)  # with noise
        return values

    def seconds(self, synchronized, steps):
        """Seconds of a step on the clock, and those of the cores for it in this process: means of several."""
        model = self._model(synchronized)
        if synchronized not in self._batches:
            model.make_train_function()
            self._batches[synchronized] = self._iterator(self._batch)
        return _seconds_of_step(model, self._batches[synchronized], steps)

    def seconds_of_execution(self, width, batch, steps_per_execution, steps):
        """The same of a small model, with several steps for each call of the function."""
        key = ("executions", steps_per_execution)
        if key not in self._models:
            self._models[key] = self._build(width, False, steps_per_execution)
            self._models[key].make_train_function()
            self._batches[key] = self._iterator(batch)
        return _seconds_of_step(self._models[key], self._batches[key], steps, steps_per_execution)

    def seconds_to_agree(self, times):
        """Seconds in which the workers agree on saving and stopping, as they do after each step."""
        self._workers.any(False, False)
        begin = time.perf_counter()
        for _ in range(times):
            self._workers.any(False, False)
        return (time.perf_counter() - begin) / times

    def trace(self, synchronized):
        """What some steps consist of, from the trace that `--profile` writes.

        Returns:
            Dict: `steps`, how many; `step`, milliseconds of one; `operations`, dict kind -> milliseconds of a step in
            all replicas of this process; `input_wait`, milliseconds of a step in which it waits for images;
            `exchanges`, a pair for each collective operation of all steps, its begin and its end in milliseconds.
        """
        model = self._model(synchronized)
        with tempfile.TemporaryDirectory() as folder:
            model.fit(
                self._workers.distribute(self._stream(self._batch)),
                epochs=1,
                steps_per_epoch=TRACED_STEPS + 4,
                shuffle=False,
                callbacks=[Profiler(folder, first_step=3, steps=TRACED_STEPS)],
                verbose=0,
            )
            (path,) = Path(folder).rglob("*.xplane.pb")
            return read_trace(path)

    def _model(self, synchronized):
        if synchronized not in self._models:
            self._models[synchronized] = self._build(self._width, synchronized)
        return self._models[synchronized]

    def _build(self, width, synchronized, steps_per_execution=1):
        info = data.get(DATASET)
        with self._workers.strategy.scope():
            model = models.build(
                self._name,
                info.image_shape,
                info.classes,
                width=width,
                synchronized_batch_norm=synchronized,
                seed=0,
            )
            model.compile(
                SGD(TIMED_LEARNING_RATE, momentum=0.9),
                loss=losses.CrossEntropyBits(),
                metrics=["accuracy", metrics.CrossEntropyBits(), metrics.LabelInformation(info.classes)],
                steps_per_execution=steps_per_execution,
            )
            model.optimizer.build(model.trainable_variables)
            model.compute_metrics(None, tf.zeros(1), tf.zeros((1, info.classes)))
        return model

    def _stream(self, batch):
        return data.training_batches(
            DATASET, "train", batch, epochs=None, seed=0, data_dir=self._data_dir, shards=self._workers.shards
        )

    def _iterator(self, batch):
        return iter(self._workers.distribute(self._stream(batch)))


def _seconds_of_step(model, batches, steps, steps_per_execution=1):
    """Takes steps by the function that `model.fit` calls, and waits for their logs, as `fit` does to show them."""
    begin, begin_cores = time.perf_counter(), time.process_time()
    for _ in range(steps // steps_per_execution):
        for value in model.train_function(batches).values():
            float(value)
    return (time.perf_counter() - begin) / steps, (time.process_time() - begin_cores) / steps


def networks(names):
    """What each step of a network exchanges and computes, at full size: nothing is allocated for it.

    Args:
        names: list of (name of a model, shape of an image, number of classes).

    Returns:
        List of dicts: `name`; `bytes` of its gradients; `tensors`, how many they are; `norms`, layers of batch
        normalisation; `multiplications` of a forward pass of one image in convolutions and matrix products.
    """
    found = []
    for name, shape, classes in names:
        # Variables that are made here have a shape and no value.
        with keras.StatelessScope(initialize_variables=False):
            model = models.build(name, tuple(shape), classes)
            forward = tf.function(lambda images, model=model: model(images, training=False))
            graph = forward.get_concrete_function(tf.TensorSpec((1, *shape), "float32")).graph
        variables = model.trainable_variables
        norms = [each for each in model._flatten_layers() if isinstance(each, keras.layers.BatchNormalization)]
        found.append(
            {
                "name": name,
                "bytes": sum(math.prod(each.shape) * tf.as_dtype(each.dtype).size for each in variables),
                "tensors": len(variables),
                "norms": len(norms),
                "multiplications": sum(_multiplications(operation) for operation in graph.get_operations()),
            }
        )
    return found


def _multiplications(operation):
    if operation.type == "Conv2D":
        return math.prod(operation.outputs[0].shape[1:]) * math.prod(operation.inputs[1].shape[:3])
    if operation.type == "MatMul":
        return math.prod(operation.outputs[0].shape) * operation.inputs[0].shape[-1]
    return 0


# ---------------------------------------------------------------------------------------------------- reading a trace


def read_trace(path):
    """Sums up a trace of training steps on CPUs, as `Process.trace` says.

    An operation counts from its begin to its end, without those that it calls. Threads that help with one operation
    are not in the trace, and a thread that had to wait for its core counts as busy.
    """
    # Here in TensorFlow 2.18 to 2.21; it is no public interface.
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace()
    space.ParseFromString(Path(path).read_bytes())
    operations, steps, exchanges, input_wait = {}, [], [], 0.0
    for plane in space.planes:
        names = plane.event_metadata
        for line in plane.lines:
            begin = line.timestamp_ns / 1e6
            events = [
                (names[event.metadata_id].name, begin + event.offset_ps / 1e9, event.duration_ps / 1e9)
                for event in line.events
            ]
            steps += [duration for name, _, duration in events if name == "train"]
            if line.name.startswith("collective_ops"):
                # The exchange itself, of each replica; it waits there for the others.
                exchanges += [[start, start + duration] for name, start, duration in events if name == "Loop"]
                continue
            if line.name.startswith("tf_data_iterator_get_next"):
                input_wait += sum(duration for name, _, duration in events if name == "IteratorGetNextOp::DoCompute")
                continue
            for name, milliseconds in own_times(events):
                kind = _INPUT if line.name.startswith("tf_data") else ""
                operation = _OPERATION.fullmatch(name)
                if operation and operation["type"] not in _WAITING:
                    kind = kind or next(kind for kind, fits in _KINDS if fits(operation["path"], operation["type"]))
                elif name.startswith("ExecutorState::Process"):
                    kind = kind or _EXECUTOR
                else:
                    continue  # marks of the interpreter, and of iterators that wait for the one before them
                operations[kind] = operations.get(kind, 0.0) + milliseconds
    if not steps or not operations:
        raise ValueError(f"There are no steps or no operations in this trace. Received: path={str(path)!r}")
    return {
        "steps": len(steps),
        "step": sorted(steps)[len(steps) // 2],
        "operations": {kind: total / len(steps) for kind, total in operations.items()},
        "input_wait": input_wait / len(steps),
        "exchanges": sorted(exchanges),
    }


def own_times(events):
    """Yields (name, duration without the events inside it) of the events of one thread.

    Args:
        events: list of (name, begin, duration), nested or apart.
    """
    open_events = []  # [name, end, own time]
    for name, begin, duration in sorted(events, key=lambda event: (event[1], -event[2])):
        while open_events and open_events[-1][1] <= begin:
            done = open_events.pop()
            yield done[0], done[2]
        if open_events:
            open_events[-1][2] -= duration
        open_events.append([name, begin + duration, duration])
    for done in open_events:
        yield done[0], done[2]


def main():
    """Answers until its input ends."""
    answers = sys.stdout
    # Whatever else is printed must not look like an answer.
    with contextlib.redirect_stdout(sys.stderr):
        process = None
        for line in sys.stdin:
            question, *arguments = json.loads(line)
            if question == "start":
                process = Process(*arguments)
                answer = None
            elif question == "networks":
                answer = networks(*arguments)
            else:
                answer = getattr(process, question)(*arguments)
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
