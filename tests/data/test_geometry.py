import collections
import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from aib_tf import data
from aib_tf.data import geometry
from tests.data.windows import windows_of

BIRDS = data.DATASETS["caltech_birds2011"]


@pytest.mark.parametrize(
    "padding, flip, size",
    [
        (1, True, None),
        (3, False, None),
        (4, True, None),
        (0, True, None),
        (0, True, (5, 3)),
        (0, False, (7, 4)),
        (2, True, (6, 4)),
        (1, False, (8, 6)),
    ],
)
def test_every_crop_is_a_window_of_the_reflected_image(padding, flip, size):
    image = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    batch = np.repeat(image[np.newaxis], 4000, axis=0)
    crops = data.random_crop_and_flip(tf.constant(batch), (1, 2), padding=padding, flip=flip, size=size)
    assert crops.dtype == tf.uint8 and crops.shape == (4000, *(size or (7, 5)), 3)
    windows = windows_of(image, padding, flip, size)
    # Narrow windows at a border can be the mirror images of each other, and come as often as both together.
    expected = collections.Counter(window.tobytes() for window in windows)
    delivered = collections.Counter(crop.tobytes() for crop in crops.numpy())
    assert set(delivered) == set(expected)  # Each of them, and no other.
    for window, occurrences in expected.items():
        mean = len(batch) * occurrences / len(windows)
        assert abs(delivered[window] - mean) < 6 * np.sqrt(mean)  # Uniform.


def test_images_of_a_batch_move_independently_and_stay_in_their_place():
    images = np.random.default_rng(1).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8)
    crops = data.random_crop_and_flip(tf.constant(images), (3, 4), padding=2, flip=True).numpy()
    chosen = []
    for image, crop in zip(images, crops, strict=True):
        windows = [window.tobytes() for window in windows_of(image, 2, True)]
        chosen.append(windows.index(crop.tobytes()))
    assert len(set(chosen)) > 8


