"""Folders of pictures, one folder a class: which images they hold, and which split each belongs to.

    FOLDER/train/cat/1.jpg
    FOLDER/validation/cat/2.png
    FOLDER/test/cat/3.jpg

The listing is that of `tfds.folder_dataset.ImageFolder`. What it leaves open is decided here: hidden files are no
images, a split that is missing is taken from the others, and the order is drawn at random once, so that a class is
nowhere in a row.
"""

import contextlib
import os
import random

import tensorflow as tf
import tensorflow_datasets as tfds

# The name of a folder is the first that is there.
SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
SUFFIXES = (".jpg", ".jpeg", ".png")

# Of the training images of each class, where a split has no folder of its own.
HELD_OUT_SHARE = 0.1


class ImageFolder(tfds.folder_dataset.ImageFolder, skip_registration=True):
    """The images of a folder by split.

    A folder that has only one of validation and test uses it as test: what a result is reported on is not what a
    checkpoint is chosen on. Each split that is then missing is a tenth of each class of the training images.

    Args:
        root: the folder with train, and possibly validation (or val) and test.

    Raises:
        ValueError: if there is no train, a class has no image or is not in every split, a class has too few images to
            hold some of them out, or a name is not in UTF-8.

    Attributes:
        class_names: names of the classes, sorted; a label is a place in it.
        images: dict split -> list of (path, label), in an order drawn once.
    """

    def __init__(self, root: str):
        folders = split_folders(root)
        self.class_names = class_names(root)
        with _naming_what_is_not_utf8(root):
            super().__init__(root, shape=(None, None, 3))
        labels = {name: label for label, name in enumerate(self.class_names)}
        found = {}
        for split, folder in folders.items():
            examples = self._split_examples.get(folder, ())
            found[split] = sorted(
                (example.image_path, labels[example.label])
                for example in examples
                if example.label in labels and not os.path.basename(example.image_path).startswith(".")
            )
            _check_classes(root, folder, self.class_names, {label for _, label in found[split]})
        if "test" not in found and "validation" in found:
            found["test"] = found.pop("validation")
        missing = [split for split in SPLIT_FOLDERS if split not in found]
        if missing:
            found |= _hold_out(found["train"], missing, root, self.class_names)
        for split, images in found.items():
            # From the same order whatever the folder is called.
            random.Random(split).shuffle(images)
        self.images = found

    def relative(self, path: str) -> str:
        """The path of an image in the folder, by which it is named."""
        return os.path.relpath(path, self.data_dir) if "://" not in path else path.removeprefix(f"{self.data_dir}/")


def class_names(root: str) -> tuple[str, ...]:
    """The names of the folders in the train folder, sorted.

    Args:
        root: the folder with train.

    Raises:
        ValueError: if there is no train, or a split has other classes than train.
    """
    folders = split_folders(root)
    classes = {split: _subfolders(os.path.join(root, folder)) for split, folder in folders.items()}
    names = classes["train"]
    if len(names) < 2:
        raise ValueError(
            f"Each class has a folder of its own, and there must be two at least. Received: "
            f"{os.path.join(root, folders['train'])} with {', '.join(names) or 'no folder'}"
        )
    for split, folder in folders.items():
        differing = [
            f"{sign} {name}"
            for sign, some, others in (("without", names, classes[split]), ("with", classes[split], names))
            for name in some
            if name not in others
        ]
        if differing:
            raise ValueError(
                "All splits must have a folder for each class of train. Received: "
                f"{os.path.join(root, folder)} {_few(differing)}"
            )
    return tuple(names)


def split_folders(root: str) -> dict[str, str]:
    """Which folders hold splits: a dict split -> name of its folder.

    Raises:
        ValueError: if there is no train, or two names for one split.
    """
    present = _subfolders(root)
    found = {}
    for split, names in SPLIT_FOLDERS.items():
        folders = [name for name in names if name in present]
        if len(folders) > 1:
            raise ValueError(f"{root} must have one folder of the split {split}. Received: {' and '.join(folders)}")
        if folders:
            found[split] = folders[0]
    if "train" not in found:
        raise ValueError(
            "An image folder holds train/CLASS/*.jpg, and possibly validation (or val) and test like it. "
            f"Received: {root} with {_few(present) or 'no folder'}"
        )
    return found


def _subfolders(path):
    """Sorted names of the folders in a folder, without hidden ones."""
    with _naming_what_is_not_utf8(path):
        names = [name.rstrip("/") for name in tf.io.gfile.listdir(path)]
    return sorted(name for name in names if not name.startswith(".") and tf.io.gfile.isdir(os.path.join(path, name)))


@contextlib.contextmanager
def _naming_what_is_not_utf8(root):
    """Around the listing of a folder: TensorFlow cannot list a name of another encoding, and does not say which."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            "The names of folders and pictures must be in UTF-8; rename what is not, as convmv does. "
            f"Received: {_first_not_in_utf8(root)!r}"
        ) from error


def _first_not_in_utf8(root):
    for folder, folders, files in os.walk(os.fsencode(root)):
        for name in sorted((*folders, *files)):
            try:
                name.decode()
            except UnicodeDecodeError:
                return os.path.join(folder, name)
    return root


def _check_classes(root, folder, names, present):
    empty = [name for label, name in enumerate(names) if label not in present]
    if empty:
        raise ValueError(
            f"Every class must have an image ({', '.join(SUFFIXES)}) directly in its folder. "
            f"Received: {os.path.join(root, folder)} without any for {_few(empty)}"
        )


def _hold_out(train, splits, root, names):
    """Divides training images: a dict with train and each of `splits`, a tenth of each class of its own."""
    parts = {split: [] for split in ("train", *splits)}
    of_class = [[] for _ in names]
    for image in train:
        of_class[image[1]].append(image)
    for name, members in zip(names, of_class, strict=True):
        # By the name: other classes do not change what is held out of this one.
        random.Random(name).shuffle(members)
        count = max(1, round(HELD_OUT_SHARE * len(members)))
        if len(members) <= count * len(splits):
            raise ValueError(
                f"There is no folder for {' or '.join(splits)}, so that a tenth of each class is held out, and a class "
                f"must have {len(splits) + 1} images at least. Received: {len(members)} of {name} in {root}"
            )
        for number, split in enumerate(splits):
            parts[split] += members[number * count : (number + 1) * count]
        parts["train"] += members[len(splits) * count :]
    return {split: sorted(images) for split, images in parts.items()}


def _few(names, most=5):
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
