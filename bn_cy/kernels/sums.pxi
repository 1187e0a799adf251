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
#
# The rounding errors of the groups average out, unless a feature has few distinct values: these
# round in the same few ways all over, and what that leaves of the mean counts n times in dgamma
# where dout has a mean. Where dout has few values, too, so do the products. So what repeats is
# noticed (`repeated`), as two rows of each group are compared, and for values that come by turns
# some that are further apart. It makes NaN of the second sum, which is then in doubt as one that
# overflowed is, and is summed again in double.

from libc.math cimport NAN
from libc.string cimport memset

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
    # The last bits of a float. Terms that do without them are added exactly, and may repeat: binary
    # data, counts, half precision, the zeros of a ReLU, whatever is large against its deviation.
    FINE_BITS = 0xFF
    # The row of a group that is compared with the next one. They are in registers at that time; and
    # the first one may be what the shift was sampled from, and have no bits.
    COMPARED = HALF - 2
    # How many DISTANCES there are, and rows for each: a percent of the work.
    APART = 16
    ROWS_FOR_EACH = 40

# Values so far apart are compared, too, up to half of what there is: what comes by turns returns at
# every multiple of its period, and most periods divide one of these.
cdef Py_ssize_t[APART] DISTANCES
DISTANCES[:] = [
    30, 28, 64, 60, 72, 100, 150, 168, 224, 256, 360, 500, 720, 784, 1000, 1024]


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


cdef inline unsigned repeated(
    floating x1, floating x2, floating dout1, floating dout2, real shift, real scale, Gate gate,
    Direction way,
) noexcept nogil:
    """The bits of x - shift if two are the same, and those of its product with dout and of dout
    likewise: a product that was rounded may end in zeros. In double it does not matter."""
    cdef unsigned bits = 0
    if real is float:
        bits = repeated_bits(<real>x1 - shift, <real>x2 - shift)
        if Direction is not Forwards:  # whose square has other last bits than x - shift
            bits |= repeated_product(
                product(x1, dout1, shift, scale, gate, way),
                product(x2, dout2, shift, scale, gate, way), <real>dout1)
    return bits


cdef inline double doubted(double total, unsigned bits, real shift) noexcept nogil:
    """A sum; NaN if terms of these bits, which repeat, may have been rounded in it. Their own last
    bits do not tell it where the shift is not in few digits, as all of its samples were the same
    value: the difference to another value may have been rounded."""
    if real is float:
        return NAN if bits & (~0 if float_bits(shift) & FINE_BITS else FINE_BITS) else total
    else:
        return total


cdef inline unsigned repeated_rows(
    const floating[:, ::1] x, const floating[:, ::1] dout, Py_ssize_t i, Py_ssize_t other,
    Py_ssize_t j, real shift, real scale, Gate gate, Direction way,
) noexcept nogil:
    """The same of two rows in column j."""
    return repeated(
        x[i, j], x[other, j], dout[i, j], dout[other, j], shift, scale, gate, way)


cdef void compare_rows(
    unsigned *bits, const floating[:, ::1] x, const floating[:, ::1] dout,
    const real[:, ::1] centres, Direction way,
) noexcept nogil:
    """A row, or the next one, with some that are DISTANCES below it. Of one alone all values may be
    the shift, and have no bits."""
    cdef Py_ssize_t i, j, k
    cdef real scale
    for k in range(min(<Py_ssize_t>APART, x.shape[0] // ROWS_FOR_EACH)):
        if 2 * DISTANCES[k] > x.shape[0]:
            return
        i = COMPARED + k % 2
        for j in range(x.shape[1]):
            scale = 1 if Direction is Forwards else centres[CENTRE_SCALE, j]
            bits[j] |= repeated_rows(
                x, dout, i, i + DISTANCES[k], j, centres[CENTRE, j], scale,
                gate_at(centres, j, way), way)


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


cdef void sum_columns(
    double[:, ::1] sums, const floating[:, ::1] x, const floating[:, ::1] dout,
    const real[:, ::1] centres, Direction way,
) noexcept nogil:
    """All rows, column by column: groups of eight, one of four, and single ones."""
    cdef Py_ssize_t rows = x.shape[0], width = x.shape[1], i = 0, j
    cdef unsigned bits[WIDTH]
    cdef real shift, scale
    cdef Gate gate
    if GROUP <= rows:
        memset(bits, 0, width * sizeof(unsigned))
        while i + GROUP <= rows:
            sum_group(
                sums, bits, tile(x, i, 0, GROUP, width), tile(dout, i, 0, GROUP, width), centres,
                way)
            i += GROUP
        if real is float:
            compare_rows(bits, x, dout, centres, way)
            for j in range(width):
                sums[SECOND, j] = doubted(sums[SECOND, j], bits[j], centres[CENTRE, j])
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
