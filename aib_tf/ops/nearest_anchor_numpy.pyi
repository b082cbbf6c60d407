"""Types of the compiled module. What its functions do is in their docstrings, help(nearest_anchor_numpy)."""

from typing import Any, Generic, NamedTuple, Protocol, TypeVar, final, overload

import numpy as np
import numpy.typing as npt

_Array = TypeVar("_Array")
_Index = TypeVar("_Index")
_Loss = TypeVar("_Loss")
_Anchors = TypeVar("_Anchors")

class _OnDevice(Protocol):
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...

@final
class DeviceArray:
    """An array in memory of a CUDA device; only where `has_cuda` is true."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...

class NearestAnchor(NamedTuple, Generic[_Array, _Index, _Loss]):
    """What `nearest_anchor` returns."""

    quantized: _Array
    index: _Index  # type: ignore[assignment]  # it hides tuple.index
    codebook_loss: _Loss
    commitment_loss: _Loss

class NearestAnchorGradient(NamedTuple, Generic[_Array, _Anchors]):
    """What `nearest_anchor_gradient` returns."""

    d_x: _Array
    d_anchors: _Anchors

has_cuda: bool

def instruction_set() -> str: ...
@overload
def nearest_anchor(
    x: _OnDevice, anchors: _OnDevice, *, threads: int = 0
) -> NearestAnchor[DeviceArray, DeviceArray, DeviceArray]: ...
@overload
def nearest_anchor(
    x: npt.ArrayLike, anchors: npt.ArrayLike, *, threads: int = 0
) -> NearestAnchor[npt.NDArray[Any], npt.NDArray[np.int32], np.floating[Any]]: ...
@overload
def nearest_anchor_gradient(
    x: _OnDevice,
    anchors: _OnDevice,
    index: _OnDevice,
    d_quantized: _OnDevice,
    d_codebook_loss: _OnDevice | float,
    d_commitment_loss: _OnDevice | float,
    *,
    threads: int = 0,
) -> NearestAnchorGradient[DeviceArray, DeviceArray]: ...
@overload
def nearest_anchor_gradient(
    x: npt.ArrayLike,
    anchors: npt.ArrayLike,
    index: npt.ArrayLike,
    d_quantized: npt.ArrayLike,
    d_codebook_loss: npt.ArrayLike,
    d_commitment_loss: npt.ArrayLike,
    *,
    threads: int = 0,
) -> NearestAnchorGradient[npt.NDArray[Any], npt.NDArray[Any]]: ...
