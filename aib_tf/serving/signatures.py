"""What a model takes and gives, by its metadata, and how values become the arrays that it takes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf


class TensorSpec(NamedTuple):
    """One input or output of a signature.

    Attributes:
        dtype: NumPy's; strings are `object`, and their values bytes.
        shape: sizes, None for one that is free, such as that of the batch; None for a free rank.
    """

    dtype: np.dtype
    shape: tuple[int | None, ...] | None


class Signature(NamedTuple):
    """The inputs and outputs of one way to call a model, by name."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]


# In front of TensorFlow's own signatures, such as that of the initialisation, whose output has no dtype.
INTERNAL_PREFIX = "__"


def tensor_spec(data_type: int, sizes: list[int] | None) -> TensorSpec:
    """Makes a `TensorSpec` of TensorFlow's number of a dtype and of sizes that are -1 where they are free."""
    shape = None if sizes is None else tuple(size if size >= 0 else None for size in sizes)
    return TensorSpec(np.dtype(tf.as_dtype(data_type).as_numpy_dtype), shape)


def input_arrays(signature: Signature, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Makes arrays of the signature's dtypes, refusing names and values that it does not take.

    Raises:
        ValueError: an input is missing or unknown, or a value changes in the dtype, such as 0.5 or 256 in uint8.
    """
    if set(inputs) != set(signature.inputs):
        taken = ", ".join(sorted(signature.inputs))
        raise ValueError(f"The inputs of this signature are: {taken}. Received: inputs={sorted(inputs)}")
    return {name: _input_array(name, inputs[name], spec) for name, spec in signature.inputs.items()}


def _input_array(name, value, spec):
    if spec.dtype == object:
        array = np.asarray(value, dtype=object)
        strings = [text.encode() if isinstance(text, str) else text for text in array.ravel()]
        if not all(isinstance(string, bytes) for string in strings):
            kinds = sorted({type(string).__name__ for string in strings})
            raise ValueError(f"`{name}` must be bytes. Received: {name}=values of {', '.join(kinds)}")
        array = np.empty(array.shape, dtype=object)
        array.flat[:] = strings
        return array
    try:
        given = np.asarray(value)
        with np.errstate(invalid="ignore"):  # NaN in an integer dtype: refused below
            array = given.astype(spec.dtype)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"`{name}` must be an array of {spec.dtype}: {error}. Received: {name}={value!r:.80}"
        ) from None
    if spec.dtype.kind in "iu" and not np.array_equal(array, given):
        low, high = np.iinfo(spec.dtype).min, np.iinfo(spec.dtype).max
        raise ValueError(
            f"`{name}` must be whole numbers from {low} to {high}; round or clip them. Received: {name}={value!r:.80}"
        )
    return array
