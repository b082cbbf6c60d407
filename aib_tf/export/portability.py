"""Whether a stock TensorFlow can run a SavedModel."""

from pathlib import Path

import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

# TensorFlow's own, and yet they call the Python process that made the graph.
_PYTHON_OPS = frozenset({"EagerPyFunc", "PyFunc", "PyFuncStateless"})


class UnportableModelError(ValueError):
    """A SavedModel holds operations that a stock TensorFlow does not have."""


def check_stock_operations(folder, xla=False):
    """Checks that every operation of a SavedModel, and of all its functions, is one of TensorFlow's own.

    Args:
        folder: the folder of the SavedModel.
        xla: whether functions may demand to be compiled by XLA, which a server has to have been started with.

    Raises:
        UnportableModelError: if not; it lists the operations and where they stand.
    """
    saved_model = saved_model_pb2.SavedModel.FromString(Path(folder, "saved_model.pb").read_bytes())
    graphs = [meta_graph.graph_def for meta_graph in saved_model.meta_graphs]
    stock = {name for name in dir(tf.raw_ops) if not name.startswith("_")} - _PYTHON_OPS
    foreign = {}
    for place, node in (each for graph in graphs for each in _nodes(graph)):
        # Grappler's fused kernels, which begin with an underscore, are made anew by whoever loads a graph.
        if node.op not in stock:
            foreign.setdefault(node.op, place)
    if foreign:
        listed = ", ".join(f"{name} (in {place})" for name, place in sorted(foreign.items()))
        raise UnportableModelError(
            "A stock TensorFlow Serving cannot run this model: an operation of its graph is not TensorFlow's own, or "
            f"calls Python. Write the layer that makes it with keras.ops. Received: {listed}"
        )
    compiled = sorted(
        function.signature.name
        for graph in graphs
        for function in graph.library.function
        if function.attr["_XlaMustCompile"].b
    )
    if compiled and not xla:
        raise UnportableModelError(
            "A stock TensorFlow Serving cannot run this model: a part of it was made with jit_compile=True, and the "
            f"server leaves XLA out unless it is told otherwise. Received: functions {', '.join(compiled)}"
        )


def _nodes(graph):
    """Yields (where it stands, node) for a graph and its functions, without calls of these by their names."""
    functions = {function.signature.name for function in graph.library.function}
    places = [("the graph", graph.node)]
    places += [(f"function {function.signature.name}", function.node_def) for function in graph.library.function]
    for place, nodes in places:
        for node in nodes:
            if node.op not in functions:
                yield place, node
