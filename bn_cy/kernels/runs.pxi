# The first passes over runs: all columns of a row are of one feature.
#
# Derivation, twins, tests and bytes moved: those of terms.pxi; this is the other half of sums.pxi.
#
# A sum is that of LANES values side by side, in registers.

cdef enum:
    # Values of a single row of a run that are summed as a group of rows is.
    STRIP = GROUP * LANES
    # Values of a piece for each comparison along it: a percent of the work.
    VALUES_FOR_EACH = 1024
    # Steps of LANES columns whose eight rows are summed as two halves, at the most: 16 KB of x and
    # dout, half of L1.
    STEPS = 16


cdef void compare_along(
    double *lanes2, const floating[:, ::1] x, const floating[:, ::1] dout, const Signs *signs,
    Py_ssize_t offset, real minus_shift, real scale, Gate gate, Direction way,
) noexcept nogil:
    """LANES values with some that are DISTANCES behind them in their row. A single short row is
    spared this: it would take a twentieth of its time."""
    cdef floating room[2 * LANES]
    cdef const floating *near
    cdef const floating *far
    cdef Py_ssize_t j, k, at
    offset += COMPARED * (x.strides[0] // <Py_ssize_t>sizeof(floating))
    for k in range(min(<Py_ssize_t>APART, x.shape[0] * x.shape[1] // VALUES_FOR_EACH)):
        at = DISTANCES[k]
        if 2 * at > x.shape[1]:
            return
        near = upstream_row(room, &dout[COMPARED, 0], signs, offset, LANES, way)
        far = upstream_row(
            room + LANES, &dout[COMPARED, at], signs, offset + at, LANES, way)
        for j in range(LANES):
            lanes2[j] = doubted(lanes2[j], repeated(
                x[COMPARED, j], x[COMPARED, at + j], near[j], far[j], minus_shift, scale, gate,
                way))


cdef inline void sum_steps(
    double *lanes1, double *lanes2, const floating[:, ::1] x, const floating[:, ::1] dout,
    Py_ssize_t steps, real minus_shift, real scale, Gate gate, Direction way,
) noexcept nogil:
    """Eight rows, in up to STEPS steps of LANES columns. Here, too, of two arrays four rows and
    then the others: images are often a multiple of 4 KB apart."""
    cdef real terms[STEPS * LANES]
    cdef real products[STEPS * LANES]
    cdef Py_ssize_t j, k, at
    if Direction is Forwards:
        for k in range(steps):
            for j in range(LANES):
                at = k * LANES + j
                lanes1[j] += terms8(x, dout, 0, at, minus_shift, gate, way)
                lanes2[j] += doubted(
                    products8(x, dout, 0, at, minus_shift, scale, gate, way),
                    repeated_rows(
                        x, dout, COMPARED, COMPARED + 1, at, minus_shift, scale, gate, way))
    else:
        for k in range(steps):
            for j in range(LANES):
                at = k * LANES + j
                terms[at] = terms4(x, dout, 0, at, minus_shift, gate, way)
                products[at] = doubted(
                    products4(x, dout, 0, at, minus_shift, scale, gate, way),
                    repeated_rows(
                        x, dout, COMPARED, COMPARED + 1, at, minus_shift, scale, gate, way))
        for k in range(steps):
            for j in range(LANES):
                at = k * LANES + j
                lanes1[j] += terms[at] + terms4(x, dout, HALF, at, minus_shift, gate, way)
                lanes2[j] += products[at] + products4(
                    x, dout, HALF, at, minus_shift, scale, gate, way)


cdef void sum_groups(
    double *sum1, double *sum2, const floating[:, ::1] x, const floating[:, ::1] dout,
    const Signs *signs, Py_ssize_t offset, Py_ssize_t groups, real minus_shift, real scale,
    Gate gate, Direction way,
) noexcept nogil:
    """Groups of eight rows, in LANES sums in registers; columns that make no step go to the first
    of these."""
    cdef floating storage[GROUP * STEPS * LANES + 2 * LINE]
    cdef floating *room = <floating *>aligned(storage)
    cdef const floating[:, ::1] xs
    cdef const floating[:, ::1] douts
    cdef double lanes1[LANES]
    cdef double lanes2[LANES]
    cdef Py_ssize_t g, i, j, k, start, width, steps = x.shape[1] // LANES
    cdef Py_ssize_t stride = x.strides[0] // <Py_ssize_t>sizeof(floating)
    for j in range(LANES):
        lanes1[j] = lanes2[j] = 0
    for g in range(groups):
        i = g * GROUP
        for k in range(ceil_div(steps, STEPS)):
            start = k * STEPS * LANES
            width = min(<Py_ssize_t>STEPS * LANES, steps * LANES - start)
            xs = tile(x, i, start, GROUP, width)
            douts = upstream_rows(
                room, tile(dout, i, start, GROUP, width), signs, offset + i * stride + start, way)
            sum_steps(lanes1, lanes2, xs, douts, width // LANES, minus_shift, scale, gate, way)
        start, width = steps * LANES, x.shape[1] % LANES
        if width == 0:
            continue
        xs = tile(x, i, start, GROUP, width)
        douts = upstream_rows(
            room, tile(dout, i, start, GROUP, width), signs, offset + i * stride + start, way)
        for j in range(width):
            lanes1[j] += terms8(xs, douts, 0, j, minus_shift, gate, way)
            lanes2[j] += doubted(
                products8(xs, douts, 0, j, minus_shift, scale, gate, way),
                repeated_rows(xs, douts, COMPARED, COMPARED + 1, j, minus_shift, scale, gate, way))
    if real is float:
        compare_along(lanes2, x, dout, signs, offset, minus_shift, scale, gate, way)
    sum1[0] += fold_lanes(lanes1)
    sum2[0] += fold_lanes(lanes2)


cdef inline void sum_rest(
    double *sum1, double *sum2, const floating *x, const floating *dout, const floating *stop,
    real minus_shift, real scale, Gate gate, Direction way,
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
        total1 = term(x[last + j], dout[last + j], minus_shift, gate, way)
        total2 = product(x[last + j], dout[last + j], minus_shift, scale, gate, way)
        lanes1[j] = total1 if j >= first else 0
        lanes2[j] = total2 if j >= first else 0
    if steps > 0:  # without it GCC makes no vectors
        for j in range(LANES):
            total1, total2 = lanes1[j], lanes2[j]
            for k in range(steps):
                total1 += term(x[k * LANES + j], dout[k * LANES + j], minus_shift, gate, way)
                total2 += product(
                    x[k * LANES + j], dout[k * LANES + j], minus_shift, scale, gate, way)
            lanes1[j], lanes2[j] = total1, total2
    sum1[0] += fold_lanes(lanes1)
    sum2[0] += fold_lanes(lanes2)


cdef void sum_row(
    double *sum1, double *sum2, const floating *x, const floating *dout, const Signs *signs,
    Py_ssize_t offset, Py_ssize_t width, real minus_shift, real scale, Gate gate, Direction way,
) noexcept nogil:
    """A single row: strips of eight steps of LANES values, which are a group, and what is left. Not
    inline: GCC then makes branches, and no vectors, of the last LANES' mask."""
    cdef double lanes1[LANES]
    cdef double lanes2[LANES]
    cdef floating storage[STRIP + LANES + 2 * LINE]
    cdef floating *room = <floating *>aligned(storage)
    cdef const floating *stop = x + width
    cdef Py_ssize_t j, k, before, strips = width // STRIP
    if width < LANES:
        dout = upstream_row(room, dout, signs, offset, width, way)
        for j in range(width):
            sum1[0] += term(x[j], dout[j], minus_shift, gate, way)
            sum2[0] += product(x[j], dout[j], minus_shift, scale, gate, way)
        return
    if strips > 0:
        for j in range(LANES):
            lanes1[j] = lanes2[j] = 0
        for k in range(strips):
            sum_steps(
                lanes1, lanes2, rows_of(x, GROUP, LANES, LANES),
                rows_of(
                    upstream_row(room, dout, signs, offset, STRIP, way), GROUP, LANES, LANES),
                1, minus_shift, scale, gate, way)
            x += STRIP
            dout += STRIP
            offset += STRIP
        sum1[0] += fold_lanes(lanes1)
        sum2[0] += fold_lanes(lanes2)
    if x < stop:
        before = LANES if strips > 0 else 0  # some of these are among the last LANES
        dout = upstream_row(
            room, dout - before, signs, offset - before, before + (stop - x), way) + before
        sum_rest(sum1, sum2, x, dout, stop, minus_shift, scale, gate, way)


cdef inline void sum_run(
    double *sum1, double *sum2, const floating *x, const floating *dout, Py_ssize_t rows,
    Py_ssize_t width, Py_ssize_t stride, const Signs *signs, Py_ssize_t offset,
    real minus_shift, real scale, Gate gate, Direction way,
) noexcept nogil:
    """All rows. Of pointers: a view would be copied for each run, and many a run is short."""
    cdef Py_ssize_t i, groups = rows // GROUP
    if groups > 0:
        sum_groups(
            sum1, sum2, rows_of(x, rows, width, stride), rows_of(dout, rows, width, stride),
            signs, offset, groups, minus_shift, scale, gate, way)
    for i in range(groups * GROUP, rows):
        sum_row(
            sum1, sum2, x + i * stride, dout + i * stride, signs, offset + i * stride, width,
            minus_shift, scale, gate, way)
