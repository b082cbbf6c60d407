"""The folder that is written: versions, operations, weights, and what happens when it cannot be written."""

import os
import subprocess
import sys
import types
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from aib_tf import export, models, ops
from aib_tf.export import portability
from aib_tf.export.exporter import next_version
from tests.export.conftest import MODELS, build, operations_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model():
    return MODELS["vgg_aib_qt"]()


def test_versions_count_up_and_none_is_touched(model, tmp_path):
    path = tmp_path / "digits"
    assert next_version(path) == 1
    assert export.saved_model(model, path) == path / "1"
    assert export.saved_model(model, str(path), version=7) == path / "7"
    (path / "notes").mkdir()
    assert export.saved_model(model, path) == path / "8"
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    with pytest.raises(FileExistsError, match=r"next free one is 9\. .*version=7"):
        export.saved_model(model, path, version=7)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before
    assert sorted(entry.name for entry in path.iterdir()) == ["1", "7", "8", "notes"]


def test_weights_are_constants_stored_once_and_nothing_of_training_is_left(exported):
    model, folder, _ = exported("vgg_aib_qt")
    names = set(operations_of(folder))
    training = ("BatchNorm", "Grad", "Backprop", "Assign", "Variable", "VarHandle", "Dropout", "Rsqrt")
    assert not [name for name in names if any(part in name for part in training)]
    assert {"Conv2D", "MatMul", "DecodeImage"} <= names
    kernels = sum(weight.shape.num_elements() for weight in map(tf.convert_to_tensor, model.trainable_weights))
    size = (folder / "saved_model.pb").stat().st_size
    # Four bytes a weight, in one place although five signatures use them, and some 200 KB of graphs.
    assert 4 * kernels < size < 4 * kernels + 400_000


def test_fast_convolutions_are_an_option(tmp_path):
    layers = [keras.layers.Conv2D(128, 3, padding="same", name=name) for name in ("first", "second")]
    model = models.attach_attention(keras.Sequential([keras.Input((16, 16, 3)), *layers]), "first", 3)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.float32)
    expected = model.explain(pixels / 255)["logits"]
    counts = []
    for fast in (True, False):
        folder = export.saved_model(model, tmp_path / "model", fast_convolutions=fast)
        counts.append(operations_of(folder).count("Conv2D"))
        answer = tf.saved_model.load(str(folder)).signatures["serving_default"](images=tf.constant(pixels))
        np.testing.assert_allclose(answer["logits"], expected, rtol=2e-5, atol=2e-5)
    assert counts[0] > counts[1]


def test_statistics_normalise_where_there_is_no_data_set(model, pixels, tmp_path):
    images = pixels.astype(np.float32)
    mean, stddev = np.array([0.2, 0.4, 0.5]), 0.5
    folder = export.saved_model(model, tmp_path / "model", mean=mean, stddev=stddev)
    answer = tf.saved_model.load(str(folder)).signatures["serving_default"](images=tf.constant(images))
    expected = model.explain((images / 255 - mean) / stddev)["logits"]
    np.testing.assert_allclose(answer["logits"], expected, rtol=2e-5, atol=2e-5)


def test_two_exporters_at_once_take_a_number_each(model, tmp_path, monkeypatch):
    save, path = tf.saved_model.save, tmp_path / "model"

    def and_another_is_faster(module, folder, **options):
        save(module, folder, **options)
        if not (path / "1").exists():
            (path / "1").mkdir()

    monkeypatch.setattr(tf.saved_model, "save", and_another_is_faster)
    assert export.saved_model(model, path) == path / "2"
    assert list((path / "1").iterdir()) == []
    with pytest.raises(FileExistsError, match="version=1"):
        export.saved_model(model, path, version=1)


def test_a_version_is_its_number(model, tmp_path):
    (tmp_path / "model" / "007").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="next free one is 8"):
        export.saved_model(model, tmp_path / "model", version=7)
    assert export.saved_model(model, tmp_path / "model", version=np.int64(3)) == tmp_path / "model" / "3"


