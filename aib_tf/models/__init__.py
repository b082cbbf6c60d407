"""Models: the AIB classifier, its backbones, and `build` to make one by name."""

from aib_tf.models.aib import AIBClassifier
from aib_tf.models.registry import build, names

__all__ = ["AIBClassifier", "build", "names"]
