# The sums of the gradient for a block of features, and what dx needs of them.
#
# Derivation: dbeta = sum(dout) and dgamma = sum(dout*xhat), summed about a centre c near the mean,
# with a scale p near invstd:
#
#   dgamma = (sum(dout*(x - c)*p)/p - (mean - c)*dbeta)*invstd
#
# Twin: `reference.backward_closed_form`. How it keeps its digits: docs/accuracy.md.
# Tests: tests/test_accuracy.py, tests/test_kernels.py.
# Bytes moved: O(features). A rescue is a first pass more.

from libc.math cimport fabs
from libc.string cimport memcpy

from bn_cy.kernels cimport GAMMA, INTERCEPT, INVSTD, MEAN, REST, STATISTICS, VAR


cdef enum:
    # Columns that are summed again at a time: a thread may have a small stack.
    RESCUED = WIDTH // 2


cdef inline unsigned long long bits_of(double value) noexcept nogil:
    cdef unsigned long long bits
    memcpy(&bits, &value, sizeof(bits))
    return bits


cdef inline double power_of_two(unsigned long long bits) noexcept nogil:
    """The number that has the exponent of these bits: to multiply by it rounds nothing."""
    cdef double value
    bits &= 0x7FF0000000000000ULL
    memcpy(&value, &bits, sizeof(value))
    return value


cdef inline double power_below(double value) noexcept nogil:
    return power_of_two(bits_of(value))


cdef inline double root_below(double value) noexcept nogil:
    """A power of two near the square root, not above it: half the exponent. 0 of 0."""
    return power_of_two((bits_of(value) >> 1) + (1023ULL << 51)) if value > 0 else 0


cdef inline double reciprocal(double power) noexcept nogil:
    """1/power of a power of two: the exponent with the other sign."""
    return power_of_two((2046ULL << 52) - bits_of(power))


cdef inline void find_centres(
    double[:, ::1] centres, const double[:, ::1] s, bint single_precision,
) noexcept nogil:
    """What dgamma is summed about, and a factor, such that hardly a term is rounded on the way."""
    cdef Py_ssize_t f
    for f in range(s.shape[1]):
        centres[MINUS_CENTRE, f] = -coarse(s[MEAN, f], root_below(s[VAR, f]))
        centres[CENTRE_SCALE, f] = power_below(s[INVSTD, f])
    if single_precision:
        for f in range(s.shape[1]):
            centres[MINUS_CENTRE, f] = <float>centres[MINUS_CENTRE, f]


cdef inline void spread_gate(
    real[:, ::1] columns, const double[:, ::1] s, floating kind, const Grid *g, const Block *b,
) noexcept nogil:
    """What a gate computes y of: numbers of the data's type, that of `kind`, as in
    `prepare_normalize`."""
    cdef Py_ssize_t f
    for f in range(b.size):
        columns[GATE_HI, f] = <floating>s[MEAN, f]
        columns[GATE_SLOPE, f] = <floating>(s[GAMMA, f] * s[INVSTD, f])
        columns[GATE_OFFSET, f] = <floating>s[INTERCEPT, f]
    for f in range(GATE_HI, GATED_CENTRES):
        expand(row_of(&columns[f, 0], b.width), g, b)


cdef inline void spread_centres(
    int way, real[:, ::1] columns, const double[:, ::1] centres, const double[:, ::1] s,
    floating kind, const Grid *g, const Block *b,
) noexcept nogil:
    """What the terms of a direction need of every column."""
    cdef int c
    for c in range(CENTRES):
        spread(row_of(&columns[c, 0], b.width), row_of(&centres[c, 0], b.size), g, b)
    if way == GATED:
        spread_gate(columns, s, kind, g, b)


