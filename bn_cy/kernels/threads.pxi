# Threads that share the rows of all features: what each does of the steps of a call, with a barrier
# between them. (`*_of` a member is its share of a step.)
#
# Derivation: none; what each step computes is said in the rooms that it calls.
# Tests: tests/test_same_bits.py, with 1 to 16 threads; tests/test_threads.py.
# Bytes moved: those of the passes.

from libc.string cimport memcpy

cdef extern from *:
    """
    #if !defined(_OPENMP)
    #define bn_thread_number() 0
    #define bn_team_size() 1
    #define bn_wait_for_all() ((void)0)
    #else
    #include <omp.h>
    #define bn_thread_number() omp_get_thread_num()
    #define bn_team_size() omp_get_num_threads()
    #if defined(_MSC_VER) && !defined(__clang__)
    #define bn_wait_for_all() __pragma(omp barrier)
    #else
    #define bn_wait_for_all() _Pragma("omp barrier")
    #endif
    #endif
    """
    int thread_number "bn_thread_number"() noexcept nogil
    int team_size "bn_team_size"() noexcept nogil
    # All threads of our region arrive before any goes on; each must call it equally often.
    # (A prange in a region has no barrier at its end.)
    void wait_for_all "bn_wait_for_all"() noexcept nogil


cdef struct Member:  # one thread of the team, which may be smaller than was asked for
    Py_ssize_t number, team


cdef inline Member member() noexcept nogil:
    """The thread that asks, within a parallel region of ours."""
    cdef Member m
    m.number, m.team = thread_number(), team_size()
    return m


cdef inline Py_ssize_t first_of(Member m, Py_ssize_t count) noexcept nogil:
    """Where a thread's share of so many begins: it ends where the next thread's begins."""
    return count * m.number // m.team


cdef inline Py_ssize_t stop_of(Member m, Py_ssize_t count) noexcept nogil:
    return count * (m.number + 1) // m.team


# The first pass

cdef void sample_slices_of(
    Member m, double[:, ::1] statistics, const floating[:, :, ::1] x, const Call *c,
) noexcept nogil:
    cdef Py_ssize_t i
    cdef Block b
    for i in range(first_of(m, c.slices), stop_of(m, c.slices)):
        b = slice_of(c, i)
        sample_shift(of_features(statistics, &b), x, &c.sums, &b)


cdef void sum_block_in_cell(
    double[:, :, ::1] partials, Py_ssize_t level, double[:, ::1] statistics,
    const floating[:, :, ::1] x, const floating[:, :, ::1] dout,
    const Call *c, Py_ssize_t cell, Py_ssize_t i,
) noexcept nogil:
    """Not inline: `sum_branch` calls itself, and this scratch would be in each of its frames."""
    cdef floating scratch[GATED_CENTRES * SCRATCH]
    cdef double storage[CENTRES * WIDTH]
    cdef Block b = block_of(&c.sums, c, i)
    cdef double[:, ::1] s = of_features(statistics, &b)
    cdef double[:, ::1] centres = rows_of(storage, CENTRES, b.size, WIDTH)
    cdef floating[:, ::1] columns = rows_of(
        <floating *>aligned(scratch), GATED_CENTRES, b.width, b.pitch)
    if c.summed == FORWARDS:
        spread_shift(columns, s, &c.sums, &b)
    else:
        find_centres(centres, s, floating is float)
        spread_centres(c.summed, columns, centres, s, <floating>0, &c.sums, &b)
    sum_cell_of(
        c.summed, of_level(partials, level, &b), x, dout, columns, &c.sums, &b, cell)


cdef void sum_branch(
    double[:, :, ::1] partials, Py_ssize_t level, double[:, ::1] statistics,
    const floating[:, :, ::1] x, const floating[:, :, ::1] dout,
    const Call *c, Py_ssize_t cell, Py_ssize_t cells,
) noexcept nogil:
    """Like `partial_sums`, but all blocks of a cell before the next, to read whole rows."""
    cdef Py_ssize_t i, half = cells // 2
    cdef Block whole
    if cells == 1:
        for i in range(c.blocks):
            sum_block_in_cell(partials, level, statistics, x, dout, c, cell, i)
    else:
        sum_branch(partials, level, statistics, x, dout, c, cell, half)
        sum_branch(partials, level + 1, statistics, x, dout, c, cell + half, half)
        whole = block_at(&c.sums, 0, c.sums.features)
        add_sums(of_level(partials, level, &whole), of_level(partials, level + 1, &whole))


cdef void sum_branches_of(
    Member m, double[:, :, ::1] partials, double[:, ::1] statistics,
    const floating[:, :, ::1] x, const floating[:, :, ::1] dout, const Call *c,
) noexcept nogil:
    cdef Py_ssize_t i, cells = c.sums.cells // c.branches
    for i in range(first_of(m, c.branches), stop_of(m, c.branches)):
        sum_branch(partials, i * c.levels, statistics, x, dout, c, i * cells, cells)


