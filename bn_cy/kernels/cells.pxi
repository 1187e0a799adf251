# The first pass over a block: cell by cell, and the sums of cells in a tree of halves.
#
# Derivation and twins: those of terms.pxi; this is the order of its sums beyond a piece of rows.
# Tests: tests/test_same_bits.py, tests/test_accuracy.py.
# Bytes moved: those of terms.pxi; of partial sums 16 a feature and cell.


cdef void sum_cell(
    double[:, ::1] total, const floating[:, :, ::1] x, const floating[:, :, ::1] dout,
    const real[:, ::1] centres, const Grid *g, const Block *b, Py_ssize_t cell, Direction way,
) noexcept nogil:
    """A block in one cell: the sums of its columns, in `total` itself where these are features."""
    cdef double storage[SUMS * SCRATCH]
    cdef bint apart = b.width > b.size
    cdef double[:, ::1] columns = rows_of(
        <double *>aligned(storage) if apart else &total[0, 0], SUMS, b.width,
        b.pitch if apart else total.strides[0] // <Py_ssize_t>sizeof(double))
    cdef Piece p = cell_at(g, b, cell)
    clear(row_of(&columns[FIRST, 0], b.width))
    clear(row_of(&columns[SECOND, 0], b.width))
    while next_piece(&p, g, b):
        if g.runs:
            sum_run(
                &columns[FIRST, p.column], &columns[SECOND, p.column],
                &x[0, 0, 0] + p.offset, &dout[0, 0, 0] + p.offset, p.rows, p.width, g.stride,
                &g.signs, p.offset, centres[MINUS_CENTRE, p.column],
                centres[CENTRE_SCALE, p.column], gate_at(centres, p.column, way), way)
        else:
            sum_columns(
                columns, rows_of(&x[0, 0, 0] + p.offset, p.rows, p.width, g.stride),
                rows_of(&dout[0, 0, 0] + p.offset, p.rows, p.width, g.stride),
                &g.signs, p.offset, centres, way)
    if apart:
        fold(row_of(&total[FIRST, 0], b.size), row_of(&columns[FIRST, 0], b.width), g, b)
        fold(row_of(&total[SECOND, 0], b.size), row_of(&columns[SECOND, 0], b.width), g, b)


cdef inline void sum_cell_of(
    int way, double[:, ::1] total, const floating[:, :, ::1] x, const floating[:, :, ::1] dout,
    const real[:, ::1] centres, const Grid *g, const Block *b, Py_ssize_t cell,
) noexcept nogil:
    """From a direction at run time to one that is compiled."""
    if way == FORWARDS:
        sum_cell(total, x, x, centres, g, b, cell, FORWARDS)
    elif way == BACKWARDS:
        sum_cell(total, x, dout, centres, g, b, cell, BACKWARDS)
    elif way == GATED:
        sum_cell(total, x, dout, centres, g, b, cell, GATED)
    else:
        sum_cell(total, x, dout, centres, g, b, cell, SIGNED)


cdef void partial_sums(
    int way, double[:, ::1] total, const floating[:, :, ::1] x, const floating[:, :, ::1] dout,
    const real[:, ::1] centres, const Grid *g, const Block *b, Py_ssize_t cell, Py_ssize_t cells,
    double[:, :, ::1] levels, Py_ssize_t level,
) noexcept nogil:
    """Of a power of two of cells: the sum of those of its halves, the second of which is summed in
    a row of `levels`."""
    cdef Py_ssize_t half = cells // 2
    cdef double[:, ::1] second
    if cells == 1:
        sum_cell_of(way, total, x, dout, centres, g, b, cell)
    else:
        second = of_level(levels, level, b)
        partial_sums(way, total, x, dout, centres, g, b, cell, half, levels, level)
        partial_sums(way, second, x, dout, centres, g, b, cell + half, half, levels, level + 1)
        add_sums(total, second)


cdef inline void sums_of_block(
    int way, double[:, ::1] total, const floating[:, :, ::1] x, const floating[:, :, ::1] dout,
    const real[:, ::1] centres, const Grid *g, const Block *b, double[:, :, ::1] levels,
) noexcept nogil:
    """Of all cells."""
    partial_sums(way, total, x, dout, centres, g, b, 0, g.cells, levels, 0)
