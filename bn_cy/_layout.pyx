"""Arrays as the kernels take them: checked, their memory held, seen as (outer, features, inner).

An array whose values fill one stretch of memory in the order of some permutation of its axes (C and
Fortran order, an NCHW view of NHWC data) is taken as it is. Anything else is copied once.

All of this is C behind Python: looking at five arrays through NumPy's attributes takes longer
than the batch norm of a small batch. It needs the buffer protocol alone.
"""

import numpy as np

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_Release, PyObject_GetBuffer
from libc.math cimport INFINITY
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy, memmove

from bn_cy._arguments import as_index, as_plain, as_real, refuse_overlapping_elements
from bn_cy._buffers import relieved

from bn_cy._buffers cimport Buffer
from bn_cy.kernels cimport join_runs

cdef enum:
    RECYCLED = 1 << 18  # bytes from which an output comes from the pool; below, malloc is faster
    DIMENSIONS = 64     # more than an array can have
    WITNESSES = 64      # values that a backward looks at again: two percent of the shortest call

# What a call needs of every feature, in bytes, is then a Py_ssize_t.
cdef Py_ssize_t MOST_FEATURES = <Py_ssize_t>1 << 48
cdef object ndarray = np.ndarray
cdef object new_array = np.empty
cdef object FLOAT32 = np.dtype(np.float32)
cdef object FLOAT64 = np.dtype(np.float64)


def irregular(number):
    """A number of 64 bits that looks random: SplitMix64 (Steele, Lea and Flood, 2014)."""
    mixed = number * 0x9E3779B97F4A7C15 % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return mixed ^ mixed >> 31


# Where the witnesses lie, in parts of the whole, by the golden ratio, so that they are not all of
# one feature; and what they weigh in a fingerprint: odd numbers that look random.
cdef double[WITNESSES] PLACES
cdef unsigned long long[WITNESSES] WEIGHTS
PLACES[:] = [k * (5**0.5 - 1) / 2 % 1 for k in range(WITNESSES - 1)] + [1]
WEIGHTS[:] = [irregular(k + 1) | 1 for k in range(WITNESSES)]


ctypedef fused bits:  # of a float, of a double
    unsigned
    unsigned long long


cdef inline unsigned long long spread_sign(unsigned long long value) noexcept:
    """A value with its upper half mixed into the lower one; no two values become the same."""
    return value ^ value >> 32


cdef unsigned long long fingerprint_of(const bits *values, Py_ssize_t size) noexcept:
    """A sum that no change of one value leaves as it is: the weights are odd. Signs of doubles go
    to lower bits, too: an even number of the highest ones adds up to nothing."""
    cdef unsigned long long mark = 0
    cdef double last = size - 1
    cdef int k
    if size <= WITNESSES:
        for k in range(<int>size):
            mark += spread_sign(values[k]) * WEIGHTS[k]
    else:
        for k in range(WITNESSES):
            mark += spread_sign(values[<Py_ssize_t>(PLACES[k] * last)]) * WEIGHTS[k]
    return mark


cdef Py_buffer *hold(Memory *memory, str name, array) except NULL:
    """Take hold of an array's memory until `release`."""
    cdef Py_buffer *view = &memory.views[memory.held]
    see_array(view, name, array)
    memory.held += 1
    return view


cdef void release(Memory *memory) noexcept:
    while memory.held:
        memory.held -= 1
        PyBuffer_Release(&memory.views[memory.held])


cdef int see_array(Py_buffer *view, str name, array) except -1:
    try:
        PyObject_GetBuffer(array, view, PyBUF_STRIDES | PyBUF_FORMAT)
    except (ValueError, BufferError):  # a dtype without a buffer, as that of dates
        raise TypeError(f"{name} must be of float32 or float64, got {array.dtype}") from None
    return 0


cdef inline char kind_of(const Py_buffer *view) noexcept:
    """'f' or 'd' for native float32 or float64; 0 for anything else."""
    cdef const char *kind = view.format
    if kind[0] in b"=^":  # as NumPy marks arrays that are not aligned
        kind += 1
    return kind[0] if kind[0] in b"fd" and kind[1] == 0 else 0


cdef inline bint is_aligned(const Py_buffer *view) noexcept:
    return <uintptr_t>view.buf % <uintptr_t>view.itemsize == 0


