"""A call of the kernels: what it leaves for a backward, what it is given, and the call itself.

`functional` documents the functions; here are their checks that look at more than one argument,
the allocation of results, and the way into the table of loops.
"""

import numpy as np

from bn_cy._dispatch import KERNELS
from bn_cy._threads import get_num_threads

from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport INFINITY
from libc.stdint cimport INT64_MAX, int64_t
from libc.string cimport memcpy, memset

from bn_cy._arguments import as_flag, as_output
from bn_cy._buffers import POOL

from bn_cy._buffers cimport new_block
from bn_cy._resources cimport is_short, resources_for
from bn_cy.kernels cimport (
    KERNELS_NAME, MEAN, REST, STATISTICS, VAR, Activation, Kernels, Resources, signs_room,
)
from bn_cy._layout cimport (
    Memory, as_array, as_number, batch_of, hold, is_same, refuse_overlap, refuse_parameters,
    release,
)

cdef Kernels *kernels = <Kernels *>PyCapsule_GetPointer(KERNELS, KERNELS_NAME)
cdef object ndarray = np.ndarray
cdef object new_array = np.empty


cdef class Cache:
    """What a forward leaves for its backward: x by reference, and O(features) numbers; after a
    residual and a ReLU also the signs of y, a bit each.

    Where x had to be copied, it is the copy that is kept. It comes from a forward alone.

    Attributes
    ----------
    count : int or float
        Values per feature that each statistic was made of; infinite for frozen ones.
    mean, var : float64 array of shape (num_features,)
        Copies of the means and of the biased variances that normalized x; zeros of an empty batch.
    num_features : int
        Length of the feature axis.
    scaled, shifted : bool
        Whether the forward had a `gamma`, and a `beta`.
    empty : bool
        Whether the batch had no values.

    Raises
    ------
    TypeError
        If it is pickled.

    Examples
    --------
    >>> import numpy as np
    >>> import bn_cy
    >>> _, cache = bn_cy.batchnorm_forward(np.array([[1.0], [5.0]]))
    >>> cache.count, cache.mean, cache.var
    (2, array([3.]), array([4.]))
    """

    def __cinit__(self, Batch batch not None):
        self.batch = batch
        self.memory = rows_of(batch, STATISTICS)
        self.statistics = <double *>self.memory.start
        if batch.size == 0:
            memset(self.statistics, 0, STATISTICS * batch.shape.features * sizeof(double))

    cdef Activation activation(self, void *residual) noexcept:
        """What follows the normalization; the backward gets the memory of dresidual."""
        cdef Activation then
        then.relu, then.residual = self.relu, residual
        then.signs = NULL if self.signs is None else <unsigned char *>self.signs.start
        return then

    cdef double *row(self, int name) noexcept:
        return self.statistics + name * self.batch.shape.features

    cdef object row_array(self, int name):
        """A row as an array."""
        cdef Py_ssize_t features = self.batch.shape.features
        cdef Memory memory
        array = new_array(features)
        memory.held = 0
        memcpy(hold(&memory, "row", array).buf, self.row(name), features * sizeof(double))
        release(&memory)
        return array

    @property
    def mean(self):
        """A copy of the means, float64."""
        return self.row_array(MEAN)

    @property
    def var(self):
        """A copy of the biased variances, float64."""
        return self.row_array(VAR)

    @property
    def count(self):
        """Values that each statistic was made of: infinite for frozen ones."""
        return self.values if self.values == INFINITY else int(self.values)

    def __reduce__(self):
        raise TypeError("a Cache does not pickle: it refers to the batch that the backward needs")

    @property
    def num_features(self):
        """How many features the batch has."""
        return self.batch.shape.features

    @property
    def empty(self):
        """Whether the batch had no values: then it has no statistics."""
        return self.batch.size == 0


