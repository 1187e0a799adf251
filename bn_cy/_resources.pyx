"""What a call may use: threads, cache, memory past the cache. No bit of a result depends on it."""

from bn_cy._openmp import cpu

from bn_cy._cpu cimport serial
from bn_cy.kernels cimport Resources, Shape

cdef enum:
    GRAIN = 12_000  # values of work, a feature counting as FEATURE, that a thread has at the least
    FEATURE = 16
    FAR = 80 << 20  # bytes that no last level keeps: a larger one is shared with many

# Bytes of all the arrays of a call from which its output is written past the cache: what the last
# level does not keep, as others have a share of it.
cdef Py_ssize_t streamed = min(3 * cpu.last_level_cache() // 4, FAR)

# Bytes that a thread finds again: half of its cache, as code, output and parameters want room too.
cdef Py_ssize_t kept = cpu.own_cache() // 2


def _stream_from(Py_ssize_t size):
    """Set from how many bytes of all its arrays a call writes past the cache; return what it was.
    Results have the same bits either way: this is for their tests, and for measurements."""
    global streamed
    before, streamed = streamed, size
    return before


cdef inline Py_ssize_t values_of(const Shape *shape) noexcept nogil:
    return shape.outer * shape.features * shape.inner


cdef inline Py_ssize_t useful_threads(const Shape *shape) noexcept nogil:
    return (values_of(shape) + FEATURE * shape.features) // GRAIN


cdef bint is_short(const Shape *shape) noexcept nogil:
    """Whether a call is over before the GIL could be given up: it has one thread."""
    return useful_threads(shape) < 2


cdef Resources resources_for(
    const Shape *shape, Py_ssize_t itemsize, int arrays, int threads,
) noexcept nogil:
    """What a call that works on so many arrays of a shape may use, of at most so many threads."""
    cdef Resources use
    use.threads = 1 if serial or is_short(shape) else min(
        useful_threads(shape), <Py_ssize_t>threads)
    use.cache = kept
    use.far = arrays * values_of(shape) * itemsize >= streamed
    return use
