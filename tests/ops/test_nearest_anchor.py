"""`nearest_anchor` against NumPy: the compiled op and the pure path, values and gradients, eager, graph and XLA."""

import os
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies
from hypothesis.extra import numpy as numpy_strategies

from aib_tf.ops import custom_op, nearest_anchor, pure
from tests import reference

COMPILED = custom_op.library().nearest_anchor
needs_library = pytest.mark.skipif(COMPILED is None, reason=custom_op.implementation().reason)


@pytest.fixture(params=["custom_op", "pure"])
def path(request, monkeypatch):
    """Lets `nearest_anchor` take one path."""
    if request.param == "custom_op" and COMPILED is None:
        pytest.skip(custom_op.implementation().reason)
    quantize = COMPILED if request.param == "custom_op" else None
    library = custom_op.library()._replace(nearest_anchor=quantize)
    monkeypatch.setattr(custom_op, "library", lambda: library)
    return request.param


def of_unknown_sizes(function):
    def call(x, anchors):
        x, anchors = tf.convert_to_tensor(x), tf.convert_to_tensor(anchors)
        signature = [tf.TensorSpec([None] * x.shape.rank, x.dtype), tf.TensorSpec([None], anchors.dtype)]
        return tf.function(function, input_signature=signature)(x, anchors)

    return call


# Each makes a function of its own: a traced one would keep the path that it was traced with.
WAYS = {
    "eager": lambda function: function,
    "graph": tf.function,
    "graph of unknown sizes": of_unknown_sizes,
    "xla": lambda function: tf.function(function, jit_compile=True),
}


@pytest.fixture(params=reference.ANCHORS)
def anchors(request):
    return np.asarray(reference.ANCHORS[request.param], np.float32)


@pytest.mark.parametrize("way", WAYS)
def test_every_boundary_value_goes_where_argmin_says(anchors, way, path):
    x = reference.boundary_values(anchors)
    result = WAYS[way](nearest_anchor)(x, anchors)
    expected = reference.nearest_index(x, anchors)
    np.testing.assert_array_equal(result.index, expected)
    np.testing.assert_array_equal(result.quantized, np.where(np.isnan(x), x, anchors[expected]))


@pytest.mark.parametrize("way", ["eager", "graph", "xla"])
def test_what_is_served_goes_to_the_same_anchors(anchors, way):
    x = reference.boundary_values(anchors)
    quantized, index = WAYS[way](lambda x: pure.quantize(x, tf.constant(anchors)))(tf.constant(x))
    expected = reference.nearest_index(x, anchors)
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_array_equal(quantized, np.where(np.isnan(x), x, anchors[expected]))


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_every_dtype_is_compared_in_the_anchors_precision(dtype, way, path):
    anchors = np.linspace(0, 1, 20).astype("float64" if dtype == "float64" else "float32")
    x = np.random.default_rng(1).normal(0.5, 0.5, (3, 50)).astype(reference.DTYPES[dtype])
    result = WAYS[way](nearest_anchor)(tf.constant(x), tf.constant(anchors))
    index = reference.nearest_index(x, anchors)
    np.testing.assert_array_equal(result.index, index)
    assert result.quantized.dtype == dtype
    assert result.codebook_loss.dtype == result.commitment_loss.dtype == anchors.dtype
    np.testing.assert_array_equal(result.quantized.numpy(), anchors[index].astype(reference.DTYPES[dtype]))
    expected = np.mean((x.astype(np.float64) - anchors[index]) ** 2)
    np.testing.assert_allclose(result.codebook_loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(result.codebook_loss, result.commitment_loss)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (2, 3, 4, 1), (0,), (2, 0, 3)])
def test_any_shape_is_kept_and_an_empty_one_costs_nothing(shape, path):
    x = np.random.default_rng(2).random(shape).astype("float32")
    result = nearest_anchor(x, np.float32([0, 0.5, 1]))
    assert result.quantized.shape == result.index.shape == shape
    if x.size == 0:
        assert result.codebook_loss == 0


