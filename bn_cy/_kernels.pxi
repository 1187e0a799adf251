# All the loops of bn_cy, for float and double from one source. Each `_kernels_*.pyx` includes this file
# and is compiled for one instruction set; `_dispatch.py` picks among them.
#
# The order of every floating-point sum below is a function of the shape alone, never of the number of
# threads, the width of a block, the alignment or the instruction set: the bits are the same everywhere.
#
# An array (outer, features, inner) is walked as rows of columns (see `Grid`). One row of a block of
# features holds `times` copies of the block, each feature `each` adjacent columns wide:
#
#   rows of features (inner == 1)     one sheet of `outer` rows, a feature is one column;
#   the same with few features        several rows are read as one wide row (times > 1);
#   small inner (7 x 7 images)        one sheet of `outer` rows, a feature is `inner` columns;
#   large inner (56 x 56 images)      `outer` sheets, a run of `inner` values cut into rows of `each`.
#
# So the four leaf loops know nothing but columns, and the columns of a feature are folded at the end.

from cpython.buffer cimport PyBUF_STRIDES, PyBuffer_Release, PyObject_GetBuffer
from cython cimport floating
from cython.parallel cimport prange
from libc.math cimport isfinite, sqrt
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

cdef extern from *:
    """
    #include <string.h>
    #include <stdint.h>
    #ifndef BN_CY_FLAGS
    #define BN_CY_FLAGS ""
    #endif
    #if defined(__x86_64__) || defined(_M_X64)
    #include <immintrin.h>
    #endif

    /* Copy past the cache: full lines with non-temporal stores, the ragged ends with ordinary ones. */
    static inline void bn_stream(void *target, const void *source, size_t bytes) {
    #if defined(__x86_64__) || defined(_M_X64)
        char *to = (char *)target;
        const char *from = (const char *)source;
        size_t head = (64 - ((uintptr_t)to & 63)) & 63;
        if (head > bytes) head = bytes;
        memcpy(to, from, head);
        to += head; from += head; bytes -= head;
        for (; bytes >= 64; bytes -= 64, to += 64, from += 64) {
    #if defined(__AVX512F__)
            _mm512_stream_ps((float *)to, _mm512_loadu_ps((const float *)from));
    #elif defined(__AVX__)
            _mm256_stream_ps((float *)to, _mm256_loadu_ps((const float *)from));
            _mm256_stream_ps((float *)to + 8, _mm256_loadu_ps((const float *)from + 8));
    #else
            for (int i = 0; i < 16; i += 4)
                _mm_stream_ps((float *)to + i, _mm_loadu_ps((const float *)from + i));
    #endif
        }
        memcpy(to, from, bytes);
    #else
        memcpy(target, source, bytes);
    #endif
    }

    /* Scratch that starts on a cache line: vectors that straddle two lines load at half the speed. */
    #define bn_aligned(scratch) ((void *)(((uintptr_t)(scratch) + 63) & ~(uintptr_t)63))

    static inline void bn_stream_end(void) {
    #if defined(__x86_64__) || defined(_M_X64)
        _mm_sfence();
    #endif
    }
    """
    void stream "bn_stream"(void *target, const void *source, size_t size) noexcept nogil
    void end_streaming "bn_stream_end"() noexcept nogil
    void *aligned "bn_aligned"(void *scratch) noexcept nogil
    const char *C_FLAGS "BN_CY_FLAGS"

FLAGS = C_FLAGS.decode()  # what the compiler was told for this variant

ctypedef fused real:  # the type a sum's terms are computed in: that of the data, or double in a rescue
    float
    double

cdef enum:
    NARROW = 256    # columns of a row up to which threads share out rows rather than columns
    WIDTH = 1024    # columns in a row of a block, at the most: bounds every scratch array
    SLAB = 512      # columns of a block of one-column features: its sums and parameters stay in L1
    LANES = 128     # columns that a long run is cut into, at the most
    GROUP = 8       # rows that are added up in the data's type before they go to double
    LINE = 16       # floats of a cache line
    CELLS = 64      # parts that a feature's rows are summed in, at the most
    CELL_ROWS = 128  # rows of such a part, at the least
    SAMPLES = 8     # values of a feature that its shift is the mean of
    SERIAL = 10000  # elements below which a second thread costs more than it brings
    RESCUES = 4     # passes in double until a feature's shift is near its mean
    FAR = 2         # (mean - shift)^2 / var above which a feature is summed again

cdef enum:  # rows of the array of statistics that forward leaves for backward, one value a feature
    MEAN        # before the mean is known: the shift
    REST        # what a double mean leaves over: the mean is MEAN + REST
    VAR
    INVSTD
    GAMMA

cdef enum:  # what the second passes need of every column, a row of scratch each
    HI = 0      # the mean as a high and a low part: (x - hi) - lo loses no digits
    LO
    SCALE       # forward: gamma*invstd
    BETA
    XHAT_SCALE = 2  # backward: invstd
    MEAN_DOUT       # dbeta/n
    MEAN_PRODUCT    # dgamma/n
    DX_SCALE        # gamma*invstd
    PARAMETERS
    SCRATCH = WIDTH + 2 * LINE  # pitch of such rows, at the most, and room to align them


# ---------------------------------------------------------------------------------------------------
# Geometry

