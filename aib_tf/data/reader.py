"""The examples of a split on disk: records that TFDS prepared, or pictures in folders.

What is valid is read without detours: the graph that decodes an example checks its label and the shape of its image,
and stops. Only then is the split gone through to find out which example it was (`BadExampleError`), or beforehand
where bad examples are to be left out.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import logging
import os
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from aib_tf.data import datasets, geometry, image_folder, locations
from aib_tf.data.locations import DatasetUnavailableError
from aib_tf.validation import check_choice

BAD_EXAMPLES = ("error", "skip")

# Encoded examples to shuffle among when a split does not fit into memory.
SHUFFLE_BUFFER = 10_000

# Bytes of examples to decode at once, at most, on the way into memory.
_CHUNK_BYTES = 2**25

# Seconds to wait for an answer before a download. TFDS would try for minutes without a network.
_NETWORK_TIMEOUT = 10.0

# Bad examples that a message names.
_NAMED = 3

_PARALLEL = {"num_parallel_calls": tf.data.AUTOTUNE, "deterministic": True}

# What TensorFlow raises for an example that cannot be used, and for files that are missing, damaged or too short.
READING_ERRORS = (
    tf.errors.InvalidArgumentError,
    tf.errors.NotFoundError,
    tf.errors.DataLossError,
    tf.errors.FailedPreconditionError,
)

_logger = logging.getLogger("aib_tf")

# Of each split that was looked through in this process, by the state of its files: what can be read of them if it is
# not all, and the places of the examples that are left out.
_found_before = {}


class BadExampleError(ValueError):
    """Examples of a data set are not what its entry says: label, size, channels, or they cannot be decoded.

    Attributes:
        examples: a tuple of `BadExample`.
    """

    def __init__(self, message, examples):
        super().__init__(message)
        self.examples = examples


@dataclasses.dataclass(frozen=True)
class BadExample:
    """An example that cannot be used.

    Attributes:
        id: the field id of the data set if it has one, else the file and the place in it, as TFDS writes it:
            `"stl10-train.tfrecord-00000-of-00001__17"`.
        reason: what is wrong, such as "label 12, classes are 0 to 9".
    """

    id: str
    reason: str


class Reader:
    """A split on disk, decoded into what the pipeline holds or delivers.

    Args:
        info: entry of the data set.
        split: its name, for messages.
        storage: a `_Records` or a `_Pictures`.
        fields: what to read.
        augment: whether a random crop follows.
        bad_examples: one of `BAD_EXAMPLES`.

    Attributes:
        examples: how many there are, without those that are left out.
        shuffle_buffer: how many examples to shuffle among that are not decoded.
    """

    def __init__(self, info, split, storage, fields=("label",), augment=False, bad_examples="error"):
        check_choice("bad_examples", bad_examples, BAD_EXAMPLES)
        self._info = info
        self._split = split
        self._storage = storage
        self._fields = fields
        self._augment = augment
        self._skips = bad_examples == "skip"
        self._good = None  # bool (examples,): which to read; None: all
        if self._skips:
            self._leave_out()
        self.examples = self._storage.examples if self._good is None else int(self._good.sum())
        self.shuffle_buffer = self._storage.shuffle_buffer
        # A crop to the box needs the box, and where it puts it depends on the size of the image.
        crops = augment and info.crop_to_box and not {"image", "bbox", "mask"}.isdisjoint(fields)
        self._sources = {*fields, "image", "bbox"} if crops else {*fields}

    def decoded_bytes(self) -> int:
        """Memory that the decoded examples take."""
        return self.examples * self._example_bytes()

    def read(self) -> dict[str, np.ndarray]:
        """Decodes the whole split into arrays (examples, ...).

        Raises:
            BadExampleError: if an example is bad.
            DatasetUnavailableError: if the files are damaged.
        """
        arrays = {}
        count = 0
        with self.explained():
            dataset, decode = self.encoded()
            chunk_size = min(1_000, max(1, _CHUNK_BYTES // self._example_bytes()))
            examples = dataset.map(decode, num_parallel_calls=tf.data.AUTOTUNE)
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
        """A data set of examples that are not decoded, and the function that decodes one."""
        with self.explained():
            dataset = self._storage.dataset(features={self._info.features.get(field, field) for field in self._sources})
        if self._good is not None:
            good = tf.constant(self._good)
            dataset = (
                dataset.enumerate()
                .filter(lambda position, example: tf.gather(good, position))
                .map(lambda position, example: example)
            )
        return dataset, self._decode

    @contextlib.contextmanager
    def explained(self):
        """Turns TensorFlow's errors on reading into those of this module, which name what is damaged or bad."""
        try:
            yield
        except READING_ERRORS as error:
            if not self._skips:
                self.check()
            if isinstance(error, tf.errors.InvalidArgumentError):
                raise
            raise self._storage.damaged(self._info, error) from error
        except AssertionError as error:  # TFDS: fewer files than its description says
            raise self._storage.damaged(self._info, error) from error

    def check(self):
        """Decodes every example, and raises if one is bad.

        Raises:
            BadExampleError: if an example is bad; the message names the first.
            DatasetUnavailableError: if the files are damaged.
        """
        storage, lost = self._storage.readable()
        if lost:
            raise self._storage.damaged(self._info, _listed(lost))
        bad = _bad_examples(self._info, storage)
        if bad:
            raise BadExampleError(
                f"{len(bad)} of {storage.examples:,} examples of {self._info.name}, split {self._split}, cannot be "
                f"used: {_listed(bad.values())}. Mend or remove them, or leave them out with bad_examples=skip "
                "(--bad_examples=skip). Received: bad_examples='error'",
                tuple(bad.values()),
            )

    def _leave_out(self):
        """Looks the split through once in a process, and tells what is left out."""
        state = repr(self._info), self._storage.state()
        key = hashlib.sha256(repr(state).encode(errors="surrogateescape")).digest()
        if key not in _found_before:
            storage, lost = self._storage.readable()
            bad = _bad_examples(self._info, storage)
            left_out = [*lost, *bad.values()]
            if len(bad) == storage.examples:
                raise BadExampleError(
                    f"No example of {self._info.name}, split {self._split}, can be used: {_listed(left_out)}. "
                    "Received: bad_examples='skip'",
                    tuple(left_out),
                )
            if left_out:
                _logger.warning(
                    "%d of %d examples of %s, split %s, are left out: %s.",
                    len(left_out),
                    self._storage.examples,
                    self._info.name,
                    self._split,
                    _listed(left_out),
                )
            _found_before[key] = storage if lost else None, sorted(bad)
        storage, bad = _found_before[key]
        self._storage = storage or self._storage
        if bad:
            self._good = np.ones(self._storage.examples, bool)
            self._good[bad] = False

    def _decode(self, example):
        """One example -> dict of its fields, as prepared for the pipeline."""
        info = self._info
        values = self._storage.load(example)
        decoded = {}
        for field in self._sources:
            value = values[info.features.get(field, field)]
            if field == "image":
                value = _decode_image(value, info)
            elif field == "mask":
                value = tf.cast(_decode_mask(value, info) >= info.mask_threshold, tf.uint8)
            elif field == "label":
                with tf.control_dependencies([_check_label(value, info)]):
                    value = tf.identity(value)
            decoded[field] = value
        prepared = geometry.prepare(decoded, info, self._augment)
        return {field: prepared[field] for field in self._fields}

    def _example_bytes(self) -> int:
        features = {field: self._storage.features[self._info.features.get(field, field)] for field in self._fields}
        shapes = {field: feature.shape for field, feature in features.items()}
        prepared = geometry.prepared_shape(self._info, self._augment)
        for field, channels in (("image", prepared[-1]), ("mask", 1)):
            if field in shapes:
                shapes[field] = (*prepared[:2], channels)
        return sum(int(np.prod(shapes[field])) * np.dtype(features[field].np_dtype).itemsize for field in shapes)


