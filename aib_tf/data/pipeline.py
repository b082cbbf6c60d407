"""From a data set on disk to batches of images, with tf.data.

    decode -> resize -> hold in memory -> order -> batch -> crop and flip -> normalise -> prefetch

Images stay uint8 up to the last step: a quarter of the memory traffic of float32. A split that
fits `MEMORY_LIMIT` is decoded once into one array an attribute; an epoch is then a permutation of
its indices, a batch one gather, and skipping batches costs nothing. A larger split is read from
disk in every epoch, through a shuffle buffer. `aib_tf.data.geometry` has resizing and augmentation.

Every random number is a pure function of a seed, the epoch and the index of the batch (stateless
random operations), so that a run can be resumed at any batch. Order is deterministic always.

For several devices or machines each process makes a pipeline of its own that delivers its shares
of every batch (`Shards`): together they are, image by image, what a single process would deliver.
"""

import contextlib
import dataclasses
import os
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from aib_tf.data import datasets, geometry, reader
from aib_tf.data.geometry import RANDOM_ALGORITHM
from aib_tf.validation import check_count

# Bytes of decoded examples that a split may take in memory. CIFAR-10 takes 0.15 of its 1 GiB, the training split of
# caltech_birds2011 0.99.
MEMORY_LIMIT = 2**30

_DEFAULT_FIELDS = ("image", "label")

# Batches of an epoch fold 0, 1, ... into its seed; the order of the epoch folds in this.
_ORDER = -1

# Of a map over several examples or batches at a time.
_IN_ORDER = {"num_parallel_calls": tf.data.AUTOTUNE, "deterministic": True}


@dataclasses.dataclass(frozen=True)
class Shards:
    """Which shares of each batch a process delivers.

    A batch of n images is cut, in its order, into `total` shares, of n // total images or one more. A last batch of
    fewer images than shares joins the one before, so that no share is empty and no image is left out.

    Args:
        total: shares of a batch, one for each device of all processes.
        first: the first share of this process, counted from 0.
        count: shares of this process, one for each of its devices. The pipeline delivers them one after the other.

    Raises:
        ValueError: for shares that are not there.
    """

    total: int = 1
    first: int = 0
    count: int = 1

    def __post_init__(self):
        check_count("total", self.total)
        check_count("count", self.count, maximum=self.total)
        check_count("first", self.first, minimum=0, maximum=self.total - self.count)

    def check_batch_size(self, batch_size: int) -> None:
        """Raises ValueError unless a whole batch has shares of the same size."""
        if batch_size % self.total:
            lower, upper = batch_size - batch_size % self.total, batch_size + -batch_size % self.total
            near = " or ".join(str(size) for size in (lower, upper) if size)
            raise ValueError(
                f"A batch is shared by {self.total} devices, so its size must be a multiple of {self.total}, such as "
                f"{near}. Received: batch_size={batch_size}"
            )


_ALONE = Shards()


