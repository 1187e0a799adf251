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


cdef bint some_return(const floating[:, ::1] x, Py_ssize_t i, Py_ssize_t other) noexcept nogil:
    """Whether a column has the same value in two rows."""
    cdef bint found = False
    cdef Py_ssize_t j
    for j in range(x.shape[1]):
        found |= x[i, j] == x[other, j]
    return found


cdef void compare_pair(
    double[:, ::1] sums, const floating[:, ::1] x, const floating[:, ::1] dout, const Signs *signs,
    Py_ssize_t offset, const real[:, ::1] centres, Py_ssize_t i, Py_ssize_t distance,
    Direction way,
) noexcept nogil:
    """A row with the one that is so many below it, where x has returned."""
    cdef floating room[2 * WIDTH]
    cdef Py_ssize_t j, width = x.shape[1], stride = x.strides[0] // <Py_ssize_t>sizeof(floating)
    cdef const floating[:, ::1] xs = rows_of(&x[i, 0], 2, width, distance * stride)
    cdef const floating[:, ::1] douts = upstream_rows(
        room, rows_of(&dout[i, 0], 2, width, distance * stride), signs, offset + i * stride, way)
    cdef real scale
    for j in range(width):
        scale = 1 if Direction is Forwards else centres[CENTRE_SCALE, j]
        sums[SECOND, j] = doubted(sums[SECOND, j], (xs[0, j] == xs[1, j]) & repeated_rows(
            xs, douts, 0, 1, j, centres[MINUS_CENTRE, j], scale, gate_at(centres, j, way), way))


cdef void compare_rows(
    double[:, ::1] sums, const floating[:, ::1] x, const floating[:, ::1] dout, const Signs *signs,
    Py_ssize_t offset, const real[:, ::1] centres, Direction way,
) noexcept nogil:
    """A row, or the next one, with some that are DISTANCES below it. Of one alone all values may be
    the shift, and have no bits."""
    cdef Py_ssize_t k, i, distance
    for k in range(min(<Py_ssize_t>APART, x.shape[0] // ROWS_FOR_EACH)):
        if 2 * DISTANCES[k] > x.shape[0]:
            return
        i, distance = COMPARED + k % 2, DISTANCES[k]
        if some_return(x, i, i + distance):
            compare_pair(sums, x, dout, signs, offset, centres, i, distance, way)


cdef void sum_group(
    unshared first, unshared second, const floating[:, ::1] x, const floating[:, ::1] dout,
    const real[:, ::1] centres, Direction way,
) noexcept nogil:
    """Eight rows. Of two arrays four rows and then the others: sixteen lines that are a multiple of
    4 KB apart push each other out of L1."""
    cdef real terms[WIDTH]
    cdef real products[WIDTH]
    cdef real minus_shift, scale
    cdef Gate gate
    cdef Py_ssize_t j
    if Direction is Forwards:
        for j in range(x.shape[1]):
            minus_shift = scale = centres[MINUS_CENTRE, j]
            gate = gate_at(centres, j, way)
            first[j] += terms8(x, dout, 0, j, minus_shift, gate, way)
            second[j] += doubted(
                products8(x, dout, 0, j, minus_shift, scale, gate, way),
                repeated_rows(x, dout, COMPARED, COMPARED + 1, j, minus_shift, scale, gate, way))
    else:
        for j in range(x.shape[1]):
            minus_shift, scale = centres[MINUS_CENTRE, j], centres[CENTRE_SCALE, j]
            gate = gate_at(centres, j, way)
            terms[j] = terms4(x, dout, 0, j, minus_shift, gate, way)
            products[j] = doubted(
                products4(x, dout, 0, j, minus_shift, scale, gate, way),
                repeated_rows(x, dout, COMPARED, COMPARED + 1, j, minus_shift, scale, gate, way))
        for j in range(x.shape[1]):
            minus_shift, scale = centres[MINUS_CENTRE, j], centres[CENTRE_SCALE, j]
            gate = gate_at(centres, j, way)
            first[j] += terms[j] + terms4(x, dout, HALF, j, minus_shift, gate, way)
            second[j] += products[j] + products4(x, dout, HALF, j, minus_shift, scale, gate, way)


cdef inline void sum_few(
    double[:, ::1] sums, const floating[:, ::1] x, const floating[:, ::1] dout,
    const real[:, ::1] centres, Direction way,
) noexcept nogil:
    """Fewer rows than a group: four, and single ones."""
    cdef Py_ssize_t rows = x.shape[0], width = x.shape[1], i = 0, j
    cdef real minus_shift, scale
    cdef Gate gate
    if HALF <= rows:
        for j in range(width):
            minus_shift, scale = centres[MINUS_CENTRE, j], centres[CENTRE_SCALE, j]
            gate = gate_at(centres, j, way)
            sums[FIRST, j] += terms4(x, dout, 0, j, minus_shift, gate, way)
            sums[SECOND, j] += products4(x, dout, 0, j, minus_shift, scale, gate, way)
        i = HALF
    while i < rows:
        for j in range(width):
            minus_shift, scale = centres[MINUS_CENTRE, j], centres[CENTRE_SCALE, j]
            gate = gate_at(centres, j, way)
            sums[FIRST, j] += term(x[i, j], dout[i, j], minus_shift, gate, way)
            sums[SECOND, j] += product(x[i, j], dout[i, j], minus_shift, scale, gate, way)
        i += 1


cdef inline void sum_rows(
    double[:, ::1] sums, const floating[:, ::1] x, const floating[:, ::1] dout,
    const real[:, ::1] centres, Direction way,
) noexcept nogil:
    """A group, or the rows that are left after the last one."""
    if x.shape[0] == GROUP:
        sum_group(&sums[FIRST, 0], &sums[SECOND, 0], x, dout, centres, way)
    else:
        sum_few(sums, x, dout, centres, way)


cdef void sum_signed_rows(
    double[:, ::1] sums, const floating[:, ::1] x, const floating[:, ::1] dout,
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
            tile(sums, 0, j, SUMS, width), tile(x, 0, j, rows, width),
            upstream_rows(room, tile(dout, 0, j, rows, width), signs, offset + j, way),
            tile(centres, 0, j, CENTRES, width), way)
        j += width


cdef void sum_columns(
    double[:, ::1] sums, const floating[:, ::1] x, const floating[:, ::1] dout,
    const Signs *signs, Py_ssize_t offset, const real[:, ::1] centres, Direction way,
) noexcept nogil:
    """All rows, column by column, by groups of eight."""
    cdef Py_ssize_t rows = x.shape[0], width = x.shape[1], i = 0, count
    cdef Py_ssize_t stride = x.strides[0] // <Py_ssize_t>sizeof(floating)
    while i < rows:
        count = min(<Py_ssize_t>GROUP, rows - i)
        if Direction is Signed:
            sum_signed_rows(
                sums, tile(x, i, 0, count, width), tile(dout, i, 0, count, width), signs,
                offset + i * stride, centres, way)
        else:
            sum_rows(
                sums, tile(x, i, 0, count, width), tile(dout, i, 0, count, width), centres,
                way)
        i += count
    if real is float:
        compare_rows(sums, x, dout, signs, offset, centres, way)