class _Records:
    """A split that TFDS has prepared.

    Args:
        builder: its builder.
        instruction: the TFDS split instruction.
    """

    shuffle_buffer = SHUFFLE_BUFFER

    def __init__(self, builder, instruction):
        self._builder = builder
        self._instruction = instruction
        self.features = builder.info.features
        self.examples = builder.info.splits[instruction].num_examples

    def dataset(self, features=None):
        """Dicts of some features, images encoded, in the order of the files; by default of all, and tfds_id."""
        examples = self._builder.as_dataset(
            split=self._instruction,
            decoders=self._skip_decoding(),
            # What stays in memory is decided by the pipeline, by `memory_limit`.
            read_config=tfds.ReadConfig(try_autocache=False, add_tfds_id=features is None),
        )
        return (
            examples if features is None else examples.map(lambda example: {name: example[name] for name in features})
        )

    def load(self, example):
        """An element of `dataset` as a dict of its features."""
        return example

    def id(self, example, feature):
        """What an element of `dataset` is called: its feature, or where TFDS found it."""
        value = example["tfds_id" if feature is None else feature].numpy()
        return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

    def readable(self):
        """Reads all records, without decoding them.

        Returns:
            What can be read, as a storage; and a list of `BadExample` for what cannot. TensorFlow reads a file up to
            the first damaged record: those behind it are lost with it.
        """
        parts, lost = [], []
        for file in self._files():
            stop = file.skip + file.take
            readable = stop
            if self._builder.info.file_format is tfds.core.FileFormat.TFRECORD:
                readable = _count_readable(tf.data.TFRecordDataset(os.fspath(file.filename)).take(stop))
            parts.append((os.fspath(file.filename), file.skip, max(file.skip, readable)))
            name = os.path.basename(file.filename)
            lost += [
                BadExample(f"{name}__{place}", "the record is damaged, missing, or behind a damaged one")
                for place in range(max(file.skip, readable), stop)
            ]
        return (_RecordsLeft(self._builder, parts) if lost else self), lost

    def state(self):
        """What the split reads: changes when one of its files does."""
        files = [os.fspath(file.filename) for file in self._files()]
        return self._instruction, *((file, _modified(file)) for file in files)

    def damaged(self, info, reason) -> DatasetUnavailableError:
        builder = self._builder
        return damaged(info, builder.data_dir, os.fspath(builder.data_dir_root), reason)

    def _files(self):
        return self._builder.info.splits[self._instruction].file_instructions

    def _skip_decoding(self):
        features = self.features
        return {
            name: tfds.decode.SkipDecoding() for name in features if isinstance(features[name], tfds.features.Image)
        }