def test_a_model_that_refuses_its_warm_up_is_not_let_out(model, tmp_path, monkeypatch):
    load = tf.saved_model.load

    def load_broken(folder):
        loaded = load(folder)

        def refuse(**inputs):
            raise tf.errors.InvalidArgumentError(None, None, "Expects arg[0] to be float but bfloat16 is provided")

        return types.SimpleNamespace(signatures={**loaded.signatures, "explain": refuse})

    monkeypatch.setattr(tf.saved_model, "load", load_broken)
    with pytest.raises(tf.errors.InvalidArgumentError):
        export.saved_model(model, tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []


def test_only_operations_of_a_stock_tensorflow_are_let_out(tmp_path):
    @keras.saving.register_keras_serializable(package="tests")
    class CallsPython(keras.layers.Layer):
        def call(self, x):
            return tf.ensure_shape(tf.numpy_function(lambda x: x * 2, [x], tf.float32, stateful=False), x.shape)

    backbone = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv"), CallsPython(), keras.layers.ReLU()]
    )
    model = models.attach_attention(backbone, "conv", 3)
    with pytest.raises(export.UnportableModelError, match=r"calls Python.*Received: .*PyFunc"):
        export.saved_model(model, tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []


def test_xla_is_demanded_on_request_alone(tmp_path):
    @keras.saving.register_keras_serializable(package="tests")
    class Compiled(keras.layers.Layer):
        def call(self, x):
            return tf.function(tf.nn.relu, jit_compile=True)(x)

    layers = [keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv"), Compiled()]
    model = models.attach_attention(keras.Sequential(layers), "conv", 3)
    plain, compiled = (export.saved_model(model, tmp_path / "model", jit_compile=jit) for jit in (False, True))
    portability.check_stock_operations(plain)
    with pytest.raises(export.UnportableModelError, match=r"jit_compile=True.*Received: functions "):
        portability.check_stock_operations(compiled)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.float32)
    for folder in (plain, compiled):
        answer = tf.saved_model.load(str(folder)).signatures["serving_default"](images=tf.constant(pixels))
        np.testing.assert_allclose(answer["logits"], model.explain(pixels / 255)["logits"], rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(ops.implementation().name != "custom_op", reason=ops.implementation().reason)
def test_the_compiled_op_stays_on_request_and_is_found(model, exported, pixels, tmp_path):
    folder = export.saved_model(model, tmp_path / "model", dataset="cifar10", compiled_op=True)
    assert "AibTf>NearestAnchor" in set(operations_of(folder))
    with pytest.raises(export.UnportableModelError, match=r"Received: AibTf>NearestAnchor \(in function "):
        portability.check_stock_operations(folder)
    images = tf.constant(pixels.astype(np.float32))
    answer = tf.saved_model.load(str(folder)).signatures["explain"](images=images)
    _, portable, loaded = exported("vgg_aib_qt")
    portability.check_stock_operations(portable)
    expected = loaded.signatures["explain"](images=images)
    np.testing.assert_array_equal(answer["anchor_index"], expected["anchor_index"])
    np.testing.assert_allclose(answer["logits"], expected["logits"], rtol=1e-5, atol=1e-5)


def test_the_compiled_op_that_is_not_there_cannot_be_kept(model, tmp_path, monkeypatch):
    missing = ops.implementation()._replace(name="tensorflow", reason="It was not built.")
    monkeypatch.setattr("aib_tf.export.exporter.implementation", lambda: missing)
    with pytest.raises(ImportError, match=r"It was not built\. Received: compiled_op=True"):
        export.saved_model(model, tmp_path / "model", compiled_op=True)


def test_another_backend_is_told_what_to_do(model, tmp_path, monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(ImportError, match=r"KERAS_BACKEND=tensorflow\. Received: KERAS_BACKEND=jax"):
        export.saved_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_without_a_data_set_pixels_are_scaled_to_one_and_classes_are_numbers(model, pixels, tmp_path):
    folder = export.saved_model(model, tmp_path / "model")
    answer = tf.saved_model.load(str(folder)).signatures["serving_default"](images=tf.constant(pixels, tf.float32))
    expected = model.explain(pixels.astype(np.float32) / 255)["logits"]
    np.testing.assert_allclose(answer["logits"], expected, rtol=2e-5, atol=2e-5)
    assert answer["class_name"].numpy().tolist() == [str(label).encode() for label in answer["label"].numpy()]
    named = export.saved_model(model, tmp_path / "model", class_names=[f"n{number}" for number in range(10)])
    answer = tf.saved_model.load(str(named)).signatures["serving_default"](images=tf.constant(pixels, tf.float32))
    assert answer["class_name"].numpy().tolist() == [f"n{label}".encode() for label in answer["label"].numpy()]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"dataset": "cifar100"}, ValueError, r"cifar100 has images \(32, 32, 3\) of 100 classes.*dataset='cifar100'"),
        ({"dataset": "cluttered_digits"}, ValueError, r"images \(32, 32, 1\) of 10 classes, and vgg_aib_qt reads"),
        ({"dataset": "imagenet"}, ValueError, "imagenet"),
        (
            {"class_names": ["a", "b"]},
            ValueError,
            r"one text for each of 10 classes. Received: class_names=\['a', 'b'\]",
        ),
        ({"class_names": range(10)}, ValueError, "one text for each of 10 classes"),
        ({"class_names": "abcdefghij"}, ValueError, "one text for each of 10 classes"),
        ({"class_names": [*"abcdefghi", "\ud800"]}, ValueError, "one text for each of 10 classes"),
        ({"stddev": 0}, ValueError, "mean=None, stddev=0"),
        ({"mean": [0.1, 0.2]}, ValueError, r"3 numbers, one a channel.*mean=\[0.1, 0.2\]"),
        ({"mean": 0.5, "dataset": "cifar10"}, ValueError, "cifar10 has statistics of its own.*mean=0.5"),
        ({"version": 2**63}, ValueError, "version=9223372036854775808"),
        ({"version": 0}, ValueError, "version=0"),
        ({"version": "1"}, ValueError, "version='1'"),
        ({"dtype": "float16"}, ValueError, "dtype='float16'"),
        ({"image_dtype": "int8"}, ValueError, "image_dtype='int8'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_and_nothing_is_written(model, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        export.saved_model(model, tmp_path / "model", **arguments)
    assert not any(tmp_path.rglob("*.pb")) and not any((tmp_path / "model").glob("*"))


def test_models_that_cannot_be_exported_are_refused(tmp_path):
    with pytest.raises(TypeError, match="AIBClassifier or a PayAttentionClassifier"):
        export.saved_model(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), tmp_path / "model")
    broken = build("vgg", width=0.05)
    kernel = broken.features.layers[1].kernel
    kernel.assign(np.full(kernel.shape, np.nan))
    with pytest.raises(ValueError, match=f"NaN or infinite.*Received: .*{kernel.name}"):
        export.saved_model(broken, tmp_path / "model")
    backbone = keras.Sequential([keras.Input((None, None, 3)), keras.layers.Conv2D(4, 3, name="conv")])
    sizeless = models.attach_attention(backbone, "conv", 10)
    with pytest.raises(ValueError, match="fixed size: build the model with one, or name the data set"):
        export.saved_model(sizeless, tmp_path / "model")
    assert not any((tmp_path / "model").glob("*"))
    folder = export.saved_model(sizeless, tmp_path / "model", dataset="cifar10")
    signature = tf.saved_model.load(str(folder)).signatures["explain"]
    assert signature.structured_outputs["attention_image"].shape.as_list() == [None, 32, 32]
    assert signature(images=tf.zeros((1, 32, 32, 3)))["attention"].shape == (1, 30, 30)


def test_a_folder_that_is_none_or_cannot_be_made_is_an_error(model, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="file"):
        export.saved_model(model, tmp_path / "file" / "model")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_path_with_a_scheme_makes_no_local_folder_of_its_name(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"local folder.*Received: path='ram://models/digits'"):
        export.saved_model(model, "ram://models/digits")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [tf.errors.ResourceExhaustedError(None, None, "No space left"), KeyboardInterrupt()])
def test_an_export_that_stops_half_way_leaves_nothing(model, tmp_path, monkeypatch, error):
    save = tf.saved_model.save

    def stop(module, folder, **options):
        save(module, folder, **options)
        raise error

    monkeypatch.setattr(tf.saved_model, "save", stop)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError
    with pytest.raises(expected, match=None if expected is KeyboardInterrupt else "No space left.*path="):
        export.saved_model(model, tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files.")
def test_a_disk_that_is_full_leaves_nothing(tmp_path):
    # The system refuses what is written beyond 100 KB of a file, as it does on a disk that is full.
    program = (
        "import resource, signal, sys, aib_tf\n"
        "model = aib_tf.models.build('vgg_aib', (32, 32, 3), 10, width=0.05, latent_dim=8)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    aib_tf.export.saved_model(model, sys.argv[1])\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    path = tmp_path / "model"
    result = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert "nothing of it stays" in result.stdout and "Free the disk" in result.stdout
    assert list(path.iterdir()) == []
