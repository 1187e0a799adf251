"""How arrays lie in memory, and what may have been written there.

An array is a view of bytes of its own, with margins. The bytes around and between its values are a
NaN that no arithmetic makes: whoever reads them shows it, and whoever writes them changes them. An
output holds the same NaN before the call: what still has it afterwards was never written.
"""

import tempfile
from typing import NamedTuple

import numpy as np
from bn_cy._buffers import Buffer

POISON = 0xFF  # in every byte
MARGIN = 256
LINE = 64


class Layout(NamedTuple):
    """A way to lie in memory."""

    order: tuple  # the axes, from the slowest to the fastest
    steps: tuple  # of each axis: from value to value; below 0, backwards
    repeated: tuple  # axes whose values are all the same one
    start: int  # bytes from the beginning of a cache line
    swapped: bool  # the other byte order
    read_only: bool
    mapped: bool  # in a file


def plain(ndim, start=0):
    """C order, in the processor's byte order."""
    return Layout(tuple(range(ndim)), (1,) * ndim, (), start, False, False, False)


def draw_layout(source, ndim, itemsize, output=False, repeated=False):
    """Draw a layout; that of an output can be written, and is in the processor's byte order."""
    axes = list(range(ndim))
    layout = plain(ndim, itemsize * source.pick((0, 1, 3, 15)))
    kind = source.pick(("plain", "plain", "order", "steps", "odd", "other", "all"))
    if kind in ("order", "all"):
        order = [axes.pop(source.integer(0, len(axes) - 1)) for _ in range(ndim)]
        layout = layout._replace(order=tuple(order))
    if kind in ("steps", "all"):
        steps = [1] * ndim
        steps[source.integer(0, ndim - 1)] = source.pick((2, -1, 3, -2))
        layout = layout._replace(steps=tuple(steps))
    if kind == "odd":
        layout = layout._replace(start=source.pick((1, 2, itemsize // 2, itemsize + 1)))
    if kind == "other" and not output:
        what = source.pick(("read_only", "swapped", "repeated", "mapped"))
        if what == "repeated":
            if repeated:
                layout = layout._replace(repeated=(source.integer(0, ndim - 1),))
        elif what != "mapped" or source.chance(20):
            layout = layout._replace(**{what: True})
    return layout


class Held:
    """An array in a layout, and the bytes that it began with."""

    def __init__(self, values, layout):
        dtype = values.dtype.newbyteorder() if layout.swapped else values.dtype
        shape = values.shape
        values = values[
            tuple(slice(1 if i in layout.repeated else None) for i in range(len(shape)))
        ]
        grown = [values.shape[i] * abs(layout.steps[i]) for i in layout.order]
        size = int(np.prod(grown)) * dtype.itemsize
        self.raw = self._bytes(size + 2 * MARGIN + LINE, layout.mapped)
        at = MARGIN + (-self.raw.ctypes.data - MARGIN) % LINE + layout.start
        array = np.ndarray(grown, dtype, self.raw, at).transpose(np.argsort(layout.order))
        array = array[tuple(slice(None, None, step) for step in layout.steps)]
        array[...] = values
        if layout.repeated:
            array = np.broadcast_to(array, shape)
        elif layout.read_only:
            array.flags.writeable = False
        self.array = array
        self.before = self.raw.copy()

    @staticmethod
    def _bytes(size, mapped):
        if mapped:
            with tempfile.TemporaryFile() as file:
                raw = np.memmap(file, np.uint8, "w+", shape=(size,))
        else:
            raw = np.empty(size, np.uint8)
        raw[:] = POISON
        return raw

    def restore(self):
        """Put back what was there before the call."""
        self.raw[:] = self.before

    def is_unchanged(self, written=None):
        """Tell whether no byte has changed but those of a view that may be written."""
        if written is None:
            return np.array_equal(self.raw, self.before)
        result = written.copy()
        now = self.raw.copy()
        self.restore()
        written[...] = result
        same = np.array_equal(self.raw, now)
        self.raw[:] = now
        return same


def poisoned(shape, dtype):
    """Return an array of the NaN that stands for what was never written."""
    return (
        np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, POISON, np.uint8)
        .view(dtype)
        .reshape(shape)
    )


def never_written(array):
    """Tell which values are still poison."""
    array = np.ascontiguousarray(array)
    return array.view(f"u{array.itemsize}") == poisoned((), array.dtype).view(f"u{array.itemsize}")


def litter(*sizes):
    """Leave poison where the next outputs of these sizes in bytes are likely to be made."""
    arrays = [np.full(size, POISON, np.uint8) for size in sizes for _ in range(3)]
    arrays += [np.frombuffer(Buffer(size), np.uint8) for size in sizes if size >= 1 << 18]
    for array in arrays:
        array[:] = POISON