def load(
    name: str,
    split: str,
    batch_size: int,
    data_dir: str | os.PathLike | None = None,
    *,
    shuffle: bool = False,
    augment: bool = False,
    seed: int = 0,
    fields: Sequence[str] = _DEFAULT_FIELDS,
    normalize: bool = True,
    drop_remainder: bool = False,
    shards: Shards = _ALONE,
    memory_limit: int = MEMORY_LIMIT,
    bad_examples: str = "error",
) -> tf.data.Dataset:
    """One epoch of a split, of known length, for `model.fit(load(...), epochs=6)`.

    Each iteration over the result shuffles and augments differently. The sequence of iterations is
    reproducible: a function of `seed` and, where one is set, of TensorFlow's global seed. (The
    stream of `training_batches` does not depend on the global seed.)

    The examples are decoded when `load` is called: keep the result rather than calling it again.

    Args:
        name: a data set of `aib_tf.data.DATASETS`, with a configuration behind a slash if it is
            generated; or a folder of pictures in `data_dir`, such as `"image_folder/pets"` (`aib_tf.data.get`).
        split: `"train"`, `"validation"`, `"test"`, or a sum such as `"train+validation"`.
        batch_size: images a batch, at least 1.
        data_dir: folder of prepared TFDS data sets. None: that of TFDS, `$TFDS_DATA_DIR` or
            `~/tensorflow_datasets`. A generated set is generated there on first use.
        shuffle: whether each iteration has another order; else the order of the files.
        augment: whether to crop and flip at random, as far as the table allows for this set; one
            with `crop_to_box` is cut to the boxes of its objects first. Otherwise images are whole,
            or the centre of the whole image after `resize`.
        seed: integer in [0, 2**63).
        fields: what to deliver, out of `DatasetInfo.fields`:
            image, (B, H, W, C), float32 (normalised) or uint8;
            label, (B,) int64;
            bbox, (B, 4) float32 in [0, 1], top, left, bottom, right in shares of the delivered
                image: what is seen of the object there, without area where that is nothing;
            mask, (B, H, W, 1) uint8, 1 on the object; what is done to the image is done to it;
            id, (B,), int64 or string, where the example comes from.
        normalize: whether images are float32 of mean 0 and standard deviation 1 over the training
            images, or uint8.
        drop_remainder: whether to drop a last batch of fewer than `batch_size` images. By default
            it is kept, in training too.
        shards: which shares of each batch to deliver; by default whole batches.
        memory_limit: bytes; a split that is larger when decoded is read from disk every time.
        bad_examples: what to do about an example that cannot be decoded, or has another label, size or number of
            channels than the data set: `"error"`, or `"skip"` to leave it out, counted in a warning. To know the
            length of an epoch, skipping decodes the whole split once in a process before anything is delivered; what
            is left out depends on the files alone.

    Returns:
        A data set of tuples (image, label) for the default fields, of dicts for any other.

    Raises:
        ValueError: for an unknown data set, split or field, or an impossible value.
        BadExampleError: for a bad example. That of a split that is larger than `memory_limit` is met on the way, and
            is an error of TensorFlow's; `check_examples` names it.
        DatasetUnavailableError: if the data is not there and cannot be fetched, or is damaged.

    Example:
        >>> train = load("cluttered_digits", "train", 64, shuffle=True, augment=True)
        >>> test = load("cluttered_digits", "test", 64)
        >>> model.fit(train, validation_data=test, epochs=6, shuffle=False)

    `shuffle=False` tells Keras that it need not warn: shuffling a `tf.data.Dataset` is never its
    task.
    """
    info = datasets.get(name, data_dir)
    fields = _check_fields(info, fields)
    check_count("batch_size", batch_size)
    shards.check_batch_size(batch_size)
    _check_seed(seed)
    source = _source(info, split, fields, augment, data_dir, memory_limit, bad_examples)
    batches = _Batches(source.examples, batch_size, drop_remainder, shards)
    epochs = tf.data.Dataset.from_tensors(tf.zeros((), tf.int64))
    if shuffle or augment:
        # One random number an iteration, and another one in the next.
        epochs = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True).take(1)
    return _pipeline(
        source,
        info,
        fields,
        epochs.map(lambda epoch: (epoch, tf.zeros((), tf.int64))),
        batches,
        batches.count * shards.count,
        shuffle=shuffle,
        augment=augment,
        seed=seed,
        normalize=normalize,
    )


