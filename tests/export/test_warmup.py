import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorflow_serving.apis import prediction_log_pb2

import aib_tf
from aib_tf import export
from aib_tf.export.warmup import WARMUP_BATCH_SIZES, WARMUP_FILE, warmup_requests, write_warmup_requests

_HEIGHT, _WIDTH, _CHANNELS = 12, 10, 3
_IMAGES = tf.TensorSpec((None, _HEIGHT, _WIDTH, _CHANNELS), tf.float32, "images")
_BYTES = tf.TensorSpec((None,), tf.string, "image_bytes")
_SIGNATURES = {
    "serving_default": [_IMAGES],
    "serve_bytes": [_BYTES],
    "predict_mc": [_IMAGES, tf.TensorSpec(None, tf.int32, "samples"), tf.TensorSpec(None, tf.int32, "seed")],
}


class _Model(tf.Module):
    """A SavedModel with the inputs of an exported one, whose outputs tell what it was given."""

    @tf.function
    def serving_default(self, images):
        return {"mean": tf.reduce_mean(images, (1, 2, 3))}

    @tf.function
    def serve_bytes(self, image_bytes):
        def decode(data):
            picture = tf.io.decode_image(data, _CHANNELS, expand_animations=False)
            return tf.image.resize(picture, (_HEIGHT, _WIDTH), antialias=True)

        return self.serving_default(tf.map_fn(decode, image_bytes, fn_output_signature=tf.float32))

    @tf.function
    def predict_mc(self, images, samples, seed):
        # As a server does that forms batches: every input has to have the batch axis.
        tf.debugging.assert_equal(tf.shape(samples), tf.shape(images)[:1])
        tf.debugging.assert_equal(tf.shape(seed), tf.shape(images)[:1])
        return {**self.serving_default(images), "samples": samples}


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """Folder of a SavedModel with warm-up requests."""
    folder = tmp_path_factory.mktemp("model") / "1"
    module = _Model()
    functions = {
        name: getattr(module, name).get_concrete_function(**{spec.name: spec for spec in specs})
        for name, specs in _SIGNATURES.items()
    }
    tf.saved_model.save(module, str(folder), signatures=functions)
    write_warmup_requests(folder, "digits", _SIGNATURES)
    return folder


def _read(folder):
    """The requests of a folder, by what its records say alone."""
    requests = []
    for record in tf.data.TFRecordDataset(str(folder / WARMUP_FILE)):
        log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
        assert log.WhichOneof("log_type") == "predict_log"
        requests.append(log.predict_log.request)
    return requests


def _batch(request):
    """Number of images of a request; every input agrees on it."""
    (size,) = {value.tensor_shape.dim[0].size for value in request.inputs.values()}
    return size


def test_there_is_one_request_for_each_signature_and_batch_size(saved_model):
    found = [(request.model_spec.signature_name, _batch(request)) for request in _read(saved_model)]
    assert found == [(name, size) for name in _SIGNATURES for size in WARMUP_BATCH_SIZES]


def test_the_file_lies_where_tensorflow_serving_looks(saved_model):
    assert (saved_model / "assets.extra" / "tf_serving_warmup_requests").is_file()
    assert [path.name for path in (saved_model / "assets.extra").iterdir()] == ["tf_serving_warmup_requests"]


def test_the_saved_model_answers_each_request(saved_model):
    loaded = tf.saved_model.load(str(saved_model))
    requests = _read(saved_model)
    assert len(requests) == 9
    for request in requests:
        signature = loaded.signatures[request.model_spec.signature_name]
        inputs = {name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()}
        answer = signature(**inputs)
        assert answer["mean"].shape == (_batch(request),)
        # Pictures: not black, not white, and each another one.
        assert np.all((answer["mean"] > 20) & (answer["mean"] < 235))
        assert len(set(answer["mean"].numpy().tolist())) == _batch(request)
        if "samples" in answer:
            np.testing.assert_array_equal(answer["samples"], np.full(_batch(request), 2, np.int32))
            np.testing.assert_array_equal(inputs["seed"], np.zeros(_batch(request), np.int32))


def test_an_exported_model_answers_its_warmup_requests(tmp_path):
    model = aib_tf.models.build("vgg_aib_qt", (32, 32, 1), classes=4, width=0.05, latent_dim=16, num_anchors=5, seed=1)
    folder = export.saved_model(model, tmp_path / "digits")
    loaded = tf.saved_model.load(str(folder))
    requests = _read(folder)
    found = [(request.model_spec.signature_name, _batch(request)) for request in requests]
    assert sorted(found) == sorted((name, size) for name in loaded.signatures for size in WARMUP_BATCH_SIZES)
    for request in requests:
        inputs = {name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()}
        answer = loaded.signatures[request.model_spec.signature_name](**inputs)
        assert {value.shape[0] for value in answer.values()} == {_batch(request)}


