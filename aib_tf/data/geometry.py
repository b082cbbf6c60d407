"""Which part of an image is delivered, and where its object lies in it.

An image of a set with `DatasetInfo.resize` is first prepared by itself, once: cut to the box of its
object where the table says so, resized, and cut to its centre unless a random crop follows. What is
random works on whole batches afterwards: one gather of rows, one of columns, whatever the number of
images. Boxes follow every step.
"""

import tensorflow as tf

from aib_tf.data import datasets

# Fixed, since "auto_select" draws other numbers on other devices.
RANDOM_ALGORITHM = "philox"


def prepared_shape(info: datasets.DatasetInfo, augment: bool) -> tuple[int, int, int]:
    """The shape (H, W, C) of an image that `prepare` returns."""
    if info.resize is None or not augment:
        return info.image_shape
    return (*info.resize, info.image_shape[-1])


def prepare(example: dict[str, tf.Tensor], info: datasets.DatasetInfo, augment: bool) -> dict[str, tf.Tensor]:
    """Brings one example of a set whose images differ in size to one size; others pass untouched.

    Args:
        example: may hold image, uint8 (H, W, C) of any size, mask, uint8 (H, W, 1), and bbox, float32 (4,), top,
            left, bottom, right in shares of the image. With `augment`, a set with `crop_to_box` needs image and bbox
            or none of the three. Other fields pass untouched.
        info: entry of the data set.
        augment: whether a random crop follows. Then the image is cut to the box of its object
            where `info.crop_to_box` says so, and resized to `info.resize`; otherwise the whole
            image is resized, and its centre of `info.image_shape` cut out.

    Returns:
        As `example`: image, uint8 of `prepared_shape(info, augment)`; mask, uint8 of that height and width, each pixel
        that of the nearest one; and bbox, float32 (4,), of what is seen of the object, in shares of that image.
    """
    if info.resize is None:
        return example
    prepared = dict(example)
    pictures = [field for field in ("image", "mask") if field in example]
    if augment and info.crop_to_box and "image" in example:
        start, end = _pixels_of_box(example["image"], example["bbox"])
        for field in pictures:
            prepared[field] = example[field][start[0] : end[0], start[1] : end[1]]
        size = tf.shape(example["image"])[:2]
        prepared["bbox"] = _boxes_in_window(example["bbox"], size, start, end - start)
    for field in pictures:
        prepared[field] = (_resize if field == "image" else _resize_mask)(prepared[field], info.resize)
    if not augment:
        height, width = info.image_shape[:2]
        top, left = (info.resize[0] - height) // 2, (info.resize[1] - width) // 2
        for field in pictures:
            prepared[field] = prepared[field][top : top + height, left : left + width]
        if "bbox" in prepared:
            prepared["bbox"] = _boxes_in_window(prepared["bbox"], info.resize, (top, left), (height, width))
    return prepared


