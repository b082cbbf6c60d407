"""Tiny folders in the layouts of SALICON and MIT1003, written by the tests, are read as they should be."""

import numpy as np
import pytest
import scipy.io
import tensorflow as tf
from PIL import Image

from aib_tf.data import DatasetUnavailableError
from aib_tf.data.gaze import load_gaze

# Height and width of each picture.
SIZES = {"COCO_b": (20, 32), "COCO_a": (16, 24), "COCO_c": (30, 20)}


def picture(size, seed):
    """Coloured slopes, which JPEG keeps."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(corners).resize(size[::-1], Image.Resampling.BILINEAR))


def blob(size):
    """A map of two levels: its left half is three times as bright as its right one."""
    values = np.full(size, 60, np.uint8)
    values[:, : size[1] // 2] = 180
    return values


def write_salicon(folder, observers):
    """`observers`: name to a list of arrays (n, 2), x and y counted from 1."""
    for name in ("images", "maps", "fixations"):
        (folder / name / "val").mkdir(parents=True)
    for seed, (name, size) in enumerate(SIZES.items()):
        Image.fromarray(picture(size, seed)).save(folder / "images" / "val" / f"{name}.jpg", quality=100)
        Image.fromarray(blob(size)).save(folder / "maps" / "val" / f"{name}.png")
        gaze = np.zeros((len(observers[name]), 1), [("location", object), ("timestamp", object), ("fixations", object)])
        for number, points in enumerate(observers[name]):
            gaze[number, 0] = (np.ones((3, 2)), np.arange(3), np.asarray(points, np.uint16))
        resolution = np.array([size])
        scipy.io.savemat(
            folder / "fixations" / "val" / f"{name}.mat", {"image": name, "resolution": resolution, "gaze": gaze}
        )


def write_mit1003(folder, points):
    """`points`: name to rows and columns counted from 0."""
    for name in ("ALLSTIMULI", "ALLFIXATIONMAPS"):
        (folder / name).mkdir(parents=True)
    for seed, (name, size) in enumerate(SIZES.items()):
        Image.fromarray(picture(size, seed)).save(folder / "ALLSTIMULI" / f"{name}.jpeg", quality=100)
        Image.fromarray(blob(size)).save(folder / "ALLFIXATIONMAPS" / f"{name}_fixMap.jpg", quality=100)
        white = np.zeros(size, np.uint8)
        white[tuple(np.transpose(points[name]))] = 255
        Image.fromarray(white).save(folder / "ALLFIXATIONMAPS" / f"{name}_fixPts.jpg", quality=95)


OBSERVERS = {
    # Twice the same pixel, by two people, and the four corners.
    "COCO_a": [[[1, 1], [24, 1], [5, 9]], [[1, 16], [24, 16], [5, 9]]],
    # Outside of the image, and one who looked nowhere.
    "COCO_b": [[[33, 1], [1, 21], [0, 3], [32, 20]], np.zeros((0, 2))],
    "COCO_c": [np.zeros((0, 2))],
}


@pytest.fixture
def salicon(tmp_path):
    write_salicon(tmp_path, OBSERVERS)
    return tmp_path


def only_batch(dataset):
    [batch] = list(dataset)
    return {name: value.numpy() for name, value in batch.items()}


def test_salicon_is_read_in_the_order_of_the_names(salicon):
    dataset = load_gaze(salicon, "salicon", 2, split="validation", image_size=(16, 24))
    shapes = [{name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} for batch in dataset]
    assert shapes == [
        {
            "image": (tf.float32, (size, 16, 24, 3)),
            "label": (tf.int64, (size,)),
            "fixations": (tf.int32, (size, 16, 24)),
            "saliency": (tf.float32, (size, 16, 24)),
        }
        for size in (2, 1)
    ]
    assert int(dataset.cardinality()) == 2
    first = next(iter(dataset))
    # COCO_a has this very size: nothing is resized, and JPEG of the best quality is off by a few levels.
    np.testing.assert_allclose(first["image"][0], picture((16, 24), 1) / 255, atol=0.06)
    # COCO_b is a slope of another size.
    np.testing.assert_allclose(first["image"][1], picture((16, 24), 0) / 255, atol=0.06)
    np.testing.assert_array_equal(first["label"], [-1, -1])


def test_fixations_of_all_observers_are_counted_where_they_lie(salicon):
    dataset = load_gaze(salicon, "salicon", 4, split="validation", image_size=(16, 24))
    a, b, c = only_batch(dataset)["fixations"]
    expected = np.zeros((16, 24), int)
    expected[0, 0] = expected[0, 23] = expected[15, 0] = expected[15, 23] = 1
    expected[8, 4] = 2
    np.testing.assert_array_equal(a, expected)
    # Of four, only the last lies in the image.
    assert b.sum() == b[15, 23] == 1
    assert c.sum() == 0


@pytest.mark.parametrize("image_size", [(8, 12), (32, 48), (5, 7)])
def test_fixations_move_with_the_picture(salicon, image_size):
    dataset = load_gaze(salicon, "salicon", 4, split="validation", image_size=image_size)
    counts = only_batch(dataset)["fixations"][0]
    assert counts.sum() == 6
    height, width = image_size
    for x, y in np.concatenate(OBSERVERS["COCO_a"]):
        # The centre of the pixel, in shares of the picture.
        row, column = (y - 0.5) / 16 * height, (x - 0.5) / 24 * width
        assert counts[int(row), int(column)] >= 1


def test_a_fixation_map_becomes_a_density(salicon):
    Image.fromarray(np.zeros((20, 32), np.uint8)).save(salicon / "maps" / "val" / "COCO_b.png")
    for image_size in [(16, 24), (4, 6), (33, 50)]:
        dataset = load_gaze(salicon, "salicon", 4, split="validation", image_size=image_size)
        density = only_batch(dataset)["saliency"]
        np.testing.assert_allclose(density.sum(axis=(1, 2)), [1, 0, 1], rtol=1e-5)
        half = density[0, :, : image_size[1] // 2].sum()
        # But for what is mixed at the edge between the halves.
        assert half == pytest.approx(0.75, abs=0.03)
    pixels = 16 * 24
    density = only_batch(load_gaze(salicon, "salicon", 4, split="validation", image_size=(16, 24)))["saliency"]
    np.testing.assert_allclose(density[0, :, :12], 1.5 / pixels, rtol=1e-5)
    np.testing.assert_allclose(density[0, :, 12:], 0.5 / pixels, rtol=1e-5)


def test_mit1003_is_read_with_its_white_pixels_as_fixations(tmp_path):
    points = {"COCO_a": [[0, 0], [15, 23], [7, 11]], "COCO_b": [[10, 16]], "COCO_c": [[29, 0]]}
    write_mit1003(tmp_path, points)
    dataset = load_gaze(tmp_path, "mit1003", 4, image_size=(16, 24))
    batch = only_batch(dataset)
    assert [list(map(list, np.argwhere(counts))) for counts in batch["fixations"]] == [
        [[0, 0], [7, 11], [15, 23]],
        [[8, 12]],
        [[15, 0]],
    ]
    np.testing.assert_allclose(batch["saliency"].sum(axis=(1, 2)), 1, rtol=1e-5)
    assert batch["saliency"][0, :, :12].sum() == pytest.approx(0.75, abs=0.01)


def test_images_are_normalised_and_may_be_grey(salicon):
    load = {"split": "validation", "image_size": (10, 12)}
    plain = only_batch(load_gaze(salicon, "salicon", 4, **load))["image"]
    normalised = only_batch(load_gaze(salicon, "salicon", 4, mean=(0.1, 0.2, 0.3), stddev=0.5, **load))["image"]
    np.testing.assert_allclose(normalised, (plain - [0.1, 0.2, 0.3]) / 0.5, atol=1e-6)
    grey = only_batch(load_gaze(salicon, "salicon", 4, channels=1, **load))["image"]
    assert grey.shape == (3, 10, 12, 1)
    np.testing.assert_allclose(grey[..., 0], plain @ [0.299, 0.587, 0.114], atol=0.01)


def test_a_data_set_can_be_read_again(salicon):
    dataset = load_gaze(salicon, "salicon", 2, split="validation", image_size=(6, 6))
    for first, second in zip(dataset, dataset, strict=True):
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("damage", ["images/val/COCO_b.jpg", "maps/val/COCO_b.png", "fixations/val/COCO_b.mat"])
@pytest.mark.parametrize("content", [b"", b"no such format", None])
def test_a_damaged_file_is_named(salicon, damage, content):
    path = salicon / damage
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    dataset = load_gaze(salicon, "salicon", 4, split="validation", image_size=(6, 6))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"cannot be read.*COCO_b"):
        list(dataset)


def test_a_mat_file_without_gaze_is_named(salicon):
    scipy.io.savemat(salicon / "fixations" / "val" / "COCO_c.mat", {"eyes": np.ones((2, 2))})
    dataset = load_gaze(salicon, "salicon", 4, split="validation", image_size=(6, 6))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"gaze\(i\).fixations must be x and y.*COCO_c"):
        list(dataset)


@pytest.mark.parametrize("missing", ["maps/val/COCO_b.png", "fixations/val/COCO_b.mat"])
def test_an_image_without_its_map_or_fixations_is_named(salicon, missing):
    (salicon / missing).unlink()
    with pytest.raises(DatasetUnavailableError, match=f"COCO_b.jpg has no {missing}"):
        load_gaze(salicon, "salicon", 4, split="validation", image_size=(6, 6))


def test_a_missing_folder_and_an_empty_one_are_told_apart(tmp_path):
    with pytest.raises(DatasetUnavailableError, match="folder does not exist"):
        load_gaze(tmp_path / "nowhere", "mit1003", 4, image_size=(6, 6))
    with pytest.raises(DatasetUnavailableError, match=r"no images .*ALLSTIMULI"):
        load_gaze(tmp_path, "mit1003", 4, image_size=(6, 6))
    (tmp_path / "images" / "train").mkdir(parents=True)
    with pytest.raises(DatasetUnavailableError, match=r"no images .*images/train"):
        load_gaze(tmp_path, "salicon", 4, split="train", image_size=(6, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "cat2000"}, "layout.*salicon, mit1003.*cat2000"),
        ({"split": "test"}, "split.*train, validation.*test"),
        ({"split": None}, "split"),
        ({"layout": "mit1003", "split": "train"}, "mit1003 has no splits"),
        ({"batch_size": 0}, "batch_size"),
        ({"image_size": (0, 6)}, "image_size"),
        ({"image_size": 6}, "image_size"),
        ({"channels": 4}, "channels"),
        ({"mean": (0.5, 0.5)}, "mean and stddev"),
        ({"stddev": 0.0}, "mean and stddev"),
    ],
)
def test_bad_arguments_are_refused(salicon, change, message):
    arguments = {"layout": "salicon", "batch_size": 4, "split": "validation", "image_size": (6, 6), **change}
    with pytest.raises(ValueError, match=message):
        load_gaze(salicon, **arguments)
