# All the loops of bn_cy, for float and double from one source. Each `_kernels_*.pyx` includes this
# file and is compiled for one instruction set; `_dispatch.py` picks among them.
#
# The order of every floating-point sum below is a function of the shape alone, never of the number
# of threads, the width of a block, the alignment or the instruction set: the bits are the same
# everywhere.
#
# An array (outer, features, inner) is walked as rows of columns (see `Grid`). One row of a block of
# features holds `times` copies of the block, each feature `each` adjacent columns wide:
#
#   rows of features (inner == 1)     one sheet of `outer` rows, a feature is one column;
#   the same with few features        several rows are read as one wide row (times > 1);
#   small inner (7 x 7 images)        one sheet of `outer` rows, a feature is `inner` columns;
#   large inner (28 x 28 images)      one sheet of `outer` rows, of each a run of `inner` values;
#   very long runs; written, any run  `outer` sheets, each run cut into rows
#
# So the leaf loops know nothing but columns, and the columns of a feature are folded at the end.
# A run has a single column: its values are added to LANES sums in registers, which are folded when
# it ends, and written with the parameters in registers.

from cpython.pycapsule cimport PyCapsule_New
from cython cimport floating
from cython.parallel cimport parallel, prange
from libc.math cimport fabs, isfinite, isinf, sqrt
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from bn_cy._kernels cimport (
    GAMMA, INVSTD, MEAN, REST, VAR, Backward, Forward, Kernels, Resources, Shape,
)

cdef extern from *:
    """
    #include <float.h>
    #include <stdint.h>
    #include <string.h>
    #ifndef BN_CY_FLAGS
    #define BN_CY_FLAGS ""
    #endif
    #if defined(__x86_64__) || defined(_M_X64)
    #include <immintrin.h>
    #define BN_STREAMS 1
    #else
    #define BN_STREAMS 0
    #endif
    #if defined(_MSC_VER)
    #pragma fp_contract(off)  /* on by default before Visual Studio 2022 */
    #endif

    #if BN_STREAMS
    /* The pieces of a line that two runs or rows share meet in the buffer of such stores: ordinary
       ones would read the line first. */
    static inline void bn_stream_words(char *to, const char *from, size_t bytes) {
        for (size_t i = 0; i < bytes; i += 4) {
            int word;
            memcpy(&word, from + i, 4);
            _mm_stream_si32((int *)(to + i), word);
        }
    }
    #endif

    /* Copy floats or doubles past the cache, by non-temporal stores of whole lines and of words. */
    static inline void bn_stream(void *target, const void *source, size_t bytes) {
    #if BN_STREAMS
        char *to = (char *)target;
        const char *from = (const char *)source;
        size_t head = -(uintptr_t)to & 63;
        if (head) {
            if (head > bytes) head = bytes;
            bn_stream_words(to, from, head);
            to += head; from += head; bytes -= head;
        }
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
        bn_stream_words(to, from, bytes);
    #else
        memcpy(target, source, bytes);
    #endif
    }

    /* Scratch that starts on a cache line: vectors across two lines load at half the speed. By an
       offset, so that the compiler still knows that nothing else can lie there. */
    #define bn_aligned(scratch) ((void *)((char *)(scratch) + (-(uintptr_t)(scratch) & 63)))

    /* Ask for memory that is to be read soon, into the second-level cache. */
    static inline void bn_fetch(const void *source, size_t bytes) {
    #if defined(__GNUC__)
        for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)source + i, 0, 2);
    #endif
    }

    /* Before a caller whose code is SSE's: dirty upper halves of the vector registers slow it. */
    static inline void bn_clear_vectors(void) {
    #if defined(__AVX__)
        _mm256_zeroupper();
    #endif
    }

    static inline void bn_stream_end(void) {
    #if BN_STREAMS
        _mm_sfence();
    #endif
    }
    """
    void stream "bn_stream"(void *target, const void *source, size_t size) noexcept nogil
    void end_streaming "bn_stream_end"() noexcept nogil
    void clear_vectors "bn_clear_vectors"() noexcept nogil
    void fetch "bn_fetch"(const void *source, size_t size) noexcept nogil
    void *aligned "bn_aligned"(void *scratch) noexcept nogil
    const char *C_FLAGS "BN_CY_FLAGS"
    const double LARGEST "DBL_MAX"
    const bint STREAMS "BN_STREAMS"  # whether there are stores past the cache

ctypedef fused real:  # what a sum's terms are computed in: the data's type, or double in a rescue
    float
    double

cdef enum:
    NARROW = 128    # columns of a row that are enough for vectors
    WIDTH = 1024    # columns in a row of a block, at the most: bounds every scratch array
    SLIM = 256      # the same where features have few values: what a feature needs itself is much
    MANY = 512      # rows that are left, at the least, where rows are merged beyond that
    LANES = 16      # sums that the values of a run are added to
    STREAM = 2048   # values of the stretches that long runs are cut into for sums, at the most
    LONG = 8192     # values of a run from which it is
    CHUNK = 1024    # values that a run is cut into for writing
    AHEAD = 1024    # values from those that are written to those that are fetched, at the least
    PORTION = 128   # columns of a group of rows that are fetched and summed at a time
    STEPS = 16      # the same of a run, in LANES
    BURST = 128     # columns between two writes past the cache: reads and writes overlap
    RUNS = 64       # features of a block of runs, where they are short: their work is vectorised
    GROUP = 8       # rows that are added up in the data's type before they go to double
    STRETCH = 128   # values of a single row of a run that are: GROUP * LANES
    LINE = 16       # floats of a cache line
    FEW = 32        # values of a feature below which roundings do not average: all terms in double
    CELLS = 64      # parts that a feature's rows are summed in, at the most
    CELL_ROWS = 128  # rows of such a part, at the least
    CELL_VALUES = 131072  # its values, at the least, of all features
    FEW_CELLS = 4   # parts of narrow rows that are made sooner, as threads share features badly:
    FEW_VALUES = 24576  # from so many values on two, and four from four times as many
    CELL_RUN = 16384      # its values of one feature, at the least, where they are summed as runs
    SHEET_ROWS = 1024  # rows of a sheet that is not cut between parts, at the most
    SAMPLES = 8     # values of a feature that its shift is the mean of
    RESCUES = 4     # passes in double until a feature's shift is near its mean

cdef enum:  # how the second passes write
    DIRECT     # in place of what is read nowhere else
    STREAMING  # past the cache, where the whole output would not stay in it
    IN_PLACE   # over what is read: by a line of scratch, as loops are made for separate arrays

cdef enum:  # what the first pass of the backward needs of every column, a row of scratch each
    CENTRE        # a shift near the mean, in few digits
    CENTRE_SCALE  # a power of two near invstd
    CENTRES

cdef enum:  # what the second passes need of every column, a row of scratch each
    HI = 0      # the mean in the data's type: x - hi loses no digits; what is left of it, lo, goes
    SCALE       # forward: gamma*invstd
    SHIFT       # into what is added, beta - lo*gamma*invstd
    NORMALIZE   # how many
    XHAT_SCALE = 1  # backward: invstd
    MEAN_PRODUCT    # dgamma/n
    MEAN_DOUT       # dbeta/n, and here lo: dbeta/n - lo*invstd*dgamma/n
    DX_SCALE        # gamma*invstd
    PARAMETERS
    SCRATCH = WIDTH + 2 * LINE  # pitch of such rows, at the most: room to align and to `repeat`


# -------------------------------------------------------------------------------------------------
# Geometry

cdef struct Grid:
    Py_ssize_t outer, features, inner     # the array
    Py_ssize_t count                      # values of a feature
    Py_ssize_t sheets, rows, stride, tail  # a sheet: rows of columns, `tail` columns of one more
    bint runs                             # a row of a block is a stretch of each of its features,
    Py_ssize_t stretch                    # so long
    Py_ssize_t each, times                # columns of a feature, copies of a block in its scratch
    Py_ssize_t cells, unit                # the fixed grid in which rows are summed, of whole units


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


