"""How the compiled op is found: one that fits is used, any other is left closed, and a user is told why."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import aib_tf
from aib_tf.ops import custom_op

PACKAGE = Path(aib_tf.__file__).parent
BUILD_FILE = PACKAGE / "ops" / "_build.json"
COMPILED = custom_op.library().nearest_anchor is not None
needs_library = pytest.mark.skipif(not COMPILED, reason=custom_op.implementation().reason)


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Lets the loader look at a copy of the build, which is written back by calling this with what differs."""
    description = json.loads(BUILD_FILE.read_text()) if BUILD_FILE.exists() else {"library": None, "tensorflow": None}
    if description["library"]:
        shutil.copy(BUILD_FILE.with_name(description["library"]["file"]), tmp_path)
    monkeypatch.setattr(custom_op, "_BUILD_FILE", tmp_path / "_build.json")
    monkeypatch.delenv("AIB_TF_OPS", raising=False)

    def write(**changes):
        (tmp_path / "_build.json").write_text(json.dumps(description | changes))
        return tmp_path

    return write


def find():
    """What a fresh process would find, with the warnings it would give."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        library = custom_op._library.__wrapped__()
    return library, [str(warning.message) for warning in caught]


def never_open(*_):
    raise AssertionError("The library was opened.")


@needs_library
def test_the_library_of_this_tensorflow_is_used():
    assert aib_tf.ops.implementation().name == "custom_op"


@needs_library
@pytest.mark.parametrize(("field", "value"), [("version", "2.1.0"), ("git_version", "v0-other"), ("cxx11_abi", 7)])
def test_a_library_for_another_tensorflow_stays_closed_and_the_remedy_is_named_once(build, field, value, monkeypatch):
    monkeypatch.setattr(tf, "load_op_library", never_open)
    build(tensorflow=json.loads(BUILD_FILE.read_text())["tensorflow"] | {field: value})
    library, messages = find()
    assert library.nearest_anchor is None
    assert library.implementation.name == "tensorflow"
    assert len(messages) == 1
    assert f"{field} {value}" in messages[0]
    assert "pip install" in messages[0]


@needs_library
@pytest.mark.parametrize("damage", ["shorter", "changed", "missing"])
def test_a_damaged_library_stays_closed(build, damage, monkeypatch):
    monkeypatch.setattr(tf, "load_op_library", never_open)
    folder = build()
    file = folder / json.loads(BUILD_FILE.read_text())["library"]["file"]
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "shorter" else content[:-1] + b"?")
    library, messages = find()
    assert library.nearest_anchor is None
    assert len(messages) == 1
    assert str(file) in messages[0]
    assert "pip install" in messages[0]


NO_TENSORFLOW = '{"library": {"file": "x", "size": 1, "sha256": ""}, "tensorflow": "2.21"}'


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"library": {}}', '{"library": 3}', "\0", NO_TENSORFLOW])
def test_a_damaged_description_of_the_build_is_no_reason_to_fail(build, content):
    (build() / "_build.json").write_text(content)
    library, messages = find()
    assert library.nearest_anchor is None
    assert len(messages) == 1
    assert "_build.json is damaged" in messages[0]


def test_a_build_that_could_not_be_made_says_why_without_a_warning(build):
    build(library=None, problem="There is no C++ compiler: install g++.")
    library, messages = find()
    assert library.nearest_anchor is None
    assert "There is no C++ compiler: install g++." in library.implementation.reason
    assert messages == []


def test_a_source_tree_without_a_build_uses_the_pure_path_without_a_warning(build):
    (build() / "_build.json").unlink()
    library, messages = find()
    assert "was not built" in library.implementation.reason
    assert messages == []


@needs_library
def test_a_gpu_is_not_given_up_for_an_op_without_cuda(build, monkeypatch):
    build(cuda=None)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU:0"] if kind == "GPU" else [])
    monkeypatch.setattr(tf, "load_op_library", never_open)
    library, messages = find()
    assert "without CUDA" in library.implementation.reason
    assert messages == []


@needs_library
def test_a_library_that_does_not_load_is_replaced_by_the_pure_path(build, monkeypatch):
    def fail(_):
        raise tf.errors.NotFoundError(None, None, "undefined symbol: something")

    build()
    monkeypatch.setattr(tf, "load_op_library", fail)
    library, messages = find()
    assert library.nearest_anchor is None
    assert "undefined symbol: something" in messages[0]


def test_one_path_can_be_forced(build, monkeypatch):
    build(library=None, problem="There is no C++ compiler: install g++.")
    monkeypatch.setenv("AIB_TF_OPS", "custom")
    with pytest.raises(ImportError, match=r"AIB_TF_OPS=custom .* There is no C\+\+ compiler: install g\+\+\."):
        find()
    monkeypatch.setenv("AIB_TF_OPS", "tensorflow")
    monkeypatch.setattr(tf, "load_op_library", never_open)
    library, messages = find()
    assert library.implementation.name == "tensorflow"
    assert "AIB_TF_OPS=tensorflow" in library.implementation.reason
    assert messages == []
    monkeypatch.setenv("AIB_TF_OPS", "fast")
    with pytest.raises(ValueError, match="AIB_TF_OPS=fast"):
        find()


PROGRAM = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import aib_tf
    results = [aib_tf.ops.nearest_anchor([0.1, 0.9], [0.0, 1.0]) for _ in range(2)]
ours = [str(warning.message) for warning in caught if "aib_tf" in str(warning.message)]
print(len(ours), aib_tf.ops.implementation().name, results[1].index.numpy().tolist())
print(aib_tf.ops.implementation().reason)
"""