cdef Cache measured_cache(x, axis):
    """Of statistics that are the batch's own, and still to be measured."""
    cdef Cache cache = Cache(batch_of(x, axis))
    cdef Batch batch = cache.batch
    if batch.count == 1 and batch.size:
        raise ValueError(
            f"x must have two values per feature or more to have a variance, got one: "
            f"shape {batch.array.shape}, axis {axis} (one can be normalized by given statistics, "
            f"such as a layer's running ones in eval mode)"
        )
    cache.values = batch.count
    return cache


cdef Cache frozen_cache(x, mean, var, axis):
    """Of statistics from outside."""
    cdef Cache cache = Cache(batch_of(x, axis))
    cache.values = INFINITY
    memset(cache.row(REST), 0, cache.batch.shape.features * sizeof(double))
    cache.batch.row(cache.row(MEAN), "mean", mean)
    cache.batch.row(cache.row(VAR), "var", var)
    refuse_negative("var", cache.row(VAR), cache.batch.shape.features)
    return cache


cdef int describe(Cache cache, gamma, beta, eps, relu) except -1:
    """Fill the rows that a forward would have filled: it is one without an output."""
    cdef double added = checked_eps(eps)
    cdef bint rectified = checked_relu(relu)
    cdef Memory memory
    memory.held = 0
    try:
        launch_forward(
            cache, NULL, cache.batch.parameter(&memory, "gamma", gamma),
            cache.batch.parameter(&memory, "beta", beta), NULL, added, False, NULL)
    finally:
        release(&memory)
    cache.relu = rectified
    return 0


# Running the kernels


def training_forward(
    x, running_mean, running_var, tracked, momentum, bint unbiased, bint nonfinite, gamma, beta,
    eps, axis, out, relu, residual
):
    """`batchnorm_forward` that also updates running statistics and counts the batch in `tracked`,
    unless it is empty or, if `nonfinite` is false, has a variance that is not finite. Returns
    whether it did, too, in a list, which is made before: no memory is wanted after the update.
    An interrupt is raised by the caller: it comes before all of it or after.
    """
    cdef Cache cache = measured_cache(x, axis)
    cdef Block before = None if out is None else rows_of(cache.batch, 2)
    cdef Running running
    cdef int64_t *count = NULL
    cdef Memory memory
    memory.held = 0
    running.updated = False
    result = [None, cache, False]
    try:  # held before anything is written: a refused call changes nothing
        running.mean = cache.batch.running(&memory, "running_mean", running_mean)
        running.var = cache.batch.running(&memory, "running_var", running_var)
        count = <int64_t *>hold(&memory, "num_batches_tracked", tracked).buf
        running.weight = 1 / (<double>count[0] + 1) if momentum is None else momentum
        running.nonfinite = nonfinite
        running.correction = cache.values / (cache.values - 1) if unbiased else 1
        result[0] = run_tracked(cache, x, gamma, beta, eps, out, relu, residual, &running, before)
        result[2] = running.updated
    finally:
        if running.updated and count[0] < INT64_MAX:
            count[0] += 1
        release(&memory)
    return result


cdef tuple gradients(Cache cache, dout, out):
    """What a backward returns, of a batch without a mask."""
    cdef Py_ssize_t features = cache.batch.shape.features
    cdef Block sums = rows_of(cache.batch, 2)
    check_unchanged(cache)
    dtype = cache.batch.dtype()
    make = new_array if cache.batch.size else np.zeros
    dgamma = make(features, dtype) if cache.scaled else None
    dbeta = make(features, dtype) if cache.shifted else None
    dresidual = cache.batch.empty() if cache.added else None
    dx = run_backward(
        cache, dout, dgamma, dbeta, dresidual, <double *>sums.start, True, out)
    if cache.gamma_shape is not None:
        dgamma = dgamma.reshape(cache.gamma_shape)
    if cache.beta_shape is not None:
        dbeta = dbeta.reshape(cache.beta_shape)
    return (dx, dgamma, dbeta, dresidual) if cache.added else (dx, dgamma, dbeta)


