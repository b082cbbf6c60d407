"""Whether a stock TensorFlow can run a SavedModel."""

from pathlib import Path

import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

# TensorFlow's own, and yet they call the Python process that made the graph.
_PYTHON_OPS = frozenset({"EagerPyFunc", "PyFunc", "PyFuncStateless"})


class UnportableModelError(ValueError):
    """A SavedModel holds operations that a stock TensorFlow does not have."""


def check_stock_operations(folder):
    """Checks that every operation of a SavedModel, and of all its functions, is one of TensorFlow's own.

    Args:
        folder: the folder of the SavedModel.

    Raises:
        UnportableModelError: if not; it lists the operations and where they stand.
    """
    stock = {name for name in dir(tf.raw_ops) if not name.startswith("_")} - _PYTHON_OPS
    foreign = {}
    for name, place in _operations(folder):
        # Grappler's fused kernels, which begin with an underscore, are made anew by whoever loads a graph.
        if name not in stock:
            foreign.setdefault(name, place)
    if foreign:
        listed = ", ".join(f"{name} (in {place})" for name, place in sorted(foreign.items()))
        raise UnportableModelError(
            "A stock TensorFlow Serving cannot run this model: an operation of its graph is not TensorFlow's own, or "
            f"calls Python. Write the layer that makes it with keras.ops. Received: {listed}"
        )


def _operations(folder):
    """Yields (operation, where it stands) for the graph and the functions of a SavedModel, calls of these left out."""
    saved_model = saved_model_pb2.SavedModel()
    saved_model.ParseFromString(Path(folder, "saved_model.pb").read_bytes())
    for meta_graph in saved_model.meta_graphs:
        graph = meta_graph.graph_def
        functions = {function.signature.name for function in graph.library.function}
        places = [("the graph", graph.node)]
        places += [(f"function {function.signature.name}", function.node_def) for function in graph.library.function]
        for place, nodes in places:
            for node in nodes:
                if node.op not in functions:
                    yield node.op, place