class _RecordsLeft(_Records):
    """What can still be read of damaged files, one file after the other.

    Args:
        builder: the builder of the data set.
        parts: for each file its path, the place of the first record to read, and the place behind the last.
    """

    def __init__(self, builder, parts):
        self._builder = builder
        self._parts = parts
        self.features = builder.info.features
        self.examples = sum(stop - start for _, start, stop in parts)

    def dataset(self, features=None):
        decoders = self._skip_decoding()

        def of_file(path, name, start, stop):
            # The end has to come before the first damaged record is read.
            records = tf.data.TFRecordDataset(path).take(stop).skip(start)

            def parse(place, record):
                example = self.features.deserialize_example(record, decoders=decoders)
                if features is not None:
                    return {feature: example[feature] for feature in features}
                return example | {"tfds_id": tf.strings.join([name, "__", tf.strings.as_string(place)])}

            return records.enumerate(start).map(parse, **_PARALLEL)

        paths, starts, stops = zip(*self._parts, strict=True)
        names = [os.path.basename(path) for path in paths]
        parts = tf.data.Dataset.from_tensor_slices(
            (list(paths), names, np.array(starts, np.int64), np.array(stops, np.int64))
        )
        return parts.flat_map(of_file)

    def readable(self):
        return self, []


class _Pictures:
    """A split of an image folder.

    An example that is not decoded is its place in the list, so that all of them are shuffled among each other.

    Args:
        builder: an `image_folder.ImageFolder`.
        splits: names of the splits to read, one after the other.
    """

    def __init__(self, builder, splits):
        self._builder = builder
        images = [image for split in splits for image in builder.images[split]]
        self.features = builder.info.features
        self.examples = self.shuffle_buffer = len(images)
        self._paths = [path for path, _ in images]
        with tf.device("CPU:0"):
            self._path = tf.constant(self._paths)
            self._name = tf.constant([builder.relative(path) for path in self._paths])
            self._label = tf.constant([label for _, label in images], tf.int64)

    def dataset(self, features=None):
        del features  # `load` reads what is asked for.
        return tf.data.Dataset.range(self.examples)

    def load(self, place):
        return {
            "image": tf.io.read_file(tf.gather(self._path, place)),
            "label": tf.gather(self._label, place),
            "image/filename": tf.gather(self._name, place),
        }

    def id(self, place, feature):
        del feature
        return self._name[place].numpy().decode(errors="replace")

    def readable(self):
        return self, []

    def state(self):
        return tuple((path, _modified(path)) for path in self._paths)

    def damaged(self, info, reason) -> DatasetUnavailableError:
        return damaged(info, self._builder.data_dir, os.path.dirname(self._builder.data_dir), reason)


