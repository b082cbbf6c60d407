"""`nearest_anchor` against NumPy: values, boundaries, gradients, dtypes, eager, graph and XLA."""

import hypothesis
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies
from hypothesis.extra import numpy as numpy_strategies

import aib_tf
from aib_tf.ops import nearest_anchor
from tests import reference


def nearest_anchor_of_unknown_sizes(x, anchors):
    x, anchors = tf.convert_to_tensor(x), tf.convert_to_tensor(anchors)
    signature = [tf.TensorSpec([None] * x.shape.rank, x.dtype), tf.TensorSpec([None], anchors.dtype)]
    return tf.function(nearest_anchor, input_signature=signature)(x, anchors)


WAYS = {
    "eager": nearest_anchor,
    "graph": tf.function(nearest_anchor),
    "graph of unknown sizes": nearest_anchor_of_unknown_sizes,
    "xla": tf.function(nearest_anchor, jit_compile=True),
}
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


def boundary_values(anchors):
    """At each anchor, each midpoint, one step to either side, beyond both ends, NaN and the infinities."""
    ordered = np.sort(anchors)
    exact = np.concatenate([ordered, (ordered[1:] + ordered[:-1]) / 2])
    beside = [np.nextafter(exact, np.inf), np.nextafter(exact, -np.inf)]
    ends = [ordered[0] - 1, ordered[-1] + 1, 1e8, -1e8, 3e38, 0.0, -0.0, np.nan, np.inf, -np.inf]
    return np.concatenate([exact, *beside, np.asarray(ends, anchors.dtype)])


@pytest.fixture(params=ANCHORS)
def anchors(request):
    return np.asarray(ANCHORS[request.param], np.float32)


