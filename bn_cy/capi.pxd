# Batch normalization for Cython code, without the GIL. docs/capi.md has the whole contract, and an
# example.
#
#     from bn_cy cimport capi
#
# Each function is there for float and for double, of which the type of x decides. A batch fills one
# stretch of memory that is (outer, features, inner) in C order. Results come first, then what the
# function of this name in Python takes, in its order, and the same bits come out. gamma and beta
# may be NULL: absent. `threads` is the most that a call uses, 1 or more. Nothing is checked of what
# pointers point to. A change here is one of bn_cy.h, which declares the same functions for C.

from cython cimport floating

cdef enum:  # what is returned
    OK = 0
    NO_MEMORY = -1  # of 64 bytes a feature and a little more; results may be written in part
    # A size below 0, threads below 1, an eps that is negative or not finite, or a count that is not
    # positive, unless the batch is empty; nothing is written.
    INVALID = -2

cdef enum:  # rows of `features` doubles that a forward leaves for its backward
    MEAN = 0
    VAR = 2         # biased
    STATISTICS = 6  # how many rows; what the others hold may change

cdef int moments(
    double *mean, double *var, const floating *x,
    Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, int threads) noexcept nogil

# y may be x.
cdef int normalize(
    floating *y, const floating *x, const double *mean, const double *var,
    const floating *gamma, const floating *beta, double eps,
    Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, int threads) noexcept nogil

cdef int gradient_sums(
    double *sum_dout, double *sum_dout_xhat, const floating *dout, const floating *x,
    const double *mean, const double *var, double eps,
    Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, int threads) noexcept nogil

# dx may be dout. An infinite count is that of frozen statistics: the sums have no say.
cdef int input_gradient(
    floating *dx, const floating *dout, const floating *x,
    const double *mean, const double *var, const floating *gamma, double eps,
    const double *sum_dout, const double *sum_dout_xhat, double count,
    Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, int threads) noexcept nogil

# Moments and normalize in one call, which reads memory once where the cache allows. In double it
# has a few digits more: its statistics hold what a double mean leaves over. y may be x where there
# is no backward.
cdef int forward(
    floating *y, double *statistics, const floating *x,
    const floating *gamma, const floating *beta, double eps,
    Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, int threads) noexcept nogil

# The gradients of that forward. dx may be dout; dgamma and dbeta may be NULL.
cdef int backward(
    floating *dx, floating *dgamma, floating *dbeta, const floating *dout, const floating *x,
    const double *statistics,
    Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, int threads) noexcept nogil