def test_augmentation_is_a_function_of_its_seed():
    images = tf.constant(np.random.default_rng(2).integers(0, 256, (9, 6, 6, 3), dtype=np.uint8))
    first, again, other = (
        data.random_crop_and_flip(images, seed, padding=2, flip=True).numpy() for seed in ((5, 6), (5, 6), (5, 7))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_without_padding_and_flip_images_pass_untouched():
    images = tf.zeros((2, 4, 4, 1), tf.uint8)
    assert data.random_crop_and_flip(images, (0, 0), padding=0, flip=False) is images
    assert data.random_crop_and_flip(images, (0, 0), padding=0, flip=False, size=(4, 4)) is images


def test_a_window_larger_than_the_image_is_refused():
    images = tf.zeros((2, 4, 4, 1), tf.uint8)
    with pytest.raises(ValueError, match=r"4x4 with its border of 1. Received: size=\(7, 6\)"):
        data.random_crop_and_flip(images, (0, 0), padding=1, flip=False, size=(7, 6))


def rectangle_of(image, minimum=128):
    """Top, left, bottom, right of what is bright, in pixels; zeros where nothing is."""
    rows, columns = (np.flatnonzero((image >= minimum).any(axis)) for axis in ((1, 2), (0, 2)))
    return (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1) if len(rows) else (0, 0, 0, 0)


@pytest.mark.parametrize(
    "padding, flip, size", [(0, True, (12, 10)), (2, True, (12, 10)), (2, False, None), (3, True, None)]
)
def test_boxes_follow_the_crops_of_their_images(padding, flip, size):
    random = np.random.default_rng(3)
    images = np.zeros((300, 18, 20, 1), np.uint8)
    boxes = np.zeros((300, 4), np.float32)
    for image, box in zip(images, boxes, strict=True):
        # Away from the border: the reflection of an object is none.
        top, left = random.integers(4, 10, 2)
        bottom, right = random.integers((top + 1, left + 1), (14, 16))
        image[top:bottom, left:right] = 255
        box[:] = top / 18, left / 20, bottom / 18, right / 20
    window = {"padding": padding, "flip": flip, "size": size}
    crops = data.random_crop_and_flip(tf.constant(images), (1, 2), **window).numpy()
    moved = geometry.random_crop_and_flip_boxes(tf.constant(boxes), (1, 2), image_size=(18, 20), **window).numpy()
    height, width = crops.shape[1:3]
    lost = cut = 0
    for image, crop, followed in zip(images, crops, moved, strict=True):
        top, left, bottom, right = followed * (height, width, height, width)
        if not crop.any():
            assert bottom == top or right == left
            lost += 1
            continue
        np.testing.assert_allclose((top, left, bottom, right), rectangle_of(crop), atol=1e-4)
        cut += crop.sum() < image.sum()
    assert (cut > 0 and lost > 0) == (size is not None)


def test_without_augmentation_the_whole_image_is_resized_and_its_centre_cut_out():
    image = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    # The rectangle 30..240, 100..350 of 300x500 is 25.6..204.8, 51.2..179.2 of 256x256.
    example = {"image": tf.constant(image), "bbox": tf.constant([0.1, 0.2, 0.8, 0.7]), "label": 3}
    prepared = geometry.prepare(example, BIRDS, augment=False)
    assert prepared["image"].dtype == tf.uint8 and prepared["image"].shape == (224, 224, 3)
    expected = np.asarray(Image.fromarray(image).resize((256, 256), Image.Resampling.BILINEAR))[16:240, 16:240]
    assert np.abs(prepared["image"].numpy().astype(int) - expected).max() <= 1  # Pillow rounds between the two axes.
    np.testing.assert_allclose(prepared["bbox"] * 224, [9.6, 35.2, 188.8, 163.2], rtol=1e-5)
    assert prepared["label"] == 3


def test_with_augmentation_the_image_is_cut_to_its_box_and_resized():
    image = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    example = {"image": tf.constant(image), "bbox": tf.constant([0.1, 0.2, 0.8, 0.7])}
    prepared = geometry.prepare(example, BIRDS, augment=True)
    assert prepared["image"].dtype == tf.uint8 and prepared["image"].shape == (256, 256, 3)
    cut = Image.fromarray(image).crop((100, 30, 350, 240))
    expected = np.asarray(cut.resize((256, 256), Image.Resampling.BILINEAR))
    assert np.abs(prepared["image"].numpy().astype(int) - expected).max() <= 1
    np.testing.assert_allclose(prepared["bbox"], [0, 0, 1, 1], atol=1e-6)
    np.testing.assert_array_equal(example["image"], image)


@pytest.mark.parametrize(
    "box, pixels",
    [
        ((0.5, 0.5, 0.5, 0.5), (3, 4, 4, 5)),
        ((0.9, 0.9, 1.3, 1.2), (5, 7, 6, 8)),
        ((1.0, 1.0, 1.0, 1.0), (5, 7, 6, 8)),
        ((-0.2, -0.1, 0.2, 0.4), (0, 0, 1, 3)),
        ((0.0, 0.0, 1.0, 1.0), (0, 0, 6, 8)),
    ],
)
def test_a_crop_to_the_box_stays_in_the_image_and_holds_a_pixel(box, pixels):
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    top, left, bottom, right = pixels
    info = dataclasses.replace(BIRDS, image_shape=(4, 4, 3), resize=(4, 4))
    found = geometry.prepare({"image": tf.constant(image), "bbox": tf.constant(box)}, info, augment=True)
    expected = geometry.prepare({"image": tf.constant(image[top:bottom, left:right])}, info, augment=False)
    np.testing.assert_array_equal(found["image"], expected["image"])
    assert ((found["bbox"] >= 0) & (found["bbox"] <= 1)).numpy().all()


def test_images_of_one_size_pass_untouched():
    example = {"image": tf.zeros((32, 32, 3), tf.uint8)}
    assert geometry.prepare(example, data.DATASETS["cifar100"], augment=True) is example


@pytest.mark.parametrize("height, width", [(40, 40), (60, 41), (33, 97), (9, 9), (1, 9), (20, 30)])
@pytest.mark.parametrize("size", [(20, 20), (20, 30)])
def test_a_picture_is_fitted_as_pillow_does(height, width, size):
    # Smooth, so that half a pixel, by which the middle may differ, is little.
    rows, columns = np.ogrid[:height, :width]
    image = np.stack(
        [
            np.broadcast_to(255 * values // last, (height, width))
            for values, last in (
                (rows, max(height - 1, 1)),
                (columns, max(width - 1, 1)),
                (rows + columns, height + width - 1),
            )
        ],
        axis=-1,
    )
    image = image.astype(np.uint8)
    fitted = geometry.fit(tf.constant(image), size).numpy()
    assert fitted.shape == (*size, 3) and fitted.dtype == np.uint8
    expected = np.asarray(ImageOps.fit(Image.fromarray(image), size[::-1], Image.Resampling.BILINEAR))
    step = 255 / min(height, width)
    assert np.abs(fitted.astype(int) - expected).max() <= 2 + step
    if (height, width) == size:
        np.testing.assert_array_equal(fitted, image)
