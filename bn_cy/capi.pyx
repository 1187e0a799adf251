"""Batch normalization for Cython and C code, without the GIL.

`capi.pxd` declares the functions for Cython and `bn_cy.h` for C; docs/capi.md has the contract.
They call the kernels as the functions of Python do, and no array of Python is in between.
"""

import os

from bn_cy._dispatch import KERNELS

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from cython cimport floating
from libc.math cimport INFINITY
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from bn_cy cimport kernels as table
from bn_cy._resources cimport resources_for

__all__ = ["get_include"]

cdef extern from "bn_cy.h":
    const char *CAPSULE "BN_CY_CAPSULE"
    ctypedef struct Functions "bn_cy_functions":
        pass

cdef table.Kernels *kernels = <table.Kernels *>PyCapsule_GetPointer(KERNELS, table.KERNELS_NAME)


cdef struct Call:
    table.Shape shape
    int threads
    double *statistics  # as the kernels name its rows
    double *sums        # the two rows after these


def get_include():
    """Return the folder of `bn_cy.h`, for the include path of a C compiler.

    Examples
    --------
    >>> import os
    >>> from bn_cy import capi
    >>> os.listdir(capi.get_include()).count("bn_cy.h")
    1
    """
    return os.path.dirname(__file__)


# A call: its numbers checked, its scratch taken, the kernels run


cdef int describe(
    Call *c, Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, double eps, int threads,
) noexcept nogil:
    if outer < 0 or features < 0 or inner < 0 or threads < 1 or not 0 <= eps < INFINITY:
        return INVALID
    c.shape.outer, c.shape.features, c.shape.inner = outer, features, inner
    table.join_runs(&c.shape)
    c.threads = threads
    return OK


cdef int begin(
    Call *c, Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, double eps, int threads,
) noexcept nogil:
    """Check numbers and take scratch, all zeros: the results of an empty batch."""
    if describe(c, outer, features, inner, eps, threads) != OK:
        return INVALID
    c.statistics = <double *>calloc((STATISTICS + 2) * features + 1, sizeof(double))
    if c.statistics == NULL:
        return NO_MEMORY
    c.sums = c.statistics + STATISTICS * features
    return OK


cdef void take_row(double *to, const double *row, const Call *c) noexcept nogil:
    memcpy(to, row, c.shape.features * sizeof(double))


cdef void take_moments(Call *c, const double *mean, const double *var) noexcept nogil:
    take_row(c.statistics + table.MEAN * c.shape.features, mean, c)
    take_row(c.statistics + table.VAR * c.shape.features, var, c)


cdef int run_forward(
    const Call *c, floating *y, double *statistics, const floating *x, const floating *gamma,
    const floating *beta, double eps, bint measure,
) noexcept nogil:
    cdef table.Activation then
    cdef table.Resources use = resources_for(&c.shape, sizeof(floating), 2, c.threads)
    then.relu, then.residual, then.signs = False, NULL, NULL
    return kernels[1 if floating is double else 0].forward(
        y, statistics, x, gamma, beta, &c.shape, eps, measure, NULL, &then, &use)


cdef int run_backward(
    const Call *c, floating *dx, floating *dgamma, floating *dbeta, double *statistics,
    const floating *dout, const floating *x, double count, bint measure,
) noexcept nogil:
    cdef table.Activation then
    cdef int arrays = 4 if measure and dx != NULL else 3
    cdef table.Resources use = resources_for(&c.shape, sizeof(floating), arrays, c.threads)
    then.relu, then.residual, then.signs = False, NULL, NULL
    return kernels[1 if floating is double else 0].backward(
        dx, dgamma, dbeta, c.sums, statistics, dout, x, &c.shape, count, measure, &then, &use)


# The four verbs


cdef int moments(
    double *mean, double *var, const floating *x,
    Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, int threads,
) noexcept nogil:
    cdef Call c
    cdef int status = begin(&c, outer, features, inner, 1, threads)  # eps has no say
    if status != OK:
        return status
    status = run_forward(&c, <floating *>NULL, c.statistics, x, <floating *>NULL, <floating *>NULL,
                         1, True)
    take_row(mean, c.statistics + table.MEAN * features, &c)
    take_row(var, c.statistics + table.VAR * features, &c)
    free(c.statistics)
    return status