def part_forward(
    x, count, mean, var, gamma, beta, eps, axis, out, relu, residual
):
    """`frozen_forward` of a part of a batch, by the statistics of the whole, which has `count`
    values a feature. The two halves of its backward follow."""
    cdef Cache cache = frozen_cache(x, mean, var, axis)
    cache.values = count
    return run_forward(cache, x, gamma, beta, eps, out, relu, residual, False, NULL, True), cache


def part_sums(Cache cache, dout):
    """sum(dout) and sum(dout*xhat) over a part; and memory for dresidual, None without a residual:
    before any part writes a dx over its dout."""
    check_unchanged(cache)
    return gradient_rows(cache, dout), cache.batch.empty() if cache.added else None


def part_gradient(Cache cache, dout, dresidual, sums, out):
    """dx, given the sums over the whole; fills dresidual."""
    cdef Block rows = rows_of(cache.batch, 2)
    cdef double *of_whole = <double *>rows.start
    cache.batch.row(of_whole, "sum_dout", sums[0])
    cache.batch.row(of_whole + cache.batch.shape.features, "sum_dout_xhat", sums[1])
    return run_backward(cache, dout, None, None, dresidual, of_whole, False, out)


cdef gradient_rows(Cache cache, dout):
    """sum(dout) and sum(dout*xhat), the first half of a backward: two rows of an array."""
    cdef Memory memory
    memory.held = 0
    sums = np.zeros((2, cache.batch.shape.features))
    try:
        launch_backward(
            cache, NULL, NULL, NULL, NULL, <double *>hold(&memory, "sums", sums).buf,
            cache.batch.like_x(&memory, "dout", dout, True).buf, True)
    finally:
        release(&memory)
    return sums


cdef run_forward(
    Cache cache, x, gamma, beta, eps, out, relu, residual, bint measure,
    Running *running, bint backward
):
    """Check what is left, allocate y, fill statistics and y; keep x if there may be a backward."""
    cdef Batch batch = cache.batch
    cdef double added = checked_eps(eps)
    cdef bint rectified = checked_relu(relu)
    cdef const void *scale
    cdef const void *shift
    cdef int parameters
    cdef Py_buffer *beside = NULL
    cdef Py_buffer *given
    cdef Py_buffer *target
    cdef Memory memory
    memory.held = 0
    array = out if out is None or type(out) is ndarray else as_output(out)
    try:
        scale = batch.parameter(&memory, "gamma", gamma)
        shift = batch.parameter(&memory, "beta", beta)
        parameters = memory.held
        y = batch.target(&memory, array, &given, &target)
        if residual is not None:
            beside = batch.like_x(&memory, "residual", residual)
        if out is not None:
            refuse_parameters(array, given, &memory, parameters)
            check_forward_target(given, array, &memory, x, residual, backward)
        cache.relu = rectified
        if rectified and residual is not None and backward and batch.size:
            cache.signs = new_block(signs_room(&batch.shape))
        launch_forward(
            cache, target.buf, scale, shift, NULL if beside == NULL else beside.buf, added,
            measure, running)
    finally:
        release(&memory)
    cache.scaled, cache.shifted = gamma is not None, beta is not None
    cache.gamma_shape, cache.beta_shape = gradient_shape(gamma), gradient_shape(beta)
    cache.added = residual is not None
    if backward:
        cache.fingerprint = batch.fingerprint()
    return delivered(y, array, out)


cdef run_tracked(
    Cache cache, x, gamma, beta, eps, out, relu, residual, Running *running, Block before
):
    """`run_forward`, after which the running statistics are put back where there was no memory to
    copy y to an `out` in another memory order."""
    cdef size_t row = cache.batch.shape.features * sizeof(double)
    if before is not None:
        memcpy(before.start, running.mean, row)
        memcpy(before.start + row, running.var, row)
    try:
        return run_forward(cache, x, gamma, beta, eps, out, relu, residual, True, running, True)
    except MemoryError:
        if before is not None and running.updated:
            memcpy(running.mean, before.start, row)
            memcpy(running.var, before.start + row, row)
            running.updated = False
        raise


