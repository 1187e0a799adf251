from bn_cy.kernels cimport Shape


cdef enum:
    HELD = 12  # arrays that a call takes hold of, at the most


cdef struct Memory:  # those that one call has taken hold of, copies too
    Py_buffer views[HELD]
    int held


cdef Py_buffer *hold(Memory *memory, str name, array) except NULL
cdef void release(Memory *memory) noexcept


cdef class Batch:
    cdef Py_buffer view
    cdef bint held
    cdef readonly object array
    cdef readonly Py_ssize_t count, size, nbytes
    cdef Shape shape
    cdef int axis
    cdef bint double_precision, c_ordered

    cdef void see(self) except *
    cdef unsigned long long fingerprint(self) noexcept
    cdef object dtype(self)
    cdef object empty(self)
    cdef bint is_like(self, const Py_buffer *view) noexcept
    cdef int check_shape(self, str name, array, const Py_buffer *view) except -1
    cdef Py_buffer *like_x(
        self, Memory *memory, str name, values, bint to_round=*) except NULL
    cdef object target(self, Memory *memory, out, Py_buffer **given, Py_buffer **held)
    cdef Py_buffer *per_feature(self, Memory *memory, str name, values, dtype) except NULL
    cdef bint keeps_dimensions(self, values)
    cdef const void *parameter(self, Memory *memory, str name, values) except? NULL
    cdef double *running(self, Memory *memory, str name, array) except NULL
    cdef int row(self, double *to, str name, values) except -1


cdef as_array(str name, values)
cpdef double as_number(str name, value) except? -1
cdef bint is_same(const Py_buffer *a, const Py_buffer *b) noexcept
cdef int refuse_parameters(
    out, const Py_buffer *view, const Memory *memory, int count) except -1
cdef int refuse_overlap(out, array, const Py_buffer *a, const Py_buffer *b, str message) except -1
cdef Batch batch_of(x, axis)