@needs_library
@pytest.mark.parametrize("damage", ["another TensorFlow", "truncated"])
def test_a_process_survives_what_it_should_not_open(damage, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "aib_tf", ignore=shutil.ignore_patterns("__pycache__"))
    description = json.loads(BUILD_FILE.read_text())
    if damage == "truncated":
        library = tmp_path / "aib_tf" / "ops" / description["library"]["file"]
        library.write_bytes(library.read_bytes()[:100_000])
    else:
        description["tensorflow"]["version"] = "2.0.0"
        (tmp_path / "aib_tf" / "ops" / "_build.json").write_text(json.dumps(description))
    environment = {name: value for name, value in os.environ.items() if name != "AIB_TF_OPS"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, reason = done.stdout.splitlines()
    assert first == "1 tensorflow [0, 1]"
    assert "2.0.0" in reason or "damaged" in reason


LATE = """
import tensorflow as tf
tf.function(lambda x: x + 1, jit_compile=True)(tf.constant(1.0))  # TensorFlow makes the kernels of XLA here
import aib_tf
print(tf.function(aib_tf.ops.nearest_anchor, jit_compile=True)([0.1, 0.9], [0.0, 1.0]).index.numpy().tolist())
"""


@needs_library
def test_xla_knows_an_op_that_is_loaded_after_its_first_use():
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[0, 1]"


EXPORT = """
import sys
import keras, numpy as np, aib_tf
scores = keras.Input((4, 4, 1))
model = keras.Model(scores, aib_tf.layers.AnchorQuantizer(num_anchors=5)(scores))
model(np.zeros((1, 4, 4, 1), "float32"))
model.export(sys.argv[1], verbose=False)
"""
SERVE = """
import sys
import numpy as np, tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
print(np.unique(model.serve(np.linspace(-1, 2, 32, dtype="float32").reshape(2, 4, 4, 1))).tolist())
"""


def test_a_model_exported_on_the_pure_path_runs_without_this_library(tmp_path):
    environment = os.environ | {"AIB_TF_OPS": "tensorflow"}
    for program in (EXPORT, SERVE):
        command = [sys.executable, "-c", program, str(tmp_path / "model")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[0.0, 0.25, 0.5, 0.75, 1.0]"


def test_results_are_those_of_the_formula_whichever_path_it_is():
    result = aib_tf.ops.nearest_anchor(np.float32([0.1, 0.9]), np.float32([1, 0]))
    np.testing.assert_array_equal(result.index, [1, 0])
    np.testing.assert_allclose(result.codebook_loss, 0.01, rtol=1e-6)
