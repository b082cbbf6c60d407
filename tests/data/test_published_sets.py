"""The entries of published sets, on small stand-ins that have the features of the real builders."""

import dataclasses

import numpy as np
import pytest

from aib_tf import data
from aib_tf.data import geometry, reader
from tests.data.conftest import EXTRA, TEST, TRAIN, bird, small_image
from tests.data.test_geometry import rectangle_of
from tests.data.windows import windows_of

NAMES = ("caltech_birds2011", "cifar100", "stl10", "svhn_cropped")

# In memory, and read from disk in every epoch.
both_sources = pytest.mark.parametrize("memory_limit", [data.MEMORY_LIMIT, 0])


@pytest.fixture
def small_birds(monkeypatch):
    """Birds that are delivered small, so that all their windows can be listed."""
    info = dataclasses.replace(data.DATASETS["caltech_birds2011"], image_shape=(16, 20, 3), resize=(20, 26))
    monkeypatch.setitem(data.DATASETS, info.name, info)
    return info


def batches_of(name, split, folder, fields=("image", "label"), **options):
    """All examples of a split, as a dict of arrays; uint8 images."""
    batches = data.load(name, split, 4, folder, fields=fields, normalize=False, **options)
    batches = [batch if isinstance(batch, dict) else dict(zip(fields, batch, strict=True)) for batch in batches]
    return {field: np.concatenate([batch[field] for batch in batches]) for field in fields}


@pytest.mark.parametrize("name", NAMES)
def test_images_have_the_shape_and_range_of_the_table(name, published_dir):
    info = data.get(name)
    lowest, highest = (
        (value - np.array(info.mean, np.float32)) / np.array(info.stddev, np.float32) for value in (0, 1)
    )
    for augment in (False, True):
        batches = data.load(name, "test", TEST, published_dir, augment=augment)
        assert batches.element_spec[0].shape[1:] == info.image_shape
        ((images, labels),) = batches
        assert images.shape == (TEST, *info.image_shape) and images.dtype == np.float32
        assert (images >= lowest - 1e-5).numpy().all() and (images <= highest + 1e-5).numpy().all()
        if not augment:  # A bird alone is bright all over.
            assert (np.ptp(images, axis=(0, 1, 2)) > 0.9 * (highest - lowest)).all()
        assert labels.shape == (TEST,) and labels.dtype == np.int64


