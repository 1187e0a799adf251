# The first passes: sum(u) and sum(u*v) of every feature, one family for both directions.
#
#   forward   u = v = x - shift                       -> mean and var (moments.pxi)
#   backward  u = dout, v = (x - shift)*scale         -> dbeta and dgamma (gradients.pxi)
#
# Derivation: mean = sum(x)/n and var = sum((x - mean)^2)/n; dbeta = sum(dout) and
# dgamma = sum(dout*xhat).
# Twins: `reference.moments`, and the sums of `reference.backward_closed_form`.
# Tests: tests/test_kernels.py, tests/test_accuracy.py, tests/test_same_bits.py.
# Bytes moved: 4 a value forward and 8 backward (float32): x, or x and dout, are read once.
#
# A direction is an argument for its type alone: Cython makes a C function of each, and no
# instruction asks which it is. In the forward dout is x, and neither it nor the scale is used.
# `term` and `product` are what a direction is: another factor of the gradient goes there.
#
# Groups of eight rows are added up in the data's type (in double, where a term might not survive
# that: `real`), four and four of them, and go to sums in double.

from libc.string cimport memcpy, memset

cdef enum Forwards:
    FORWARDS
cdef enum Backwards:
    BACKWARDS
ctypedef fused Direction:
    Forwards
    Backwards

cdef enum:
    CENTRE        # a shift near the mean, in few digits: a row of what the sums are about
    CENTRE_SCALE  # backward: a power of two near invstd
    CENTRES

cdef enum:
    HALF = GROUP // 2
    # Values of a single row of a run that are summed as a group of rows is.
    STRIP = GROUP * LANES
    # Steps of LANES columns whose eight rows are summed as two halves, at the most: 16 KB of x and
    # dout, half of L1.
    STEPS = 16

cdef double[LANES] ZEROS  # copied, as GCC makes a slow `rep stos` of such a memset


cdef inline real term(floating x, floating dout, real shift, Direction way) noexcept nogil:
    """The term u of the first sum."""
    if Direction is Backwards:
        return <real>dout
    else:
        return <real>x - shift


cdef inline real product(
    floating x, floating dout, real shift, real scale, Direction way,
) noexcept nogil:
    """The term u*v of the second sum.

    Backward not dout*xhat: as sum(xhat) is 0, whatever the roundings of xhat have in common weighs
    n times, and (x - mean)*invstd is rounded alike wherever the mean has digits below those of x.
    x less a number of few digits near the mean is exact or nearly so, and so is its product with a
    power of two. `finish_gradients` makes dgamma of it.
    """
    if Direction is Backwards:
        return <real>dout * ((<real>x - shift) * scale)
    else:
        return (<real>x - shift) * (<real>x - shift)


cdef inline real terms4(
    const floating[:, ::1] x, const floating[:, ::1] dout, Py_ssize_t i, Py_ssize_t j,
    real shift, Direction way,
) noexcept nogil:
    """Four rows from i on, in column j."""
    return sum4(
        term(x[i, j], dout[i, j], shift, way),
        term(x[i + 1, j], dout[i + 1, j], shift, way),
        term(x[i + 2, j], dout[i + 2, j], shift, way),
        term(x[i + 3, j], dout[i + 3, j], shift, way))


cdef inline real products4(
    const floating[:, ::1] x, const floating[:, ::1] dout, Py_ssize_t i, Py_ssize_t j,
    real shift, real scale, Direction way,
) noexcept nogil:
    return sum4(
        product(x[i, j], dout[i, j], shift, scale, way),
        product(x[i + 1, j], dout[i + 1, j], shift, scale, way),
        product(x[i + 2, j], dout[i + 2, j], shift, scale, way),
        product(x[i + 3, j], dout[i + 3, j], shift, scale, way))


# Columns

