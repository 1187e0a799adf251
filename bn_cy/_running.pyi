from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float64]

def take_in(
    running_mean: NDArray[Any],
    running_var: NDArray[Any],
    mean: Row,
    var: Row,
    weight: float,
    correction: float,
) -> None: ...