def test_images_have_the_shape_dtype_and_range_that_the_signature_names():
    for dtype in (tf.uint8, tf.float32):
        spec = tf.TensorSpec((None, 32, 48, 1), dtype, "images")
        (request,) = warmup_requests("digits", {"explain": [spec]}, (8,))
        images = tf.make_ndarray(request.inputs["images"])
        assert images.shape == (8, 32, 48, 1)
        assert images.dtype == dtype.as_numpy_dtype
        assert images.min() >= 0 and images.min() < 10 and images.max() > 245 and images.max() <= 255
        # Smooth but for the disc's edge: a gradient has many levels, and neighbours are close.
        assert len(np.unique(images[0])) > 50
        assert np.median(np.abs(np.diff(images[0, ..., 0].astype(float), axis=1))) <= 8


def test_encoded_pictures_are_a_jpeg_and_pngs_of_twice_the_size():
    requests = warmup_requests("digits", _SIGNATURES, (1, 3))
    encoded = [list(tf.make_ndarray(request.inputs["image_bytes"])) for request in requests[2:4]]
    formats = [[Image.open(io.BytesIO(data)).format for data in batch] for batch in encoded]
    assert formats == [["JPEG"], ["JPEG", "PNG", "PNG"]]
    assert {Image.open(io.BytesIO(data)).size for batch in encoded for data in batch} == {(2 * _WIDTH, 2 * _HEIGHT)}


def test_encoded_pictures_need_no_signature_with_images():
    (request,) = warmup_requests("digits", {"preprocess": [_BYTES]}, (2,))
    pictures = [Image.open(io.BytesIO(data)) for data in tf.make_ndarray(request.inputs["image_bytes"])]
    assert [picture.size for picture in pictures] == [(64, 64), (64, 64)]


def test_the_same_requests_come_every_time(tmp_path):
    paths = [write_warmup_requests(tmp_path / name, "digits", _SIGNATURES, (1, 2)) for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_requests_name_the_model(saved_model):
    assert {request.model_spec.name for request in _read(saved_model)} == {"digits"}


@pytest.mark.parametrize("sizes", [(0,), (1, -8), (1, 2.5), (True,)])
def test_a_batch_size_that_is_no_count_is_refused(sizes):
    with pytest.raises(ValueError, match=r"must be an integer from 1 up\. Received: batch_sizes="):
        warmup_requests("digits", _SIGNATURES, sizes)


def test_an_unknown_input_is_refused_by_name():
    temperature = tf.TensorSpec(None, tf.float32, "temperature")
    with pytest.raises(ValueError, match=r"Received: signatures\['explain'\] with an input named 'temperature'"):
        warmup_requests("digits", {"explain": [_IMAGES, temperature]})


@pytest.mark.parametrize("shape", [None, (None, None, 10, 3), (None, 12, 10)])
def test_images_of_no_fixed_size_are_refused(shape):
    with pytest.raises(ValueError, match=r"fixed H, W and C.* Received: shape="):
        warmup_requests("digits", {"serving_default": [tf.TensorSpec(shape, tf.float32, "images")]})


def test_as_many_requests_are_written_as_tensorflow_serving_reads(tmp_path):
    one = {"seed_only": [tf.TensorSpec(None, tf.int32, "seed")]}
    for sizes in ((), (1,) * 1001):
        with pytest.raises(ValueError, match=rf"from 1 to 1000\. Received: .*={len(sizes)}$"):
            write_warmup_requests(tmp_path, "digits", one, sizes)
    assert list(tmp_path.iterdir()) == []
    write_warmup_requests(tmp_path, "digits", one, (1,) * 1000)
    assert len(_read(tmp_path)) == 1000


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_warmup_requests(tmp_path, "digits", _SIGNATURES, (1,))
    before = path.read_bytes()

    class FullDisk(tf.io.TFRecordWriter):
        def write(self, record):
            super().write(record)
            raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(tf.io, "TFRecordWriter", FullDisk)
    with pytest.raises(tf.errors.ResourceExhaustedError, match="No space left"):
        write_warmup_requests(tmp_path, "digits", _SIGNATURES, (8,))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