cdef int normalize(
    floating *y, const floating *x, const double *mean, const double *var,
    const floating *gamma, const floating *beta, double eps,
    Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, int threads,
) noexcept nogil:
    cdef Call c
    cdef int status = begin(&c, outer, features, inner, eps, threads)
    if status != OK:
        return status
    take_moments(&c, mean, var)
    status = run_forward(&c, y, c.statistics, x, gamma, beta, eps, False)
    free(c.statistics)
    return status


cdef int gradient_sums(
    double *sum_dout, double *sum_dout_xhat, const floating *dout, const floating *x,
    const double *mean, const double *var, double eps,
    Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, int threads,
) noexcept nogil:
    cdef Call c
    cdef int status = begin(&c, outer, features, inner, eps, threads)
    cdef floating *none = NULL
    if status != OK:
        return status
    take_moments(&c, mean, var)
    status = run_forward(&c, none, c.statistics, x, none, none, eps, False)  # invstd and the like
    if status == OK:
        status = run_backward(&c, none, none, none, c.statistics, dout, x, INFINITY, True)
    take_row(sum_dout, c.sums, &c)
    take_row(sum_dout_xhat, c.sums + features, &c)
    free(c.statistics)
    return status


cdef int input_gradient(
    floating *dx, const floating *dout, const floating *x,
    const double *mean, const double *var, const floating *gamma, double eps,
    const double *sum_dout, const double *sum_dout_xhat, double count,
    Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, int threads,
) noexcept nogil:
    cdef Call c
    cdef bint counted = count > 0 or outer * features * inner == 0
    cdef int status = begin(&c, outer, features, inner, eps if counted else -1, threads)
    cdef floating *none = NULL
    if status != OK:
        return status
    take_moments(&c, mean, var)
    take_row(c.sums, sum_dout, &c)
    take_row(c.sums + features, sum_dout_xhat, &c)
    status = run_forward(&c, none, c.statistics, x, gamma, none, eps, False)
    if status == OK:
        status = run_backward(&c, dx, none, none, c.statistics, dout, x, count, False)
    free(c.statistics)
    return status


# A training step


cdef int forward(
    floating *y, double *statistics, const floating *x,
    const floating *gamma, const floating *beta, double eps,
    Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, int threads,
) noexcept nogil:
    cdef Call c
    if describe(&c, outer, features, inner, eps, threads) != OK:
        return INVALID
    memset(statistics, 0, STATISTICS * features * sizeof(double))
    return run_forward(&c, y, statistics, x, gamma, beta, eps, True)


cdef int backward(
    floating *dx, floating *dgamma, floating *dbeta, const floating *dout, const floating *x,
    const double *statistics,
    Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, int threads,
) noexcept nogil:
    cdef Call c
    cdef int status = begin(&c, outer, features, inner, 1, threads)
    if status != OK:
        return status
    if dgamma != NULL:
        memset(dgamma, 0, features * sizeof(floating))
    if dbeta != NULL:
        memset(dbeta, 0, features * sizeof(floating))
    status = run_backward(
        &c, dx, dgamma, dbeta, <double *>statistics, dout, x, <double>outer * inner, True)
    free(c.statistics)
    return status


# For C: the functions in the order of bn_cy.h, in a capsule whose name has the number of the ABI

cdef void *TABLE[12]
TABLE[:] = [
    <void *>moments[float], <void *>normalize[float], <void *>gradient_sums[float],
    <void *>input_gradient[float], <void *>forward[float], <void *>backward[float],
    <void *>moments[double], <void *>normalize[double], <void *>gradient_sums[double],
    <void *>input_gradient[double], <void *>forward[double], <void *>backward[double],
]
assert sizeof(TABLE) == sizeof(Functions), "bn_cy.h declares other functions than these"

globals()[CAPSULE.decode().rpartition(".")[2]] = PyCapsule_New(TABLE, CAPSULE, NULL)
