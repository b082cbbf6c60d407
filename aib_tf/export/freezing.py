"""Turns a function of Keras layers into a graph of constants, made for inference.

What is traced is checked, its variables become constants, all that can be is folded, and then products may be computed
in bfloat16 or with fewer multiplications; what comes out is checked again.
"""

import tensorflow as tf
from tensorflow.python.framework import op_def_registry
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2_as_graph

from aib_tf.export.bfloat16 import compute_in_bfloat16
from aib_tf.export.folding import fold_affine, fold_checks, fold_constants, fold_forwarding, keep_apart
from aib_tf.export.graph import BATCH_NORMS, Graph, attribute, import_graph
from aib_tf.export.winograd import convolve_by_winograd
from aib_tf.validation import check_choice

__all__ = ["freeze"]

DTYPES = ("float32", "bfloat16")

# What TensorFlow marks as stateful and changes nothing: a check of a request, and calls, whose functions are looked at.
_CALLS = {"If", "While", "Case", "StatefulPartitionedCall", "Assert"}
_READS = {"VarHandleOp", "ReadVariableOp", "ResourceGather", "ResourceGatherNd"}


def freeze(function, specs, dtype="float32", fast_convolutions=True):
    """Traces a function and returns it with constants in place of variables, and without batch normalisation.

    Variables become constants with their present values. What scales and shifts the channels behind a convolution or
    matrix product of constant weights, be it a bias, `BatchNormalization` in any of its forms or other arithmetic with
    constants, is folded into the weights in float64, where nothing else reads what lies between. What can be computed
    from constants alone is. The result runs only ops of TensorFlow that `function` ran.

    The returned function can be called eagerly and inside other `tf.function`s, and saved with them: the constants are
    stored once, however many signatures call it.

    Args:
        function: callable with tensors as positional arguments. It returns a tensor, or a tuple, list or dict of them
            (nested or not). Keras layers in it must be called for inference, with `training=False`.
        specs: sequence of `tf.TensorSpec`, one for each argument; an axis may be None.
        dtype: "float32" computes as the layers do. "bfloat16" computes float32 convolutions and matrix products with
            constant weights in bfloat16 and stores these weights so, which halves them; all else, and every product
            whose result (with its bias) is an output, such as the logits, stays float32, and so do inputs and outputs.
            It needs no special CPU; only one with AMX or AVX512_BF16 is faster by it.
        fast_convolutions: whether large float32 3x3 convolutions of stride 1 over maps of a known size are computed by
            Winograd's minimal filtering, see `aib_tf.export.winograd`: faster on CPUs, for weights of twice the size.

    Returns:
        A `ConcreteFunction` with the arguments' names and the structure of outputs of `function`.

    Raises:
        TypeError: if `function` returns something else than tensors.
        ValueError: if `function` changes a variable, draws from a stateful generator, reads a table, or does
            anything else whose result could differ between two calls; or normalises by the statistics of the batch.

    Example:
        encode = freeze(lambda x: model.encoder(x, training=False), [tf.TensorSpec(model.encoder.input_shape)])
    """
    check_choice("dtype", dtype, DTYPES)
    traced = tf.function(function, autograph=False).get_concrete_function(*specs)
    outputs = traced.structured_outputs
    _require_tensors(function, outputs)
    _require_stateless(traced.graph.as_graph_def(), _READS, _variable_names(traced))

    arguments = [tf.TensorSpec.from_tensor(tensor) for tensor in traced.inputs[: len(specs)]]
    names = [tensor.name for tensor in tf.nest.flatten(outputs)]
    graph = Graph(convert_variables_to_constants_v2_as_graph(traced, lower_control_flow=False)[1], arguments, names)
    graph.replace_captures(traced.graph.captures)
    fold_forwarding(graph)
    fold_affine(graph)
    # Each may make something for the others to do, so all run until none does.
    while fold_constants(graph) | fold_checks(graph) | fold_forwarding(graph):
        pass
    if dtype == "bfloat16":
        compute_in_bfloat16(graph)
    if fast_convolutions:
        convolve_by_winograd(graph)
    keep_apart(graph)
    graph.prune()
    graph_def = graph.to_graph_def()
    _require_stateless(graph_def, set(), {})

    def frozen(*tensors):
        tensors = {spec.name: tensor for spec, tensor in zip(arguments, tensors, strict=True)}
        results = import_graph(graph_def, tensors, names)
        for result, tensor in zip(results, tf.nest.flatten(outputs), strict=True):
            result.set_shape(tensor.shape)
        return tf.nest.pack_sequence_as(outputs, results)

    frozen.__name__ = getattr(function, "__name__", "frozen").strip("<>")
    return tf.function(frozen, input_signature=arguments, autograph=False).get_concrete_function()


def _require_tensors(function, outputs):
    leaves = tf.nest.flatten(outputs)
    wrong = [leaf for leaf in leaves if not isinstance(leaf, tf.Tensor)]
    if wrong or not leaves:
        received = wrong[0] if wrong else outputs
        raise TypeError(f"The function must return tensors. Received: function={function!r}, which gives {received!r}")


def _variable_names(traced):
    """Names of variables by the names of the placeholders that stand for them in the graph."""
    variables = {id(variable.handle): variable.name for variable in traced.graph.variables}
    return {inner.op.name: variables.get(id(outer), "") for outer, inner in traced.graph.captures}


def _require_stateless(graph_def, allowed, variables):
    """Raises ValueError if the graph or a function in its library could act differently from call to call."""
    for node in [node for function in graph_def.library.function for node in function.node_def] + list(graph_def.node):
        if node.op in BATCH_NORMS and attribute(node, "is_training").b:
            raise ValueError(
                "A frozen function cannot normalise by the statistics of its batch; call the layers with "
                f"`training=False`. Received: {node.op} {node.name!r}"
            )
        definition = op_def_registry.get(node.op)
        if definition is None or not definition.is_stateful or node.op in _CALLS or node.op in allowed:
            continue
        name = next((variables[name] for name in node.input if variables.get(name)), None)
        of_variable = f" of variable {name!r}" if name else ""
        raise ValueError(
            "A frozen function must neither change nor depend on state; call the layers with `training=False` and "
            "leave out those that update metrics or draw random numbers. "
            f"Received: stateful op {node.op} {node.name!r}{of_variable}"
        )
