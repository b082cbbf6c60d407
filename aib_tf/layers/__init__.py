"""Keras layers: variational spatial attention, anchor quantizer, Gaussian bottleneck."""

from aib_tf.layers.anchor_quantizer import AnchorQuantizer
from aib_tf.layers.gaussian_bottleneck import GaussianBottleneck
from aib_tf.layers.variational_attention import VariationalSpatialAttention

__all__ = ["AnchorQuantizer", "GaussianBottleneck", "VariationalSpatialAttention"]
