"""SavedModels for TensorFlow Serving and every other runtime that reads them."""

from aib_tf.export.exporter import next_version, saved_model
from aib_tf.export.inference import MAX_SAMPLES
from aib_tf.export.portability import UnportableModelError, check_stock_operations
from aib_tf.export.warmup import WARMUP_BATCH_SIZES

__all__ = [
    "MAX_SAMPLES",
    "WARMUP_BATCH_SIZES",
    "UnportableModelError",
    "check_stock_operations",
    "next_version",
    "saved_model",
]
