"""Weights from PyTorch to Keras and back."""

import logging
import os
from collections.abc import Mapping

import keras
import numpy as np

from aib_tf.convert import imagenet, names
from aib_tf.convert.checkpoint import read_checkpoint, strip_state_dict
from aib_tf.layers import AnchorQuantizer

_COUNTER = "num_batches_tracked"
_LISTED = 30
_logger = logging.getLogger("aib_tf")


def from_pytorch(source, model, ema=False):
    """Gives a model the weights of a PyTorch network of the same architecture.

    The model is changed only when every array fits: each of its layers has one, and none is left over, but for modules
    that the released networks carry without using them, which are logged.

    Args:
        source: path of a checkpoint, or a state dict (or a released checkpoint's dict) of arrays or tensors. Nothing
            in a file is run: see `aib_tf.convert.read_checkpoint`.
        model: what `aib_tf.models.build` made for the same architecture and sizes.
        ema: whether to take the moving average of the weights that some released checkpoints hold beside them.

    Returns:
        The model.

    Raises:
        ValueError: if arrays are missing, left over, or of another shape or type, all of which are listed, together
            with the model that the source looks like; or if `model` has no counterpart in PyTorch.
        TypeError: if the source is neither a path nor a dict.
        CheckpointError: if the file is no checkpoint, is damaged, or wants to run code.

    Example:
        >>> model = aib_tf.models.build("vgg_aib_qt", (32, 32, 3), classes=10)
        >>> aib_tf.convert.from_pytorch("best_acc.tar", model)
    """
    state = _state(source, ema)
    base, entries = names.entries(model)
    problems = _Problems(model, state)
    values = []
    for entry in entries:
        values += problems.fitting(entry)
    problems.leave_out(names.UNUSED.get(base, ()))
    problems.check()
    for variable, value in values:
        variable.assign(value)
    return model


def load_backbone(source, model):
    """Gives the backbone of a model the weights of a PyTorch network for ImageNet, and leaves the rest as it is.

    For VGG-16 and WideResNet-50-2 as torchvision has them: what stands before the attention, and in WideResNet-50-2 the
    fourth stage behind it. Attention, bottleneck and classifier keep their initial values.

    Args:
        source: as for `from_pytorch`.
        model: a model of one of the two architectures.

    Returns:
        The model.

    Raises:
        ValueError: if the model is of another architecture, or an array of the backbone is missing or does not fit.
        CheckpointError: as for `from_pytorch`.
    """
    prefixes = imagenet.of(model).prefixes
    problems = _Problems(model, _state(source, ema=False))
    values = []
    for entry in names.entries(model)[1]:
        if entry.names[0].startswith(prefixes):
            values += problems.fitting(entry)
    problems.check(leftover=False)
    for variable, value in values:
        variable.assign(value)
    return model


def to_pytorch(model):
    """Returns the PyTorch state dict of a model: the inverse of `from_pytorch`.

    Args:
        model: what `aib_tf.models.build` made.

    Returns:
        Dict of PyTorch names -> float32 arrays in PyTorch's layouts (convolutions OIHW, dense layers out x in), with a
        zero for each counter of batches, which Keras does not have. A module that PyTorch lists twice is there twice.

    Raises:
        ValueError: if `model` has no counterpart in PyTorch.
    """
    state = {}
    for entry in names.entries(model)[1]:
        for name in entry.names:
            for suffix, variable, layout in arrays(entry.layer):
                # A writable copy, so that torch.from_numpy takes it without a warning.
                state[f"{name}.{suffix}"] = np.array(layout.to_pytorch(_numpy(variable)), "float32", order="C")
            if isinstance(entry.layer, keras.layers.BatchNormalization):
                state[f"{name}.{_COUNTER}"] = np.zeros((), "int64")
    return state


class _Layout:
    """How an array is turned from PyTorch's layout to ours and back."""

    def __init__(self, from_pytorch=lambda array: array, to_pytorch=lambda array: array):
        self.from_pytorch = from_pytorch
        self.to_pytorch = to_pytorch