@pytest.mark.parametrize("way", WAYS)
def test_every_boundary_value_goes_where_argmin_says(anchors, way):
    x = boundary_values(anchors)
    result = WAYS[way](x, anchors)
    expected = reference.nearest_index(x, anchors)
    np.testing.assert_array_equal(result.index, expected)
    np.testing.assert_array_equal(result.quantized, np.where(np.isnan(x), x, anchors[expected]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_every_dtype_is_compared_in_the_anchors_precision(dtype, way):
    anchors = np.linspace(0, 1, 20).astype("float64" if dtype == "float64" else "float32")
    x = np.random.default_rng(1).normal(0.5, 0.5, (3, 50)).astype(DTYPES[dtype])
    result = WAYS[way](tf.constant(x), tf.constant(anchors))
    index = reference.nearest_index(x, anchors)
    np.testing.assert_array_equal(result.index, index)
    assert result.quantized.dtype == dtype
    assert result.codebook_loss.dtype == result.commitment_loss.dtype == anchors.dtype
    np.testing.assert_array_equal(result.quantized.numpy(), anchors[index].astype(DTYPES[dtype]))
    expected = np.mean((x.astype(np.float64) - anchors[index]) ** 2)
    np.testing.assert_allclose(result.codebook_loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(result.codebook_loss, result.commitment_loss)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (2, 3, 4, 1), (0,), (2, 0, 3)])
def test_any_shape_is_kept_and_an_empty_one_costs_nothing(shape):
    x = np.random.default_rng(2).random(shape).astype("float32")
    result = nearest_anchor(x, np.float32([0, 0.5, 1]))
    assert result.quantized.shape == result.index.shape == shape
    if x.size == 0:
        assert result.codebook_loss == 0


@pytest.mark.parametrize("way", ["eager", "graph", "xla"])
def test_gradients_are_those_of_the_formula(anchors, way):
    x = np.random.default_rng(3).normal(0.5, 1, (5, 8)).astype("float32")
    # Increasing upstream gradients: an element that is routed to the wrong place shows.
    upstream = np.arange(x.size, dtype="float32").reshape(x.shape)

    def gradients(x, anchors):
        with tf.GradientTape() as tape:
            tape.watch([x, anchors])
            result = nearest_anchor(x, anchors)
            total = tf.reduce_sum(result.quantized * upstream)
            total += 3.0 * result.codebook_loss + 5.0 * result.commitment_loss
        return tape.gradient(total, [x, anchors])

    wrap = {"eager": lambda f: f, "graph": tf.function, "xla": lambda f: tf.function(f, jit_compile=True)}[way]
    d_x, d_anchors = wrap(gradients)(tf.constant(x), tf.constant(anchors))
    expected_x, expected_anchors = reference.nearest_anchor_gradients(x, anchors, upstream, 3.0, 5.0)
    np.testing.assert_allclose(d_x, expected_x, rtol=1e-5)
    np.testing.assert_allclose(d_anchors, expected_anchors, rtol=1e-4, atol=1e-5 * np.abs(expected_anchors).max())


@pytest.mark.parametrize(("output", "moves_x", "moves_anchors"), [(0, 1, 0), (2, 0, 1), (3, 1, 0)])
def test_each_output_moves_only_what_it_should(output, moves_x, moves_anchors):
    x, anchors = tf.constant([0.1, 0.7, 2.0]), tf.constant([0.0, 0.5, 1.0])
    with tf.GradientTape() as tape:
        tape.watch([x, anchors])
        total = tf.reduce_sum(nearest_anchor(x, anchors)[output])
    d_x, d_anchors = tape.gradient(total, [x, anchors])
    assert np.any(d_x) == moves_x
    assert np.any(d_anchors) == moves_anchors


@pytest.mark.parametrize("dtype", [tf.float16, tf.float32])
def test_straight_through_gradient_is_the_upstream_gradient_also_at_nan_and_infinity(dtype):
    x, anchors = tf.constant([0.1, 0.7, np.inf, -np.inf, np.nan], dtype), tf.constant([0.0, 1.0])
    upstream = tf.constant([1, 2, 3, 4, 5], dtype)
    with tf.GradientTape() as tape:
        tape.watch([x, anchors])
        quantized = nearest_anchor(x, anchors).quantized
    d_x, d_anchors = tape.gradient(quantized, [x, anchors], upstream)
    assert d_x.dtype == dtype
    np.testing.assert_array_equal(d_x, upstream)
    np.testing.assert_array_equal(d_anchors, [0, 0])


@pytest.mark.parametrize("way", WAYS)
def test_runs_of_anchors_that_rounding_or_duplicates_make_equally_near_give_their_lowest_index(way):
    generator = np.random.default_rng(4)
    for count in (3, 64, 100):
        for anchors in (generator.random(count), np.full(count, 0.25), generator.integers(0, 3, count) / 2):
            anchors = anchors.astype("float32")
            x = np.float32([1e30, -1e30, 1e7, -3e6, 1e8, 0.25, 0.5, 0.75, 0.3])
            np.testing.assert_array_equal(WAYS[way](x, anchors).index, reference.nearest_index(x, anchors))


def test_nan_spoils_both_losses_and_nothing_else():
    result = nearest_anchor(np.float32([0.1, np.nan, 0.9]), np.float32([0, 1]))
    np.testing.assert_array_equal(result.quantized, np.float32([0, np.nan, 1]))
    np.testing.assert_array_equal(result.index, [0, 0, 1])
    assert np.isnan(result.codebook_loss)
    assert np.isnan(result.commitment_loss)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(data=strategies.data())
def test_any_scores_and_anchors_agree_with_argmin(data):
    # TensorFlow's CPU kernels flush subnormal numbers to zero, which NumPy does not.
    numbers = strategies.floats(-1e6, 1e6, width=32, allow_subnormal=False)
    anchors = data.draw(numpy_strategies.arrays(np.float32, strategies.integers(1, 12), elements=numbers))
    near = strategies.sampled_from(anchors.tolist())
    x = data.draw(numpy_strategies.arrays(np.float32, strategies.integers(0, 30), elements=numbers | near))
    result = nearest_anchor(x, anchors)
    np.testing.assert_array_equal(result.index, reference.nearest_index(x, anchors))


def test_memory_does_not_grow_with_scores_times_anchors():
    scores, count = 2_000_000, 65_536
    x = tf.random.stateless_uniform((scores,), seed=(0, 1))
    anchors = tf.linspace(0.0, 1.0, count)
    result = nearest_anchor(x, anchors)  # a table of all distances would take 524 GB
    np.testing.assert_allclose(result.quantized, x, atol=0.5 / (count - 1) + 1e-7)


@pytest.mark.parametrize(
    ("x", "anchors", "error", "message"),
    [
        (np.zeros(3, np.int32), np.zeros(2, np.float32), TypeError, "x.dtype=int32"),
        (np.zeros(3, np.float32), np.zeros(2, np.float64), TypeError, "anchors.dtype=float64"),
        (np.zeros(3, np.float64), np.zeros(2, np.float32), TypeError, "anchors.dtype=float32"),
        (np.zeros(3, np.float32), np.zeros((1, 2), np.float32), ValueError, r"anchors.shape=\(1, 2\)"),
        (np.zeros(3, np.float32), np.zeros(0, np.float32), ValueError, r"anchors.shape=\(0,\)"),
        (np.zeros(3, np.float32), np.zeros(65_537, np.float32), ValueError, r"anchors.shape=\(65537,\)"),
    ],
)
@pytest.mark.parametrize("way", ["eager", "graph"])
def test_impossible_arguments_are_named(x, anchors, error, message, way):
    with pytest.raises(error, match=message):
        WAYS[way](tf.constant(x), tf.constant(anchors))


def test_implementation_names_the_pure_path_and_says_why():
    implementation = aib_tf.ops.implementation()
    assert implementation.name == "tensorflow"
    assert "pure path" in implementation.reason
