# The terms of the first passes: of sum(u) and sum(u*v) of every feature, one family for both
# directions.
#
#   forward   u = v = x - shift                       -> mean and var (moments.pxi)
#   backward  u = dout, v = (x - shift)*scale         -> dbeta and dgamma (gradients.pxi)
#   gated     the same of dout where y > 0, else of 0: the backward through a ReLU
#   signed    the same where y had a residual: its signs are kept (signs.pxi)
#
# Derivation: mean = sum(x)/n and var = sum((x - mean)^2)/n; dbeta = sum(dout) and
# dgamma = sum(dout*xhat).
# Twins: `reference.moments`, and the sums of `reference.backward_closed_form`.
# Tests: tests/test_kernels.py, tests/test_accuracy.py, tests/test_same_bits.py.
# Bytes moved: 4 a value forward and 8 backward (float32): x, or x and dout, are read once.
#
# A direction is an argument for its type alone: Cython makes a C function of each, and no
# instruction asks which it is. What it is stands in `upstream_rows`, `term` and `product` here and
# in `value` of writes.pxi; a new one is a member of Direction, and every `if Direction is` must
# know it. Which one a call is, is chosen in kernels.pyx, and asked at run time in `sum_cell_of`,
# `spread_centres`, schedule.pxi and threads.pxi. In the forward dout is x; it and the scale may be
# loaded, and have no say.
#
# Groups of eight rows are added up in the data's type (in double, where a term might not survive
# that: `real`), four and four of them, and go to sums in double. x - shift is x plus minus the
# shift, which has the same bits: x86 can subtract an operand in memory, but not from one, and would
# have to load x first.
#
# The rounding errors of the groups average out, unless a feature has few distinct values: these
# round in the same few ways all over, and what that leaves of the mean counts n times in dgamma
# where dout has a mean. Where dout has few values, too, so do the products. So what repeats is
# noticed (`repeated`), as two rows of each group are compared, and for values that come by turns
# some that are further apart. It makes NaN of the second sum, which is then in doubt as one that
# overflowed is, and is summed again in double. No array of what was noticed is kept: it would take
# an eighth of L1 from the columns.

from libc.math cimport NAN

cdef enum Forwards:
    FORWARDS
cdef enum Backwards:
    BACKWARDS = FORWARDS + 1
cdef enum Gated:
    GATED = BACKWARDS + 1
cdef enum Signed:
    SIGNED = GATED + 1
ctypedef fused Direction:
    Forwards
    Backwards
    Gated
    Signed

cdef enum:  # what is needed of every column, a row each
    MINUS_CENTRE  # minus a number near the mean, in few digits
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
    # How many DISTANCES there are, and rows for each: two percent of a first pass within the cache.
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


cdef inline const floating *upstream_row(
    floating *room, const floating *dout, const Signs *signs, Py_ssize_t offset, Py_ssize_t count,
    Direction way,
) noexcept nogil:
    """dout as it goes into terms, of adjacent values at an offset in the array. What goes by signs
    is put where they say, or in `room`."""
    if Direction is Signed:
        if signs.let_through != NULL:
            room = <floating *>signs.let_through + offset
        open_values(room, dout, signs, offset, count)
        return room
    else:
        return dout


cdef inline const floating[:, ::1] upstream_rows(
    floating *room, const floating[:, ::1] dout, const Signs *signs, Py_ssize_t offset,
    Direction way,
) noexcept nogil:
    """The same of rows."""
    cdef Py_ssize_t i, rows = dout.shape[0], width = dout.shape[1]
    cdef Py_ssize_t stride = dout.strides[0] // <Py_ssize_t>sizeof(floating)
    cdef Py_ssize_t pitch = width
    if Direction is Signed:
        if signs.let_through != NULL:
            room, pitch = <floating *>signs.let_through + offset, stride
        for i in range(rows):
            open_values(room + i * pitch, &dout[i, 0], signs, offset + i * stride, width)
        return rows_of(room, rows, width, pitch)
    else:
        return dout


cdef inline real term(
    floating x, floating dout, real minus_shift, Gate gate, Direction way,
) noexcept nogil:
    """The term u of the first sum."""
    if Direction is Forwards:
        return <real>x + minus_shift
    else:
        return <real>upstream(x, dout, gate, way)


