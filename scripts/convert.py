"""Turns a PyTorch checkpoint into a Keras model, or a Keras model into a checkpoint.

python scripts/convert.py --checkpoint=best_acc.tar --model=vgg_aib_qt --output=vgg_aib_qt.keras
python scripts/convert.py --keras=runs/digits/best.keras --output=digits.pth
"""

import os

import command_line
import keras
from absl import flags

from aib_tf import convert, files, models

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The PyTorch checkpoint to read. Nothing in it is run.")
_KERAS = flags.DEFINE_string("keras", None, "The other way: the .keras file to read.")
_OUTPUT = flags.DEFINE_string("output", None, "The file to write: .keras, or with --keras a checkpoint.", required=True)
_MODEL = flags.DEFINE_string("model", None, "Name of the model; by default what the checkpoint looks like.")
_IMAGE_SIZE = flags.DEFINE_list("image_size", None, "Height and width; by default those of the paper: 32 or 224.")
_CLASSES = flags.DEFINE_integer("classes", None, "Number of classes, where the checkpoint does not show it.")
_POSITION = flags.DEFINE_string(
    "position", None, "Of vgg_att2 and vgg_att3, whose weights do not show it: see train.py."
)
_NORMALIZE = flags.DEFINE_string("normalize", None, "The same.")
_EMA = flags.DEFINE_bool("ema", False, "Take the moving average of the weights that some checkpoints hold.")


def main(arguments):
    if arguments:
        raise ValueError(f"Only flags are expected, such as --output=FILE. Received: {' '.join(arguments)}")
    if (_CHECKPOINT.value is None) == (_KERAS.value is None):
        raise ValueError(
            f"Give one of --checkpoint and --keras. Received: checkpoint={_CHECKPOINT.value}, keras={_KERAS.value}"
        )
    if _KERAS.value is not None:
        given = [flag.name for flag in (_MODEL, _IMAGE_SIZE, _CLASSES, _POSITION, _NORMALIZE) if flag.value is not None]
        if given or _EMA.value:
            raise ValueError(
                f"With --keras the file says everything. Received: {', '.join([*given, *['ema'] * _EMA.value])}"
            )
        state = convert.to_pytorch(_load(_KERAS.value))
        convert.write_checkpoint(_OUTPUT.value, state)
        print(f"Wrote {len(state)} arrays to {_OUTPUT.value}.")
        return
    if not _OUTPUT.value.endswith(".keras"):
        raise ValueError(f"The name of a Keras model ends in .keras. Received: output={_OUTPUT.value}")
    state = convert.read_checkpoint(_CHECKPOINT.value, ema=_EMA.value)
    model = _build(state)
    convert.from_pytorch(state, model)
    with files.replacing(_OUTPUT.value) as path:
        model.save(path)
    print(f"Wrote {model.name}, {model.count_params():,} parameters and statistics, to {_OUTPUT.value}.")


def _build(state):
    """The model that the names and shapes of a state dict ask for."""
    likely = convert.looks_like(state)
    if likely is None and (_MODEL.value is None or _CLASSES.value is None):
        raise ValueError(
            f"These arrays are of no network that aib_tf knows, or of a part of one: {', '.join(list(state)[:5])} ... "
            "Name it with --model and --classes, and what does not fit is listed. "
            f"Received: checkpoint={_CHECKPOINT.value}"
        )
    name = _MODEL.value or likely.name
    channels, classes, overrides = (likely.channels, likely.classes, likely.overrides) if likely else (3, None, {})
    overrides |= {flag.name: flag.value for flag in (_POSITION, _NORMALIZE) if flag.value is not None}
    size = _IMAGE_SIZE.value or ([224, 224] if "_cub" in name else [32, 32])
    try:
        height, width = map(int, size)
    except ValueError:
        raise ValueError(f"`image_size` must be two integers, HEIGHT,WIDTH. Received: image_size={size}") from None
    return models.build(name, (height, width, channels), _CLASSES.value or classes, **overrides)


def _load(path):
    if not os.path.exists(path):
        raise FileNotFoundError(2, "There is no such file", path)
    try:
        return keras.saving.load_model(path)
    except Exception as error:  # Keras lets zipfile's, h5py's and its own errors through
        raise ValueError(f"{path} is no Keras model that can be read: {error}. Received: keras={path}") from error


if __name__ == "__main__":
    command_line.run(main)
