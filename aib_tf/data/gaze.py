"""Pictures and where people looked at them, as SALICON and MIT1003 lie on disk.

Nothing is held in memory but the names of the files: pictures are decoded one by one, on the way into their batch.
Picture, map and fixations of an image are brought to one size together, without regard to the aspect ratio, so that
they stay in register.
"""

import io
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image

from aib_tf.data.locations import DatasetUnavailableError
from aib_tf.data.pipeline import scale_and_offset
from aib_tf.validation import check_choice, check_count

# JPEG leaves shades of grey around the white pixels of a picture of fixations.
_FIXATED = 128


class _Layout(NamedTuple):
    """Where the three files of an image are: folders (with the folder of a split to fill in), and ends of names."""

    splits: dict[str, str]
    images: str
    image_ends: tuple[str, ...]
    maps: str
    map_end: str
    fixations: str
    fixations_end: str
    read_points: Callable


def load_gaze(
    folder: str | os.PathLike,
    layout: str,
    batch_size: int,
    *,
    split: str | None = None,
    image_size: tuple[int, int],
    channels: int = 3,
    mean=0.0,
    stddev=1.0,
) -> tf.data.Dataset:
    """Batches of images with the fixations and the fixation maps of people who looked at them.

    Layouts:

    - `"salicon"`, with `split` `"train"` or `"validation"` (the fixations of its test images were never published):
      `images/{train,val}/NAME.jpg`, `maps/{train,val}/NAME.png` and `fixations/{train,val}/NAME.mat`, whose
      `gaze(i).fixations` are the x and y of observer i in pixels, counted from 1. Fixations outside of the image are
      left out. (Jiang et al., "SALICON: Saliency in context", 2015)
    - `"mit1003"`, without splits: `ALLSTIMULI/NAME.jpeg`, `ALLFIXATIONMAPS/NAME_fixMap.jpg` and
      `ALLFIXATIONMAPS/NAME_fixPts.jpg`, where the fixated pixels are white, those of 128 or more; how often each was
      fixated is not in the file. (Judd et al., "Learning to predict where humans look", 2009)

    Args:
        folder: holds the folders named above.
        layout: `"salicon"` or `"mit1003"`.
        batch_size: images a batch, at least 1.
        split: part of the data, for a layout with splits.
        image_size: height and width that everything is resized to. Pictures and maps are resized bilinearly, over a
            wider support when they shrink; a fixation moves to the pixel that its place falls into.
        channels: 1 for grey images, 3 for coloured ones.
        mean: mean of the pixels in 0..1 that images are normalised with, a number or (C,): those of the data that the
            model was trained on, such as `aib_tf.data.get(name).mean`.
        stddev: standard deviation of the same.

    Returns:
        A data set, in the order of the names, that can be read again and again, of dicts:
            image, float32 (B, *image_size, channels), (pixels / 255 - mean) / stddev;
            label, int64 (B,), -1: these data have no classes;
            fixations, int32 (B, *image_size), the number of fixations of each pixel;
            saliency, float32 (B, *image_size), the fixation map as a density, of sum 1; 0 where the file is black.
        Reading a file that is damaged raises `tf.errors.InvalidArgumentError`, whose message names the file.

    Raises:
        ValueError: for an unknown layout or split, or an impossible value.
        DatasetUnavailableError: if the folder does not exist, has no images in that layout, or an image lacks its map
            or its fixations.

    Example:
        >>> info = aib_tf.data.get("caltech_birds2011")
        >>> gaze = load_gaze("SALICON", "salicon", 32, split="validation", image_size=(224, 224),
        ...                  mean=info.mean, stddev=info.stddev)
        >>> aib_tf.evaluation.saliency(model, gaze)
    """
    check_choice("layout", layout, LAYOUTS)
    check_count("batch_size", batch_size)
    if not isinstance(image_size, tuple | list) or len(image_size) != 2:
        raise ValueError(f"`image_size` must be a height and a width. Received: image_size={image_size!r}")
    size = tuple(check_count("image_size", side) for side in image_size)
    check_choice("channels", channels, (1, 3))
    if any(np.shape(value) not in ((), (1,), (channels,)) for value in (mean, stddev)) or not np.all(
        np.isfinite(mean) & np.isfinite(stddev) & (np.asarray(stddev) > 0)
    ):
        raise ValueError(
            f"mean and stddev must be numbers, or one for each of {channels} channels, and stddev more than 0. "
            f"Received: mean={mean!r}, stddev={stddev!r}"
        )
    scale, offset = (tf.constant(value) for value in scale_and_offset(mean, stddev))
    files = _files(Path(os.path.expanduser(os.fspath(folder))), layout, split)
    read_points = LAYOUTS[layout].read_points

    def read(image_path, map_path, points_path):
        paths = [os.fsdecode(path) for path in (image_path, map_path, points_path)]
        image, (height, width) = _read_picture(paths[0], size, "L" if channels == 1 else "RGB")
        density = _read_map(paths[1], size)
        return image, _counts(read_points(paths[2], height, width), size), density

    def example(paths):
        types = (tf.uint8, tf.int32, tf.float32)
        image, fixations, density = tf.numpy_function(read, [paths[0], paths[1], paths[2]], types, stateful=False)
        return {
            "image": tf.ensure_shape(image, (*size, channels)),
            "label": tf.constant(-1, tf.int64),
            "fixations": tf.ensure_shape(fixations, size),
            "saliency": tf.ensure_shape(density, size),
        }

    def normalize(batch):
        return batch | {"image": tf.cast(batch["image"], tf.float32) * scale + offset}

    options = tf.data.Options()
    options.deterministic = True
    return (
        tf.data.Dataset.from_tensor_slices(tf.constant(files))
        .map(example, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(batch_size)
        .map(normalize)
        .prefetch(tf.data.AUTOTUNE)
        .with_options(options)
    )


def _files(folder, layout, split) -> list[list[str]]:
    """The files of each image: picture, map, fixations."""
    known = LAYOUTS[layout]
    if known.splits:
        check_choice("split", split, known.splits)
    elif split is not None:
        raise ValueError(f"{layout} has no splits. Received: split={split!r}")
    part = known.splits.get(split, "")
    if not folder.is_dir():
        raise DatasetUnavailableError(f"The folder does not exist. Received: folder={os.fspath(folder)!r}")
    images, maps, fixations = (folder / name.format(part) for name in (known.images, known.maps, known.fixations))
    pictures = sorted(path for path in images.glob("*") if path.suffix.lower() in known.image_ends)
    if not pictures:
        raise DatasetUnavailableError(
            f"There are no images ({', '.join(known.image_ends)}) in {images}, where the layout {layout} has them. "
            f"Received: folder={os.fspath(folder)!r}"
        )
    there = {path for beside in {maps, fixations} for path in beside.glob("*")}
    files = []
    for picture in pictures:
        beside = [maps / (picture.stem + known.map_end), fixations / (picture.stem + known.fixations_end)]
        for path in beside:
            if path not in there:
                raise DatasetUnavailableError(
                    f"The image {picture} has no {path.relative_to(folder)}: provide it, or remove the image. "
                    f"Received: folder={os.fspath(folder)!r}"
                )
        files.append([os.fspath(path) for path in (picture, *beside)])
    return files


def _open(path: str, mode: str) -> Image.Image:
    """A decoded picture.

    Raises:
        ValueError: it is damaged; the message names the file.
    """
    try:
        with Image.open(io.BytesIO(Path(path).read_bytes())) as picture:
            return picture.convert(mode)
    except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError) as error:
        raise ValueError(f"The picture cannot be read: {error}. Received: file={path!r}") from error


