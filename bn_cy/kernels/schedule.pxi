# A call: its two passes, and how threads share them.
#
# Either each thread takes blocks of features and makes both passes over a block while its cache
# holds it; or each takes cells, which are stretches of rows, and the passes follow each other
# (threads.pxi): of columns wherever there are cells enough, of runs where features divide badly,
# and for a single thread only past the cache. The bits are the same.
#
# Derivation: none; what each step computes is said in the rooms that it calls.
# Tests: tests/test_same_bits.py, with 1 to 16 threads; tests/test_threads.py.
# Bytes moved: those of the passes.
#
# Here, in threads.pxi and in kernels.pyx a direction is known only at run time. A forward has x, or
# a residual, in the place of dout, and statistics, which it does not read there, in that of sums.

from bn_cy.kernels cimport MEAN, VAR, Resources, Running, Shape

cdef enum:
    # Values from those that are written to those that are fetched, at the least: eight bursts.
    AHEAD = 1024


cdef struct Call:
    Grid sums, writes        # how the first pass walks, and the second
    bint measure, write      # which of the passes are to be made
    int summed, written      # what they make: a Direction, a Written
    const Running *running   # forward: to be updated, or NULL
    int *unwelcome           # set if a variance is not finite: then nothing is updated
    int writing              # DIRECT, STREAMING or IN_PLACE
    int threads
    Py_ssize_t cache
    bint far                 # the arrays do not stay in the cache
    bint by_cells
    Py_ssize_t line_features, lines, blocks  # features that end with a cache line, how many such
    Py_ssize_t branches, levels  # by cells: subtrees that threads sum, levels of one
    Py_ssize_t slice, slices     # features whose branches a thread adds up, how many such


