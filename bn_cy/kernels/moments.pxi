# Mean and variance of a block of features, and what normalizing needs of them.
#
# Derivation, over the n values of a feature, with d = sum(x - shift)/n:
#
#   mean = shift + d        var = sum((x - shift)^2)/n - d^2        invstd = 1/sqrt(var + eps)
#
# Any shift gives these; one near the mean loses no digits. It is guessed from a few values, and
# where it turns out to be far off, or values repeat, the feature is summed again: its rescue.
# Twins: `reference.moments`, `reference.forward`.
# How it keeps its digits: docs/accuracy.md.
# Tests: tests/test_accuracy.py (outliers, offsets, overflow), tests/test_kernels.py.
# Bytes moved: O(features); samples are a few values a feature. A rescue is a first pass more.

from libc.math cimport NAN, fabs, isfinite, sqrt

from bn_cy.kernels cimport GAMMA, INTERCEPT, INVSTD, MEAN, REST, STATISTICS, VAR

cdef enum:
    # Values of a feature that its shift is the mean of: of normal data it is then 1.2 standard
    # deviations off in one feature of thousands.
    SAMPLES = 8
    # Passes in double until a feature's shift is near its mean, at the most.
    RESCUES = 4
    # Pairs of neighbours that are looked at, and how many are near each other where values run
    # smoothly: of normal data in three features of a million.
    NEIGHBOURS = 8
    NEAR = 6
    # Values of a feature from which on this is worth it: what sums of fewer round alike, counted so
    # often, is within the contract.
    MANY_VALUES = 512


cdef inline double coarse(double value, double spread) noexcept nogil:
    """Round to about an eighth of the spread, so that x - shift is exact in float for nearly all x:
    a shift with finer digits would round most differences, and the same way."""
    cdef double large = 844424930131968.0 * spread  # 1.5 * 2^49
    return (value + large) - large


