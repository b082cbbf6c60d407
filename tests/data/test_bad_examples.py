"""Examples that are not what the table says: named by default, left out when asked."""

import io
import logging
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from aib_tf import config, data
from aib_tf.data import reader
from tests.data.conftest import TRAIN, small_image

both_sources = pytest.mark.parametrize("memory_limit", [data.MEMORY_LIMIT, 0])


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def records_of(folder, name, split):
    (file,) = folder.glob(f"{name}/*/{name}-{split}.tfrecord-*")
    return file, [tf.train.Example.FromString(record.numpy()) for record in tf.data.TFRecordDataset(str(file))]


def tamper(folder, name, changes, split="train"):
    """Rewrites records of a prepared set: `changes` is a dict place -> (feature, value)."""
    file, examples = records_of(folder, name, split)
    for place, (feature, value) in changes.items():
        values = examples[place].features.feature[feature]
        (values.bytes_list if isinstance(value, bytes) else values.int64_list).value[:] = [value]
    with tf.io.TFRecordWriter(str(file)) as writer:
        for example in examples:
            writer.write(example.SerializeToString())
    return file, examples


def copied(published_dir, tmp_path, name):
    shutil.copytree(published_dir / name, tmp_path / name)
    return tmp_path


def id_of(example):
    return example.features.feature["id"].bytes_list.value[0].decode()