cdef bint fills_memory(const Py_buffer *view, int *order) noexcept:
    """Sort the axes from the slowest to the fastest; tell whether they follow each other
    without a gap."""
    cdef Py_ssize_t expected = view.itemsize
    cdef int i, k
    for i in range(view.ndim):
        k = i
        while k > 0 and view.strides[order[k - 1]] < view.strides[i]:
            order[k] = order[k - 1]
            k -= 1
        order[k] = i
    for k in range(view.ndim - 1, -1, -1):
        i = order[k]
        if view.shape[i] != 1 and view.strides[i] != expected:
            return False
        expected *= view.shape[i]
    return True


cdef native(name, array, dtype=None):
    """A C-ordered copy in the processor's byte order, rounded to a dtype if one is given; TypeError
    if that of the array is no float32 or float64, or to be rounded no floating-point dtype."""
    if array.dtype.kind != "f" or dtype is None and array.dtype.itemsize not in (4, 8):
        wanted = "float32 or float64" if dtype is None else "floating-point numbers"
        raise TypeError(f"{name} must be of {wanted}, got {array.dtype}")
    if dtype is None:
        dtype = FLOAT32 if array.dtype.itemsize == 4 else FLOAT64
    return relieved(np.array, array, dtype, order="C")


cdef as_array(str name, values):
    return values if type(values) is ndarray else as_plain(name, values)


cdef int refuse_overlap(out, array, const Py_buffer *a, const Py_buffer *b, str message) except -1:
    """Refuse an `out` that shares memory with an array; a and b are their views."""
    if not are_apart(a, b) and np.shares_memory(out, array):
        raise ValueError(message)
    return 0


cdef int refuse_parameters(
    out, const Py_buffer *view, const Memory *memory, int count,
) except -1:
    """Refuse an `out` that shares memory with gamma or beta, the first arrays that a call holds."""
    cdef const Py_buffer *other
    cdef int i
    for i in range(count):
        other = &memory.views[i]
        if not are_apart(view, other) and np.shares_memory(out, <object>other.obj):
            raise ValueError("out may not share memory with gamma or beta")
    return 0


cdef bint is_same(const Py_buffer *a, const Py_buffer *b) noexcept:
    """Tell whether two arrays of one dtype are the same memory, seen alike."""
    cdef bint same = a.buf == b.buf and a.ndim == b.ndim
    cdef int i
    if same:
        for i in range(a.ndim):
            same &= a.shape[i] == b.shape[i] and a.strides[i] == b.strides[i]
    return same


cdef bint are_apart(const Py_buffer *a, const Py_buffer *b) noexcept:
    cdef uintptr_t a_start, a_stop, b_start, b_stop
    find_extent(a, &a_start, &a_stop)
    find_extent(b, &b_start, &b_stop)
    return a_stop <= b_start or b_stop <= a_start


cdef void find_extent(const Py_buffer *view, uintptr_t *start, uintptr_t *stop) noexcept:
    cdef Py_ssize_t reach
    cdef int i
    start[0] = <uintptr_t>view.buf
    stop[0] = start[0] + view.itemsize
    for i in range(view.ndim):
        reach = (view.shape[i] - 1) * view.strides[i]
        if reach > 0:
            stop[0] += reach
        else:
            start[0] += reach


