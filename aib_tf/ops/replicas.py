"""What a layer has to know of the replicas of `tf.distribute`, on the backend that has them."""

import keras
from keras import ops

# Odd, so that the seeds of all replicas differ; large, so that they stay apart from those of other layers.
_STRIDE = 0x61C88647


class SeedGenerator(keras.random.SeedGenerator):
    """A `keras.random.SeedGenerator` whose draws differ between replicas.

    Under `tf.distribute` every replica holds the same state, so that Keras's own generator gives all of them the same
    noise: a batch on n devices would have each noise vector n times. Here a replica adds a multiple of its number to
    the seed that it draws. The state stays the same everywhere: it can be saved, and read again for another number of
    replicas. The first replica, and a single device, draw what Keras's generator draws.

    Args:
        seed: int, or None for a random one.
        name: name of the state's variable.
    """

    def next(self, ordered=True):
        """Returns the seed of the next draw, (2,) integers, and moves the state on."""
        seed = super().next(ordered)
        context = _context()
        if context is None or context.num_replicas_in_sync == 1:
            return seed
        stride = ops.convert_to_tensor([_STRIDE, 0], dtype=seed.dtype)
        return seed + ops.cast(ops.convert_to_tensor(context.replica_id_in_sync_group), seed.dtype) * stride


def sum_over_replicas(values):
    """The sum over all replicas of a tensor that each of them has; its gradient is exchanged likewise."""
    context = _context()
    if context is None or context.num_replicas_in_sync == 1:
        return values
    return context.all_reduce("SUM", values)


def mark_own(loss):
    """Notes on a tensor of a loss which replica it is of, for `is_own`.

    The replicas of `tf.distribute.MirroredStrategy` are threads that share the layers, and with them the lists that
    Keras's `add_loss` appends to. Where a step exchanges something before its loss is summed, as synchronised batch
    normalisation does, a replica finds the losses of others there. They have no gradient in it, but they would be
    reported.

    Args:
        loss: scalar tensor.

    Returns:
        The same tensor.
    """
    context = _context()
    if context is not None and context.num_replicas_in_sync > 1:
        loss._aib_tf_replica = context  # each replica has an object of its own
    return loss


def is_own(loss):
    """Whether a loss is not that of another replica."""
    replica = getattr(loss, "_aib_tf_replica", None)
    return replica is None or replica is _context()


def _context():
    """The `tf.distribute.ReplicaContext` of this replica, or None outside of one."""
    if keras.config.backend() != "tensorflow":
        return None
    import tensorflow as tf

    return tf.distribute.get_replica_context()
