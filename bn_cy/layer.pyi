from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from bn_cy.functional import _Batch, _Row

__all__ = ["BatchNorm"]

class BatchNorm:
    num_features: int
    eps: float
    momentum: float | None
    unbiased: bool
    axis: int
    dtype: np.dtype[Any]
    training: bool
    params: dict[str, _Batch]
    grads: dict[str, _Batch | None]
    running_mean: _Row | None
    running_var: _Row | None
    num_batches_tracked: int

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        scale: bool = True,
        shift: bool = True,
        track_running_stats: bool = True,
        unbiased: bool = True,
        axis: int = 1,
        dtype: DTypeLike = ...,
    ) -> None: ...
    @property
    def gamma(self) -> _Batch | None: ...
    @property
    def beta(self) -> _Batch | None: ...
    @property
    def dgamma(self) -> _Batch | None: ...
    @property
    def dbeta(self) -> _Batch | None: ...
    @property
    def track_running_stats(self) -> bool: ...
    def forward(self, x: ArrayLike, *, out: _Batch | None = None) -> _Batch: ...
    def __call__(self, x: ArrayLike, *, out: _Batch | None = None) -> _Batch: ...
    def backward(self, dout: ArrayLike, *, out: _Batch | None = None) -> _Batch: ...
    def train(self, mode: bool = True) -> BatchNorm: ...
    def eval(self) -> BatchNorm: ...
    def reset_running_stats(self) -> None: ...
    def state_dict(self) -> dict[str, NDArray[Any]]: ...
    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None: ...
