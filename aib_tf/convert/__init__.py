"""Weights of PyTorch networks."""

from aib_tf.convert.checkpoint import CheckpointError, read_checkpoint, write_checkpoint

__all__ = ["CheckpointError", "read_checkpoint", "write_checkpoint"]
