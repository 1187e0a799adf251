# Batch normalization, forward and backward, for float and double from one source. This file opens
# the house of the kernels: it lists the rooms, and then come the two directions and the threads.
# Each of `v2.pyx`, `v3.pyx`, ... includes it and is compiled for one instruction set.
#
# The order of every floating-point sum is a function of the shape alone, never of the number of
# threads, the width of a block, the alignment or the instruction set: the bits are the same
# everywhere.

from cpython.pycapsule cimport PyCapsule_New
from cython cimport floating
from cython.parallel cimport parallel, prange
from libc.math cimport isinf
from libc.stdlib cimport free, malloc

from bn_cy.kernels cimport (
    KERNELS_NAME, STATISTICS, Activation, Backward, Forward, Kernels, Resources, Running, Shape,
)

# The rooms, each of which uses only those above it.
include "machine.pxi"    # C: views, stores past the cache, fetches, aligned scratch
include "plan.pxi"       # how a shape is walked: Grid, Block, Piece
include "columns.pxi"    # from features to columns and back
include "signs.pxi"      # the signs of y, a bit each, and dout behind them
include "terms.pxi"      # what the first passes add up: sum(u) and sum(u*v)
include "sums.pxi"       # their sums of columns
include "runs.pxi"       # and of runs
include "cells.pxi"      # and of cells, in a tree
include "writes.pxi"     # the second passes: y, dx
include "moments.pxi"    # mean and variance; what y needs
include "gradients.pxi"  # dgamma and dbeta; what dx needs
include "schedule.pxi"   # a call: its plan, its blocks, the running statistics
include "threads.pxi"    # the steps of a call whose threads share rows

# -------------------------------------------------------------------------------------------------
# Forward: moments, then y

cdef int forward(
    floating[:, :, ::1] y, double[:, ::1] statistics,
    const floating[:, :, ::1] x, const floating[:, :, ::1] residual,
    const floating[::1] gamma, const floating[::1] beta, double eps,
    double[:, :, ::1] partials, const Call *c,
) noexcept nogil:
    """y = gamma*(x - mean)*invstd + beta; a residual is added, and a ReLU follows, if the call has
    them."""
    cdef Py_ssize_t i
    if c.by_cells:  # a region even for one thread: its waits must not bind to a caller's region
        with parallel(num_threads=c.threads):
            forward_by_cells(y, statistics, x, residual, gamma, beta, eps, partials, c, member())
    elif c.threads == 1:  # no parallel region: one of a single thread would do, but it costs
        for i in range(c.blocks):
            forward_block(y, statistics, x, residual, gamma, beta, eps, partials, c, i)
        if c.running != NULL:
            for i in range(c.blocks):
                update_block(statistics, c, i)
    else:
        with parallel(num_threads=c.threads):
            for i in prange(c.blocks, schedule="static"):
                forward_block(y, statistics, x, residual, gamma, beta, eps, partials, c, i)
            if c.running != NULL:
                wait_for_all()
                update_blocks_of(member(), statistics, c)
    return 0


cdef void forward_by_cells(
    floating[:, :, ::1] y, double[:, ::1] statistics,
    const floating[:, :, ::1] x, const floating[:, :, ::1] residual,
    const floating[::1] gamma, const floating[::1] beta, double eps,
    double[:, :, ::1] partials, const Call *c, Member m,
) noexcept nogil:
    """One thread's share of the steps. No prange: all would wait at its beginning, too."""
    if c.measure:
        sample_slices_of(m, statistics, x, c)
        wait_for_all()
        sum_branches_of(m, partials, statistics, x, x, c)
        wait_for_all()
    finish_forward_slices_of(m, statistics, x, gamma, beta, eps, partials, c)
    wait_for_all()
    if c.running != NULL:
        update_slices_of(m, statistics, c)
    if c.write:
        write_cells_of(m, y, x, residual, statistics, statistics, 0, c)


