"""Batches of which some positions do not count: padding, missing examples.

The rows that count are gathered into a batch of their own, and what comes of it is scattered back.
So the kernels know nothing of masks, and the result has the bits of a batch of these rows.
"""

import numpy as np

from bn_cy._arguments import as_plain
from bn_cy._checks import check_like, native, writable
from bn_cy._layout import axis_of

__all__ = ["Kept", "kept_of"]


def kept_of(x, axis, mask, lengths):
    """Return which positions count, or None for all of them."""
    return None if mask is None and lengths is None else Kept(x, axis, mask, lengths)


class Kept:
    """Which positions of a batch count, a position being an index along all axes but the features'.

    Parameters
    ----------
    x : array
        The batch.
    axis : int
        Its feature axis.
    mask : array of bool, or None
        True counts; of the shape of `x` without the feature axis, or broadcast to it.
    lengths : array of int, or None
        In place of a mask: how many positions of each sequence count. Sequences lie along the
        second of the axes that are not the features', examples along the first.
    """

    def __init__(self, x, axis, mask, lengths):
        self.shape, self.dtype = x.shape, native(x.dtype)
        self.axis = axis_of(x, axis)
        positions = self.shape[: self.axis] + self.shape[self.axis + 1 :]
        if mask is None:
            mask = within(lengths, positions)
        elif lengths is None:
            mask = checked_mask(mask, positions)
        else:
            raise ValueError("mask and lengths say the same in two ways: give one of them")
        self.mask = np.array(mask)  # a copy: it must not change before the backward

    def check_variance(self):
        """Refuse a mask by which each feature has one value, which has no variance."""
        if np.count_nonzero(self.mask) == 1:
            raise ValueError(
                "x must have two values per feature or more to have a variance, and mask or "
                f"lengths leave one of {self.mask.size}"
            )

    def gather(self, name, array):
        """Return the rows that count as an array of as many dimensions, features along the axis."""
        array = as_plain(name, array)
        if array.shape != self.shape:
            raise ValueError(f"{name} must have the shape {self.shape} of x, got {array.shape}")
        rows = np.moveaxis(array, self.axis, -1)[self.mask]
        # Here and not by the kernels, whose copy may have another memory order, and so other bits.
        rows = rows.astype(native(rows.dtype), copy=False)
        ones = (1,) * (len(self.shape) - 2)
        return np.moveaxis(rows.reshape(len(rows), *ones, self.shape[self.axis]), -1, self.axis)

    def gathered(self, x, residual):
        """Return the batch, no output, and the residual, as a forward takes them."""
        if residual is not None:
            residual = as_plain("residual", residual)
            check_like("residual", residual, self)
            residual = self.gather("residual", residual)
        return self.gather("x", x), None, residual

    def target(self, out):
        """Return where a result will be scattered to: `out`, if it fits, or a new array."""
        if out is None:
            return np.zeros(self.shape, self.dtype)
        return writable(out, self)

    def scatter(self, rows, target, out=None):
        """Write rows where they came from, and 0 elsewhere; return `out`, whose memory it is."""
        target[...] = 0
        rows = np.moveaxis(rows, self.axis, -1)
        np.moveaxis(target, self.axis, -1)[self.mask] = rows.reshape(len(rows), rows.shape[-1])
        return target if out is None else out


def checked_mask(mask, positions):
    """Return a mask of the shape of the positions."""
    mask = as_plain("mask", mask)
    if mask.shape == (0,) and 0 in positions:  # [], which knows neither dtype nor dimensions
        mask = np.zeros(positions, bool)
    if mask.dtype != bool:
        raise TypeError(f"mask must be of booleans (True counts), got {mask.dtype}")
    try:
        return np.broadcast_to(mask, positions)
    except ValueError:
        raise ValueError(
            f"mask must have the shape {positions}, that of x without the feature axis, or "
            f"broadcast to it, got {mask.shape}"
        ) from None


def within(lengths, positions):
    """Return the mask of sequences of these lengths."""
    lengths = as_plain("lengths", lengths)
    if len(positions) < 2:
        raise ValueError(
            "lengths are of sequences: x must have three dimensions or more, such as "
            f"(examples, features, steps); got {len(positions) + 1}"
        )
    examples, steps, *others = positions
    if lengths.dtype.kind not in "iu" and lengths.size:  # [] is of float64
        raise TypeError(f"lengths must be of integers, got {lengths.dtype}")
    if lengths.shape != (examples,):
        raise ValueError(
            f"lengths must have shape ({examples},), one for each example, got {lengths.shape}"
        )
    wrong = np.flatnonzero((lengths < 0) | (lengths > steps))
    if wrong.size:
        raise ValueError(
            f"lengths must be from 0 to {steps}, the steps of x, got {lengths[wrong[0]]} at "
            f"example {wrong[0]}"
        )
    mask = np.arange(steps) < lengths[:, np.newaxis]
    return np.broadcast_to(mask.reshape(examples, steps, *[1] * len(others)), positions)