cdef void sum_group(
    double[:, ::1] sums, const floating[:, ::1] x, const floating[:, ::1] dout,
    const real[:, ::1] centres, Direction way,
) noexcept nogil:
    """Eight rows. Of two arrays four rows and then the others: sixteen lines that are a multiple of
    4 KB apart push each other out of L1."""
    cdef real terms[WIDTH]
    cdef real products[WIDTH]
    cdef real m, v
    cdef Py_ssize_t j
    if Direction is Backwards:
        for j in range(x.shape[1]):
            m, v = centres[CENTRE, j], centres[CENTRE_SCALE, j]
            terms[j] = terms4(x, dout, 0, j, m, way)
            products[j] = products4(x, dout, 0, j, m, v, way)
        for j in range(x.shape[1]):
            m, v = centres[CENTRE, j], centres[CENTRE_SCALE, j]
            sums[FIRST, j] += terms[j] + terms4(x, dout, HALF, j, m, way)
            sums[SECOND, j] += products[j] + products4(x, dout, HALF, j, m, v, way)
    else:
        for j in range(x.shape[1]):
            m = v = centres[CENTRE, j]
            sums[FIRST, j] += terms4(x, dout, 0, j, m, way) + terms4(x, dout, HALF, j, m, way)
            sums[SECOND, j] += (
                products4(x, dout, 0, j, m, v, way) + products4(x, dout, HALF, j, m, v, way))


cdef void sum_columns(
    double[:, ::1] sums, const floating[:, ::1] x, const floating[:, ::1] dout,
    const real[:, ::1] centres, Direction way,
) noexcept nogil:
    """All rows, column by column: groups of eight, one of four, and single ones."""
    cdef Py_ssize_t rows = x.shape[0], width = x.shape[1], i = 0, j
    cdef real m, v
    while i + GROUP <= rows:
        sum_group(
            sums, tile(x, i, 0, GROUP, width), tile(dout, i, 0, GROUP, width), centres, way)
        i += GROUP
    if i + HALF <= rows:
        for j in range(width):
            m, v = centres[CENTRE, j], centres[CENTRE_SCALE, j]
            sums[FIRST, j] += terms4(x, dout, i, j, m, way)
            sums[SECOND, j] += products4(x, dout, i, j, m, v, way)
        i += HALF
    while i < rows:
        for j in range(width):
            m, v = centres[CENTRE, j], centres[CENTRE_SCALE, j]
            sums[FIRST, j] += term(x[i, j], dout[i, j], m, way)
            sums[SECOND, j] += product(x[i, j], dout[i, j], m, v, way)
        i += 1


# Runs: all columns are of one feature

cdef inline void sum_steps(
    double *lanes1, double *lanes2, const floating[:, ::1] x, const floating[:, ::1] dout,
    Py_ssize_t i, Py_ssize_t start, Py_ssize_t steps, real m, real v, Direction way,
) noexcept nogil:
    """Eight rows from i on, in up to STEPS steps of LANES columns. Here, too, of two arrays four
    rows and then the others: images are often a multiple of 4 KB apart."""
    cdef real terms[STEPS * LANES]
    cdef real products[STEPS * LANES]
    cdef Py_ssize_t j, k, at
    if Direction is Backwards:
        for k in range(steps):
            for j in range(LANES):
                at = k * LANES + j
                terms[at] = terms4(x, dout, i, start + at, m, way)
                products[at] = products4(x, dout, i, start + at, m, v, way)
        for k in range(steps):
            for j in range(LANES):
                at = k * LANES + j
                lanes1[j] += terms[at] + terms4(x, dout, i + HALF, start + at, m, way)
                lanes2[j] += products[at] + products4(x, dout, i + HALF, start + at, m, v, way)
    else:
        for k in range(steps):
            for j in range(LANES):
                at = start + k * LANES + j
                lanes1[j] += (
                    terms4(x, dout, i, at, m, way) + terms4(x, dout, i + HALF, at, m, way))
                lanes2[j] += (
                    products4(x, dout, i, at, m, v, way)
                    + products4(x, dout, i + HALF, at, m, v, way))


