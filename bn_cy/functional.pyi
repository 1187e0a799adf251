from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bn_cy._moments import Moments

__all__ = [
    "Cache",
    "Moments",
    "batchnorm_backward",
    "batchnorm_forward",
    "clear_buffers",
    "frozen_forward",
    "gradient_sums",
    "input_gradient",
    "moments",
    "normalize",
]

_Float = TypeVar("_Float", np.float32, np.float64)
_Batch: TypeAlias = NDArray[Any]  # float32 or float64
_Row: TypeAlias = NDArray[np.float64]  # one value for each feature

class _TorchTensor(Protocol):
    requires_grad: Any

class _JaxArray(Protocol):
    def block_until_ready(self) -> Any: ...

_Tensor: TypeAlias = _TorchTensor | _JaxArray
_Values: TypeAlias = Sequence[Sequence[Any]] | _Tensor  # a batch that is no NumPy array
_Upstream: TypeAlias = NDArray[np.floating[Any]] | _Values

class Cache:
    @property
    def count(self) -> float: ...
    @property
    def mean(self) -> _Row: ...
    @property
    def var(self) -> _Row: ...
    @property
    def num_features(self) -> int: ...
    @property
    def scaled(self) -> bool: ...
    @property
    def shifted(self) -> bool: ...
    @property
    def empty(self) -> bool: ...

@overload
def batchnorm_forward(
    x: NDArray[_Float],
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    out: NDArray[_Float] | None = None,
    relu: bool = False,
    residual: NDArray[_Float] | _Values | None = None,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
) -> tuple[NDArray[_Float], Cache]: ...
@overload
def batchnorm_forward(
    x: _Values,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    out: _Batch | _Tensor | None = None,
    relu: bool = False,
    residual: _Batch | _Values | None = None,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
) -> tuple[Any, Cache]: ...
@overload
def frozen_forward(
    x: NDArray[_Float],
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    out: NDArray[_Float] | None = None,
    relu: bool = False,
    residual: NDArray[_Float] | _Values | None = None,
) -> tuple[NDArray[_Float], Cache]: ...
@overload
def frozen_forward(
    x: _Values,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    out: _Batch | _Tensor | None = None,
    relu: bool = False,
    residual: _Batch | _Values | None = None,
) -> tuple[Any, Cache]: ...
def batchnorm_backward(
    dout: _Upstream, cache: Cache, *, out: _Batch | _Tensor | None = None
) -> tuple[Any, ...]: ...  # dx, dgamma, dbeta, and after a residual dresidual
def clear_buffers() -> None: ...
def moments(
    x: NDArray[_Float] | _Values,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
) -> Moments: ...
@overload
def normalize(
    x: NDArray[_Float],
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    out: NDArray[_Float] | None = None,
    relu: bool = False,
    residual: NDArray[_Float] | _Values | None = None,
) -> NDArray[_Float]: ...
@overload
def normalize(
    x: _Values,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    out: _Batch | _Tensor | None = None,
    relu: bool = False,
    residual: _Batch | _Values | None = None,
) -> Any: ...
def gradient_sums(
    dout: _Upstream,
    x: NDArray[_Float] | _Values,
    mean: ArrayLike,
    var: ArrayLike,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    relu: bool = False,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
) -> tuple[_Row, _Row]: ...
@overload
def input_gradient(
    dout: _Upstream,
    x: NDArray[_Float],
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None,
    eps: float,
    sum_dout: ArrayLike,
    sum_dout_xhat: ArrayLike,
    count: float,
    *,
    axis: int = 1,
    out: NDArray[_Float] | None = None,
    relu: bool = False,
    beta: ArrayLike | None = None,
) -> NDArray[_Float]: ...
@overload
def input_gradient(
    dout: _Upstream,
    x: _Values,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None,
    eps: float,
    sum_dout: ArrayLike,
    sum_dout_xhat: ArrayLike,
    count: float,
    *,
    axis: int = 1,
    out: _Batch | _Tensor | None = None,
    relu: bool = False,
    beta: ArrayLike | None = None,
) -> Any: ...