@pytest.mark.parametrize("name", NAMES)
def test_the_last_tenth_of_the_training_images_is_for_validation(name, published_dir):
    counts = {split: data.num_examples(name, split, published_dir) for split in ("train", "validation", "test")}
    assert counts == {"train": TRAIN * 9 // 10, "validation": TRAIN // 10, "test": TEST}
    labels = [data.label_counts(name, split, published_dir) for split in ("train", "validation")]
    assert labels[0].shape == (data.get(name).classes,)
    written = [9 * number % 200 if name == "caltech_birds2011" else number % 10 for number in range(TRAIN)]
    np.testing.assert_array_equal(sum(labels), np.bincount(written, minlength=data.get(name).classes))


@pytest.mark.parametrize("name", ["cifar100", "svhn_cropped"])
def test_small_images_are_delivered_as_stored_and_augmented_by_windows_of_them(name, published_dir):
    info = data.get(name)
    fields = ("image", "label", "id")
    stored = batches_of(name, "train+validation", published_dir, fields)
    augmented = batches_of(name, "train+validation", published_dir, fields, augment=True)
    numbers = [int(text) for text in stored["id"]]
    assert sorted(numbers) == list(range(TRAIN))
    np.testing.assert_array_equal(stored["label"], [number % 10 for number in numbers])
    for number, image, crop in zip(numbers, stored["image"], augmented["image"], strict=True):
        np.testing.assert_array_equal(image, small_image(number))
        found = {window.tobytes() for window in windows_of(image, 4, info.horizontal_flip)}
        assert crop.tobytes() in found
    mirrored = [
        crop.tobytes() in {window[:, ::-1].tobytes() for window in windows_of(image, 4, False)}
        for image, crop in zip(stored["image"], augmented["image"], strict=True)
    ]
    assert any(mirrored) == (name == "cifar100")  # A digit never is.


def test_the_extra_house_numbers_are_for_training_alone(published_dir):
    plain, extra = (
        {
            split: [int(text) for text in batches_of(name, split, published_dir, ("id",))["id"]]
            for split in ("train", "validation", "test")
        }
        for name in ("svhn_cropped", "svhn_cropped_extra")
    )
    assert extra["validation"] == plain["validation"] and extra["test"] == plain["test"]
    assert sorted(extra["train"]) == sorted([*plain["train"], *range(TRAIN + TEST, TRAIN + TEST + EXTRA)])
    assert data.num_examples("svhn_cropped_extra", "train", published_dir) == len(extra["train"])
    infos = [dataclasses.asdict(data.get(name)) for name in ("svhn_cropped", "svhn_cropped_extra")]
    assert {field for field in infos[0] if infos[0][field] != infos[1][field]} == {"name", "splits"}


@both_sources
@pytest.mark.parametrize("augment", [False, True])
def test_masks_of_birds_stay_on_the_birds(published_dir, memory_limit, augment):
    fields = ("image", "mask", "bbox")
    options = {"augment": augment, "memory_limit": memory_limit}
    birds = batches_of("caltech_birds2011", "train", published_dir, fields, **options)
    masks = birds["mask"]
    assert masks.shape == (*birds["image"].shape[:3], 1) and masks.dtype == np.uint8
    assert set(np.unique(masks)) <= {0, 1}
    # A bird is bright, and what surrounds it dark; they blend where an image of 60 became one of 256.
    bright = birds["image"].mean(-1, keepdims=True) > 110
    assert (masks == bright).mean() > 0.97
    if augment:  # cut to the bird
        assert masks.all()
    else:
        assert 0.1 < masks.mean() < 0.9
    alone = batches_of("caltech_birds2011", "train", published_dir, ("mask",), **options)
    np.testing.assert_array_equal(alone["mask"], masks)


def test_images_of_stl10_are_delivered_as_stored_and_share_classes_with_cifar10(published_dir):
    stored = batches_of("stl10", "test", published_dir)
    by_label = dict(zip(stored["label"].tolist(), stored["image"], strict=True))
    assert sorted(by_label) == [number % 10 for number in range(TRAIN, TRAIN + TEST)]
    for number in range(TRAIN, TRAIN + TEST):
        np.testing.assert_array_equal(by_label[number % 10], small_image(number, 96))
    # In the order of the file class_names.txt of the set: alphabetic, with a car for the automobile.
    cifar10 = {"car" if name == "automobile" else name for name in data.get("cifar10").class_names}
    names = data.get("stl10").class_names
    assert list(names) == sorted(names)
    assert set(names) ^ cifar10 == {"frog", "monkey"}


def number_of(label):
    """The number of a bird from its label, 9 * number % 200 for numbers below 26."""
    return next(number for number in range(TRAIN + TEST) if 9 * number % 200 == label)


@both_sources
def test_the_delivered_box_surrounds_the_bird(published_dir, memory_limit):
    fields = ("image", "label", "bbox")
    birds = batches_of("caltech_birds2011", "train+validation", published_dir, fields, memory_limit=memory_limit)
    assert birds["image"].dtype == np.uint8 and birds["bbox"].dtype == np.float32
    for image, label, box in zip(birds["image"], birds["label"], birds["bbox"], strict=True):
        np.testing.assert_allclose(box * 224, rectangle_of(image), atol=2.5)  # Images of 60 are blurred by 4.
        original, (top, left, bottom, right) = bird(number_of(label))
        height, width, _ = original.shape
        expected = (np.array([top / height, left / width, bottom / height, right / width]) * 256 - 16) / 224
        np.testing.assert_allclose(box, expected.clip(0, 1), atol=1e-5)


@both_sources
def test_a_training_image_is_a_window_of_the_bird_alone(published_dir, memory_limit, small_birds):
    fields = ("image", "label", "bbox")
    birds = batches_of("caltech_birds2011", "train", published_dir, fields, augment=True, memory_limit=memory_limit)
    chosen = set()
    for crop, label, box in zip(birds["image"], birds["label"], birds["bbox"], strict=True):
        image, (top, left, bottom, right) = bird(number_of(label))
        alone = geometry.prepare(
            {"image": image[top:bottom, left:right], "bbox": np.float32([0, 0, 1, 1])}, small_birds, augment=True
        )
        windows = [window.tobytes() for window in windows_of(alone["image"].numpy(), 0, True, (16, 20))]
        assert crop.tobytes() in windows
        chosen.add(windows.index(crop.tobytes()))
        assert crop.min() > 180
        np.testing.assert_allclose(box, [0, 0, 1, 1], atol=1e-5)
    assert len(chosen) > 8


def test_memory_and_disk_deliver_the_same_birds(published_dir, small_birds):
    for augment, fields in ((False, small_birds.fields), (True, small_birds.fields), (True, ("bbox",))):
        stored, read = (
            batches_of("caltech_birds2011", "train", published_dir, fields, augment=augment, memory_limit=memory_limit)
            for memory_limit in (data.MEMORY_LIMIT, 0)
        )
        for field in fields:
            np.testing.assert_array_equal(stored[field], read[field])


def test_boxes_follow_windows_of_whole_birds(published_dir, monkeypatch):
    info = dataclasses.replace(data.DATASETS["caltech_birds2011"], crop_to_box=False)
    monkeypatch.setitem(data.DATASETS, info.name, info)
    birds = batches_of(info.name, "train", published_dir, info.fields, augment=True)
    whole = batches_of(info.name, "train", published_dir, info.fields)
    np.testing.assert_array_equal(birds["label"], whole["label"])
    assert (birds["bbox"] != whole["bbox"]).any(axis=1).all()
    for image, box in zip(birds["image"], birds["bbox"], strict=True):
        np.testing.assert_allclose(box * 224, rectangle_of(image), atol=2.5)


@both_sources
def test_a_stream_of_birds_differs_between_epochs_and_goes_on_bit_for_bit(published_dir, memory_limit, small_birds):
    def stream(seed=5, **options):
        batches = data.training_batches(
            "caltech_birds2011",
            "train",
            5,
            epochs=3,
            seed=seed,
            data_dir=published_dir,
            memory_limit=memory_limit,
            **options,
        )
        return [(images.numpy(), labels.numpy()) for images, labels in batches]

    def assert_equal(left, right):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            for a, b in zip(one, other, strict=True):
                np.testing.assert_array_equal(a, b)

    whole = stream()
    assert len(whole) == 12
    assert_equal(stream(), whole)
    for epoch, batch in [(0, 3), (1, 0), (2, 2)]:
        assert_equal(stream(first_epoch=epoch, skip_batches=batch), whole[4 * epoch + batch :])
    # One bird after the other, whatever the order of the epoch.
    by_label = [
        dict(zip(np.concatenate([b for _, b in part]), np.concatenate([a for a, _ in part]), strict=True))
        for part in (whole[:4], whole[4:8], stream(seed=6)[:4])
    ]
    for other in by_label[1:]:
        assert set(other) == set(by_label[0])
        assert sum((other[label] != by_label[0][label]).any() for label in other) > len(other) / 2


def test_the_memory_that_images_take_is_known_before_they_are_decoded(published_dir, small_birds):
    for augment, pixels in ((False, 16 * 20), (True, 20 * 26)):
        split = reader.open_split(small_birds, "train", published_dir, small_birds.fields, augment)
        arrays = split.read()
        assert set(arrays) == set(small_birds.fields)
        assert split.decoded_bytes() == sum(array.nbytes for array in arrays.values())
        assert arrays["image"].nbytes == TRAIN * 9 // 10 * 3 * pixels
