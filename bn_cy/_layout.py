"""An array and its feature axis, as the (outer, features, inner) view that the kernels take.

An array whose values fill one stretch of memory in the order of some permutation of its axes (C and Fortran order,
an NCHW view of NHWC data) is such a view as it is. Anything else is copied once.
"""

import math
import operator
from functools import lru_cache

import numpy as np

from bn_cy import _buffers

NATIVE = {4: np.dtype(np.float32), 8: np.dtype(np.float64)}
RECYCLED = 1 << 18  # bytes from which an output comes from the pool; below, malloc is faster


class Layout:
    """How the kernels see the arrays of one shape, memory order and dtype.

    Attributes
    ----------
    shape, strides : tuple of int
        The user's.
    dtype : dtype
        float32 or float64.
    grid : tuple
        What the kernels are told: outer, features, inner, and whether the dtype is float32.
    features, count, size, nbytes : int
        Features, values of a feature, values and bytes altogether.
    """

    __slots__ = ("_restore", "_stored", "count", "dtype", "features", "grid", "nbytes", "shape", "size", "strides")

    def __init__(self, shape, strides, dtype, axis):
        order = sorted(range(len(shape)), key=lambda i: -strides[i])
        stored = tuple(shape[i] for i in order)
        at = order.index(axis)
        self.shape, self.strides, self.dtype = shape, strides, dtype
        self.grid = math.prod(stored[:at]), shape[axis], math.prod(stored[at + 1 :]), dtype.itemsize == 4
        self.features = shape[axis]
        self.count = math.prod(shape[:axis] + shape[axis + 1 :])
        self.size = math.prod(shape)
        self.nbytes = self.size * dtype.itemsize
        self._stored = stored
        self._restore = [order.index(i) for i in range(len(order))] if order != sorted(order) else None

    def empty(self):
        """Return a new array of this layout, not filled."""
        if self.nbytes < RECYCLED:
            array = np.empty(self._stored, self.dtype)
        else:
            array = np.ndarray(self._stored, self.dtype, _buffers.Buffer(self.nbytes))
        return array if self._restore is None else array.transpose(self._restore)

    def has(self, array):
        """Tell whether the kernels can take an array of this shape and dtype as it is."""
        return (
            array.strides == self.strides and array.dtype is self.dtype and array.flags.aligned
        )

    def compact(self, array):
        """Return the array itself if the kernels can take it, or a copy."""
        if self.has(array):
            return array
        copy = self.empty()
        copy[...] = array
        return copy


def native_floats(name, dtype):
    """Return float32 or float64 in the processor's byte order; refuse every other dtype."""
    if dtype.kind != "f" or dtype.itemsize not in NATIVE:
        raise TypeError(f"{name} must be of float32 or float64, got {dtype}")
    return NATIVE[dtype.itemsize]


def fills_memory(shape, strides, itemsize):
    """Tell whether the values fill one stretch of memory, in the order of some permutation of the axes."""
    axes = [i for i in range(len(shape)) if shape[i] != 1]
    expected = itemsize
    for i in sorted(axes, key=lambda i: strides[i]):
        if strides[i] != expected:
            return False
        expected *= shape[i]
    return True


@lru_cache(maxsize=1024, typed=True)  # 1.0 is no axis, though it equals 1
def layout_of(shape, strides, dtype, axis):
    """Return the Layout of an array, or of its C-ordered copy where the kernels cannot take it as it is.

    Raises
    ------
    TypeError
        If the dtype is neither float32 nor float64, or `axis` is not an integer.
    ValueError
        If the array has less than two dimensions or `axis` is none of them.
    """
    if len(shape) < 2:
        raise ValueError(f"x must have two dimensions or more, got shape {shape}")
    try:
        index = operator.index(axis)
    except TypeError:
        raise TypeError(f"axis must be an integer, got {axis!r}") from None
    if not -len(shape) <= index < len(shape):
        raise ValueError(f"axis must be from {-len(shape)} to {len(shape) - 1} for x of shape {shape}, got {axis}")
    if not fills_memory(shape, strides, dtype.itemsize):
        strides = c_strides(shape, dtype.itemsize)
    return Layout(shape, strides, native_floats("x", dtype), index % len(shape))


def c_strides(shape, itemsize):
    """Return the strides, in bytes, of a C-ordered array."""
    return tuple(itemsize * math.prod(shape[i + 1:]) for i in range(len(shape)))