cdef inline real product(
    floating x, floating dout, real minus_shift, real scale, Gate gate, Direction way,
) noexcept nogil:
    """The term u*v of the second sum.

    The backward does not sum dout*xhat: what the rounding errors of all xhat have in common would
    add up n times, because the exact sum(xhat) is 0, and (x - mean)*invstd is rounded the same way
    wherever the mean has digits below those of x. x less a number of few digits near the mean is
    exact, or nearly so, and so is its product with a power of two. `find_dgamma` makes dgamma
    of it.
    """
    if Direction is Forwards:
        return (<real>x + minus_shift) * (<real>x + minus_shift)
    else:
        return <real>upstream(x, dout, gate, way) * ((<real>x + minus_shift) * scale)


cdef inline bint rounded_alike(float term, float other, float factor) noexcept nogil:
    """Whether two terms are equal and have last bits, so that sums round them alike. A rounded
    product may end in zeros, but its factor hardly does as well."""
    return (
        (float_bits(term) == float_bits(other))
        & (((float_bits(term) | float_bits(factor)) & FINE_BITS) != 0))


cdef inline bint repeated(
    floating x1, floating x2, floating dout1, floating dout2, real minus_shift, real scale,
    Gate gate, Direction way,
) noexcept nogil:
    """Whether x - shift is the same for two values, or its product with dout, and sums round it. In
    double it does not matter."""
    cdef real term1, term2
    cdef bint found = False
    if real is float:
        term1, term2 = <real>x1 + minus_shift, <real>x2 + minus_shift
        found = rounded_alike(term1, term2, term1)
        if Direction is not Forwards:  # whose square has other last bits than x - shift
            term1 = product(x1, dout1, minus_shift, scale, gate, way)
            term2 = product(x2, dout2, minus_shift, scale, gate, way)
            found |= rounded_alike(term1, term2, dout1) & (term1 != 0)
    return found


cdef inline real doubted(real total, bint doubt) noexcept nogil:
    """A sum, or NaN."""
    if real is float:
        return doubted_float(total, doubt)
    else:
        return <double>NAN if doubt else total


cdef inline bint repeated_rows(
    const floating[:, ::1] x, const floating[:, ::1] dout, Py_ssize_t i, Py_ssize_t other,
    Py_ssize_t j, real minus_shift, real scale, Gate gate, Direction way,
) noexcept nogil:
    """The same of two rows in column j."""
    return repeated(
        x[i, j], x[other, j], dout[i, j], dout[other, j], minus_shift, scale, gate, way)


cdef inline real terms4(
    const floating[:, ::1] x, const floating[:, ::1] dout, Py_ssize_t i, Py_ssize_t j,
    real minus_shift, Gate gate, Direction way,
) noexcept nogil:
    """Four rows from i on, in column j."""
    return sum4(
        term(x[i, j], dout[i, j], minus_shift, gate, way),
        term(x[i + 1, j], dout[i + 1, j], minus_shift, gate, way),
        term(x[i + 2, j], dout[i + 2, j], minus_shift, gate, way),
        term(x[i + 3, j], dout[i + 3, j], minus_shift, gate, way))


cdef inline real products4(
    const floating[:, ::1] x, const floating[:, ::1] dout, Py_ssize_t i, Py_ssize_t j,
    real minus_shift, real scale, Gate gate, Direction way,
) noexcept nogil:
    return sum4(
        product(x[i, j], dout[i, j], minus_shift, scale, gate, way),
        product(x[i + 1, j], dout[i + 1, j], minus_shift, scale, gate, way),
        product(x[i + 2, j], dout[i + 2, j], minus_shift, scale, gate, way),
        product(x[i + 3, j], dout[i + 3, j], minus_shift, scale, gate, way))


cdef inline real terms8(
    const floating[:, ::1] x, const floating[:, ::1] dout, Py_ssize_t i, Py_ssize_t j,
    real minus_shift, Gate gate, Direction way,
) noexcept nogil:
    return (
        terms4(x, dout, i, j, minus_shift, gate, way)
        + terms4(x, dout, i + HALF, j, minus_shift, gate, way))


cdef inline real products8(
    const floating[:, ::1] x, const floating[:, ::1] dout, Py_ssize_t i, Py_ssize_t j,
    real minus_shift, real scale, Gate gate, Direction way,
) noexcept nogil:
    return (
        products4(x, dout, i, j, minus_shift, scale, gate, way)
        + products4(x, dout, i + HALF, j, minus_shift, scale, gate, way))
