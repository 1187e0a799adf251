# The first passes: sum(u) and sum(u*v) of every feature, one family for both directions.
#
#   forward   u = v = x - shift                       -> mean and var (moments.pxi)
#   backward  u = dout, v = (x - shift)*scale         -> dbeta and dgamma (gradients.pxi)
#   gated     the same of dout where y > 0, else of 0: the backward through a ReLU
#
# Derivation: mean = sum(x)/n and var = sum((x - mean)^2)/n; dbeta = sum(dout) and
# dgamma = sum(dout*xhat).
# Twins: `reference.moments`, and the sums of `reference.backward_closed_form`.
# Tests: tests/test_kernels.py, tests/test_accuracy.py, tests/test_same_bits.py.
# Bytes moved: 4 a value forward and 8 backward (float32): x, or x and dout, are read once.
#
# A direction is an argument for its type alone: Cython makes a C function of each, and no
# instruction asks which it is. What it is stands in `term` and `product` here and in `value` of
# writes.pxi; a new one is a member of Direction, and every `if Direction is` must know it. Which
# one a call is, is asked in `sum_cell_of` and in `write_cell_of`. In the forward dout is x; it and
# the scale may be loaded, and have no say.
#
# Groups of eight rows are added up in the data's type (in double, where a term might not survive
# that: `real`), four and four of them, and go to sums in double.

from libc.string cimport memcpy

cdef enum Forwards:
    FORWARDS
cdef enum Backwards:
    BACKWARDS = FORWARDS + 1
cdef enum Gated:
    GATED = BACKWARDS + 1
ctypedef fused Direction:
    Forwards
    Backwards
    Gated

cdef enum:  # what is needed of every column, a row each
    CENTRE        # a shift near the mean, in few digits
    CENTRE_SCALE  # backward: a power of two near invstd
    CENTRES
    GATE_HI = CENTRES  # gated: what y is made of, with the bits that the forward had
    GATE_SLOPE
    GATE_OFFSET
    GATED_CENTRES

cdef struct Gate:  # of a column, in doubles that a cast to the data's type rounds no more
    double hi, slope, offset

cdef enum:
    HALF = GROUP // 2
    # Values of a single row of a run that are summed as a group of rows is.
    STRIP = GROUP * LANES
    # Steps of LANES columns whose eight rows are summed as two halves, at the most: 16 KB of x and
    # dout, half of L1.
    STEPS = 16

cdef double[LANES] ZEROS  # copied, as GCC makes a slow `rep stos` of such a memset


cdef inline Gate gate_at(const real[:, ::1] centres, Py_ssize_t j, Direction way) noexcept nogil:
    cdef Gate gate
    if Direction is Gated:
        gate.hi, gate.slope = centres[GATE_HI, j], centres[GATE_SLOPE, j]
        gate.offset = centres[GATE_OFFSET, j]
    else:
        gate.hi = gate.slope = gate.offset = 0
    return gate


cdef inline floating opened(floating dout, floating product, floating offset) noexcept nogil:
    """What a ReLU lets through: dout where y = product + offset > 0. A sum of two numbers has the
    sign of its exact value, so that the addition can be spared."""
    if floating is float:
        return where_float(dout, product, -offset)
    else:
        return where_double(dout, product, -offset)


cdef inline floating upstream(
    floating x, floating dout, Gate gate, Direction way,
) noexcept nogil:
    """dout as the sums see it. The y of a gate is what `value` computes in the forward, to the last
    bit."""
    if Direction is Gated:
        return opened(
            dout, (x - <floating>gate.hi) * <floating>gate.slope, <floating>gate.offset)
    else:
        return dout


cdef inline real term(
    floating x, floating dout, real shift, Gate gate, Direction way,
) noexcept nogil:
    """The term u of the first sum."""
    if Direction is Forwards:
        return <real>x - shift
    else:
        return <real>upstream(x, dout, gate, way)


cdef inline real product(
    floating x, floating dout, real shift, real scale, Gate gate, Direction way,
) noexcept nogil:
    """The term u*v of the second sum.

    The backward does not sum dout*xhat: what the rounding errors of all xhat have in common would
    add up n times, because the exact sum(xhat) is 0, and (x - mean)*invstd is rounded the same way
    wherever the mean has digits below those of x. x less a number of few digits near the mean is
    exact, or nearly so, and so is its product with a power of two. `find_dgamma` makes dgamma
    of it.
    """
    if Direction is Forwards:
        return (<real>x - shift) * (<real>x - shift)
    else:
        return <real>upstream(x, dout, gate, way) * ((<real>x - shift) * scale)


