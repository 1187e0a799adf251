/* The C library's allocator, with a count of its blocks, that fails when it is told to: for
   tests/tools/faults.py, which compiles, preloads and steers it. glibc alone. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

atomic_long fault_countdown; /* the allocation that fails, counted from now on; 0: none does */
atomic_long fault_length;    /* how many fail then, one after the other */
atomic_long fault_injected;  /* how many have failed */
atomic_long fault_blocks;    /* that are held now */

/* What the C library and an OpenMP runtime need for themselves is never refused: to start a thread
   without it, or an OpenMP team, ends the process. */
static int is_spared(void *caller) {
    static const char *const spared[] = {"/libc.", "/ld-linux", "/libgomp", "/libomp"};
    Dl_info from;
    if (!dladdr(caller, &from) || !from.dli_fname) return 0;
    for (size_t i = 0; i < sizeof spared / sizeof *spared; i++)
        if (strstr(from.dli_fname, spared[i])) return 1;
    return 0;
}

static int is_refused(void *caller) {
    long left = atomic_load(&fault_countdown);
    if (left <= 0 || is_spared(caller)) return 0;
    if (left > 1) {
        atomic_fetch_sub(&fault_countdown, 1);
        return 0;
    }
    if (atomic_fetch_sub(&fault_length, 1) <= 1) atomic_store(&fault_countdown, 0);
    atomic_fetch_add(&fault_injected, 1);
    errno = ENOMEM;
    return 1;
}

static void *counted(void *block) {
    if (block) atomic_fetch_add(&fault_blocks, 1);
    return block;
}

#define OR_REFUSED(allocation) \
    (is_refused(__builtin_return_address(0)) ? NULL : counted(allocation))

void *malloc(size_t size) { return OR_REFUSED(__libc_malloc(size)); }

void *calloc(size_t count, size_t size) { return OR_REFUSED(__libc_calloc(count, size)); }

void *aligned_alloc(size_t alignment, size_t size) {
    return OR_REFUSED(__libc_memalign(alignment, size));
}

int posix_memalign(void **block, size_t alignment, size_t size) {
    void *found = OR_REFUSED(__libc_memalign(alignment, size));
    if (!found) return ENOMEM;
    *block = found;
    return 0;
}

void free(void *block) {
    if (block) atomic_fetch_sub(&fault_blocks, 1);
    __libc_free(block);
}

void *realloc(void *block, size_t size) {
    if (block && !size) {
        free(block);
        return NULL;
    }
    if (is_refused(__builtin_return_address(0))) return NULL;
    return block ? __libc_realloc(block, size) : counted(__libc_malloc(size));
}
