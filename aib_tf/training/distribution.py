"""Several devices and several machines: `tf.distribute` strategies by name, and what training needs around them.

The engine is TensorFlow's. Here are the choice of a strategy, the share of the images that each process feeds to its
devices, and what Keras leaves different between replicas.
"""

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import signal
import threading

import keras
import numpy as np
import tensorflow as tf

from aib_tf.config import STRATEGIES
from aib_tf.data import Shards
from aib_tf.training import cluster, collectives, keras_multi_worker
from aib_tf.training.cluster import ClusterError
from aib_tf.validation import check_choice

_VERSIONS = ("aib_tf", "tensorflow", "keras", "numpy")
# What TensorFlow raises in the workers that are left when one of them is gone.
_LOST = (tf.errors.UnavailableError, tf.errors.DeadlineExceededError, tf.errors.AbortedError, tf.errors.CancelledError)
_START_SECONDS = 120.0  # for TensorFlow's servers to find one another, when all processes are there
_OTHER_TASK = re.compile(r"/task:(\d+)")

_logger = logging.getLogger("aib_tf")

# One of a kind for the process: TensorFlow has one cluster, and the exchanges of two strategies would meet each other.
_made = {}


class WorkerLostError(ConnectionError):
    """Another worker of the cluster is gone, so that this one cannot go on."""


def strategy(name="auto"):
    """Makes the `tf.distribute.Strategy` to build and train a model in.

    - one_device: the first GPU, or the CPU.
    - mirrored: all GPUs of this machine (without a GPU, all logical CPUs), each with a copy of the model.
    - multi_worker: all devices of all processes that TF_CONFIG, Slurm or Kubernetes name, as
      `aib_tf.training.cluster.find` reads them; to be called before TensorFlow is used for anything else. The processes
      meet first, and go on only if they are of one mind about addresses and versions. Keras is mended for it.
    - auto: what is there: several processes, several GPUs, or one device.

    Args:
        name: one of these.

    Returns:
        A `tf.distribute.Strategy`; for several devices or processes a second call returns the first one's.

    Raises:
        ValueError: for another name.
        ClusterError: if the devices or processes are not there, or are not alike.

    Example:
        >>> strategy = aib_tf.training.distribution.strategy("auto")
        >>> with strategy.scope():
        ...     model = aib_tf.models.build("vgg_aib_qt", (32, 32, 3), classes=10)
        ...     model.compile("adam", loss=aib_tf.losses.CrossEntropyBits())
    """
    check_choice("strategy", name, STRATEGIES)
    if name in ("auto", "multi_worker"):
        workers = cluster.find()
        if name == "multi_worker" and workers is None:
            raise ClusterError(
                "multi_worker needs to know its workers. Start them with scripts/launch.py, set TF_CONFIG for each, or "
                "use srun of Slurm or an Indexed Job of Kubernetes. Received: strategy='multi_worker', no TF_CONFIG"
            )
        if workers is not None and workers.size > 1:
            return _start(workers)
        name = "auto"
    # Not the logical ones, which would start TensorFlow: a strategy of several workers then comes too late.
    gpus = tf.config.get_visible_devices("GPU")
    if name == "one_device" or (name == "auto" and len(gpus) < 2):
        return tf.distribute.get_strategy()
    devices = tf.config.list_logical_devices("GPU" if gpus else "CPU")
    if len(devices) < 2:
        raise ClusterError(
            f"mirrored needs two devices or more, and TensorFlow finds {len(devices)} {'GPU' if gpus else 'CPU'}. Use "
            "--strategy=one_device, or auto, which takes what is there. Received: strategy='mirrored'"
        )
    keras_multi_worker.apply()
    names = tuple(f"{device.device_type}:{number}" for number, device in enumerate(devices))
    if names not in _made:
        _made[names] = tf.distribute.MirroredStrategy(names)
    return _made[names]


def _start(workers):
    if workers not in _made:
        versions = {**{name: _version(name) for name in _VERSIONS}, "python": platform.python_version()}
        devices = {"GPU": len(tf.config.get_visible_devices("GPU"))}
        keras_multi_worker.apply()
        _logger.info(
            "This is worker %d of %d at %s, as TF_CONFIG, Slurm or Kubernetes says. It waits for the others; "
            "--strategy=one_device trains alone.",
            workers.index,
            workers.size,
            workers.address,
        )
        cluster.meet(workers, {"versions": versions, "devices": devices})
        try:
            with _watchdog(workers):
                _made[workers] = tf.distribute.MultiWorkerMirroredStrategy(
                    cluster_resolver=tf.distribute.cluster_resolver.SimpleClusterResolver(
                        tf.train.ClusterSpec({"worker": list(workers.addresses)}),
                        task_type="worker",
                        task_id=workers.index,
                        rpc_layer="grpc",
                        # Without it the strategy takes one CPU of each worker, whatever GPUs there are.
                        num_accelerators=devices if devices["GPU"] else None,
                    )
                )
        except RuntimeError as error:
            raise ClusterError(
                "TensorFlow was used in this process before it was to join the others. Ask for the strategy first. "
                f"Received: strategy='multi_worker' ({error})"
            ) from error
    return _made[workers]


