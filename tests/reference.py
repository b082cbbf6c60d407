"""The mathematics in plain NumPy and float64, written from the formulas, not from the library."""

import ml_dtypes
import numpy as np

# What nearest_anchor is tested with.
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
ANCHORS = {
    "one": [0.25],
    "two": [0.0, 1.0],
    "evenly spaced": np.linspace(0, 1, 20),
    "unsorted": [0.7, -2.0, 0.1, 3.0, 0.5],
    "duplicates": [0.5, 0.25, 0.5, 0.0, 0.25, 0.25],
    "all the same": [0.5] * 7,
    "many": np.random.default_rng(0).normal(0.5, 1, 1000),
    "wide": [-1e30, 1e30, 0.0, 1.0],
}


def nearest_index(x, anchors):
    """argmin_k |x - anchors[k]| in the anchors' precision, lowest k on ties; NaN -> 0, infinities -> the extremes."""
    x = np.asarray(x).astype(anchors.dtype)
    index = np.zeros(x.shape, np.int64)
    for position in np.ndindex(x.shape):
        value = x[position]
        if np.isnan(value):
            index[position] = 0
        elif np.isinf(value):
            index[position] = np.argmax(anchors) if value > 0 else np.argmin(anchors)
        else:
            with np.errstate(over="ignore"):
                index[position] = np.argmin(np.abs(value - anchors))
    return index


def boundary_values(anchors):
    """At each anchor, each midpoint, one step to either side, beyond both ends, NaN and the infinities."""
    ordered = np.sort(anchors)
    exact = np.concatenate([ordered, ordered[1:] / 2 + ordered[:-1] / 2])
    beside = [np.nextafter(exact, np.inf), np.nextafter(exact, -np.inf)]
    largest = np.finfo(anchors.dtype).max
    ends = [ordered[0] - 1, ordered[-1] + 1, 1e8, -1e8, largest, -largest, 0.0, -0.0, np.nan, np.inf, -np.inf]
    return np.concatenate([exact, *beside, np.asarray(ends, anchors.dtype)])


def nearest_anchor_gradients(x, anchors, d_quantized, d_codebook, d_commitment):
    """The straight-through gradients of nearest_anchor, in float64."""
    x64, anchors64 = np.asarray(x, np.float64), np.asarray(anchors, np.float64)
    index = nearest_index(x, anchors)
    difference = x64 - anchors64[index]
    d_x = d_quantized + d_commitment * 2 * difference / x.size
    d_anchors = np.zeros(anchors.size)
    np.add.at(d_anchors, index.ravel(), -difference.ravel())
    return d_x, d_codebook * 2 / x.size * d_anchors


def softplus(x):
    return np.logaddexp(0.0, np.asarray(x, np.float64))


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-np.asarray(x, np.float64)))


def convolution(images, kernel, bias):
    """A 2-D convolution with stride 1 and zero padding that keeps the size; NHWC images, HWIO kernel."""
    images, kernel = np.asarray(images, np.float64), np.asarray(kernel, np.float64)
    height, width = kernel.shape[:2]
    padded = np.pad(images, [(0, 0), (height // 2,) * 2, (width // 2,) * 2, (0, 0)])
    result = np.zeros((*images.shape[:3], kernel.shape[3])) + np.asarray(bias, np.float64)
    for row in range(height):
        for column in range(width):
            window = padded[:, row : row + images.shape[1], column : column + images.shape[2]]
            result += np.einsum("bhwc,co->bhwo", window, kernel[row, column])
    return result


def kl_divergence_by_integration(mean, stddev):
    """KL(N(mean, stddev^2) || N(0, 1)) of one dimension, in nats, by summing p ln(p / q) over a fine grid."""
    grid = np.linspace(mean - 12 * stddev, mean + 12 * stddev, 200_001)
    log_p = -0.5 * ((grid - mean) / stddev) ** 2 - np.log(stddev)
    log_q = -0.5 * grid**2
    p = np.exp(log_p) / np.sqrt(2 * np.pi)
    return np.sum(p * (log_p - log_q)) * (grid[1] - grid[0])


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def cross_entropy_bits(labels, logits):
    return -log_softmax(logits)[np.arange(len(labels)), labels] / np.log(2)


def entropy_bits(counts):
    p = np.asarray(counts, np.float64)
    p = p[p > 0] / p.sum()
    return float(-(p * np.log2(p)).sum())
