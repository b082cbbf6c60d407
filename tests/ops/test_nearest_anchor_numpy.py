"""The compiled module for NumPy arrays against plain NumPy: values, boundaries, gradients, memory layouts, threads."""

import ast
import concurrent.futures
import ctypes
import importlib
import inspect
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import time

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies
from hypothesis.extra import numpy as numpy_strategies

import aib_tf
from tests import reference

if os.environ.get("AIB_TF_OPS") != "custom":  # then it has to be there
    pytest.importorskip(
        "aib_tf.ops.nearest_anchor_numpy",
        reason="aib_tf is installed without its compiled modules: install it where there is a C++ compiler",
    )
compiled = importlib.import_module("aib_tf.ops.nearest_anchor_numpy")

DTYPES = reference.DTYPES
ANCHORS = reference.ANCHORS | {
    "zeros of both signs": [1.0, -0.0, 0.0, -1.0],
    "subnormal": [3e-45, 0.0, -1e-44, 1e-40],
    "forty": np.random.default_rng(1).normal(0, 3, 40),
    "at the end of the numbers": [3.4e38, -3.4e38, 3.0e38, 3.3e38],
}


def dtype_of_anchors(dtype):
    return np.dtype("float64" if dtype == "float64" else "float32")


def assert_same_bits(one, other):
    one, other = np.asarray(one), np.asarray(other)
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert one.tobytes() == other.tobytes()


def scores_and_upstream(dtype, size):
    """Scores, anchors and upstream gradients for calls that are long enough for several threads."""
    generator = np.random.default_rng(5)
    x = generator.normal(0.5, 0.5, size).astype(DTYPES[dtype])
    upstream = generator.normal(0, 1, size).astype(DTYPES[dtype])
    return x, generator.random(50).astype(dtype_of_anchors(dtype)), upstream


