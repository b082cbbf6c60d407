"""The client of an exported model: asks TensorFlow Serving for predictions, over gRPC or REST.

`aib_tf.export.saved_model` writes what the server loads; `scripts/predict.py` is this client on the command line.
"""

from aib_tf.serving.client import Client
from aib_tf.serving.errors import ServingError
from aib_tf.serving.signatures import Signature, TensorSpec

__all__ = ["Client", "ServingError", "Signature", "TensorSpec"]