cdef class Batch:
    """The batch x, held as long as this object lives; what goes with it is checked against it.

    Attributes
    ----------
    array : ndarray
        x itself, or its copy.
    count, size, nbytes : int
        Values of a feature, values and bytes altogether.
    """

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)

    cdef void see(self) except *:
        """Take hold of the array, or of a copy where the kernels cannot take it as it is."""
        cdef int order[DIMENSIONS]
        cdef int k, at
        see_array(&self.view, "x", self.array)
        self.held = True
        if (
            kind_of(&self.view) == 0
            or not is_aligned(&self.view)
            or not fills_memory(&self.view, order)
        ):
            self.held = False
            PyBuffer_Release(&self.view)
            self.array = native("x", self.array)
            see_array(&self.view, "x", self.array)
            self.held = True
            fills_memory(&self.view, order)
        self.double_precision = kind_of(&self.view) == b"d"
        self.c_ordered = True
        self.shape.outer = self.shape.inner = 1
        self.shape.features = self.view.shape[self.axis]
        if self.shape.features > MOST_FEATURES:  # of an empty array: any other is too large itself
            raise MemoryError(f"no memory for the statistics of {self.shape.features} features")
        at = -1
        for k in range(self.view.ndim):
            self.c_ordered &= order[k] == k
            if order[k] == self.axis:
                at = k
            elif at < 0:
                self.shape.outer *= self.view.shape[order[k]]
            else:
                self.shape.inner *= self.view.shape[order[k]]
        join_runs(&self.shape)
        self.count = self.shape.outer * self.shape.inner
        self.size = self.count * self.shape.features
        self.nbytes = self.size * self.view.itemsize

    cdef unsigned long long fingerprint(self) noexcept:
        """Of some of the values of x as they are now: of all of a small one, else of WITNESSES that
        lie irregularly, among them the first and the last."""
        if self.double_precision:
            return fingerprint_of(<const unsigned long long *>self.view.buf, self.size)
        return fingerprint_of(<const unsigned *>self.view.buf, self.size)

    cdef object dtype(self):
        return FLOAT64 if self.double_precision else FLOAT32

    cdef object empty(self):
        """A new array of the shape, dtype and memory order of x, not filled."""
        if self.nbytes >= RECYCLED:
            memory = Buffer(self.nbytes)
            return ndarray(self.array.shape, self.dtype(), memory, 0, self.array.strides)
        if self.c_ordered:
            try:  # a call of `relieved` takes as long as the array
                return new_array(self.array.shape, self.dtype())
            except MemoryError:
                return relieved(new_array, self.array.shape, self.dtype())
        return relieved(np.empty_like, self.array, subok=False)

    cdef bint is_like(self, const Py_buffer *view) noexcept:
        """Tell whether an array of x's shape has its memory order, too."""
        cdef int i
        for i in range(view.ndim):
            if view.strides[i] != self.view.strides[i] and view.shape[i] != 1:
                return False
        return is_aligned(view)

    cdef int check_shape(self, str name, array, const Py_buffer *view) except -1:
        cdef bint fits = view.ndim == self.view.ndim and kind_of(view) == kind_of(&self.view)
        cdef int i
        if fits:
            for i in range(view.ndim):
                fits &= view.shape[i] == self.view.shape[i]
        if not fits:
            raise ValueError(
                f"{name} must have the shape {self.array.shape} and dtype {self.dtype()} of x, "
                f"got {array.shape} and {array.dtype}"
            )
        return 0

    cdef Py_buffer *like_x(
        self, Memory *memory, str name, values, bint to_round=False,
    ) except NULL:
        """Hold an array of x's shape and dtype, or a copy in x's memory order; also one of other
        floating-point numbers, if they are to be rounded."""
        cdef Py_buffer *view
        array = as_array(name, values)
        view = hold(memory, name, array)
        if kind_of(view) == 0 or to_round and kind_of(view) != kind_of(&self.view):
            array = native(name, array, self.dtype() if to_round else None)
            view = hold(memory, name, array)
        self.check_shape(name, array, view)
        if not self.is_like(view):
            copy = self.empty()
            copy[...] = array
            view = hold(memory, name, copy)
        return view

    cdef object target(self, Memory *memory, out, Py_buffer **given, Py_buffer **held):
        """What the kernels write: `out`, or an array to be copied into it; a new one for None. The
        memory of both is held."""
        if out is not None:
            if not out.flags.writeable:
                raise ValueError("out must be writable, got a read-only array")
            given[0] = held[0] = hold(memory, "out", out)
            self.check_shape("out", out, given[0])
            if self.is_like(given[0]):
                return out
            refuse_overlapping_elements(out)
        array = self.empty()
        held[0] = hold(memory, "out", array)
        return array

    cdef Py_buffer *per_feature(self, Memory *memory, str name, values, dtype) except NULL:
        """Hold one value per feature, contiguous and of a dtype; of a copy where it is not so."""
        cdef Py_buffer *view
        cdef char kind = b"d" if dtype is FLOAT64 else b"f"
        if type(values) is not ndarray:
            values = as_real(name, values)
        view = hold(memory, name, values)
        if view.ndim != 1 or kind_of(view) != kind or not is_contiguous(view):
            values = np.array(as_real(name, values), dtype, order="C")
            if self.keeps_dimensions(values):
                values = values.reshape(-1)
            view = hold(memory, name, values)
        if view.ndim != 1 or view.shape[0] != self.shape.features:
            raise ValueError(
                f"{name} must have shape ({self.shape.features},), one value per feature, or one "
                f"that broadcasts along axis {self.axis} of x alone, got {values.shape}"
            )
        return view

    cdef bint keeps_dimensions(self, values):
        """Tell whether an array has the dimensions of x, from the last one on, and is of length 1
        in all but that of the features, as sums with keepdims are."""
        cdef Py_ssize_t missing = self.view.ndim - values.ndim
        if values.ndim < 2 or not 0 <= missing <= self.axis:
            return False
        shape = [1] * values.ndim
        shape[self.axis - missing] = self.shape.features
        return values.shape == tuple(shape)

    cdef const void *parameter(self, Memory *memory, str name, values) except? NULL:
        """The memory of one value per feature, of x's dtype; NULL for None."""
        if values is None:
            return NULL
        return self.per_feature(memory, name, values, self.dtype()).buf

    cdef double *running(self, Memory *memory, str name, array) except NULL:
        """The memory of one float64 value per feature, to be updated."""
        cdef Py_buffer *view = hold(memory, name, array)
        if (
            view.readonly
            or kind_of(view) != b"d"
            or view.ndim != 1
            or view.shape[0] != self.shape.features
            or not is_contiguous(view)
        ):
            raise ValueError(
                f"{name} must be a writable, contiguous array of float64 and shape "
                f"({self.shape.features},), got {array!r}"
            )
        return <double *>view.buf

    cdef int row(self, double *to, str name, values) except -1:
        """Copy one float64 value per feature."""
        cdef Memory memory
        memory.held = 0
        try:
            memcpy(
                to, self.per_feature(&memory, name, values, FLOAT64).buf,
                self.shape.features * sizeof(double))
        finally:
            release(&memory)
        return 0