@pytest.mark.parametrize("name", ANCHORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_boundary_value_goes_where_argmin_says(dtype, name):
    anchors = np.asarray(ANCHORS[name], dtype_of_anchors(dtype))
    with np.errstate(over="ignore", under="ignore"):
        x = reference.boundary_values(anchors).astype(DTYPES[dtype])
        index = reference.nearest_index(x, anchors)
        quantized = np.where(np.isnan(x), x, anchors[index].astype(x.dtype))
    result = compiled.nearest_anchor(x, anchors)
    np.testing.assert_array_equal(result.index, index)
    assert_same_bits(result.quantized, quantized)
    assert np.isnan(result.codebook_loss)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_anchors_whose_distance_is_beyond_the_numbers_are_equally_near(dtype):
    largest = np.finfo(dtype).max
    anchors = np.asarray([0.9, 0.8, 1, 0.8], dtype) * largest
    x = np.asarray([-1, -0.15, -0.3, 0, 1], dtype) * largest
    for sign in (1, -1):
        index = compiled.nearest_anchor(sign * x, sign * anchors).index
        np.testing.assert_array_equal(index, [0, 1, 0, 1, 2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_are_the_mean_square_of_the_differences(dtype):
    x, anchors, _ = scores_and_upstream(dtype, 40_001)
    result = compiled.nearest_anchor(x, anchors)
    index = reference.nearest_index(x, anchors)
    np.testing.assert_array_equal(result.index, index)
    expected = np.mean((x.astype(np.float64) - anchors[index]) ** 2)
    np.testing.assert_allclose(result.codebook_loss, expected, rtol=1e-6)
    assert_same_bits(result.codebook_loss, result.commitment_loss)
    assert type(result.codebook_loss) is type(result.commitment_loss) is anchors.dtype.type


@pytest.mark.parametrize("count", [65, 4096, 65_536])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_many_anchors_are_all_found(dtype, count):
    anchors = np.random.default_rng(6).permutation(count).astype(dtype)
    x = np.random.default_rng(7).uniform(-2, count + 1, 70_000).astype(dtype)
    index = compiled.nearest_anchor(x, anchors).index
    place = np.argsort(anchors)
    below = np.clip(np.floor(x).astype(int), 0, count - 1)
    above = np.minimum(below + 1, count - 1)
    to_below, to_above = np.abs(x - anchors[place[below]]), np.abs(x - anchors[place[above]])
    lowest = np.minimum(place[below], place[above])
    nearer = np.where(to_below < to_above, place[below], place[above])
    np.testing.assert_array_equal(index, np.where(to_below == to_above, lowest, nearer))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (2, 3, 4, 1), (0,), (2, 0, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_shape_is_kept_and_an_empty_one_costs_nothing(dtype, shape):
    anchors = np.asarray([0, 0.5, 1], dtype_of_anchors(dtype))
    x = np.random.default_rng(2).random(shape).astype(DTYPES[dtype])
    result = compiled.nearest_anchor(x, anchors)
    gradient = compiled.nearest_anchor_gradient(x, anchors, result.index, x, 1.0, 1.0)
    for each in (result.quantized, gradient.d_x):
        assert isinstance(each, np.ndarray)
        assert (each.dtype, each.shape) == (x.dtype, shape)
    assert (result.index.dtype, result.index.shape) == (np.int32, shape)
    assert (gradient.d_anchors.dtype, gradient.d_anchors.shape) == (anchors.dtype, (3,))
    np.testing.assert_array_equal(result.index, reference.nearest_index(x, anchors))
    if x.size == 0:
        assert result.codebook_loss == result.commitment_loss == 0
        assert not gradient.d_anchors.any()


def test_result_has_the_fields_of_the_tensorflow_op_and_can_be_pickled():
    x, anchors = np.float32([0.2, 0.9]), np.float32([0, 1])
    result = compiled.nearest_anchor(x, anchors)
    gradient = compiled.nearest_anchor_gradient(x, anchors, result.index, x, 0, 0)
    assert result._fields == aib_tf.ops.NearestAnchor._fields
    assert gradient._fields == ("d_x", "d_anchors")
    for each in (result, gradient):
        again = pickle.loads(pickle.dumps(each))
        assert type(again) is type(each)
        for one, other in zip(again, each, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("name", sorted(ANCHORS.keys() - {"at the end of the numbers"}))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_formula(dtype, name):
    anchors = np.asarray(ANCHORS[name], dtype_of_anchors(dtype))
    x = np.random.default_rng(3).normal(0.5, 1, (5, 8)).astype(DTYPES[dtype])
    # Increasing upstream gradients: an element that is routed to the wrong place shows.
    upstream = np.arange(x.size).reshape(x.shape).astype(x.dtype)
    index = reference.nearest_index(x, anchors).astype(np.int32)
    result = compiled.nearest_anchor_gradient(x, anchors, index, upstream, 3.0, np.float32(5))
    expected_x, expected_anchors = reference.nearest_anchor_gradients(x, anchors, upstream, 3.0, 5.0)
    precision = float(ml_dtypes.finfo(x.dtype).eps)
    np.testing.assert_allclose(result.d_x.astype(np.float64), expected_x.astype(np.float64), rtol=max(precision, 1e-6))
    np.testing.assert_allclose(
        result.d_anchors, expected_anchors, rtol=1e-5, atol=1e-6 * np.abs(expected_anchors).max()
    )


def test_gradients_of_a_large_array_are_those_of_the_formula():
    x, anchors, upstream = scores_and_upstream("float32", 100_003)
    index = compiled.nearest_anchor(x, anchors).index
    result = compiled.nearest_anchor_gradient(x, anchors, index, upstream, -2.0, x.size)
    difference = x.astype(np.float64) - anchors[index]
    np.testing.assert_allclose(result.d_x, upstream + 2 * difference, rtol=1e-4, atol=1e-6)
    sums = np.bincount(index, -difference, minlength=anchors.size)
    np.testing.assert_allclose(result.d_anchors, -4 / x.size * sums, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loss_without_gradient_adds_nothing_also_at_nan_and_infinity(dtype):
    anchors = np.asarray([0, 1], dtype_of_anchors(dtype))
    x = np.asarray([0.1, 0.7, np.inf, -np.inf, np.nan]).astype(DTYPES[dtype])
    upstream = np.asarray([-0.0, 2, 3, 4, 5]).astype(x.dtype)
    index = np.int32([0, 1, 1, 0, 0])
    for d_codebook, d_commitment in [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (-0.0, -0.0)]:
        result = compiled.nearest_anchor_gradient(x, anchors, index, upstream, d_codebook, d_commitment)
        if d_commitment == 0:
            assert_same_bits(result.d_x, upstream)
        else:
            np.testing.assert_array_equal(result.d_x[2:].astype(np.float32), [np.inf, -np.inf, np.nan])
        if d_codebook == 0:
            assert_same_bits(result.d_anchors, np.zeros_like(anchors))
        else:
            np.testing.assert_array_equal(result.d_anchors, [np.nan, -np.inf])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_memory_layout_gives_the_result_of_a_contiguous_array(dtype):
    x, anchors, upstream = scores_and_upstream(dtype, 24)
    x, upstream = x.reshape(4, 6), upstream.reshape(4, 6)
    expected = compiled.nearest_anchor(x, anchors)
    expected_gradient = compiled.nearest_anchor_gradient(x, anchors, expected.index, upstream, 1.0, 1.0)

    def misaligned(array):
        raw = np.empty(array.nbytes + 1, np.uint8)[1:]
        raw[:] = np.frombuffer(array.tobytes(), np.uint8)
        return raw.view(array.dtype).reshape(array.shape)

    def read_only(array):
        array = array.copy()
        array.flags.writeable = False
        return array

    def spread(array):
        wide = np.zeros([2 * size for size in array.shape], array.dtype)
        wide[tuple(slice(None, None, 2) for _ in array.shape)] = array
        return wide[tuple(slice(None, None, 2) for _ in array.shape)]

    layouts = {
        "column-major": np.asfortranarray,
        "every second element": spread,
        "backwards": lambda array: np.flip(np.flip(array).copy()),
        "byte-swapped": lambda array: array.astype(array.dtype.newbyteorder()),
        "misaligned": misaligned,
        "read-only": read_only,
        "subclass": lambda array: array.view(np.memmap),
    }
    for name, change in layouts.items():
        changed = [change(array) for array in (x, anchors, expected.index, upstream)]
        copies = [array.copy() for array in changed]
        result = compiled.nearest_anchor(*changed[:2])
        gradient = compiled.nearest_anchor_gradient(*changed, 1.0, 1.0)
        for one, other in zip((*result, *gradient), (*expected, *expected_gradient), strict=True):
            assert type(one) in (np.ndarray, anchors.dtype.type), name
            assert_same_bits(one, other)
        for array, copy in zip(changed, copies, strict=True):
            assert_same_bits(array, copy)


def test_lists_are_taken_as_numpy_takes_them():
    assert compiled.nearest_anchor([0.2, 0.9], [0.0, 1.0]).quantized.tolist() == [0, 1]
    assert compiled.nearest_anchor(0.2, [0.0, 1.0]).quantized.dtype == np.float64
    with pytest.raises(ValueError, match=r"anchors\.dtype=float64"):
        compiled.nearest_anchor(np.float32([0.2]), [0.0, 1.0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_the_number_of_threads_nor_a_repeat_shows_in_the_bits(dtype):
    x, anchors, upstream = scores_and_upstream(dtype, 600_001)
    expected = compiled.nearest_anchor(x, anchors, threads=1)
    expected_gradient = compiled.nearest_anchor_gradient(x, anchors, expected.index, upstream, 1.0, 1.0, threads=1)
    for repeat in range(20):
        threads = (2, 4, 0, 1)[repeat % 4]
        result = compiled.nearest_anchor(x, anchors, threads=threads)
        gradient = compiled.nearest_anchor_gradient(x, anchors, expected.index, upstream, 1.0, 1.0, threads=threads)
        for one, other in zip((*result, *gradient), (*expected, *expected_gradient), strict=True):
            assert_same_bits(one, other)


def test_many_python_threads_may_call_it_at_once():
    x, anchors, _ = scores_and_upstream("float32", 200_000)
    expected = compiled.nearest_anchor(x, anchors)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: compiled.nearest_anchor(x, anchors), range(20)):
            for one, other in zip(result, expected, strict=True):
                assert_same_bits(one, other)


@pytest.mark.parametrize("function", ["nearest_anchor", "nearest_anchor_gradient"])
def test_other_python_threads_run_meanwhile(function):
    x, anchors, upstream = scores_and_upstream("float32", 100_000)
    arguments = [x, anchors]
    if function == "nearest_anchor_gradient":
        arguments += [compiled.nearest_anchor(x, anchors).index, upstream, 1.0, 1.0]
    call = getattr(compiled, function)
    steps, stop = [], threading.Event()

    def other_thread():
        while not stop.is_set():
            steps.append(None)
            time.sleep(0)

    # No thread is made to give way for so long, so that the other one runs only when the call lets it.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread = threading.Thread(target=other_thread)
        thread.start()
        before, deadline = len(steps), time.monotonic() + 60
        while len(steps) == before and time.monotonic() < deadline:
            call(*arguments, threads=1)
        after = len(steps)
        stop.set()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert after > before


RUN_WITHOUT_TENSORFLOW = """
import importlib.util, sys
import ml_dtypes, numpy as np

spec = importlib.util.spec_from_file_location("nearest_anchor_numpy", sys.argv[1])
compiled = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compiled)
results = {}
with np.load(sys.argv[2]) as inputs:
    for key, dtype in [("a", "float16"), ("b", ml_dtypes.bfloat16), ("c", "float32"), ("d", "float64")]:
        for name in inputs:
            x, anchors = inputs["x"].astype(dtype), inputs[name].astype("float64" if dtype == "float64" else "float32")
            result = compiled.nearest_anchor(x, anchors)
            gradient = compiled.nearest_anchor_gradient(x, anchors, result.index, x[::-1], 3.0, 5.0)
            for field, value in {**result._asdict(), **gradient._asdict()}.items():
                results[f"{key} {name} {field}"] = np.frombuffer(np.asarray(value).tobytes(), np.uint8)
np.savez(sys.argv[3], **results)
assert not {"tensorflow", "keras", "aib_tf"} & sys.modules.keys()
print(compiled.instruction_set())
"""


@pytest.fixture(scope="module")
def run_in_a_new_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instruction_sets")
    x = np.random.default_rng(8).normal(0, 1, 20_011).astype(np.float32)
    x[::1000] = 1e30  # so far from many anchors that distances round to equal ones
    anchors = {f"{count} anchors": np.linspace(-1, 1, count).astype(np.float32) for count in (2, 8, 20, 50, 256, 3000)}
    np.savez(folder / "inputs.npz", x=x, **anchors)

    def run(instruction_set):
        path = folder / f"{instruction_set}.npz"
        command = [sys.executable, "-c", RUN_WITHOUT_TENSORFLOW, compiled.__file__, folder / "inputs.npz", path]
        environment = os.environ | {"AIB_TF_CPU": instruction_set}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        with np.load(path) as results:
            return done.stdout.strip(), dict(results)

    return run


def test_needs_no_tensorflow_and_can_be_held_to_the_baseline(run_in_a_new_process):
    instruction_set, results = run_in_a_new_process("baseline")
    assert instruction_set == "baseline"
    assert len(results) == 4 * 7 * 6


@pytest.mark.parametrize("instruction_set", ["avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(run_in_a_new_process, instruction_set):
    used, results = run_in_a_new_process(instruction_set)
    if used != instruction_set:
        pytest.skip(f"this processor does not have {instruction_set}")
    _, expected = run_in_a_new_process("baseline")
    assert results.keys() == expected.keys()
    for key, value in results.items():
        assert_same_bits(value, expected[key])


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(data=strategies.data())
def test_any_scores_and_anchors_agree_with_argmin(data):
    numbers = strategies.floats(width=32, allow_nan=False, allow_infinity=False)
    anchors = data.draw(numpy_strategies.arrays(np.float32, strategies.integers(1, 12), elements=numbers))
    near = strategies.sampled_from(anchors.tolist())
    anything = strategies.floats(width=32)
    x = data.draw(numpy_strategies.arrays(np.float32, strategies.integers(0, 30), elements=anything | near))
    result = compiled.nearest_anchor(x, anchors)
    np.testing.assert_array_equal(result.index, reference.nearest_index(x, anchors))


F32, F64, I32, I64 = np.float32, np.float64, np.int32, np.int64


@pytest.mark.parametrize(
    ("x", "anchors", "message"),
    [
        (np.zeros(3, I32), np.zeros(2, F32), "`x` must be one of float16, .* Received: x.dtype=int32"),
        (np.zeros(3, complex), np.zeros(2, F32), "x.dtype=complex128"),
        (np.zeros(3, np.longdouble), np.zeros(2, F64), "x.dtype=(longdouble|float128|float96)"),
        (np.zeros(3, ml_dtypes.float8_e5m2), np.zeros(2, F32), "x.dtype=float8_e5m2"),
        (["a"], np.zeros(2, F32), "x.dtype=str32"),
        (None, np.zeros(2, F32), "x.dtype=object"),
        (np.zeros(3, F32), np.zeros(2, F64), "`anchors` must be float32 when .* Received: anchors.dtype=float64"),
        (np.zeros(3, F64), np.zeros(2, F32), "`anchors` must be float64 when .* Received: anchors.dtype=float32"),
        (np.zeros(3, np.float16), np.zeros(2, np.float16), "Received: anchors.dtype=float16"),
        (np.zeros(3, F32), np.zeros((1, 2), F32), r"must be a vector \(Q,\)\. Received: anchors\.shape=\(1, 2\)"),
        (np.zeros(3, F32), F32(1), r"anchors\.shape=\(\)"),
        (np.zeros(3, F32), np.zeros(0, F32), r"1 to 65536 elements\. Received: anchors\.shape=\(0,\)"),
        (np.zeros(3, F32), np.zeros(65_537, F32), r"anchors\.shape=\(65537,\)"),
        (np.zeros(3, F32), F32([0, np.nan]), r"must be finite\. Received: anchors\[1\]=nan"),
        (np.zeros(0, F32), F32([np.inf, 0]), r"anchors\[0\]=inf"),
        (np.zeros(3, F64), F64([0, 1, -np.inf]), r"anchors\[2\]=-inf"),
    ],
)
def test_impossible_scores_and_anchors_are_named(x, anchors, message):
    index = np.zeros(np.shape(x), I32)
    with pytest.raises(ValueError, match=message):
        compiled.nearest_anchor(x, anchors)
    with pytest.raises(ValueError, match=message):
        compiled.nearest_anchor_gradient(x, anchors, index, x, 1.0, 1.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"index": np.zeros((2, 3), I64)}, "`index` must be int32. Received: index.dtype=int64"),
        ({"index": np.zeros(6, I32)}, r"shape of `x`, \(2, 3\)\. Received: index\.shape=\(6,\)"),
        ({"index": I32([[0, 1, 2], [2, 1, 3]])}, r"`index` must be in \[0, 3\)\. Received: index\[1, 2\]=3"),
        ({"index": I32([[0, -1, 7], [2, 1, 3]])}, r"index\[0, 1\]=-1"),
        ({"d_quantized": np.zeros((2, 3), F64)}, "must be float32. Received: d_quantized.dtype=float64"),
        ({"d_quantized": np.zeros((3, 2), F32)}, r"`d_quantized` .* \(2, 3\)\. Received: d_quantized\.shape=\(3, 2\)"),
        ({"d_codebook_loss": F32([1])}, r"must be a scalar\. Received: d_codebook_loss\.shape=\(1,\)"),
        ({"d_commitment_loss": 1j}, "must be a real number. Received: d_commitment_loss.dtype=complex128"),
        ({"d_commitment_loss": "1"}, "d_commitment_loss.dtype=str32"),
        ({"threads": -1}, "`threads` must not be negative. Received: threads=-1"),
    ],
)
def test_impossible_arguments_of_the_gradient_are_named(changed, message):
    arguments = {
        "x": np.zeros((2, 3), F32),
        "anchors": np.zeros(3, F32),
        "index": np.zeros((2, 3), I32),
        "d_quantized": np.zeros((2, 3), F32),
        "d_codebook_loss": 1.0,
        "d_commitment_loss": 1.0,
    }
    compiled.nearest_anchor_gradient(**arguments)
    with pytest.raises(ValueError, match=message):
        compiled.nearest_anchor_gradient(**arguments | changed)


def test_an_index_out_of_range_is_found_in_every_chunk_and_named_by_the_first():
    x, anchors, upstream = scores_and_upstream("float32", 300_000)
    index = np.zeros(x.size, I32)
    index[[123_456, 299_999]] = 50, -7
    for threads in (1, 4):
        with pytest.raises(ValueError, match=r"index\[123456\]=50"):
            compiled.nearest_anchor_gradient(x, anchors, index, upstream, 1.0, 1.0, threads=threads)


def test_a_negative_number_of_threads_is_an_error():
    with pytest.raises(ValueError, match="threads=-3"):
        compiled.nearest_anchor(np.zeros(3, F32), np.zeros(1, F32), threads=-3)
    with pytest.raises(TypeError):
        compiled.nearest_anchor(np.zeros(3, F32), np.zeros(1, F32), 2)


def test_the_stub_has_the_names_and_parameters_of_the_module():
    stub = ast.parse(pathlib.Path(aib_tf.ops.__file__).with_name("nearest_anchor_numpy.pyi").read_text("utf-8"))
    names, parameters = set(), {}
    for node in stub.body:
        if isinstance(node, ast.FunctionDef):
            parameters[node.name] = [each.arg for each in (*node.args.args, *node.args.kwonlyargs)]
        elif isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            names.add(node.target.id)
    if not compiled.has_cuda:
        names.remove("DeviceArray")
    public = {name for name in vars(compiled) if not name.startswith("_")}
    assert {name for name in names if not name.startswith("_")} | parameters.keys() == public
    for name, expected in parameters.items():
        assert list(inspect.signature(getattr(compiled, name)).parameters) == expected


class OnDevice:
    """Stands for an array of another library, such as CuPy."""

    def __init__(self, array, address=0, **changes):
        self.dtype = array.dtype
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": "<V2" if array.dtype == ml_dtypes.bfloat16 else array.dtype.str,
            "data": (address, False),
            "version": 3,
        } | changes


@pytest.mark.skipif(compiled.has_cuda, reason="this build takes device arrays")
@pytest.mark.parametrize("name", ["x", "anchors"])
def test_without_cuda_a_device_array_is_refused_with_the_remedy(name):
    arguments = {"x": np.zeros(3, F32), "anchors": np.zeros(2, F32)}
    arguments[name] = OnDevice(arguments[name])
    with pytest.raises(ValueError, match=f"`{name}` is on a CUDA device.* AIB_TF_CUDA=1 .*{__name__}.OnDevice"):
        compiled.nearest_anchor(**arguments)


needs_cuda = pytest.mark.skipif(not compiled.has_cuda, reason="aib_tf was built without CUDA")


@needs_cuda
@pytest.mark.parametrize(
    ("x", "anchors", "message"),
    [
        (OnDevice(np.zeros(3, F32)), np.zeros(2, F32), "Either all arrays .* `x` is, `anchors` is not"),
        (np.zeros(3, F32), OnDevice(np.zeros(2, F32)), "Either all arrays .* `anchors` is, `x` is not"),
        (OnDevice(np.zeros(3, I32)), OnDevice(np.zeros(2, F32)), "x.dtype=int32"),
        (OnDevice(np.zeros(3, "V2")), OnDevice(np.zeros(2, F32)), "x.dtype=void16"),
        (OnDevice(np.zeros(3, ml_dtypes.bfloat16)), OnDevice(np.zeros(2, F64)), "when `x` is bfloat16"),
        (OnDevice(np.zeros(3, ">f4")), OnDevice(np.zeros(2, F32)), "byte order of this machine. Received: .*>f4"),
        (OnDevice(np.zeros((2, 3), F32), strides=(4, 8)), OnDevice(np.zeros(2, F32)), r"contiguous .* \(4, 8\)"),
        (OnDevice(np.zeros(3, F32), mask=OnDevice(np.zeros(3))), OnDevice(np.zeros(2, F32)), "`x` .* mask"),
        (OnDevice(np.zeros(3, F32), stream=0), OnDevice(np.zeros(2, F32)), "stream=0, which is ambiguous"),
        (OnDevice(np.zeros(3, F32), address=1026), OnDevice(np.zeros(2, F32)), "`x` .* multiple of 4 .* data=1026"),
        (OnDevice(np.zeros(3, F32)), OnDevice(np.zeros(2, F32), address=1025), "`anchors` .* of 4 .* data=1025"),
    ],
)
def test_impossible_device_arrays_are_named(x, anchors, message):
    with pytest.raises(ValueError, match=message):
        compiled.nearest_anchor(x, anchors)


class Device:
    """Memory of the first GPU, through the driver: no library has to be installed for it."""

    def __init__(self):
        self.cuda = ctypes.CDLL("libcuda.so.1")
        context, device = ctypes.c_void_p(), ctypes.c_int()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name, *arguments):
        code = getattr(self.cuda, name)(*arguments)
        if code != 0:
            raise OSError(f"{name} returned {code}")

    def stream(self):
        stream = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(stream), 1)  # does not wait for the default stream
        return stream.value

    def put(self, array, **changes):
        array, address = np.ascontiguousarray(array).reshape(np.shape(array)), ctypes.c_size_t()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(array.nbytes, 1)))
        if array.nbytes:
            self.call("cuMemcpyHtoD_v2", address, ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))
        return OnDevice(array, address.value, **changes)

    def get(self, array):
        interface = array.__cuda_array_interface__
        result = np.empty(interface["shape"], array.dtype)
        self.call("cuCtxSynchronize")
        if result.nbytes:
            address = ctypes.c_size_t(interface["data"][0])
            self.call("cuMemcpyDtoH_v2", ctypes.c_void_p(result.ctypes.data), address, ctypes.c_size_t(result.nbytes))
        return result


