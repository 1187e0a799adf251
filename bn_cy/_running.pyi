from typing import Any

import numpy as np
from numpy.typing import NDArray

def take_in(
    running_mean: NDArray[Any],
    running_var: NDArray[Any],
    mean: NDArray[np.float64],
    var: NDArray[np.float64],
    weight: float,
    correction: float,
) -> None: ...