def open_split(
    info: datasets.DatasetInfo, split: str, data_dir, fields=("label",), augment=False, bad_examples="error"
):
    """A `Reader` of a split; the arguments are those of `aib_tf.data.load`.

    Raises:
        ValueError: for an unknown split or way to treat bad examples, or an image folder that has no such classes.
        BadExampleError: if bad examples are left out, and no other is left.
        DatasetUnavailableError: if the data is not there and cannot be fetched.
    """
    check_choice("bad_examples", bad_examples, BAD_EXAMPLES)
    parts = _parts(info, split)  # Before data is fetched for a split there is not.
    if info.folder is None:
        storage = _Records(_builder(info, data_dir), "+".join(info.splits[part] for part in parts))
    else:
        storage = _Pictures(image_folder.ImageFolder(locations.folder_path(info.name, info.folder, data_dir)), parts)
    return Reader(info, split, storage, fields, augment, bad_examples)


def _parts(info, split) -> list[str]:
    """`"train+validation"` -> its parts."""
    parts = [part.strip() for part in str(split).split("+")]
    if not set(parts) <= set(info.splits) or len(set(parts)) < len(parts):
        known = ", ".join(info.splits)
        raise ValueError(
            f"The splits of {info.name} are {known}, and sums of different ones such as "
            f"'train+validation'. Received: split={split!r}"
        )
    return parts


def _decode_image(encoded, info):
    """uint8 (H, W, C); an error of TensorFlow if the file says otherwise."""
    height, width, channels = info.image_shape
    # The channels of the file: asked for three, TensorFlow would make three of one, or of four, without a word.
    image = tf.io.decode_image(encoded, channels=0, expand_animations=False)
    if info.gray_images:
        image = tf.cond(
            tf.shape(image)[-1] == 1, lambda: tf.repeat(image, channels, axis=-1), lambda: tf.identity(image)
        )
    size = (None, None) if info.resize else (height, width)
    return tf.ensure_shape(image, (*size, channels))


def _decode_mask(encoded, info):
    size = (None, None) if info.resize else info.image_shape[:2]
    return tf.ensure_shape(tf.io.decode_image(encoded, channels=0, expand_animations=False), (*size, 1))


def _check_label(label, info):
    return tf.debugging.Assert(
        (label >= 0) & (label < info.classes),
        [f"An example of {info.name} cannot be used; aib_tf.data.check_examples names it. Its label is", label],
    )


def _bad_examples(info, storage) -> dict[int, BadExample]:
    """Decodes all examples of a storage whose records can be read: place -> what is wrong, for the bad ones."""
    pictures = [field for field in ("image", "mask") if field in info.fields]

    def look(place, example):
        values = storage.load(example)
        shapes = [
            tf.shape(tf.io.decode_image(values[info.features.get(field, field)], channels=0, expand_animations=False))
            for field in pictures
        ]
        return place, values["label"], tf.stack(shapes)

    examples = storage.dataset().enumerate()
    reasons = dict.fromkeys(range(storage.examples), None)
    looked = examples.map(look, **_PARALLEL).ignore_errors(log_warning=False)
    for places, labels, shapes in looked.batch(1_000).as_numpy_iterator():
        for place, label, found in zip(places.tolist(), labels.tolist(), shapes.tolist(), strict=True):
            reason = _wrong(info, label, dict(zip(pictures, found, strict=True)))
            if reason is None:
                del reasons[place]
            else:
                reasons[place] = reason
    if not reasons:
        return {}
    chosen = np.zeros(storage.examples, bool)
    chosen[list(reasons)] = True
    chosen = tf.constant(chosen)
    bad = {}
    for place, example in examples.filter(lambda place, example: tf.gather(chosen, place)):
        place = int(place)
        try:
            look(place, example)
        except tf.errors.OpError as error:
            reasons[place] = f"it cannot be decoded ({_first_line(error)})"
        name = storage.id(example, info.features.get("id", "id") if "id" in info.fields else None)
        bad[place] = BadExample(name, reasons[place])
    return bad


def _wrong(info, label, shapes):
    """What is wrong with an example whose pictures could be decoded, or None."""
    if not 0 <= label < info.classes:
        return f"label {label}, classes are 0 to {info.classes - 1}"
    height, width, channels = shapes["image"]
    if info.resize is None and (height, width) != info.image_shape[:2]:
        return f"an image of {height}x{width}, expected {info.image_shape[0]}x{info.image_shape[1]}"
    if channels != info.image_shape[-1] and not (info.gray_images and channels == 1):
        kinds = {1: "1 channel, grey", 2: "2 channels, grey with alpha", 3: "3 channels", 4: "4 channels, with alpha"}
        return f"an image of {kinds[channels]}, expected {info.image_shape[-1]}"
    if "mask" in shapes and shapes["mask"] != [height, width, 1]:
        return f"a mask of {tuple(shapes['mask'])}, expected {(height, width, 1)}"
    return None