cdef struct Grid:
    Py_ssize_t features, inner, count     # count: values of a feature
    Py_ssize_t sheets, rows, stride, tail  # a sheet: rows of columns, then `tail` columns of one more
    Py_ssize_t each, times                # columns of a feature in a row, copies of a block in a row
    Py_ssize_t cells, cell_rows           # the fixed grid in which rows are summed


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline Py_ssize_t round_up(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return ceil_div(a, b) * b


cdef inline Py_ssize_t line_multiple(Py_ssize_t width) noexcept nogil:
    """How many rows of `width` values end at the end of a cache line."""
    cdef Py_ssize_t multiple = LINE
    while multiple > 1 and width % 2 == 0:
        width //= 2
        multiple //= 2
    return multiple


cdef inline Py_ssize_t merged_rows(Py_ssize_t outer, Py_ssize_t width) noexcept nogil:
    """How many rows of `width` columns to read as one: whole cache lines, and wide enough for vectors."""
    cdef Py_ssize_t multiple = line_multiple(width)
    if multiple * width > WIDTH:
        return 1
    multiple *= ceil_div(LANES, multiple * width)
    return max(1, min(multiple, outer // GROUP))


cdef inline Py_ssize_t run_lanes(Py_ssize_t inner) noexcept nogil:
    """Columns that a run of `inner` values is cut into: a power of two that leaves GROUP rows."""
    cdef Py_ssize_t lanes = LANES
    while lanes > LINE and lanes * GROUP > inner:
        lanes //= 2
    return lanes


cdef Grid plan(Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner) noexcept nogil:
    """How an array of this shape is walked and in which order it is summed. Of the shape alone."""
    cdef Grid g
    g.features, g.inner, g.count = features, inner, outer * inner
    if inner > WIDTH or (outer < GROUP and inner >= 4 * LINE):
        g.each, g.times = run_lanes(inner), 1
        g.sheets, g.rows, g.stride, g.tail = outer, inner // g.each, g.each, inner % g.each
    else:
        g.each, g.times = inner, merged_rows(outer, features * inner)
        g.sheets, g.rows = 1, outer // g.times
        g.stride, g.tail = g.times * features * inner, outer % g.times * features * inner
    g.cell_rows = max(<Py_ssize_t>CELL_ROWS, ceil_div(g.sheets * g.rows, CELLS))
    g.cell_rows = round_up(g.cell_rows, g.rows if g.sheets > 1 and g.rows < g.cell_rows else GROUP)
    g.cells = ceil_div(g.sheets * g.rows, g.cell_rows)
    return g


cdef Py_ssize_t block_features(const Grid *g, int threads) noexcept nogil:
    """Features that are walked together; has no say in the order of any sum."""
    cdef Py_ssize_t unit, block
    if g.sheets > 1 or g.each != g.inner:
        return 1
    if g.times > 1:
        return g.features
    unit = line_multiple(g.inner)
    block = max(<Py_ssize_t>1, (SLAB if g.inner == 1 else WIDTH) // g.inner)
    block = min(block, round_up(ceil_div(g.features, threads), unit))
    if block > unit:
        block -= block % unit
    return block


# ---------------------------------------------------------------------------------------------------
# Leaves: one pass over rows of columns. `x` and its like are walked by `stride`; all else is a row.

cdef inline real tree(real a, real b, real c, real d, real e, real f, real g, real h) noexcept nogil:
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


cdef inline real square(real a) noexcept nogil:
    return a * a


cdef inline real deviation(floating x, real hi, real lo) noexcept nogil:
    """x - mean, the mean in two parts: the first difference is exact where it matters."""
    return (<real>x - hi) - lo


cdef inline void add_deviations(
    double *sum1, double *sum2,
    const floating *x, const real *shift,
    Py_ssize_t rows, Py_ssize_t width, Py_ssize_t s,
) noexcept nogil:
    """First pass of the forward: sum(x - shift) and sum((x - shift)^2), column by column."""
    cdef Py_ssize_t j
    cdef real c, d
    while rows >= GROUP:
        for j in range(width):
            c = shift[j]
            sum1[j] += tree[real](
                x[j] - c, x[j + s] - c, x[j + 2*s] - c, x[j + 3*s] - c,
                x[j + 4*s] - c, x[j + 5*s] - c, x[j + 6*s] - c, x[j + 7*s] - c)
            sum2[j] += tree[real](
                square[real](x[j] - c), square[real](x[j + s] - c),
                square[real](x[j + 2*s] - c), square[real](x[j + 3*s] - c),
                square[real](x[j + 4*s] - c), square[real](x[j + 5*s] - c),
                square[real](x[j + 6*s] - c), square[real](x[j + 7*s] - c))
        x += GROUP * s
        rows -= GROUP
    while rows > 0:
        for j in range(width):
            d = x[j] - shift[j]
            sum1[j] += d
            sum2[j] += square[real](d)
        x += s
        rows -= 1


cdef inline real product(
    floating dout, floating x, real hi, real lo, real invstd
) noexcept nogil:
    return <real>dout * (deviation(x, hi, lo) * invstd)


cdef inline void add_gradients(
    double *sum1, double *sum2,
    const floating *dout, const floating *x, const real *columns, Py_ssize_t pitch,
    Py_ssize_t rows, Py_ssize_t width, Py_ssize_t s,
) noexcept nogil:
    """First pass of the backward: dbeta = sum(dout) and dgamma = sum(dout*xhat), column by column."""
    cdef const real *hi = columns + HI * pitch
    cdef const real *lo = columns + LO * pitch
    cdef const real *invstd = columns + XHAT_SCALE * pitch
    cdef Py_ssize_t j
    cdef real m, l, v
    while rows >= GROUP:
        for j in range(width):
            m, l, v = hi[j], lo[j], invstd[j]
            sum1[j] += tree[real](
                dout[j], dout[j + s], dout[j + 2*s], dout[j + 3*s],
                dout[j + 4*s], dout[j + 5*s], dout[j + 6*s], dout[j + 7*s])
            sum2[j] += tree[real](
                product(dout[j], x[j], m, l, v),
                product(dout[j + s], x[j + s], m, l, v),
                product(dout[j + 2*s], x[j + 2*s], m, l, v),
                product(dout[j + 3*s], x[j + 3*s], m, l, v),
                product(dout[j + 4*s], x[j + 4*s], m, l, v),
                product(dout[j + 5*s], x[j + 5*s], m, l, v),
                product(dout[j + 6*s], x[j + 6*s], m, l, v),
                product(dout[j + 7*s], x[j + 7*s], m, l, v))
        dout += GROUP * s
        x += GROUP * s
        rows -= GROUP
    while rows > 0:
        for j in range(width):
            sum1[j] += dout[j]
            sum2[j] += product(dout[j], x[j], hi[j], lo[j], invstd[j])
        dout += s
        x += s
        rows -= 1


cdef inline void put(floating *target, const floating *line, Py_ssize_t width, bint streaming) noexcept nogil:
    """Write a finished row: past the cache where the whole output would not stay in it."""
    if streaming:
        stream(target, line, width * sizeof(floating))
    else:
        memcpy(target, line, width * sizeof(floating))


cdef inline void write_normalized(
    floating *y, const floating *x, const floating *columns, Py_ssize_t pitch,
    Py_ssize_t width, bint streaming,
) noexcept nogil:
    """Second pass of the forward, one row: y = gamma*invstd*(x - mean) + beta."""
    cdef const floating *hi = columns + HI * pitch
    cdef const floating *lo = columns + LO * pitch
    cdef const floating *scale = columns + SCALE * pitch
    cdef const floating *beta = columns + BETA * pitch
    cdef floating storage[SCRATCH]
    cdef floating *line = <floating *>aligned(storage)
    cdef Py_ssize_t j
    for j in range(width):
        line[j] = deviation(x[j], hi[j], lo[j]) * scale[j] + beta[j]
    put(y, line, width, streaming)


cdef inline void write_input_gradient(
    floating *dx, const floating *dout, const floating *x, const floating *columns, Py_ssize_t pitch,
    Py_ssize_t width, bint streaming,
) noexcept nogil:
    """Second pass of the backward, one row: dx = gamma*invstd*(dout - dbeta/n - xhat*dgamma/n)."""
    cdef const floating *hi = columns + HI * pitch
    cdef const floating *lo = columns + LO * pitch
    cdef const floating *invstd = columns + XHAT_SCALE * pitch
    cdef const floating *mean_dout = columns + MEAN_DOUT * pitch
    cdef const floating *mean_product = columns + MEAN_PRODUCT * pitch
    cdef const floating *scale = columns + DX_SCALE * pitch
    cdef floating storage[SCRATCH]
    cdef floating *line = <floating *>aligned(storage)
    cdef Py_ssize_t j
    cdef floating xhat
    for j in range(width):
        xhat = deviation(x[j], hi[j], lo[j]) * invstd[j]
        line[j] = ((dout[j] - mean_dout[j]) - xhat * mean_product[j]) * scale[j]
    put(dx, line, width, streaming)


# ---------------------------------------------------------------------------------------------------
# Rows of columns to features and back

cdef struct Block:
    Py_ssize_t start, size   # features [start, start + size)
    Py_ssize_t width, pitch  # columns of one of its rows; from row to row of its scratch, odd lines


cdef inline Block block_at(const Grid *g, Py_ssize_t start, Py_ssize_t size) noexcept nogil:
    cdef Block b
    b.start, b.size = start, min(size, g.features - start)
    b.width = g.times * b.size * g.each
    b.pitch = round_up(b.width, 2 * LINE) + LINE
    return b


cdef inline void spread(real *columns, const double *values, const Grid *g, const Block *b) noexcept nogil:
    """A value a feature to a value a column."""
    cdef Py_ssize_t t, f, e, j = 0
    cdef real value
    for t in range(g.times):
        if g.each == 1:
            for f in range(b.size):
                columns[j + f] = <real>values[f]
            j += b.size
            continue
        for f in range(b.size):
            value = <real>values[f]
            for e in range(g.each):
                columns[j + e] = value
            j += g.each


cdef inline double fold_run(const double *columns, Py_ssize_t each) noexcept nogil:
    cdef double lane[8]
    cdef Py_ssize_t e = 0, k
    for k in range(8):
        lane[k] = 0
    while e + 8 <= each:
        for k in range(8):
            lane[k] += columns[e + k]
        e += 8
    for k in range(each - e):
        lane[k] += columns[e + k]
    return tree[double](lane[0], lane[1], lane[2], lane[3], lane[4], lane[5], lane[6], lane[7])


cdef inline void fold(double *values, const double *columns, const Grid *g, const Block *b) noexcept nogil:
    """The sum of the columns of each feature."""
    cdef Py_ssize_t t, f
    memset(values, 0, b.size * sizeof(double))
    for t in range(g.times):
        if g.each == 1:
            for f in range(b.size):
                values[f] += columns[f]
        else:
            for f in range(b.size):
                values[f] += fold_run(columns + f * g.each, g.each)
        columns += b.size * g.each


# ---------------------------------------------------------------------------------------------------
# Walking a cell of the grid: its pieces are stretches of rows of one sheet

cdef struct Piece:
    Py_ssize_t offset, rows, tail  # first value, full rows, columns of the row after them
    Py_ssize_t next, stop          # rows of the cell not yet walked, counted over all the sheets


cdef inline Piece cell_at(const Grid *g, Py_ssize_t cell) noexcept nogil:
    cdef Piece p
    p.next = cell * g.cell_rows
    p.stop = min(p.next + g.cell_rows, g.sheets * g.rows)
    p.offset = p.rows = p.tail = 0
    return p


cdef inline bint advance(Piece *p, const Grid *g, const Block *b) noexcept nogil:
    """To the next piece of the cell, in the order of memory; False at the cell's end."""
    cdef Py_ssize_t sheet, row
    if p.next >= p.stop:
        return False
    sheet, row = p.next // g.rows, p.next % g.rows
    p.rows = min(g.rows - row, p.stop - p.next)
    p.tail = g.tail if row + p.rows == g.rows else 0
    p.offset = (sheet * g.features + b.start) * g.inner + row * g.stride
    p.next += p.rows
    return True


cdef inline bint retreat(Piece *p, const Grid *g, const Block *b) noexcept nogil:
    """To the next piece from the cell's end: a second pass begins on what the first left in the cache."""
    cdef Py_ssize_t sheet, row
    if p.stop <= p.next:
        return False
    sheet = (p.stop - 1) // g.rows
    row = max(sheet * g.rows, p.next)
    p.rows = p.stop - row
    p.tail = g.tail if p.stop == (sheet + 1) * g.rows else 0
    p.offset = (sheet * g.features + b.start) * g.inner + (row - sheet * g.rows) * g.stride
    p.stop = row
    return True


cdef void deviations_of_cell(
    double *part, const floating *x, const real *shift,
    const Grid *g, const Block *b, Py_ssize_t cell,
) noexcept nogil:
    cdef double storage[2 * SCRATCH]
    cdef double *columns = <double *>aligned(storage)
    cdef Piece p = cell_at(g, cell)
    memset(columns, 0, (b.pitch + b.width) * sizeof(double))
    while advance(&p, g, b):
        add_deviations(
            columns, columns + b.pitch, x + p.offset, shift, p.rows, b.width, g.stride)
        add_deviations(
            columns, columns + b.pitch, x + p.offset + p.rows * g.stride, shift,
            p.tail > 0, p.tail, g.stride)
    fold(part, columns, g, b)
    fold(part + b.size, columns + b.pitch, g, b)


cdef void gradients_of_cell(
    double *part, const floating *dout, const floating *x, const real *columns_in,
    const Grid *g, const Block *b, Py_ssize_t cell,
) noexcept nogil:
    cdef double storage[2 * SCRATCH]
    cdef double *columns = <double *>aligned(storage)
    cdef Py_ssize_t at
    cdef Piece p = cell_at(g, cell)
    memset(columns, 0, (b.pitch + b.width) * sizeof(double))
    while advance(&p, g, b):
        add_gradients(
            columns, columns + b.pitch, dout + p.offset, x + p.offset, columns_in, b.pitch,
            p.rows, b.width, g.stride)
        at = p.offset + p.rows * g.stride
        add_gradients(
            columns, columns + b.pitch, dout + at, x + at, columns_in, b.pitch,
            p.tail > 0, p.tail, g.stride)
    fold(part, columns, g, b)
    fold(part + b.size, columns + b.pitch, g, b)


cdef void normalize_cell(
    floating *y, const floating *x, const floating *columns,
    const Grid *g, const Block *b, Py_ssize_t cell, bint streaming,
) noexcept nogil:
    cdef Piece p = cell_at(g, cell)
    cdef Py_ssize_t r, at
    while retreat(&p, g, b):
        at = p.offset + p.rows * g.stride
        write_normalized(y + at, x + at, columns, b.pitch, p.tail, streaming)
        for r in range(p.rows):
            at -= g.stride
            write_normalized(y + at, x + at, columns, b.pitch, b.width, streaming)


cdef void input_gradient_cell(
    floating *dx, const floating *dout, const floating *x, const floating *columns,
    const Grid *g, const Block *b, Py_ssize_t cell, bint streaming,
) noexcept nogil:
    cdef Piece p = cell_at(g, cell)
    cdef Py_ssize_t r, at
    while retreat(&p, g, b):
        at = p.offset + p.rows * g.stride
        write_input_gradient(dx + at, dout + at, x + at, columns, b.pitch, p.tail, streaming)
        for r in range(p.rows):
            at -= g.stride
            write_input_gradient(
                dx + at, dout + at, x + at, columns, b.pitch, b.width, streaming)


cdef inline void add_part(double *sums, const double *part, const Block *b) noexcept nogil:
    """Cells are merged in the order of the grid, whichever thread summed them."""
    cdef Py_ssize_t i
    for i in range(2 * b.size):
        sums[i] += part[i]


# ---------------------------------------------------------------------------------------------------
# Statistics of a block of features

cdef struct Statistics:
    double *mean
    double *rest
    double *var
    double *invstd
    double *gamma


cdef inline Statistics statistics_of(double *rows, const Grid *g, const Block *b) noexcept nogil:
    cdef Statistics s
    s.mean = rows + MEAN * g.features + b.start
    s.rest = rows + REST * g.features + b.start
    s.var = rows + VAR * g.features + b.start
    s.invstd = rows + INVSTD * g.features + b.start
    s.gamma = rows + GAMMA * g.features + b.start
    return s


cdef void sample_shift(const Statistics *s, const floating *x, const Grid *g, const Block *b) noexcept nogil:
    """A first guess at the mean: that of a few values spread over the feature. Exact for a constant."""
    cdef Py_ssize_t samples = min(g.count, <Py_ssize_t>SAMPLES)
    cdef Py_ssize_t k, f, at, inner = g.inner
    cdef const floating *first = x + b.start * inner
    cdef const floating *row
    for f in range(b.size):
        s.mean[f] = 0
    for k in range(1, samples):
        at = k * g.count // samples
        row = first + at // inner * inner * g.features + at % inner
        for f in range(b.size):
            s.mean[f] += <double>row[f * inner] - <double>first[f * inner]
    for f in range(b.size):
        s.mean[f] = <floating>(first[f * inner] + s.mean[f] / samples)


cdef void sum_deviations(
    double *sums, const floating *x, const real *shift, const Grid *g, const Block *b,
) noexcept nogil:
    cdef double part[2 * WIDTH]
    cdef Py_ssize_t cell
    memset(sums, 0, 2 * b.size * sizeof(double))
    for cell in range(g.cells):
        deviations_of_cell(part, x, shift, g, b, cell)
        add_part(sums, part, b)


cdef inline void settle(const Statistics *s, Py_ssize_t f, double delta, double var) noexcept nogil:
    """The moments from those about the shift."""
    cdef double shift = s.mean[f]
    s.mean[f] = shift + delta
    s.rest[f] = (shift - s.mean[f]) + delta
    s.var[f] = 0 if var < 0 else var


cdef bint settle_block(
    const Statistics *s, long long *suspect, const double *sums, double n, double least, Py_ssize_t size,
) noexcept nogil:
    """The moments of a block, and which of them to doubt: the shift was far from the mean, or squares
    overflowed, or they were too small to have kept their digits (0 is: of a constant, or of those)."""
    cdef Py_ssize_t f
    cdef double delta, var
    cdef long long doubt = 0
    for f in range(size):
        delta = sums[f] / n
        var = sums[f + size] / n - delta * delta
        suspect[f] = 1 - ((delta * delta <= FAR * var) & (var >= least) & (var <= 1e300))
        settle(s, f, delta, var)
    for f in range(size):
        doubt |= suspect[f]
    return doubt != 0


cdef void rescue_moments(
    const Statistics *s, long long *suspect, const floating *x, const Grid *g, const Block *b,
) noexcept nogil:
    """The same sums with every term in double, about the mean just found, until it moves no more."""
    cdef double shift[WIDTH]
    cdef double sums[2 * WIDTH]
    cdef Py_ssize_t f
    cdef double delta, var
    cdef bint again = True
    cdef int attempt
    for attempt in range(RESCUES):
        if not again:
            return
        again = False
        spread(shift, s.mean, g, b)
        sum_deviations(sums, x, shift, g, b)
        for f in range(b.size):
            if suspect[f]:
                delta = sums[f] / g.count
                var = sums[f + b.size] / g.count - delta * delta
                settle(s, f, delta, var)
                suspect[f] = isfinite(var) and delta * delta > FAR * var
                again |= suspect[f] != 0


cdef void moments_of_sums(
    const Statistics *s, const double *sums, const floating *x, const Grid *g, const Block *b,
) noexcept nogil:
    cdef long long suspect[WIDTH]
    cdef double least = 1e-30 if sizeof(floating) == 4 else 1e-290  # squares below it lose digits
    if settle_block(s, suspect, sums, g.count, least, b.size):
        rescue_moments(s, suspect, x, g, b)


cdef void moments_of_block(const Statistics *s, const floating *x, const Grid *g, const Block *b) noexcept nogil:
    cdef floating storage[SCRATCH]
    cdef floating *shift = <floating *>aligned(storage)
    cdef double sums[2 * WIDTH]
    sample_shift(s, x, g, b)
    spread(shift, s.mean, g, b)
    sum_deviations(sums, x, shift, g, b)
    moments_of_sums(s, sums, x, g, b)


cdef void describe(
    const Statistics *s, const floating *gamma, double eps, const Block *b,
) noexcept nogil:
    """What the second pass, and the backward, need beside the moments."""
    cdef Py_ssize_t f
    for f in range(b.size):
        s.invstd[f] = 1 / sqrt(s.var[f] + eps)
    for f in range(b.size):
        s.gamma[f] = 1 if gamma == NULL else gamma[b.start + f]


cdef inline void spread_mean(real *columns, const Statistics *s, const Grid *g, const Block *b) noexcept nogil:
    cdef double lo[WIDTH]
    cdef Py_ssize_t f
    for f in range(b.size):
        lo[f] = (s.mean[f] - <real>s.mean[f]) + s.rest[f]
    spread(columns + HI * b.pitch, s.mean, g, b)
    spread(columns + LO * b.pitch, lo, g, b)


cdef void prepare_normalize(
    floating *columns, const Statistics *s, const floating *beta, const Grid *g, const Block *b,
) noexcept nogil:
    cdef double values[WIDTH]
    cdef Py_ssize_t f
    spread_mean(columns, s, g, b)
    for f in range(b.size):
        values[f] = s.gamma[f] * s.invstd[f]
    spread(columns + SCALE * b.pitch, values, g, b)
    for f in range(b.size):
        values[f] = 0 if beta == NULL else beta[b.start + f]
    spread(columns + BETA * b.pitch, values, g, b)


# ---------------------------------------------------------------------------------------------------
# Gradients of a block of features

cdef void spread_xhat(real *columns, const Statistics *s, const Grid *g, const Block *b) noexcept nogil:
    spread_mean(columns, s, g, b)
    spread(columns + XHAT_SCALE * b.pitch, s.invstd, g, b)


cdef void sum_gradients(
    double *sums, const floating *dout, const floating *x, const real *columns, const Grid *g, const Block *b,
) noexcept nogil:
    cdef double part[2 * WIDTH]
    cdef Py_ssize_t cell
    memset(sums, 0, 2 * b.size * sizeof(double))
    for cell in range(g.cells):
        gradients_of_cell(part, dout, x, columns, g, b, cell)
        add_part(sums, part, b)


cdef void rescue_gradients(
    double *sums, const Statistics *s, const floating *dout, const floating *x,
    const Grid *g, const Block *b,
) noexcept nogil:
    """Where a float sum overflowed: the same sums with every term in double."""
    cdef double columns[3 * SCRATCH]
    cdef double wide[2 * WIDTH]
    cdef Py_ssize_t i
    cdef bint overflow = False
    for i in range(2 * b.size):
        overflow |= not isfinite(sums[i])
    if not overflow:
        return
    spread_xhat(columns, s, g, b)
    sum_gradients(wide, dout, x, columns, g, b)
    for i in range(2 * b.size):
        if not isfinite(sums[i]):
            sums[i] = wide[i]


cdef inline void store_sums(double *all_sums, const double *sums, const Grid *g, const Block *b) noexcept nogil:
    memcpy(all_sums + b.start, sums, b.size * sizeof(double))
    memcpy(all_sums + g.features + b.start, sums + b.size, b.size * sizeof(double))


cdef inline void load_sums(double *sums, const double *all_sums, const Grid *g, const Block *b) noexcept nogil:
    memcpy(sums, all_sums + b.start, b.size * sizeof(double))
    memcpy(sums + b.size, all_sums + g.features + b.start, b.size * sizeof(double))


cdef void prepare_input_gradient(
    floating *columns, const Statistics *s, const double *sums, double count, const Grid *g, const Block *b,
) noexcept nogil:
    cdef double values[WIDTH]
    cdef Py_ssize_t f
    spread_xhat(columns, s, g, b)
    for f in range(b.size):
        values[f] = sums[f] / count
    spread(columns + MEAN_DOUT * b.pitch, values, g, b)
    for f in range(b.size):
        values[f] = sums[f + b.size] / count
    spread(columns + MEAN_PRODUCT * b.pitch, values, g, b)
    for f in range(b.size):
        values[f] = s.gamma[f] * s.invstd[f]
    spread(columns + DX_SCALE * b.pitch, values, g, b)


# ---------------------------------------------------------------------------------------------------
# The two passes of the forward over one block, or over one cell of it

cdef struct Work:  # what is to be done, and in how many threads
    bint measure, write, streaming
    Py_ssize_t size, blocks  # features of a block, how many blocks
    bint split               # the cells of a block go to different threads
    int threads


cdef Work share(const Grid *g, bint measure, bint write, bint streaming, int threads) noexcept nogil:
    cdef Work w
    w.measure, w.write, w.streaming = measure, write, streaming
    w.threads = threads if g.count * g.features >= SERIAL else 1
    w.split = w.threads > 1 and g.cells > 1 and (
        g.times > 1 or g.features * g.each <= NARROW or (g.sheets > 1 and g.features < w.threads))
    w.size = block_features(g, 1 if w.split else w.threads)
    w.blocks = ceil_div(g.features, w.size)
    return w


cdef void forward_block(
    floating *y, double *rows, const floating *x, const floating *gamma, const floating *beta, double eps,
    const Grid *g, const Work *w, Py_ssize_t i,
) noexcept nogil:
    cdef floating storage[4 * SCRATCH]
    cdef floating *columns = <floating *>aligned(storage)
    cdef Block b = block_at(g, i * w.size, w.size)
    cdef Statistics s = statistics_of(rows, g, &b)
    cdef Py_ssize_t cell
    if w.measure:
        moments_of_block(&s, x, g, &b)
    describe(&s, gamma, eps, &b)
    if w.write:
        prepare_normalize(columns, &s, beta, g, &b)
        for cell in range(g.cells - 1, -1, -1):
            normalize_cell(y, x, columns, g, &b, cell, w.streaming)
        end_streaming()


cdef void deviations_task(
    double *parts, double *rows, const floating *x, const Grid *g, const Work *w, Py_ssize_t i,
) noexcept nogil:
    cdef floating storage[SCRATCH]
    cdef floating *shift = <floating *>aligned(storage)
    cdef Block b = block_at(g, i // g.cells * w.size, w.size)
    cdef Statistics s = statistics_of(rows, g, &b)
    spread(shift, s.mean, g, &b)
    deviations_of_cell(parts + i * 2 * w.size, x, shift, g, &b, i % g.cells)


cdef void merge_parts(double *sums, const double *parts, const Grid *g, const Work *w, const Block *b) noexcept nogil:
    cdef Py_ssize_t cell
    memset(sums, 0, 2 * b.size * sizeof(double))
    for cell in range(g.cells):
        add_part(sums, parts + (b.start // w.size * g.cells + cell) * 2 * w.size, b)


cdef void merge_moments(
    double *parts, double *rows, const floating *x, const Grid *g, const Work *w, Py_ssize_t i,
) noexcept nogil:
    cdef double sums[2 * WIDTH]
    cdef Block b = block_at(g, i * w.size, w.size)
    cdef Statistics s = statistics_of(rows, g, &b)
    merge_parts(sums, parts, g, w, &b)
    moments_of_sums(&s, sums, x, g, &b)


cdef void normalize_task(
    floating *y, double *rows, const floating *x, const floating *beta,
    const Grid *g, const Work *w, Py_ssize_t i,
) noexcept nogil:
    cdef floating storage[4 * SCRATCH]
    cdef floating *columns = <floating *>aligned(storage)
    cdef Block b = block_at(g, i // g.cells * w.size, w.size)
    cdef Statistics s = statistics_of(rows, g, &b)
    prepare_normalize(columns, &s, beta, g, &b)
    normalize_cell(y, x, columns, g, &b, i % g.cells, w.streaming)
    end_streaming()


cdef void forward_split(
    floating *y, double *rows, double *parts, const floating *x,
    const floating *gamma, const floating *beta, double eps, const Grid *g, const Work *w,
) noexcept nogil:
    cdef Py_ssize_t i
    cdef Block b
    cdef Statistics s
    if w.measure:
        for i in range(w.blocks):
            b = block_at(g, i * w.size, w.size)
            s = statistics_of(rows, g, &b)
            sample_shift(&s, x, g, &b)
        for i in prange(w.blocks * g.cells, num_threads=w.threads, schedule="static"):
            deviations_task(parts, rows, x, g, w, i)
        for i in range(w.blocks):
            merge_moments(parts, rows, x, g, w, i)
    b = block_at(g, 0, g.features)
    s = statistics_of(rows, g, &b)
    describe(&s, gamma, eps, &b)
    if w.write:
        for i in prange(w.blocks * g.cells, num_threads=w.threads, schedule="static"):
            normalize_task(y, rows, x, beta, g, w, i)


cdef int forward_pass(
    floating *y, double *rows, const floating *x, const floating *gamma, const floating *beta, double eps,
    const Grid *g, const Work *w,
) noexcept nogil:
    cdef Py_ssize_t i
    cdef double *parts
    if w.split:
        parts = <double *>malloc(w.blocks * g.cells * 2 * w.size * sizeof(double))
        if parts == NULL:
            return -1
        forward_split(y, rows, parts, x, gamma, beta, eps, g, w)
        free(parts)
    else:
        for i in prange(w.blocks, num_threads=w.threads, schedule="static", use_threads_if=w.threads > 1):
            forward_block(y, rows, x, gamma, beta, eps, g, w, i)
    return 0


# ---------------------------------------------------------------------------------------------------
# The two passes of the backward, likewise

cdef void backward_block(
    floating *dx, double *all_sums, double *rows, const floating *dout, const floating *x, double count,
    const Grid *g, const Work *w, Py_ssize_t i,
) noexcept nogil:
    cdef floating storage[PARAMETERS * SCRATCH]
    cdef floating *columns = <floating *>aligned(storage)
    cdef double sums[2 * WIDTH]
    cdef Block b = block_at(g, i * w.size, w.size)
    cdef Statistics s = statistics_of(rows, g, &b)
    cdef Py_ssize_t cell
    if w.measure:
        spread_xhat(columns, &s, g, &b)
        sum_gradients(sums, dout, x, columns, g, &b)
        rescue_gradients(sums, &s, dout, x, g, &b)
        store_sums(all_sums, sums, g, &b)
    if w.write:
        load_sums(sums, all_sums, g, &b)
        prepare_input_gradient(columns, &s, sums, count, g, &b)
        for cell in range(g.cells - 1, -1, -1):
            input_gradient_cell(dx, dout, x, columns, g, &b, cell, w.streaming)
        end_streaming()


cdef void gradients_task(
    double *parts, double *rows, const floating *dout, const floating *x,
    const Grid *g, const Work *w, Py_ssize_t i,
) noexcept nogil:
    cdef floating storage[3 * SCRATCH]
    cdef floating *columns = <floating *>aligned(storage)
    cdef Block b = block_at(g, i // g.cells * w.size, w.size)
    cdef Statistics s = statistics_of(rows, g, &b)
    spread_xhat(columns, &s, g, &b)
    gradients_of_cell(parts + i * 2 * w.size, dout, x, columns, g, &b, i % g.cells)


cdef void merge_gradients(
    double *all_sums, double *parts, double *rows, const floating *dout, const floating *x,
    const Grid *g, const Work *w, Py_ssize_t i,
) noexcept nogil:
    cdef double sums[2 * WIDTH]
    cdef Block b = block_at(g, i * w.size, w.size)
    cdef Statistics s = statistics_of(rows, g, &b)
    merge_parts(sums, parts, g, w, &b)
    rescue_gradients(sums, &s, dout, x, g, &b)
    store_sums(all_sums, sums, g, &b)


cdef void input_gradient_task(
    floating *dx, double *all_sums, double *rows, const floating *dout, const floating *x, double count,
    const Grid *g, const Work *w, Py_ssize_t i,
) noexcept nogil:
    cdef floating storage[PARAMETERS * SCRATCH]
    cdef floating *columns = <floating *>aligned(storage)
    cdef double sums[2 * WIDTH]
    cdef Block b = block_at(g, i // g.cells * w.size, w.size)
    cdef Statistics s = statistics_of(rows, g, &b)
    load_sums(sums, all_sums, g, &b)
    prepare_input_gradient(columns, &s, sums, count, g, &b)
    input_gradient_cell(dx, dout, x, columns, g, &b, i % g.cells, w.streaming)
    end_streaming()


cdef void backward_split(
    floating *dx, double *all_sums, double *parts, double *rows, const floating *dout, const floating *x,
    double count, const Grid *g, const Work *w,
) noexcept nogil:
    cdef Py_ssize_t i
    if w.measure:
        for i in prange(w.blocks * g.cells, num_threads=w.threads, schedule="static"):
            gradients_task(parts, rows, dout, x, g, w, i)
        for i in range(w.blocks):
            merge_gradients(all_sums, parts, rows, dout, x, g, w, i)
    if w.write:
        for i in prange(w.blocks * g.cells, num_threads=w.threads, schedule="static"):
            input_gradient_task(dx, all_sums, rows, dout, x, count, g, w, i)


cdef inline void store_gradient(floating *gradient, const double *sums, Py_ssize_t features) noexcept nogil:
    cdef Py_ssize_t f
    if gradient != NULL:
        for f in range(features):
            gradient[f] = <floating>sums[f]


cdef int backward_pass(
    floating *dx, floating *dgamma, floating *dbeta, double *all_sums, double *rows, const floating *dout, const floating *x, double count,
    const Grid *g, const Work *w,
) noexcept nogil:
    cdef Py_ssize_t i
    cdef double *parts
    if w.split:
        parts = <double *>malloc(w.blocks * g.cells * 2 * w.size * sizeof(double))
        if parts == NULL:
            return -1
        backward_split(dx, all_sums, parts, rows, dout, x, count, g, w)
        free(parts)
    else:
        for i in prange(w.blocks, num_threads=w.threads, schedule="static", use_threads_if=w.threads > 1):
            backward_block(dx, all_sums, rows, dout, x, count, g, w, i)
    store_gradient(dbeta, all_sums, g.features)
    store_gradient(dgamma, all_sums + g.features, g.features)
    return 0


# ---------------------------------------------------------------------------------------------------
# What Python calls. The caller has checked and allocated: arrays of the batch's size fill their memory in
# one layout, which is (outer, features, inner) to the kernels; the others are contiguous. Their memory is
# taken as raw buffers: typed memoryviews of the arguments, and the reshaped arrays that they would need,
# take longer than the arithmetic of a small batch.

cdef struct Memory:  # the arrays of one call
    Py_buffer views[7]
    int held


cdef inline void *hold(Memory *memory, array) except? NULL:
    """The first byte of an array, until `release`; NULL for None."""
    if array is None:
        return NULL
    PyObject_GetBuffer(array, &memory.views[memory.held], PyBUF_STRIDES)
    memory.held += 1
    return memory.views[memory.held - 1].buf


cdef inline void release(Memory *memory) noexcept:
    while memory.held:
        memory.held -= 1
        PyBuffer_Release(&memory.views[memory.held])


def forward(
    y, statistics, x, gamma, beta, Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, bint single,
    double eps, bint measure, bint streaming, int threads,
):
    """Moments of x (without `measure`: those that statistics holds), then y unless it is None."""
    cdef Grid g = plan(outer, features, inner)
    cdef Work w = share(&g, measure, y is not None, streaming, threads)
    cdef Memory memory
    cdef void *to
    cdef void *data
    cdef void *scale
    cdef void *shift
    cdef double *rows
    cdef int status
    memory.held = 0
    try:
        to, rows, data = hold(&memory, y), <double *>hold(&memory, statistics), hold(&memory, x)
        scale, shift = hold(&memory, gamma), hold(&memory, beta)
        with nogil:
            if single:
                status = forward_pass(
                    <float *>to, rows, <float *>data, <float *>scale, <float *>shift, eps, &g, &w)
            else:
                status = forward_pass(
                    <double *>to, rows, <double *>data, <double *>scale, <double *>shift, eps, &g, &w)
    finally:
        release(&memory)
    if status:
        raise MemoryError


def backward(
    dx, dgamma, dbeta, sums, statistics, dout, x,
    Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, bint single,
    double count, bint measure, bint streaming, int threads,
):
    """The sums of dout and of dout*xhat (without `measure`: those given), then dx, dgamma and dbeta unless None.

    Frozen statistics do not depend on x: they are those of infinitely many values, count = inf.
    """
    cdef Grid g = plan(outer, features, inner)
    cdef Work w = share(&g, measure, dx is not None, streaming, threads)
    cdef Memory memory
    cdef void *to
    cdef void *data
    cdef void *upstream
    cdef void *scale
    cdef void *shift
    cdef double *both
    cdef double *rows
    cdef int status
    memory.held = 0
    try:
        to, scale, shift = hold(&memory, dx), hold(&memory, dgamma), hold(&memory, dbeta)
        both, rows = <double *>hold(&memory, sums), <double *>hold(&memory, statistics)
        upstream, data = hold(&memory, dout), hold(&memory, x)
        with nogil:
            if single:
                status = backward_pass(
                    <float *>to, <float *>scale, <float *>shift, both, rows,
                    <float *>upstream, <float *>data, count, &g, &w)
            else:
                status = backward_pass(
                    <double *>to, <double *>scale, <double *>shift, both, rows,
                    <double *>upstream, <double *>data, count, &g, &w)
    finally:
        release(&memory)
    if status:
        raise MemoryError


def update_running(
    double[::1] running_mean, double[::1] running_var, const double[::1] statistics,
    double momentum, double correction,
):
    """running += momentum*(batch - running), the batch's variance times the correction n/(n - 1) or 1."""
    cdef Py_ssize_t f, features = running_mean.shape[0]
    with nogil:
        for f in range(features):
            running_mean[f] += momentum * (statistics[MEAN * features + f] - running_mean[f])
            running_var[f] += momentum * (correction * statistics[VAR * features + f] - running_var[f])