cdef inline Py_ssize_t merged_rows(
    Py_ssize_t outer, Py_ssize_t width, Py_ssize_t wide,
) noexcept nogil:
    """How many rows of `width` columns to read as one: whole lines, if that is not too wide, and as
    many as there are columns in vectors; where there are many rows, up to `wide` columns."""
    cdef Py_ssize_t times = line_multiple(width)
    if times * width > WIDTH:
        times = 1
    times *= ceil_div(NARROW, times * width)
    times = max(<Py_ssize_t>1, min(times, outer // GROUP))
    while 2 * times * width <= wide and outer // (2 * times) >= MANY:
        times *= 2
    if times * width == WIDTH and times > 2:  # 4 KB of floats: all rows would share a set of L1
        times -= max(<Py_ssize_t>1, times // 8)
    return times


cdef inline Py_ssize_t shortest_run(Py_ssize_t outer, bint writing) noexcept nogil:
    """From how many values on the images of a feature are runs. The more images there are, the
    longer must they be: columns fold all of them at once. Writing a few folds nothing, so that runs
    pay sooner."""
    if outer < GROUP:
        return LANES * min(outer, <Py_ssize_t>(2 if writing else 4))
    return LANES * min(outer, <Py_ssize_t>LANES)


cdef inline Py_ssize_t stretch_of_run(Py_ssize_t inner) noexcept nogil:
    """The stretches that a run is cut into for sums. A long one is read as eight streams: whole
    groups of long stretches, whose distance spreads them over the sets of the cache."""
    cdef Py_ssize_t rows = round_up(ceil_div(inner, STREAM), GROUP)
    return (inner // rows // LANES - 1 | 1) * LANES


cdef inline Py_ssize_t cell_count(const Grid *g, Py_ssize_t least) noexcept nogil:
    """Into how many parts to cut a grid: a power of two, the leaves of a tree of halves. Two from
    `least` rows on, more where each has as many; none of them is empty."""
    cdef Py_ssize_t units = g.sheets * g.rows // g.unit
    cdef Py_ssize_t enough = ceil_div(least, g.unit)
    cdef Py_ssize_t cells = 2 if units >= max(<Py_ssize_t>2, enough) else 1
    while cells < CELLS and 2 * cells * enough <= units:
        cells *= 2
    return cells


cdef inline Py_ssize_t cells_of(const Grid *g) noexcept nogil:
    """Into how many parts to cut a grid of this kind; see CELL_ROWS and what follows it."""
    cdef Py_ssize_t cells
    if g.count < FEW:  # the sums in double know no cells
        return 1
    if g.runs:
        return cell_count(g, CELL_RUN // g.stretch)
    cells = cell_count(g, max(<Py_ssize_t>CELL_ROWS, CELL_VALUES // g.stride))
    if g.stride <= WIDTH and g.features <= WIDTH // 2:
        return max(cells, min(cell_count(g, FEW_VALUES // g.stride), <Py_ssize_t>FEW_CELLS))
    return cells


cdef Grid plan(
    Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, bint writing,
) noexcept nogil:
    """How an array of this shape is walked, for sums or for writing. What is summed as runs is
    written as runs."""
    cdef Grid g
    g.outer, g.features, g.inner, g.count = outer, features, inner, outer * inner
    g.sheets, g.rows, g.stride, g.tail, g.times = 1, outer, features * inner, 0, 1
    g.runs = inner >= shortest_run(outer, writing)
    g.each = 1 if g.runs else inner
    if g.runs:
        g.stretch = inner
        if writing or inner >= LONG:
            g.stretch = g.stride = min(CHUNK, inner) if writing else stretch_of_run(inner)
            g.sheets, g.rows, g.tail = outer, inner // g.stretch, inner % g.stretch
    else:
        g.times = merged_rows(outer, g.stride, WIDTH // 2 if writing else WIDTH)
        g.rows, g.tail, g.stride = outer // g.times, outer % g.times * g.stride, g.times * g.stride
    g.unit = g.rows if g.sheets > 1 and g.rows <= SHEET_ROWS else GROUP
    g.cells = cells_of(&g)
    return g


cdef Py_ssize_t block_features(
    const Grid *g, Py_ssize_t itemsize, Py_ssize_t cache, bint measure,
) noexcept nogil:
    """Features that are walked together, at the most; has no say in the order of any sum. Runs of
    two arrays, x and y or dout, that a second pass is to find in the cache are few; one that stands
    alone walks along memory."""
    cdef Py_ssize_t width
    if g.runs:
        width = cache // (g.count * 2 * itemsize) if measure else RUNS
        return max(<Py_ssize_t>1, min(<Py_ssize_t>RUNS, width))
    if g.times > 1:
        return g.features
    width = WIDTH if g.count >= FEW else SLIM
    return max(<Py_ssize_t>1, width * sizeof(float) // (itemsize * g.inner))


# -------------------------------------------------------------------------------------------------
# Leaves: one pass over rows of columns; `s` is from row to row of x and its like

cdef inline real four(real a, real b, real c, real d) noexcept nogil:
    return (a + b) + (c + d)


cdef inline real tree(
    real a, real b, real c, real d, real e, real f, real g, real h,
) noexcept nogil:
    return four[real](a, b, c, d) + four[real](e, f, g, h)


cdef inline double fold_run(const double *columns, Py_ssize_t each) noexcept nogil:
    """The sum of a feature's columns."""
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
    return rest + tree[double](
        lane[0], lane[1], lane[2], lane[3], lane[4], lane[5], lane[6], lane[7])


cdef inline double fold_lanes(const real *lanes) noexcept nogil:
    """The same of LANES columns: a tenth of the sums of short runs is to know how many."""
    cdef double lane[8]
    cdef Py_ssize_t k
    for k in range(8):
        lane[k] = <double>lanes[k] + lanes[k + 8]
    return tree[double](
        lane[0], lane[1], lane[2], lane[3], lane[4], lane[5], lane[6], lane[7])


cdef inline real square(real a) noexcept nogil:
    return a * a


cdef inline void fetch_rows(
    const floating *x, Py_ssize_t width, Py_ssize_t s, Py_ssize_t ahead,
) noexcept nogil:
    """Ask for what lies `ahead` of some columns of a group of rows."""
    cdef int row
    if ahead:
        for row in range(GROUP):
            fetch(x + row * s + ahead, width * sizeof(floating))


cdef inline void add_deviation(
    double *sum1, double *sum2, floating x, real shift,
) noexcept nogil:
    """First pass of the forward: sum(x - shift) and sum((x - shift)^2), one value."""
    cdef real d = x - shift
    sum1[0] += d
    sum2[0] += square[real](d)


cdef inline void add_group_deviations(
    double *sum1, double *sum2, const floating *x, Py_ssize_t s, real c,
) noexcept nogil:
    """The same of a group of eight rows, in one column."""
    sum1[0] += tree[real](
        x[0] - c, x[s] - c, x[2*s] - c, x[3*s] - c,
        x[4*s] - c, x[5*s] - c, x[6*s] - c, x[7*s] - c)
    sum2[0] += tree[real](
        square[real](x[0] - c), square[real](x[s] - c),
        square[real](x[2*s] - c), square[real](x[3*s] - c),
        square[real](x[4*s] - c), square[real](x[5*s] - c),
        square[real](x[6*s] - c), square[real](x[7*s] - c))


cdef inline void add_half_deviations(
    double *sum1, double *sum2, const floating *x, Py_ssize_t s, real c,
) noexcept nogil:
    """The same of four rows."""
    sum1[0] += four[real](x[0] - c, x[s] - c, x[2*s] - c, x[3*s] - c)
    sum2[0] += four[real](
        square[real](x[0] - c), square[real](x[s] - c),
        square[real](x[2*s] - c), square[real](x[3*s] - c))


cdef inline void add_portion_deviations(
    double *sum1, double *sum2, const floating *x, Py_ssize_t s, const real *shift,
    Py_ssize_t width,
) noexcept nogil:
    """In up to PORTION columns."""
    cdef Py_ssize_t j
    for j in range(width):
        add_group_deviations(sum1 + j, sum2 + j, x + j, s, shift[j])


cdef inline void add_deviations(
    double *sum1, double *sum2,
    const floating *x, const real *shift,
    Py_ssize_t rows, Py_ssize_t width, Py_ssize_t s, Py_ssize_t ahead,
) noexcept nogil:
    """The same of all rows, column by column."""
    cdef Py_ssize_t i, j, count
    while rows >= GROUP:
        for i in range(ceil_div(width, PORTION)):
            j = i * PORTION
            count = min(<Py_ssize_t>PORTION, width - j)
            fetch_rows(x + j, count, s, ahead)
            if count == PORTION:  # as a constant
                add_portion_deviations(sum1 + j, sum2 + j, x + j, s, shift + j, PORTION)
            else:
                add_portion_deviations(sum1 + j, sum2 + j, x + j, s, shift + j, count)
        x += GROUP * s
        rows -= GROUP
    if rows >= GROUP // 2:
        for j in range(width):
            add_half_deviations(sum1 + j, sum2 + j, x + j, s, shift[j])
        x += GROUP // 2 * s
        rows -= GROUP // 2
    while rows > 0:
        for j in range(width):
            add_deviation(sum1 + j, sum2 + j, x[j], shift[j])
        x += s
        rows -= 1


cdef double[LANES] ZEROS  # copied, as GCC makes a slow `rep stos` of such a memset


cdef inline void add_rest_deviations(
    double *sum1, double *sum2, const floating *x, const floating *stop, real shift,
) noexcept nogil:
    """The same of fewer than STRETCH values of one feature, in the data's type: steps of LANES, and
    the last LANES before `stop`, without those that come before x or are in these steps."""
    cdef real lanes1[LANES]
    cdef real lanes2[LANES]
    cdef real d, total1, total2
    cdef Py_ssize_t k, steps = (stop - x) // LANES
    cdef int j, first = LANES - (stop - x) % LANES
    for j in range(LANES):
        d = stop[j - LANES] - shift
        d = d if j >= first else 0
        lanes1[j], lanes2[j] = d, square[real](d)
    if steps > 0:  # without it GCC makes no vectors
        for j in range(LANES):
            total1, total2 = lanes1[j], lanes2[j]
            for k in range(steps):
                d = x[k * LANES + j] - shift
                total1 += d
                total2 += square[real](d)
            lanes1[j], lanes2[j] = total1, total2
    sum1[0] += fold_lanes(lanes1)
    sum2[0] += fold_lanes(lanes2)


cdef void add_row_deviations(
    double *sum1, double *sum2, const floating *x, real shift, Py_ssize_t width,
) noexcept nogil:
    """The same of a single row of one feature: groups of eight steps of LANES, and what is left.
    Not inline: GCC then makes branches, and no vectors, of the last LANES' mask."""
    cdef double lanes1[LANES]
    cdef double lanes2[LANES]
    cdef const floating *stop = x + width
    cdef Py_ssize_t j, k, groups = width // STRETCH
    if width < LANES:
        for j in range(width):
            add_deviation(sum1, sum2, x[j], shift)
        return
    if groups > 0:
        memcpy(lanes1, ZEROS, sizeof(lanes1))
        memcpy(lanes2, ZEROS, sizeof(lanes2))
        for k in range(groups):
            for j in range(LANES):
                add_group_deviations(lanes1 + j, lanes2 + j, x + j, LANES, shift)
            x += STRETCH
        sum1[0] += fold_lanes(lanes1)
        sum2[0] += fold_lanes(lanes2)
    if x < stop:
        add_rest_deviations(sum1, sum2, x, stop, shift)


cdef inline void add_image_deviations(
    double *sum1, double *sum2,
    const floating *x, real shift, Py_ssize_t groups, Py_ssize_t width, Py_ssize_t s,
) noexcept nogil:
    """The same of groups of eight rows of one feature: in LANES sums, in registers."""
    cdef double lanes1[LANES]
    cdef double lanes2[LANES]
    cdef Py_ssize_t j, k, group, ragged = width % LANES
    memcpy(lanes1, ZEROS, sizeof(lanes1))
    memcpy(lanes2, ZEROS, sizeof(lanes2))
    for group in range(groups):
        for k in range(width // LANES):
            for j in range(LANES):
                add_group_deviations(lanes1 + j, lanes2 + j, x + k * LANES + j, s, shift)
        for j in range(ragged):
            add_group_deviations(lanes1 + j, lanes2 + j, x + width - ragged + j, s, shift)
        x += GROUP * s
    sum1[0] += fold_lanes(lanes1)
    sum2[0] += fold_lanes(lanes2)


cdef inline void add_run_deviations(
    double *sum1, double *sum2,
    const floating *x, real shift, Py_ssize_t rows, Py_ssize_t width, Py_ssize_t s,
) noexcept nogil:
    """The same of all rows where all columns are of one feature."""
    cdef Py_ssize_t row, groups = rows // GROUP
    if groups > 0:
        add_image_deviations(sum1, sum2, x, shift, groups, width, s)
    for row in range(groups * GROUP, rows):
        add_row_deviations(sum1, sum2, x + row * s, shift, width)


cdef inline real product(
    floating dout, floating x, real shift, real scale
) noexcept nogil:
    return <real>dout * ((<real>x - shift) * scale)


cdef inline void add_gradient(
    double *sum1, double *sum2, floating dout, floating x, real shift, real scale,
) noexcept nogil:
    """First pass of the backward: sum(dout) and sum(dout*(x - shift)*scale), one value.

    Not sum(dout*xhat): as sum(xhat) is 0, whatever the roundings of xhat have in common weighs n
    times, and (x - mean)*invstd is rounded alike wherever the mean has digits below those of x.
    x less a number of few digits near the mean is exact or nearly so, and so is its product with a
    power of two. `settle_gradients` makes dgamma of it.
    """
    sum1[0] += dout
    sum2[0] += product(dout, x, shift, scale)


cdef inline real four_douts(const floating *dout, Py_ssize_t s, real like) noexcept nogil:
    """In the type of `like`."""
    return four[real](dout[0], dout[s], dout[2*s], dout[3*s])


cdef inline real four_products(
    const floating *dout, const floating *x, Py_ssize_t s, real m, real v,
) noexcept nogil:
    return four[real](
        product(dout[0], x[0], m, v), product(dout[s], x[s], m, v),
        product(dout[2*s], x[2*s], m, v), product(dout[3*s], x[3*s], m, v))


cdef inline void add_group_gradients(
    double *sum1, double *sum2, const floating *dout, const floating *x, Py_ssize_t s,
    const real *shift, const real *scale, Py_ssize_t width,
) noexcept nogil:
    """The same of a group of eight rows, in up to PORTION columns. Four rows and then the others:
    sixteen lines that are a multiple of 4 KB apart push each other out of L1."""
    cdef real douts[PORTION]
    cdef real products[PORTION]
    cdef Py_ssize_t j, half = 4 * s
    for j in range(width):
        douts[j] = four_douts(dout + j, s, shift[j])
        products[j] = four_products(dout + j, x + j, s, shift[j], scale[j])
    for j in range(width):
        sum1[j] += douts[j] + four_douts(dout + half + j, s, shift[j])
        sum2[j] += products[j] + four_products(dout + half + j, x + half + j, s, shift[j], scale[j])


cdef inline void add_gradients(
    double *sum1, double *sum2,
    const floating *dout, const floating *x, const real *columns, Py_ssize_t pitch,
    Py_ssize_t rows, Py_ssize_t width, Py_ssize_t s, Py_ssize_t ahead,
) noexcept nogil:
    """The same of all rows, column by column."""
    cdef const real *shift = columns + CENTRE * pitch
    cdef const real *scale = columns + CENTRE_SCALE * pitch
    cdef Py_ssize_t i, j, count
    while rows >= GROUP:
        for i in range(ceil_div(width, PORTION)):
            j = i * PORTION
            count = min(<Py_ssize_t>PORTION, width - j)
            fetch_rows(dout + j, count, s, ahead)
            fetch_rows(x + j, count, s, ahead)
            if count == PORTION:  # as a constant
                add_group_gradients(
                    sum1 + j, sum2 + j, dout + j, x + j, s, shift + j, scale + j, PORTION)
            else:
                add_group_gradients(
                    sum1 + j, sum2 + j, dout + j, x + j, s, shift + j, scale + j, count)
        dout += GROUP * s
        x += GROUP * s
        rows -= GROUP
    if rows >= GROUP // 2:
        for j in range(width):
            sum1[j] += four_douts(dout + j, s, shift[j])
            sum2[j] += four_products(dout + j, x + j, s, shift[j], scale[j])
        dout += GROUP // 2 * s
        x += GROUP // 2 * s
        rows -= GROUP // 2
    while rows > 0:
        for j in range(width):
            add_gradient(sum1 + j, sum2 + j, dout[j], x[j], shift[j], scale[j])
        dout += s
        x += s
        rows -= 1


cdef inline void add_lane_gradients(
    double *lanes1, double *lanes2, const floating *dout, const floating *x, Py_ssize_t s,
    real m, real v, Py_ssize_t steps,
) noexcept nogil:
    """The same of a group of eight rows of one feature, up to STEPS steps of LANES columns. Here,
    too, four rows and then the others: images are often a multiple of 4 KB apart."""
    cdef real douts[STEPS * LANES]
    cdef real products[STEPS * LANES]
    cdef Py_ssize_t j, k, half = 4 * s
    for k in range(steps):
        for j in range(LANES):
            douts[k * LANES + j] = four_douts(dout + k * LANES + j, s, m)
            products[k * LANES + j] = four_products(
                dout + k * LANES + j, x + k * LANES + j, s, m, v)
    dout += half
    x += half
    for k in range(steps):
        for j in range(LANES):
            lanes1[j] += douts[k * LANES + j] + four_douts(dout + k * LANES + j, s, m)
            lanes2[j] += products[k * LANES + j] + four_products(
                dout + k * LANES + j, x + k * LANES + j, s, m, v)


cdef inline void add_rest_gradients(
    double *sum1, double *sum2, const floating *dout, const floating *x, const floating *stop,
    real m, real v,
) noexcept nogil:
    """The same of fewer than STRETCH values of one feature, as in `add_rest_deviations`."""
    cdef real lanes1[LANES]
    cdef real lanes2[LANES]
    cdef real d, p, total1, total2
    cdef Py_ssize_t k, steps = (stop - x) // LANES, last = stop - x - LANES
    cdef int j, first = LANES - (stop - x) % LANES
    for j in range(LANES):
        d, p = dout[last + j], product(dout[last + j], x[last + j], m, v)
        lanes1[j] = d if j >= first else 0
        lanes2[j] = p if j >= first else 0
    if steps > 0:
        for j in range(LANES):
            total1, total2 = lanes1[j], lanes2[j]
            for k in range(steps):
                total1 += dout[k * LANES + j]
                total2 += product(dout[k * LANES + j], x[k * LANES + j], m, v)
            lanes1[j], lanes2[j] = total1, total2
    sum1[0] += fold_lanes(lanes1)
    sum2[0] += fold_lanes(lanes2)


cdef void add_row_gradients(
    double *sum1, double *sum2, const floating *dout, const floating *x, real m, real v,
    Py_ssize_t width,
) noexcept nogil:
    """The same of a single row of one feature, as in `add_row_deviations`."""
    cdef double lanes1[LANES]
    cdef double lanes2[LANES]
    cdef const floating *stop = x + width
    cdef Py_ssize_t j, k, groups = width // STRETCH
    if width < LANES:
        for j in range(width):
            add_gradient(sum1, sum2, dout[j], x[j], m, v)
        return
    if groups > 0:
        memcpy(lanes1, ZEROS, sizeof(lanes1))
        memcpy(lanes2, ZEROS, sizeof(lanes2))
        for k in range(groups):
            add_lane_gradients(lanes1, lanes2, dout, x, LANES, m, v, 1)
            dout += STRETCH
            x += STRETCH
        sum1[0] += fold_lanes(lanes1)
        sum2[0] += fold_lanes(lanes2)
    if x < stop:
        add_rest_gradients(sum1, sum2, dout, x, stop, m, v)


cdef inline void add_image_gradients(
    double *sum1, double *sum2, const floating *dout, const floating *x, real m, real v,
    Py_ssize_t groups, Py_ssize_t width, Py_ssize_t s,
) noexcept nogil:
    """The same of groups of eight rows of one feature: in LANES sums, in registers."""
    cdef double lanes1[LANES]
    cdef double lanes2[LANES]
    cdef real shift[LANES]
    cdef real scale[LANES]
    cdef Py_ssize_t i, j, k, group, steps = width // LANES, ragged = width % LANES
    memcpy(lanes1, ZEROS, sizeof(lanes1))
    memcpy(lanes2, ZEROS, sizeof(lanes2))
    for j in range(LANES):  # as columns, for those that are ragged
        shift[j], scale[j] = m, v
    for group in range(groups):
        for i in range(ceil_div(steps, STEPS)):
            k = i * STEPS
            add_lane_gradients(
                lanes1, lanes2, dout + k * LANES, x + k * LANES, s, m, v,
                min(<Py_ssize_t>STEPS, steps - k))
        add_group_gradients(
            lanes1, lanes2, dout + width - ragged, x + width - ragged, s, shift, scale, ragged)
        dout += GROUP * s
        x += GROUP * s
    sum1[0] += fold_lanes(lanes1)
    sum2[0] += fold_lanes(lanes2)


cdef inline void add_run_gradients(
    double *sum1, double *sum2,
    const floating *dout, const floating *x, real m, real v,
    Py_ssize_t rows, Py_ssize_t width, Py_ssize_t s,
) noexcept nogil:
    """The same of all rows where all columns are of one feature."""
    cdef Py_ssize_t row, groups = rows // GROUP
    if groups > 0:
        add_image_gradients(sum1, sum2, dout, x, m, v, groups, width, s)
    for row in range(groups * GROUP, rows):
        add_row_gradients(sum1, sum2, dout + row * s, x + row * s, m, v, width)


cdef inline void put(
    floating *target, const floating *line, Py_ssize_t width, int writing,
) noexcept nogil:
    """Write a row that was made in a line of scratch."""
    if writing == STREAMING:
        stream(target, line, width * sizeof(floating))
    elif writing == IN_PLACE:
        memcpy(target, line, width * sizeof(floating))


cdef inline Py_ssize_t burst_end(
    const floating *target, Py_ssize_t start, Py_ssize_t width,
) noexcept nogil:
    """Where to end the burst that begins at `start`: at the end of a cache line, or of the row."""
    cdef Py_ssize_t into_line = (<uintptr_t>(target + start) & 63) // sizeof(floating)
    return min(start + BURST - into_line, width)


cdef inline void normalize_row(
    floating *y, const floating *x, const floating *columns, Py_ssize_t pitch, Py_ssize_t width,
    bint run,
) noexcept nogil:
    """y = gamma*invstd*(x - mean) + beta; a run has one column for all its values."""
    cdef const floating *hi = columns + HI * pitch
    cdef const floating *scale = columns + SCALE * pitch
    cdef const floating *shift = columns + SHIFT * pitch
    cdef floating m, a, b
    cdef Py_ssize_t j
    if run:
        m, a, b = hi[0], scale[0], shift[0]
        for j in range(width):
            y[j] = (x[j] - m) * a + b
    else:
        for j in range(width):
            y[j] = (x[j] - hi[j]) * scale[j] + shift[j]


cdef inline floating dx_of(
    floating dout, floating xhat, floating mean_dout, floating mean_product, floating scale,
) noexcept nogil:
    return ((dout - mean_dout) - xhat * mean_product) * scale


cdef inline void input_gradient_row(
    floating *dx, const floating *dout, const floating *x, const floating *columns,
    Py_ssize_t pitch, Py_ssize_t width, bint run,
) noexcept nogil:
    """dx = gamma*invstd*(dout - dbeta/n - xhat*dgamma/n); a run has one column."""
    cdef const floating *hi = columns + HI * pitch
    cdef const floating *invstd = columns + XHAT_SCALE * pitch
    cdef const floating *mean_product = columns + MEAN_PRODUCT * pitch
    cdef const floating *mean_dout = columns + MEAN_DOUT * pitch
    cdef const floating *scale = columns + DX_SCALE * pitch
    cdef floating m, v, mean1, mean2, a
    cdef Py_ssize_t j
    if run:
        m, v, a = hi[0], invstd[0], scale[0]
        mean1, mean2 = mean_dout[0], mean_product[0]
        for j in range(width):
            dx[j] = dx_of(dout[j], (x[j] - m) * v, mean1, mean2, a)
    else:
        for j in range(width):
            dx[j] = dx_of(
                dout[j], (x[j] - hi[j]) * invstd[j], mean_dout[j], mean_product[j], scale[j])


cdef inline void normalize_burst(
    floating *y, const floating *x, const floating *columns, Py_ssize_t pitch, Py_ssize_t width,
    bint run, int writing, Py_ssize_t ahead,
) noexcept nogil:
    """Up to BURST values of a row, by a line of scratch."""
    cdef floating storage[BURST + LINE]
    cdef floating *line = <floating *>aligned(storage)
    normalize_row(line, x, columns, pitch, width, run)
    put(y, line, width, writing)
    if ahead:
        fetch(x + ahead, width * sizeof(floating))


cdef inline void write_normalized(
    floating *y, const floating *x, const floating *columns, Py_ssize_t pitch,
    Py_ssize_t width, bint run, int writing, Py_ssize_t ahead,
) noexcept nogil:
    """Second pass of the forward, one row."""
    cdef const floating *at = columns
    cdef Py_ssize_t start = 0, count
    if writing == DIRECT:
        normalize_row(y, x, columns, pitch, width, run)
        return
    while start < width:
        count = burst_end(y, start, width) - start
        if not run:
            at = columns + start
        if count == BURST:  # as a constant
            normalize_burst(y + start, x + start, at, pitch, BURST, run, writing, ahead)
        else:
            normalize_burst(y + start, x + start, at, pitch, count, run, writing, ahead)
        start += count


cdef inline void input_gradient_burst(
    floating *dx, const floating *dout, const floating *x, const floating *columns,
    Py_ssize_t pitch, Py_ssize_t width, bint run, int writing, Py_ssize_t ahead,
) noexcept nogil:
    """Up to BURST values of a row, by a line of scratch."""
    cdef floating storage[BURST + LINE]
    cdef floating *line = <floating *>aligned(storage)
    input_gradient_row(line, dout, x, columns, pitch, width, run)
    put(dx, line, width, writing)
    if ahead:  # one of two: line buffers that fetches hold are wanting where results are written
        fetch(x + ahead, width * sizeof(floating))


cdef inline void write_input_gradient(
    floating *dx, const floating *dout, const floating *x, const floating *columns,
    Py_ssize_t pitch, Py_ssize_t width, bint run, int writing, Py_ssize_t ahead,
) noexcept nogil:
    """Second pass of the backward, one row."""
    cdef const floating *at = columns
    cdef Py_ssize_t start = 0, count
    if writing == DIRECT:
        input_gradient_row(dx, dout, x, columns, pitch, width, run)
        return
    while start < width:
        count = burst_end(dx, start, width) - start
        if not run:
            at = columns + start
        if count == BURST:  # as a constant
            input_gradient_burst(
                dx + start, dout + start, x + start, at, pitch, BURST, run, writing, ahead)
        else:
            input_gradient_burst(
                dx + start, dout + start, x + start, at, pitch, count, run, writing, ahead)
        start += count


# -------------------------------------------------------------------------------------------------
# Rows of columns to features and back

cdef struct Block:
    Py_ssize_t start, size   # features [start, start + size)
    Py_ssize_t width, pitch  # columns of one of its rows; from row to row of its scratch, odd lines
    Py_ssize_t parts         # of a row that are walked apart: runs of different features
    Py_ssize_t ahead         # from a value in work to one that is to be fetched, or 0


cdef inline Block block_at(const Grid *g, Py_ssize_t start, Py_ssize_t size) noexcept nogil:
    cdef Block b
    b.start, b.size, b.ahead = start, min(size, g.features - start), 0
    b.width = g.times * b.size * g.each
    b.pitch = round_up(b.width, 2 * LINE) + LINE
    b.parts = b.size if g.runs else 1
    return b


cdef inline void repeat(
    real *columns, const real *values, Py_ssize_t size, Py_ssize_t each,
) noexcept nogil:
    """Each value to `each` columns, in vectors: the next value overwrites what is too much."""
    cdef Py_ssize_t f, e
    cdef int k
    for f in range(size):
        for e in range(ceil_div(each, 8)):
            for k in range(8):
                columns[8 * e + k] = values[f]
        columns += each


cdef inline void expand(real *columns, const Grid *g, const Block *b) noexcept nogil:
    """A value a feature, which the first columns hold, to a value a column."""
    cdef Py_ssize_t t, size = b.size, each = g.each
    cdef real values[WIDTH]
    if g.runs:  # a part of a block is one feature
        return
    if each > 1:
        memcpy(values, columns, size * sizeof(real))
        repeat(columns, values, size, each)
    for t in range(1, g.times):
        memcpy(columns + t * size * each, columns, size * each * sizeof(real))


cdef inline void spread(
    real *columns, const double *values, const Grid *g, const Block *b,
) noexcept nogil:
    """The same of values in double."""
    cdef Py_ssize_t f
    for f in range(b.size):
        columns[f] = <real>values[f]
    expand(columns, g, b)


cdef inline void fold(
    double *values, const double *columns, const Grid *g, const Block *b,
) noexcept nogil:
    """The sum of the columns of each feature."""
    cdef Py_ssize_t t, f, size = b.size, each = g.each
    memset(values, 0, size * sizeof(double))
    for t in range(g.times):
        if each == 1:
            for f in range(size):
                values[f] += columns[f]
        else:
            for f in range(size):
                values[f] += fold_run(columns + f * each, each)
        columns += size * each


cdef struct Sums:  # two of every feature of a block
    double *first
    double *second


cdef inline Sums sums_at(double *start, Py_ssize_t pitch) noexcept nogil:
    cdef Sums t
    t.first, t.second = start, start + pitch
    return t


cdef inline Sums beside(Sums t, Py_ssize_t features) noexcept nogil:
    """Those of the features that come so much later."""
    t.first += features
    t.second += features
    return t


cdef inline Sums below(Sums t) noexcept nogil:
    """The next pair of rows of scratch."""
    cdef Py_ssize_t pitch = t.second - t.first
    return beside(t, 2 * pitch)


cdef inline void add_sums(Sums total, Sums part, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t f
    for f in range(size):
        total.first[f] += part.first[f]
    for f in range(size):
        total.second[f] += part.second[f]


cdef inline Sums columns_of(Sums t, double *scratch, const Block *b) noexcept nogil:
    """Where the columns of a block are summed: in place, if a column is a feature."""
    if b.width > b.size:
        t = sums_at(scratch, b.pitch)
    memset(t.first, 0, b.width * sizeof(double))
    memset(t.second, 0, b.width * sizeof(double))
    return t


cdef inline void fold_columns(Sums t, Sums columns, const Grid *g, const Block *b) noexcept nogil:
    if b.width > b.size:
        fold(t.first, columns.first, g, b)
        fold(t.second, columns.second, g, b)


# -------------------------------------------------------------------------------------------------
# Walking a cell of the grid: its pieces are stretches of rows of one sheet

cdef struct Piece:
    Py_ssize_t offset, rows, tail  # first value, full rows, columns of the row after them
    Py_ssize_t next, stop          # rows of the cell not yet walked, counted over all the sheets
    Py_ssize_t part, width         # which part of the block's row, its columns


cdef inline Piece cell_at(const Grid *g, const Block *b, Py_ssize_t cell) noexcept nogil:
    cdef Piece p
    cdef Py_ssize_t rows = g.sheets * g.rows, units = ceil_div(rows, g.unit)
    p.next = units * cell // g.cells * g.unit
    p.stop = min(units * (cell + 1) // g.cells * g.unit, rows)
    p.offset = p.rows = p.tail = 0
    p.part = b.parts
    p.width = g.stretch if g.runs else b.width
    return p


cdef inline bint advance(Piece *p, const Grid *g, const Block *b) noexcept nogil:
    """To the next piece of the cell, in the order of memory; False at the cell's end."""
    cdef Py_ssize_t sheet, row
    p.part += 1
    if p.part < b.parts:
        p.offset += g.inner
        return True
    if p.next >= p.stop:
        return False
    sheet = 0 if g.sheets == 1 else p.next // g.rows
    row = p.next - sheet * g.rows
    p.rows = min(g.rows - row, p.stop - p.next)
    p.tail = g.tail if row + p.rows == g.rows else 0
    p.offset = (sheet * g.features + b.start) * g.inner + row * g.stride
    p.next += p.rows
    p.part = 0
    return True


cdef void deviations_of_cell(
    Sums t, const floating *x, const real *shift, const Grid *g, const Block *b, Py_ssize_t cell,
) noexcept nogil:
    cdef double storage[2 * SCRATCH]
    cdef Sums columns = columns_of(t, <double *>aligned(storage), b)
    cdef double *sum1
    cdef double *sum2
    cdef const floating *at
    cdef const real *c
    cdef Piece p = cell_at(g, b, cell)
    while advance(&p, g, b):
        sum1, sum2 = columns.first + p.part, columns.second + p.part
        at, c = x + p.offset, shift + p.part
        if g.runs:
            add_run_deviations(sum1, sum2, at, c[0], p.rows, p.width, g.stride)
            if p.tail:
                add_row_deviations(sum1, sum2, at + p.rows * g.stride, c[0], p.tail)
        else:
            add_deviations(sum1, sum2, at, c, p.rows, p.width, g.stride, b.ahead)
            add_deviations(sum1, sum2, at + p.rows * g.stride, c, p.tail > 0, p.tail, 0, 0)
    fold_columns(t, columns, g, b)


cdef void gradients_of_cell(
    Sums t, const floating *dout, const floating *x, const real *columns,
    const Grid *g, const Block *b, Py_ssize_t cell,
) noexcept nogil:
    cdef double storage[2 * SCRATCH]
    cdef Sums of_columns = columns_of(t, <double *>aligned(storage), b)
    cdef double *sum1
    cdef double *sum2
    cdef const real *c
    cdef real m, v
    cdef Py_ssize_t at, end
    cdef Piece p = cell_at(g, b, cell)
    while advance(&p, g, b):
        sum1, sum2 = of_columns.first + p.part, of_columns.second + p.part
        at, end, c = p.offset, p.offset + p.rows * g.stride, columns + p.part
        if g.runs:
            m, v = c[CENTRE * b.pitch], c[CENTRE_SCALE * b.pitch]
            add_run_gradients(sum1, sum2, dout + at, x + at, m, v, p.rows, p.width, g.stride)
            if p.tail:
                add_row_gradients(sum1, sum2, dout + end, x + end, m, v, p.tail)
        else:
            add_gradients(
                sum1, sum2, dout + at, x + at, c, b.pitch, p.rows, p.width, g.stride, b.ahead)
            add_gradients(
                sum1, sum2, dout + end, x + end, c, b.pitch, p.tail > 0, p.tail, 0, 0)
    fold_columns(t, of_columns, g, b)


cdef void normalize_cell(
    floating *y, const floating *x, const floating *columns,
    const Grid *g, const Block *b, Py_ssize_t cell, int writing,
) noexcept nogil:
    cdef Piece p = cell_at(g, b, cell)
    cdef Py_ssize_t r, at
    while advance(&p, g, b):
        at = p.offset
        for r in range(p.rows):
            write_normalized(
                y + at, x + at, columns + p.part, b.pitch, p.width, g.runs, writing, b.ahead)
            at += g.stride
        if p.tail:
            write_normalized(
                y + at, x + at, columns + p.part, b.pitch, p.tail, g.runs, writing, b.ahead)


cdef void input_gradient_cell(
    floating *dx, const floating *dout, const floating *x, const floating *columns,
    const Grid *g, const Block *b, Py_ssize_t cell, int writing,
) noexcept nogil:
    cdef Piece p = cell_at(g, b, cell)
    cdef Py_ssize_t r, at
    while advance(&p, g, b):
        at = p.offset
        for r in range(p.rows):
            write_input_gradient(
                dx + at, dout + at, x + at, columns + p.part, b.pitch, p.width, g.runs,
                writing, b.ahead)
            at += g.stride
        if p.tail:
            write_input_gradient(
                dx + at, dout + at, x + at, columns + p.part, b.pitch, p.tail, g.runs,
                writing, b.ahead)


# -------------------------------------------------------------------------------------------------
# Statistics of a block of features

cdef struct Statistics:
    double *mean
    double *rest
    double *var
    double *invstd
    double *gamma


cdef inline double coarse(double value, double spread) noexcept nogil:
    """Round to about an eighth of the spread: float data less this are float numbers, nearly all
    of them, where a shift with digits below theirs would round most differences, and all the same
    way."""
    cdef double large = 844424930131968.0 * spread  # 1.5 * 2^49
    return (value + large) - large


cdef void sample_shift(
    const Statistics *s, const floating *x, const Grid *g, const Block *b,
) noexcept nogil:
    """A guess at the mean: that of a few values spread over the feature. Exact for a constant."""
    cdef const floating *first = x + b.start * g.inner
    cdef const floating *row
    cdef floating total[WIDTH]  # of steps from the first value
    cdef floating reach[WIDTH]  # the largest of them
    cdef floating step
    cdef double *mean = s.mean
    cdef Py_ssize_t k, f, inner = g.inner, size = b.size
    cdef Py_ssize_t samples = min(<Py_ssize_t>SAMPLES, g.count)
    cdef double share = 1 / <double>samples
    memset(total, 0, size * sizeof(floating))
    memset(reach, 0, size * sizeof(floating))
    for k in range(1, samples):
        row = first + k * g.outer // samples * g.features * inner + k * inner // samples
        if row == first:  # nothing new; without this GCC makes no vectors of the loop below
            continue
        for f in range(size):
            step = row[f * inner] - first[f * inner]
            total[f] += step
            reach[f] = max(reach[f], <floating>fabs(step))
    for f in range(size):
        mean[f] = first[f * inner] + <double>total[f] * share
    if sizeof(floating) == 4:
        for f in range(size):
            mean[f] = <float>coarse(mean[f], reach[f])


cdef void sum_deviations(
    Sums t, const floating *x, const real *shift, const Grid *g, const Block *b,
    Py_ssize_t cell, Py_ssize_t cells, Sums spare,
) noexcept nogil:
    """Of a power of two of cells: the sum of those of its halves, with a row of `spare` for every
    level of them."""
    cdef Py_ssize_t half = cells // 2
    if cells == 1:
        deviations_of_cell(t, x, shift, g, b, cell)
        return
    sum_deviations(t, x, shift, g, b, cell, half, spare)
    sum_deviations(spare, x, shift, g, b, cell + half, half, below(spare))
    add_sums(t, spare, b.size)


cdef inline void settle(
    double *mean, double *rest, double *var, double delta, double square,
) noexcept nogil:
    """The moments from those about the shift, which `mean` still holds."""
    cdef double shift = mean[0]
    cdef double found = square - delta * delta
    mean[0] = shift + delta
    rest[0] = (shift - mean[0]) + delta
    var[0] = 0 if found < 0 else found


cdef inline double far_from(Py_ssize_t count) noexcept nogil:
    """(mean - shift)^2/var from which a feature is summed again. It multiplies the rounding of the
    sum of squares, which is the smaller the more values there are; samples are off so far in one
    feature of thousands, or where they hold an outlier, while a feature that is summed in vain
    costs its block a pass."""
    return 1.5 if count < 1024 else 16


cdef bint settle_block(
    const Statistics *s, long long *suspect, Sums t, Py_ssize_t count, double least,
    Py_ssize_t size,
) noexcept nogil:
    """The moments of a block, and which of them to doubt: those whose shift was far from the mean,
    and those whose squares overflowed or were too small to keep their digits. 0 is among these."""
    cdef double *mean = s.mean
    cdef double *rest = s.rest
    cdef double *var = s.var
    cdef const double *sum1 = t.first
    cdef const double *sum2 = t.second
    cdef Py_ssize_t f
    cdef double delta, share = 1 / <double>count, far = far_from(count)
    cdef long long doubt = 0
    for f in range(size):
        settle(mean + f, rest + f, var + f, sum1[f] * share, sum2[f] * share)
    for f in range(size):
        delta = sum1[f] * share  # `&`, not `and`: no branches, so that it is vectorised
        suspect[f] = not ((delta * delta <= far * var[f]) & (least <= var[f]) & (var[f] <= 1e300))
        doubt |= suspect[f]
    return doubt != 0


cdef inline Grid single_rows(const Grid *g) noexcept nogil:
    """The grid with rows that were merged apart again, so that any features of it make a block."""
    cdef Grid r = g[0]
    if g.times > 1:
        r.times, r.rows, r.stride, r.tail = 1, g.outer, g.features * g.inner, 0
        r.unit *= g.times
    return r


cdef void rescue_moments(
    const Statistics *s, long long *suspect, const floating *x, const Grid *g, const Block *b,
    Sums spare,
) noexcept nogil:
    """Sum suspects again, a stretch of adjacent ones at a time."""
    cdef Grid r = single_rows(g)
    cdef Statistics of_stretch
    cdef Block stretch
    cdef Py_ssize_t first = 0, stop
    while first < b.size:
        stop = first
        while stop < b.size and suspect[stop]:
            stop += 1
        if stop > first:
            stretch = block_at(&r, b.start + first, stop - first)
            of_stretch.mean = s.mean + first
            of_stretch.rest = s.rest + first
            of_stretch.var = s.var + first
            sum_again(&of_stretch, suspect + first, x, &r, &stretch, beside(spare, first))
        first = stop + 1


cdef void sum_again(
    const Statistics *s, long long *suspect, const floating *x, const Grid *g, const Block *b,
    Sums spare,
) noexcept nogil:
    """The same sums with every term in double, about the mean just found, until it stays there."""
    cdef double shift[SCRATCH]
    cdef double storage[2 * WIDTH]
    cdef Sums t = sums_at(storage, WIDTH)
    cdef double delta, share = 1 / <double>g.count, far = far_from(g.count)
    cdef bint again = True
    cdef int attempt
    cdef Py_ssize_t f
    for f in range(b.size):
        if not isfinite(s.mean[f]):  # the sums overflowed: from any value of the feature
            s.mean[f] = x[(b.start + f) * g.inner]
    for attempt in range(RESCUES):
        if not again:
            return
        again = False
        spread(shift, s.mean, g, b)
        sum_deviations(t, x, shift, g, b, 0, g.cells, spare)
        for f in range(b.size):
            if suspect[f]:
                delta = t.first[f] * share
                settle(s.mean + f, s.rest + f, s.var + f, delta, t.second[f] * share)
                suspect[f] = isfinite(s.var[f]) and delta * delta > far * s.var[f]
                again |= suspect[f] != 0


cdef void moments_of_sums(
    const Statistics *s, Sums t, const floating *x, const Grid *g, const Block *b, Sums spare,
) noexcept nogil:
    cdef long long suspect[WIDTH]
    cdef double least = 1e-30 if sizeof(floating) == 4 else 1e-290  # squares below it lose digits
    if settle_block(s, suspect, t, g.count, least, b.size):
        rescue_moments(s, suspect, x, g, b, spare)


cdef void moments_of_block(
    const Statistics *s, const floating *x, const Grid *g, const Block *b, Sums spare,
) noexcept nogil:
    cdef floating storage[SCRATCH]
    cdef floating *shift = <floating *>aligned(storage)
    cdef double wide[SCRATCH]
    cdef double sums[2 * WIDTH]
    cdef Sums t = sums_at(sums, WIDTH)
    sample_shift(s, x, g, b)
    if g.count < FEW:
        spread(wide, s.mean, g, b)
        sum_deviations(t, x, wide, g, b, 0, g.cells, spare)
    else:
        spread(shift, s.mean, g, b)
        sum_deviations(t, x, shift, g, b, 0, g.cells, spare)
    moments_of_sums(s, t, x, g, b, spare)


cdef void describe(
    const Statistics *s, const floating *gamma, double eps, const Block *b,
) noexcept nogil:
    """What the second pass, and the backward, need beside the moments."""
    cdef const double *var = s.var
    cdef double *invstd = s.invstd
    cdef double *kept = s.gamma
    cdef Py_ssize_t f, size = b.size
    for f in range(size):
        invstd[f] = 1 / sqrt(var[f] + eps)
    if gamma == NULL:
        for f in range(size):
            kept[f] = 1
    else:
        gamma += b.start
        for f in range(size):
            kept[f] = gamma[f]


cdef void prepare_normalize(
    floating *columns, const Statistics *s, const floating *beta, const Grid *g, const Block *b,
) noexcept nogil:
    """Each parameter by a loop of its own: with more arrays GCC gives up making vectors."""
    cdef const double *mean = s.mean
    cdef const double *rest = s.rest
    cdef const double *gamma = s.gamma
    cdef const double *invstd = s.invstd
    cdef floating *hi = columns + HI * b.pitch
    cdef floating *scale = columns + SCALE * b.pitch
    cdef floating *shift = columns + SHIFT * b.pitch
    cdef Py_ssize_t f, size = b.size
    for f in range(size):
        hi[f] = <floating>mean[f]
        scale[f] = <floating>(gamma[f] * invstd[f])
    if beta == NULL:
        for f in range(size):
            shift[f] = <floating>(-((mean[f] - hi[f]) + rest[f]) * (gamma[f] * invstd[f]))
    else:
        beta += b.start
        for f in range(size):
            shift[f] = <floating>(
                -((mean[f] - hi[f]) + rest[f]) * (gamma[f] * invstd[f]) + beta[f])
    for f in range(NORMALIZE):
        expand(columns + f * b.pitch, g, b)


# -------------------------------------------------------------------------------------------------
# Gradients of a block of features

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
    """A power of two near the square root, hardly ever above it: half the exponent. 0 of 0."""
    return power_of_two((bits_of(value) >> 1) + (1023ULL << 51)) if value > 0 else 0


cdef inline double reciprocal(double power) noexcept nogil:
    """1/power of a power of two: the exponent with the other sign."""
    return power_of_two((2046ULL << 52) - bits_of(power))


cdef void find_centres(
    double *centres, const Statistics *s, bint single, const Block *b,
) noexcept nogil:
    """What dgamma is summed about, and a factor, such that hardly a term is rounded on the way."""
    cdef const double *mean = s.mean
    cdef const double *var = s.var
    cdef const double *invstd = s.invstd
    cdef Py_ssize_t f, size = b.size
    for f in range(size):
        centres[f] = coarse(mean[f], root_below(var[f]))
        centres[f + size] = power_below(invstd[f])
    if single:
        for f in range(size):
            centres[f] = <float>centres[f]


cdef inline void spread_centres(
    real *columns, const double *centres, const Grid *g, const Block *b,
) noexcept nogil:
    spread(columns + CENTRE * b.pitch, centres, g, b)
    spread(columns + CENTRE_SCALE * b.pitch, centres + b.size, g, b)


cdef void settle_gradients(
    Sums t, const double *centres, const Statistics *s, const Block *b,
) noexcept nogil:
    """dgamma = sum(dout*xhat) from the sum about the centre; what that leaves of the mean weighs
    sum(dout)."""
    cdef const double *mean = s.mean
    cdef const double *rest = s.rest
    cdef const double *invstd = s.invstd
    cdef const double *sum_dout = t.first
    cdef double *product = t.second
    cdef const double *scale = centres + b.size
    cdef Py_ssize_t f, size = b.size
    for f in range(size):
        product[f] = (
            product[f] * reciprocal(scale[f])
            - ((mean[f] - centres[f]) + rest[f]) * sum_dout[f]) * invstd[f]


cdef void sum_gradients(
    Sums t, const floating *dout, const floating *x, const real *columns,
    const Grid *g, const Block *b, Py_ssize_t cell, Py_ssize_t cells, Sums spare,
) noexcept nogil:
    """As `sum_deviations`."""
    cdef Py_ssize_t half = cells // 2
    if cells == 1:
        gradients_of_cell(t, dout, x, columns, g, b, cell)
        return
    sum_gradients(t, dout, x, columns, g, b, cell, half, spare)
    sum_gradients(spare, dout, x, columns, g, b, cell + half, half, below(spare))
    add_sums(t, spare, b.size)


cdef inline bint overflowed(Sums t, Py_ssize_t size) noexcept nogil:
    cdef const double *first = t.first
    cdef const double *second = t.second
    cdef Py_ssize_t f
    cdef long long found = 0  # and `&`: as in `settle_block`
    for f in range(size):
        found |= not ((fabs(first[f]) <= LARGEST) & (fabs(second[f]) <= LARGEST))
    return found != 0


cdef inline void replace_overflowed(
    double *sums, const double *wide, Py_ssize_t size,
) noexcept nogil:
    cdef Py_ssize_t f
    for f in range(size):
        if not isfinite(sums[f]):
            sums[f] = wide[f]


cdef void rescue_gradients(
    Sums t, const double *centres, const floating *dout, const floating *x,
    const Grid *g, const Block *b, Sums spare,
) noexcept nogil:
    """Where a sum of floats overflowed: the same sums with every term in double."""
    cdef double columns[CENTRES * SCRATCH]
    cdef double storage[2 * WIDTH]
    cdef Sums wide = sums_at(storage, WIDTH)
    cdef Grid r = single_rows(g)
    cdef Block of_rows = block_at(&r, b.start, b.size)
    if sizeof(floating) == sizeof(double) or not overflowed(t, b.size):
        return
    spread_centres(columns, centres, &r, &of_rows)
    sum_gradients(wide, dout, x, columns, &r, &of_rows, 0, r.cells, spare)
    replace_overflowed(t.first, wide.first, b.size)
    replace_overflowed(t.second, wide.second, b.size)


cdef void store_gradient(floating *gradient, const double *sums, const Block *b) noexcept nogil:
    cdef Py_ssize_t f, size = b.size
    if gradient != NULL:
        gradient += b.start
        for f in range(size):
            gradient[f] = <floating>sums[f]


cdef void prepare_input_gradient(
    floating *columns, const Statistics *s, Sums t, double count, const Grid *g, const Block *b,
) noexcept nogil:
    """Each parameter by a loop of its own, as in `prepare_normalize`."""
    cdef const double *mean = s.mean
    cdef const double *rest = s.rest
    cdef const double *gamma = s.gamma
    cdef const double *invstd = s.invstd
    cdef const double *sum_dout = t.first
    cdef const double *sum_product = t.second
    cdef floating *hi = columns + HI * b.pitch
    cdef floating *xhat_scale = columns + XHAT_SCALE * b.pitch
    cdef floating *mean_product = columns + MEAN_PRODUCT * b.pitch
    cdef floating *mean_dout = columns + MEAN_DOUT * b.pitch
    cdef floating *scale = columns + DX_SCALE * b.pitch
    cdef double share = 1 / count
    cdef Py_ssize_t f, size = b.size
    for f in range(size):
        hi[f] = <floating>mean[f]
        xhat_scale[f] = <floating>invstd[f]
    for f in range(size):
        mean_product[f] = <floating>(sum_product[f] * share)
        scale[f] = <floating>(gamma[f] * invstd[f])
    for f in range(size):
        mean_dout[f] = <floating>(
            sum_dout[f] * share
            - ((mean[f] - hi[f]) + rest[f]) * invstd[f] * (sum_product[f] * share))
    for f in range(PARAMETERS):
        expand(columns + f * b.pitch, g, b)


cdef void prepare_frozen_gradient(
    floating *columns, const Statistics *s, const Grid *g, const Block *b,
) noexcept nogil:
    """Of statistics that do not depend on x: dx = gamma*invstd*dout is dout normalized with a mean
    and a beta of 0, and x is not read."""
    cdef const double *gamma = s.gamma
    cdef const double *invstd = s.invstd
    cdef floating *scale = columns + SCALE * b.pitch
    cdef Py_ssize_t f, size = b.size
    memset(columns + HI * b.pitch, 0, b.width * sizeof(floating))
    memset(columns + SHIFT * b.pitch, 0, b.width * sizeof(floating))
    for f in range(size):
        scale[f] = <floating>(gamma[f] * invstd[f])
    expand(scale, g, b)


# -------------------------------------------------------------------------------------------------
# The work of one call and how threads share it. Either each takes blocks of features and makes
# both passes over a block while its cache holds it; or, where there are few features or blocks
# outgrow the cache, each takes cells, stretches of rows, and the passes follow each other. The bits
# are the same.

cdef struct Work:
    Grid sums, writes        # how the first pass walks, and the second
    bint measure, write      # which of the passes are to be made
    int writing              # DIRECT, STREAMING or IN_PLACE
    int threads
    Py_ssize_t cache
    bint by_cells
    bint far                 # the arrays do not stay in the cache
    Py_ssize_t unit, units, blocks  # features that end with a cache line, how many such, blocks
    Py_ssize_t branches      # by cells: parts of the grid that threads sum, a power of two
    Py_ssize_t slice, slices  # features whose sums of all branches a thread adds, how many such
    double *statistics
    double *parts            # two sums of every feature, for every branch as often as it is deep
    Py_ssize_t deep
    double *gradients        # backward: two sums of every feature
    bint frozen              # backward: the statistics do not depend on x, nor does dx


cdef inline bint pays_by_cells(const Grid *g, Py_ssize_t threads, bint far) noexcept nogil:
    """Whether threads had better share the rows of all features: of runs, where features divide
    badly by them; of columns, wherever as many find work so, as memory wants whole rows, also of
    a single thread."""
    cdef Py_ssize_t busy = min(threads, g.cells)
    if g.cells == 1:
        return False
    if threads == 1:
        return far and not g.runs and g.stride > WIDTH
    if g.runs:
        return 3 * busy * ceil_div(g.features, threads) >= 4 * g.features
    return g.times > 1 or busy >= min(threads, g.stride // NARROW)


cdef Work share(
    const Shape *shape, double *statistics, Py_ssize_t itemsize, bint measure, bint write,
    int writing, const Resources *use,
) noexcept nogil:
    cdef Work w
    cdef Py_ssize_t size
    w.sums = plan(shape.outer, shape.features, shape.inner, False)
    w.writes = plan(shape.outer, shape.features, shape.inner, True)
    w.measure, w.write, w.writing = measure, write, STREAMING if use.far and STREAMS else writing
    w.threads, w.cache, w.far = use.threads, use.cache, use.far
    w.by_cells = pays_by_cells(&w.sums, w.threads, w.far)
    size = block_features(&w.sums, itemsize, w.cache, measure)
    w.unit = 1 if w.sums.runs else min(line_multiple(shape.inner), size)
    if w.sums.times > 1:
        w.unit = size
    w.units = ceil_div(shape.features, w.unit)
    w.blocks = ceil_div(w.units, size // w.unit)
    if w.by_cells:
        w.threads = min(<Py_ssize_t>w.threads, w.sums.cells)
        w.branches = w.threads if w.sums.cells % w.threads == 0 else w.sums.cells
    else:
        w.blocks = min(round_up(w.blocks, w.threads), w.units)
        w.threads = min(<Py_ssize_t>w.threads, w.blocks)
        w.branches = 1
    w.deep = 1
    while w.sums.cells // w.branches >> w.deep:
        w.deep += 1
    w.slice = round_up(ceil_div(shape.features, w.threads), LINE)
    w.slice = min(w.slice, WIDTH // w.sums.each)  # its columns fit the scratch of a rescue
    w.slices = ceil_div(shape.features, w.slice)
    w.statistics, w.parts, w.gradients, w.frozen = statistics, NULL, NULL, False
    return w


cdef inline Block block_of(const Grid *g, const Work *w, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t start = w.units * i // w.blocks * w.unit
    return block_at(g, start, w.units * (i + 1) // w.blocks * w.unit - start)


cdef inline Block slice_of(const Grid *g, const Work *w, Py_ssize_t i) noexcept nogil:
    return block_at(g, i * w.slice, w.slice)


cdef inline bint fits_cache(const Block *b, const Work *w, Py_ssize_t itemsize) noexcept nogil:
    """Whether a thread finds a block in its cache a second time; `itemsize` of all that is read."""
    return not w.by_cells and b.size * w.writes.count * itemsize <= w.cache


cdef inline Py_ssize_t to_next_row(const Grid *g, const Block *b) noexcept nogil:
    """From a value that is written to the one below it, which is written a row later; where rows
    adjoin, as far along memory as fetching takes."""
    if g.runs and b.parts == 1 and g.inner <= CHUNK:
        return g.features * g.inner
    return max(<Py_ssize_t>AHEAD, g.stride)


cdef inline Py_ssize_t ahead_of(
    const Block *b, const Work *w, Py_ssize_t i, Py_ssize_t itemsize,
) noexcept nogil:
    """From a value that is written past the cache to one that is to be fetched: of the thread's
    next block, where the first pass has left this one in the cache, else of the next row."""
    if w.writing != STREAMING:
        return 0
    if w.measure and fits_cache(b, w, itemsize):
        return b.size * w.writes.inner if i + 1 < w.blocks else 0
    return to_next_row(&w.writes, b)


cdef inline Py_ssize_t ahead_in(
    const Block *b, const Work *w, Py_ssize_t itemsize,
) noexcept nogil:
    """From a value that is summed to one that is to be fetched: of rows past the cache, those of
    the next group."""
    if w.sums.runs or not w.far or fits_cache(b, w, itemsize):
        return 0
    return GROUP * w.sums.stride


cdef inline Py_ssize_t first_cell(const Work *w, Py_ssize_t thread) noexcept nogil:
    """Where a thread's share of the cells to be written begins: about the rows that it summed."""
    return w.writes.cells * thread // w.threads


cdef inline Statistics statistics_of(const Work *w, const Block *b) noexcept nogil:
    cdef Statistics s
    cdef double *first = w.statistics + b.start
    s.mean = first + MEAN * w.sums.features
    s.rest = first + REST * w.sums.features
    s.var = first + VAR * w.sums.features
    s.invstd = first + INVSTD * w.sums.features
    s.gamma = first + GAMMA * w.sums.features
    return s


cdef inline Sums gradients_of(const Work *w, const Block *b) noexcept nogil:
    return sums_at(w.gradients + b.start, w.sums.features)


cdef inline Py_ssize_t whole_rows_from(
    const Work *w, Py_ssize_t first, Py_ssize_t stop,
) noexcept nogil:
    """From which cell to `stop` to write one block and then the next. Past the cache one cell is
    enough: memory is read best in whole rows."""
    return stop - 1 if w.blocks > 1 and w.far else first


cdef int take_parts(Work *w) noexcept nogil:
    """From the heap: a thread may have little stack."""
    if w.measure and w.sums.cells > 1:
        w.parts = <double *>malloc(w.branches * w.deep * 2 * w.sums.features * sizeof(double))
        return 0 if w.parts != NULL else -1
    return 0


cdef inline Sums part_of(const Work *w, Py_ssize_t part, const Block *b) noexcept nogil:
    """Where a block's features are summed in a part."""
    cdef Py_ssize_t features = w.sums.features
    return sums_at(w.parts + part * 2 * features + b.start, features)


cdef inline void add_part(const Work *w, Py_ssize_t total, Py_ssize_t part) noexcept nogil:
    cdef Block all_features = block_at(&w.sums, 0, w.sums.features)
    add_sums(part_of(w, total, &all_features), part_of(w, part, &all_features), w.sums.features)


cdef void merge_parts(Sums total, const Work *w, const Block *b) noexcept nogil:
    """The rest of the tree, from the branches down."""
    cdef Py_ssize_t i, first, step = 1
    cdef Sums root = part_of(w, 0, b)
    while step < w.branches:
        for i in range(w.branches // (2 * step)):
            first = 2 * i * step * w.deep
            add_sums(part_of(w, first, b), part_of(w, first + step * w.deep, b), b.size)
        step *= 2
    memcpy(total.first, root.first, b.size * sizeof(double))
    memcpy(total.second, root.second, b.size * sizeof(double))


# -------------------------------------------------------------------------------------------------
# Forward

cdef void moments_task(const floating *x, const Work *w, Py_ssize_t i) noexcept nogil:
    cdef Block b = block_of(&w.sums, w, i)
    cdef Statistics s = statistics_of(w, &b)
    b.ahead = ahead_in(&b, w, sizeof(floating))
    moments_of_block(&s, x, &w.sums, &b, part_of(w, 0, &b))


cdef void describe_task(
    const floating *gamma, double eps, const Work *w, Py_ssize_t i,
) noexcept nogil:
    cdef Block b = block_of(&w.sums, w, i)
    cdef Statistics s = statistics_of(w, &b)
    describe(&s, gamma, eps, &b)


cdef void normalize_task(
    floating *y, const floating *x, const floating *beta,
    const Work *w, Py_ssize_t i, Py_ssize_t first, Py_ssize_t stop,
) noexcept nogil:
    """Cells from the last to the first: it begins on what the first pass left in the cache."""
    cdef floating storage[NORMALIZE * SCRATCH]
    cdef floating *columns = <floating *>aligned(storage)
    cdef Block b = block_of(&w.writes, w, i)
    cdef Statistics s = statistics_of(w, &b)
    cdef Py_ssize_t cell
    b.ahead = ahead_of(&b, w, i, sizeof(floating))
    prepare_normalize(columns, &s, beta, &w.writes, &b)
    for cell in range(stop - 1, first - 1, -1):
        normalize_cell(y, x, columns, &w.writes, &b, cell, w.writing)
    end_streaming()


cdef void forward_block(
    floating *y, const floating *x, const floating *gamma, const floating *beta,
    double eps, const Work *w, Py_ssize_t i,
) noexcept nogil:
    if w.measure:
        moments_task(x, w, i)
    describe_task(gamma, eps, w, i)
    if w.write:
        normalize_task(y, x, beta, w, i, 0, w.writes.cells)


cdef void shift_task(const floating *x, const Work *w, Py_ssize_t i) noexcept nogil:
    cdef Block b = slice_of(&w.sums, w, i)
    cdef Statistics s = statistics_of(w, &b)
    sample_shift(&s, x, &w.sums, &b)


cdef void deviations_task(
    const floating *x, const Work *w, Py_ssize_t part, Py_ssize_t cell, Py_ssize_t i,
) noexcept nogil:
    cdef floating storage[SCRATCH]
    cdef floating *shift = <floating *>aligned(storage)
    cdef Block b = block_of(&w.sums, w, i)
    cdef Statistics s = statistics_of(w, &b)
    b.ahead = ahead_in(&b, w, sizeof(floating))
    spread(shift, s.mean, &w.sums, &b)
    deviations_of_cell(part_of(w, part, &b), x, shift, &w.sums, &b, cell)


cdef void deviations_branch(
    const floating *x, const Work *w, Py_ssize_t part, Py_ssize_t cell, Py_ssize_t cells,
) noexcept nogil:
    """As `sum_deviations`, all blocks of a cell before the next: memory is read in whole rows."""
    cdef Py_ssize_t i, half = cells // 2
    if cells == 1:
        for i in range(w.blocks):
            deviations_task(x, w, part, cell, i)
        return
    deviations_branch(x, w, part, cell, half)
    deviations_branch(x, w, part + 1, cell + half, half)
    add_part(w, part, part + 1)


cdef void merge_moments(
    const floating *x, const floating *gamma, double eps, const Work *w, Py_ssize_t i,
) noexcept nogil:
    cdef double storage[2 * WIDTH]
    cdef Sums t = sums_at(storage, WIDTH)
    cdef Block b = slice_of(&w.sums, w, i)
    cdef Statistics s = statistics_of(w, &b)
    if w.measure:
        merge_parts(t, w, &b)
        moments_of_sums(&s, t, x, &w.sums, &b, part_of(w, 0, &b))  # whose sums are in t now
    describe(&s, gamma, eps, &b)


cdef void normalize_share(
    floating *y, const floating *x, const floating *beta, const Work *w, Py_ssize_t thread,
) noexcept nogil:
    cdef Py_ssize_t first = first_cell(w, thread), stop = first_cell(w, thread + 1)
    cdef Py_ssize_t i, begin
    while stop > first:
        begin = whole_rows_from(w, first, stop)
        for i in range(w.blocks):
            normalize_task(y, x, beta, w, i, begin, stop)
        stop = begin


cdef void forward_by_cells(
    floating *y, const floating *x, const floating *gamma, const floating *beta,
    double eps, Work *w,
) noexcept nogil:
    cdef Py_ssize_t i, cells = w.sums.cells // w.branches
    with parallel(num_threads=w.threads):
        if w.measure:
            for i in prange(w.slices, schedule="static"):
                shift_task(x, w, i)
            for i in prange(w.branches, schedule="static"):
                deviations_branch(x, w, i * w.deep, i * cells, cells)
        for i in prange(w.slices, schedule="static"):
            merge_moments(x, gamma, eps, w, i)
        if w.write:
            for i in prange(w.threads, schedule="static"):
                normalize_share(y, x, beta, w, i)


cdef int forward_of(
    floating *y, double *statistics, const floating *x, const floating *gamma, const floating *beta,
    const Shape *shape, double eps, bint measure, const Resources *use,
) noexcept nogil:
    cdef int writing = IN_PLACE if y == x else DIRECT
    cdef Work w = share(
        shape, statistics, sizeof(floating), measure, y != NULL, writing, use)
    cdef Py_ssize_t i
    if take_parts(&w):
        return -1
    if w.by_cells:
        forward_by_cells(y, x, gamma, beta, eps, &w)
    elif w.threads == 1:  # no parallel region: one of a single thread would do, but it costs
        for i in range(w.blocks):
            forward_block(y, x, gamma, beta, eps, &w, i)
    else:
        for i in prange(w.blocks, num_threads=w.threads, schedule="static"):
            forward_block(y, x, gamma, beta, eps, &w, i)
    free(w.parts)
    clear_vectors()
    return 0


# -------------------------------------------------------------------------------------------------
# Backward, likewise

cdef void finish_gradients(
    Sums t, const double *centres, const floating *dout, const floating *x, const Statistics *s,
    floating *dgamma, floating *dbeta, const Grid *g, const Block *b, Sums spare,
) noexcept nogil:
    rescue_gradients(t, centres, dout, x, g, b, spare)
    settle_gradients(t, centres, s, b)
    store_gradient(dbeta, t.first, b)
    store_gradient(dgamma, t.second, b)


cdef void gradients_task(
    floating *dgamma, floating *dbeta, const floating *dout, const floating *x, const Work *w,
    Py_ssize_t i,
) noexcept nogil:
    cdef floating storage[CENTRES * SCRATCH]
    cdef floating *columns = <floating *>aligned(storage)
    cdef double centres[2 * WIDTH]
    cdef Block b = block_of(&w.sums, w, i)
    cdef Statistics s = statistics_of(w, &b)
    cdef Sums t = gradients_of(w, &b)
    b.ahead = ahead_in(&b, w, 2 * sizeof(floating))
    find_centres(centres, &s, sizeof(floating) == 4, &b)
    spread_centres(columns, centres, &w.sums, &b)
    sum_gradients(t, dout, x, columns, &w.sums, &b, 0, w.sums.cells, part_of(w, 0, &b))
    finish_gradients(
        t, centres, dout, x, &s, dgamma, dbeta, &w.sums, &b, part_of(w, 0, &b))


cdef void input_gradient_task(
    floating *dx, const floating *dout, const floating *x, double count,
    const Work *w, Py_ssize_t i, Py_ssize_t first, Py_ssize_t stop,
) noexcept nogil:
    cdef floating storage[PARAMETERS * SCRATCH]
    cdef floating *columns = <floating *>aligned(storage)
    cdef Block b = block_of(&w.writes, w, i)
    cdef Statistics s = statistics_of(w, &b)
    cdef Py_ssize_t cell
    b.ahead = ahead_of(&b, w, i, 2 * sizeof(floating))
    if w.frozen:
        prepare_frozen_gradient(columns, &s, &w.writes, &b)
    else:
        prepare_input_gradient(columns, &s, gradients_of(w, &b), count, &w.writes, &b)
    for cell in range(stop - 1, first - 1, -1):
        if w.frozen:
            normalize_cell(dx, dout, columns, &w.writes, &b, cell, w.writing)
        else:
            input_gradient_cell(dx, dout, x, columns, &w.writes, &b, cell, w.writing)
    end_streaming()


cdef void backward_block(
    floating *dx, floating *dgamma, floating *dbeta, const floating *dout, const floating *x,
    double count, const Work *w, Py_ssize_t i,
) noexcept nogil:
    if w.measure:
        gradients_task(dgamma, dbeta, dout, x, w, i)
    if w.write:
        input_gradient_task(dx, dout, x, count, w, i, 0, w.writes.cells)


cdef void gradient_parts_task(
    const floating *dout, const floating *x, const Work *w,
    Py_ssize_t part, Py_ssize_t cell, Py_ssize_t i,
) noexcept nogil:
    cdef floating storage[CENTRES * SCRATCH]
    cdef floating *columns = <floating *>aligned(storage)
    cdef double centres[2 * WIDTH]
    cdef Block b = block_of(&w.sums, w, i)
    cdef Statistics s = statistics_of(w, &b)
    b.ahead = ahead_in(&b, w, 2 * sizeof(floating))
    find_centres(centres, &s, sizeof(floating) == 4, &b)
    spread_centres(columns, centres, &w.sums, &b)
    gradients_of_cell(part_of(w, part, &b), dout, x, columns, &w.sums, &b, cell)


cdef void gradients_branch(
    const floating *dout, const floating *x, const Work *w,
    Py_ssize_t part, Py_ssize_t cell, Py_ssize_t cells,
) noexcept nogil:
    """As `deviations_branch`."""
    cdef Py_ssize_t i, half = cells // 2
    if cells == 1:
        for i in range(w.blocks):
            gradient_parts_task(dout, x, w, part, cell, i)
        return
    gradients_branch(dout, x, w, part, cell, half)
    gradients_branch(dout, x, w, part + 1, cell + half, half)
    add_part(w, part, part + 1)


cdef void merge_gradients(
    floating *dgamma, floating *dbeta, const floating *dout, const floating *x,
    const Work *w, Py_ssize_t i,
) noexcept nogil:
    cdef double centres[2 * WIDTH]
    cdef Block b = slice_of(&w.sums, w, i)
    cdef Statistics s = statistics_of(w, &b)
    cdef Sums t = gradients_of(w, &b)
    merge_parts(t, w, &b)
    find_centres(centres, &s, sizeof(floating) == 4, &b)
    finish_gradients(
        t, centres, dout, x, &s, dgamma, dbeta, &w.sums, &b, part_of(w, 0, &b))


cdef void input_gradient_share(
    floating *dx, const floating *dout, const floating *x, double count, const Work *w,
    Py_ssize_t thread,
) noexcept nogil:
    cdef Py_ssize_t first = first_cell(w, thread), stop = first_cell(w, thread + 1)
    cdef Py_ssize_t i, begin
    while stop > first:
        begin = whole_rows_from(w, first, stop)
        for i in range(w.blocks):
            input_gradient_task(dx, dout, x, count, w, i, begin, stop)
        stop = begin


cdef void backward_by_cells(
    floating *dx, floating *dgamma, floating *dbeta, const floating *dout, const floating *x,
    double count, Work *w,
) noexcept nogil:
    cdef Py_ssize_t i, cells = w.sums.cells // w.branches
    with parallel(num_threads=w.threads):
        if w.measure:
            for i in prange(w.branches, schedule="static"):
                gradients_branch(dout, x, w, i * w.deep, i * cells, cells)
            for i in prange(w.slices, schedule="static"):
                merge_gradients(dgamma, dbeta, dout, x, w, i)
        if w.write:
            for i in prange(w.threads, schedule="static"):
                input_gradient_share(dx, dout, x, count, w, i)


cdef int backward_of(
    floating *dx, floating *dgamma, floating *dbeta, double *sums, double *statistics,
    const floating *dout, const floating *x,
    const Shape *shape, double count, bint measure, const Resources *use,
) noexcept nogil:
    cdef int writing = IN_PLACE if dx == dout else DIRECT
    cdef Work w = share(
        shape, statistics, sizeof(floating), measure, dx != NULL, writing, use)
    cdef Py_ssize_t i
    w.gradients, w.frozen = sums, isinf(count)
    if take_parts(&w):
        return -1
    if w.by_cells:
        backward_by_cells(dx, dgamma, dbeta, dout, x, count, &w)
    elif w.threads == 1:
        for i in range(w.blocks):
            backward_block(dx, dgamma, dbeta, dout, x, count, &w, i)
    else:
        for i in prange(w.blocks, num_threads=w.threads, schedule="static"):
            backward_block(dx, dgamma, dbeta, dout, x, count, &w, i)
    free(w.parts)
    clear_vectors()
    return 0


# -------------------------------------------------------------------------------------------------
# What the package calls: float or double behind one signature

cdef Kernels[2] TABLE
TABLE[0].forward = <Forward>forward_of[float]
TABLE[0].backward = <Backward>backward_of[float]
TABLE[1].forward = <Forward>forward_of[double]
TABLE[1].backward = <Backward>backward_of[double]

KERNELS = PyCapsule_New(TABLE, "bn_cy.Kernels", NULL)
FLAGS = C_FLAGS.decode()  # what the compiler was told for this variant