def training_batches(
    name: str,
    split: str,
    batch_size: int,
    *,
    first_epoch: int = 0,
    epochs: int | None,
    skip_batches: int = 0,
    seed: int,
    augment: bool = True,
    data_dir: str | os.PathLike | None = None,
    fields: Sequence[str] = _DEFAULT_FIELDS,
    drop_remainder: bool = False,
    shards: Shards = _ALONE,
    memory_limit: int = MEMORY_LIMIT,
    bad_examples: str = "error",
) -> tf.data.Dataset:
    """All batches of the epochs `first_epoch` to `epochs - 1`, shuffled, in one data set.

    The order of epoch e is a pure function of (seed, e), the augmentation of its batch k one of
    (seed, e, k). So a run that is resumed at batch k of epoch e, with `first_epoch=e,
    skip_batches=k`, sees bit for bit what it would have seen without the interruption.

    Args:
        name: as in `load`.
        split: as in `load`.
        batch_size: as in `load`.
        first_epoch: epoch to begin with, from 0 to `epochs`.
        epochs: the number of epochs of the whole run, counted from epoch 0; None for no end.
        skip_batches: batches of the first epoch to leave out, from 0 to all.
        seed: integer in [0, 2**63).
        augment: as in `load`.
        data_dir: as in `load`.
        fields: as in `load`.
        drop_remainder: as in `load`.
        shards: as in `load`.
        memory_limit: as in `load`.
        bad_examples: as in `load`.

    Returns:
        A data set of known or infinite length of tuples: images, float32 (B, H, W, C), normalised, and labels,
        int64 (B,); of dicts for any other fields. The last batch of each epoch is smaller where the split does not
        divide evenly.

    Raises:
        ValueError: for an unknown data set or split, or an impossible value.
        BadExampleError: as in `load`.
        DatasetUnavailableError: if the data is not there and cannot be fetched, or is damaged.
    """
    info = datasets.get(name, data_dir)
    fields = _check_fields(info, fields)
    check_count("batch_size", batch_size)
    shards.check_batch_size(batch_size)
    if epochs is not None:
        check_count("epochs", epochs, minimum=0)
    check_count("first_epoch", first_epoch, minimum=0, maximum=epochs)
    _check_seed(seed)
    source = _source(info, split, fields, augment, data_dir, memory_limit, bad_examples)
    batches = _Batches(source.examples, batch_size, drop_remainder, shards)
    check_count("skip_batches", skip_batches, minimum=0, maximum=batches.count)
    length = tf.data.INFINITE_CARDINALITY
    if epochs is not None:
        length = max(0, (epochs - first_epoch) * batches.count - skip_batches) * shards.count

    def with_skip(epoch):
        # Only the first epoch of this stream begins in its middle.
        skip = tf.constant(skip_batches, tf.int64)
        return epoch, tf.where(epoch == first_epoch, skip, tf.zeros_like(skip))

    return _pipeline(
        source,
        info,
        fields,
        tf.data.Dataset.range(first_epoch, tf.int64.max if epochs is None else epochs).map(with_skip),
        batches,
        length,
        shuffle=True,
        augment=augment,
        seed=seed,
        normalize=True,
    )


def num_examples(
    name: str, split: str, data_dir: str | os.PathLike | None = None, *, bad_examples: str = "error"
) -> int:
    """The number of examples of a split; arguments and errors as in `load`."""
    return _open(name, split, data_dir, bad_examples).examples


def batches_per_epoch(
    name: str,
    split: str,
    batch_size: int,
    data_dir: str | os.PathLike | None = None,
    *,
    drop_remainder: bool = False,
    shards: Shards = _ALONE,
    bad_examples: str = "error",
) -> int:
    """The number of batches of an epoch; arguments and errors as in `load`."""
    check_count("batch_size", batch_size)
    shards.check_batch_size(batch_size)
    examples = num_examples(name, split, data_dir, bad_examples=bad_examples)
    return _Batches(examples, batch_size, drop_remainder, shards).count


def label_counts(
    name: str, split: str, data_dir: str | os.PathLike | None = None, *, bad_examples: str = "error"
) -> np.ndarray:
    """How many examples of each class a split has, without decoding images.

    Args and errors as in `load`.

    Returns:
        int64 (classes,).
    """
    labels = _open(name, split, data_dir, bad_examples).read()["label"]
    return np.bincount(labels, minlength=datasets.get(name, data_dir).classes)