cdef inline void sum_groups(
    double *sum1, double *sum2, const floating[:, ::1] x, const floating[:, ::1] dout,
    Py_ssize_t groups, real m, real v, Direction way,
) noexcept nogil:
    """Groups of eight rows, in LANES sums in registers; columns that make no step go to the first
    of these."""
    cdef double lanes1[LANES]
    cdef double lanes2[LANES]
    cdef Py_ssize_t g, i, j, k, steps = x.shape[1] // LANES
    memcpy(lanes1, ZEROS, sizeof(lanes1))
    memcpy(lanes2, ZEROS, sizeof(lanes2))
    for g in range(groups):
        i = g * GROUP
        for k in range(ceil_div(steps, STEPS)):
            sum_steps(
                lanes1, lanes2, x, dout, i, k * STEPS * LANES,
                min(<Py_ssize_t>STEPS, steps - k * STEPS), m, v, way)
        for j in range(steps * LANES, x.shape[1]):
            k = j - steps * LANES
            lanes1[k] += terms4(x, dout, i, j, m, way) + terms4(x, dout, i + HALF, j, m, way)
            lanes2[k] += (
                products4(x, dout, i, j, m, v, way) + products4(x, dout, i + HALF, j, m, v, way))
    sum1[0] += fold_lanes(lanes1)
    sum2[0] += fold_lanes(lanes2)


cdef inline void sum_rest(
    double *sum1, double *sum2, const floating *x, const floating *dout, const floating *stop,
    real m, real v, Direction way,
) noexcept nogil:
    """Fewer than STRIP values up to `stop`, in the data's type: steps of LANES, and the last LANES
    before `stop`, without those that come before x or are in these steps. (`stop`, as GCC makes
    branches of a remainder that it knows the range of.)"""
    cdef real lanes1[LANES]
    cdef real lanes2[LANES]
    cdef real total1, total2
    cdef Py_ssize_t k, steps = (stop - x) // LANES, last = stop - x - LANES
    cdef int j, first = LANES - (stop - x) % LANES
    for j in range(LANES):
        total1 = term(x[last + j], dout[last + j], m, way)
        total2 = product(x[last + j], dout[last + j], m, v, way)
        lanes1[j] = total1 if j >= first else 0
        lanes2[j] = total2 if j >= first else 0
    if steps > 0:  # without it GCC makes no vectors
        for j in range(LANES):
            total1, total2 = lanes1[j], lanes2[j]
            for k in range(steps):
                total1 += term(x[k * LANES + j], dout[k * LANES + j], m, way)
                total2 += product(x[k * LANES + j], dout[k * LANES + j], m, v, way)
            lanes1[j], lanes2[j] = total1, total2
    sum1[0] += fold_lanes(lanes1)
    sum2[0] += fold_lanes(lanes2)


cdef void sum_row(
    double *sum1, double *sum2, const floating *x, const floating *dout, Py_ssize_t width,
    real m, real v, Direction way,
) noexcept nogil:
    """A single row: strips of eight steps of LANES values, which are a group, and what is left. Not
    inline: GCC then makes branches, and no vectors, of the last LANES' mask."""
    cdef double lanes1[LANES]
    cdef double lanes2[LANES]
    cdef const floating *stop = x + width
    cdef Py_ssize_t j, k, strips = width // STRIP
    if width < LANES:
        for j in range(width):
            sum1[0] += term(x[j], dout[j], m, way)
            sum2[0] += product(x[j], dout[j], m, v, way)
        return
    if strips > 0:
        memcpy(lanes1, ZEROS, sizeof(lanes1))
        memcpy(lanes2, ZEROS, sizeof(lanes2))
        for k in range(strips):
            sum_steps(
                lanes1, lanes2, rows_of(x, GROUP, LANES, LANES),
                rows_of(dout, GROUP, LANES, LANES), 0, 0, 1, m, v, way)
            x += STRIP
            dout += STRIP
        sum1[0] += fold_lanes(lanes1)
        sum2[0] += fold_lanes(lanes2)
    if x < stop:
        sum_rest(sum1, sum2, x, dout, stop, m, v, way)