cdef inline real terms4(
    const floating[:, ::1] x, const floating[:, ::1] dout, Py_ssize_t i, Py_ssize_t j,
    real shift, Gate gate, Direction way,
) noexcept nogil:
    """Four rows from i on, in column j."""
    return sum4(
        term(x[i, j], dout[i, j], shift, gate, way),
        term(x[i + 1, j], dout[i + 1, j], shift, gate, way),
        term(x[i + 2, j], dout[i + 2, j], shift, gate, way),
        term(x[i + 3, j], dout[i + 3, j], shift, gate, way))


cdef inline real products4(
    const floating[:, ::1] x, const floating[:, ::1] dout, Py_ssize_t i, Py_ssize_t j,
    real shift, real scale, Gate gate, Direction way,
) noexcept nogil:
    return sum4(
        product(x[i, j], dout[i, j], shift, scale, gate, way),
        product(x[i + 1, j], dout[i + 1, j], shift, scale, gate, way),
        product(x[i + 2, j], dout[i + 2, j], shift, scale, gate, way),
        product(x[i + 3, j], dout[i + 3, j], shift, scale, gate, way))


cdef inline real terms8(
    const floating[:, ::1] x, const floating[:, ::1] dout, Py_ssize_t i, Py_ssize_t j,
    real shift, Gate gate, Direction way,
) noexcept nogil:
    return terms4(x, dout, i, j, shift, gate, way) + terms4(x, dout, i + HALF, j, shift, gate, way)


cdef inline real products8(
    const floating[:, ::1] x, const floating[:, ::1] dout, Py_ssize_t i, Py_ssize_t j,
    real shift, real scale, Gate gate, Direction way,
) noexcept nogil:
    return (
        products4(x, dout, i, j, shift, scale, gate, way)
        + products4(x, dout, i + HALF, j, shift, scale, gate, way))


# Columns

