"""Where data sets lie."""

import os

import tensorflow as tf

from aib_tf import files


class DatasetUnavailableError(FileNotFoundError):
    """A data set is not where it was looked for, and could not be fetched."""


def root(data_dir: str | os.PathLike | None) -> str:
    """The folder of all data sets as an absolute path.

    Args:
        data_dir: a folder. None: that of TFDS, `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
    """
    if data_dir is None:
        data_dir = os.environ.get("TFDS_DATA_DIR", os.path.join("~", "tensorflow_datasets"))
    return files.absolute(data_dir)


def folder_path(name: str, folder: str, data_dir: str | os.PathLike | None) -> str:
    """The path of an image folder.

    Args:
        name: of the data set, for the message.
        folder: path in `data_dir`, or absolute.
        data_dir: as in `root`.

    Raises:
        DatasetUnavailableError: if there is no such folder.
    """
    path = os.path.join(root(data_dir), folder).rstrip("/")
    if not tf.io.gfile.isdir(path):
        raise DatasetUnavailableError(
            f"There is no folder {path}. A folder of pictures FOLDER/train/CLASS/*.jpg in DIR is given as "
            f"dataset=image_folder/FOLDER with data_dir=DIR (--dataset, --data_dir). "
            f"Received: name={name!r}, data_dir={data_dir!r}"
        )
    return path
