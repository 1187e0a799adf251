import dask.array as da
from numpy.typing import ArrayLike

from bn_cy._moments import Moments

__all__ = ["moments", "normalize"]

def moments(x: da.Array, *, axis: int = 1) -> Moments: ...
def normalize(
    x: da.Array,
    mean: ArrayLike | da.Array,
    var: ArrayLike | da.Array,
    gamma: ArrayLike | da.Array | None = None,
    beta: ArrayLike | da.Array | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    relu: bool = False,
) -> da.Array: ...
