# The second passes: y or dx of every value, one family for both directions.
#
#   forward   y = gamma*invstd*(x - mean) + beta
#             a ReLU of it, a residual added to it, or both
#   backward  dx = gamma*invstd*(dout - dbeta/n - xhat*dgamma/n), xhat = (x - mean)*invstd
#             the same of dout where y > 0, else of 0: through a ReLU
#             and, with a residual, its gradient: dout, or what the ReLU lets through of it
#
# Derivation: the last line of the forward, and the closed form of the backward.
# Twins: `reference.forward`, `reference.backward_closed_form`.
# Tests: tests/test_kernels.py, tests/test_activation.py, tests/test_accuracy.py,
# tests/test_same_bits.py.
# Bytes moved: 8 a value forward and 12 backward (float32): x, or x and dout, are read, and y or dx
# is written; 4 more where that goes through the cache, which reads its lines first; 4 for a
# residual.
#
# What is written is an argument for its type alone, as the direction in terms.pxi, and `value` is
# what it is. Where one array is read, it stands for both. A dx of frozen statistics is written
# forwards, of dout: see `prepare_frozen_gradient`.

from libc.stdint cimport uintptr_t
from libc.string cimport memcpy

# What is needed of every column, a row of scratch each. HI is the mean in the data's type, so that
# x - hi loses no digits; what is left of the mean, lo, goes into OFFSET.
cdef enum:
    HI
    SCALE     # of x - hi: gamma*invstd; backward: invstd
    OFFSET    # added: INTERCEPT; backward, subtracted: dbeta/n - lo*invstd*dgamma/n
    PRODUCT   # backward: dgamma/n
    DX_SCALE  # backward: gamma*invstd, which is the SCALE of the forward
    GATE      # gated: the OFFSET of the forward
    PARAMETERS

cdef enum:  # how values are written
    DIRECT     # straight to the output, an array of its own
    STREAMING  # past the cache, where the whole output would not stay in it
    IN_PLACE   # over what is read: by a line of scratch, as loops are made for separate arrays

cdef enum:
    # Values between two writes past the cache: eight lines, so that reads and writes overlap. More
    # fill the buffers of writes, fewer leave the cost of what is around the loop.
    BURST = 128


cdef enum Rectified:  # forward, with a ReLU
    RECTIFIED = SIGNED + 1
cdef enum Added:      # forward, with a residual in the place of dout
    ADDED = RECTIFIED + 1
cdef enum Joined:     # forward, with both
    JOINED = ADDED + 1
cdef enum Passed:     # backward through the ReLU of frozen statistics, with the forward's columns
    PASSED = JOINED + 1
cdef enum Handed:     # of frozen statistics and with a residual: dx of dout alone, and its gradient
    HANDED = PASSED + 1
ctypedef fused Written:
    Forwards
    Backwards
    Gated
    Signed
    Rectified
    Added
    Joined
    Passed
    Handed


cdef inline floating rectified(floating y) noexcept nogil:
    """max(y, 0), and NaN stays NaN."""
    return 0 if y <= 0 else y


cdef inline floating dx_of(
    floating dout, floating from_mean, floating scale, floating offset, floating product,
    floating dx_scale,
) noexcept nogil:
    return ((dout - offset) - (from_mean * scale) * product) * dx_scale


cdef inline floating value(
    floating x, floating dout, floating hi, floating scale, floating offset, floating product,
    floating dx_scale, floating gate, Written way,
) noexcept nogil:
    cdef floating from_mean = x - hi
    if Written is Forwards:
        return from_mean * scale + offset
    elif Written is Handed:
        return (dout - hi) * scale + offset
    elif Written is Rectified:
        return rectified(from_mean * scale + offset)
    elif Written is Added:
        return (from_mean * scale + offset) + dout
    elif Written is Joined:
        return rectified((from_mean * scale + offset) + dout)
    elif Written is Passed:
        return opened(dout, from_mean * scale, offset) * scale
    elif Written is Backwards or Written is Signed:
        return dx_of(dout, from_mean, scale, offset, product, dx_scale)
    else:
        return dx_of(
            opened(dout, from_mean * dx_scale, gate), from_mean, scale, offset, product, dx_scale)