cdef void sample_shift(
    double[:, ::1] s, const floating[:, :, ::1] x, const Grid *g, const Block *b,
) noexcept nogil:
    """A guess at the mean: that of a few values spread over the feature. Exact for a constant."""
    cdef const floating *first = &x[0, b.start, 0]
    cdef const floating *row
    cdef floating total[WIDTH]  # of steps from the first value
    cdef floating reach[WIDTH]  # the largest of them
    cdef floating step
    cdef Py_ssize_t k, f, inner = g.inner, size = b.size
    cdef Py_ssize_t samples = min(<Py_ssize_t>SAMPLES, g.count)
    cdef double one_of_them = 1 / <double>samples
    clear(row_of(total, size))
    clear(row_of(reach, size))
    for k in range(1, samples):
        row = &x[k * g.outer // samples, b.start, k * inner // samples]
        if row == first:  # nothing new; without this GCC makes no vectors of the loop below
            continue
        for f in range(size):
            step = row[f * inner] - first[f * inner]
            total[f] += step
            reach[f] = max(reach[f], <floating>fabs(step))
    for f in range(size):
        s[MEAN, f] = first[f * inner] + <double>total[f] * one_of_them
    if floating is float:
        for f in range(size):
            s[MEAN, f] = <float>coarse(s[MEAN, f], reach[f])


cdef inline void set_moments(
    double[:, ::1] s, Py_ssize_t f, double deviation, double square,
) noexcept nogil:
    """Those of a feature from the means about the shift, which its mean still holds."""
    cdef double shift = s[MEAN, f]
    cdef double var = square - deviation * deviation
    cdef double mean = shift + deviation
    s[MEAN, f] = mean
    s[REST, f] = (shift - mean) + deviation
    s[VAR, f] = 0 if var < 0 else var


cdef void doubt_fine_shifts(
    double[:, ::1] sums, const double[:, ::1] s, Py_ssize_t count,
) noexcept nogil:
    """Make NaN of the second sum where the shift is not in few digits, as all samples were the same
    value, and others are not: the differences to it were rounded. Where it is beyond 2,048 standard
    deviations they are exact."""
    cdef Py_ssize_t f
    cdef double far = 4194304 / <double>count  # 2048^2, of the sum of squares
    for f in range(s.shape[1]):
        if ((float_bits(<float>s[MEAN, f]) & FINE_BITS) != 0) & (
                s[MEAN, f] * s[MEAN, f] < far * sums[SECOND, f]):
            sums[SECOND, f] = NAN


cdef inline double far_from(Py_ssize_t count) noexcept nogil:
    """(mean - shift)^2/var from which a feature is summed again. This ratio multiplies the rounding
    error of the sum of squares, which is smaller where there are more values. A feature that is
    summed again in vain costs its block a pass: of normal data it is one in thousands."""
    return 1.5 if count < 1024 else 16


cdef bint find_moments(
    double[:, ::1] s, long long *suspect, const double[:, ::1] sums, Py_ssize_t count,
    double least,
) noexcept nogil:
    """The moments of a block, and which of them to doubt: those whose shift was far from the mean,
    those of values that repeat, and those whose squares overflowed or were too small to keep their
    digits. 0 is among these."""
    cdef Py_ssize_t f
    cdef double deviation, nth = 1 / <double>count, far = far_from(count)
    cdef long long doubt = 0  # 1e300: squares that come near overflow
    for f in range(s.shape[1]):
        set_moments(s, f, sums[FIRST, f] * nth, sums[SECOND, f] * nth)
    for f in range(s.shape[1]):
        deviation = sums[FIRST, f] * nth  # `&`, not `and`: no branches, so that it is vectorised
        suspect[f] = not (
            (deviation * deviation <= far * s[VAR, f])
            & (least <= s[VAR, f]) & (s[VAR, f] <= 1e300))
        doubt |= suspect[f]
    return doubt != 0


cdef inline bint is_near(floating one, floating next_one, floating limit) noexcept nogil:
    """Whether neighbours are near each other. If they are the same value, that says nothing: the
    zeros of a ReLU are."""
    cdef floating step = next_one - one
    return (step * step < limit) & (step != 0)


cdef void count_near_rows(
    floating *near, const floating *limit, const floating[:, :, ::1] x, const Grid *g,
    const Block *b,
) noexcept nogil:
    """How many pairs of rows are near, column by column."""
    cdef const floating *row
    cdef Py_ssize_t k, f, below = x.shape[1]
    clear(row_of(near, b.size))
    for k in range(NEIGHBOURS):
        row = &x[k * g.outer // NEIGHBOURS, b.start, 0]
        for f in range(b.size):
            near[f] += <floating>is_near(row[f], row[f + below], limit[f])


cdef void count_near_along(
    floating *near, const floating *limit, const floating[:, :, ::1] x, const Grid *g,
    const Block *b,
) noexcept nogil:
    """The same of neighbours in a row of a feature. As each pair may be a line from memory, they
    are counted until too many are not near: of random data that is the third."""
    cdef const floating *at
    cdef Py_ssize_t k, f, far, inner = g.inner
    for f in range(b.size):
        k = far = 0
        while k < NEIGHBOURS and far <= NEIGHBOURS - NEAR:
            at = &x[  # where an image may begin, and with it one of its rows
                k * g.outer // NEIGHBOURS, b.start + f,
                min(k * inner // NEIGHBOURS, inner - 2)]
            far += not is_near(at[0], at[1], limit[f])
            k += 1
        near[f] = k - far


cdef bint doubt_smooth(
    long long *suspect, const double[:, ::1] s, const floating[:, :, ::1] x, const Grid *g,
    const Block *b,
) noexcept nogil:
    """Doubt features whose values run smoothly, as those of a ramp or sorted ones do, and tell
    whether there are any. From one group to the next their last bits change little, or by the same
    step, so that many sums are ties that are rounded the same way, and what that leaves of the mean
    counts n times with dout, as where values repeat."""
    cdef floating near[WIDTH]  # how many pairs are within an eighth of a standard deviation
    cdef floating limit[WIDTH]
    cdef Py_ssize_t f
    cdef long long found = 0
    for f in range(b.size):
        limit[f] = <floating>(s[VAR, f] * 0.015625)
    if g.inner == 1:
        count_near_rows(near, limit, x, g, b)
    else:
        count_near_along(near, limit, x, g, b)
    for f in range(b.size):
        suspect[f] |= near[f] >= NEAR
        found |= suspect[f]
    return found != 0


cdef inline void spread_shift(
    real[:, ::1] columns, const double[:, ::1] s, const Grid *g, const Block *b,
) noexcept nogil:
    """Minus the shift, which the mean holds, of every column."""
    cdef Py_ssize_t f
    for f in range(b.size):
        columns[MINUS_CENTRE, f] = -<real>s[MEAN, f]
    expand(row_of(&columns[MINUS_CENTRE, 0], b.width), g, b)


cdef inline void sum_deviations(
    double[:, ::1] total, const floating[:, :, ::1] x, double[:, ::1] s, real *scratch,
    const Grid *g, const Block *b, double[:, :, ::1] levels,
) noexcept nogil:
    """The sums of a block about its shift, in the type of the scratch."""
    cdef real[:, ::1] centres = rows_of(scratch, CENTRES, b.width, b.pitch)
    spread_shift(centres, s, g, b)
    sums_of_block(FORWARDS, total, x, x, centres, g, b, levels)


cdef void sum_again(
    double[:, ::1] s, long long *suspect, const floating[:, :, ::1] x, const Grid *g,
    const Block *b, double[:, :, ::1] levels,
) noexcept nogil:
    """The same sums with every term in double, about the mean just found, until it stays there."""
    cdef double scratch[CENTRES * SCRATCH]
    cdef double storage[SUMS * WIDTH]
    cdef double[:, ::1] sums = rows_of(storage, SUMS, b.size, WIDTH)
    cdef double deviation, nth = 1 / <double>g.count, far = far_from(g.count)
    cdef bint again = True
    cdef int attempt
    cdef Py_ssize_t f
    for f in range(b.size):
        if suspect[f] and not isfinite(s[MEAN, f]):  # overflowed: from any value of the feature
            s[MEAN, f] = x[0, b.start + f, 0]
    for attempt in range(RESCUES):
        if not again:
            return
        again = False
        sum_deviations(sums, x, s, scratch, g, b, levels)
        for f in range(b.size):
            if suspect[f]:
                deviation = sums[FIRST, f] * nth
                set_moments(s, f, deviation, sums[SECOND, f] * nth)
                suspect[f] = isfinite(s[VAR, f]) and deviation * deviation > far * s[VAR, f]
                again |= suspect[f] != 0


cdef inline Py_ssize_t end_of_stretch(
    const long long *suspect, Py_ssize_t first, const Grid *g, const Block *b,
) noexcept nogil:
    """Behind the last of the suspects from `first` on whose neighbours are near. Those of a cache
    line are read together."""
    cdef Py_ssize_t stop = first, f = first, near = 1 if g.runs else max(LINE // g.each, 1)
    while f < b.size and f < stop + near:
        f += 1
        if suspect[f - 1]:
            stop = f
    return stop


cdef void rescue_moments(
    double[:, ::1] s, long long *suspect, const floating[:, :, ::1] x, const Grid *g,
    const Block *b, double[:, :, ::1] levels,
) noexcept nogil:
    """Sum suspects again, a stretch of them at a time."""
    cdef Grid r = single_rows(g)
    cdef Block stretch
    cdef Py_ssize_t first = 0, stop
    while first < b.size:
        stop = end_of_stretch(suspect, first, g, b) if suspect[first] else first
        if stop > first:
            stretch = block_at(&r, b.start + first, stop - first)
            sum_again(
                tile(s, 0, first, STATISTICS, stop - first), suspect + first,
                x, &r, &stretch, levels)
        first = stop + 1


cdef void settle_nans(double[:, ::1] rows) noexcept nogil:
    """One NaN for all: whose sign a sum of two has depends on the order of an instruction."""
    cdef Py_ssize_t i, f
    for i in range(rows.shape[0]):
        for f in range(rows.shape[1]):
            if rows[i, f] != rows[i, f]:
                rows[i, f] = NAN


cdef inline void finish_moments(
    double[:, ::1] s, double[:, ::1] sums, const floating[:, :, ::1] x, const Grid *g,
    const Block *b, double[:, :, ::1] levels,
) noexcept nogil:
    cdef long long suspect[WIDTH]
    cdef double least = 1e-30 if floating is float else 1e-290  # squares below it lose digits
    cdef bint doubt
    if floating is float and FEW <= g.count:
        doubt_fine_shifts(sums, s, g.count)
    doubt = find_moments(s, suspect, sums, g.count, least)
    if floating is float and MANY_VALUES <= g.count:
        doubt |= doubt_smooth(suspect, s, x, g, b)
    if doubt:
        rescue_moments(s, suspect, x, g, b, levels)
        settle_nans(tile(s, 0, 0, VAR + 1, b.size))


cdef inline void moments_of_block(
    double[:, ::1] s, const floating[:, :, ::1] x, const Grid *g, const Block *b,
    double[:, :, ::1] levels,
) noexcept nogil:
    """From samples to a shift, sums about it, moments."""
    cdef char scratch[8 * CENTRES * SCRATCH]  # of doubles, or of floats
    cdef double storage[SUMS * WIDTH]
    cdef double[:, ::1] sums = rows_of(storage, SUMS, b.size, WIDTH)
    sample_shift(s, x, g, b)
    if g.count < FEW:
        sum_deviations(sums, x, s, <double *>aligned(scratch), g, b, levels)
    else:
        sum_deviations(sums, x, s, <floating *>aligned(scratch), g, b, levels)
    finish_moments(s, sums, x, g, b, levels)


cdef void average(
    double[::1] running, const double[::1] batch, double weight, double factor,
) noexcept nogil:
    """running += weight*(factor*batch - running). A weight of 1 forgets a NaN, and a weight of 0
    lets none in."""
    cdef Py_ssize_t f
    if weight == 1:
        for f in range(running.shape[0]):
            running[f] = factor * batch[f]
    elif weight != 0:
        for f in range(running.shape[0]):
            running[f] += weight * (factor * batch[f] - running[f])


cdef inline bint are_finite(const double[::1] values) noexcept nogil:
    cdef Py_ssize_t f
    cdef long long found = 0  # and `not <=`: as in `find_moments`
    for f in range(values.shape[0]):
        found |= not (fabs(values[f]) <= LARGEST)
    return found == 0


cdef void find_invstd(
    double[:, ::1] s, const floating[::1] gamma, const floating[::1] beta, double eps,
    const Block *b,
) noexcept nogil:
    """invstd, gamma and the intercept: what the second pass, and the backward, need. Where var and
    eps are 0, invstd is 0: then y is beta, and dx and dgamma are 0."""
    cdef double added, slope, below
    cdef Py_ssize_t f
    for f in range(b.size):
        added = s[VAR, f] + eps
        s[INVSTD, f] = 0 if added == 0 else 1 / sqrt(added)
    if gamma.shape[0] == 0:
        for f in range(b.size):
            s[GAMMA, f] = 1
    else:
        for f in range(b.size):
            s[GAMMA, f] = gamma[b.start + f]
    if beta.shape[0] == 0:
        for f in range(b.size):
            s[INTERCEPT, f] = -0.0  # to add it changes no bit
    else:
        for f in range(b.size):
            s[INTERCEPT, f] = beta[b.start + f]
    for f in range(b.size):
        slope = s[GAMMA, f] * s[INVSTD, f]
        below = (s[MEAN, f] - <floating>s[MEAN, f]) + s[REST, f]
        s[INTERCEPT, f] -= below * slope  # not a negated product: a NaN keeps its sign


cdef void prepare_normalize(
    floating[:, ::1] columns, const double[:, ::1] s, const Grid *g, const Block *b,
) noexcept nogil:
    """Each parameter by a loop of its own: with more arrays GCC gives up making vectors."""
    cdef Py_ssize_t f
    for f in range(b.size):
        columns[HI, f] = <floating>s[MEAN, f]
        columns[SCALE, f] = <floating>(s[GAMMA, f] * s[INVSTD, f])
        columns[OFFSET, f] = <floating>s[INTERCEPT, f]
    for f in range(OFFSET + 1):
        expand(row_of(&columns[f, 0], b.width), g, b)
