"""From a picture, or its pixels, to what a model reads; and the names of what it answers."""

import dataclasses

import numpy as np
import tensorflow as tf

from aib_tf import data
from aib_tf.data import geometry


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What an exported model has to know beside its weights.

    Attributes:
        image_shape: height, width and channels of what the model reads.
        scale: (channels,) float32 array; the model reads pixels * scale + offset, with pixels in 0..255.
        offset: (channels,) float32 array.
        class_names: a name for each class.
        info: entry of the data set that the model was trained on, or None.
    """

    image_shape: tuple[int, int, int]
    scale: np.ndarray
    offset: np.ndarray
    class_names: tuple[str, ...]
    info: data.DatasetInfo | None

    @classmethod
    def of(cls, model, dataset=None, class_names=None, mean=None, stddev=None):
        """Finds out how images come to a model.

        Args:
            model: a classifier with `features` (B, H, W, channels) and (B, classes) logits.
            dataset: name or `DatasetInfo` of what it was trained on: its statistics normalise, its classes have names.
                None: pixels are scaled to 0..1, and classes are called by their number.
            class_names: names of the classes in the place of those of the data set.
            mean: number, or one a channel, without a data set: the model reads (pixels / 255 - mean) / stddev.
            stddev: the same.

        Raises:
            ValueError: for statistics beside a data set, or that are no numbers (`stddev` above 0); for an unknown data
                set, one that does not fit to the model, a number of names that is not the number of classes, or a
                model of no fixed image size without a data set to give it one.
        """
        info = data.get(dataset) if isinstance(dataset, str) else dataset
        shape = tuple(model.features.input_shape[1:])
        classes = model.classes
        if info is not None:
            _check_fits(model, shape, classes, info)
            shape = info.image_shape
        if None in shape:
            raise ValueError(
                "The images must have a fixed size: build the model with one, or name the data set that has it. "
                f"Received: model {model.name} with input shape {model.features.input_shape}, dataset=None"
            )
        if info is None:
            mean, stddev = _statistics(shape[-1], mean, stddev)
        else:
            if mean is not None or stddev is not None:
                raise ValueError(
                    f"{info.name} has statistics of its own: give them or the data set. "
                    f"Received: dataset={info.name!r}, mean={mean!r}, stddev={stddev!r}"
                )
            mean, stddev = info.mean, info.stddev
        if class_names is None:
            class_names = info.class_names if info is not None else [str(number) for number in range(classes)]
        if len(class_names) != classes or isinstance(class_names, str) or not all(map(_is_text, class_names)):
            raise ValueError(
                f"`class_names` must be one text for each of {classes} classes. Received: class_names={class_names!r}"
            )
        return cls(shape, *data.scale_and_offset(mean, stddev), tuple(class_names), info)

    def decode(self, image_bytes):
        """Encoded pictures, a string tensor (B,) -> uint8 (B, H, W, channels), resized as in the evaluation.

        A picture of a set whose images differ in size is resized and cut as there; for other sets, and without one,
        the largest window in the middle that has the aspect ratio of `image_shape` is resized to it.
        """
        height, width, channels = self.image_shape

        def decode(encoded):
            image = tf.io.decode_image(encoded, channels=channels, expand_animations=False)
            if self.info is not None and self.info.resize is not None:
                return geometry.prepare({"image": image}, self.info, augment=False)["image"]
            return geometry.fit(image, (height, width))

        return tf.map_fn(decode, image_bytes, fn_output_signature=tf.TensorSpec(self.image_shape, tf.uint8))


def _check_fits(model, shape, classes, info):
    sizes_fit = all(size in (None, expected) for size, expected in zip(shape, info.image_shape, strict=True))
    if not sizes_fit or classes != info.classes:
        raise ValueError(
            f"{info.name} has images {info.image_shape} of {info.classes} classes, and {model.name} reads images "
            f"{shape} of {classes}. Name the data set that the model was trained on. Received: dataset={info.name!r}"
        )


def _statistics(channels, mean, stddev):
    """Mean and standard deviation of pixels in 0..1, float64 (channels,) each."""
    try:
        means, deviations = (
            np.broadcast_to(np.asarray(default if value is None else value, np.float64), (channels,))
            for value, default in ((mean, 0), (stddev, 1))
        )
        valid = np.isfinite(means).all() and np.isfinite(deviations).all() and (deviations > 0).all()
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(
            f"`mean` and `stddev` must be a number or {channels} numbers, one a channel, and `stddev` above 0. "
            f"Received: mean={mean!r}, stddev={stddev!r}"
        )
    return means, deviations


def _is_text(name):
    try:
        return isinstance(name, str) and name.encode() is not None
    except UnicodeEncodeError:  # half of a pair of UTF-16
        return False