def copy_all(list sources, list targets):
    """Copy arrays into others of their shapes and dtypes, all in C order: all of them, or none
    where one is read-only or there is no memory."""
    cdef Memory memory
    cdef Py_buffer *to
    cdef int i, count = len(targets)
    assert len(sources) == count and 2 * count <= HELD
    memory.held = 0
    try:
        for array in targets:
            if hold(&memory, "array", array).readonly:
                raise ValueError("an array of the layer is read-only: none of them was written")
        for array in sources:
            hold(&memory, "array", array)
        for i in range(count):
            to = &memory.views[i]
            memmove(to.buf, memory.views[count + i].buf, to.len)
    finally:
        release(&memory)


def as_batch(x, axis):
    """Return x, or the copy of it that the kernels take."""
    return batch_of(x, axis).array


def new_result(x, axis):
    """Return a new array for what is computed of x, of its shape, dtype and memory order."""
    return batch_of(x, axis).empty()


cdef Batch batch_of(x, axis):
    """The batch with its features along `axis`."""
    cdef Batch batch = Batch.__new__(Batch)
    batch.array = as_array("x", x)
    batch.axis = axis_of(batch.array, axis)
    batch.see()
    return batch


cpdef int axis_of(array, axis) except -1:
    """Return the feature axis, counted from the first."""
    cdef Py_ssize_t dimensions = array.ndim
    if dimensions < 2:
        raise ValueError(f"x must have two dimensions or more, got shape {array.shape}")
    index = axis if type(axis) is int else as_index("axis", axis)
    if not -dimensions <= index < dimensions:
        raise ValueError(
            f"axis must be from {-dimensions} to {dimensions - 1} for x of shape {array.shape}, "
            f"got {axis}"
        )
    return index + dimensions if index < 0 else index


cdef inline bint is_contiguous(const Py_buffer *view) noexcept:
    cdef bint dense = view.shape[0] < 2 or view.strides[0] == view.itemsize
    return dense and is_aligned(view)


cpdef double as_number(str name, value) except? -1:
    """Return a number as a double: infinite where a double does not reach."""
    try:
        return value
    except OverflowError:
        return INFINITY if value > 0 else -INFINITY
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