def check_examples(name: str, split: str, data_dir: str | os.PathLike | None = None) -> None:
    """Decodes every example of a split once, to find those that training would stop at.

    Args as in `load`.

    Raises:
        ValueError: for an unknown data set or split.
        BadExampleError: if an example cannot be decoded, or has another label, size or number of channels than the
            data set. The message names the first, `examples` has all.
        DatasetUnavailableError: if the data is not there and cannot be fetched, or is damaged.
    """
    _open(name, split, data_dir).check()


@contextlib.contextmanager
def naming_bad_examples(
    name: str, *splits: str, data_dir: str | os.PathLike | None = None, bad_examples: str = "error"
):
    """Around the reading of splits that do not fit into memory: an error there names the example it is about.

    Args:
        name: as in `load`.
        *splits: those that are read.
        data_dir: as in `load`.
        bad_examples: as in `load`. With `"skip"` the error is about something else, and stays what it is.

    Raises:
        BadExampleError: in the place of TensorFlow's error, if `check_examples` finds a bad example.
        DatasetUnavailableError: the same, if it finds damaged files.
    """
    try:
        yield
    except reader.READING_ERRORS:
        if bad_examples == "error":
            for split in splits:
                check_examples(name, split, data_dir)
        raise


def normalize_images(images, info: datasets.DatasetInfo):
    """Brings images to mean 0 and standard deviation 1 over the training images of a data set.

    Args:
        images: uint8, or float in [0, 255], (..., C); a NumPy array or a TensorFlow tensor.
        info: entry of the data set.

    Returns:
        (images / 255 - mean) / stddev, float32, of the same kind and shape.
    """
    scale, offset = scale_and_offset(info.mean, info.stddev)
    if tf.is_tensor(images):
        return tf.cast(images, tf.float32) * scale + offset
    return np.asarray(images, np.float32) * scale + offset


def denormalize_images(images, info: datasets.DatasetInfo):
    """The inverse of `normalize_images`, for pictures.

    Args:
        images: float (..., C); a NumPy array or a TensorFlow tensor.
        info: entry of the data set.

    Returns:
        uint8 of the same kind and shape, rounded, and clipped to 0 and 255.
    """
    scale, offset = scale_and_offset(info.mean, info.stddev)
    if tf.is_tensor(images):
        pixels = (tf.cast(images, tf.float32) - offset) / scale
        return tf.cast(tf.clip_by_value(tf.round(pixels), 0.0, 255.0), tf.uint8)
    pixels = (np.asarray(images, np.float32) - offset) / scale
    return np.clip(np.rint(pixels), 0.0, 255.0).astype(np.uint8)


def scale_and_offset(mean, stddev) -> tuple[np.ndarray, np.ndarray]:
    """What normalises, by statistics of pixels in 0..1.

    Args:
        mean: (C,), or a number.
        stddev: (C,), or a number.

    Returns:
        scale and offset, float32 of the same shape: normalised = pixels in 0..255 * scale + offset.
    """
    mean, stddev = np.asarray(mean), np.asarray(stddev)
    return (1.0 / (255.0 * stddev)).astype(np.float32), (-mean / stddev).astype(np.float32)


