# From features to columns and back: what a feature has is repeated for its columns before a pass,
# and what its columns have is added up after one.
#
# Derivation: the sums over the examples, of which each column holds a share.
# Twin: `sum(axis=...)` in `reference`.
# Tests: tests/test_same_bits.py, tests/test_kernels.py; the bounds-checked build.
# Bytes moved: O(columns) of scratch, within the first-level cache.

from libc.string cimport memcpy

ctypedef fused real:  # what a sum's terms are computed in: the data's type, or double in a rescue
    float
    double

cdef enum:  # the two sums of a first pass, a row each
    FIRST   # sum(u): of x - shift, or of dout
    SECOND  # sum(u*v): of (x - shift)^2, or of dout*(x - shift)*scale
    SUMS


cdef inline void clear(real[::1] values) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(values.shape[0]):
        values[i] = 0


cdef inline real sum4(real a, real b, real c, real d) noexcept nogil:
    return (a + b) + (c + d)


cdef inline double fold_eight(const double *lane) noexcept nogil:
    return (
        sum4(lane[0], lane[1], lane[2], lane[3]) + sum4(lane[4], lane[5], lane[6], lane[7]))


cdef inline double fold_columns(const double *columns, Py_ssize_t each) noexcept nogil:
    """The sum of a feature's columns: of eight lanes of them, and of those that are left."""
    cdef double lane[8]
    cdef double rest = 0
    cdef Py_ssize_t e, k
    for k in range(each // 8 * 8, each):
        rest += columns[k]
    if each < 8:
        return rest
    for k in range(8):
        lane[k] = columns[k]
    for e in range(1, each // 8):
        for k in range(8):
            lane[k] += columns[8 * e + k]
    return rest + fold_eight(lane)


cdef inline double fold_lanes(const real *lanes) noexcept nogil:
    """The same of LANES columns: a fixed count saves a tenth of the time of short runs."""
    cdef double lane[8]
    cdef Py_ssize_t k
    for k in range(8):
        lane[k] = <double>lanes[k] + lanes[k + 8]
    return fold_eight(lane)


cdef inline void fold(
    double[::1] values, const double[::1] columns, const Grid *g, const Block *b,
) noexcept nogil:
    """The sum of the columns of each feature."""
    cdef Py_ssize_t t, f, size = b.size, each = g.each
    for f in range(size):
        values[f] = 0
    for t in range(g.times):
        if each == 1:
            for f in range(size):
                values[f] += columns[t * size + f]
        else:
            for f in range(size):
                values[f] += fold_columns(&columns[(t * size + f) * each], each)


cdef inline void repeat(
    real *columns, const real *values, Py_ssize_t size, Py_ssize_t each,
) noexcept nogil:
    """Each value to `each` columns, in vectors: the next value overwrites what is too much, and
    after the last one SCRATCH has room for it."""
    cdef Py_ssize_t f, e
    cdef int k
    for f in range(size):
        for e in range(ceil_div(each, 8)):
            for k in range(8):
                columns[8 * e + k] = values[f]
        columns += each


cdef void expand(real[::1] columns, const Grid *g, const Block *b) noexcept nogil:
    """A value a feature, which the first columns hold, to a value a column."""
    cdef Py_ssize_t t, width = b.size * g.each
    cdef real values[WIDTH]
    if g.each > 1:
        memcpy(values, &columns[0], b.size * sizeof(real))
        repeat(&columns[0], values, b.size, g.each)
    for t in range(1, g.times):
        memcpy(&columns[t * width], &columns[0], width * sizeof(real))


cdef inline void spread(
    real[::1] columns, const double[::1] values, const Grid *g, const Block *b,
) noexcept nogil:
    """The same of values in double."""
    cdef Py_ssize_t f
    for f in range(b.size):
        columns[f] = <real>values[f]
    expand(columns, g, b)


cdef inline double[:, ::1] of_features(double[:, ::1] rows, const Block *b) noexcept nogil:
    """Of rows of all features, those of a block."""
    return tile(rows, 0, b.start, rows.shape[0], b.size)


cdef inline double[:, ::1] of_level(
    double[:, :, ::1] levels, Py_ssize_t level, const Block *b,
) noexcept nogil:
    """The two sums of a block's features on one level of a tree."""
    return rows_of(&levels[level, 0, b.start], SUMS, b.size, levels.shape[2])


cdef inline void add_sums(double[:, ::1] total, const double[:, ::1] partial) noexcept nogil:
    cdef Py_ssize_t f
    for f in range(total.shape[1]):
        total[FIRST, f] += partial[FIRST, f]
    for f in range(total.shape[1]):
        total[SECOND, f] += partial[SECOND, f]