cdef void forward_block(
    floating[:, :, ::1] y, double[:, ::1] statistics,
    const floating[:, :, ::1] x, const floating[:, :, ::1] residual,
    const floating[::1] gamma, const floating[::1] beta, double eps,
    double[:, :, ::1] partials, const Call *c, Py_ssize_t i,
) noexcept nogil:
    cdef Block b = block_of(&c.sums, c, i)
    cdef double[:, ::1] s = of_features(statistics, &b)
    if c.measure:
        moments_of_block(s, x, &c.sums, &b, partials)
        judge_batch(s, c)
    find_invstd(s, gamma, beta, eps, &b)
    if c.write:
        write_block(y, x, residual, statistics, statistics, 0, c, i, 0, c.writes.cells)


# -------------------------------------------------------------------------------------------------
# Backward: the sums of the gradient, then dx

cdef int backward(
    floating[:, :, ::1] dx, floating[::1] dgamma, floating[::1] dbeta,
    double[:, ::1] sums, double[:, ::1] statistics,
    const floating[:, :, ::1] dout, const floating[:, :, ::1] x, double count,
    double[:, :, ::1] partials, const Call *c,
) noexcept nogil:
    """dx = gamma*invstd*(dout - dbeta/n - xhat*dgamma/n). Within the cache the sums leave what a
    ReLU lets through in the gradient of the residual, and dx is computed of that."""
    cdef const floating[:, :, ::1] let_through = (
        dout if c.sums.signs.let_through == NULL
        else array_like(<floating *>c.sums.signs.let_through, dout))
    cdef Py_ssize_t i
    if c.by_cells:
        with parallel(num_threads=c.threads):
            backward_by_cells(
                dx, dgamma, dbeta, sums, statistics, dout, let_through, x, count, partials, c,
                member())
    elif c.threads == 1:
        for i in range(c.blocks):
            backward_block(
                dx, dgamma, dbeta, sums, statistics, dout, let_through, x, count, partials, c, i)
    else:
        for i in prange(c.blocks, num_threads=c.threads, schedule="static"):
            backward_block(
                dx, dgamma, dbeta, sums, statistics, dout, let_through, x, count, partials, c, i)
    return 0


cdef void backward_by_cells(
    floating[:, :, ::1] dx, floating[::1] dgamma, floating[::1] dbeta,
    double[:, ::1] sums, double[:, ::1] statistics,
    const floating[:, :, ::1] dout, const floating[:, :, ::1] let_through,
    const floating[:, :, ::1] x, double count, double[:, :, ::1] partials, const Call *c, Member m,
) noexcept nogil:
    if c.measure:
        sum_branches_of(m, partials, statistics, x, dout, c)
        wait_for_all()
        finish_backward_slices_of(m, dgamma, dbeta, sums, statistics, dout, x, partials, c)
        wait_for_all()
    if c.write:
        write_cells_of(m, dx, x, let_through, statistics, sums, count, c)


cdef void backward_block(
    floating[:, :, ::1] dx, floating[::1] dgamma, floating[::1] dbeta,
    double[:, ::1] sums, double[:, ::1] statistics,
    const floating[:, :, ::1] dout, const floating[:, :, ::1] let_through,
    const floating[:, :, ::1] x, double count, double[:, :, ::1] partials, const Call *c,
    Py_ssize_t i,
) noexcept nogil:
    cdef Block b = block_of(&c.sums, c, i)
    if c.measure:
        gradients_of_block(
            c.summed, of_features(sums, &b), dgamma, dbeta, of_features(statistics, &b), dout, x,
            &c.sums, &b, partials)
    if c.write:
        write_block(dx, x, let_through, statistics, sums, count, c, i, 0, c.writes.cells)


# -------------------------------------------------------------------------------------------------
# What the package calls: pointers become views here, and float or double has one signature

cdef inline bint is_empty(const Shape *shape) noexcept nogil:
    return shape.outer == 0 or shape.features == 0 or shape.inner == 0


cdef inline int written_forward(const Activation *then) noexcept nogil:
    if then.residual != NULL:
        return <int>JOINED if then.relu else <int>ADDED
    return <int>RECTIFIED if then.relu else <int>FORWARDS