@pytest.fixture(scope="module")
def device():
    try:
        return Device()
    except OSError as error:
        pytest.skip(f"there is no CUDA device here: {error}")


@needs_cuda
@pytest.mark.parametrize("shape", [(), (5,), (0,), (300, 1001)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_device_arrays_give_what_numpy_arrays_give(device, dtype, shape):
    anchors = np.random.default_rng(9).normal(0, 1, 50).astype(dtype_of_anchors(dtype))
    x = np.random.default_rng(10).normal(0, 1, shape).astype(DTYPES[dtype])
    upstream = (np.arange(x.size) % 1000).reshape(shape).astype(x.dtype)
    expected = compiled.nearest_anchor(x, anchors)
    expected_gradient = compiled.nearest_anchor_gradient(x, anchors, expected.index, upstream, 3.0, 5.0)

    # Each on a stream of its own, so that an order that is left to chance may show.
    there = [device.put(array, stream=device.stream()) for array in (x, anchors, upstream)]
    result = compiled.nearest_anchor(there[0], there[1])
    scalars = [device.put(anchors.dtype.type(3)), 5.0]
    gradient = compiled.nearest_anchor_gradient(there[0], there[1], result.index, there[2], *scalars)

    for one, other in zip((*result, *gradient), (*expected, *expected_gradient), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.__cuda_array_interface__["stream"] == there[0].__cuda_array_interface__["stream"]
    assert_same_bits(device.get(result.quantized), expected.quantized)
    assert_same_bits(device.get(result.index), expected.index)
    np.testing.assert_allclose(device.get(result.codebook_loss), expected.codebook_loss, rtol=1e-5)
    assert_same_bits(device.get(result.codebook_loss), device.get(result.commitment_loss))
    precision = max(float(ml_dtypes.finfo(x.dtype).eps), 1e-6)
    d_x, expected_d_x = device.get(gradient.d_x), expected_gradient.d_x
    np.testing.assert_allclose(d_x.astype(np.float64), expected_d_x.astype(np.float64), rtol=precision, atol=1e-9)
    np.testing.assert_allclose(device.get(gradient.d_anchors), expected_gradient.d_anchors, rtol=1e-5, atol=1e-7)


@needs_cuda
def test_a_device_array_without_a_stream_is_worked_on_in_the_default_stream(device):
    x, anchors = np.float32([0.2, 0.9]), np.float32([0, 1])
    for version in (2, 3):
        result = compiled.nearest_anchor(device.put(x, version=version), device.put(anchors, stream=None))
        assert result.quantized.__cuda_array_interface__["stream"] == 1
        np.testing.assert_array_equal(device.get(result.quantized), [0, 1])


@needs_cuda
def test_memory_of_the_host_is_not_taken_for_memory_of_the_device(device):
    x = np.zeros(3, F32)
    with pytest.raises(ValueError, match="`x` must be in the memory of a CUDA device"):
        compiled.nearest_anchor(OnDevice(x, x.ctypes.data), device.put(np.zeros(2, F32)))