PIXELS = small_image(0)
BAD = {
    "a label above": ("label", 100, "label 100, classes are 0 to 99"),
    "a label below": ("label", -1, "label -1, classes are 0 to 99"),
    "another size": ("image", encoded(PIXELS[:30]), "an image of 30x32, expected 32x32"),
    "alpha": ("image", encoded(np.dstack([PIXELS, PIXELS[..., :1]])), "4 channels, with alpha, expected 3"),
    "one channel": ("image", encoded(PIXELS[..., 0]), "1 channel, grey, expected 3"),
    "half a PNG": ("image", encoded(PIXELS)[:200], "cannot be decoded"),
    "half a JPEG": ("image", encoded(PIXELS, "JPEG")[:300], "cannot be decoded"),
    "no picture": ("image", b"<html>404 Not Found</html>", "cannot be decoded"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_example_is_named_with_what_is_wrong(published_dir, tmp_path, kind):
    feature, value, reason = BAD[kind]
    folder = copied(published_dir, tmp_path, "cifar100")
    _, examples = tamper(folder, "cifar100", {3: (feature, value)})
    with pytest.raises(data.BadExampleError) as caught:
        data.load("cifar100", "train", 4, folder)
    message = str(caught.value)
    assert message.startswith(f"1 of 18 examples of cifar100, split train, cannot be used: {id_of(examples[3])}: ")
    assert reason in message and "Received: bad_examples='error'" in message
    assert [example.id for example in caught.value.examples] == [id_of(examples[3])]


def test_an_example_without_an_id_is_named_by_its_file_and_place(published_dir, tmp_path):
    folder = copied(published_dir, tmp_path, "stl10")
    file, _ = tamper(folder, "stl10", {19: ("label", 10), 4: ("label", 12)})
    with pytest.raises(data.BadExampleError, match=f"1 of 2 .*validation.*: {file.name}__19: label 10, classes are"):
        data.training_batches("stl10", "validation", 4, epochs=1, seed=0, data_dir=folder)
    with pytest.raises(data.BadExampleError, match=f"1 of 18 .*train.*: {file.name}__4: label 12, classes are 0 to 9"):
        data.label_counts("stl10", "train", folder)


def test_a_split_that_is_streamed_stops_at_a_bad_example_and_can_be_checked_before(published_dir, tmp_path):
    folder = copied(published_dir, tmp_path, "cifar100")
    data.check_examples("cifar100", "train", folder)
    _, examples = tamper(folder, "cifar100", {7: BAD["a label above"][:2]})
    with pytest.raises(tf.errors.InvalidArgumentError, match="check_examples names it"):
        list(data.load("cifar100", "train", 4, folder, memory_limit=0))
    with pytest.raises(data.BadExampleError, match=f"{id_of(examples[7])}: label 100"):
        data.check_examples("cifar100", "train", folder)


def test_training_that_stops_at_a_streamed_example_names_it(published_dir, tmp_path):
    folder = copied(published_dir, tmp_path, "cifar100")
    _, examples = tamper(folder, "cifar100", {7: BAD["no picture"][:2]})
    model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(100)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    train = data.load("cifar100", "train", 4, folder, memory_limit=0)
    with pytest.raises(data.BadExampleError, match=f"{id_of(examples[7])}: it cannot be decoded"):  # noqa: SIM117
        with data.naming_bad_examples("cifar100", "test", "train", data_dir=folder):
            model.fit(train, shuffle=False, verbose=0)
    # Nothing is bad about this split: the error is about something else, and stays what it is.
    with pytest.raises(tf.errors.InvalidArgumentError), data.naming_bad_examples("cifar100", "test", data_dir=folder):
        model.fit(train, shuffle=False, verbose=0)
    skipping = data.naming_bad_examples("cifar100", "train", data_dir=folder, bad_examples="skip")
    with pytest.raises(tf.errors.InvalidArgumentError), skipping:
        model.fit(train, shuffle=False, verbose=0)


@both_sources
def test_skipping_leaves_out_exactly_the_bad_ones_and_counts_them(published_dir, tmp_path, memory_limit, caplog):
    folder = copied(published_dir, tmp_path, "cifar100")
    places = (0, 5, 9, 17)
    kinds = ("no picture", "alpha", "a label above", "half a PNG")
    changes = dict(zip(places, [BAD[kind][:2] for kind in kinds], strict=True))
    _, examples = tamper(folder, "cifar100", changes)
    options = {"bad_examples": "skip"}
    with caplog.at_level(logging.WARNING, "aib_tf"):
        batches = data.load(
            "cifar100", "train", 4, folder, fields=("id", "image"), memory_limit=memory_limit, **options
        )
    good = [id_of(example) for place, example in enumerate(examples[:18]) if place not in places]
    assert [text.decode() for batch in batches for text in batch["id"].numpy()] == good
    assert batches.cardinality() == 4
    (record,) = caplog.records
    assert "4 of 18 examples of cifar100, split train, are left out" in record.getMessage()
    assert f"{id_of(examples[0])}: it cannot be decoded" in record.getMessage()
    assert "; and 1 more" in record.getMessage()
    assert data.num_examples("cifar100", "train", folder, **options) == 14
    assert data.batches_per_epoch("cifar100", "train", 4, folder, **options) == 4
    assert data.label_counts("cifar100", "train", folder, **options).sum() == 14
    assert len(caplog.records) == 1  # It is looked for once.
    # Another split, of which nothing is bad, is whole.
    assert data.num_examples("cifar100", "validation", folder, **options) == 2


@both_sources
def test_a_stream_without_its_bad_examples_goes_on_bit_for_bit(published_dir, tmp_path, memory_limit):
    folder = copied(published_dir, tmp_path, "cifar100")
    tamper(folder, "cifar100", {place: ("label", 100) for place in (1, 2, 13)})

    def stream(**options):
        batches = data.training_batches(
            "cifar100",
            "train",
            4,
            epochs=2,
            seed=3,
            data_dir=folder,
            memory_limit=memory_limit,
            bad_examples="skip",
            **options,
        )
        return [(images.numpy(), labels.numpy()) for images, labels in batches]

    whole = stream()
    assert [len(labels) for _, labels in whole] == [4, 4, 4, 3] * 2
    assert max(labels.max() for _, labels in whole) < 100
    resumed = stream(first_epoch=1, skip_batches=1)
    assert len(resumed) == 3
    for one, other in zip(resumed, whole[5:], strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
    parts = [stream(shards=data.Shards(2, first, 1)) for first in range(2)]
    for images, labels in whole:
        shares = [part.pop(0) for part in parts]
        np.testing.assert_array_equal(np.concatenate([share[0] for share in shares]), images)
        np.testing.assert_array_equal(np.concatenate([share[1] for share in shares]), labels)
    assert parts == [[], []]


def flip_byte(file, place):
    """Damages the data of one record; its neighbours and the lengths between them stay."""
    content = bytearray(file.read_bytes())
    start = 0
    for _ in range(place):
        start += int.from_bytes(content[start : start + 8], "little") + 16
    content[start + 12] ^= 0xFF
    file.write_bytes(content)


@both_sources
def test_a_damaged_record_is_named_or_left_out_with_those_behind_it(published_dir, tmp_path, memory_limit, caplog):
    folder = copied(published_dir, tmp_path, "cifar100")
    file, examples = records_of(folder, "cifar100", "train")
    flip_byte(file, 15)
    with pytest.raises(data.DatasetUnavailableError, match=f"damaged: {file.name}__15: the record is damaged"):
        data.load("cifar100", "train", 4, folder)
    with caplog.at_level(logging.WARNING, "aib_tf"):
        options = {"fields": "id", "memory_limit": memory_limit, "bad_examples": "skip"}
        batches = data.load("cifar100", "train", 4, folder, **options)
    assert [text.decode() for batch in batches for text in batch["id"].numpy()] == [
        id_of(example) for example in examples[:15]
    ]
    assert f"3 of 18 examples of cifar100, split train, are left out: {file.name}__15" in caplog.text
    test = data.load("cifar100", "test", 4, folder, **options)
    assert sum(len(batch["id"]) for batch in test) == 6


@both_sources
def test_a_file_with_too_few_records_is_damaged_however_it_ends(published_dir, tmp_path, memory_limit):
    folder = copied(published_dir, tmp_path, "stl10")
    file, examples = records_of(folder, "stl10", "test")
    with tf.io.TFRecordWriter(str(file)) as writer:
        for example in examples[:-2]:
            writer.write(example.SerializeToString())
    with pytest.raises(data.DatasetUnavailableError, match=f"damaged: {file.name}__4: the record is damaged"):
        data.load("stl10", "test", 4, folder)
    batches = data.load("stl10", "test", 4, folder, memory_limit=memory_limit, bad_examples="skip")
    assert [len(labels) for _, labels in batches] == [4]


def test_grey_photographs_of_birds_are_no_errors(published_dir, tmp_path):
    folder = copied(published_dir, tmp_path, "caltech_birds2011")
    _, examples = records_of(folder, "caltech_birds2011", "train")
    grey = np.asarray(Image.open(io.BytesIO(examples[2].features.feature["image"].bytes_list.value[0])).convert("L"))
    tamper(folder, "caltech_birds2011", {2: ("image", encoded(grey, "JPEG"))})
    data.check_examples("caltech_birds2011", "train", folder)
    images = np.concatenate(
        [images for images, _ in data.load("caltech_birds2011", "train", 4, folder, normalize=False)]
    )
    same = (images == images[..., :1]).all(axis=(1, 2, 3))
    assert same.tolist() == [place == 2 for place in range(TRAIN * 9 // 10)]


def test_the_mask_of_a_bird_has_its_size(published_dir, tmp_path):
    folder = copied(published_dir, tmp_path, "caltech_birds2011")
    tamper(folder, "caltech_birds2011", {2: ("segmentation_mask", encoded(np.zeros((7, 9), np.uint8)))})
    with pytest.raises(data.BadExampleError, match=r"jpg: a mask of \(7, 9, 1\), expected"):
        data.check_examples("caltech_birds2011", "train", folder)


@pytest.fixture
def pictures(tmp_path):
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            folder = tmp_path / "animals" / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                Image.fromarray(small_image(number)).save(folder / f"{number}.jpg")
    return tmp_path


@both_sources
def test_a_bad_picture_in_a_folder_is_named_by_its_path(pictures, memory_limit):
    bad = pictures / "animals" / "test" / "bee" / "2.jpg"
    Image.fromarray(small_image(2)[..., 0]).save(bad)
    (pictures / "animals" / "test" / "ant" / "0.jpg").write_bytes(b"")
    name = "image_folder_32/animals"
    with pytest.raises(data.BadExampleError) as caught:
        data.check_examples(name, "test", pictures)
    reasons = {example.id: example.reason for example in caught.value.examples}
    assert set(reasons) == {"test/bee/2.jpg", "test/ant/0.jpg"}
    assert reasons["test/bee/2.jpg"] == "an image of 1 channel, grey, expected 3"
    assert "cannot be decoded" in reasons["test/ant/0.jpg"]
    if memory_limit:
        with pytest.raises(data.BadExampleError, match="2 of 8 examples"):
            data.load(name, "test", 4, pictures)
    options = {"fields": ("image", "id"), "memory_limit": memory_limit, "bad_examples": "skip"}
    batches = list(data.load(name, "test", 4, pictures, **options))
    assert sum(len(batch["id"]) for batch in batches) == 6
    # What is mended comes back, in the same process.
    Image.fromarray(small_image(2)).save(bad)
    assert sum(len(batch["id"]) for batch in data.load(name, "test", 4, pictures, **options)) == 7


def test_a_split_with_nothing_good_is_an_error_even_when_skipping(pictures):
    for path in pictures.glob("animals/test/*/*.jpg"):
        path.write_bytes(b"no picture")
    with pytest.raises(data.BadExampleError, match=r"No example of .*animals, split test, can be used: test/"):
        data.load("image_folder_32/animals", "test", 4, pictures, bad_examples="skip")


def test_a_run_knows_the_same_choices():
    assert config.BAD_EXAMPLES == reader.BAD_EXAMPLES
