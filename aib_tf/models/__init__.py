"""Models: AIB classifiers and "Learn To Pay Attention", by name or around any Keras model."""

from aib_tf.models.aib import AIBClassifier
from aib_tf.models.attach import attach_attention
from aib_tf.models.pay_attention import PayAttentionClassifier
from aib_tf.models.registry import build, names

__all__ = ["AIBClassifier", "PayAttentionClassifier", "attach_attention", "build", "names"]
