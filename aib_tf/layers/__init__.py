"""Keras layers: variational spatial attention, anchor quantizer, Gaussian bottleneck, and "pay attention"."""

from aib_tf.layers.anchor_quantizer import AnchorQuantizer
from aib_tf.layers.gaussian_bottleneck import GaussianBottleneck
from aib_tf.layers.pay_attention import PayAttention
from aib_tf.layers.variational_attention import VariationalSpatialAttention

__all__ = ["AnchorQuantizer", "GaussianBottleneck", "PayAttention", "VariationalSpatialAttention"]
