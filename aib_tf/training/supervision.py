"""The maps that attention is trained towards, from what a data set tells of its objects."""

import tensorflow as tf


def maps_field(info, augment):
    """The field of a data set that attention can be trained towards: its masks, or else its boxes.

    Args:
        info: entry of the data set.
        augment: whether training images are augmented.

    Raises:
        ValueError: if it has neither, or if augmentation cuts images to their boxes, which then tell nothing.
    """
    if "mask" in info.fields:
        return "mask"
    if not info.has_boxes:
        raise ValueError(
            f"Attention is trained towards masks or boxes, and {info.name} has neither. Use "
            f"attention_supervision=none, or another data set. Received: dataset={info.name}"
        )
    if augment and info.crop_to_box:
        raise ValueError(
            f"Augmentation cuts the images of {info.name} to their boxes, which then tell attention nothing. Use "
            "augment=False, or attention_supervision=none. Received: augment=True"
        )
    return "bbox"


def with_maps(dataset, field):
    """Turns a data set of dicts with image, label and `field` into one of ((images, maps), labels).

    Args:
        dataset: batches with images (B, H, W, C), labels (B,), and masks (B, H, W, 1) or boxes (B, 4).
        field: "mask" or "bbox".

    Returns:
        A `tf.data.Dataset`; maps are uint8 (B, H, W, 1), 1 on the object or in its box.
    """

    def pairs(batch):
        images, maps = batch["image"], batch[field]
        if field == "bbox":
            maps = boxes_to_maps(maps, images.shape[1:3])
        return (images, maps), batch["label"]

    return dataset.map(pairs)


def boxes_to_maps(boxes, size):
    """The pixels whose centres lie in each box.

    Args:
        boxes: (B, 4) float tensor, top, left, bottom, right in shares of the image; one without area holds no pixel.
        size: height and width of the image.

    Returns:
        uint8 (B, *size, 1), 1 in the box and 0 elsewhere.
    """
    top, left, bottom, right = tf.unstack(boxes[..., None], axis=1)
    y, x = ((tf.range(length, dtype=boxes.dtype) + 0.5) / length for length in size)
    rows, columns = (top <= y) & (y < bottom), (left <= x) & (x < right)
    return tf.cast(rows[:, :, None, None] & columns[:, None, :, None], tf.uint8)
