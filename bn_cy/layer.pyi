from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray
from typing_extensions import Self

from bn_cy.functional import Cache, _Batch, _Float, _Row, _Tensor, _Upstream, _Values

__all__ = ["BatchNorm"]

_Policy: TypeAlias = Literal["raise", "skip", "update"]

class BatchNorm:
    unbiased: bool
    training: bool

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
        relu: bool = False,
        on_nonfinite: _Policy = "raise",
        ghost_batch_size: int | None = None,
    ) -> None: ...
    @property
    def num_features(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def params(self) -> dict[str, _Batch]: ...
    @property
    def grads(self) -> dict[str, _Batch]: ...
    @property
    def frozen(self) -> bool: ...
    @property
    def cache(self) -> Cache | None: ...
    @property
    def eps(self) -> float: ...
    @eps.setter
    def eps(self, value: float) -> None: ...
    @property
    def axis(self) -> int: ...
    @axis.setter
    def axis(self, value: int) -> None: ...
    @property
    def relu(self) -> bool: ...
    @relu.setter
    def relu(self, value: bool) -> None: ...
    @property
    def on_nonfinite(self) -> _Policy: ...
    @on_nonfinite.setter
    def on_nonfinite(self, value: _Policy) -> None: ...
    @property
    def ghost_batch_size(self) -> int | None: ...
    @ghost_batch_size.setter
    def ghost_batch_size(self, value: int | None) -> None: ...
    # The arrays below are None where the layer has none, which only those who ask for it meet.
    @property
    def gamma(self) -> _Batch: ...
    @gamma.setter
    def gamma(self, value: ArrayLike) -> None: ...
    @property
    def beta(self) -> _Batch: ...
    @beta.setter
    def beta(self, value: ArrayLike) -> None: ...
    @property
    def dgamma(self) -> _Batch: ...
    @dgamma.setter
    def dgamma(self, value: _Batch | None) -> None: ...
    @property
    def dbeta(self) -> _Batch: ...
    @dbeta.setter
    def dbeta(self, value: _Batch | None) -> None: ...
    @property
    def running_mean(self) -> _Row: ...
    @running_mean.setter
    def running_mean(self, value: ArrayLike) -> None: ...
    @property
    def running_var(self) -> _Row: ...
    @running_var.setter
    def running_var(self, value: ArrayLike) -> None: ...
    @property
    def momentum(self) -> float | None: ...
    @momentum.setter
    def momentum(self, value: float | None) -> None: ...
    @property
    def num_batches_tracked(self) -> int: ...
    @num_batches_tracked.setter
    def num_batches_tracked(self, value: int) -> None: ...
    @property
    def track_running_stats(self) -> bool: ...
    @overload
    def forward(
        self,
        x: NDArray[_Float],
        *,
        out: NDArray[_Float] | None = None,
        residual: NDArray[_Float] | _Values | None = None,
        update: bool = True,
        mask: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
    ) -> NDArray[_Float]: ...
    @overload
    def forward(
        self,
        x: _Values,
        *,
        out: _Batch | _Tensor | None = None,
        residual: _Batch | _Values | None = None,
        update: bool = True,
        mask: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
    ) -> Any: ...
    @overload
    def __call__(
        self,
        x: NDArray[_Float],
        *,
        out: NDArray[_Float] | None = None,
        residual: NDArray[_Float] | _Values | None = None,
        update: bool = True,
        mask: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
    ) -> NDArray[_Float]: ...
    @overload
    def __call__(
        self,
        x: _Values,
        *,
        out: _Batch | _Tensor | None = None,
        residual: _Batch | _Values | None = None,
        update: bool = True,
        mask: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
    ) -> Any: ...
    # dx; after a residual dx and dresidual
    def backward(
        self,
        dout: _Upstream,
        *,
        out: _Batch | _Tensor | None = None,
        cache: Cache | None = None,
    ) -> Any: ...
    def train(self, mode: bool = True) -> Self: ...
    def eval(self) -> Self: ...
    def freeze(self) -> Self: ...
    def unfreeze(self) -> Self: ...
    def affine(self) -> tuple[_Row, _Row]: ...
    def _state_arrays(self) -> dict[str, NDArray[Any]]: ...
    def reset_running_stats(self) -> None: ...
    def state_dict(self) -> dict[str, NDArray[Any]]: ...
    def load_state_dict(self, state: Mapping[str, ArrayLike], *, prefix: str = "") -> None: ...
