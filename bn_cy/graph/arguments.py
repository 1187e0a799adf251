"""The arguments of `trace`, checked: errors name the argument, what was expected, and what came."""

import math
import operator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bn_cy import reference

Array = NDArray[Any]


def checked(name: str, value: ArrayLike, dtype: Any, shape: tuple[int, ...], what: str) -> Array:
    """Return an argument as a finite array of this dtype and shape, or say why it is none."""
    array = _real(name, value).astype(dtype)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, {what}, got {array.shape}")
    _check_finite(name, array)
    return array


def checked_batch(x: ArrayLike) -> Array:
    """Return x as an array of its own, in the machine's byte order, or say why it is no batch."""
    array = _real("x", x)
    dtype = array.dtype.newbyteorder("=")
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"x must be of float32 or float64, got {array.dtype}")
    if array.ndim < 2:
        raise ValueError(f"x must have two dimensions or more, got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"x must have at least one value, got shape {array.shape}")
    _check_finite("x", array)
    return array.astype(dtype)  # a copy: the trace keeps its numbers


def _real(name: str, value: ArrayLike) -> Array:
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must have no mask, got MaskedArray")
    array = np.asarray(value)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be an array of real numbers, got {array.dtype}")
    return array


def _check_finite(name: str, array: Array) -> None:
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {array[~np.isfinite(array)][0]}")


def checked_axis(axis: int, x: Array) -> int:
    """Return the feature axis, counted from the first."""
    try:
        return range(x.ndim)[operator.index(axis)]
    except TypeError:
        raise TypeError(f"axis must be an integer, got {axis!r}") from None
    except IndexError:
        raise ValueError(
            f"axis must be from {-x.ndim} to {x.ndim - 1} for x of shape {x.shape}, got {axis}"
        ) from None


def checked_eps(eps: float) -> float:
    """Return eps as a number that can be added to a variance."""
    if isinstance(eps, str):
        raise TypeError(f"eps must be a number, got {eps!r}")
    try:
        number = float(eps)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError):
        raise TypeError(f"eps must be a number, got {eps!r}") from None
    if not 0 <= number < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    return number


def check_variance(x: Array, eps: float, axis: int) -> None:
    """Refuse a feature whose squares overflow, or in which the graph divides 0 by 0."""
    with np.errstate(over="ignore", invalid="ignore"):
        var = reference.moments(x, axis=axis)[2]
    large = np.flatnonzero(~np.isfinite(var))
    if large.size:
        raise ValueError(
            f"x must have variances that {x.dtype} holds, got {var[large[0]]} of feature {large[0]}"
        )
    constant = np.flatnonzero(var + x.dtype.type(eps) == 0)
    if constant.size:
        raise ValueError(
            f"eps must not be 0 in {x.dtype} where a feature is constant, as feature "
            f"{constant[0]} of x is: 1/sqrt(var + eps) has no value"
        )
