"""Turns a function of Keras layers into a graph of constants, made for inference.

    y = BatchNorm(W * x + b) = s (W * x + b - mean) + beta = (s W) * x + (s (b - mean) + beta),   s = gamma / stddev

A convolution or matrix product and whatever scales and shifts its channels afterwards is one convolution with other
weights. TensorFlow's own optimizer knows this for a product alone, and not across a bias.
"""

import functools
import hashlib

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2
from tensorflow.python.framework import op_def_registry
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2_as_graph

from aib_tf.export import winograd
from aib_tf.validation import check_choice

__all__ = ["freeze"]

DTYPES = ("float32", "bfloat16")

# What TensorFlow marks as stateful and changes nothing: a check of a request, and calls, whose functions are looked at.
_CALLS = {"If", "While", "Case", "StatefulPartitionedCall", "Placeholder", "Assert"}
_READS = {"VarHandleOp", "ReadVariableOp", "ResourceGather", "ResourceGatherNd"}
_PRODUCTS = {"Conv2D", "DepthwiseConv2dNative", "MatMul"}
# They move values of a channel to other places, and come behind a dilated convolution.
_MOVING = {"BatchToSpaceND"}
_BATCH_NORMS = {"FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"}
# At inference these return what they get.
_FORWARDING = {"Identity", "IdentityN", "StopGradient", "PreventGradient", "Snapshot"}
# Of bfloat16 numbers these make the same in bfloat16 as in float32: they choose among them, or move them.
_EXACT = {"Relu", "Relu6", "MaxPool", "Pad", "Reshape", "Squeeze", "ExpandDims", "Transpose"}
# A folded constant may be this large, or as large as what it was computed from: not a large fill or range.
_SMALL = 4096


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
    graph_def = convert_variables_to_constants_v2_as_graph(traced, lower_control_flow=False)[1]

    arguments = [tensor.op.name for tensor in traced.inputs[: len(specs)]]
    names = [tensor.name for tensor in tf.nest.flatten(outputs)]
    graph = _Graph(graph_def, arguments, names)
    graph.replace_captures(traced)
    graph.forward()
    with np.errstate(all="ignore"):  # what is not finite stays so, as in the layers
        graph.fold_affine()
    while graph.fold_constants() | graph.choose_branches() | graph.forward():
        pass
    if dtype == "bfloat16":
        graph.compute_in_bfloat16()
    if fast_convolutions:
        graph.convolve_by_winograd(traced.inputs[: len(specs)])
    graph.prune()
    frozen_def = graph.to_graph_def()
    _require_stateless(frozen_def, set(), {})

    read = {_source(tensor)[0] for node in frozen_def.node for tensor in node.input}
    signature = [tf.TensorSpec(spec.shape, spec.dtype, name=name) for spec, name in zip(specs, arguments, strict=True)]

    def frozen(*tensors):
        tensors = {name: tensor for name, tensor in zip(arguments, tensors, strict=True) if name in read}
        results = tf.graph_util.import_graph_def(frozen_def, input_map=tensors, return_elements=names, name="")
        for result, tensor in zip(results, tf.nest.flatten(outputs), strict=True):
            result.set_shape(tensor.shape)
        return tf.nest.pack_sequence_as(outputs, results)

    frozen.__name__ = getattr(function, "__name__", "frozen").strip("<>")
    return tf.function(frozen, input_signature=signature, autograph=False).get_concrete_function()


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
        if node.op in _BATCH_NORMS and _attribute(node, "is_training").b:
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


