"""Memory: aligned, and for large output arrays recycled.

A fresh array of 64 MB costs several times its batch norm in page faults. Here the memory of an
output that nobody holds any longer serves the next one. A `Buffer` owns one block and is the base
of the array (and of every view of it); when the last of them goes, the buffer dies and its block
goes back to the pool. There it waits for an output of its size or a little less, among the BLOCKS
that were given back last, which have a quarter of the memory at the most.
"""

import contextlib
import os

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.stdint cimport uintptr_t

cdef extern from *:
    """
    #ifdef __linux__
    #include <sys/mman.h>
    static void bn_huge_pages(void *start, size_t bytes) { madvise(start, bytes, MADV_HUGEPAGE); }
    #else
    static void bn_huge_pages(void *start, size_t bytes) { }
    #endif
    """
    void advise_huge_pages "bn_huge_pages"(void *start, size_t bytes) nogil

cdef enum:
    ALIGNMENT = 64           # a cache line: what non-temporal stores need
    HUGE_PAGE = 2 * 1024 * 1024
    BLOCKS = 16              # free ones, at the most: what the layers of a step give back


CGROUPS = "/sys/fs/cgroup"


@cython.freelist(8)
cdef class Block:
    """Raw memory, with an aligned start."""

    def __cinit__(self, size_t size):
        cdef size_t alignment = HUGE_PAGE if size >= HUGE_PAGE else ALIGNMENT
        cdef size_t whole = (size + alignment - 1) // alignment * alignment
        self.raw = PyMem_RawMalloc(whole + alignment)
        if self.raw == NULL:
            raise MemoryError(f"no memory for {size} bytes")
        self.start = <char *>((<uintptr_t>self.raw + alignment - 1) // alignment * alignment)
        self.size = size
        if alignment == HUGE_PAGE:
            advise_huge_pages(self.start, whole)  # small pages halve the speed of memory

    def __dealloc__(self):
        PyMem_RawFree(self.raw)


class Pool:
    """Free blocks, the most recently used last; at most BLOCKS, and `limit` bytes, of them."""

    def __init__(self, limit):
        self.limit = limit
        self.free = []

    def take(self, size):
        """Return the last free block of this size or up to a quarter more, or a new one."""
        for i in range(len(self.free) - 1, -1, -1):
            if size <= self.free[i].size <= size + size // 4:
                return self.free.pop(i)
        return relieved(Block, size, pool=self)

    def give(self, block):
        """Keep a block for a later output; let the ones longest unused go."""
        self.free.append(block)
        held = sum(kept.size for kept in self.free)
        while held > self.limit or len(self.free) > BLOCKS:
            held -= self.free.pop(0).size

    def clear(self):
        """Let all free blocks go; tell whether there were any."""
        found = bool(self.free)
        self.free.clear()
        return found


def memory_of_machine():
    """Return the bytes of memory, or 4 GiB where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 4 << 30


def memory_limit(folder=CGROUPS):
    """Return how many bytes this process may have: those of the machine, or of a container."""
    limit = memory_of_machine()
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # version 2, and 1
        with contextlib.suppress(OSError, ValueError), open(f"{folder}/{name}") as file:
            limit = min(limit, int(file.read()))  # no such file, or no limit: "max"
    return limit


POOL = Pool(memory_limit() // 4)


def relieved(function, *arguments, pool=POOL, **more):
    """Call a function that takes memory; where there is none, again without the free blocks."""
    try:
        return function(*arguments, **more)
    except MemoryError:
        if not pool.clear():
            raise
    return function(*arguments, **more)


cdef Block new_block(size_t size):
    """A block of the system's memory; the pool gives up its own where there is none."""
    try:
        return Block(size)
    except MemoryError:
        return relieved(Block, size)


def clear_buffers():
    """Give the memory that waits for later results back to the system.

    A result that is returned in a fresh array of 256 KB or more has memory that is kept when
    nobody holds the array any longer, for the next result of that size. Results that somebody
    holds are not touched. A call that finds too little memory does this by itself.

    Examples
    --------
    >>> import bn_cy
    >>> bn_cy.clear_buffers()
    """
    POOL.clear()


@cython.final
@cython.no_gc_clear  # the block must still be there when the buffer dies in a cycle
cdef class Buffer:
    """A writable buffer of `size` bytes whose block goes back to the pool with it."""

    def __cinit__(self, size_t size, pool=POOL):
        self.pool = pool
        self.size = size
        self.block = pool.take(size)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.block.start, self.size, False, flags)

    def __dealloc__(self):
        if self.block is not None:
            try:
                self.pool.give(self.block)
            except MemoryError:  # to keep a block takes a little: without it, the block goes
                pass
