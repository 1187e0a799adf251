"""What goes with a batch, checked before anything is written.

The kernels' own calls have these checks in C (`_calls`). Here they are for whatever makes several
calls, of which none may write before all of it is known to fit: parts, ranks, groups, masks.
"""

from contextlib import contextmanager

import numpy as np

from bn_cy._arguments import as_float_dtype, as_output, as_plain, refuse_overlapping_elements
from bn_cy._layout import axis_of


@contextmanager
def naming(what):
    """Say in an error which of several arrays it is about."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        kind = next(k for k in (TypeError, ValueError, RuntimeError) if isinstance(error, k))
        raise kind(f"{what}: {error}") from error


def check_several(name, arrays):
    """Refuse what holds no arrays, and one array alone, whose rows would be taken for them."""
    try:
        iter(arrays)
    except TypeError:
        kind = type(arrays).__name__
        raise TypeError(f"{name} must be several arrays, such as a list, got {kind}") from None
    if getattr(arrays, "ndim", 3) < 3:
        raise TypeError(
            f"{name} must be several arrays, got one of shape {tuple(arrays.shape)}: pass it in a "
            "list"
        )


def native(dtype):
    """Return a dtype in the processor's byte order, which that of all results is."""
    return dtype.newbyteorder("=")


def check_batch(x, axis):
    """Refuse an array that is no batch of float32 or float64 with such an axis."""
    axis_of(x, axis)
    as_float_dtype("x", native(x.dtype))


def check_like(name, array, x):
    """Refuse an array of another shape or dtype than x, in whatever byte order."""
    if array.shape != x.shape or native(array.dtype) != native(x.dtype):
        raise unlike(name, array, x)


def unlike(name, array, x):
    """Return the error of an array that has another shape or dtype than x."""
    return ValueError(
        f"{name} must have the shape {x.shape} and dtype {native(x.dtype)} of x, "
        f"got {array.shape} and {array.dtype}"
    )


def writable(out, x):
    """Return the memory of an `out` that can take a result of x's shape and dtype."""
    array = as_output(out)
    if array.shape != x.shape or array.dtype != native(x.dtype):
        raise unlike("out", array, x)
    if not array.flags.writeable:
        raise ValueError("out must be writable, got a read-only array")
    return array


def checked_target(out, x, **read):
    """Return the memory of an `out`, which can be written beside x; None for none.

    It may be one of the arrays that are read on the way, but not overlap it otherwise.
    """
    if out is None:
        return None
    array = writable(out, x)
    if np.shares_memory(array, x):
        raise ValueError("out may not share memory with x")
    for name, values in read.items():
        if values is not None:
            check_same_or_apart(array, name, values)
    return array


def check_same_or_apart(out, name, array):
    """Refuse an `out` that overlaps what is still to be read."""
    same = out.__array_interface__["data"] == array.__array_interface__["data"]
    same = same and (out.strides, out.dtype) == (array.strides, array.dtype)
    if not same and np.shares_memory(out, array):
        raise ValueError(f"out may be {name} itself, but may not overlap it otherwise")


def check_apart_from_parameters(out, gamma, beta):
    """Refuse an `out` that shares memory with a parameter, or whose elements share theirs."""
    for name, parameter in (("gamma", gamma), ("beta", beta)):
        if parameter is not None:
            refuse_shared(out, "gamma or beta", [as_plain(name, parameter)])
    refuse_overlapping_elements(out)


def check_apart_from_layer(out, layer):
    """Refuse an `out` that shares memory with a layer's arrays, or whose elements share theirs."""
    if out is not None:
        target = as_output(out)
        refuse_shared(target, "gamma or beta", layer._params.values())
        refuse_shared(target, "the running statistics", layer._running.values())
        refuse_shared(target, "grads", [a for a in layer._grads.values() if a is not None])
        refuse_overlapping_elements(target)


def refuse_shared(out, what, arrays):
    """Refuse an `out` that shares memory with any of some arrays.

    A loop, as Python 3.11 leaks the arguments of a function with a closure that it has no memory
    for.
    """
    for array in arrays:
        if np.shares_memory(out, array):
            raise ValueError(f"out may not share memory with {what}")