def _first_line(error):
    return error.message.split("{{", 1)[-1].split("}} ", 1)[-1].split("\n", 1)[0].split(" [Op:", 1)[0].strip()


def _listed(bad):
    bad = list(bad)
    more = f"; and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else ""
    return "; ".join(f"{example.id}: {example.reason}" for example in bad[:_NAMED]) + more


def _count_readable(records):
    """Records up to the first that is damaged."""
    count = 0
    with contextlib.suppress(tf.errors.DataLossError, tf.errors.NotFoundError):
        for _ in records:
            count += 1
    return count


def _modified(path):
    try:
        status = tf.io.gfile.stat(path)
    except tf.errors.OpError:
        return None
    return status.length, status.mtime_nsec


def _builder(info: datasets.DatasetInfo, data_dir: str | os.PathLike | None):
    """The TFDS builder of a data set whose files are there; they are fetched if need be.

    Raises:
        ValueError: if a generated set has no such configuration.
        DatasetUnavailableError: if there are no files, and none can be made.
    """
    if info.module is not None:
        importlib.import_module(info.module)
    if data_dir is not None:
        data_dir = locations.root(data_dir)
        # Where nothing can be generated, a folder that does not exist is a mistyped one, and no
        # reason to download everything again.
        if not info.generated and not tf.io.gfile.isdir(data_dir):
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
        reason = f"Its description there cannot be read: {type(error).__name__}: {error}"
        raise _unavailable(info, locations.root(data_dir), reason) from error
    if _is_prepared(builder):
        return builder
    if builder.data_path.exists():
        raise damaged(info, builder.data_dir, os.fspath(builder.data_dir_root), "there is no dataset_info.json")
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
            raise _unavailable(info, folder, f"It could not be prepared: {reason}", builder) from error
    return open_builder()  # The first one may have been made before another process was done.


def _is_prepared(builder) -> bool:
    return (builder.data_path / "dataset_info.json").exists()


def _archives(builder) -> dict[str, str]:
    """Where TFDS looks for the archives of a set that somebody has put there: path -> address."""
    # Mirrors of one file have one name; the first address is the one in use.
    archives = {}
    for url, checksum in (builder.url_infos or {}).items():
        if checksum is not None and checksum.filename:
            archives.setdefault(os.path.join(builder.data_dir_root, "downloads", "manual", checksum.filename), url)
    return archives


def _check_network(builder):
    """Raises within seconds what a download would raise after minutes of retries.

    Raises:
        OSError: if a server is needed that does not answer; the message has the address.
    """
    archives = _archives(builder)
    addresses = [url for path, url in archives.items() if not os.path.exists(path)]
    for url in addresses if archives else builder.url_infos or ():
        if urllib.parse.urlsplit(url).scheme in ("http", "https"):
            try:
                urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_NETWORK_TIMEOUT).close()
            except urllib.error.HTTPError:
                pass  # any answer shows that there is a network
            except OSError as error:
                raise OSError(f"{url} does not answer ({error})") from error
            return


def _unavailable(info, folder, reason, builder=None) -> DatasetUnavailableError:
    if info.generated:
        return DatasetUnavailableError(
            f"The data set {info.name} is not in {folder}. {reason}\n"
            "It is made on the spot and needs no network, but a folder that can be written: pass one as data_dir "
            f"(--data_dir=DIR), or set TFDS_DATA_DIR. Received: data_dir={folder!r}"
        )
    archives = "".join(f"\n    {url}\n    as {path}" for path, url in (_archives(builder) if builder else {}).items())
    return DatasetUnavailableError(
        f"The data set {info.name} is not in {folder}. {reason}\n"
        "To provide it, prepare it on a machine with a network:\n"
        f'    python -c "import tensorflow_datasets as tfds; '
        f"tfds.load('{info.builder}', data_dir='DIR')\"\n"
        f"then copy DIR here and pass it as data_dir (--data_dir=DIR). "
        + (f"Or put what it is made of where it is looked for:{archives}\n" if archives else "")
        + f"Received: data_dir={folder!r}"
    )


def damaged(info, folder, data_dir, reason) -> DatasetUnavailableError:
    """The error for files that are incomplete or damaged."""
    remedy = (
        "Remove this folder to have it prepared again, or copy it once more"
        if info.folder is None
        else "Mend or remove what is damaged"
    )
    return DatasetUnavailableError(
        f"The files of {info.name} in {folder} are incomplete or damaged: {reason}. {remedy}. "
        f"Received: data_dir={data_dir!r}"
    )
