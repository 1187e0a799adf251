from collections.abc import Iterable
from typing import Any, overload

from numpy.typing import NDArray

from bn_cy.functional import _Batch, _Float, _Tensor, _Upstream, _Values
from bn_cy.layer import BatchNorm

__all__ = ["MicroBatch"]

class MicroBatch:
    def __init__(self, layer: BatchNorm) -> None: ...
    @property
    def layer(self) -> BatchNorm: ...
    @overload
    def forward(
        self,
        parts: Iterable[NDArray[_Float]],
        *,
        out: Iterable[NDArray[_Float]] | None = None,
        residuals: Iterable[NDArray[_Float] | _Values] | None = None,
        update: bool = True,
    ) -> list[NDArray[_Float]]: ...
    @overload
    def forward(
        self,
        parts: Iterable[_Values],
        *,
        out: Iterable[_Batch | _Tensor] | None = None,
        residuals: Iterable[_Batch | _Values] | None = None,
        update: bool = True,
    ) -> list[Any]: ...
    @overload
    def __call__(
        self,
        parts: Iterable[NDArray[_Float]],
        *,
        out: Iterable[NDArray[_Float]] | None = None,
        residuals: Iterable[NDArray[_Float] | _Values] | None = None,
        update: bool = True,
    ) -> list[NDArray[_Float]]: ...
    @overload
    def __call__(
        self,
        parts: Iterable[_Values],
        *,
        out: Iterable[_Batch | _Tensor] | None = None,
        residuals: Iterable[_Batch | _Values] | None = None,
        update: bool = True,
    ) -> list[Any]: ...
    # dxs; after residuals dxs and dresiduals
    def backward(
        self, douts: Iterable[_Upstream], *, out: Iterable[_Batch | _Tensor] | None = None
    ) -> Any: ...