class _Graph:
    """The nodes of a GraphDef by name, and what freezing does to them.

    Args:
        graph_def: GraphDef, consumed.
        arguments: names of the placeholders of the arguments.
        outputs: names of output tensors, "node:0".
    """

    def __init__(self, graph_def, arguments, outputs):
        self.nodes = {node.name: node for node in graph_def.node}
        self.library = graph_def.library
        self.versions = graph_def.versions
        self.arguments = arguments
        self.outputs = {name.partition(":")[0] for name in outputs}
        self._constants = {}
        for node in self.nodes.values():
            node.device = ""
            # Colocation names nodes that may vanish; Python's gradients are none of a server's.
            for attribute in ("_class", "_gradient_op_type", "_output_shapes"):
                node.attr.pop(attribute, None)

    def to_graph_def(self):
        """Returns the GraphDef, with those functions of the library that are still called, without the arguments."""
        nodes = [node for name, node in self.nodes.items() if name not in self.arguments]
        graph_def = tf.compat.v1.GraphDef(node=nodes, versions=self.versions)
        functions = {function.signature.name: function for function in self.library.function}
        waiting, called = list(self.nodes.values()), {}
        while waiting:
            for name in _functions_of(waiting.pop()):
                if name in functions and name not in called:
                    called[name] = functions[name]
                    waiting += functions[name].node_def
        graph_def.library.function.extend(called.values())
        return graph_def

    # ------------------------------------------------------------------------------------------------------- looking

    def users(self):
        """Maps a node's name to the (node, position, output index) that read it; -1 is the index of a control edge."""
        users = {name: [] for name in self.nodes}
        for node in self.nodes.values():
            for position, tensor in enumerate(node.input):
                name, index = _source(tensor)
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
                    stack += [(_source(tensor)[0], False) for tensor in self.nodes[name].input]
        return order

    def value(self, tensor):
        """Returns a tensor as an array, floats in float64, if simple arithmetic makes it of constants, or None."""
        name, index = _source(tensor)
        node = self.nodes[name]
        if index != 0:
            return None
        if node.op == "Const":
            array = tf.make_ndarray(_attribute(node, "value").tensor)
            is_float = tf.as_dtype(_attribute(node, "dtype").type).is_floating
            return array.astype(np.float64) if is_float else array
        if node.op not in _ARITHMETIC or any(each.startswith("^") for each in node.input):
            return None
        if node.op == "Cast" and not all(
            tf.as_dtype(_attribute(node, key).type).is_floating for key in ("SrcT", "DstT")
        ):
            return None
        values = [self.value(each) for each in node.input]
        if any(value is None for value in values):
            return None
        return _ARITHMETIC[node.op](node, *values)

    # ------------------------------------------------------------------------------------------------------ changing

    def constant(self, name, array, dtype):
        """Adds a constant and returns its name; that of an equal one where there is one already."""
        array = np.asarray(array).astype(tf.as_dtype(dtype).as_numpy_dtype)
        key = (tf.as_dtype(dtype), array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._constants:
            self._constants[key] = self._unused(name)
            self._add_constant(self._constants[key], tf.make_tensor_proto(array, dtype))
        return self._constants[key]

    def _add_constant(self, name, proto):
        node = tf.compat.v1.NodeDef(name=name, op="Const")
        node.attr["dtype"].type = proto.dtype
        node.attr["value"].tensor.CopyFrom(proto)
        self.nodes[name] = node

    def _unused(self, name):
        candidate, number = name, 1
        while candidate in self.nodes:
            candidate, number = f"{name}_{number}", number + 1
        return candidate

    def _redirect(self, replacements):
        """Lets what reads a tensor, by its name, read another one."""
        for node in self.nodes.values():
            for position, tensor in enumerate(node.input):
                while tensor in replacements:
                    tensor = replacements[tensor]
                node.input[position] = tensor

    def replace_captures(self, traced):
        """Turns eager tensors that the function closes over into constants."""
        for outer, inner in traced.graph.captures:
            node = self.nodes.get(inner.op.name)
            if node is not None and node.op == "Placeholder" and outer.dtype not in (tf.resource, tf.variant):
                self._add_constant(node.name, tf.make_tensor_proto(outer.numpy(), outer.dtype))

    def prune(self):
        """Drops what no output needs; the arguments stay."""
        needed, waiting = set(), [*self.outputs, *self.arguments]
        while waiting:
            name = waiting.pop()
            if name not in needed:
                needed.add(name)
                waiting += [_source(tensor)[0] for tensor in self.nodes[name].input]
        self.nodes = {name: node for name, node in self.nodes.items() if name in needed}

    def forward(self):
        """Takes out what only hands its input on. Returns whether there was any."""
        self._drop_idle_control_edges()
        replacements = {}
        for name, node in self.nodes.items():
            if node.op not in _FORWARDING or name in self.outputs or any(each.startswith("^") for each in node.input):
                continue
            for position, tensor in enumerate(node.input):
                replacements[_tensor(name, position)] = tensor
            replacements[f"^{name}"] = f"^{_source(node.input[0])[0]}"
        self._redirect(replacements)
        self.prune()
        return bool(replacements)

    def _drop_idle_control_edges(self):
        """Drops the order between nodes, but for what waits for a check."""
        checks = set()
        for name in self.ordered():
            node = self.nodes[name]
            if _is_stateful(node) or any(_source(tensor)[0] in checks for tensor in node.input):
                checks.add(name)
            kept = [tensor for tensor in node.input if not tensor.startswith("^") or tensor[1:] in checks]
            del node.input[:]
            node.input.extend(kept)

    def fold_affine(self):
        """Folds what scales and shifts the channels of a product into its weights and one bias."""
        users = self.users()
        for product in list(self.nodes.values()):
            if product.op not in _PRODUCTS or not tf.as_dtype(_attribute(product, "T").type).is_floating:
                continue
            weights = self.value(product.input[1])
            if weights is None or _attribute(product, "data_format").s not in (b"", b"NHWC"):
                continue
            channels = _output_channels(product, weights)
            scale, offset, chain = np.ones(channels), np.zeros(channels), [product]
            # Each name is in one chain only: what has two readers ends it.
            while chain[-1].name not in self.outputs and len(users[chain[-1].name]) == 1:
                reader, position, index = users[chain[-1].name][0]
                affine = self._affine(reader, position, channels, weights.ndim, users) if index == 0 else None
                if affine is None:
                    break
                scale, offset = scale * affine[0], offset * affine[0] + affine[1]
                chain.append(reader)
            while chain[-1].op in _MOVING:
                chain.pop()
            if len(chain) == 1:
                continue
            dtype = _attribute(product, "T").type
            product.input[1] = self.constant(f"{product.name}/weights", _scaled(product, weights, scale), dtype)
            bias = tf.compat.v1.NodeDef(name=chain[-1].name, op="BiasAdd")
            remaining = [node for node in chain[:-1] if node is product or node.op in _MOVING]
            for node, before in zip(remaining[1:], remaining, strict=False):
                node.input[0] = before.name
            bias.input.extend([remaining[-1].name, self.constant(f"{product.name}/bias", offset, dtype)])
            bias.attr["T"].type = dtype
            bias.attr["data_format"].s = b"NHWC"
            for node in chain[1:]:
                if not any(node is each for each in remaining):
                    del self.nodes[node.name]
            self.nodes[bias.name] = bias

    def _affine(self, node, position, channels, rank, users):
        """Returns scale and offset (C,) of what `node` does to its input at `position`, or None."""
        if any(each.startswith("^") for each in node.input):
            return None
        if node.op in _MOVING and position == 0:
            return np.ones(channels), np.zeros(channels)
        if node.op in _BATCH_NORMS and position == 0 and not _attribute(node, "is_training").b:
            values = [self.value(each) for each in node.input[1:]]
            if _attribute(node, "data_format").s not in (b"", b"NHWC") or any(value is None for value in values):
                return None
            gamma, beta, mean, variance = values
            # Only `y` may be read: statistics would be lost.
            if any(index != 0 for _, _, index in users[node.name]):
                return None
            scale = gamma / np.sqrt(variance + _attribute(node, "epsilon").f)
            return scale, beta - mean * scale
        is_bias = node.op == "BiasAdd" and position == 0 and _attribute(node, "data_format").s in (b"", b"NHWC")
        if not is_bias and node.op not in ("Add", "AddV2", "Sub", "Mul", "RealDiv"):
            return None
        other = self.value(node.input[1 - position])
        # Anything but one number for each channel, or for all.
        if (
            other is None
            or other.ndim > rank
            or other.size not in (1, channels)
            or other.size != (other.shape or (1,))[-1]
        ):
            return None
        other = np.broadcast_to(other.reshape(-1), (channels,))
        one = np.ones(channels)
        if node.op == "Mul":
            return other, 0 * one
        if node.op == "RealDiv":
            return (one / other, 0 * one) if position == 0 else None
        if node.op == "Sub":
            return (one, -other) if position == 0 else (-one, other)
        return one, other

    def fold_constants(self):
        """Computes what depends on constants alone, by TensorFlow. Returns whether anything was folded."""
        constant, size = set(), {}
        for name in self.ordered():
            node = self.nodes[name]
            sources = {_source(tensor)[0] for tensor in node.input}
            definition = op_def_registry.get(node.op)
            if node.op == "Const":
                size[name] = _attribute(node, "value").tensor.ByteSize()
            elif sources and sources <= constant and definition is not None and not definition.is_stateful:
                size[name] = sum(size[source] for source in sources)
            else:
                continue
            constant.add(name)
        users = self.users()
        wanted = sorted(
            {
                (name, index)
                for name in constant
                if self.nodes[name].op != "Const"
                for reader, _, index in users[name]
                if index >= 0 and reader.name not in constant
            }
            | {(name, 0) for name in constant & self.outputs if self.nodes[name].op != "Const"}
        )
        # An output's name must go on naming it.
        wanted = [(name, index) for name, index in wanted if name not in self.outputs or len(users[name]) == 0]
        if not wanted:
            return False
        graph_def = self.to_graph_def()
        del graph_def.node[:]
        graph_def.node.extend(self.nodes[name] for name in self.nodes if name in constant)

        def evaluate():
            elements = [f"{name}:{index}" for name, index in wanted]
            return tf.graph_util.import_graph_def(graph_def, return_elements=elements, name="")

        with tf.device("CPU:0"):
            results = tf.compat.v1.wrap_function(evaluate, [])()
        replacements = {}
        for (name, index), result in zip(wanted, results, strict=True):
            if result.dtype in (tf.resource, tf.variant):
                continue
            proto = tf.make_tensor_proto(result.numpy(), result.dtype)
            if proto.ByteSize() > max(_SMALL, size[name]):
                continue
            if name in self.outputs:
                self._add_constant(name, proto)
            else:
                folded = self._unused(f"{name}/constant")
                self._add_constant(folded, proto)
                replacements[_tensor(name, index)] = folded
        self._redirect(replacements)
        self.prune()
        return bool(replacements)

    def choose_branches(self):
        """Drops checks that have passed: conditions on constants that nothing takes a value of."""
        functions = {function.signature.name: function for function in self.library.function}
        users = self.users()
        passed = set()
        for name, node in self.nodes.items():
            if node.op not in ("If", "StatelessIf", "Assert") or name in self.outputs:
                continue
            condition = self.value(node.input[0])
            if condition is None or condition.shape != () or any(index >= 0 for _, _, index in users[name]):
                continue
            if node.op == "Assert":
                can_fail = not condition
            else:
                branch = functions[node.attr["then_branch" if condition else "else_branch"].func.name]
                can_fail = any(_is_stateful(each) for each in branch.node_def)
            if not can_fail:
                passed.add(name)
        for name in passed:
            for reader, _, _ in users[name]:
                kept = [tensor for tensor in reader.input if tensor != f"^{name}"]
                del reader.input[:]
                reader.input.extend(kept)
            del self.nodes[name]
        return bool(passed)

    # ------------------------------------------------------------------------------------------------------ winograd

    def convolve_by_winograd(self, arguments):
        """Replaces 3x3 convolutions, and their biases, where minimal filtering is faster."""
        users = self.users()
        shapes = self._input_shapes("Conv2D", arguments)
        for name, shape in shapes.items():
            node = self.nodes[name]
            kernel = self.value(node.input[1])
            padding = _attribute(node, "padding").s.decode()
            plain = (
                _attribute(node, "T").type == tf.float32.as_datatype_enum
                and _attribute(node, "data_format").s in (b"", b"NHWC")
                and padding in ("SAME", "VALID")
                and {*_attribute(node, "strides").list.i, *_attribute(node, "dilations").list.i} == {1}
            )
            if not plain or kernel is None or not winograd.is_suitable(shape, kernel.shape):
                continue
            bias, last = np.zeros(kernel.shape[-1]), name
            if len(users[name]) == 1 and users[name][0][0].op == "BiasAdd" and name not in self.outputs:
                reader = users[name][0][0]
                value = self.value(reader.input[1])
                if value is not None:
                    bias, last = value, reader.name
            self._splice(
                last,
                node.input[0],
                shape,
                functools.partial(winograd.convolution, kernel=kernel, bias=bias, padding=padding),
            )

    def _input_shapes(self, op, arguments):
        """Maps the names of nodes of a type to the shapes of their first inputs."""
        with tf.Graph().as_default() as graph:
            graph_def = self.to_graph_def()
            read = {_source(tensor)[0] for node in graph_def.node for tensor in node.input}
            inputs = {
                tensor.op.name: tf.compat.v1.placeholder(tensor.dtype, tensor.shape)
                for tensor in arguments
                if tensor.op.name in read
            }
            tf.graph_util.import_graph_def(graph_def, input_map=inputs, name="imported")
            names = [name for name, node in self.nodes.items() if node.op == op]
            shapes = {name: graph.get_operation_by_name(f"imported/{name}").inputs[0].shape for name in names}
        return {name: shape.as_list() for name, shape in shapes.items() if shape.rank is not None}

    def _splice(self, name, tensor, shape, build):
        """Puts what `build` makes of a tensor in the place of a node."""
        with tf.Graph().as_default() as graph, tf.name_scope("winograd"):
            x = tf.compat.v1.placeholder(tf.float32, shape, name="x")
            result = build(x).op.name
        for node in graph.as_graph_def().node:
            if node.op == "Placeholder":
                continue
            node.name = name if node.name == result else f"{name}/{node.name}"
            inputs = [tensor if each == x.op.name else f"{name}/{each}" for each in node.input]
            del node.input[:]
            node.input.extend(inputs)
            self.nodes[node.name] = node

    # ------------------------------------------------------------------------------------------------------ bfloat16

    def compute_in_bfloat16(self):
        """Computes products of constant weights in bfloat16, with what follows as long as it changes no number."""
        users = self.users()
        for name in self.ordered():
            node = self.nodes[name]
            if _attribute(node, "T").type != tf.float32.as_datatype_enum or any(
                each.startswith("^") for each in node.input
            ):
                continue
            if node.op in _PRODUCTS and self._is_inner(node, users):
                weights = self.nodes[_source(node.input[1])[0]]
                if weights.op == "Const":
                    array = tf.make_ndarray(_attribute(weights, "value").tensor)
                    stored = self.constant(f"{weights.name}/bfloat16", array, tf.bfloat16)
                    self._narrow(node, [self._rounded(node.input[0]), stored])
            elif node.op == "BiasAdd" and self._widened(node.input[0]):
                bias = self.nodes[_source(node.input[1])[0]]
                if bias.op == "Const":
                    array = tf.make_ndarray(_attribute(bias, "value").tensor)
                    stored = self.constant(f"{bias.name}/bfloat16", array, tf.bfloat16)
                    self._narrow(node, [self._rounded(node.input[0]), stored])
            elif node.op == "Shape" and self._widened(node.input[0]):
                node.input[0] = self._rounded(node.input[0])
                node.attr["T"].type = tf.bfloat16.as_datatype_enum
            elif node.op in _EXACT and name not in self.outputs and self._widened(node.input[0]):
                self._narrow(node, [self._rounded(node.input[0]), *node.input[1:]])

    def _is_inner(self, node, users):
        """Whether the result of a product, with its bias, goes into further computation."""
        while True:
            if node.name in self.outputs:
                return False
            readers = users[node.name]
            if len(readers) != 1 or readers[0][0].op not in {"BiasAdd"} | _FORWARDING:
                return True
            node = readers[0][0]

    def _widened(self, tensor):
        """The bfloat16 tensor that was cast to this one, or None."""
        node = self.nodes[_source(tensor)[0]]
        if node.op == "Cast" and node.attr["SrcT"].type == tf.bfloat16.as_datatype_enum:
            return node.input[0]
        return None

    def _rounded(self, tensor):
        """The tensor in bfloat16; equal to it if it was bfloat16 before."""
        widened = self._widened(tensor)
        if widened is not None:
            return widened
        name = "/".join([*tensor.split(":"), "to_bfloat16"])
        if name not in self.nodes:
            self._cast(name, tensor, tf.float32, tf.bfloat16)
        return name

    def _narrow(self, node, inputs):
        """Lets a node compute in bfloat16 from other inputs, and gives its name to a cast back."""
        narrow = tf.compat.v1.NodeDef()
        narrow.CopyFrom(node)
        narrow.name = self._unused(f"{node.name}/bfloat16")
        narrow.attr["T"].type = tf.bfloat16.as_datatype_enum
        del narrow.input[:]
        narrow.input.extend(inputs)
        self.nodes[narrow.name] = narrow
        self._cast(node.name, narrow.name, tf.bfloat16, tf.float32)

    def _cast(self, name, tensor, source, target):
        node = tf.compat.v1.NodeDef(name=name, op="Cast", input=[tensor])
        node.attr["SrcT"].type = source.as_datatype_enum
        node.attr["DstT"].type = target.as_datatype_enum
        node.attr["Truncate"].b = False
        self.nodes[name] = node


def _source(tensor):
    """Returns the name of the node that makes a tensor, and which of its outputs it is; -1 for a control edge."""
    if tensor.startswith("^"):
        return tensor[1:], -1
    name, _, index = tensor.partition(":")
    return name, int(index or 0)


def _attribute(node, name):
    """An attribute of a node, or an empty one, which the map itself would then hold."""
    return node.attr[name] if name in node.attr else attr_value_pb2.AttrValue()


def _tensor(name, index):
    """The form in which a GraphDef names a tensor."""
    return f"{name}:{index}" if index else name


def _functions_of(node):
    """Names of the functions that a node calls."""
    for value in node.attr.values():
        for function in [value.func, *value.list.func]:
            if function.name:
                yield function.name


def _is_stateful(node):
    definition = op_def_registry.get(node.op)
    return node.op != "Placeholder" and (definition is None or definition.is_stateful)


def _output_channels(product, weights):
    if product.op == "MatMul":
        return weights.shape[0 if _attribute(product, "transpose_b").b else 1]
    return weights.shape[-1] * (weights.shape[-2] if product.op == "DepthwiseConv2dNative" else 1)


def _scaled(product, weights, scale):
    """Weights whose product is `scale`, one number for each output channel, times that of `weights`."""
    if product.op == "DepthwiseConv2dNative":
        return weights * scale.reshape(weights.shape[-2:])
    return weights * (scale[:, None] if product.op == "MatMul" and _attribute(product, "transpose_b").b else scale)


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
    "Squeeze": lambda node, x: np.squeeze(x, tuple(_attribute(node, "squeeze_dims").list.i) or None),
}
