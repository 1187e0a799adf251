# The second passes: y or dx of every value, one family for both directions.
#
#   forward   y = gamma*invstd*(x - mean) + beta
#   backward  dx = gamma*invstd*(dout - dbeta/n - xhat*dgamma/n), xhat = (x - mean)*invstd
#
# Derivation: the last line of the forward, and the closed form of the backward.
# Twins: `reference.forward`, `reference.backward_closed_form`.
# Tests: tests/test_kernels.py, tests/test_accuracy.py, tests/test_same_bits.py.
# Bytes moved: 8 a value forward and 12 backward (float32): x, or x and dout, are read, and y or dx
# is written; 4 more where that goes through the cache, which reads its lines first.
#
# The direction is that of sums.pxi, and `value` is what it is. In the forward dout is x, and has no
# say. A dx of frozen statistics is written forwards, of dout: see `prepare_frozen_gradient`.

from libc.stdint cimport uintptr_t
from libc.string cimport memcpy

# What is needed of every column, a row of scratch each. HI is the mean in the data's type, so that
# x - hi loses no digits; what is left of the mean, lo, goes into OFFSET.
cdef enum:
    HI
    SCALE     # of x - hi: gamma*invstd; backward: invstd
    OFFSET    # added: beta - lo*gamma*invstd; backward, subtracted: dbeta/n - lo*invstd*dgamma/n
    PRODUCT   # backward: dgamma/n
    DX_SCALE  # backward: gamma*invstd
    PARAMETERS

cdef enum:  # how values are written
    DIRECT     # straight to the output, an array of its own
    STREAMING  # past the cache, where the whole output would not stay in it
    IN_PLACE   # over what is read: by a line of scratch, as loops are made for separate arrays

cdef enum:
    # Values between two writes past the cache: eight lines, so that reads and writes overlap. More
    # fill the buffers of writes, fewer leave the cost of what is around the loop.
    BURST = 128


cdef inline floating value(
    floating x, floating dout, floating hi, floating scale, floating offset, floating product,
    floating dx_scale, Direction way,
) noexcept nogil:
    if Direction is Backwards:
        return ((dout - offset) - ((x - hi) * scale) * product) * dx_scale
    else:
        return (x - hi) * scale + offset


cdef inline void write_values(
    floating[::1] out, const floating[::1] x, const floating[::1] dout,
    const floating[:, ::1] columns, bint run, Direction way,
) noexcept nogil:
    """Of one row. A run has one column for all its values."""
    cdef floating hi, scale, offset, product, dx_scale
    cdef Py_ssize_t j
    if run:
        hi, scale, offset = columns[HI, 0], columns[SCALE, 0], columns[OFFSET, 0]
        product, dx_scale = columns[PRODUCT, 0], columns[DX_SCALE, 0]
        for j in range(out.shape[0]):
            out[j] = value(x[j], dout[j], hi, scale, offset, product, dx_scale, way)
    else:
        for j in range(out.shape[0]):
            out[j] = value(
                x[j], dout[j], columns[HI, j], columns[SCALE, j], columns[OFFSET, j],
                columns[PRODUCT, j], columns[DX_SCALE, j], way)


cdef inline void write_burst(
    floating *target, const floating[::1] x, const floating[::1] dout,
    const floating[:, ::1] columns, bint run, int writing, Py_ssize_t ahead, Direction way,
) noexcept nogil:
    """A burst of values, by a line of scratch. Only x is fetched, not dout: more fetches would take
    the line buffers that the stores need."""
    cdef floating storage[BURST + 2 * LINE]
    cdef floating *line = <floating *>aligned(storage)
    cdef size_t size = x.shape[0] * sizeof(floating)
    write_values(row_of(line, x.shape[0]), x, dout, columns, run, way)
    if writing == STREAMING:
        stream(target, line, size)
    else:
        memcpy(target, line, size)
    if ahead:
        fetch(&x[0] + ahead, size)


cdef inline Py_ssize_t burst_width(const floating *target, Py_ssize_t left) noexcept nogil:
    """Values of the next burst: to the end of a cache line, or to that of the row where no line is
    left after it."""
    cdef Py_ssize_t into_line = (<uintptr_t>target & 63) // sizeof(floating)
    return BURST - into_line if left >= BURST - into_line + LINE else left


cdef inline void write_row(
    floating[::1] out, const floating[::1] x, const floating[::1] dout,
    const floating[:, ::1] columns, bint run, int writing, Py_ssize_t ahead, Direction way,
) noexcept nogil:
    cdef Py_ssize_t start = 0, width, c
    if writing == DIRECT:
        write_values(out, x, dout, columns, run, way)
        return
    while start < out.shape[0]:
        width = burst_width(&out[start], out.shape[0] - start)
        c = 0 if run else start
        if width == BURST:  # as a constant
            write_burst(
                &out[start], row_of(&x[start], BURST), row_of(&dout[start], BURST),
                tile(columns, 0, c, PARAMETERS, 1 if run else BURST),
                run, writing, ahead, way)
        else:
            write_burst(
                &out[start], row_of(&x[start], width), row_of(&dout[start], width),
                tile(columns, 0, c, PARAMETERS, 1 if run else width),
                run, writing, ahead, way)
        start += width


cdef inline void write_piece(
    floating[:, ::1] out, const floating[:, ::1] x, const floating[:, ::1] dout,
    const floating[:, ::1] columns, bint run, int writing, Py_ssize_t ahead, Direction way,
) noexcept nogil:
    cdef Py_ssize_t i, width = out.shape[1]
    for i in range(out.shape[0]):
        write_row(
            row_of(&out[i, 0], width), row_of(&x[i, 0], width), row_of(&dout[i, 0], width),
            columns, run, writing, ahead, way)


cdef inline void write_cell(
    floating[:, :, ::1] out, const floating[:, :, ::1] x, const floating[:, :, ::1] dout,
    const floating[:, ::1] columns, const Grid *g, const Block *b, Py_ssize_t cell, int writing,
    Py_ssize_t ahead, Direction way,
) noexcept nogil:
    """What a block has in one cell."""
    cdef Piece p = cell_at(g, b, cell)
    while next_piece(&p, g, b):
        write_piece(
            rows_of(&out[0, 0, 0] + p.offset, p.rows, p.width, g.stride),
            rows_of(&x[0, 0, 0] + p.offset, p.rows, p.width, g.stride),
            rows_of(&dout[0, 0, 0] + p.offset, p.rows, p.width, g.stride),
            tile(columns, 0, p.column, PARAMETERS, 1 if g.runs else p.width),
            g.runs, writing, ahead, way)
