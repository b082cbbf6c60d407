"""Takes out of a graph what can be computed before it runs: scales and shifts, constants, checks that have passed.

    y = BatchNorm(W * x + b) = s (W * x + b - mean) + beta = (s W) * x + (s (b - mean) + beta),   s = gamma / stddev

A convolution or matrix product and whatever scales and shifts its channels afterwards is one convolution with other
weights. TensorFlow's own optimizer knows this for a product alone, and not across a bias.
"""

import itertools

import numpy as np
import tensorflow as tf

from aib_tf.export.graph import (
    BATCH_NORMS,
    FORWARDING,
    PRODUCTS,
    attribute,
    has_control_inputs,
    import_graph,
    is_channels_last,
    is_stateful,
    source,
    tensor_name,
)

# They move values of a channel to other places, and come behind a dilated convolution.
_MOVING = {"BatchToSpaceND"}
# A folded constant may be this large, or as large as what it was computed from: not a large fill or range.
_SMALL = 4096


def fold_forwarding(graph):
    """Takes out what only hands its input on. Returns whether there was any."""
    _drop_idle_control_edges(graph)
    replacements = {}
    for name, node in graph.nodes.items():
        if node.op not in FORWARDING or name in graph.outputs or has_control_inputs(node):
            continue
        for position, tensor in enumerate(node.input):
            replacements[tensor_name(name, position)] = tensor
        replacements[f"^{name}"] = f"^{source(node.input[0])[0]}"
    graph.redirect(replacements)
    graph.prune()
    return bool(replacements)


def _drop_idle_control_edges(graph):
    """Drops the order between nodes, but for what waits for a check."""
    checks = set()
    for name in graph.ordered():
        node = graph.nodes[name]
        if node.op == "Const":
            # It has nothing to wait for: outputs wait for the checks themselves.
            del node.input[:]
        if is_stateful(node) or any(source(tensor)[0] in checks for tensor in node.input):
            checks.add(name)
        node.input[:] = [tensor for tensor in node.input if not tensor.startswith("^") or tensor[1:] in checks]


@np.errstate(all="ignore")  # what is not finite stays so, as in the layers
def fold_affine(graph):
    """Folds what scales and shifts the channels of a product into its weights and one bias."""
    users = graph.users()
    for product in list(graph.nodes.values()):
        if product.op not in PRODUCTS or not tf.as_dtype(attribute(product, "T").type).is_floating:
            continue
        weights = graph.value(product.input[1])
        if weights is None or not is_channels_last(product):
            continue
        chain, scale, offset = _affine_chain(graph, product, weights, users)
        if len(chain) == 1:
            continue
        dtype = attribute(product, "T").type
        product.input[1] = graph.constant(f"{product.name}/weights", _scaled(product, weights, scale), dtype)
        bias = graph.constant(f"{product.name}/bias", offset, dtype)
        for node in chain[1:]:
            if node.op not in _MOVING:
                del graph.nodes[node.name]
        kept = [product, *(node for node in chain[1:] if node.op in _MOVING)]
        for before, node in itertools.pairwise(kept):
            node.input[0] = before.name
        graph.add(chain[-1].name, "BiasAdd", [kept[-1].name, bias], T=dtype)


def _affine_chain(graph, product, weights, users):
    """Returns a product with the nodes behind it that scale and shift its channels, and scale and offset (C,)."""
    channels = _output_channels(product, weights)
    chain, scale, offset = [product], np.ones(channels), np.zeros(channels)
    # Each name is in one chain only: what has two readers ends it.
    while chain[-1].name not in graph.outputs and len(users[chain[-1].name]) == 1:
        reader, position, index = users[chain[-1].name][0]
        affine = _affine(graph, reader, position, channels, weights.ndim, users) if index == 0 else None
        if affine is None:
            break
        scale, offset = scale * affine[0], offset * affine[0] + affine[1]
        chain.append(reader)
    while chain[-1].op in _MOVING:
        chain.pop()
    return chain, scale, offset


def _affine(graph, node, position, channels, rank, users):
    """Returns scale and offset (C,) of what `node` does to its input at `position`, or None."""
    if has_control_inputs(node) or not is_channels_last(node):
        return None
    one, zero = np.ones(channels), np.zeros(channels)
    if node.op in _MOVING and position == 0:
        return one, zero
    if node.op in BATCH_NORMS and position == 0 and not attribute(node, "is_training").b:
        values = [graph.value(each) for each in node.input[1:]]
        # Only `y` may be read: statistics would be lost.
        if any(value is None for value in values) or any(index != 0 for _, _, index in users[node.name]):
            return None
        gamma, beta, mean, variance = values
        scale = gamma / np.sqrt(variance + attribute(node, "epsilon").f)
        return scale, beta - mean * scale
    if node.op not in ("BiasAdd", "Add", "AddV2", "Sub", "Mul", "RealDiv"):
        return None
    if node.op in ("BiasAdd", "RealDiv") and position != 0:
        return None
    other = graph.value(node.input[1 - position])
    # Anything but one number for each channel, or for all.
    if other is None or other.ndim > rank or other.size not in (1, channels) or other.size != (other.shape or (1,))[-1]:
        return None
    other = np.broadcast_to(other.reshape(-1), (channels,))
    if node.op == "Mul":
        return other, zero
    if node.op == "RealDiv":
        return one / other, zero
    if node.op == "Sub":
        return (one, -other) if position == 0 else (-one, other)
    return one, other


