cdef class Block:
    cdef void *raw
    cdef char *start
    cdef readonly size_t size


cdef Block new_block(size_t size)


cdef class Buffer:
    cdef Block block
    cdef size_t size
    cdef object pool
