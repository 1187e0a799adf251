# How an array is walked: as rows of columns, whatever its shape.
#
# Derivation: every sum over the n values of a feature, and every y or dx that follows from it, is
# taken in the order that is set here. Twin: `reference` leaves the order to NumPy's `sum`.
# Tests: tests/test_same_bits.py, where every layout has its cases. Bytes moved: none.
#
# An array is (outer, features, inner), none of them 0. There are five ways to make rows of it, and
# columns of images may be merged, too. F is a feature, a line of the pictures a row of the loops:
#
#   columns, one a feature         merged, narrow rows           columns, `each` a feature
#   inner == 1                     times > 1                     small inner: images of 7 x 7
#   F0 F1 F2 F3 F4 F5 ...          F0 F1 F2 F0 F1 F2 F0 F1 F2    F0 F0 F0 F0 F1 F1 F1 F1 ...
#   F0 F1 F2 F3 F4 F5 ...          F0 F1 F2 F0 F1 F2 F0 F1 F2    F0 F0 F0 F0 F1 F1 F1 F1 ...
#   F0 F1 F2 F3 F4 F5 ...          F0 F1 F2   (the tail)         F0 F0 F0 F0 F1 F1 F1 F1 ...
#
#   runs                           cut runs: long ones for sums, any for writing
#   inner is enough for vectors    a sheet for each image
#   F0 F0 F0 F0 ... of image 0     F0 F0 F0 of image 0           F0 F0 F0 of image 1
#   F0 F0 F0 F0 ... of image 1     F0 F0 F0                      F0 F0 F0
#   F0 F0 F0 F0 ... of image 2     F0         (the tail)         F0         (the tail)
#
# In columns a sum is a column's, and the columns of a feature are added up at the end. A row of
# runs is of one feature, and a sum is that of LANES values side by side, in registers.
#
# A Grid says which of these it is. A Block is some adjacent features of it, a cell some of its
# rows; a Piece is what is walked at a time, rows of one sheet within a block and a cell. Blocks and
# threads have no say in the order of any sum. Cells have, and so depend on the shape alone.

cdef enum:  # They set the order of sums: whoever changes one changes bits, and bn_cy/digests.txt.
    # Rows that are added up in the data's type before they go to double: so few roundings are
    # within the accuracy contract, and so many streams are prefetched.
    GROUP = 8
    # Sums that the values of a run are added to: a line of floats, a multiple of every vector.
    LANES = 16
    # Columns in a row of a block, at the most: its parameters fit L1. It bounds all scratch.
    WIDTH = 1024
    # Columns from which a row keeps the vectors busy: narrower ones are merged.
    NARROW = 128
    # Rows that are left, at the least, where rows are merged beyond that: threads want some, too.
    MANY = 512
    # Values of a run from which it is cut for sums, into rows of at most STRETCH: eight streams.
    LONG = 8192
    STRETCH = 2048
    # Values of a feature below which roundings do not average: the terms of its moments are double.
    FEW = 32
    # Cells of a grid, at the most: work for as many threads.
    CELLS = 64
    # Rows of a cell of columns, at the least, and its values of all features; of a cell of runs,
    # its values of one feature: to add up the sums of cells is then a percent of the work.
    CELL_ROWS = 128
    CELL_VALUES = 131072
    CELL_RUN = 16384
    # Cells of narrow rows that are made sooner, as threads share few features badly: two from so
    # many values on, and four from four times as many.
    FEW_CELLS = 4
    FEW_VALUES = 24576
    # Rows of a sheet that is not cut between cells, at the most.
    SHEET_ROWS = 1024

cdef enum:  # They do not.
    # Values of a row of scratch: room to align it, and to `repeat` in it.
    SCRATCH = WIDTH + 2 * LINE
    # WIDTH where features have few values: what a feature needs for itself takes most of L1 then.
    SLIM = 512
    # Features of a block of runs, at the most: their own work is vectorised.
    RUNS = 64
    # Values of the rows that runs are cut into for writing: 4 KB along memory.
    CHUNK = 1024


cdef struct Signs:  # a bit a value, see signs.pxi
    unsigned char *bits    # or NULL
    Py_ssize_t row, pitch  # values of a row, and their bits with those that fill the last byte
    void *let_through      # where what they let through of dout is put, or NULL