# From the sums of branches to those of all rows, a slice of the features at a time

cdef void merge_branches(
    double[:, ::1] total, double[:, :, ::1] partials, const Call *c, const Block *b,
) noexcept nogil:
    """The rest of the tree, from the branches down to the root."""
    cdef Py_ssize_t i, first, step = c.levels
    cdef double[:, ::1] root = of_level(partials, 0, b)
    while step < c.branches * c.levels:
        for i in range(c.branches * c.levels // (2 * step)):
            first = 2 * i * step
            add_sums(of_level(partials, first, b), of_level(partials, first + step, b))
        step *= 2
    memcpy(&total[FIRST, 0], &root[FIRST, 0], b.size * sizeof(double))
    memcpy(&total[SECOND, 0], &root[SECOND, 0], b.size * sizeof(double))


cdef void finish_forward_slice(
    double[:, ::1] statistics, const floating[:, :, ::1] x, const floating[::1] gamma,
    const floating[::1] beta, double eps, double[:, :, ::1] partials, const Call *c, Py_ssize_t i,
) noexcept nogil:
    cdef double storage[SUMS * WIDTH]
    cdef Block b = slice_of(c, i)
    cdef double[:, ::1] sums = rows_of(storage, SUMS, b.size, WIDTH)
    cdef double[:, ::1] s = of_features(statistics, &b)
    if c.measure:
        merge_branches(sums, partials, c, &b)
        # A rescue sums in `partials`: what these had of this slice has been merged.
        finish_moments(s, sums, x, &c.sums, &b, partials)
        judge_batch(s, c)
    find_invstd(s, gamma, beta, eps, &b)


cdef void finish_forward_slices_of(
    Member m, double[:, ::1] statistics, const floating[:, :, ::1] x,
    const floating[::1] gamma, const floating[::1] beta, double eps, double[:, :, ::1] partials,
    const Call *c,
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(first_of(m, c.slices), stop_of(m, c.slices)):
        finish_forward_slice(statistics, x, gamma, beta, eps, partials, c, i)


cdef void update_slices_of(
    Member m, double[:, ::1] statistics, const Call *c,
) noexcept nogil:
    """A share of the running statistics."""
    cdef Py_ssize_t i
    cdef Block b
    for i in range(first_of(m, c.slices), stop_of(m, c.slices)):
        b = slice_of(c, i)
        update_running(statistics, c, &b)


cdef void update_blocks_of(
    Member m, double[:, ::1] statistics, const Call *c,
) noexcept nogil:
    """The same where threads have taken blocks."""
    cdef Py_ssize_t i
    for i in range(first_of(m, c.blocks), stop_of(m, c.blocks)):
        update_block(statistics, c, i)


cdef void finish_backward_slice(
    floating[::1] dgamma, floating[::1] dbeta, double[:, ::1] sums, double[:, ::1] statistics,
    const floating[:, :, ::1] dout, const floating[:, :, ::1] x,
    double[:, :, ::1] partials, const Call *c, Py_ssize_t i,
) noexcept nogil:
    cdef double storage[CENTRES * WIDTH]
    cdef Block b = slice_of(c, i)
    cdef double[:, ::1] total = of_features(sums, &b)
    cdef double[:, ::1] s = of_features(statistics, &b)
    cdef double[:, ::1] centres = rows_of(storage, CENTRES, b.size, WIDTH)
    merge_branches(total, partials, c, &b)
    find_centres(centres, s, floating is float)
    finish_gradients(c.summed, total, dgamma, dbeta, centres, s, dout, x, &c.sums, &b, partials)


cdef void finish_backward_slices_of(
    Member m, floating[::1] dgamma, floating[::1] dbeta, double[:, ::1] sums,
    double[:, ::1] statistics, const floating[:, :, ::1] dout, const floating[:, :, ::1] x,
    double[:, :, ::1] partials, const Call *c,
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(first_of(m, c.slices), stop_of(m, c.slices)):
        finish_backward_slice(dgamma, dbeta, sums, statistics, dout, x, partials, c, i)


# The second pass

cdef void write_cells_of(
    Member m, floating[:, :, ::1] out,
    const floating[:, :, ::1] x, const floating[:, :, ::1] dout,
    double[:, ::1] statistics, double[:, ::1] sums, double count, const Call *c,
) noexcept nogil:
    """About the rows that the thread has summed. Within the cache all of a block and then the next
    block, past it cell by cell, as memory is read best in whole rows."""
    cdef Py_ssize_t first = first_of(m, c.writes.cells), stop = stop_of(m, c.writes.cells)
    cdef Py_ssize_t i, begin
    while stop > first:
        begin = stop - 1 if c.blocks > 1 and c.far else first
        for i in range(c.blocks):
            write_block(out, x, dout, statistics, sums, count, c, i, begin, stop)
        stop = begin
