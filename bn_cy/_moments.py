"""`Moments`: what a batch, or a part of one, says about every feature."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Moments(NamedTuple):
    """What `moments` returns: the count, the mean and the biased variance of every feature."""

    count: int  # type: ignore[assignment]  # hides tuple.count, on purpose
    mean: NDArray[np.float64]
    var: NDArray[np.float64]
