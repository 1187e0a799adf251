# The signs of y, a bit a value, for the backward through a residual and a ReLU. The residual is not
# kept, so that the backward cannot compute the sign of y again.
#
# Derivation: the gradient of max(z, 0) is that of z where z > 0, else 0; z = xhat*gamma + beta + r
# hands it on to both of its parts, so that the gradient of r is dout where y > 0.
# Twin: `reference.relu_backward`. Tests: tests/test_activation.py, tests/test_same_bits.py.
# Bytes moved: 1/8 a value forward, written with y; backward 8.1 (float32): dout is read, the
# gradient of the residual is written, and is the dout of everything that follows.
#
# The bits lie in the order of the values, but a row of them begins with a byte, so that no two
# threads write to one byte: a run, or a row of the array. Where several blocks of images would
# share bytes it is an image, and where rows are merged for writing, all is one row.

cdef struct Signs:
    unsigned char *bits
    Py_ssize_t row, pitch  # values of a row, and their bits with those that fill the last byte


cdef inline Signs plan_signs(
    unsigned char *bits, const Grid *writes, Py_ssize_t line_features,
) noexcept nogil:
    """A block begins at a multiple of so many features, if it is not all of them."""
    cdef Signs s
    cdef bint shared = line_features < writes.features and line_features * writes.inner % 8 != 0
    s.bits = bits
    if writes.runs or (writes.times == 1 and shared):
        s.row = writes.inner
    elif writes.times == 1:
        s.row = writes.features * writes.inner
    else:
        s.row = writes.outer * writes.features * writes.inner
    s.pitch = round_up(s.row, 8)
    return s


cdef inline Py_ssize_t sign_at(const Signs *s, Py_ssize_t offset) noexcept nogil:
    """The bit of the value at an offset in the array."""
    return offset // s.row * s.pitch + offset % s.row


cdef inline unsigned positive(const floating *y) noexcept nogil:
    """Which of eight values are above 0, a bit each."""
    if floating is float:
        return positive_floats(y)
    else:
        return positive_doubles(y)


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
    cdef Py_ssize_t k = min(count, -at & 7)
    if k > 0:
        bits[at // 8] |= <unsigned char>(some_positive(y, k) << at % 8)
    while k + 8 <= count:
        bits[(at + k) // 8] = <unsigned char>positive(y + k)
        k += 8
    if k < count:
        bits[(at + k) // 8] = some_positive(y + k, count - k)


cdef void set_signs(
    const Signs *s, Py_ssize_t offset, const floating *y, Py_ssize_t count,
) noexcept nogil:
    """Of values that are written to an offset in the array, if there is a backward that wants
    them."""
    cdef Py_ssize_t part
    while s.bits != NULL and count > 0:
        part = min(count, s.row - offset % s.row)
        set_row(s.bits, sign_at(s, offset), y, part)
        offset, y, count = offset + part, y + part, count - part


cdef inline void open_eight(floating *to, const floating *dout, unsigned bits) noexcept nogil:
    if floating is float:
        open_floats(to, dout, bits)
    else:
        open_doubles(to, dout, bits)


cdef void open_row(
    floating *to, const floating *dout, const unsigned char *bits, Py_ssize_t at, Py_ssize_t count,
) noexcept nogil:
    """dout where y > 0, else 0; all of it where there are no signs, and so no ReLU."""
    cdef Py_ssize_t j = 0, k = at // 8
    cdef unsigned some
    if bits == NULL:
        memcpy(to, dout, count * sizeof(floating))
        return
    while j + 8 <= count:
        some = (bits[k] | <unsigned>bits[k + 1] << 8) >> at % 8
        open_eight(to + j, dout + j, some)
        j, k = j + 8, k + 1
    some = (bits[k] | <unsigned>bits[k + 1] << 8) >> at % 8
    while j < count:
        to[j] = dout[j] if some & 1 else 0
        j, some = j + 1, some >> 1


cdef void open_cell(
    floating[:, :, ::1] to, const floating[:, :, ::1] dout, const Signs *s,
    const Grid *g, const Block *b, Py_ssize_t cell,
) noexcept nogil:
    """The gradient of the residual: of what a block has in one cell. A row of the grid may be
    merged of some rows of signs."""
    cdef Piece p = cell_at(g, b, cell)
    cdef Py_ssize_t i, start, stop, count
    while next_piece(&p, g, b):
        for i in range(p.rows):
            start = p.offset + i * g.stride
            stop = start + p.width
            while start < stop:
                count = min(stop - start, s.row - start % s.row)
                open_row(
                    &to[0, 0, 0] + start, &dout[0, 0, 0] + start, s.bits, sign_at(s, start), count)
                start += count
