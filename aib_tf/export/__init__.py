"""SavedModels for TensorFlow Serving and every other runtime that reads them."""

from aib_tf.export.exporter import saved_model
from aib_tf.export.portability import UnportableModelError

__all__ = ["UnportableModelError", "saved_model"]