cdef inline int summed_backward(const Activation *then) noexcept nogil:
    if then.signs != NULL:
        return <int>SIGNED
    return <int>GATED if then.relu else <int>BACKWARDS


cdef inline int written_backward(const Activation *then, bint frozen) noexcept nogil:
    if then.residual != NULL:
        return <int>HANDED if frozen else <int>SIGNED
    if then.relu:
        return <int>PASSED if frozen else <int>GATED
    return <int>FORWARDS if frozen else <int>BACKWARDS


cdef int take_partials(double **memory, Shape *shape, const Call *c) noexcept nogil:
    """Memory for the partial sums, and its shape. From the heap: a thread may have little stack."""
    shape.outer, shape.features, shape.inner = c.branches * c.levels, SUMS, c.sums.features
    memory[0] = NULL
    if not c.measure or c.sums.cells == 1:
        return 0
    memory[0] = <double *>malloc(shape.outer * SUMS * shape.inner * sizeof(double))
    return 0 if memory[0] != NULL else -1


cdef int enter_forward(
    floating *y, double *statistics, const floating *x, const floating *gamma, const floating *beta,
    const Shape *shape, double eps, bint measure, Running *running, const Activation *then,
    const Resources *use,
) noexcept nogil:
    cdef Call c
    cdef double *partials
    cdef Shape of_partials
    cdef const floating *residual = <const floating *>then.residual
    cdef int unwelcome = 0
    if is_empty(shape):
        return 0
    c = plan_call(
        shape, sizeof(floating), measure, y != NULL, y == x or y == residual,
        FORWARDS, written_forward(then), then.signs, use)
    if take_partials(&partials, &of_partials, &c):
        return -1
    c.running, c.unwelcome = running if measure else NULL, &unwelcome
    forward(
        array_of(y, shape), rows_of(statistics, STATISTICS, shape.features, shape.features),
        array_of(x, shape), array_of(x if residual == NULL else residual, shape),
        parameter_of(gamma, shape), parameter_of(beta, shape), eps,
        array_of(partials, &of_partials), &c)
    free(partials)
    clear_vectors()
    if running != NULL:
        running.updated = not unwelcome
    return 0


cdef int enter_backward(
    floating *dx, floating *dgamma, floating *dbeta, double *sums, double *statistics,
    const floating *dout, const floating *x, const Shape *shape, double count, bint measure,
    const Activation *then, const Resources *use,
) noexcept nogil:
    cdef Call c
    cdef double *partials
    cdef Shape of_partials
    if is_empty(shape):
        return 0
    c = plan_call(
        shape, sizeof(floating), measure, dx != NULL, dx == dout,
        summed_backward(then), written_backward(then, isinf(count)),
        then.signs, use)
    c.writes.signs.let_through = then.residual
    if then.residual != NULL and measure and c.summed == SIGNED and c.writing != STREAMING:
        c.sums.signs.let_through = then.residual  # once, as writing it costs little in the cache
        c.written, c.writing = <int>FORWARDS if isinf(count) else <int>BACKWARDS, DIRECT
    if take_partials(&partials, &of_partials, &c):
        return -1
    backward(
        array_of(dx, shape), parameter_of(dgamma, shape), parameter_of(dbeta, shape),
        rows_of(sums, SUMS, shape.features, shape.features),
        rows_of(statistics, STATISTICS, shape.features, shape.features),
        array_of(dout, shape), array_of(x, shape), count, array_of(partials, &of_partials), &c)
    free(partials)
    clear_vectors()
    return 0


cdef Kernels[2] TABLE
TABLE[0].forward = <Forward>enter_forward[float]
TABLE[0].backward = <Backward>enter_backward[float]
TABLE[1].forward = <Forward>enter_forward[double]
TABLE[1].backward = <Backward>enter_backward[double]

KERNELS = PyCapsule_New(TABLE, KERNELS_NAME, NULL)
FLAGS = C_FLAGS.decode()  # what the compiler was told for this variant
