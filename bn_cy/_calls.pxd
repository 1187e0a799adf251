from bn_cy._buffers cimport Block
from bn_cy._layout cimport Batch
from bn_cy.kernels cimport Activation, Running


cdef class Cache:
    cdef Batch batch
    cdef Block memory
    cdef double *statistics  # rows of one value a feature, as the kernels name them
    cdef double values  # of a feature
    cdef readonly bint scaled, shifted  # whether there was a gamma, and a beta
    cdef bint relu, added
    cdef tuple gamma_shape, beta_shape  # None: one dimension
    cdef public object _kept  # which rows counted, of a batch with a mask
    cdef Block signs
    cdef unsigned long long fingerprint  # of x when the forward had read it

    cdef Activation activation(self, void *residual) noexcept
    cdef double *row(self, int name) noexcept
    cdef object row_array(self, int name)


cdef Cache measured_cache(x, axis)
cdef Cache frozen_cache(x, mean, var, axis)
cdef int describe(Cache cache, gamma, beta, eps, relu) except -1
cdef tuple gradients(Cache cache, dout, out)
cdef gradient_rows(Cache cache, dout)
cdef run_forward(
    Cache cache, x, gamma, beta, eps, out, relu, residual, bint measure,
    Running *running, bint backward)
cdef run_backward(
    Cache cache, dout, dgamma, dbeta, dresidual, double *sums, bint measure, out)
cdef int launch_forward(
    Cache cache, void *y, const void *gamma, const void *beta, const void *residual, double eps,
    bint measure, Running *running) except -1
cdef int launch_backward(
    Cache cache, void *dx, void *dgamma, void *dbeta, void *dresidual, double *sums,
    const void *dout, bint measure) except -1
cdef Block rows_of(Batch batch, Py_ssize_t rows)
cpdef double checked_eps(eps) except -1
cdef double checked_count(count, bint empty) except -1