def _pipeline(
    source,
    info,
    fields,
    epochs,
    batches,
    length,
    *,
    shuffle,
    augment,
    seed,
    normalize,
):
    """The `length` shares of batches of the given epochs.

    `epochs` is a data set of pairs, both int64: the number that stands for the epoch, and how many
    of its `batches` to skip. The rest is as in `load`.
    """
    run_seed = tf.constant([seed, 0], tf.int64)

    def one_epoch(epoch, skip):
        epoch_seed = tf.random.fold_in(run_seed, epoch, alg=RANDOM_ALGORITHM)
        order_seed = tf.random.fold_in(epoch_seed, tf.constant(_ORDER, tf.int64), alg=RANDOM_ALGORITHM)
        shares = source.epoch(order_seed if shuffle else None, skip, batches)
        return shares.map(
            lambda share, examples: (
                tf.random.fold_in(epoch_seed, batches.number(share), alg=RANDOM_ALGORITHM),
                share,
                examples,
            )
        )

    def finish(batch_seed, share, batch):
        batch = source.examples_of(batch)
        if augment:
            window = {"padding": info.crop_padding, "flip": info.horizontal_flip, "size": info.image_shape[:2]}
            window["part"] = batches.part(share)
            for field in ("image", "mask"):
                if field in fields:
                    batch[field] = geometry.random_crop_and_flip(batch[field], batch_seed, **window)
            if "bbox" in fields:
                image_size = geometry.prepared_shape(info, augment)[:2]
                batch["bbox"] = geometry.random_crop_and_flip_boxes(
                    batch["bbox"], batch_seed, image_size=image_size, **window
                )
        if "image" in fields and normalize:
            batch["image"] = normalize_images(batch["image"], info)
        if fields == _DEFAULT_FIELDS:
            return batch["image"], batch["label"]
        return {field: batch[field] for field in fields}

    delivered = epochs.flat_map(one_epoch)
    delivered = delivered.map(finish, **_IN_ORDER)
    delivered = delivered.apply(tf.data.experimental.assert_cardinality(length))
    options = tf.data.Options()
    options.deterministic = True
    return delivered.with_options(options).prefetch(tf.data.AUTOTUNE)


