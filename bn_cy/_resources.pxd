from bn_cy.kernels cimport Resources, Shape

cdef bint is_short(const Shape *shape) noexcept nogil
cdef Resources resources_for(
    const Shape *shape, Py_ssize_t itemsize, int arrays, int threads) noexcept nogil