cdef inline bint pays_by_cells(const Grid *g, Py_ssize_t threads, bint far) noexcept nogil:
    """Whether threads had better share the rows of all features. Of runs, where features divide
    badly: where so many threads as have rows would be done in three quarters of the time. Of
    columns, wherever as many threads find work so, because memory is read best in whole rows; a
    single thread does so past the cache."""
    cdef Py_ssize_t busy = min(threads, g.cells)
    if g.cells == 1:
        return False
    if threads == 1:
        return far and not g.runs and g.stride > WIDTH
    if g.runs:
        return 3 * busy * ceil_div(g.features, threads) >= 4 * g.features
    return g.times > 1 or busy >= min(threads, g.stride // NARROW)


cdef Call plan_call(
    const Shape *shape, Py_ssize_t itemsize, bint measure, bint write, bint in_place,
    int summed, int written, unsigned char *signs, const Resources *use,
) noexcept nogil:
    cdef Call c
    c.sums = plan_sums(shape)
    c.writes = plan_writes(&c.sums)
    c.measure, c.write, c.summed, c.written = measure, write, summed, written
    c.writing = STREAMING if use.far and STREAMS else IN_PLACE if in_place else DIRECT
    c.threads, c.cache, c.far = use.threads, use.cache, use.far
    c.by_cells = pays_by_cells(&c.sums, c.threads, c.far)
    share_blocks(&c, block_features(&c.sums, itemsize, c.cache, measure))
    share_cells(&c)
    c.writes.signs = plan_signs(signs, &c.writes, c.line_features)
    c.sums.signs = c.writes.signs
    c.running = NULL
    return c


cdef inline void share_blocks(Call *c, Py_ssize_t size) noexcept nogil:
    """Blocks of at most so many features, of whole cache lines, as many for each thread."""
    c.line_features = 1 if c.sums.runs else min(line_multiple(c.sums.inner), size)
    if c.sums.times > 1:
        c.line_features = size
    c.lines = ceil_div(c.sums.features, c.line_features)
    c.blocks = ceil_div(c.lines, size // c.line_features)
    if not c.by_cells:
        c.blocks = min(round_up(c.blocks, c.threads), c.lines)
        c.threads = min(<Py_ssize_t>c.threads, c.blocks)


cdef inline void share_cells(Call *c) noexcept nogil:
    """A branch of the tree of cells for each thread, or, where these are no power of two, a cell;
    and slices of the features, whose columns fit the scratch of a rescue."""
    c.branches = 1
    if c.by_cells:
        c.threads = min(<Py_ssize_t>c.threads, c.sums.cells)
        c.branches = c.threads if c.sums.cells % c.threads == 0 else c.sums.cells
    c.levels = 1
    while c.sums.cells // c.branches >> c.levels:
        c.levels += 1
    c.slice = round_up(ceil_div(c.sums.features, c.threads), LINE)
    c.slice = min(c.slice, WIDTH // c.sums.each)
    c.slices = ceil_div(c.sums.features, c.slice)


cdef inline Block block_of(const Grid *g, const Call *c, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t start = c.lines * i // c.blocks * c.line_features
    return block_at(g, start, c.lines * (i + 1) // c.blocks * c.line_features - start)


cdef inline Block slice_of(const Call *c, Py_ssize_t i) noexcept nogil:
    return block_at(&c.sums, i * c.slice, c.slice)


# What is fetched ahead

cdef inline bint fits_cache(const Block *b, const Call *c, Py_ssize_t itemsize) noexcept nogil:
    """Whether a thread finds a block in its cache a second time; `itemsize` of all that is read."""
    return not c.by_cells and b.size * c.sums.count * itemsize <= c.cache


cdef inline Py_ssize_t to_next_row(const Grid *g, const Block *b) noexcept nogil:
    """From a value that is written to one that is read a while later: its place in the next image,
    where a block has little of an image; else the one below it, or, where that is near, AHEAD
    values along memory."""
    if g.runs and g.outer > 1 and b.size * g.inner <= LONG:
        return g.features * g.inner
    return max(<Py_ssize_t>AHEAD, g.stride)


cdef inline Py_ssize_t written_ahead(
    const Block *b, const Call *c, Py_ssize_t i, Py_ssize_t itemsize,
) noexcept nogil:
    """From a value that is written past the cache to one that is to be fetched: of the thread's
    next block, where the first pass has left this one in the cache, else of the next row."""
    if c.writing != STREAMING:
        return 0
    if c.measure and fits_cache(b, c, itemsize):
        return b.size * c.writes.inner if i + 1 < c.blocks else 0
    return to_next_row(&c.writes, b)


cdef inline Py_ssize_t read_beside(
    const Block *b, const Call *c, Py_ssize_t ahead,
) noexcept nogil:
    """The same of what is read beside x: dout, which both passes want as they do x, or a residual,
    which only the second one does, where it goes on."""
    if c.writing == STREAMING and c.summed == FORWARDS:
        return to_next_row(&c.writes, b)
    return ahead


# The second pass

cdef inline void prepare_columns(
    floating[:, ::1] columns, const double[:, ::1] s, const double[:, ::1] sums, double count,
    const Call *c, const Block *b,
) noexcept nogil:
    if c.written == BACKWARDS or c.written == GATED or c.written == SIGNED:
        prepare_input_gradient(columns, s, sums, count, &c.writes, b)
        if c.written == GATED:
            prepare_gate(columns, s, &c.writes, b)
    elif c.summed == FORWARDS or c.written == PASSED:
        prepare_normalize(columns, s, &c.writes, b)
    else:
        prepare_frozen_gradient(columns, s, &c.writes, b)


cdef void write_block(
    floating[:, :, ::1] out, const floating[:, :, ::1] x, const floating[:, :, ::1] dout,
    double[:, ::1] statistics, double[:, ::1] sums, double count,
    const Call *c, Py_ssize_t i, Py_ssize_t first, Py_ssize_t stop,
) noexcept nogil:
    """A block in some cells, from the last to the first: it begins on what the first pass left in
    the cache."""
    cdef floating scratch[PARAMETERS * SCRATCH]
    cdef Block b = block_of(&c.writes, c, i)
    cdef floating[:, ::1] columns = rows_of(
        <floating *>aligned(scratch), PARAMETERS, b.width, b.pitch)
    cdef Py_ssize_t cell, read = (1 if c.summed == FORWARDS else 2) * sizeof(floating)
    cdef Py_ssize_t ahead = written_ahead(&b, c, i, read)
    cdef Py_ssize_t beside = read_beside(&b, c, ahead)
    prepare_columns(
        columns, of_features(statistics, &b), of_features(sums, &b), count, c, &b)
    for cell in range(stop - 1, first - 1, -1):
        write_cell_of(
            c.written, out, x, dout, columns, &c.writes, &b, cell, c.writing, ahead, beside)
    end_streaming()


# The running statistics

cdef inline void judge_batch(double[:, ::1] s, const Call *c) noexcept nogil:
    """Raise the flag if the batch must not count in the running statistics: a variance of it is not
    finite. A NaN of any kind makes one NaN."""
    if c.running != NULL and not c.running.nonfinite and not are_finite(
            row_of(&s[VAR, 0], s.shape[1])):
        raise_flag(c.unwelcome)


cdef void update_running(double[:, ::1] statistics, const Call *c, const Block *b) noexcept nogil:
    """Of a block or slice, once all threads have judged: all features or none."""
    cdef double[:, ::1] s = of_features(statistics, b)
    if c.unwelcome[0]:
        return
    average(
        row_of(c.running.mean + b.start, b.size), row_of(&s[MEAN, 0], b.size),
        c.running.weight, 1)
    average(
        row_of(c.running.var + b.start, b.size), row_of(&s[VAR, 0], b.size),
        c.running.weight, c.running.correction)


cdef void update_block(double[:, ::1] statistics, const Call *c, Py_ssize_t i) noexcept nogil:
    cdef Block b = block_of(&c.sums, c, i)
    update_running(statistics, c, &b)
