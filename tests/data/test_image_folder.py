"""Folders of pictures, one folder a class."""

import os
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from aib_tf import data

CLASSES = ("ant", "bee", "cat")
COUNTS = {"train": (20, 10, 12), "val": (3, 4, 2), "test": (2, 2, 5)}
NAME = "image_folder_32/animals"

# In memory, and read from disk in every epoch.
both_sources = pytest.mark.parametrize("memory_limit", [data.MEMORY_LIMIT, 0])


def picture(path, size=(32, 32)):
    """No two alike: the pixels are drawn from the file's name."""
    seed = sum(byte << (8 * place) for place, byte in enumerate("/".join(path.parts[-3:]).encode()))
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def write(root, counts=COUNTS, size=(32, 32)):
    for split, numbers in counts.items():
        for name, count in zip(CLASSES, numbers, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                path = folder / f"{number:02d}.png"
                Image.fromarray(picture(path, size)).save(path)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of data sets that holds the folder animals."""
    root = tmp_path_factory.mktemp("folders")
    write(root / "animals")
    return root


def of_split(split, folder, name=NAME, **options):
    """All examples of a split, as a dict of arrays; uint8 images."""
    batches = list(data.load(name, split, 8, folder, fields=("image", "label", "id"), normalize=False, **options))
    return {field: np.concatenate([batch[field] for batch in batches]) for field in batches[0]}


def ids_of(split, folder, name=NAME, **options):
    return [text.decode() for text in of_split(split, folder, name, **options)["id"]]


@both_sources
def test_pictures_are_delivered_with_the_class_of_their_folder(folder, memory_limit):
    info = data.get(NAME, folder)
    assert info.class_names == CLASSES and info.classes == 3 and info.image_shape == (32, 32, 3)
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        examples = of_split(split, folder, memory_limit=memory_limit)
        assert len(examples["label"]) == sum(COUNTS[name]) == data.num_examples(NAME, split, folder)
        assert data.label_counts(NAME, split, folder).tolist() == list(COUNTS[name])
        for image, label, path in zip(examples["image"], examples["label"], examples["id"], strict=True):
            path = folder / "animals" / path.decode()
            assert path.parts[-3:-1] == (name, CLASSES[label])
            np.testing.assert_array_equal(image, picture(path))
    assert len(ids_of("train+test", folder, memory_limit=memory_limit)) == 42 + 9


def test_the_pictures_are_those_that_tfds_finds(folder):
    builder = tfds.folder_dataset.ImageFolder(str(folder / "animals"))
    assert builder.info.features["label"].names == list(CLASSES)
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        ours = sorted(image.tobytes() for image in of_split(split, folder)["image"])
        assert ours == sorted(example["image"].numpy().tobytes() for example in builder.as_dataset(split=name))


@both_sources
def test_classes_are_mixed_and_every_epoch_has_another_order(folder, memory_limit):
    def stream(**options):
        batches = data.training_batches(
            NAME, "train", 8, epochs=3, seed=1, data_dir=folder, memory_limit=memory_limit, **options
        )
        return [(images.numpy(), labels.numpy()) for images, labels in batches]

    whole = stream()
    assert len(whole) == 18
    epochs = [np.concatenate([labels for _, labels in whole[6 * epoch :][:6]]) for epoch in range(3)]
    stored = of_split("train", folder)["label"]
    for order in (stored, *epochs):
        assert np.bincount(order).tolist() == list(COUNTS["train"])
        assert (np.diff(order) != 0).sum() > 10  # A class after the other would change twice.
    assert (epochs[0] != epochs[1]).any() and (epochs[0] != stored).any()
    resumed = stream(first_epoch=1, skip_batches=4)
    assert len(resumed) == 8
    for one, other in zip(resumed, whole[10:], strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_images_of_any_size_are_brought_to_that_of_imagenet(tmp_path):
    write(tmp_path / "animals", {"train": (2, 2, 2), "test": (1, 1, 1)}, size=(40, 60))
    (images, labels) = next(iter(data.load("image_folder/animals", "test", 8, tmp_path)))
    assert images.shape == (3, 224, 224, 3) and sorted(labels.numpy()) == [0, 1, 2]
    info = data.get("image_folder/animals", tmp_path)
    assert info.mean == (0.485, 0.456, 0.406) and info.resize == (256, 256)


@pytest.mark.parametrize(
    ("present", "taken_as"),
    [
        (("train",), {"train": "train", "validation": "train", "test": "train"}),
        (("train", "val"), {"train": "train", "validation": "train", "test": "val"}),
        (("train", "test"), {"train": "train", "validation": "train", "test": "test"}),
    ],
)
def test_a_missing_split_is_a_tenth_of_each_class_of_train(tmp_path, present, taken_as):
    write(tmp_path / "animals", {split: COUNTS[split] for split in present})
    ids = {split: ids_of(split, tmp_path) for split in taken_as}
    held_out = [split for split, source in taken_as.items() if source == "train" and split != "train"]
    for split in held_out:
        assert data.label_counts(NAME, split, tmp_path).tolist() == [2, 1, 1]
    for split, source in taken_as.items():
        assert {path.split("/")[0] for path in ids[split]} == {source}
    everything = [path for paths in ids.values() for path in paths]
    assert len(set(everything)) == len(everything) == sum(sum(COUNTS[split]) for split in present)
    # What is held out of a class does not depend on the other classes.
    shutil.rmtree(tmp_path / "animals" / "train" / "bee")
    for split in set(present) - {"train"}:
        shutil.rmtree(tmp_path / "animals" / split / "bee")
    for split in held_out:
        assert set(ids_of(split, tmp_path)) == {path for path in ids[split] if "/bee/" not in path}


def test_hidden_files_are_no_images_and_do_not_change_the_order(tmp_path):
    root = write(tmp_path / "animals")
    before = ids_of("train", tmp_path)
    (root / "train" / "ant" / "._00.png").write_bytes(b"a Mac was here")
    (root / "train" / "ant" / "notes.txt").write_text("nor is this")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / ".git" / "objects").mkdir(parents=True)
    assert ids_of("train", tmp_path) == before
    assert data.get(NAME, tmp_path).class_names == CLASSES


def test_the_folder_may_be_given_by_its_path_and_moved(folder, tmp_path, monkeypatch):
    ids = ids_of("test", folder)
    assert ids_of("test", None, f"image_folder_32/{folder}/animals") == ids
    shutil.copytree(folder / "animals", tmp_path / "moved" / "animals")
    assert ids_of("test", tmp_path / "moved") == ids
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "moved"))
    assert ids_of("test", None) == ids
    monkeypatch.chdir(tmp_path)
    assert ids_of("test", "moved") == ids


def without_train(root):
    (root / "train").rename(root / "training")


def two_names(root):
    (root / "validation").mkdir()


def one_class(root):
    for split in COUNTS:
        for name in ("ant", "bee"):
            shutil.rmtree(root / split / name)


def missing_class(root):
    shutil.rmtree(root / "test" / "bee")


def other_class(root):
    (root / "val" / "dog").mkdir()


def empty_class(root):
    for path in (root / "train" / "bee").iterdir():
        path.rename(path.with_suffix(".webp"))


def too_few(root):
    shutil.rmtree(root / "val")
    for number in range(1, 12):
        (root / "train" / "cat" / f"{number:02d}.png").unlink()


def picture_in_latin_1(root):
    os.rename(root / "train" / "cat" / "00.png", os.fsencode(root / "train" / "cat") + b"/k\xe4.png")


def class_in_latin_1(root):
    os.mkdir(os.fsencode(root / "val") + b"/b\xe4r")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_train, r"holds train/CLASS/\*\.jpg.*Received: .*animals with test, training, val$"),
        (two_names, "one folder of the split validation. Received: validation and val$"),
        (one_class, r"two at least. Received: .*train with cat$"),
        (missing_class, "a folder for each class of train. Received: .*test without bee$"),
        (other_class, "a folder for each class of train. Received: .*val with dog$"),
        (empty_class, r"an image \(.jpg, .jpeg, .png\).*Received: .*train without any for bee$"),
        (too_few, r"no folder for validation.*2 images at least. Received: 1 of cat in .*animals$"),
        (picture_in_latin_1, r"must be in UTF-8.* Received: b'.*animals/train/cat/k\\xe4\.png'$"),
        (class_in_latin_1, r"must be in UTF-8.* Received: b'.*animals/val/b\\xe4r'$"),
    ],
)
def test_a_folder_of_another_form_is_named(tmp_path, damage, message):
    damage(write(tmp_path / "animals"))
    with pytest.raises(ValueError, match=message):
        data.load(NAME, "train", 8, tmp_path)


def test_a_folder_that_is_not_there_is_named_with_the_form_to_give_it(tmp_path):
    with pytest.raises(data.DatasetUnavailableError, match=r"no folder .*/plants\. .*--data_dir.*Received: name="):
        data.load("image_folder/plants", "train", 8, tmp_path)
    with pytest.raises(ValueError, match=r"image_folder/FOLDER.*Received: name='image_folder'"):
        data.load("image_folder", "train", 8, tmp_path)
