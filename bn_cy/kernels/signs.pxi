# The signs of y, a bit a value, for the backward through a residual and a ReLU. The residual is not
# kept, so that the backward cannot compute the sign of y again.
#
# Derivation: the gradient of max(z, 0) is that of z where z > 0, else 0; z = xhat*gamma + beta + r
# hands it on to both of its parts, so that the gradient of r is dout where y > 0.
# Twin: `reference.relu_backward`. Tests: tests/test_activation.py, tests/test_same_bits.py.
# Bytes moved: 1/8 a value, written with y, and read in each pass of the backward that opens dout.
# Past the cache both do: the first one in scratch within L1, and the second one writes the gradient
# of the residual beside dx. Within it the first one writes that, and dx is computed of it.
#
# The bits lie in the order of the values, but a row of them begins with a byte, so that no two
# threads write to one byte: a run, or a row of the array. Where several blocks of images would
# share bytes it is an image, and where rows are merged for writing, all is one row. So it is where
# every row is of whole bytes.

from libc.string cimport memcpy


cdef inline Signs plan_signs(
    unsigned char *bits, const Grid *writes, Py_ssize_t line_features,
) noexcept nogil:
    """A block begins at a multiple of so many features, if it is not all of them."""
    cdef Signs s
    cdef bint shared = line_features < writes.features and line_features * writes.inner % 8 != 0
    s.bits, s.let_through = bits, NULL
    if writes.runs or (writes.times == 1 and shared):
        s.row = writes.inner
    elif writes.times == 1:
        s.row = writes.features * writes.inner
    else:
        s.row = writes.outer * writes.features * writes.inner
    if s.row % 8 == 0:  # no byte is shared: all is one row, and nothing need be divided
        s.row = writes.outer * writes.features * writes.inner
    s.pitch = round_up(s.row, 8)
    return s


cdef inline Py_ssize_t row_at(const Signs *s, Py_ssize_t offset, Py_ssize_t count) noexcept nogil:
    """The row of signs in which the values at an offset begin."""
    return 0 if offset + count <= s.row else offset // s.row


cdef inline void set_bytes(
    unsigned char *bits, const floating *y, Py_ssize_t bytes,
) noexcept nogil:
    if floating is float:
        sign_floats(bits, y, bytes)
    else:
        sign_doubles(bits, y, bytes)


cdef inline unsigned char some_positive(const floating *y, Py_ssize_t count) noexcept nogil:
    cdef unsigned bits = 0
    cdef Py_ssize_t k
    for k in range(count):
        bits |= <unsigned>(y[k] > 0) << k
    return <unsigned char>bits


cdef void set_row(
    unsigned char *bits, Py_ssize_t at, const floating *y, Py_ssize_t count,
) noexcept nogil:
    """Of adjacent values of a row, from bit `at` on. What goes before in a byte has been set, what
    follows has not."""
    cdef Py_ssize_t k = min(count, -at & 7), bytes = (count - k) // 8
    if k > 0:
        bits[at // 8] |= <unsigned char>(some_positive(y, k) << at % 8)
    set_bytes(bits + (at + k) // 8, y + k, bytes)
    k += 8 * bytes
    if k < count:
        bits[(at + k) // 8] = some_positive(y + k, count - k)


cdef void set_signs(
    const Signs *s, Py_ssize_t offset, const floating *y, Py_ssize_t count,
) noexcept nogil:
    """Of values that are written to an offset in the array, if there is a backward that wants
    them."""
    cdef Py_ssize_t row, into, part
    while s.bits != NULL and count > 0:
        row = row_at(s, offset, count)
        into = offset - row * s.row
        part = min(count, s.row - into)
        set_row(s.bits, row * s.pitch + into, y, part)
        offset, y, count = offset + part, y + part, count - part


cdef inline void open_row(
    floating *to, const floating *dout, const unsigned char *bits, Py_ssize_t at, Py_ssize_t count,
) noexcept nogil:
    """dout where y > 0, else 0; all of it where there are no signs, and so no ReLU."""
    if bits == NULL:
        memcpy(to, dout, count * sizeof(floating))
    elif floating is float:
        open_floats(to, dout, bits, at, count)
    else:
        open_doubles(to, dout, bits, at, count)


cdef void open_values(
    floating *to, const floating *dout, const Signs *s, Py_ssize_t offset, Py_ssize_t count,
) noexcept nogil:
    """What a ReLU lets through of values that lie at an offset in the array, and may belong to
    several rows of signs."""
    cdef Py_ssize_t row, into, part
    while count > 0:
        row = row_at(s, offset, count)
        into = offset - row * s.row
        part = min(count, s.row - into)
        open_row(to, dout, s.bits, row * s.pitch + into, part)
        to, dout, offset, count = to + part, dout + part, offset + part, count - part
