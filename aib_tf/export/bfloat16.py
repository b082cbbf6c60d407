"""Lets a graph compute its convolutions and matrix products in bfloat16, with weights of half the size."""

import tensorflow as tf

from aib_tf.export.graph import FORWARDING, PRODUCTS, attribute, computes_in, has_control_inputs, source

# Of bfloat16 numbers these make the same in bfloat16 as in float32: they choose among them, or move them.
_EXACT = {"Relu", "Relu6", "MaxPool", "Pad", "Reshape", "Squeeze", "ExpandDims", "Transpose"}


def compute_in_bfloat16(graph):
    """Computes products of constant weights in bfloat16, with what follows as long as it changes no number.

    A product whose result, with its bias, is an output stays float32, and so do all inputs and outputs.
    """
    users = graph.users()
    for name in graph.ordered():
        node = graph.nodes[name]
        if not computes_in(node, tf.float32) or has_control_inputs(node):
            continue
        if (node.op in PRODUCTS and _is_inner(graph, node, users)) or (
            node.op == "BiasAdd" and _widened(graph, node.input[0])
        ):
            _narrow_with_constant(graph, node)
        elif node.op == "Shape" and _widened(graph, node.input[0]):
            node.input[0] = _rounded(graph, node.input[0])
            node.attr["T"].type = tf.bfloat16.as_datatype_enum
        elif node.op in _EXACT and name not in graph.outputs and _widened(graph, node.input[0]):
            _narrow(graph, node, [_rounded(graph, node.input[0]), *node.input[1:]])


def _is_inner(graph, node, users):
    """Whether the result of a product, with its bias, goes into further computation."""
    while node.name not in graph.outputs:
        readers = users[node.name]
        if len(readers) != 1 or readers[0][0].op not in {"BiasAdd", *FORWARDING}:
            return True
        node = readers[0][0]
    return False


def _widened(graph, tensor):
    """The bfloat16 tensor that was cast to this one, or None."""
    node = graph.nodes[source(tensor)[0]]
    if node.op == "Cast" and node.attr["SrcT"].type == tf.bfloat16.as_datatype_enum:
        return node.input[0]
    return None


def _rounded(graph, tensor):
    """The tensor in bfloat16; equal to it if it was bfloat16 before."""
    widened = _widened(graph, tensor)
    if widened is not None:
        return widened
    name = "/".join([*tensor.split(":"), "to_bfloat16"])
    if name not in graph.nodes:
        graph.add(name, "Cast", [tensor], SrcT=tf.float32, DstT=tf.bfloat16)
    return name


def _narrow_with_constant(graph, node):
    """Lets a node compute in bfloat16 if its second input, weights or bias, is a constant."""
    constant = graph.nodes[source(node.input[1])[0]]
    if constant.op == "Const":
        array = tf.make_ndarray(attribute(constant, "value").tensor)
        stored = graph.constant(f"{constant.name}/bfloat16", array, tf.bfloat16)
        _narrow(graph, node, [_rounded(graph, node.input[0]), stored])


def _narrow(graph, node, inputs):
    """Lets a node compute in bfloat16 from other inputs, and gives its name to a cast back."""
    narrow = graph.add(graph.unused(f"{node.name}/bfloat16"), node.op, inputs)
    for key, value in node.attr.items():
        narrow.attr[key].CopyFrom(value)
    narrow.attr["T"].type = tf.bfloat16.as_datatype_enum
    graph.add(node.name, "Cast", [narrow.name], SrcT=tf.bfloat16, DstT=tf.float32)