def _output_channels(product, weights):
    if product.op == "MatMul":
        return weights.shape[0 if attribute(product, "transpose_b").b else 1]
    return weights.shape[-1] * (weights.shape[-2] if product.op == "DepthwiseConv2dNative" else 1)


def _scaled(product, weights, scale):
    """Weights whose product is `scale`, one number for each output channel, times that of `weights`."""
    if product.op == "DepthwiseConv2dNative":
        return weights * scale.reshape(weights.shape[-2:])
    return weights * (scale[:, None] if product.op == "MatMul" and attribute(product, "transpose_b").b else scale)


def keep_apart(graph):
    """Makes plain additions of biases that TensorFlow's optimizer would trip over.

    It fuses product, bias, addition and ReLU, and where the sum has another reader it fails for the whole graph, of
    which nothing is then fused (TensorFlow 2.21: "remapper failed: ... fanout exist for missing node").
    """
    users = graph.users()
    for name, node in list(graph.nodes.items()):
        if node.op == "BiasAdd" and len(users[name]) == 1 and name not in graph.outputs:
            reader = users[name][0][0]
            readers = [each.op for each, _, index in users[reader.name] if index >= 0]
            if reader.op in ("Add", "AddV2") and len(readers) > 1 and any("elu" in op for op in readers):
                graph.add(name, "AddV2", node.input, T=attribute(node, "T").type)


def fold_constants(graph):
    """Computes what depends on constants alone, by TensorFlow. Returns whether anything was folded."""
    sizes = _constant_sizes(graph)
    wanted = _boundary(graph, sizes)
    if not wanted:
        return False
    graph_def = graph.to_graph_def(sizes)

    def evaluate():
        return import_graph(graph_def, {}, [f"{name}:{index}" for name, index in wanted])

    with tf.device("CPU:0"):
        results = tf.compat.v1.wrap_function(evaluate, [])()
    replacements = {}
    for (name, index), result in zip(wanted, results, strict=True):
        if result.dtype in (tf.resource, tf.variant):
            continue
        proto = tf.make_tensor_proto(result.numpy(), result.dtype)
        if proto.ByteSize() > max(_SMALL, sizes[name]):
            continue
        if name in graph.outputs:
            graph.add_constant(name, proto)
        else:
            folded = graph.unused(f"{name}/constant")
            graph.add_constant(folded, proto)
            replacements[tensor_name(name, index)] = folded
    graph.redirect(replacements)
    graph.prune()
    return bool(replacements)


def _constant_sizes(graph):
    """Maps the names of nodes that depend on constants alone to the bytes of these constants."""
    sizes = {}
    for name in graph.ordered():
        node = graph.nodes[name]
        sources = {source(tensor)[0] for tensor in node.input}
        if node.op == "Const":
            sizes[name] = attribute(node, "value").tensor.ByteSize()
        elif sources and sources <= sizes.keys() and not is_stateful(node):
            sizes[name] = sum(sizes[each] for each in sources)
    return sizes


def _boundary(graph, constant):
    """Lists the (name, output index) of computed constants that others, or nobody but the caller, read."""
    users = graph.users()
    boundary = set()
    for name in constant:
        if graph.nodes[name].op == "Const":
            continue
        if name not in graph.outputs:
            boundary |= {(name, index) for node, _, index in users[name] if index >= 0 and node.name not in constant}
        elif not users[name]:
            # An output's name must go on naming it.
            boundary.add((name, 0))
    return sorted(boundary)


def fold_checks(graph):
    """Drops checks that have passed: conditions on constants that nothing takes a value of. Returns if there were."""
    functions = {function.signature.name: function for function in graph.library.function}
    users = graph.users()
    passed = set()
    for name, node in graph.nodes.items():
        if node.op not in ("If", "StatelessIf", "Assert") or name in graph.outputs:
            continue
        condition = graph.value(node.input[0])
        if condition is None or condition.shape != () or any(index >= 0 for _, _, index in users[name]):
            continue
        if node.op == "Assert":
            can_fail = not condition
        else:
            branch = functions[node.attr["then_branch" if condition else "else_branch"].func.name]
            can_fail = any(is_stateful(each) for each in branch.node_def)
        if not can_fail:
            passed.add(name)
    for name in passed:
        for reader, _, _ in users[name]:
            reader.input[:] = [tensor for tensor in reader.input if tensor != f"^{name}"]
        del graph.nodes[name]
    return bool(passed)