_AS_IT_IS = _Layout()
_CONVOLUTION = _Layout(lambda array: array.transpose(2, 3, 1, 0), lambda array: array.transpose(3, 2, 0, 1))
_DENSE = _Layout(np.transpose, np.transpose)
_ANCHORS = _Layout(lambda array: array[0], lambda array: array[None])


def arrays(layer):
    """Lists (PyTorch suffix, variable, layout) of a layer's arrays."""
    if isinstance(layer, AnchorQuantizer):
        return [("weight", layer.anchors, _ANCHORS)]
    if isinstance(layer, keras.layers.BatchNormalization):
        return [
            ("weight", layer.gamma, _AS_IT_IS),
            ("bias", layer.beta, _AS_IT_IS),
            ("running_mean", layer.moving_mean, _AS_IT_IS),
            ("running_var", layer.moving_variance, _AS_IT_IS),
        ]
    layout = _CONVOLUTION if isinstance(layer, keras.layers.Conv2D) else _DENSE
    bias = [("bias", layer.bias, _AS_IT_IS)] if layer.use_bias else []
    return [("weight", layer.kernel, layout), *bias]


class _Problems:
    """Takes arrays out of a state dict, and notes what does not fit, to tell everything at once."""

    def __init__(self, model, state):
        self._model = model
        self._left = {name: array for name, array in state.items() if not name.endswith(f".{_COUNTER}")}
        self._state = state
        self._missing, self._misshaped, self._mistyped, self._different = [], [], [], []

    def fitting(self, entry):
        """Lists (variable, value) of a layer."""
        fitting = []
        for suffix, variable, layout in arrays(entry.layer):
            found = {
                name: self._left.pop(name) for name in (f"{n}.{suffix}" for n in entry.names) if name in self._left
            }
            if not found:
                self._missing.append(f"{entry.names[0]}.{suffix}")
                continue
            expected = layout.to_pytorch(np.empty(variable.shape, "bool")).shape
            numbers = {}
            for name, array in found.items():
                if array.shape != expected:
                    self._misshaped.append(f"{name} {array.shape} instead of {expected}")
                elif array.dtype.kind not in "fiu":
                    self._mistyped.append(f"{name} {array.dtype}")
                else:
                    numbers[name] = array
            if numbers:
                (first, array), *others = numbers.items()
                self._different += [f"{name} and {first}" for name, other in others if not _equal(other, array)]
                fitting.append((variable, np.asarray(layout.from_pytorch(array), variable.dtype)))
        return fitting

    def leave_out(self, prefixes):
        """Takes out what the released network itself does not use, and logs it."""
        unused = [name for name in self._left if name.startswith(prefixes)] if prefixes else []
        for name in unused:
            del self._left[name]
        if unused:
            _logger.info("Left out %d arrays of %s..., which the network does not use.", len(unused), unused[0])

    def check(self, leftover=True):
        """Raises ValueError if anything did not fit."""
        lists = {
            "missing": self._missing,
            "left over": list(self._left) if leftover else [],
            "of another shape": self._misshaped,
            "of another type": self._mistyped,
            "the same module with different values": self._different,
        }
        if not any(lists.values()):
            return
        found = [f"{what} ({len(items)}): {_listed(items)}" for what, items in lists.items() if items]
        likely = names.looks_like(self._state)
        hint = f" The arrays look like those of aib_tf.models.{likely}." if likely else ""
        raise ValueError(
            f"The state dict does not fit {self._model.name!r}, which stays as it was.{hint} "
            f"Received: {'; '.join(found)}"
        )


def _equal(one, other):
    return np.array_equal(one, other, equal_nan=one.dtype.kind == other.dtype.kind == "f")


def _listed(items):
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more


def _state(source, ema):
    """The state dict behind a path or a dict, as NumPy arrays."""
    if isinstance(source, (str, os.PathLike)):
        return read_checkpoint(source, ema=ema)
    if not isinstance(source, Mapping):
        raise TypeError(
            "The source must be a path or a state dict; of a torch.nn.Module, pass module.state_dict(). "
            f"Received: source={type(source).__name__}"
        )
    return strip_state_dict(source, ema=ema)


def _numpy(variable):
    return np.asarray(keras.ops.convert_to_numpy(variable))