@pytest.mark.parametrize("way", ["eager", "graph", "xla"])
def test_gradients_are_those_of_the_formula(anchors, way, path):
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

    d_x, d_anchors = WAYS[way](gradients)(tf.constant(x), tf.constant(anchors))
    expected_x, expected_anchors = reference.nearest_anchor_gradients(x, anchors, upstream, 3.0, 5.0)
    np.testing.assert_allclose(d_x, expected_x, rtol=1e-5)
    np.testing.assert_allclose(d_anchors, expected_anchors, rtol=1e-4, atol=1e-5 * np.abs(expected_anchors).max())


@pytest.mark.parametrize(("output", "moves_x", "moves_anchors"), [(0, 1, 0), (2, 0, 1), (3, 1, 0)])
def test_each_output_moves_only_what_it_should(output, moves_x, moves_anchors, path):
    x, anchors = tf.constant([0.1, 0.7, 2.0]), tf.constant([0.0, 0.5, 1.0])
    with tf.GradientTape() as tape:
        tape.watch([x, anchors])
        total = tf.reduce_sum(nearest_anchor(x, anchors)[output])
    d_x, d_anchors = tape.gradient(total, [x, anchors])
    assert np.any(d_x) == moves_x
    assert np.any(d_anchors) == moves_anchors


@pytest.mark.parametrize("dtype", [tf.float16, tf.float32])
def test_straight_through_gradient_is_the_upstream_gradient_also_at_nan_and_infinity(dtype, path):
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
def test_runs_of_anchors_that_rounding_or_duplicates_make_equally_near_give_their_lowest_index(way, path):
    generator = np.random.default_rng(4)
    for count in (3, 64, 100):
        for anchors in (generator.random(count), np.full(count, 0.25), generator.integers(0, 3, count) / 2):
            anchors = anchors.astype("float32")
            x = np.float32([1e30, -1e30, 1e7, -3e6, 1e8, 0.25, 0.5, 0.75, 0.3])
            np.testing.assert_array_equal(
                WAYS[way](nearest_anchor)(x, anchors).index, reference.nearest_index(x, anchors)
            )


@pytest.mark.parametrize("way", WAYS)
def test_distances_that_overflow_are_equal_to_whichever_anchor(way, path):
    for anchors in (np.float32([-3.1e38, -2.1e38]), np.float32([3.1e38, 2.1e38, 3.3e38])):
        x = np.float32([3.4e38, -3.4e38, 2.9e38, -2.9e38, 1e38, -1e38, 0])
        np.testing.assert_array_equal(WAYS[way](nearest_anchor)(x, anchors).index, reference.nearest_index(x, anchors))


def test_nan_spoils_both_losses_and_nothing_else(path):
    result = nearest_anchor(np.float32([0.1, np.nan, 0.9]), np.float32([0, 1]))
    np.testing.assert_array_equal(result.quantized, np.float32([0, np.nan, 1]))
    np.testing.assert_array_equal(result.index, [0, 0, 1])
    assert np.isnan(result.codebook_loss)
    assert np.isnan(result.commitment_loss)