@contextlib.contextmanager
def _watchdog(workers):
    """Ends the process if TensorFlow waits too long for a worker that ended after the meeting.

    Its wait knows no limit and no signal, so that nothing gentler would end it, and nothing has been computed yet.
    Afterwards SIGTERM ends the process again, which TensorFlow's server would have swallowed.
    """

    def give_up():
        _logger.error(
            "TensorFlow has waited for %d s for all workers. One of them ended after all had met; its log says why. "
            "Worker %d ends, too; the same command may be given again.",
            _START_SECONDS,
            workers.index,
        )
        os._exit(75)  # EX_TEMPFAIL of sysexits.h

    timer = threading.Timer(_START_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        import aib_tf

        return aib_tf.__version__


class Workers:
    """The processes that train together, of which this is one; without a cluster there is just this one.

    All methods are to be called by all of them, in the same order.

    Args:
        strategy: the `tf.distribute.Strategy`.

    Attributes:
        strategy: the same.
        index: number of this process, counted from 0.
        size: number of processes.
        is_chief: whether this is the one that writes files, process 0.
        replicas: devices of all of them.
        shards: the `aib_tf.data.Shards` of each batch that this process feeds to its devices.
    """

    def __init__(self, strategy):
        self.strategy = strategy
        self.index = collectives.worker_index(strategy)
        self.size = collectives.worker_count(strategy)
        self.is_chief = self.index == 0
        self.replicas = strategy.num_replicas_in_sync
        own = self.replicas // self.size
        self.shards = Shards(self.replicas, self.index * own, own)

    def together(self, function):
        """Calls a function in each process; where it fails in one, all raise.

        Returns:
            What it returned in this one.

        Raises:
            Exception: what it raised in this one.
            ClusterError: if it went well here, and failed in another, whose error is told.
        """
        if self.size == 1:
            return function()
        result, failure = None, None
        try:
            result = function()
        except Exception as error:
            failure = error
        texts = collectives.gather_texts(
            self.strategy, "" if failure is None else f"{type(failure).__name__}: {failure}"
        )
        if failure is not None:
            raise failure
        failed = [f"worker {index}: {text}" for index, text in enumerate(texts) if text]
        if failed:
            raise ClusterError(
                f"Another worker cannot go on, so that this one stops, too. Received: {'; '.join(failed)}"
            )
        return result

    def from_chief(self, function):
        """Calls a function in the first process alone; where it fails, all raise.

        Returns:
            What it returned there, of JSON types, in all processes.
        """
        if self.size == 1:
            return function()
        result = self.together(function if self.is_chief else lambda: None)
        return json.loads(self.gather(json.dumps(result))[0])

    def gather(self, text):
        """Returns the texts of all processes, in order."""
        return collectives.gather_texts(self.strategy, text)

    def arrays_from_chief(self, arrays):
        """Returns the first process's list of NumPy arrays; what the others pass is not looked at."""
        return collectives.broadcast(self.strategy, arrays)

    def any(self, *flags):
        """For each flag, whether it is set in one of the processes."""
        if self.size == 1:
            return tuple(bool(flag) for flag in flags)
        values = tf.constant([float(bool(flag)) for flag in flags])
        return tuple(bool(value) for value in self.strategy.reduce("SUM", values, axis=None).numpy() > 0)

    @contextlib.contextmanager
    def watched(self):
        """Turns the errors by which TensorFlow tells of a lost worker into one that says what to do.

        Raises:
            WorkerLostError: when another process is gone.
        """
        try:
            yield
        except (*_LOST, tf.errors.InternalError) as error:
            # TensorFlow gives an internal error, too, where a collective operation was cut short.
            if self.size == 1 or (type(error) not in _LOST and "Collective ops is aborted" not in str(error)):
                raise
            named = {int(task) for task in _OTHER_TASK.findall(str(error))} - {self.index}
            who = f"Worker {named.pop()}" if len(named) == 1 else "Another worker"
            raise WorkerLostError(
                f"{who} was lost ({type(error).__name__}), so that worker {self.index} stops, too. The last checkpoint "
                "stays, and the same command, for all workers, continues from it. Why that worker was lost is in its "
                "own log."
            ) from error

    def distribute(self, batches):
        """Brings this process's shares of batches to its devices.

        Args:
            batches: a `tf.data.Dataset` made with `shards=self.shards`, without an end where there are several devices:
                TensorFlow would otherwise ask in each step whether all have data.

        Returns:
            What `model.fit` takes.
        """
        if self.replicas == 1:
            return batches
        return self.strategy.distribute_datasets_from_function(lambda _: batches)

    def share_statistics(self, model):
        """Gives all replicas the first one's running statistics.

        Each has its own after a training step with plain batch normalisation, of its share of the images, and would
        evaluate with them. The first one's are those that are saved. Training does not read them, so that nothing else
        changes.
        """
        if self.replicas == 1:
            return
        variables = [v for v in model.non_trainable_variables if keras.backend.is_float_dtype(v.dtype)]
        values = self.arrays_from_chief([np.asarray(variable) for variable in variables])
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