def fit(image: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Brings a picture of any size to one size without distortion.

    Args:
        image: uint8 (H, W, C).
        size: height and width.

    Returns:
        uint8 (*size, C): the largest window in the middle that has the aspect ratio of `size`, resized.
    """
    height, width = size
    actual = tf.shape(image)
    # In whole numbers: a picture that has the aspect ratio already loses no row to rounding.
    rows = tf.maximum(tf.minimum(actual[0], actual[1] * height // width), 1)
    columns = tf.maximum(tf.minimum(actual[1], actual[0] * width // height), 1)
    top, left = (actual[0] - rows) // 2, (actual[1] - columns) // 2
    return _resize(image[top : top + rows, left : left + columns], size)


def random_crop_and_flip(
    images: tf.Tensor,
    seed: tf.Tensor,
    *,
    padding: int,
    flip: bool,
    size: tuple[int, int] | None = None,
    part: tuple[tf.Tensor, tf.Tensor] | None = None,
) -> tf.Tensor:
    """Cuts a window out of each image of a batch, and mirrors half of them.

    Image b becomes the window of `size` at (top_b, left_b) of its copy with a reflected border of
    `padding` pixels (the edge is not repeated), where top_b and left_b are uniform over all places
    where the window fits; then, if `flip`, it is mirrored left to right with probability 1/2. The
    border is never made: a window of a reflected image is a choice of its rows and columns.

    Args:
        images: any type, (B, H, W, C), H and W static and larger than `padding`.
        seed: integers (2,); the result is a pure function of it and of `images`.
        padding: width of the border, at least 0.
        flip: whether to mirror.
        size: height and width of the window; None: those of `images`.
        part: where the images are only a part of a batch: its first image's place there, and the
            size of the batch. They get the windows that they would get as part of it.

    Returns:
        As `images`, (B, *size, C).

    Raises:
        ValueError: if the window is larger than the image with its border.

    Reference:
        He et al., "Deep residual learning for image recognition" (2016), section 4.2, with
        the reflected border of Zagoruyko and Komodakis, "Wide residual networks" (2016).
    """
    height, width = images.shape[1:3]
    window_height, window_width = size or (height, width)
    if not padding and not flip and (window_height, window_width) == (height, width):
        return images
    top, left, mirrored = _windows(tf.shape(images)[0], part, seed, (height, width), padding, size)
    if padding or window_height != height:
        rows = _reflected(top - padding + tf.range(window_height), height)
        images = tf.gather(images, rows, axis=1, batch_dims=1)
    columns = left - padding + tf.range(window_width)
    if flip:
        columns = tf.where(mirrored, tf.reverse(columns, [1]), columns)
    return tf.gather(images, _reflected(columns, width), axis=2, batch_dims=1)


def random_crop_and_flip_boxes(
    boxes: tf.Tensor,
    seed: tf.Tensor,
    *,
    image_size: tuple[int, int],
    padding: int,
    flip: bool,
    size: tuple[int, int] | None = None,
    part: tuple[tf.Tensor, tf.Tensor] | None = None,
) -> tf.Tensor:
    """Does to boxes what `random_crop_and_flip` with the same arguments does to their images.

    Args:
        boxes: float (B, 4), top, left, bottom, right in shares of the image.
        seed: as for the images.
        image_size: height and width of the images before.
        padding: as for the images.
        flip: as for the images.
        size: as for the images.
        part: as for the images.

    Returns:
        As `boxes`, in shares of the window and clipped to it. The reflection of an object in the
        border is not the object; a box of which nothing is left has no area.
    """
    top, left, mirrored = _windows(tf.shape(boxes)[0], part, seed, image_size, padding, size)
    origin = tf.cast(tf.concat([top, left], axis=1) - padding, boxes.dtype)
    boxes = _boxes_in_window(boxes, image_size, origin, size or image_size)
    if flip:
        top, left, bottom, right = tf.unstack(boxes, axis=-1)
        boxes = tf.where(mirrored, tf.stack([top, 1 - right, bottom, 1 - left], axis=-1), boxes)
    return boxes


def _windows(count, part, seed, image_size, padding, size):
    """Draws a window for each image: top and left, int32, and whether to mirror, bool; (B, 1) each."""
    # One draw an image, out of all windows and their mirror images.
    (height, width), (window_height, window_width) = image_size, size or image_size
    vertical, horizontal = height + 2 * padding - window_height + 1, width + 2 * padding - window_width + 1
    if vertical < 1 or horizontal < 1:
        raise ValueError(
            f"The window must fit into the image of {height}x{width} with its border of {padding}. "
            f"Received: size={window_height, window_width}"
        )
    first, batch = part or (0, count)
    draws = tf.random.stateless_uniform(
        (batch, 1), seed, minval=0, maxval=2 * vertical * horizontal, dtype=tf.int32, alg=RANDOM_ALGORITHM
    )
    draws = draws[first : first + tf.cast(count, tf.int64)] if part else draws
    return draws // (2 * horizontal), draws // 2 % horizontal, draws % 2 == 1


def _reflected(positions: tf.Tensor, size: int) -> tf.Tensor:
    """Positions in (-size, 2 * size - 1) -> 0..size - 1, mirrored at the first and last pixel."""
    return (size - 1) - tf.abs((size - 1) - tf.abs(positions))


def _pixels_of_box(image, box):
    """The whole pixels (at least one) nearest to a box: row and column of the first, and behind the last."""
    size = tf.shape(image)[:2]
    corners = tf.round(tf.reshape(box, (2, 2)) * tf.cast(size, box.dtype))
    start = tf.clip_by_value(tf.cast(corners[0], tf.int32), 0, size - 1)
    return start, tf.clip_by_value(tf.cast(corners[1], tf.int32), start + 1, size)


def _resize(image, size):
    """Resizes a uint8 image as Pillow and torchvision do: bilinear, over a wider support when it shrinks."""
    resized = tf.image.resize(image, size, method="bilinear", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0.0, 255.0), tf.uint8)


def _resize_mask(mask, size):
    return tf.image.resize(mask, size, method="nearest")


def _boxes_in_window(boxes, image_size, origin, size):
    """Boxes (..., 4) in shares of the image -> in shares of its window at `origin` (..., 2), clipped to it."""
    image_size, origin, size = (tf.cast(value, boxes.dtype) for value in (image_size, origin, size))
    pixels = boxes * tf.tile(image_size, [2])
    return tf.clip_by_value((pixels - tf.concat([origin, origin], axis=-1)) / tf.tile(size, [2]), 0.0, 1.0)