@hypothesis.settings(
    deadline=None, max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(data=strategies.data())
def test_any_scores_and_anchors_agree_with_argmin(path, data):
    # The op takes subnormal numbers as they are, like NumPy; TensorFlow's own CPU kernels flush them to zero.
    numbers = strategies.floats(-1e6, 1e6, width=32, allow_subnormal=path == "custom_op")
    anchors = data.draw(numpy_strategies.arrays(np.float32, strategies.integers(1, 12), elements=numbers))
    near = strategies.sampled_from(anchors.tolist())
    x = data.draw(numpy_strategies.arrays(np.float32, strategies.integers(0, 30), elements=numbers | near))
    result = nearest_anchor(x, anchors)
    np.testing.assert_array_equal(result.index, reference.nearest_index(x, anchors))


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("way", ["eager", "xla"])
@needs_library
def test_both_paths_give_the_same_bits(dtype, way):
    arithmetic = "float64" if dtype == "float64" else "float32"
    for name, values in reference.ANCHORS.items():
        anchors = np.asarray(values, arithmetic)
        x = np.concatenate([reference.boundary_values(anchors), np.random.default_rng(5).normal(0.5, 1, 5000)])
        with np.errstate(over="ignore"):
            x = x.astype(reference.DTYPES[dtype])
        x = tf.constant(x[np.isfinite(x.astype("float64")) & (np.abs(x.astype("float64")) < 1e15)])
        compiled, expected = (WAYS[way](f)(x, tf.constant(anchors)) for f in (COMPILED, pure.nearest_anchor))
        for ours, theirs in zip(compiled[:2], expected[:2], strict=True):
            assert ours.numpy().tobytes() == theirs.numpy().tobytes(), name
        # Both sum in float64, in different orders: after rounding to float32 nothing of that is left.
        for ours, theirs in zip(compiled[2:], expected[2:], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-13 if dtype == "float64" else 0, err_msg=name)


@needs_library
def test_twenty_repeats_give_the_same_bits():
    x = tf.random.stateless_normal((200_000,), seed=(0, 2))
    anchors = tf.random.stateless_normal((50,), seed=(0, 3))

    def everything():
        with tf.GradientTape() as tape:
            tape.watch([x, anchors])
            result = COMPILED(x, anchors)
            total = tf.reduce_sum(result[0] * x) + result[2] + result[3]
        return b"".join(tensor.numpy().tobytes() for tensor in (*result, *tape.gradient(total, [x, anchors])))

    first = everything()
    assert all(everything() == first for _ in range(19))


THREADS = """
import hashlib
import tensorflow as tf
from aib_tf.ops import nearest_anchor
x = tf.random.stateless_normal((300_000,), seed=(0, 2))
anchors = tf.random.stateless_normal((50,), seed=(0, 3))
with tf.GradientTape() as tape:
    tape.watch([x, anchors])
    result = nearest_anchor(x, anchors)
    total = result[2] + result[3]
content = b"".join(tensor.numpy().tobytes() for tensor in (*result, *tape.gradient(total, [x, anchors])))
print(hashlib.sha256(content).hexdigest())
"""


@needs_library
def test_the_number_of_threads_does_not_show():
    prints = set()
    for threads in ("1", "2", "4"):
        environment = os.environ | {"TF_NUM_INTRAOP_THREADS": threads, "AIB_TF_OPS": "custom"}
        done = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        prints.add(done.stdout)
    assert len(prints) == 1


def test_the_gradient_has_a_gradient(path):
    x = tf.constant([0.1, 0.4, 0.7, 2.0])
    anchors = tf.constant([0.0, 0.5, 1.0])
    index = reference.nearest_index(x.numpy(), anchors.numpy())

    def penalty(x, anchors, weight):
        with tf.GradientTape() as tape:
            tape.watch([x, anchors])
            result = nearest_anchor(x, anchors)
            total = tf.reduce_sum(result.quantized * [1.0, 2.0, 3.0, 4.0])
            total += weight * (3.0 * result.codebook_loss + 5.0 * result.commitment_loss)
        d_x, d_anchors = tape.gradient(total, [x, anchors])
        return tf.reduce_sum(d_x**2) + tf.reduce_sum(d_anchors**2)

    def expected(x, anchors, weight):
        difference = x - tf.gather(anchors, index)
        d_x = [1.0, 2.0, 3.0, 4.0] + weight * 5.0 * 2 * difference / 4
        d_anchors = weight * 3.0 * 2 / 4 * tf.math.unsorted_segment_sum(-difference, index, 3)
        return tf.reduce_sum(d_x**2) + tf.reduce_sum(d_anchors**2)

    inputs = [x, anchors, tf.constant(0.7)]
    gradients = []
    for function in (penalty, expected):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value = function(*inputs)
        gradients.append([tf.convert_to_tensor(gradient) for gradient in tape.gradient(value, inputs)])
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_memory_does_not_grow_with_scores_times_anchors(path):
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
def test_impossible_arguments_are_named(x, anchors, error, message, way, path):
    with pytest.raises(error, match=message):
        WAYS[way](nearest_anchor)(tf.constant(x), tf.constant(anchors))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("way", ["eager", "graph", "graph of unknown sizes"])
def test_anchors_that_are_not_finite_are_an_error(value, way, path):
    anchors = np.float32([0, 1, value])
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"`anchors` must be finite\. Received: anchors"):
        WAYS[way](nearest_anchor)(np.float32([0.5]), anchors)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_anchors_that_are_not_finite_show_as_nan_where_xla_cannot_raise(value, path):
    result = WAYS["xla"](nearest_anchor)(np.float32([0.5, 0.6, np.inf]), np.float32([0, value, 1]))
    assert np.isnan(result.quantized).all()
    assert np.isnan(result.codebook_loss)
    np.testing.assert_array_equal(result.index, [0, 0, 0])