cdef run_backward(
    Cache cache, dout, dgamma, dbeta, dresidual, double *sums, bint measure, out
):
    """Check dout, allocate dx, fill the sums, the gradients of the parameters, dresidual and dx."""
    cdef Batch batch = cache.batch
    cdef const void *upstream
    cdef void *to_dgamma
    cdef void *to_dbeta
    cdef void *to_dresidual
    cdef Py_buffer *given
    cdef Py_buffer *target
    cdef Memory memory
    memory.held = 0
    array = out if out is None or type(out) is ndarray else as_output(out)
    try:
        upstream = batch.like_x(&memory, "dout", dout, True).buf
        to_dgamma = NULL if dgamma is None else hold(&memory, "dgamma", dgamma).buf
        to_dbeta = NULL if dbeta is None else hold(&memory, "dbeta", dbeta).buf
        to_dresidual = NULL if dresidual is None else hold(&memory, "dresidual", dresidual).buf
        dx = batch.target(&memory, array, &given, &target)
        if out is not None:
            check_backward_target(given, array, &memory, dout, batch)
        launch_backward(
            cache, target.buf, to_dgamma, to_dbeta, to_dresidual, sums, upstream, measure)
    finally:
        release(&memory)
    return delivered(dx, array, out)


cdef int launch_forward(
    Cache cache, void *y, const void *gamma, const void *beta, const void *residual, double eps,
    bint measure, Running *running
) except -1:
    cdef Batch batch = cache.batch
    cdef double *statistics = cache.statistics
    cdef Activation then = cache.activation(<void *>residual)
    cdef Resources use = resources_of(batch, 2 if residual == NULL else 3)
    cdef int status
    if is_short(&batch.shape):
        status = call_forward(
            batch, statistics, y, gamma, beta, eps, measure, running, &then, &use)
    else:
        with nogil:
            status = call_forward(
                batch, statistics, y, gamma, beta, eps, measure, running, &then, &use)
    if status and POOL.clear():
        status = call_forward(
            batch, statistics, y, gamma, beta, eps, measure, running, &then, &use)
    if status:
        raise MemoryError("no memory for the partial sums of a forward")
    return 0


cdef int call_forward(
    Batch batch, double *statistics, void *y, const void *gamma, const void *beta, double eps,
    bint measure, Running *running, const Activation *then, const Resources *use
) noexcept nogil:
    return kernels[batch.double_precision].forward(
        y, statistics, batch.view.buf, gamma, beta, &batch.shape, eps, measure, running, then, use)


cdef int launch_backward(
    Cache cache, void *dx, void *dgamma, void *dbeta, void *dresidual, double *sums,
    const void *dout, bint measure
) except -1:
    cdef Batch batch = cache.batch
    cdef double *statistics = cache.statistics
    cdef double count = cache.values
    cdef Activation then = cache.activation(dresidual)
    # A whole backward counts one more: x and dout, wanted twice, stay less well beside dx.
    cdef Resources use = resources_of(batch, 4 if measure and dx != NULL else 3)
    cdef int status
    if is_short(&batch.shape):
        status = call_backward(
            batch, statistics, count, dx, dgamma, dbeta, sums, dout, measure, &then, &use)
    else:
        with nogil:
            status = call_backward(
                batch, statistics, count, dx, dgamma, dbeta, sums, dout, measure, &then, &use)
    if status and POOL.clear():
        status = call_backward(
            batch, statistics, count, dx, dgamma, dbeta, sums, dout, measure, &then, &use)
    if status:
        raise MemoryError("no memory for the partial sums of a backward")
    return 0


cdef int call_backward(
    Batch batch, double *statistics, double count, void *dx, void *dgamma, void *dbeta,
    double *sums, const void *dout, bint measure, const Activation *then, const Resources *use
) noexcept nogil:
    return kernels[batch.double_precision].backward(
        dx, dgamma, dbeta, sums, statistics, dout, batch.view.buf, &batch.shape,
        count, measure, then, use)


