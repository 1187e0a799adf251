# The first passes over runs: all columns of a row are of one feature.
#
# Derivation, twins, tests and bytes moved: those of sums.pxi, of which this is the other half; the
# terms, and the directions, are the same.
#
# A sum is that of LANES values side by side, in registers.

from libc.string cimport memcpy

cdef enum:
    # Values of a single row of a run that are summed as a group of rows is.
    STRIP = GROUP * LANES
    # Values of a piece for each comparison along it: a percent of the work.
    VALUES_FOR_EACH = 1024
    # Steps of LANES columns whose eight rows are summed as two halves, at the most: 16 KB of x and
    # dout, half of L1.
    STEPS = 16

cdef double[LANES] ZEROS  # copied, as GCC makes a slow `rep stos` of such a memset


cdef inline unsigned all_bits(const unsigned *bits) noexcept nogil:
    cdef unsigned found = 0
    cdef int j
    for j in range(LANES):
        found |= bits[j]
    return found


cdef void compare_along(
    unsigned *bits, const floating[:, ::1] x, const floating[:, ::1] dout,
    real shift, real scale, Gate gate, Direction way,
) noexcept nogil:
    """LANES values with some that are DISTANCES behind them in their row. A single short row is
    spared this: it would take a twentieth of its time."""
    cdef Py_ssize_t j, k, at
    for k in range(min(<Py_ssize_t>APART, x.shape[0] * x.shape[1] // VALUES_FOR_EACH)):
        if 2 * DISTANCES[k] > x.shape[1]:
            return
        for j in range(LANES):
            at = j + DISTANCES[k]
            bits[j] |= repeated(
                x[COMPARED, j], x[COMPARED, at], dout[COMPARED, j], dout[COMPARED, at],
                shift, scale, gate, way)


cdef inline void sum_steps(
    double *lanes1, double *lanes2, unsigned *bits,
    const floating[:, ::1] x, const floating[:, ::1] dout, Py_ssize_t i, Py_ssize_t start,
    Py_ssize_t steps, real shift, real scale, Gate gate, Direction way,
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
                bits[j] |= repeated_rows(
                    x, dout, i + COMPARED, i + COMPARED + 1, at, shift, scale, gate, way)
    else:
        for k in range(steps):
            for j in range(LANES):
                at = k * LANES + j
                terms[at] = terms4(x, dout, i, start + at, shift, gate, way)
                products[at] = products4(x, dout, i, start + at, shift, scale, gate, way)
                bits[j] |= repeated_rows(
                    x, dout, i + COMPARED, i + COMPARED + 1, start + at, shift, scale, gate, way)
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
    cdef unsigned bits[LANES]
    cdef Py_ssize_t g, i, j, k, steps = x.shape[1] // LANES
    memcpy(lanes1, ZEROS, sizeof(lanes1))
    memcpy(lanes2, ZEROS, sizeof(lanes2))
    memcpy(bits, ZEROS, sizeof(bits))
    for g in range(groups):
        i = g * GROUP
        for k in range(ceil_div(steps, STEPS)):
            sum_steps(
                lanes1, lanes2, bits, x, dout, i, k * STEPS * LANES,
                min(<Py_ssize_t>STEPS, steps - k * STEPS), shift, scale, gate, way)
        for j in range(steps * LANES, x.shape[1]):
            k = j - steps * LANES
            lanes1[k] += terms8(x, dout, i, j, shift, gate, way)
            lanes2[k] += products8(x, dout, i, j, shift, scale, gate, way)
            bits[k] |= repeated_rows(
                x, dout, i + COMPARED, i + COMPARED + 1, j, shift, scale, gate, way)
    if real is float:
        compare_along(bits, x, dout, shift, scale, gate, way)
    sum1[0] += fold_lanes(lanes1)
    sum2[0] += doubted(fold_lanes(lanes2), all_bits(bits), shift)


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
    cdef unsigned bits[LANES]
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
        memcpy(bits, ZEROS, sizeof(bits))
        for k in range(strips):
            sum_steps(
                lanes1, lanes2, bits, rows_of(x, GROUP, LANES, LANES),
                rows_of(dout, GROUP, LANES, LANES), 0, 0, 1, shift, scale, gate, way)
            x += STRIP
            dout += STRIP
        sum1[0] += fold_lanes(lanes1)
        sum2[0] += doubted(fold_lanes(lanes2), all_bits(bits), shift)
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