cdef inline void write_values(
    floating[::1] out, const floating[::1] x, const floating[::1] dout,
    const floating[:, ::1] columns, bint run, Written way,
) noexcept nogil:
    """Of one row. A run has one column for all its values."""
    cdef floating hi, scale, offset, product, dx_scale, gate
    cdef Py_ssize_t j
    if run:
        hi, scale, offset = columns[HI, 0], columns[SCALE, 0], columns[OFFSET, 0]
        product, dx_scale, gate = columns[PRODUCT, 0], columns[DX_SCALE, 0], columns[GATE, 0]
        for j in range(out.shape[0]):
            out[j] = value(x[j], dout[j], hi, scale, offset, product, dx_scale, gate, way)
    else:
        for j in range(out.shape[0]):
            out[j] = value(
                x[j], dout[j], columns[HI, j], columns[SCALE, j], columns[OFFSET, j],
                columns[PRODUCT, j], columns[DX_SCALE, j], columns[GATE, j], way)


cdef inline void put(
    floating *target, const floating *line, size_t size, int writing,
) noexcept nogil:
    if writing == STREAMING:
        stream(target, line, size)
    else:
        memcpy(target, line, size)


cdef inline void write_burst(
    floating *target, const floating[::1] x, const floating[::1] dout,
    const floating[:, ::1] columns, bint run, int writing, Py_ssize_t ahead, Py_ssize_t beside,
    const Signs *signs, Py_ssize_t offset, Written way,
) noexcept nogil:
    """A burst of values, by a line of scratch. x is fetched, and dout only where it is a residual,
    or goes through a ReLU or into the gradient of a residual: elsewhere more fetches would take the
    line buffers of the stores."""
    cdef floating storage[BURST + 2 * LINE]
    cdef floating second_storage[BURST + 2 * LINE]
    cdef floating *line = <floating *>aligned(storage)
    cdef floating *dresidual = <floating *>aligned(second_storage)
    cdef size_t size = x.shape[0] * sizeof(floating)
    if Written is Signed or Written is Handed:
        open_values(dresidual, &dout[0], signs, offset, x.shape[0])
        put(<floating *>signs.let_through + offset, dresidual, size, writing)
        write_values(
            row_of(line, x.shape[0]), x, row_of(dresidual, x.shape[0]), columns, run, way)
    else:
        write_values(row_of(line, x.shape[0]), x, dout, columns, run, way)
    if Written is Joined:
        set_signs(signs, offset, line, x.shape[0])
    put(target, line, size, writing)
    if ahead:
        fetch(&x[0] + ahead, size)
    if Written is Added or Written is Joined or Written is Gated or Written is Signed \
            or Written is Passed:
        if beside:
            fetch(&dout[0] + beside, size)


cdef inline Py_ssize_t burst_width(const floating *target, Py_ssize_t left) noexcept nogil:
    """Values of the next burst: to the end of a cache line, or to that of the row where no line is
    left after it."""
    cdef Py_ssize_t into_line = (<uintptr_t>target & 63) // sizeof(floating)
    return BURST - into_line if left >= BURST - into_line + LINE else left


cdef inline void write_row(
    floating[::1] out, const floating[::1] x, const floating[::1] dout,
    const floating[:, ::1] columns, bint run, int writing, Py_ssize_t ahead, Py_ssize_t beside,
    const Signs *signs, Py_ssize_t offset, Written way,
) noexcept nogil:
    cdef Py_ssize_t start = 0, width, c
    cdef floating *dresidual
    if writing == DIRECT:
        if Written is Signed or Written is Handed:
            dresidual = <floating *>signs.let_through + offset
            open_values(dresidual, &dout[0], signs, offset, out.shape[0])
            write_values(out, x, row_of(dresidual, out.shape[0]), columns, run, way)
        else:
            write_values(out, x, dout, columns, run, way)
        if Written is Joined:
            set_signs(signs, offset, &out[0], out.shape[0])
        return
    while start < out.shape[0]:
        width = burst_width(&out[start], out.shape[0] - start)
        c = 0 if run else start
        if width == BURST:  # as a constant
            write_burst(
                &out[start], row_of(&x[start], BURST), row_of(&dout[start], BURST),
                tile(columns, 0, c, PARAMETERS, 1 if run else BURST),
                run, writing, ahead, beside, signs, offset + start, way)
        else:
            write_burst(
                &out[start], row_of(&x[start], width), row_of(&dout[start], width),
                tile(columns, 0, c, PARAMETERS, 1 if run else width),
                run, writing, ahead, beside, signs, offset + start, way)
        start += width


