import dataclasses
import pathlib
import subprocess
import sys
import time
import urllib.error
import urllib.request

import keras
import numpy as np
import pytest
import tensorflow as tf

from aib_tf import data
from aib_tf.data import reader
from tests.data.windows import windows_of

TINY = "cluttered_digits/train60_validation20_test20_seed3"
CIFAR10_DIR = pathlib.Path(__file__).parents[3] / "shared" / "data" / "tensorflow_datasets"

needs_cifar10 = pytest.mark.skipif(
    not (CIFAR10_DIR / "cifar10").is_dir(), reason=f"no copy of CIFAR-10 in {CIFAR10_DIR}"
)

# In memory, and read from disk in every epoch.
both_sources = pytest.mark.parametrize("memory_limit", [data.MEMORY_LIMIT, 0])


def all_of(dataset):
    """Images and labels of all batches, as two arrays."""
    batches = [(images.numpy(), labels.numpy()) for images, labels in dataset]
    return [np.concatenate(arrays) for arrays in zip(*batches, strict=True)]


def rows_of(images):
    return sorted(image.tobytes() for image in images)


def assert_equal_streams(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


@both_sources
def test_an_epoch_holds_every_example_once_and_keeps_the_partial_batch(data_dir, memory_limit):
    batches = data.load(TINY, "train", 32, data_dir, memory_limit=memory_limit)
    assert batches.cardinality() == len(list(batches)) == 2
    images, labels = all_of(batches)
    assert images.shape == (60, 32, 32, 1) and images.dtype == np.float32
    assert labels.shape == (60,) and labels.dtype == np.int64
    shuffled, _ = all_of(data.load(TINY, "train", 32, data_dir, shuffle=True, memory_limit=memory_limit))
    assert rows_of(shuffled) == rows_of(images)
    assert (shuffled != images).any()


@both_sources
def test_drop_remainder_makes_all_batches_full_and_their_shape_static(data_dir, memory_limit):
    batches = data.load(TINY, "train", 32, data_dir, drop_remainder=True, memory_limit=memory_limit)
    assert batches.cardinality() == len(list(batches)) == 1
    assert batches.element_spec[0].shape == (32, 32, 32, 1)


def test_memory_and_disk_deliver_the_same(data_dir):
    fields = data.get(TINY).fields
    for one, other in zip(
        data.load(TINY, "test", 8, data_dir, fields=fields),
        data.load(TINY, "test", 8, data_dir, fields=fields, memory_limit=0),
        strict=True,
    ):
        assert set(one) == set(other) == set(fields)
        for field in fields:
            np.testing.assert_array_equal(one[field], other[field])


def test_a_sum_of_splits_is_one_after_the_other(data_dir):
    train, validation, both = (
        all_of(data.load(TINY, split, 32, data_dir))[0] for split in ("train", "validation", "train+validation")
    )
    np.testing.assert_array_equal(both, np.concatenate([train, validation]))


def test_two_fields_are_a_tuple_and_any_other_choice_is_a_dict(data_dir):
    assert isinstance(data.load(TINY, "test", 8, data_dir).element_spec, tuple)
    spec = data.load(TINY, "test", 8, data_dir, fields=("image", "bbox", "mask")).element_spec
    assert {name: field.dtype for name, field in spec.items()} == {
        "image": tf.float32,
        "bbox": tf.float32,
        "mask": tf.uint8,
    }


def test_normalised_images_have_mean_zero_and_deviation_one(data_dir):
    images, _ = all_of(data.load(TINY, "train", 32, data_dir))
    assert abs(images.mean()) < 0.05 and abs(images.std() - 1) < 0.05
    pixels, _ = all_of(data.load(TINY, "train", 32, data_dir, normalize=False))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(data.denormalize_images(images, data.get(TINY)), pixels)


def test_normalisation_is_the_formula_and_can_be_undone():
    info = data.get("cifar10")
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    expected = (pixels / 255.0 - np.array(info.mean)) / np.array(info.stddev)
    for convert in (np.asarray, tf.constant):
        normalized = data.normalize_images(convert(pixels), info)
        assert type(normalized) is type(convert(pixels))
        np.testing.assert_allclose(normalized, expected, atol=1e-6)
        restored = data.denormalize_images(normalized, info)
        assert restored.dtype == convert(pixels).dtype
        np.testing.assert_array_equal(restored, pixels)
    np.testing.assert_array_equal(data.denormalize_images(np.full((1, 3), 99.0), info), np.full((1, 3), 255))


@pytest.fixture
def augmented_digits(monkeypatch):
    """Digits that are cropped and flipped, so that augmentation shows in small data."""
    info = dataclasses.replace(data.DATASETS["cluttered_digits"], crop_padding=4, horizontal_flip=True)
    monkeypatch.setitem(data.DATASETS, "cluttered_digits", info)


@both_sources
def test_each_iteration_differs_and_the_seed_repeats_them(data_dir, memory_limit, augmented_digits):
    def three_epochs(seed):
        batches = data.load(
            TINY,
            "train",
            16,
            data_dir,
            shuffle=True,
            augment=True,
            seed=seed,
            memory_limit=memory_limit,
        )
        return [all_of(batches)[0] for _ in range(3)]

    first, again, other = three_epochs(1), three_epochs(1), three_epochs(2)
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert (first[0] != first[1]).any() and (first[1] != first[2]).any()
    assert (first[0] != other[0]).any()


@both_sources
def test_a_resumed_stream_goes_on_bit_for_bit(data_dir, memory_limit, augmented_digits):
    def stream(**options):
        return data.training_batches(
            TINY,
            "train",
            16,
            epochs=3,
            seed=5,
            data_dir=data_dir,
            memory_limit=memory_limit,
            **options,
        )

    whole = list(stream())
    assert len(whole) == 12
    for epoch, batch in [(0, 0), (0, 3), (1, 1), (2, 4), (3, 0)]:
        resumed = stream(first_epoch=epoch, skip_batches=batch)
        assert resumed.cardinality() == 12 - 4 * epoch - batch
        assert_equal_streams(resumed, whole[4 * epoch + batch :])


@both_sources
@pytest.mark.parametrize("global_seed", [0, 11])
def test_the_global_seed_does_not_change_a_stream(data_dir, augmented_digits, memory_limit, global_seed):
    def stream():
        return data.training_batches(TINY, "train", 16, epochs=1, seed=5, data_dir=data_dir, memory_limit=memory_limit)

    before = list(stream())
    tf.random.set_seed(global_seed)
    try:
        assert_equal_streams(stream(), before)
    finally:
        tf.random.set_seed(None)


@both_sources
def test_epochs_of_a_stream_are_whole_and_in_another_order(data_dir, memory_limit):
    stream = data.training_batches(TINY, "train", 16, epochs=2, seed=0, data_dir=data_dir, memory_limit=memory_limit)
    images, _ = all_of(stream)
    expected = rows_of(all_of(data.load(TINY, "train", 60, data_dir))[0])
    assert rows_of(images[:60]) == rows_of(images[60:]) == expected
    assert (images[:60] != images[60:]).any()


def test_an_epoch_of_a_stream_does_not_depend_on_the_number_of_epochs(data_dir):
    def stream(epochs):
        return data.training_batches(TINY, "train", 16, epochs=epochs, seed=0, data_dir=data_dir)

    assert_equal_streams(stream(1), stream(3).take(4))
    assert list(stream(0)) == []


def test_keras_fits_for_several_epochs(data_dir):
    model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(10)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    train = data.load(TINY, "train", 16, data_dir, shuffle=True, augment=True)
    test = data.load(TINY, "test", 16, data_dir)
    history = model.fit(train, validation_data=test, epochs=3, shuffle=False, verbose=0)
    assert len(history.history["val_loss"]) == 3


def test_counts_agree_with_the_data(data_dir):
    _, labels = all_of(data.load(TINY, "train", 16, data_dir))
    np.testing.assert_array_equal(data.label_counts(TINY, "train", data_dir), np.bincount(labels, minlength=10))
    assert data.num_examples(TINY, "train", data_dir) == 60
    assert data.num_examples(TINY, "train+test", data_dir) == 80
    assert data.batches_per_epoch(TINY, "train", 32, data_dir) == 2
    assert data.batches_per_epoch(TINY, "train", 32, data_dir, drop_remainder=True) == 1
    assert data.batches_per_epoch(TINY, "train", 60, data_dir) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "mnist"}, "cifar10, cifar100, cluttered_digits.*image_folder/FOLDER.*Received: name='mnist'"),
        ({"split": "dev"}, "train, validation, test.*Received: split='dev'"),
        ({"split": "train+train"}, "Received: split='train\\+train'"),
        ({"split": ""}, "Received: split=''"),
        ({"batch_size": 0}, "Received: batch_size=0"),
        ({"batch_size": 2.5}, "Received: batch_size=2.5"),
        ({"seed": -1}, "Received: seed=-1"),
        ({"fields": ("image", "depth")}, "image, label, bbox, mask, id.*Received: fields="),
        ({"fields": ()}, "Received: fields="),
        ({"memory_limit": -1}, "Received: memory_limit=-1"),
        ({"bad_examples": "ignore"}, "error, skip. Received: bad_examples='ignore'"),
    ],
)
def test_an_impossible_argument_is_named(data_dir, arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load(**{"name": TINY, "split": "train", "batch_size": 8, "data_dir": data_dir, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [{"epochs": -1}, {"first_epoch": 4}, {"first_epoch": -1}, {"skip_batches": 5}, {"seed": 0.5}],
)
def test_an_impossible_place_to_resume_is_named(data_dir, arguments):
    (argument,) = arguments
    with pytest.raises(ValueError, match=f"Received: {argument}="):
        data.training_batches(TINY, "train", 16, **{"epochs": 3, "seed": 0, "data_dir": data_dir, **arguments})


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    folder = tmp_path / "mistyped"
    with pytest.raises(data.DatasetUnavailableError, match=r"(?s)cifar10.*mistyped.*not exist"):
        data.load("cifar10", "train", 8, folder)
    assert not folder.exists()


def test_data_that_cannot_be_fetched_is_asked_for_within_seconds(tmp_path, monkeypatch):
    def no_network(request, **options):
        raise urllib.error.URLError(f"no route to {request.full_url}")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    begin = time.monotonic()
    with pytest.raises(data.DatasetUnavailableError) as caught:
        data.load("cifar10", "train", 8, tmp_path)
    assert time.monotonic() - begin < 20
    address = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    archive = f"{tmp_path}/downloads/manual/cifar-10-binary.tar.gz"
    for part in ("cifar10", f"{address} does not answer", f"{address}\n    as {archive}", "machine with a network"):
        assert part in str(caught.value)
    assert "--data_dir=DIR). Or put" in str(caught.value) and f"Received: data_dir='{tmp_path}'" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_download_is_not_tried_when_its_server_is_away(monkeypatch):
    class Builder:
        url_infos = {"https://example.org/data.tar.gz": None}
        data_dir_root = "data"

    def no_network(request, timeout):
        assert timeout <= 10
        assert request.get_method() == "HEAD"
        raise urllib.error.URLError(f"no route to {request.full_url}")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(OSError, match=r"https://example\.org/data\.tar\.gz does not answer"):
        reader._check_network(Builder())


def test_damaged_files_are_named(tmp_path):
    name = "cluttered_digits/train3_validation1_test1_seed0"
    data.load(name, "train", 1, tmp_path)
    (folder,) = tmp_path.glob("cluttered_digits/*/1.0.0")
    (records,) = folder.glob("*-train.tfrecord*")
    records.write_bytes(records.read_bytes()[:100])
    with pytest.raises(data.DatasetUnavailableError, match="damaged"):
        data.load(name, "train", 1, tmp_path)
    records.unlink()
    with pytest.raises(data.DatasetUnavailableError, match="damaged"):
        data.load(name, "train", 1, tmp_path)
    (folder / "dataset_info.json").unlink()
    with pytest.raises(data.DatasetUnavailableError, match="damaged"):
        data.load(name, "train", 1, tmp_path)


def test_data_that_another_process_finished_first_is_used(tmp_path, monkeypatch):
    from aib_tf.data.cluttered_digits import ClutteredDigits

    prepare = ClutteredDigits.download_and_prepare

    def overtaken(self):
        prepare(self)
        raise OSError("Directory not empty")

    monkeypatch.setattr(ClutteredDigits, "download_and_prepare", overtaken)
    name = "cluttered_digits/train3_validation1_test1_seed0"
    assert data.num_examples(name, "train", tmp_path) == 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "data"
    with pytest.raises(data.DatasetUnavailableError, match="file/data"):
        data.load("cluttered_digits/train3_validation1_test1_seed0", "train", 1, folder)


@needs_cifar10
def test_cifar10_is_read_augmented_and_divided():
    assert data.num_examples("cifar10", "train", CIFAR10_DIR) == 45_000
    assert data.num_examples("cifar10", "validation", CIFAR10_DIR) == 5_000
    assert data.batches_per_epoch("cifar10", "test", 128, CIFAR10_DIR) == 79
    stored, _ = all_of(data.load("cifar10", "test", 500, CIFAR10_DIR, normalize=False).take(1))
    info = data.get("cifar10")
    augmented, _ = all_of(data.load("cifar10", "test", 500, CIFAR10_DIR, normalize=False, augment=True).take(1))
    for image, crop in zip(stored[:50], augmented[:50], strict=True):
        windows = windows_of(image, info.crop_padding, info.horizontal_flip)
        assert any(np.array_equal(crop, window) for window in windows)
    images, labels = all_of(data.load("cifar10", "test", 500, CIFAR10_DIR).take(2))
    assert images.dtype == np.float32 and abs(images.mean()) < 0.1
    assert set(labels) == set(range(10))
    ids = next(iter(data.load("cifar10", "test", 4, CIFAR10_DIR, fields="id")))["id"]
    assert ids.numpy()[0].startswith(b"test_")


def test_tfds_finds_the_digits_by_name_after_importing_the_data_package(data_dir):
    program = (
        "import sys, aib_tf.data, tensorflow_datasets as tfds\n"
        "print(len(tfds.load(sys.argv[1], split='train', data_dir=sys.argv[2])))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program, TINY, str(data_dir)], capture_output=True, text=True, check=True
    ).stdout
    assert output.split()[-1] == "60"


def test_a_generated_set_that_cannot_be_written_asks_for_another_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(data.DatasetUnavailableError, match="needs no network, but a folder that can be written"):
        data.load("cluttered_digits/train3_validation1_test1_seed0", "train", 1, tmp_path / "file" / "data")