cdef struct Grid:
    Py_ssize_t outer, features, inner  # the array
    Py_ssize_t count                   # values of a feature
    Py_ssize_t sheets                  # one, or one for each image where runs are cut
    Py_ssize_t rows, stride            # full rows of a sheet, values from one row to the next
    Py_ssize_t tail                    # columns of a shorter row that follows them, or 0
    bint runs                          # whether a row is of one feature
    Py_ssize_t stretch                 # runs: values in a row
    Py_ssize_t each                    # columns: of a feature, in a row of the array
    Py_ssize_t times                   # columns: rows of the array that are merged into one
    Py_ssize_t cells, unit             # how many cells, each of whole units of rows
    Signs signs                        # of all values, where they are to be set or to be heeded


cdef struct Block:
    Py_ssize_t start, size   # features [start, start + size)
    Py_ssize_t width, pitch  # columns of a row of it; values from row to row of its scratch


cdef struct Piece:
    Py_ssize_t offset, rows, width  # its first value, its rows, columns of a row
    Py_ssize_t tail                 # columns of a shorter row, which is the next piece; or 0
    Py_ssize_t column               # the first column of the block that it covers
    Py_ssize_t pieces               # how many lie side by side: a feature each in runs, else one
    Py_ssize_t full_offset, full_rows, full_width, full_tail  # of the first of these
    Py_ssize_t next, stop           # rows of the cell not yet walked, counted over all the sheets


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


cdef inline Py_ssize_t shortest_run(Py_ssize_t outer) noexcept nogil:
    """From how many values on the images of a feature are runs. The more images there are, the
    longer must they be: columns add up all of them at once."""
    return LANES * min(outer, <Py_ssize_t>(4 if outer < GROUP else LANES))


