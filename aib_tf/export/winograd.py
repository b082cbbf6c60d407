"""3x3 convolutions with half the multiplications, in TensorFlow's own ops.

TensorFlow computes a float32 convolution on a CPU directly, and its kernels run near the peak of the processor: what is
left to save are multiplications. Winograd's minimal filtering F(4, 3) makes four outputs of a filter of three taps with
6 products where 12 are usual,

    y = A^T ((G g) * (B^T d)),    d: 6 inputs, g: 3 taps, y: 4 outputs,

here along the height, where a row of all columns and channels is one long vector: B^T and A^T, applied to all rows at
once, are matrix products, and each of the 6 products of a tile is a 1x3 convolution along the width. In both directions
a quarter of the multiplications would be left, and more memory traffic and ops than that is worth; the error would
grow, too. Here it is about twice that of the direct sum.
"""

import functools

import numpy as np
import tensorflow as tf

from aib_tf.export.graph import attribute, computes_in, has_control_inputs, is_channels_last

TAPS, OUTPUTS = 3, 4
PRODUCTS = OUTPUTS + TAPS - 1
# Where the polynomials are evaluated, beside infinity. Those nearer to 1 than the usual 0, +-1, +-2 lose fewer digits.
_POINTS = (0.0, 0.5, -0.5, 1.5, -1.5)
# For fewer channels the transforms cost as much as they save; for fewer rows, one image takes as long as the weights,
# which are twice as many, take from the memory.
MIN_CHANNELS = 128
MIN_HEIGHT = 16


def minimal_filtering():
    """The matrices of F(4, 3), by Toom and Cook's interpolation.

    Returns:
        A^T (4, 6), G (6, 3) and B^T (6, 6), float64.

    Reference:
        - Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.1.
    """

    def evaluation(count):
        """(6, count): values at the points, and the leading coefficient, of polynomials with `count` coefficients."""
        powers = np.array(_POINTS)[:, None] ** np.arange(count)
        return np.vstack([powers, np.eye(count)[-1:]])

    # A filter is the transpose of a product of polynomials: evaluation of both, products, interpolation.
    outputs, taps, inputs = evaluation(OUTPUTS).T, evaluation(TAPS), np.linalg.inv(evaluation(PRODUCTS)).T
    # Only the product of both rows counts: alike in size, neither input nor filter comes near the limits of float32.
    balance = np.sqrt(np.abs(inputs).max(axis=1) / np.abs(taps).max(axis=1))[:, None]
    return outputs, taps * balance, inputs / balance


def is_suitable(shape, kernel_shape):
    """Whether F(4, 3) is faster than a direct convolution.

    Args:
        shape: (B, H, W, C) of the input, None for what is unknown.
        kernel_shape: (kh, kw, inputs, outputs).

    Returns:
        bool.
    """
    if len(shape) != 4 or None in shape[1:] or tuple(kernel_shape[:2]) != (TAPS, TAPS):
        return False
    height, channels, outputs = shape[1], *kernel_shape[2:]
    if shape[3] != channels or min(channels, outputs) < MIN_CHANNELS or height < MIN_HEIGHT:
        return False  # the first for groups of channels, whose kernels have fewer inputs
    # The matrices of the transforms are as large as the height: for each place, they cost in proportion to
    # height (channels + outputs), and save in proportion to channels outputs.
    return height * (channels + outputs) <= channels * outputs


def convolve_by_winograd(graph):
    """Replaces 3x3 convolutions of a `Graph`, and their biases, where minimal filtering is faster."""
    users = graph.users()
    for name, shape in graph.input_shapes("Conv2D").items():
        node = graph.nodes[name]
        kernel = None if has_control_inputs(node) else graph.value(node.input[1])
        if kernel is None or not _is_plain(node) or not is_suitable(shape, kernel.shape):
            continue
        bias, last = np.zeros(kernel.shape[-1]), name
        if len(users[name]) == 1 and users[name][0][0].op == "BiasAdd" and name not in graph.outputs:
            reader = users[name][0][0]
            value = graph.value(reader.input[1])
            if value is not None:
                bias, last = value, reader.name
        padding = attribute(node, "padding").s.decode()
        build = functools.partial(convolution, kernel=kernel, bias=bias, padding=padding)
        graph.splice(last, node.input[0], shape, build)


def _is_plain(node):
    """Whether a Conv2D is one of float32, stride 1 and no dilation, with a padding that `convolution` knows."""
    steps = {*attribute(node, "strides").list.i, *attribute(node, "dilations").list.i}
    known = attribute(node, "padding").s in (b"SAME", b"VALID")
    return computes_in(node, tf.float32) and is_channels_last(node) and known and steps == {1}


def convolution(x, kernel, bias, padding):
    """A 3x3 convolution of stride 1, and a bias.

    Args:
        x: float32 (B, H, W, C) tensor; all but B known.
        kernel: (3, 3, C, outputs) array.
        bias: (outputs,) array.
        padding: "SAME" or "VALID".

    Returns:
        float32 (B, H, W, outputs) tensor, of 2 rows and columns less for "VALID".
    """
    to_outputs, to_products, to_tiles = minimal_filtering()
    _, height, width, channels = x.shape
    before = 1 if padding == "SAME" else 0
    rows, columns = (size - TAPS + 1 + 2 * before for size in (height, width))
    tiles = -(-rows // OUTPUTS)
    # Product r of tile i reads the inputs 4 i - before ... of the map; those outside are 0.
    analysis = np.zeros((PRODUCTS, tiles, height))
    synthesis = np.zeros((tiles, OUTPUTS, PRODUCTS, tiles))
    for tile in range(tiles):
        for tap in range(PRODUCTS):
            row = OUTPUTS * tile + tap - before
            if 0 <= row < height:
                analysis[:, tile, row] = to_tiles[:, tap]
        synthesis[tile, :, :, tile] = to_outputs
    analysis = analysis.reshape(PRODUCTS * tiles, height)
    synthesis = synthesis.reshape(tiles * OUTPUTS, PRODUCTS * tiles)[:rows]
    kernels = np.einsum("rk,kwio->rwio", to_products, kernel.astype(np.float64))[:, None]
    # What the synthesis makes of it is the bias in each output, and a convolution with a bias is one op.
    biases = np.outer(np.linalg.pinv(to_outputs) @ np.ones(OUTPUTS), bias)

    with tf.name_scope("winograd"):
        transformed = tf.matmul(tf.constant(analysis, tf.float32), tf.reshape(x, (-1, height, width * channels)))
        transformed = tf.unstack(tf.reshape(transformed, (-1, PRODUCTS, tiles, width, channels)), axis=1)
        products = [
            tf.nn.bias_add(tf.nn.conv2d(part, tf.constant(k, tf.float32), 1, padding), tf.constant(b, tf.float32))
            for part, k, b in zip(transformed, kernels, biases, strict=True)
        ]
        products = tf.concat([tf.reshape(each, (-1, tiles, columns * len(bias))) for each in products], axis=1)
        return tf.reshape(tf.matmul(tf.constant(synthesis, tf.float32), products), (-1, rows, columns, len(bias)))