@pytest.mark.parametrize(
    ("x", "anchors", "message"),
    [
        (np.zeros(3, np.float32), np.zeros((1, 2), np.float32), r"anchors.shape=\(1, 2\)"),
        (np.zeros(3, np.float32), np.zeros(0, np.float32), r"anchors.shape=\(0,\)"),
        (np.zeros(3, np.float32), np.float32(1), r"anchors.shape=\(\)"),
        (np.zeros(3, np.float32), np.zeros(65_537, np.float32), r"anchors.shape=\(65537,\)"),
        (np.zeros(3, np.float32), np.zeros(2, np.float64), "`anchors` must be float32 when `x` is float32"),
        (np.zeros(3, np.float64), np.zeros(2, np.float32), "`anchors` must be float64 when `x` is float64"),
    ],
)
@needs_library
def test_the_op_says_the_same_eagerly_and_in_graphs_whose_sizes_are_known_or_not(x, anchors, message):
    x, anchors = tf.constant(x), tf.constant(anchors)
    unknown = [tf.TensorSpec(None, x.dtype), tf.TensorSpec(None, anchors.dtype)]
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        COMPILED(x, anchors)
    with pytest.raises(ValueError, match=message):  # what TensorFlow makes of a shape function's InvalidArgument
        tf.function(COMPILED)(x, anchors)
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match=message):
        tf.function(COMPILED, input_signature=unknown)(x, anchors)


def test_unknown_ranks_are_known_in_time(path):
    unknown = [tf.TensorSpec(None, tf.float32)] * 2
    function = tf.function(nearest_anchor, input_signature=unknown)
    x, anchors = np.float32([[0.1, 0.9]]), np.float32([1, 0])
    np.testing.assert_array_equal(function(x, anchors).index, [[1, 0]])


@needs_library
def test_the_gradient_op_checks_what_it_is_given():
    gradient = custom_op.library().gradient
    x, anchors = tf.constant([0.1, 0.9]), tf.constant([0.0, 1.0])

    def call(index=(0, 1), d_quantized=(1.0, 1.0), d_codebook_loss=1.0):
        return gradient(x, anchors, tf.constant(index), tf.constant(d_quantized), tf.constant(d_codebook_loss), 1.0)

    assert call().d_x.shape == (2,)
    for wrong, message in (
        ({"index": (0, 2)}, r"index\[1\]=2"),
        ({"index": (-1, 0)}, r"index\[0\]=-1"),
        ({"index": (0, 1, 1)}, r"index.shape=\(3,\)"),
        ({"d_quantized": (1.0,)}, r"d_quantized.shape=\(1,\)"),
        ({"d_codebook_loss": (1.0,)}, r"d_codebook_loss.shape=\(1,\)"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            call(**wrong)
