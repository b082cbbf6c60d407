"""A TensorFlow graph that can be read and edited, node by node."""

import hashlib

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2
from tensorflow.python.framework import op_def_registry

BATCH_NORMS = {"FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"}
# Their second input are the weights.
PRODUCTS = {"Conv2D", "DepthwiseConv2dNative", "MatMul"}
# At inference these return what they get.
FORWARDING = {"Identity", "IdentityN", "StopGradient", "PreventGradient", "Snapshot"}


class Graph:
    """The nodes of a GraphDef by name.

    Args:
        graph_def: GraphDef, consumed.
        arguments: sequence of `tf.TensorSpec` with the names of the placeholders of the arguments.
        outputs: names of output tensors, "node:0".
    """

    def __init__(self, graph_def, arguments, outputs):
        self.nodes = {node.name: node for node in graph_def.node}
        self.library = graph_def.library
        self.versions = graph_def.versions
        self.arguments = {spec.name: spec for spec in arguments}
        self.outputs = {source(name)[0] for name in outputs}
        self._constants = {}
        for node in self.nodes.values():
            node.device = ""
            # Colocation names nodes that may vanish; Python's gradients are none of a server's.
            for name in ("_class", "_gradient_op_type", "_output_shapes"):
                node.attr.pop(name, None)
        self._release_from_xla()

    def _release_from_xla(self):
        """Lets functions run without XLA, which Keras demands for grouped convolutions, and servers leave out."""
        renamed = {}
        for function in self.library.function:
            if function.attr["_XlaMustCompile"].b:
                # The process holds the function by its name, with the demand.
                renamed[function.signature.name] = f"{function.signature.name}_without_xla"
                function.signature.name = renamed[function.signature.name]
            function.attr.pop("_XlaMustCompile", None)
        bodies = [function.node_def for function in self.library.function]
        for node in (each for nodes in (self.nodes.values(), *bodies) for each in nodes):
            node.attr.pop("_XlaMustCompile", None)
            for value in node.attr.values():
                for called in (value.func, *value.list.func):
                    if called.name in renamed:
                        called.name = renamed[called.name]

    def to_graph_def(self, names=None):
        """The GraphDef of some nodes, or of all but the arguments, with the functions that they call."""
        names = self.nodes.keys() - self.arguments.keys() if names is None else names
        nodes = [node for name, node in self.nodes.items() if name in names]
        graph_def = tf.compat.v1.GraphDef(node=nodes, versions=self.versions)
        functions = {function.signature.name: function for function in self.library.function}
        waiting, called = nodes, {}
        while waiting:
            for name in _functions_of(waiting.pop()):
                if name in functions and name not in called:
                    called[name] = functions[name]
                    waiting += functions[name].node_def
        graph_def.library.function.extend(called.values())
        return graph_def

    def users(self):
        """Maps a node's name to the (node, position, output index) that read it; -1 is the index of a control edge."""
        users = {name: [] for name in self.nodes}
        for node in self.nodes.values():
            for position, tensor in enumerate(node.input):
                name, index = source(tensor)
                users[name].append((node, position, index))
        return users

    def ordered(self):
        """Names of nodes, each behind those that it reads; there are no loops, which are within functions."""
        done, order = set(), []
        for start in self.nodes:
            stack = [(start, False)]
            while stack:
                name, ready = stack.pop()
                if ready:
                    order.append(name)
                elif name not in done:
                    done.add(name)
                    stack.append((name, True))
                    stack += [(source(tensor)[0], False) for tensor in self.nodes[name].input]
        return order

    def value(self, tensor):
        """A tensor as an array, floats in float64, if simple arithmetic makes it of constants, else None."""
        name, index = source(tensor)
        node = self.nodes[name]
        if index != 0:
            return None
        if node.op == "Const":
            array = tf.make_ndarray(attribute(node, "value").tensor)
            return array.astype(np.float64) if tf.as_dtype(array.dtype).is_floating else array
        if node.op not in _ARITHMETIC or has_control_inputs(node):
            return None
        types = [attribute(node, key).type for key in ("SrcT", "DstT")]
        if node.op == "Cast" and not all(tf.as_dtype(each).is_floating for each in types):
            return None
        values = [self.value(each) for each in node.input]
        if any(value is None for value in values):
            return None
        return _ARITHMETIC[node.op](node, *values)

    def input_shapes(self, op):
        """Maps names of nodes of a type to the shapes of their first inputs, lists, where the rank is known."""
        names = [name for name, node in self.nodes.items() if node.op == op]
        with tf.Graph().as_default():
            arguments = {
                name: tf.compat.v1.placeholder(spec.dtype, spec.shape, name) for name, spec in self.arguments.items()
            }
            operations = import_graph(self.to_graph_def(), arguments, names)
        shapes = {name: operation.inputs[0].shape for name, operation in zip(names, operations, strict=True)}
        return {name: shape.as_list() for name, shape in shapes.items() if shape.rank is not None}

    def add(self, name, op, inputs=(), **types):
        """Adds a node, in the place of one of this name, with attributes that are dtypes; returns it."""
        node = tf.compat.v1.NodeDef(name=name, op=op, input=inputs)
        for key, dtype in types.items():
            node.attr[key].type = tf.as_dtype(dtype).as_datatype_enum
        self.nodes[name] = node
        return node

    def add_constant(self, name, proto):
        """Adds a TensorProto as a node, in the place of one of this name."""
        self.add(name, "Const", dtype=proto.dtype).attr["value"].tensor.CopyFrom(proto)

    def constant(self, name, array, dtype):
        """Adds an array as a constant and returns its name; that of an equal one where this made one already."""
        array = np.asarray(array).astype(tf.as_dtype(dtype).as_numpy_dtype)
        key = (tf.as_dtype(dtype), array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._constants:
            self._constants[key] = self.unused(name)
            self.add_constant(self._constants[key], tf.make_tensor_proto(array, dtype))
        return self._constants[key]

    def unused(self, name):
        """The name, with a number behind it if a node has it already."""
        candidate, number = name, 1
        while candidate in self.nodes:
            candidate, number = f"{name}_{number}", number + 1
        return candidate

    def replace_captures(self, captures):
        """Turns eager tensors that the function closes over into constants, given as (outer, inner) tensors."""
        for outer, inner in captures:
            node = self.nodes.get(inner.op.name)
            if node is not None and node.op == "Placeholder" and outer.dtype not in (tf.resource, tf.variant):
                self.add_constant(node.name, tf.make_tensor_proto(outer.numpy(), outer.dtype))

    def redirect(self, replacements):
        """Lets what reads a tensor, by its name, read another one."""
        for node in self.nodes.values():
            for position, tensor in enumerate(node.input):
                while tensor in replacements:
                    tensor = replacements[tensor]
                node.input[position] = tensor

    def splice(self, name, tensor, shape, build):
        """Puts what `build` makes of a float32 tensor of a shape in the place of a node."""
        with tf.Graph().as_default() as graph:
            x = tf.compat.v1.placeholder(tf.float32, shape, name="x")
            result = build(x).op.name
        for node in graph.as_graph_def().node:
            if node.op == "Placeholder":
                continue
            node.name = name if node.name == result else f"{name}/{node.name}"
            node.input[:] = [tensor if each == x.op.name else f"{name}/{each}" for each in node.input]
            self.nodes[node.name] = node

    def prune(self):
        """Drops what no output needs; the arguments stay."""
        needed, waiting = set(), [*self.outputs, *self.arguments]
        while waiting:
            name = waiting.pop()
            if name not in needed:
                needed.add(name)
                waiting += [source(tensor)[0] for tensor in self.nodes[name].input]
        self.nodes = {name: node for name, node in self.nodes.items() if name in needed}


def import_graph(graph_def, arguments, elements):
    """Adds a GraphDef to the graph that is being built.

    Args:
        graph_def: GraphDef, without the placeholders of its arguments.
        arguments: dict of tensors by the names of these placeholders; some may be read by nothing.
        elements: names of tensors, "node:0", or of operations.

    Returns:
        List of the elements.
    """
    read = {source(tensor)[0] for node in graph_def.node for tensor in node.input}
    arguments = {name: tensor for name, tensor in arguments.items() if name in read}
    return tf.graph_util.import_graph_def(graph_def, input_map=arguments, return_elements=elements, name="")


def source(tensor):
    """The name of the node that makes a tensor, and which of its outputs it is; -1 for a control edge."""
    if tensor.startswith("^"):
        return tensor[1:], -1
    name, _, index = tensor.partition(":")
    return name, int(index or 0)


def tensor_name(name, index):
    """The form in which a GraphDef names a tensor."""
    return f"{name}:{index}" if index else name


def attribute(node, name):
    """An attribute of a node, or an empty one, which the map itself would then hold."""
    return node.attr[name] if name in node.attr else attr_value_pb2.AttrValue()


def computes_in(node, dtype):
    """Whether a dtype is that of the node, its attribute "T"."""
    return attribute(node, "T").type == dtype.as_datatype_enum


def is_channels_last(node):
    """Whether channels are the last axis of what a node reads, or it knows none."""
    return attribute(node, "data_format").s in (b"", b"NHWC")


def is_stateful(node):
    """Whether a node may act differently from call to call, or fail; unknown ones may."""
    definition = op_def_registry.get(node.op)
    return definition is None or definition.is_stateful


def has_control_inputs(node):
    """Whether a node waits for others."""
    return any(tensor.startswith("^") for tensor in node.input)


def _functions_of(node):
    """Names of the functions that a node calls."""
    for value in node.attr.values():
        for function in [value.func, *value.list.func]:
            if function.name:
                yield function.name


_ARITHMETIC = {
    "Add": lambda node, x, y: x + y,
    "AddV2": lambda node, x, y: x + y,
    "Sub": lambda node, x, y: x - y,
    "Mul": lambda node, x, y: x * y,
    "RealDiv": lambda node, x, y: x / y,
    "Neg": lambda node, x: -x,
    "Reciprocal": lambda node, x: 1 / x,
    "Rsqrt": lambda node, x: 1 / np.sqrt(x),
    "Sqrt": lambda node, x: np.sqrt(x),
    "Square": lambda node, x: x * x,
    "Identity": lambda node, x: x,
    "Cast": lambda node, x: x,
    "Reshape": lambda node, x, shape: x.reshape(shape),
    "ExpandDims": lambda node, x, axis: np.expand_dims(x, int(axis)),
    "Squeeze": lambda node, x: np.squeeze(x, tuple(attribute(node, "squeeze_dims").list.i) or None),
}
