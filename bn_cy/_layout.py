"""An array and its feature axis, as the (outer, features, inner) view that the kernels take.

An array whose values fill one stretch of memory in the order of some permutation of its axes (C and Fortran order,
an NCHW view of NHWC data) is such a view as it is. Anything else is copied once.
"""

import math
import operator
from functools import lru_cache

import numpy as np

from bn_cy import _buffers

RECYCLED = 1 << 18  # bytes from which an output comes from the pool; below, malloc is faster


class Layout:
    """How arrays of one shape, memory order and dtype are seen by the kernels.

    Attributes
    ----------
    shape : tuple of int
        The user's shape.
    strides : tuple of int or None
        The user's strides, in bytes; None if the array has to be copied into C order.
    view_shape : tuple of int
        (outer, features, inner).
    features, count, size : int
        Features, values of a feature, values altogether.
    """

    __slots__ = ("_order", "_restore", "_stored", "count", "dtype", "features", "nbytes", "shape", "size", "strides",
                 "view_shape")

    def __init__(self, shape, strides, dtype, axis):
        order = sorted(range(len(shape)), key=lambda i: -strides[i])
        stored = tuple(shape[i] for i in order)
        self.shape = shape
        self.dtype = dtype
        self.features = shape[axis]
        self.size = math.prod(shape)
        self.count = math.prod(shape[:axis] + shape[axis + 1:])
        self.nbytes = self.size * dtype.itemsize
        self.strides = strides if fills_memory(stored, [strides[i] for i in order], dtype.itemsize) else None
        at = order.index(axis)
        self.view_shape = math.prod(stored[:at]), shape[axis], math.prod(stored[at + 1:])
        in_order = order == sorted(order)
        self._stored = stored
        self._order = None if in_order else order
        self._restore = None if in_order else [order.index(i) for i in range(len(order))]

    def view(self, array):
        """Return the (outer, features, inner) view of an array that has this layout."""
        if self._order is not None:
            array = array.transpose(self._order)
        return array.reshape(self.view_shape)

    def empty(self):
        """Return a new array of this layout, not filled, and its view."""
        if self.nbytes < RECYCLED:
            view = np.empty(self.view_shape, self.dtype)
        else:
            view = np.ndarray(self.view_shape, self.dtype, _buffers.Buffer(self.nbytes))
        array = view.reshape(self._stored)
        return (array if self._restore is None else array.transpose(self._restore)), view

    def compact(self, array):
        """Return the array itself if it has this layout, or a copy that has."""
        if array.strides == self.strides and array.dtype is self.dtype and array.flags.aligned:
            return array
        copy, _ = self.empty()
        copy[...] = array
        return copy


def fills_memory(shape, strides, itemsize):
    """Tell whether axes, from the slowest to the fastest, follow each other without a gap."""
    expected = itemsize
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


@lru_cache(maxsize=1024, typed=True)  # 1.0 is no axis, though it equals 1
def layout_of(shape, strides, dtype, axis):
    """Return the Layout of arrays like this one, that of a C-ordered copy where no view is possible.

    Raises
    ------
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
    layout = Layout(shape, strides, dtype, index % len(shape))
    if layout.strides is None:
        layout = Layout(shape, c_strides(shape, dtype.itemsize), dtype, index % len(shape))
    return layout


def c_strides(shape, itemsize):
    """Return the strides, in bytes, of a C-ordered array."""
    return tuple(itemsize * math.prod(shape[i + 1:]) for i in range(len(shape)))