cdef inline Py_ssize_t summed_stretch(Py_ssize_t inner) noexcept nogil:
    """The rows that a long run is cut into for sums. It is read as eight streams, by groups of long
    rows, an odd number of LANES: their distance spreads them over the sets of the cache."""
    cdef Py_ssize_t rows = round_up(ceil_div(inner, STRETCH), GROUP)
    return (inner // rows // LANES - 1 | 1) * LANES


cdef inline Py_ssize_t cell_count(const Grid *g, Py_ssize_t least) noexcept nogil:
    """Into how many cells to cut a grid: a power of two, the leaves of a tree of halves. Two from
    `least` rows on, more where each has as many; none of them is empty."""
    cdef Py_ssize_t units = g.sheets * g.rows // g.unit
    cdef Py_ssize_t enough = ceil_div(least, g.unit)
    cdef Py_ssize_t cells = 2 if units >= max(<Py_ssize_t>2, enough) else 1
    while cells < CELLS and 2 * cells * enough <= units:
        cells *= 2
    return cells


cdef inline Py_ssize_t cells_of(const Grid *g) noexcept nogil:
    """Into how many cells to cut a grid of this kind; see CELL_ROWS and what follows it."""
    cdef Py_ssize_t cells
    if g.count < FEW:  # their moments are summed in double, in a single cell
        return 1
    if g.runs:
        return cell_count(g, CELL_RUN // g.stretch)
    cells = cell_count(g, max(<Py_ssize_t>CELL_ROWS, CELL_VALUES // g.stride))
    if g.stride <= WIDTH and g.features <= WIDTH // 2:
        return max(cells, min(cell_count(g, FEW_VALUES // g.stride), <Py_ssize_t>FEW_CELLS))
    return cells


cdef inline void set_cells(Grid *g) noexcept nogil:
    g.unit = g.rows if g.sheets > 1 and g.rows <= SHEET_ROWS else GROUP
    g.cells = cells_of(g)


cdef inline void cut_runs(Grid *g, Py_ssize_t stretch) noexcept nogil:
    """A sheet for each run, whose rows are stretches of it."""
    g.stretch = g.stride = stretch
    g.sheets, g.rows, g.tail = g.outer, g.inner // stretch, g.inner % stretch


cdef inline void merge_rows(Grid *g, Py_ssize_t wide) noexcept nogil:
    """Rows of `wide` columns or fewer; of up to WIDTH, to end on a cache line."""
    cdef Py_ssize_t width = g.features * g.inner
    g.times = merged_rows(g.outer, width, wide)
    g.stride = g.times * width
    g.rows, g.tail = g.outer // g.times, g.outer % g.times * width


cdef Grid plan_sums(const Shape *shape) noexcept nogil:
    """How an array of this shape is walked for sums."""
    cdef Grid g
    g.outer, g.features, g.inner = shape.outer, shape.features, shape.inner
    g.count = g.outer * g.inner
    g.stretch, g.stride = g.inner, g.features * g.inner
    g.sheets, g.rows, g.tail, g.times = 1, g.outer, 0, 1
    g.runs = g.inner >= shortest_run(g.outer)
    g.each = 1 if g.runs else g.inner
    if not g.runs:
        merge_rows(&g, WIDTH)
    elif g.inner >= LONG:
        cut_runs(&g, summed_stretch(g.inner))
    set_cells(&g)
    return g


cdef Grid plan_writes(const Grid *sums) noexcept nogil:
    """How the same array is walked for writing: in narrower rows, whose parameters leave L1 to what
    streams by, and runs along memory, image by image."""
    cdef Grid g = sums[0]
    if g.runs:
        cut_runs(&g, min(<Py_ssize_t>CHUNK, g.inner))
    else:
        merge_rows(&g, WIDTH // 2)
    set_cells(&g)
    return g


cdef inline Grid single_rows(const Grid *g) noexcept nogil:
    """The grid with rows that were merged apart again, so that any features of it make a block."""
    cdef Grid r = g[0]
    if g.times > 1:
        r.times, r.rows, r.stride, r.tail = 1, g.outer, g.features * g.inner, 0
        r.unit *= g.times
    return r


cdef inline Py_ssize_t block_features(
    const Grid *g, Py_ssize_t itemsize, Py_ssize_t cache, bint measure,
) noexcept nogil:
    """Features that are walked together, at the most. Runs of two arrays, x and y or dout, that a
    second pass is to find in the cache are few; one that stands alone walks along memory."""
    cdef Py_ssize_t width
    if g.runs:
        width = cache // (g.count * 2 * itemsize) if measure else RUNS
        return max(<Py_ssize_t>1, min(<Py_ssize_t>RUNS, width))
    if g.times > 1:
        return g.features
    width = WIDTH if g.count >= FEW else SLIM
    return max(<Py_ssize_t>1, width * <Py_ssize_t>sizeof(float) // (itemsize * g.inner))


cdef inline Block block_at(const Grid *g, Py_ssize_t start, Py_ssize_t size) noexcept nogil:
    cdef Block b
    b.start, b.size = start, min(size, g.features - start)
    b.width = g.times * b.size * g.each
    b.pitch = round_up(b.width, 2 * LINE) + LINE
    return b


cdef inline Piece cell_at(const Grid *g, const Block *b, Py_ssize_t cell) noexcept nogil:
    """Where the walk of a cell begins: before its first piece."""
    cdef Piece p
    cdef Py_ssize_t rows = g.sheets * g.rows, units = ceil_div(rows, g.unit)
    p.next = units * cell // g.cells * g.unit
    p.stop = min(units * (cell + 1) // g.cells * g.unit, rows)
    p.full_width = g.stretch if g.runs else b.width
    p.pieces = b.width if g.runs else 1
    p.column = p.pieces
    p.tail = 0
    return p


cdef inline void next_rows(Piece *p, const Grid *g, const Block *b) noexcept nogil:
    """To rows of the cell not yet walked: those of one sheet."""
    cdef Py_ssize_t sheet = 0 if g.sheets == 1 else p.next // g.rows
    cdef Py_ssize_t row = p.next - sheet * g.rows
    p.full_offset = (sheet * g.features + b.start) * g.inner + row * g.stride
    p.full_rows = min(g.rows - row, p.stop - p.next)
    p.full_tail = g.tail if row + p.full_rows == g.rows else 0
    p.next += p.full_rows
    p.column = 0


cdef inline bint next_piece(Piece *p, const Grid *g, const Block *b) noexcept nogil:
    """To the next piece of the cell; False at its end."""
    if p.tail:
        p.offset += p.rows * g.stride
        p.rows, p.width, p.tail = 1, p.tail, 0
        return True
    p.column += 1
    if p.column >= p.pieces:
        if p.next >= p.stop:
            return False
        next_rows(p, g, b)
    p.offset = p.full_offset + p.column * g.inner
    p.rows, p.width, p.tail = p.full_rows, p.full_width, p.full_tail
    return True
