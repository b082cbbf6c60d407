"""Weights of PyTorch networks: the released checkpoints, torchvision's, and the way back."""

from aib_tf.convert.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from aib_tf.convert.imagenet import fetch_imagenet
from aib_tf.convert.names import looks_like
from aib_tf.convert.pytorch import from_pytorch, load_backbone, to_pytorch

__all__ = [
    "CheckpointError",
    "fetch_imagenet",
    "from_pytorch",
    "load_backbone",
    "looks_like",
    "read_checkpoint",
    "to_pytorch",
    "write_checkpoint",
]