cdef void sum_group(
    double[:, ::1] sums, const floating[:, ::1] x, const floating[:, ::1] dout,
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
    else:
        for j in range(x.shape[1]):
            shift, scale = centres[CENTRE, j], centres[CENTRE_SCALE, j]
            gate = gate_at(centres, j, way)
            terms[j] = terms4(x, dout, 0, j, shift, gate, way)
            products[j] = products4(x, dout, 0, j, shift, scale, gate, way)
        for j in range(x.shape[1]):
            shift, scale = centres[CENTRE, j], centres[CENTRE_SCALE, j]
            gate = gate_at(centres, j, way)
            sums[FIRST, j] += terms[j] + terms4(x, dout, HALF, j, shift, gate, way)
            sums[SECOND, j] += products[j] + products4(x, dout, HALF, j, shift, scale, gate, way)


cdef void sum_columns(
    double[:, ::1] sums, const floating[:, ::1] x, const floating[:, ::1] dout,
    const real[:, ::1] centres, Direction way,
) noexcept nogil:
    """All rows, column by column: groups of eight, one of four, and single ones."""
    cdef Py_ssize_t rows = x.shape[0], width = x.shape[1], i = 0, j
    cdef real shift, scale
    cdef Gate gate
    while i + GROUP <= rows:
        sum_group(
            sums, tile(x, i, 0, GROUP, width), tile(dout, i, 0, GROUP, width), centres, way)
        i += GROUP
    if i + HALF <= rows:
        for j in range(width):
            shift, scale = centres[CENTRE, j], centres[CENTRE_SCALE, j]
            gate = gate_at(centres, j, way)
            sums[FIRST, j] += terms4(x, dout, i, j, shift, gate, way)
            sums[SECOND, j] += products4(x, dout, i, j, shift, scale, gate, way)
        i += HALF
    while i < rows:
        for j in range(width):
            shift, scale = centres[CENTRE, j], centres[CENTRE_SCALE, j]
            gate = gate_at(centres, j, way)
            sums[FIRST, j] += term(x[i, j], dout[i, j], shift, gate, way)
            sums[SECOND, j] += product(x[i, j], dout[i, j], shift, scale, gate, way)
        i += 1


# Runs: all columns are of one feature

cdef inline void sum_steps(
    double *lanes1, double *lanes2, const floating[:, ::1] x, const floating[:, ::1] dout,
    Py_ssize_t i, Py_ssize_t start, Py_ssize_t steps,
    real shift, real scale, Gate gate, Direction way,
) noexcept nogil:
    """Eight rows from i on, in up to STEPS steps of LANES columns. Here, too, of two arrays four
    rows and then the others: images are often a multiple of 4 KB apart."""
    cdef real terms[STEPS * LANES]
    cdef real products[STEPS * LANES]
    cdef Py_ssize_t j, k, at
    if Direction is Forwards:
        for k in range(steps):
            for j in range(LANES):
                at = start + k * LANES + j
                lanes1[j] += terms8(x, dout, i, at, shift, gate, way)
                lanes2[j] += products8(x, dout, i, at, shift, scale, gate, way)
    else:
        for k in range(steps):
            for j in range(LANES):
                at = k * LANES + j
                terms[at] = terms4(x, dout, i, start + at, shift, gate, way)
                products[at] = products4(x, dout, i, start + at, shift, scale, gate, way)
        for k in range(steps):
            for j in range(LANES):
                at = k * LANES + j
                lanes1[j] += terms[at] + terms4(x, dout, i + HALF, start + at, shift, gate, way)
                lanes2[j] += products[at] + products4(
                    x, dout, i + HALF, start + at, shift, scale, gate, way)


cdef inline void sum_groups(
    double *sum1, double *sum2, const floating[:, ::1] x, const floating[:, ::1] dout,
    Py_ssize_t groups, real shift, real scale, Gate gate, Direction way,
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
                min(<Py_ssize_t>STEPS, steps - k * STEPS), shift, scale, gate, way)
        for j in range(steps * LANES, x.shape[1]):
            k = j - steps * LANES
            lanes1[k] += terms8(x, dout, i, j, shift, gate, way)
            lanes2[k] += products8(x, dout, i, j, shift, scale, gate, way)
    sum1[0] += fold_lanes(lanes1)
    sum2[0] += fold_lanes(lanes2)


cdef inline void sum_rest(
    double *sum1, double *sum2, const floating *x, const floating *dout, const floating *stop,
    real shift, real scale, Gate gate, Direction way,
) noexcept nogil:
    """Fewer than STRIP values up to `stop`, in the data's type: steps of LANES, and the last LANES
    values before `stop`, of which those already in a step do not count. It takes `stop` because GCC
    makes branches of a remainder whose range it knows."""
    cdef real lanes1[LANES]
    cdef real lanes2[LANES]
    cdef real total1, total2
    cdef Py_ssize_t k, steps = (stop - x) // LANES, last = stop - x - LANES
    cdef int j, first = LANES - (stop - x) % LANES
    for j in range(LANES):
        total1 = term(x[last + j], dout[last + j], shift, gate, way)
        total2 = product(x[last + j], dout[last + j], shift, scale, gate, way)
        lanes1[j] = total1 if j >= first else 0
        lanes2[j] = total2 if j >= first else 0
    if steps > 0:  # without it GCC makes no vectors
        for j in range(LANES):
            total1, total2 = lanes1[j], lanes2[j]
            for k in range(steps):
                total1 += term(x[k * LANES + j], dout[k * LANES + j], shift, gate, way)
                total2 += product(x[k * LANES + j], dout[k * LANES + j], shift, scale, gate, way)
            lanes1[j], lanes2[j] = total1, total2
    sum1[0] += fold_lanes(lanes1)
    sum2[0] += fold_lanes(lanes2)


cdef void sum_row(
    double *sum1, double *sum2, const floating *x, const floating *dout, Py_ssize_t width,
    real shift, real scale, Gate gate, Direction way,
) noexcept nogil:
    """A single row: strips of eight steps of LANES values, which are a group, and what is left. Not
    inline: GCC then makes branches, and no vectors, of the last LANES' mask."""
    cdef double lanes1[LANES]
    cdef double lanes2[LANES]
    cdef const floating *stop = x + width
    cdef Py_ssize_t j, k, strips = width // STRIP
    if width < LANES:
        for j in range(width):
            sum1[0] += term(x[j], dout[j], shift, gate, way)
            sum2[0] += product(x[j], dout[j], shift, scale, gate, way)
        return
    if strips > 0:
        memcpy(lanes1, ZEROS, sizeof(lanes1))
        memcpy(lanes2, ZEROS, sizeof(lanes2))
        for k in range(strips):
            sum_steps(
                lanes1, lanes2, rows_of(x, GROUP, LANES, LANES),
                rows_of(dout, GROUP, LANES, LANES), 0, 0, 1, shift, scale, gate, way)
            x += STRIP
            dout += STRIP
        sum1[0] += fold_lanes(lanes1)
        sum2[0] += fold_lanes(lanes2)
    if x < stop:
        sum_rest(sum1, sum2, x, dout, stop, shift, scale, gate, way)


cdef inline void sum_run(
    double *sum1, double *sum2, const floating[:, ::1] x, const floating[:, ::1] dout,
    real shift, real scale, Gate gate, Direction way,
) noexcept nogil:
    """All rows."""
    cdef Py_ssize_t i, groups = x.shape[0] // GROUP
    if groups > 0:
        sum_groups(sum1, sum2, x, dout, groups, shift, scale, gate, way)
    for i in range(groups * GROUP, x.shape[0]):
        sum_row(sum1, sum2, &x[i, 0], &dout[i, 0], x.shape[1], shift, scale, gate, way)
