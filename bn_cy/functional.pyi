from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

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

_Batch: TypeAlias = NDArray[Any]  # float32 or float64
_Row: TypeAlias = NDArray[np.float64]  # one value for each feature

class Moments(NamedTuple):
    count: int  # type: ignore[assignment]  # hides tuple.count, on purpose
    mean: _Row
    var: _Row

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

def batchnorm_forward(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    out: _Batch | None = None,
    relu: bool = False,
    residual: ArrayLike | None = None,
) -> tuple[_Batch, Cache]: ...
def frozen_forward(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    out: _Batch | None = None,
    relu: bool = False,
    residual: ArrayLike | None = None,
) -> tuple[_Batch, Cache]: ...
def batchnorm_backward(
    dout: ArrayLike, cache: Cache, *, out: _Batch | None = None
) -> tuple[Any, ...]: ...  # dx, dgamma, dbeta, and after a residual dresidual
def clear_buffers() -> None: ...
def moments(x: ArrayLike, *, axis: int = 1) -> Moments: ...
def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    out: _Batch | None = None,
    relu: bool = False,
    residual: ArrayLike | None = None,
) -> _Batch: ...
def gradient_sums(
    dout: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    relu: bool = False,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
) -> tuple[_Row, _Row]: ...
def input_gradient(
    dout: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None,
    eps: float,
    sum_dout: ArrayLike,
    sum_dout_xhat: ArrayLike,
    count: float,
    *,
    axis: int = 1,
    out: _Batch | None = None,
    relu: bool = False,
    beta: ArrayLike | None = None,
) -> _Batch: ...