cdef inline void write_piece(
    floating[:, ::1] out, const floating[:, ::1] x, const floating[:, ::1] dout,
    const floating[:, ::1] columns, bint run, int writing, Py_ssize_t ahead, Py_ssize_t beside,
    const Signs *signs, Py_ssize_t offset, Written way,
) noexcept nogil:
    cdef Py_ssize_t i, width = out.shape[1]
    cdef Py_ssize_t stride = out.strides[0] // <Py_ssize_t>sizeof(floating)
    for i in range(out.shape[0]):
        write_row(
            row_of(&out[i, 0], width), row_of(&x[i, 0], width), row_of(&dout[i, 0], width),
            columns, run, writing, ahead, beside, signs, offset + i * stride, way)


cdef void write_cell(
    floating[:, :, ::1] out, const floating[:, :, ::1] x, const floating[:, :, ::1] dout,
    const floating[:, ::1] columns, const Grid *g, const Block *b, Py_ssize_t cell,
    int writing, Py_ssize_t ahead, Py_ssize_t beside, Written way,
) noexcept nogil:
    """What a block has in one cell."""
    cdef Piece p = cell_at(g, b, cell)
    while next_piece(&p, g, b):
        write_piece(
            rows_of(&out[0, 0, 0] + p.offset, p.rows, p.width, g.stride),
            rows_of(&x[0, 0, 0] + p.offset, p.rows, p.width, g.stride),
            rows_of(&dout[0, 0, 0] + p.offset, p.rows, p.width, g.stride),
            tile(columns, 0, p.column, PARAMETERS, 1 if g.runs else p.width),
            g.runs, writing, ahead, beside, &g.signs, p.offset, way)


cdef inline void write_cell_of(
    int way, floating[:, :, ::1] out, const floating[:, :, ::1] x, const floating[:, :, ::1] dout,
    const floating[:, ::1] columns, const Grid *g, const Block *b, Py_ssize_t cell,
    int writing, Py_ssize_t ahead, Py_ssize_t beside,
) noexcept nogil:
    """From what is to be written at run time to what is compiled."""
    if way == FORWARDS:  # of x, which is in the place of dout, or of a dout
        write_cell(out, dout, dout, columns, g, b, cell, writing, ahead, beside, FORWARDS)
    elif way == BACKWARDS:
        write_cell(out, x, dout, columns, g, b, cell, writing, ahead, beside, BACKWARDS)
    elif way == GATED:
        write_cell(out, x, dout, columns, g, b, cell, writing, ahead, beside, GATED)
    elif way == SIGNED:
        write_cell(out, x, dout, columns, g, b, cell, writing, ahead, beside, SIGNED)
    elif way == RECTIFIED:
        write_cell(out, x, x, columns, g, b, cell, writing, ahead, beside, RECTIFIED)
    elif way == ADDED:
        write_cell(out, x, dout, columns, g, b, cell, writing, ahead, beside, ADDED)
    elif way == JOINED:
        write_cell(out, x, dout, columns, g, b, cell, writing, ahead, beside, JOINED)
    elif way == PASSED:
        write_cell(out, x, dout, columns, g, b, cell, writing, ahead, beside, PASSED)
    else:
        write_cell(out, dout, dout, columns, g, b, cell, writing, ahead, beside, HANDED)
