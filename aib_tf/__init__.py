"""Attention with an information bottleneck for TensorFlow and Keras.

The layers, models, losses, metrics and optimizers are imported here, so that `import aib_tf` registers them with Keras
and `keras.models.load_model` finds them. `aib_tf.convert`, `aib_tf.data`, `aib_tf.evaluation`, `aib_tf.export`,
`aib_tf.serving`, `aib_tf.training` and `aib_tf.visualization` are imported on first use: most of them need TensorFlow
whatever the Keras backend is.
"""

import importlib

from aib_tf import config, layers, losses, metrics, models, ops
from aib_tf import optimizers as _registered  # noqa: F401  offered by aib_tf.training; trained models are saved with them

__version__ = "0.1.0"

_IMPORTED_ON_FIRST_USE = ("convert", "data", "evaluation", "export", "serving", "training", "visualization")

__all__ = [
    "__version__",
    "config",
    "convert",
    "data",
    "evaluation",
    "export",
    "layers",
    "losses",
    "metrics",
    "models",
    "ops",
    "serving",
    "training",
    "visualization",
]


def __getattr__(name):
    if name in _IMPORTED_ON_FIRST_USE:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_IMPORTED_ON_FIRST_USE})