cdef Resources resources_of(Batch batch, int arrays) except *:
    """What a call that works on `arrays` of the size of x may use."""
    cdef int threads = 1 if is_short(&batch.shape) else get_num_threads()
    return resources_for(&batch.shape, batch.view.itemsize, arrays, threads)


cdef delivered(result, array, out):
    """`out`, of which `array` is the memory, filled with the result."""
    if out is None:
        return result
    if result is not array:
        array[...] = result
    return out


cdef tuple gradient_shape(parameter):
    """The shape of a parameter, and of its gradient, where it is not of one dimension."""
    if parameter is None or type(parameter) is ndarray and parameter.ndim == 1:
        return None
    shape = np.shape(parameter)
    return None if len(shape) == 1 else shape


cdef Block rows_of(Batch batch, Py_ssize_t rows):
    """Memory for rows of one double a feature."""
    return new_block(rows * batch.shape.features * sizeof(double))


# Checking arguments


cpdef double checked_eps(eps) except -1:
    """Return eps as a number that can be added to a variance."""
    cdef double value = as_number("eps", eps)
    if not 0 <= value < INFINITY:
        raise ValueError(f"eps must be finite and not negative, got {eps!r}")
    return value


cdef bint checked_relu(relu) except -1:
    """Return whether a ReLU follows; what is not True or False itself is looked at."""
    return relu is True or (relu is not False and as_flag("relu", relu))


cdef double checked_count(count, bint empty) except -1:
    cdef double value = as_number("count", count)
    if not (value > 0 or empty):
        raise ValueError(f"count must be positive, got {count!r}")
    return value


cpdef int check_unchanged(Cache cache) except -1:
    """Refuse a backward whose x is no longer that of the forward."""
    if cache.batch.fingerprint() != cache.fingerprint:
        raise RuntimeError(
            "x was changed after the forward, and the backward needs it: give the forward a copy, "
            "x.copy(), or change x after the backward"
        )
    return 0


def check_variance(str name, const double[::1] var):
    """Refuse a value below 0; NaN is let through."""
    refuse_negative(name, &var[0], var.shape[0])


cdef int refuse_negative(str name, const double *var, Py_ssize_t features) except -1:
    cdef const int64_t *bits = <const int64_t *>var
    cdef int64_t signs = 0
    cdef Py_ssize_t f
    for f in range(features):  # as vectors
        signs |= bits[f]
    if signs >= 0:
        return 0
    for f in range(features):  # it may be the sign of a NaN, or of a zero
        if var[f] < 0:
            raise ValueError(f"{name} must not be negative, got {var[f]} at feature {f}")
    return 0


cdef int check_forward_target(
    const Py_buffer *written, out, Memory *memory, x, residual, bint backward,
) except -1:
    """Refuse a y that would overwrite x, or a part of the residual, before it was read for the
    last time."""
    if backward:
        refuse_overlap(
            out, x, written, hold(memory, "x", as_array("x", x)),
            "out may not share memory with x, which the backward needs")
    else:
        refuse_part(out, written, memory, "x", x)
    if residual is not None:
        refuse_part(out, written, memory, "residual", residual)
    return 0


cdef int check_backward_target(
    const Py_buffer *written, out, Memory *memory, dout, Batch batch,
) except -1:
    """Refuse a dx that would overwrite x, or a part of dout that is still to be read."""
    refuse_overlap(out, batch.array, written, &batch.view, "out may not share memory with x")
    return refuse_part(out, written, memory, "dout", dout)


cdef int refuse_part(out, const Py_buffer *written, Memory *memory, str name, array) except -1:
    """Refuse an output that overlaps an array without being the array itself."""
    cdef const Py_buffer *read = hold(memory, name, as_array(name, array))
    if not is_same(written, read):
        refuse_overlap(
            out, array, written, read,
            f"out may be {name} itself, but may not overlap it otherwise")
    return 0
