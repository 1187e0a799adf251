# The compiled loops as a table of C functions, the same for every instruction-set variant.
#
# A batch fills one stretch of memory that is (outer, features, inner) in C order; arrays are
# aligned to their type. `statistics` holds rows of `features` doubles, in the order of the enum;
# forward leaves it for backward. Every function may be called without the GIL and returns 0, or -1
# where there was no memory. Of an empty batch it does nothing.

cdef extern from *:
    """
    /* The name of the capsule. A change below raises its number, so that a module that was not
       compiled again is refused; tests/test_capi.py holds the two together. */
    #define BN_CY_KERNELS "bn_cy.kernels/3"
    """
    const char *KERNELS_NAME "BN_CY_KERNELS"


cdef enum:
    MEAN        # before the mean is known: the shift
    REST        # what a double mean leaves over: the mean is MEAN + REST
    VAR
    INVSTD
    GAMMA
    INTERCEPT   # y where x is MEAN in the data's type: beta, and what that leaves of the mean
    STATISTICS  # how many rows


cdef struct Shape:
    Py_ssize_t outer, features, inner


cdef inline void join_runs(Shape *shape) noexcept nogil:
    """Of a single feature all values are one run: no values of others lie between."""
    if shape.features == 1:
        shape.inner *= shape.outer
        shape.outer = 1


cdef inline Py_ssize_t signs_room(const Shape *shape) noexcept nogil:
    """Bytes for the signs: their rows, which are images or rows of the array, begin with a byte.
    A few more are read at the end."""
    cdef Py_ssize_t images = shape.features if shape.inner >= 16 else 1
    return shape.outer * (shape.features * shape.inner // 8 + images) + 4


# Averages over batches, a double a feature each: running += weight*(batch - running).
cdef struct Running:
    double *mean
    double *var        # of which the batch has correction*var: n/(n - 1), or 1
    double weight      # 1 gives the batch's own to the last digit, 0 leaves the running ones
    double correction
    bint nonfinite     # whether a batch counts whose variance is not finite
    bint updated       # the answer: all features are, or none


cdef struct Resources:  # what a call may use; has no say in the bits of any result
    int threads       # at least 1
    Py_ssize_t cache  # bytes that a thread finds again in a second pass
    bint far          # the arrays do not stay in any cache: results are written past it


# What follows the normalization, in the same pass: y = max(gamma*xhat + beta + residual, 0).
cdef struct Activation:
    bint relu             # dout counts where y > 0
    void *residual        # added; in a backward an array for its gradient; NULL: there is none
    # Of a residual with a ReLU: a bit a value, whether y > 0, in as many bytes as `signs_room`
    # says. NULL, if there is not both, or no backward.
    unsigned char *signs


# With `measure`, finds the moments of x, and updates the running ones unless these are NULL;
# without, MEAN, REST and VAR are given. Then fills the other rows of statistics, and y unless it is
# NULL. y may be x, or the residual. gamma and beta may be NULL, `then` and `use` may not.
ctypedef int (*Forward)(
    void *y, double *statistics, const void *x, const void *gamma, const void *beta,
    const Shape *shape, double eps, bint measure, Running *running,
    const Activation *then, const Resources *use) noexcept nogil

# With `measure`, finds the sums of dout, and of dout*xhat in a second row, and dgamma and dbeta
# unless they are NULL; without, sums are given. Unless dx is NULL, fills it, and the gradient of a
# residual, which then must be there. dx may be dout. Frozen statistics do not depend on x: they are
# those of infinitely many values, count = inf.
ctypedef int (*Backward)(
    void *dx, void *dgamma, void *dbeta, double *sums, double *statistics,
    const void *dout, const void *x,
    const Shape *shape, double count, bint measure,
    const Activation *then, const Resources *use) noexcept nogil


cdef struct Kernels:  # one for float, one for double
    Forward forward
    Backward backward
