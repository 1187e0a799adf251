from collections.abc import Iterable

from numpy.typing import ArrayLike

from bn_cy.layer import BatchNorm

__all__ = ["recalibrate"]

def recalibrate(layer: BatchNorm, batches: Iterable[ArrayLike]) -> None: ...