class _Batches:
    """How the examples of an epoch, in its order, make batches, and which of them this process delivers.

    The shares of this process are numbered through an epoch: batch 0's, then batch 1's, and so on.

    Attributes:
        size: examples of a batch, but for the last.
        count: batches of an epoch.
        alone: whether this process delivers everything.
        whole: whether all shares have the same number of examples, `share_size`.
    """

    def __init__(self, examples, batch_size, drop_remainder, shards):
        if examples < shards.total:
            raise ValueError(
                f"{shards.total} devices need as many images, and the split has {examples}. Use fewer devices. "
                f"Received: shards={shards}"
            )
        self.size = batch_size
        self.alone = shards.total == 1
        self._shards = shards
        self.count, rest = divmod(examples, batch_size)
        if not drop_remainder and rest >= shards.total:
            self.count += 1
        self._end = self.count * batch_size if drop_remainder else examples
        self.whole = self._end == self.count * batch_size
        self.share_size = batch_size // shards.total

    def shares(self, skip):
        """Data set of the numbers of this process's shares, int64, behind the first `skip` batches."""
        return tf.data.Dataset.range(skip * self._shards.count, self.count * self._shards.count)

    def number(self, share):
        """The batch that a share belongs to."""
        return share // self._shards.count

    def bounds(self, share):
        """Positions in the epoch: of the first example of a share, and behind its last."""
        begin, size = self._batch(share)
        part = self._shards.first + share % self._shards.count
        return begin + part * size // self._shards.total, begin + (part + 1) * size // self._shards.total

    def part(self, share):
        """Where in its batch a share begins, and how many examples the batch has; None for whole batches."""
        if self.alone:
            return None
        begin, size = self._batch(share)
        return self.bounds(share)[0] - begin, size

    def share_at(self, position):
        """The share with the example at a position of the epoch, or -1 if it is another process's."""
        number = tf.minimum(position // self.size, self.count - 1)
        begin, size = self._batch(number * self._shards.count)
        # The inverse of `bounds`: the last part that does not begin behind the position.
        part = ((position - begin + 1) * self._shards.total - 1) // size
        own = part - self._shards.first
        mine = (own >= 0) & (own < self._shards.count) & (position < self._end)
        return tf.where(mine, number * self._shards.count + own, -tf.ones_like(position))

    def first_position(self, skip):
        """Position of the first example behind the first `skip` batches."""
        return tf.minimum(skip * self.size, self._end)

    def _batch(self, share):
        """Where the batch of a share begins, and how many examples it has."""
        number = self.number(share)
        begin = number * self.size
        # The last batch takes what is left, be that less or more than the others have.
        size = tf.where(number == self.count - 1, self._end - begin, tf.cast(self.size, begin.dtype))
        return begin, size


class _MemorySource:
    """A split as arrays in memory; a batch travels as the indices of its examples."""

    def __init__(self, split):
        self.examples = split.examples
        # On a machine with an accelerator too: a pipeline runs on the host.
        with tf.device("CPU:0"):
            self._arrays = {field: tf.constant(array) for field, array in split.read().items()}

    def epoch(self, order_seed, skip, batches):
        """Data set of (number of a share, indices of its examples) behind the first `skip` batches."""
        count = self.examples
        order = tf.range(count)
        if order_seed is not None:
            keys = tf.random.stateless_uniform(
                (count,),
                order_seed,
                minval=None,
                maxval=None,
                dtype=tf.int64,
                alg=RANDOM_ALGORITHM,
            )
            order = tf.argsort(keys, stable=True)

        def examples(share):
            begin, end = batches.bounds(share)
            indices = order[begin:end]
            if batches.whole:
                indices.set_shape((batches.share_size,))
            return share, indices

        return batches.shares(skip).map(examples)

    def examples_of(self, batch):
        return {field: tf.gather(array, batch) for field, array in self._arrays.items()}


class _StreamedSource:
    """A split on disk; examples are shuffled and skipped while encoded, then decoded."""

    def __init__(self, split):
        self.examples = split.examples
        self._shuffle_buffer = split.shuffle_buffer
        self._encoded, self._decode = split.encoded()

    def epoch(self, order_seed, skip, batches):
        """Data set of (number of a share, dict of its examples) behind the first `skip` batches."""
        encoded = self._encoded
        if order_seed is not None:
            # `shuffle` mixes the global seed of the caller into its own, and cannot take a tensor beside a
            # global seed of 0. This graph is the function of one epoch.
            tf.compat.v1.get_default_graph().seed = None
            # The seed already is another one in every epoch.
            encoded = encoded.shuffle(
                self._shuffle_buffer,
                seed=order_seed[0],
                reshuffle_each_iteration=False,
            )

        encoded = encoded.enumerate().skip(batches.first_position(skip))
        if batches.alone:
            return (
                encoded.map(lambda _, example: self._decode(example), **_IN_ORDER)
                .batch(batches.size, drop_remainder=batches.whole)
                .enumerate(start=skip)
            )

        def size(share):
            begin, end = batches.bounds(share)
            return end - begin

        # What belongs to other processes is dropped before it is decoded.
        return (
            encoded.map(lambda position, example: (batches.share_at(position), example))
            .filter(lambda share, example: share >= 0)
            .map(lambda share, example: (share, self._decode(example)), **_IN_ORDER)
            .group_by_window(
                lambda share, example: share,
                lambda share, window: window.batch(size(share)),
                window_size_func=size,
            )
            .map(lambda shares, examples: (shares[0], examples))
        )

    def examples_of(self, batch):
        return dict(batch)


def _source(info, split, fields, augment, data_dir, memory_limit, bad_examples):
    """The examples of a split, in memory if they fit."""
    check_count("memory_limit", memory_limit, minimum=0)
    opened = reader.open_split(info, split, data_dir, fields, augment, bad_examples)
    fits = opened.decoded_bytes() <= memory_limit
    return _MemorySource(opened) if fits else _StreamedSource(opened)


def _open(name, split, data_dir, bad_examples="error"):
    return reader.open_split(datasets.get(name, data_dir), split, data_dir, bad_examples=bad_examples)


def _check_fields(info, fields) -> tuple[str, ...]:
    names = (fields,) if isinstance(fields, str) else tuple(fields)
    known = ", ".join(info.fields)
    if not names or not set(names) <= set(info.fields) or len(set(names)) < len(names):
        raise ValueError(f"The fields of {info.name} are {known}; each at most once. Received: fields={fields!r}")
    return names


def _check_seed(seed):
    check_count("seed", seed, minimum=0, maximum=2**63 - 1)