def _read_picture(path, size, mode):
    """uint8 (*size, C), and the height and width that it had."""
    picture = _open(path, mode)
    resized = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR))
    return resized.reshape(*size, -1), picture.size[::-1]


def _read_map(path, size):
    """float32 `size`, a density."""
    # In floating point: 8 bits would round away the tails of a map that shrinks.
    values = Image.fromarray(np.asarray(_open(path, "L"), np.float32))
    values = np.asarray(values.resize(size[::-1], Image.Resampling.BILINEAR), np.float64)
    total = values.sum()
    return (values / total if total > 0 else values).astype(np.float32)


def _read_mat(path, height, width):
    """Rows and columns of fixations as shares of the image, (n, 2), out of a file of SALICON."""
    import scipy.io

    try:
        observers = np.ravel(scipy.io.loadmat(path)["gaze"])
        each = [np.reshape(observer["fixations"], (-1, 2)) for observer in observers]
    except Exception as error:  # scipy has a type of its own for each kind of damage.
        raise ValueError(
            f"The fixations cannot be read ({type(error).__name__}: {error}); gaze(i).fixations must be x and y. "
            f"Received: file={path!r}"
        ) from error
    points = np.concatenate([np.zeros((0, 2)), *each]).astype(np.float64)
    # The centre of the first pixel is 1 in MATLAB: its left edge is 0.5.
    return (points[:, ::-1] - 0.5) / (height, width)


def _read_white(path, height, width):
    """Rows and columns of the white pixels of a picture as shares of it, (n, 2)."""
    values = np.asarray(_open(path, "L"))
    return (np.argwhere(values >= _FIXATED) + 0.5) / values.shape


def _counts(shares, size):
    """int32 `size`: how many points lie in each pixel."""
    inside = shares[((shares >= 0) & (shares < 1)).all(axis=1)]
    rows, columns = np.floor(inside * size).astype(np.int64).T
    counts = np.bincount(rows * size[1] + columns, minlength=size[0] * size[1])
    return counts.reshape(size).astype(np.int32)


LAYOUTS = {
    "salicon": _Layout(
        splits={"train": "train", "validation": "val"},
        images="images/{}",
        image_ends=(".jpg",),
        maps="maps/{}",
        map_end=".png",
        fixations="fixations/{}",
        fixations_end=".mat",
        read_points=_read_mat,
    ),
    "mit1003": _Layout(
        splits={},
        images="ALLSTIMULI",
        image_ends=(".jpeg",),
        maps="ALLFIXATIONMAPS",
        map_end="_fixMap.jpg",
        fixations="ALLFIXATIONMAPS",
        fixations_end="_fixPts.jpg",
        read_points=_read_white,
    ),
}
