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
import importlib
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from aib_tf.data import datasets, geometry
from aib_tf.data.geometry import RANDOM_ALGORITHM
from aib_tf.validation import check_count

# Bytes of decoded examples that a split may take in memory. CIFAR-10 takes 0.15 of its 1 GiB, the training split of
# caltech_birds2011 0.99.
MEMORY_LIMIT = 2**30

# Encoded examples to shuffle among when a split does not fit into memory.
SHUFFLE_BUFFER = 10_000

_DEFAULT_FIELDS = ("image", "label")

# Batches of an epoch fold 0, 1, ... into its seed; the order of the epoch folds in this.
_ORDER = -1

# Of a map over several examples or batches at a time.
_IN_ORDER = {"num_parallel_calls": tf.data.AUTOTUNE, "deterministic": True}

# Bytes of examples to decode at once, at most, on the way into memory.
_CHUNK_BYTES = 2**25

# Seconds to wait for an answer before a download. TFDS would try for minutes without a network.
_NETWORK_TIMEOUT = 10.0


class DatasetUnavailableError(FileNotFoundError):
    """A data set is not where it was looked for, and could not be fetched."""


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
) -> tf.data.Dataset:
    """One epoch of a split, of known length, for `model.fit(load(...), epochs=6)`.

    Each iteration over the result shuffles and augments differently. The sequence of iterations is
    reproducible: a function of `seed` and, where one is set, of TensorFlow's global seed. (The
    stream of `training_batches` does not depend on the global seed.)

    The examples are decoded when `load` is called: keep the result rather than calling it again.

    Args:
        name: a data set of `aib_tf.data.DATASETS`, with a configuration behind a slash if it is
            generated.
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
            mask, (B, H, W, 1) uint8, 1 on the object; augmentation moves it with the image;
            id, (B,), int64 or string, where the example comes from.
        normalize: whether images are float32 of mean 0 and standard deviation 1 over the training
            images, or uint8.
        drop_remainder: whether to drop a last batch of fewer than `batch_size` images. By default
            it is kept, in training too.
        shards: which shares of each batch to deliver; by default whole batches.
        memory_limit: bytes; a split that is larger when decoded is read from disk every time.

    Returns:
        A data set of tuples (image, label) for the default fields, of dicts for any other.

    Raises:
        ValueError: for an unknown data set, split or field, or an impossible value.
        DatasetUnavailableError: if the data is not there and cannot be fetched.

    Example:
        >>> train = load("cluttered_digits", "train", 64, shuffle=True, augment=True)
        >>> test = load("cluttered_digits", "test", 64)
        >>> model.fit(train, validation_data=test, epochs=6, shuffle=False)

    `shuffle=False` tells Keras that it need not warn: shuffling a `tf.data.Dataset` is never its
    task.
    """
    info = datasets.get(name)
    fields = _check_fields(info, fields, augment)
    check_count("batch_size", batch_size)
    shards.check_batch_size(batch_size)
    _check_seed(seed)
    source = _source(info, split, fields, augment, data_dir, memory_limit)
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

    Returns:
        A data set of known or infinite length of tuples: images, float32 (B, H, W, C), normalised, and labels,
        int64 (B,); of dicts for any other fields. The last batch of each epoch is smaller where the split does not
        divide evenly.

    Raises:
        ValueError: for an unknown data set or split, or an impossible value.
        DatasetUnavailableError: if the data is not there and cannot be fetched.
    """
    info = datasets.get(name)
    fields = _check_fields(info, fields, augment)
    check_count("batch_size", batch_size)
    shards.check_batch_size(batch_size)
    if epochs is not None:
        check_count("epochs", epochs, minimum=0)
    check_count("first_epoch", first_epoch, minimum=0, maximum=epochs)
    _check_seed(seed)
    source = _source(info, split, fields, augment, data_dir, memory_limit)
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


def num_examples(name: str, split: str, data_dir: str | os.PathLike | None = None) -> int:
    """The number of examples of a split; arguments and errors as in `load`."""
    info = datasets.get(name)
    return _reader(info, split, ("label",), data_dir).examples


def batches_per_epoch(
    name: str,
    split: str,
    batch_size: int,
    data_dir: str | os.PathLike | None = None,
    *,
    drop_remainder: bool = False,
    shards: Shards = _ALONE,
) -> int:
    """The number of batches of an epoch; arguments and errors as in `load`."""
    check_count("batch_size", batch_size)
    shards.check_batch_size(batch_size)
    return _Batches(num_examples(name, split, data_dir), batch_size, drop_remainder, shards).count


def label_counts(name: str, split: str, data_dir: str | os.PathLike | None = None) -> np.ndarray:
    """How many examples of each class a split has, without decoding images.

    Args and errors as in `load`.

    Returns:
        int64 (classes,).
    """
    info = datasets.get(name)
    labels = _reader(info, split, ("label",), data_dir).read()["label"]
    return np.bincount(labels, minlength=info.classes)


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

    def __init__(self, reader):
        self.examples = reader.examples
        # On a machine with an accelerator too: a pipeline runs on the host.
        with tf.device("CPU:0"):
            self._arrays = {field: tf.constant(array) for field, array in reader.read().items()}

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

    def __init__(self, reader):
        self.examples = reader.examples
        self._encoded, self._decode = reader.encoded()

    def epoch(self, order_seed, skip, batches):
        """Data set of (number of a share, dict of its examples) behind the first `skip` batches."""
        encoded = self._encoded
        if order_seed is not None:
            # `shuffle` mixes the global seed of the caller into its own, and cannot take a tensor beside a
            # global seed of 0. This graph is the function of one epoch.
            tf.compat.v1.get_default_graph().seed = None
            # The seed already is another one in every epoch.
            encoded = encoded.shuffle(
                SHUFFLE_BUFFER,
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


class _Reader:
    """A split on disk."""

    def __init__(self, info, builder, instruction, fields, augment):
        self._info = info
        self._builder = builder
        self._instruction = instruction
        self._fields = fields
        self._augment = augment
        self.examples = builder.info.splits[instruction].num_examples
        # A crop to the box needs the box, and where it puts it depends on the size of the image.
        both = {"image", "bbox"}
        crops = augment and info.crop_to_box and not both.isdisjoint(fields)
        self._sources = {*fields, *both} if crops else {*fields}

    def decoded_bytes(self) -> int:
        """Memory that the decoded examples take."""
        return self.examples * self._example_bytes()

    def read(self) -> dict[str, np.ndarray]:
        """Decodes the whole split into arrays (examples, ...)."""
        arrays = {}
        count = 0
        with self._explained():
            examples = self._examples(decoded=self._sources).map(self._prepare, num_parallel_calls=tf.data.AUTOTUNE)
            chunk_size = min(1_000, max(1, _CHUNK_BYTES // self._example_bytes()))
            for chunk in examples.batch(chunk_size).prefetch(1).as_numpy_iterator():
                stop = count + len(chunk[self._fields[0]])
                if not arrays:
                    arrays = {
                        field: np.empty((self.examples, *values.shape[1:]), values.dtype)
                        for field, values in chunk.items()
                    }
                for field, values in chunk.items():
                    arrays[field][count:stop] = values
                count = stop
        return arrays

    def encoded(self):
        """A data set of examples with encoded images, and the function that decodes one."""
        features = self._builder.info.features
        images = self._images()

        def decode(example):
            return self._prepare(
                {
                    field: features[field].decode_example(value) if field in images else value
                    for field, value in example.items()
                }
            )

        with self._explained():
            return self._examples(decoded=()), decode

    def _example_bytes(self) -> int:
        features = self._builder.info.features
        shapes = {field: features[field].shape for field in self._fields}
        if "image" in shapes:
            shapes["image"] = geometry.prepared_shape(self._info, self._augment)
        return sum(int(np.prod(shapes[field])) * np.dtype(features[field].np_dtype).itemsize for field in shapes)

    def _prepare(self, example):
        prepared = geometry.prepare(example, self._info, self._augment)
        return {field: prepared[field] for field in self._fields}

    def _images(self) -> set[str]:
        import tensorflow_datasets as tfds

        features = self._builder.info.features
        return {field for field in features if isinstance(features[field], tfds.features.Image)}

    def _examples(self, decoded):
        """The examples with the fields that are needed, in the order of the files."""
        import tensorflow_datasets as tfds

        examples = self._builder.as_dataset(
            split=self._instruction,
            decoders={field: tfds.decode.SkipDecoding() for field in self._images() - {*decoded}},
            # What stays in memory is decided here, by `memory_limit`.
            read_config=tfds.ReadConfig(try_autocache=False),
        )
        return examples.map(lambda example: {field: example[field] for field in self._sources})

    @contextlib.contextmanager
    def _explained(self):
        try:
            yield
        except (tf.errors.NotFoundError, tf.errors.DataLossError, AssertionError) as error:
            raise _damaged(self._info, self._builder, error) from error


def _source(info, split, fields, augment, data_dir, memory_limit):
    """The examples of a split, in memory if they fit."""
    check_count("memory_limit", memory_limit, minimum=0)
    reader = _reader(info, split, fields, data_dir, augment)
    fits = reader.decoded_bytes() <= memory_limit
    return _MemorySource(reader) if fits else _StreamedSource(reader)


def _reader(info, split, fields, data_dir, augment=False):
    instruction = _instruction(info, split)  # Before data is fetched for a split there is not.
    return _Reader(info, _builder(info, data_dir), instruction, fields, augment)


def _instruction(info: datasets.DatasetInfo, split: str) -> str:
    """`"train+validation"` -> the TFDS instruction for it."""
    parts = [part.strip() for part in str(split).split("+")]
    if not set(parts) <= set(info.splits) or len(set(parts)) < len(parts):
        known = ", ".join(info.splits)
        raise ValueError(
            f"The splits of {info.name} are {known}, and sums of different ones such as "
            f"'train+validation'. Received: split={split!r}"
        )
    return "+".join(info.splits[part] for part in parts)


def _check_fields(info, fields, augment) -> tuple[str, ...]:
    names = (fields,) if isinstance(fields, str) else tuple(fields)
    known = ", ".join(info.fields)
    if not names or not set(names) <= set(info.fields) or len(set(names)) < len(names):
        raise ValueError(f"The fields of {info.name} are {known}; each at most once. Received: fields={fields!r}")
    if info.resize is not None and "mask" in names:
        raise ValueError(
            f"Images of {info.name} are resized, and masks are not: leave them out. Received: fields={fields!r}"
        )
    return names


def _check_seed(seed):
    check_count("seed", seed, minimum=0, maximum=2**63 - 1)


def _builder(info: datasets.DatasetInfo, data_dir: str | os.PathLike | None):
    """The TFDS builder of a data set whose files are there; they are fetched if need be.

    Raises:
        ValueError: if a generated set has no such configuration.
        DatasetUnavailableError: if there are no files, and none can be made.
    """
    import tensorflow_datasets as tfds

    if info.module is not None:
        importlib.import_module(info.module)
    if data_dir is not None:
        data_dir = os.path.abspath(os.path.expanduser(os.fspath(data_dir)))
        # Where nothing can be generated, a folder that does not exist is a mistyped one, and no
        # reason to download everything again.
        if not info.generated and not os.path.isdir(data_dir):
            raise _unavailable(info, data_dir, "The folder does not exist.")

    def open_builder():
        if info.generated:
            # As the code says. `tfds.builder` would take files of another version if it met some.
            name, _, configuration = info.builder.partition("/")
            return tfds.builder_cls(name)(data_dir=data_dir, config=configuration or None)
        return tfds.builder(info.builder, data_dir=data_dir)

    try:
        builder = open_builder()
    except (ImportError, ValueError):  # A missing dependency, an impossible configuration.
        raise
    except Exception as error:  # TFDS and protobuf have types of their own for unreadable files.
        folder = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
        reason = f"Its description there cannot be read: {type(error).__name__}: {error}"
        raise _unavailable(info, folder, reason) from error
    if _is_prepared(builder):
        return builder
    if builder.data_path.exists():
        raise _damaged(info, builder, "there is no dataset_info.json")
    try:
        if not info.generated:
            _check_network(builder)
        builder.download_and_prepare()
    except Exception as error:
        # TFDS writes to a folder of its own and renames it. Where another process was faster, the
        # rename fails, and the data is there.
        if not _is_prepared(builder):
            folder = os.fspath(builder.data_dir_root)
            reason = f"{type(error).__name__}: {error}"
            raise _unavailable(info, folder, f"It could not be prepared: {reason}") from error
    return open_builder()  # The first one may have been made before another process was done.


def _is_prepared(builder) -> bool:
    return (builder.data_path / "dataset_info.json").exists()


def _check_network(builder):
    """Raises within seconds what a download would raise after minutes of retries.

    Raises:
        OSError: if the server does not answer.
    """
    for url in builder.url_infos or ():
        if urllib.parse.urlsplit(url).scheme in ("http", "https"):
            with contextlib.suppress(urllib.error.HTTPError):  # any answer shows that there is a network
                urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_NETWORK_TIMEOUT).close()
            return


def _unavailable(info, folder, reason) -> DatasetUnavailableError:
    if info.generated:
        return DatasetUnavailableError(
            f"The data set {info.name} is not in {folder}. {reason}\n"
            "It is made on the spot and needs no network, but a folder that can be written: pass one as data_dir "
            f"(--data_dir=DIR), or set TFDS_DATA_DIR. Received: data_dir={folder!r}"
        )
    return DatasetUnavailableError(
        f"The data set {info.name} is not in {folder}. {reason}\n"
        "To provide it, prepare it on a machine with a network:\n"
        f'    python -c "import tensorflow_datasets as tfds; '
        f"tfds.load('{info.builder}', data_dir='DIR')\"\n"
        f"then copy DIR here and pass it as data_dir (--data_dir=DIR). "
        f"Received: data_dir={folder!r}"
    )


def _damaged(info, builder, reason) -> DatasetUnavailableError:
    return DatasetUnavailableError(
        f"The files of {info.name} in {builder.data_dir} are incomplete or damaged: {reason}. "
        "Remove this folder to have it prepared again, or copy it once more. "
        f"Received: data_dir={os.fspath(builder.data_dir_root)!r}"
    )
