"""What a caller gave, as arrays, integers, flags and dtypes; errors name the argument.

Whatever speaks one of NumPy's protocols is an array, such as a tensor of another library.
"""

import contextlib
import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["as_flag", "as_float_dtype", "as_index", "as_output", "as_plain", "as_real"]

Array = NDArray[Any]

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def as_plain(name: str, values: Any) -> Array:
    """Return values as an array: of another library's tensor or array, one of its memory.

    TypeError where that would lose a mask, or be no array at all.
    """
    kind = type(values).__name__
    refuse_mask(name, values)
    try:
        array = np.asarray(values)
        if array.ndim == 0 and array.dtype.kind == "O" and hasattr(values, "__dlpack__"):
            array = np.from_dlpack(values)
    except (TypeError, RuntimeError, BufferError) as error:  # on a GPU, sparse, in need of a detach
        message = f"{name} must be an array in the processor's memory, got {kind}: {error}"
        raise TypeError(message) from error
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name} must be an array, got {kind}: {error}") from error
    if array.ndim == 0 and array.dtype.kind == "O":
        way = f": try {name}.toarray()" if hasattr(values, "toarray") else ""
        raise TypeError(f"{name} must be an array, got {kind}{way}")
    return array


def as_output(out: Any) -> Array:
    """Return `out`, or an array of its memory if it is the tensor of another library."""
    if isinstance(out, np.ndarray):
        refuse_mask("out", out)
        return out
    kind = type(out).__name__
    if not hasattr(out, "__array__") and not hasattr(out, "__dlpack__"):
        raise TypeError(f"out must be an array, got {kind}")
    array = as_plain("out", out)
    if array.size and not np.shares_memory(array, as_plain("out", out)):
        raise TypeError(f"out must be an array whose memory can be written, got {kind}")
    return array


def as_real(name: str, values: Any) -> Array:
    """Return an array of real numbers."""
    array = as_plain(name, values)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be of real numbers, got {array.dtype}")
    return array


def as_index(name: str, value: Any) -> int:
    """Return an integer."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def as_flag(name: str, value: Any) -> bool:
    """Return True or False. 1 and 0 pass; what else has a truth value, such as text, does not."""
    plain = value
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:  # np.load makes such arrays
        plain = value.item()
    if isinstance(plain, int) and plain in (0, 1):
        return bool(plain)
    raise TypeError(f"{name} must be True or False, got {value!r}")


def as_float_dtype(name: str, dtype: Any) -> np.dtype[Any]:
    """Return float32 or float64 as a dtype. None is neither, though NumPy takes it for float64."""
    found: np.dtype[Any] | None = None
    with contextlib.suppress(TypeError):
        found = None if dtype is None else np.dtype(dtype)
    if found is None or found not in FLOATS:
        got = repr(dtype) if found is None else found
        raise TypeError(f"{name} must be float32 or float64, got {got}")
    return found


def refuse_overlapping_elements(out: Array) -> None:
    """Refuse an `out` of which several elements are the same memory."""
    if out.flags.c_contiguous:
        return
    reach = out.itemsize
    axes = zip(out.strides, out.shape, strict=True)
    for stride, size in sorted((abs(stride), size) for stride, size in axes if size > 1):
        if stride < reach and out.size:
            raise ValueError(
                "out must have memory of its own for every element, got the shape "
                f"{out.shape} with strides {out.strides}"
            )
        reach += (size - 1) * stride


def refuse_mask(name: str, values: Any) -> None:
    """Refuse an array that has a mask of its own, and say what to pass instead."""
    if not isinstance(values, np.ndarray) or not hasattr(values, "mask"):
        return
    way = f"{name}.data"
    if name != "out":  # the copy that `filled` makes is not what shall be written
        way += f" or {name}.filled(value)"
    if name == "x":
        way += (
            "; batchnorm_forward, moments and BatchNorm take mask=, a flag for each position, "
            "without the features (True counts)"
        )
    raise TypeError(f"{name} must have no mask, got {type(values).__name__}: pass {way}")