cdef inline bint find_unsure(long long *suspect, const double[:, ::1] sums) noexcept nogil:
    """Which features have a sum that overflowed, or is in doubt, and whether there are any."""
    cdef Py_ssize_t f
    cdef long long found = 0  # and `&`: as in `find_moments`
    for f in range(sums.shape[1]):
        suspect[f] = not ((fabs(sums[FIRST, f]) <= LARGEST) & (fabs(sums[SECOND, f]) <= LARGEST))
        found |= suspect[f]
    return found != 0


cdef void rescue_gradients(
    int way, double[:, ::1] sums, const long long *suspect, const double[:, ::1] centres,
    const double[:, ::1] s, const floating[:, :, ::1] dout, const floating[:, :, ::1] x,
    const Grid *g, const Block *b, double[:, :, ::1] levels,
) noexcept nogil:
    """Suspects again, a stretch of them at a time, with every term in double."""
    cdef Grid r = single_rows(g)
    cdef Block stretch
    cdef Py_ssize_t first = 0, size, half = max(<Py_ssize_t>1, b.size // 2)
    while first < b.size:
        if not suspect[first]:
            first += 1
            continue
        size = min(half, end_of_stretch(suspect, first, g, b) - first)
        stretch = block_at(&r, b.start + first, size)
        rescue_sums(
            way, tile(sums, 0, first, SUMS, size), suspect + first,
            tile(centres, 0, first, CENTRES, size), tile(s, 0, first, STATISTICS, size), dout, x,
            &r, &stretch, levels)
        first += size


cdef void rescue_sums(
    int way, double[:, ::1] sums, const long long *suspect, const double[:, ::1] centres,
    const double[:, ::1] s, const floating[:, :, ::1] dout, const floating[:, :, ::1] x,
    const Grid *g, const Block *b, double[:, :, ::1] levels,
) noexcept nogil:
    cdef double scratch[GATED_CENTRES * (RESCUED + 3 * LINE)]  # as SCRATCH
    cdef double storage[SUMS * RESCUED]
    cdef double[:, ::1] wide = rows_of(storage, SUMS, b.size, RESCUED)
    cdef double[:, ::1] columns = rows_of(scratch, GATED_CENTRES, b.width, b.pitch)
    cdef Py_ssize_t f
    spread_centres(way, columns, centres, s, <floating>0, g, b)
    sums_of_block(way, wide, x, dout, columns, g, b, levels)
    for f in range(b.size):
        if suspect[f]:
            sums[FIRST, f], sums[SECOND, f] = wide[FIRST, f], wide[SECOND, f]


cdef void find_dgamma(
    double[:, ::1] sums, const double[:, ::1] centres, const double[:, ::1] s,
) noexcept nogil:
    """sum(dout*xhat) from the sum about the centre; what that leaves of the mean weighs
    sum(dout)."""
    cdef Py_ssize_t f
    cdef double left
    for f in range(s.shape[1]):
        left = (s[MEAN, f] + centres[MINUS_CENTRE, f]) + s[REST, f]
        sums[SECOND, f] = (
            sums[SECOND, f] * reciprocal(centres[CENTRE_SCALE, f])
            - left * sums[FIRST, f]) * s[INVSTD, f]


cdef inline void store_gradient(
    floating[::1] gradient, const double *sums, const Block *b,
) noexcept nogil:
    cdef Py_ssize_t f
    if gradient.shape[0]:
        for f in range(b.size):
            gradient[b.start + f] = <floating>sums[f]


cdef void finish_gradients(
    int way, double[:, ::1] sums, floating[::1] dgamma, floating[::1] dbeta,
    const double[:, ::1] centres, const double[:, ::1] s,
    const floating[:, :, ::1] dout, const floating[:, :, ::1] x,
    const Grid *g, const Block *b, double[:, :, ::1] levels,
) noexcept nogil:
    cdef long long suspect[WIDTH]
    cdef bint unsure = find_unsure(suspect, sums)
    if floating is float and MANY_VALUES <= g.count:
        unsure |= doubt_smooth(suspect, s, x, g, b)
    if floating is float and unsure:
        rescue_gradients(way, sums, suspect, centres, s, dout, x, g, b, levels)
    find_dgamma(sums, centres, s)
    if unsure:
        settle_nans(sums)
    store_gradient(dbeta, &sums[FIRST, 0], b)
    store_gradient(dgamma, &sums[SECOND, 0], b)


cdef void sum_about_centres(
    int way, double[:, ::1] sums, const double[:, ::1] centres, const double[:, ::1] s,
    const floating[:, :, ::1] dout, const floating[:, :, ::1] x,
    const Grid *g, const Block *b, double[:, :, ::1] levels,
) noexcept nogil:
    """Not inline: its scratch is off the stack before a rescue."""
    cdef floating scratch[GATED_CENTRES * SCRATCH]
    cdef floating[:, ::1] columns = rows_of(
        <floating *>aligned(scratch), GATED_CENTRES, b.width, b.pitch)
    spread_centres(way, columns, centres, s, <floating>0, g, b)
    sums_of_block(way, sums, x, dout, columns, g, b, levels)


cdef inline void gradients_of_block(
    int way, double[:, ::1] sums, floating[::1] dgamma, floating[::1] dbeta, const double[:, ::1] s,
    const floating[:, :, ::1] dout, const floating[:, :, ::1] x,
    const Grid *g, const Block *b, double[:, :, ::1] levels,
) noexcept nogil:
    """From centres to sums about them, dbeta and dgamma."""
    cdef double storage[CENTRES * WIDTH]
    cdef double[:, ::1] centres = rows_of(storage, CENTRES, b.size, WIDTH)
    find_centres(centres, s, floating is float)
    sum_about_centres(way, sums, centres, s, dout, x, g, b, levels)
    finish_gradients(way, sums, dgamma, dbeta, centres, s, dout, x, g, b, levels)


cdef void prepare_input_gradient(
    floating[:, ::1] columns, const double[:, ::1] s, const double[:, ::1] sums, double count,
    const Grid *g, const Block *b,
) noexcept nogil:
    """Each parameter by a loop of its own, as in `prepare_normalize`."""
    cdef double nth = 1 / count
    cdef Py_ssize_t f
    for f in range(b.size):
        columns[HI, f] = <floating>s[MEAN, f]
        columns[SCALE, f] = <floating>s[INVSTD, f]
    for f in range(b.size):
        columns[PRODUCT, f] = <floating>(sums[SECOND, f] * nth)
        columns[DX_SCALE, f] = <floating>(s[GAMMA, f] * s[INVSTD, f])
    for f in range(b.size):
        columns[OFFSET, f] = <floating>(
            sums[FIRST, f] * nth
            - ((s[MEAN, f] - columns[HI, f]) + s[REST, f]) * s[INVSTD, f] * (sums[SECOND, f] * nth))
    for f in range(GATE):
        expand(row_of(&columns[f, 0], b.width), g, b)


cdef void prepare_gate(
    floating[:, ::1] columns, const double[:, ::1] s, const Grid *g, const Block *b,
) noexcept nogil:
    """Beside what `prepare_input_gradient` has set."""
    cdef Py_ssize_t f
    for f in range(b.size):
        columns[GATE, f] = <floating>s[INTERCEPT, f]
    expand(row_of(&columns[GATE, 0], b.width), g, b)


cdef void prepare_frozen_gradient(
    floating[:, ::1] columns, const double[:, ::1] s, const Grid *g, const Block *b,
) noexcept nogil:
    """Of statistics that do not depend on x: dx = gamma*invstd*dout is dout normalized with a mean
    and a beta of 0, and x is not read. (Through a ReLU without a residual it is: PASSED.)"""
    cdef Py_ssize_t f
    clear(row_of(&columns[HI, 0], b.width))
    clear(row_of(&columns[OFFSET, 0], b.width))
    for f in range(b.size):
        columns[SCALE, f] = <floating>(s[GAMMA, f] * s[INVSTD, f])
    expand(row_of(&columns[SCALE, 0], b.width), g, b)