cdef inline void sum_run(
    double *sum1, double *sum2, const floating[:, ::1] x, const floating[:, ::1] dout,
    real m, real v, Direction way,
) noexcept nogil:
    """All rows."""
    cdef Py_ssize_t i, groups = x.shape[0] // GROUP
    if groups > 0:
        sum_groups(sum1, sum2, x, dout, groups, m, v, way)
    for i in range(groups * GROUP, x.shape[0]):
        sum_row(sum1, sum2, &x[i, 0], &dout[i, 0], x.shape[1], m, v, way)


# Cells, and the tree of their halves

cdef inline void sum_piece(
    double[:, ::1] columns, const floating[:, ::1] x, const floating[:, ::1] dout,
    const real[:, ::1] centres, Py_ssize_t column, bint run, Direction way,
) noexcept nogil:
    cdef double *sum1 = &columns[FIRST, column]
    cdef double *sum2 = &columns[SECOND, column]
    cdef real m, v
    if run:
        m, v = centres[CENTRE, column], centres[CENTRE_SCALE, column]
        if x.shape[0] == 1:
            sum_row(sum1, sum2, &x[0, 0], &dout[0, 0], x.shape[1], m, v, way)
        else:
            sum_run(sum1, sum2, x, dout, m, v, way)
    else:
        sum_columns(columns, x, dout, centres, way)


cdef void sum_cell(
    double[:, ::1] total, const floating[:, :, ::1] x, const floating[:, :, ::1] dout,
    const real[:, ::1] centres, const Grid *g, const Block *b, Py_ssize_t cell, Direction way,
) noexcept nogil:
    """The sums of a block in one cell: of its columns, in `total` itself if a column is a feature.
    Called from two places, so that GCC keeps it a function: the row pointers of one that is inlined
    do not fit the registers."""
    cdef double storage[SUMS * SCRATCH]
    cdef bint apart = b.width > b.size
    cdef double[:, ::1] columns = rows_of(
        <double *>aligned(storage) if apart else &total[0, 0], SUMS, b.width,
        b.pitch if apart else total.strides[0] // <Py_ssize_t>sizeof(double))
    cdef Piece p = cell_at(g, b, cell)
    memset(&columns[FIRST, 0], 0, b.width * sizeof(double))
    memset(&columns[SECOND, 0], 0, b.width * sizeof(double))
    while next_piece(&p, g, b):
        sum_piece(
            columns, rows_of(&x[0, 0, 0] + p.offset, p.rows, p.width, g.stride),
            rows_of(&dout[0, 0, 0] + p.offset, p.rows, p.width, g.stride),
            centres, p.column, g.runs, way)
    if apart:
        fold(row_of(&total[FIRST, 0], b.size), row_of(&columns[FIRST, 0], b.width), g, b)
        fold(row_of(&total[SECOND, 0], b.size), row_of(&columns[SECOND, 0], b.width), g, b)


cdef void partial_sums(
    double[:, ::1] total, const floating[:, :, ::1] x, const floating[:, :, ::1] dout,
    const real[:, ::1] centres, const Grid *g, const Block *b, Py_ssize_t cell, Py_ssize_t cells,
    double[:, :, ::1] levels, Py_ssize_t level,
) noexcept nogil:
    """Of a power of two of cells: the sum of those of its halves, the second of which is summed in
    a row of `levels`. Without a dout it is the forward."""
    cdef Py_ssize_t half = cells // 2
    cdef double[:, ::1] second
    if cells == 1:
        if dout.shape[0] == 0:
            sum_cell(total, x, x, centres, g, b, cell, FORWARDS)
        else:
            sum_cell(total, x, dout, centres, g, b, cell, BACKWARDS)
    else:
        second = of_level(levels, level, b)
        partial_sums(total, x, dout, centres, g, b, cell, half, levels, level)
        partial_sums(second, x, dout, centres, g, b, cell + half, half, levels, level + 1)
        add_sums(total, second)
