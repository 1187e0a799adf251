from typing import Any, Protocol

from numpy.typing import DTypeLike

from bn_cy.layer import BatchNorm, _Policy

__all__ = ["SyncBatchNorm"]

class _Communicator(Protocol):
    def Get_rank(self) -> int: ...
    def Get_size(self) -> int: ...
    def Allgather(self, sendbuf: Any, recvbuf: Any, /) -> Any: ...
    def Alltoall(self, sendbuf: Any, recvbuf: Any, /) -> Any: ...
    def Bcast(self, buf: Any, /, root: int = ...) -> Any: ...

class SyncBatchNorm(BatchNorm):
    def __init__(
        self,
        num_features: int,
        *,
        comm: _Communicator,
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
    ) -> None: ...
    @property
    def comm(self) -> Any: ...
    @comm.setter
    def comm(self, value: _Communicator) -> None: ...
