"""Mends Keras 3 for `tf.distribute`: `fit`, `evaluate` and `predict` on several machines, and what fails on one.

See https://github.com/keras-team/keras/issues/20585. Three functions of Keras are at fault:

- `TensorFlowTrainer._maybe_symbolic_build` averages a batch over the replicas to learn its shapes. Several workers
  cannot do that, and devices of one process only if all have the same number of images. The shapes of one replica's
  share are all that is needed.
- `reduce_per_replica`, with several workers, averages each of a step's logs over a batch dimension that a scalar does
  not have.
- `LossScaleOptimizer.check_finite`, under mixed_float16, lets each replica look at its own gradients before they are
  summed. When those of one overflow and those of another do not, workers wait for one another for ever, and devices of
  one process apply gradients that are not finite.

Without a strategy, or with one replica, the replacements do what Keras does.
"""

import functools
import inspect
import logging

import keras
import tensorflow as tf

from aib_tf.training.cluster import ClusterError

_TRIED = ((3, 10), (3, 15))
_MARK = "_mended_by_aib_tf"
_logger = logging.getLogger("aib_tf")


def apply():
    """Makes `model.fit`, `evaluate` and `predict` work under `MultiWorkerMirroredStrategy` and `MirroredStrategy`.

    It changes three functions of Keras in this process, once however often it is called.

    The logs of a step, which callbacks see, are the mean over the replicas of what each replica's metrics say; all of
    them cost one collective. The results at the end of an epoch and of an evaluation are no such means: Keras computes
    them from the variables of the metrics, summed over the replicas.

    Raises:
        ClusterError: if the functions are not there as known, in a Keras that is older or newer than those tried.
    """
    for owner, name, _, mended in _checked_places():
        original = getattr(owner, name)
        if not hasattr(original, _MARK):
            replacement = functools.wraps(original)(mended(original))
            setattr(replacement, _MARK, True)
            setattr(owner, name, replacement)


def _checked_places():
    """(owner, name, parameters, maker of the replacement) of each function, after a look at whether it is as known."""
    try:
        from keras.src.backend.tensorflow import trainer

        places = [
            (trainer.TensorFlowTrainer, "_maybe_symbolic_build", ["self", "iterator", "data_batch"], _symbolic_build),
            (trainer, "reduce_per_replica", ["values", "strategy", "reduction"], _reduce_per_replica),
            (keras.optimizers.LossScaleOptimizer, "check_finite", ["self", "grads"], _check_finite),
        ]
        known = all(
            list(inspect.signature(getattr(owner, name)).parameters) == parameters
            for owner, name, parameters, _ in places
        )
    except (ImportError, AttributeError):
        known = False
    if not known:
        first, last = (".".join(map(str, tried)) for tried in _TRIED)
        raise ClusterError(
            "This version of aib_tf mends Keras for several machines as Keras "
            f"{first} to {last} is written, and the installed Keras is written otherwise. Install one of those, pip "
            f'install "keras>={first},<={last}.*", or train on one machine. '
            f"Received: keras.__version__={keras.__version__!r}"
        )
    version = tuple(int(number) for number in keras.__version__.split(".")[:2])
    if not _TRIED[0] <= version <= _TRIED[1]:
        _logger.warning("Training on several machines was not tried with Keras %s.", keras.__version__)
    return places


def _has_several_workers(strategy):
    # As Keras itself asks. There is no public way: the cluster resolver of a strategy can be empty.
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) and strategy.extended._in_multi_worker_mode()


def _symbolic_build(original):
    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        strategy = self._distribute_strategy
        if iterator is None or strategy is None:
            return original(self, iterator=iterator, data_batch=data_batch)
        # (step, iterator) in Keras 3.10, (first step, last step, iterator) in 3.15.
        *_, batches = next(iter(iterator))
        batch = tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], next(batches))
        return original(self, data_batch=batch)

    return _maybe_symbolic_build


def _reduce_per_replica(original):
    def reduce_per_replica(values, strategy, reduction):
        if not _has_several_workers(strategy) or reduction not in ("auto", "mean"):
            return original(values, strategy, reduction)
        return _mean(values, strategy)

    return reduce_per_replica


def _check_finite(original):
    def check_finite(self, grads):
        finite = original(self, grads)
        context = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:
            return finite
        count = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(finite, tf.float32))
        return tf.equal(count, float(context.num_replicas_in_sync))

    return check_finite


def _mean(values, strategy):
    """Means over all replicas, in float32 and in one collective, of a structure of tensors of known shapes."""
    flat = tf.nest.flatten(values)
    # With several devices a worker holds values of each of its replicas, which are alike in shape and dtype.
    specs = [tf.TensorSpec.from_tensor(strategy.experimental_local_results(value)[0]) for value in flat]
    if not any(spec.shape.num_elements() for spec in specs):
        return values  # TensorFlow's ring of empty tensors ends in a segmentation fault.

    def pack(*tensors):
        return tf.concat([tf.reshape(tf.cast(tensor, tf.float32), [-1]) for tensor in tensors], axis=0)

    packed = strategy.reduce("MEAN", strategy.run(pack, args=flat), axis=None)
    parts = tf.split(packed, [spec.shape.num_elements() for spec in specs])
    means = [tf.cast(tf.reshape(part, spec.shape), spec.dtype) for part, spec in zip(parts, specs, strict=True)]
    return tf.nest.pack_sequence_as(values, means)
