# The first passes over columns: each column has its sums.
#
# Derivation, twins, tests and bytes moved: those of terms.pxi, which has what is added up. Behind
# the signs of a ReLU, one bit a value more is read.
#
# What signs let through of a group's dout lies in scratch, unless the sums put it into the gradient
# of the residual.

cdef enum:
    # Bytes of a row that go through signs at a time: a group is 8 KB, a quarter of a small L1.
    PORTION = 1024


cdef inline floating[:, ::1] pair_of(
    const floating[:, ::1] rows, Py_ssize_t i, Py_ssize_t distance,
) noexcept nogil:
    """Row i and the one so many rows below it."""
    cdef Py_ssize_t stride = rows.strides[0] // <Py_ssize_t>sizeof(floating)
    return rows_of(&rows[i, 0], 2, rows.shape[1], distance * stride)


cdef void compare_rows(
    unsigned *bits, const floating[:, ::1] x, const floating[:, ::1] dout, const Signs *signs,
    Py_ssize_t offset, const real[:, ::1] centres, Direction way,
) noexcept nogil:
    """A row, or the next one, with some that are DISTANCES below it. Of one alone all values may be
    the shift, and have no bits."""
    cdef floating room[2 * WIDTH]
    cdef const floating[:, ::1] xs
    cdef const floating[:, ::1] douts
    cdef Py_ssize_t i, j, k, stride = x.strides[0] // <Py_ssize_t>sizeof(floating)
    cdef real scale
    for k in range(min(<Py_ssize_t>APART, x.shape[0] // ROWS_FOR_EACH)):
        if 2 * DISTANCES[k] > x.shape[0]:
            return
        i = COMPARED + k % 2
        xs = pair_of(x, i, DISTANCES[k])
        douts = upstream_rows(
            room, pair_of(dout, i, DISTANCES[k]), signs, offset + i * stride, way)
        for j in range(x.shape[1]):
            scale = 1 if Direction is Forwards else centres[CENTRE_SCALE, j]
            bits[j] |= repeated_rows(
                xs, douts, 0, 1, j, centres[CENTRE, j], scale, gate_at(centres, j, way), way)


cdef void sum_group(
    double[:, ::1] sums, unsigned *bits, const floating[:, ::1] x, const floating[:, ::1] dout,
    const real[:, ::1] centres, Direction way,
) noexcept nogil:
    """Eight rows. Of two arrays four rows and then the others: sixteen lines that are a multiple of
    4 KB apart push each other out of L1."""
    cdef real terms[WIDTH]
    cdef real products[WIDTH]
    cdef real shift, scale
    cdef Gate gate
    cdef Py_ssize_t j
    if Direction is Forwards:
        for j in range(x.shape[1]):
            shift = scale = centres[CENTRE, j]
            gate = gate_at(centres, j, way)
            sums[FIRST, j] += terms8(x, dout, 0, j, shift, gate, way)
            sums[SECOND, j] += products8(x, dout, 0, j, shift, scale, gate, way)
            bits[j] |= repeated_rows(
                x, dout, COMPARED, COMPARED + 1, j, shift, scale, gate, way)
    else:
        for j in range(x.shape[1]):
            shift, scale = centres[CENTRE, j], centres[CENTRE_SCALE, j]
            gate = gate_at(centres, j, way)
            terms[j] = terms4(x, dout, 0, j, shift, gate, way)
            products[j] = products4(x, dout, 0, j, shift, scale, gate, way)
            bits[j] |= repeated_rows(
                x, dout, COMPARED, COMPARED + 1, j, shift, scale, gate, way)
        for j in range(x.shape[1]):
            shift, scale = centres[CENTRE, j], centres[CENTRE_SCALE, j]
            gate = gate_at(centres, j, way)
            sums[FIRST, j] += terms[j] + terms4(x, dout, HALF, j, shift, gate, way)
            sums[SECOND, j] += products[j] + products4(x, dout, HALF, j, shift, scale, gate, way)


cdef inline void sum_few(
    double[:, ::1] sums, const floating[:, ::1] x, const floating[:, ::1] dout,
    const real[:, ::1] centres, Direction way,
) noexcept nogil:
    """Fewer rows than a group: four, and single ones."""
    cdef Py_ssize_t rows = x.shape[0], width = x.shape[1], i = 0, j
    cdef real shift, scale
    cdef Gate gate
    if HALF <= rows:
        for j in range(width):
            shift, scale = centres[CENTRE, j], centres[CENTRE_SCALE, j]
            gate = gate_at(centres, j, way)
            sums[FIRST, j] += terms4(x, dout, 0, j, shift, gate, way)
            sums[SECOND, j] += products4(x, dout, 0, j, shift, scale, gate, way)
        i = HALF
    while i < rows:
        for j in range(width):
            shift, scale = centres[CENTRE, j], centres[CENTRE_SCALE, j]
            gate = gate_at(centres, j, way)
            sums[FIRST, j] += term(x[i, j], dout[i, j], shift, gate, way)
            sums[SECOND, j] += product(x[i, j], dout[i, j], shift, scale, gate, way)
        i += 1


cdef inline void sum_rows(
    double[:, ::1] sums, unsigned *bits, const floating[:, ::1] x, const floating[:, ::1] dout,
    const real[:, ::1] centres, Direction way,
) noexcept nogil:
    """A group, or the rows that are left after the last one."""
    if x.shape[0] == GROUP:
        sum_group(sums, bits, x, dout, centres, way)
    else:
        sum_few(sums, x, dout, centres, way)


cdef void sum_signed_rows(
    double[:, ::1] sums, unsigned *bits, const floating[:, ::1] x, const floating[:, ::1] dout,
    const Signs *signs, Py_ssize_t offset, const real[:, ::1] centres, Direction way,
) noexcept nogil:
    """The same of what signs let through: where it is put in scratch, a portion of the columns
    after the other."""
    cdef char storage[GROUP * PORTION + 64]
    cdef floating *room = <floating *>aligned(storage)
    cdef Py_ssize_t rows = x.shape[0], width, j = 0, portion = x.shape[1]
    if signs.let_through == NULL:
        portion = PORTION // <Py_ssize_t>sizeof(floating)
    while j < x.shape[1]:
        width = min(portion, x.shape[1] - j)
        sum_rows(
            tile(sums, 0, j, SUMS, width), bits + j, tile(x, 0, j, rows, width),
            upstream_rows(room, tile(dout, 0, j, rows, width), signs, offset + j, way),
            tile(centres, 0, j, CENTRES, width), way)
        j += width


cdef void sum_columns(
    double[:, ::1] sums, const floating[:, ::1] x, const floating[:, ::1] dout,
    const Signs *signs, Py_ssize_t offset, const real[:, ::1] centres, Direction way,
) noexcept nogil:
    """All rows, column by column, by groups of eight."""
    cdef Py_ssize_t rows = x.shape[0], width = x.shape[1], i = 0, j, count
    cdef Py_ssize_t stride = x.strides[0] // <Py_ssize_t>sizeof(floating)
    cdef unsigned bits[WIDTH]
    if GROUP <= rows:
        for j in range(width):
            bits[j] = 0
    while i < rows:
        count = min(<Py_ssize_t>GROUP, rows - i)
        if Direction is Signed:
            sum_signed_rows(
                sums, bits, tile(x, i, 0, count, width), tile(dout, i, 0, count, width), signs,
                offset + i * stride, centres, way)
        else:
            sum_rows(
                sums, bits, tile(x, i, 0, count, width), tile(dout, i, 0, count, width), centres,
                way)
        i += count
    if real is float and GROUP <= rows:
        compare_rows(bits, x, dout, signs, offset, centres, way)
        for j in range(width):
            sums[SECOND, j] = doubted(sums[SECOND, j], bits[j], centres[CENTRE, j])
