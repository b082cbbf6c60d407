"""Operations: the Python face of the compiled code, and the pure path that always works."""

from aib_tf.ops.custom_op import Implementation, implementation
from aib_tf.ops.nearest_anchor import NearestAnchor, nearest_anchor

__all__ = ["Implementation", "NearestAnchor", "implementation", "nearest_anchor"]
