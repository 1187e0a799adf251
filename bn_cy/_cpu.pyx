"""What the processor and OpenMP offer."""

# No pathlib: it would be half of the time that an import takes.
import contextlib
import os

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #else
    static int omp_get_max_threads(void) { return 1; }
    #endif

    /* The highest x86-64 level that processor and system support; 0: none. */
    #if defined(_MSC_VER) && defined(_M_X64)
    #include <windows.h>
    static int bn_cpu_level(void) {
        if (IsProcessorFeaturePresent(41)) return 4;  /* PF_AVX512F_INSTRUCTIONS_AVAILABLE */
        if (IsProcessorFeaturePresent(40)) return 3;  /* PF_AVX2_INSTRUCTIONS_AVAILABLE */
        return 2;
    }
    #elif defined(__x86_64__)
    static int bn_cpu_level(void) {
        __builtin_cpu_init();
        if (!(__builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt"))) return 0;
        if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
              && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))) return 2;
        if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
              && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq")
              && __builtin_cpu_supports("avx512vl"))) return 3;
        return 4;
    }
    #else
    static int bn_cpu_level(void) { return 0; }
    #endif

    /* The bytes of the cache of a level; 0 where there is none or the C library does not tell. */
    #if defined(__linux__)
    #include <unistd.h>
    #endif
    static long bn_cache_bytes(int level) {
        long size = 0;
    #ifdef _SC_LEVEL3_CACHE_SIZE
        size = sysconf(level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
    #endif
        return size > 0 ? size : 0;
    }

    /* The path of the OpenMP runtime; NULL where there is none or the system does not tell. */
    #if defined(_OPENMP) && !defined(_MSC_VER)
    #include <dlfcn.h>
    static const char *bn_openmp_runtime(void) {
        Dl_info info;
        return dladdr((void *)(size_t)omp_get_max_threads, &info) ? info.dli_fname : NULL;
    }
    #else
    static const char *bn_openmp_runtime(void) { return NULL; }
    #endif

    #if defined(__clang__)
    #define BN_CY_COMPILER __VERSION__
    #elif defined(__GNUC__)
    #define BN_CY_COMPILER "GCC " __VERSION__
    #elif defined(_MSC_VER)
    #define BN_CY_TEXT(number) #number
    #define BN_CY_TEXT_OF(macro) BN_CY_TEXT(macro)
    #define BN_CY_COMPILER "MSVC " BN_CY_TEXT_OF(_MSC_VER)
    #else
    #define BN_CY_COMPILER "unknown"
    #endif

    #ifndef BN_CY_VARIANTS
    #define BN_CY_VARIANTS "plain"
    #endif
    #ifdef BN_CY_OPENMP
    #define BN_CY_HAS_OPENMP 1
    #else
    #define BN_CY_HAS_OPENMP 0
    #endif
    """
    int omp_get_max_threads() nogil
    int bn_cpu_level() nogil
    long bn_cache_bytes(int level) nogil
    const char *bn_openmp_runtime() nogil
    bint HAS_OPENMP "BN_CY_HAS_OPENMP"
    const char *VARIANTS "BN_CY_VARIANTS"
    const char *COMPILED_BY "BN_CY_COMPILER"

OPENMP = bool(HAS_OPENMP)
COMPILER = COMPILED_BY.decode()
BUILT = VARIANTS.decode().split()
serial = not HAS_OPENMP
CACHES = "/sys/devices/system/cpu/cpu0/cache"


def supported_levels():
    """Return the x86-64 levels that this processor runs, best first; empty on other processors."""
    return [f"v{level}" for level in range(bn_cpu_level(), 1, -1)]


def openmp_runtime():
    """Return the path of the OpenMP runtime; None where there is none or the system is silent."""
    cdef const char *path = bn_openmp_runtime()
    return None if path == NULL else os.fsdecode(path)


def max_threads():
    """Return how many threads OpenMP would use now, for the calling thread; 1 where all is serial.
    """
    return 1 if serial else omp_get_max_threads()


def is_serial():
    """Tell whether all calls have one thread: in a serial build, and in a forked child."""
    return serial


def stay_serial(bint value=True):
    """Let all later calls of this process have one thread."""
    global serial
    serial = value


def cache_bytes(level, folder=CACHES):
    """Return the bytes of the cache of a level; 0 where there is none or the system does not tell.

    What Linux says in `folder` goes before the C library's word, which for AMD's processors is the
    last level of a whole socket, of which a core sees a part.
    """
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        with contextlib.suppress(OSError, ValueError):  # not all systems have all the files
            if int(read(f"{folder}/{name}/level")) == level:
                return int(read(f"{folder}/{name}/size").strip().removesuffix("K")) << 10
    return bn_cache_bytes(level)


def read(path):
    """Return the text of a file."""
    with open(path) as file:
        return file.read()


def own_cache():
    """Return the bytes of a core's own second-level cache; 1 MB where the system does not tell."""
    return cache_bytes(2) or 1 << 20


def last_level_cache():
    """Return the bytes of the last-level cache; 16 MB where the system does not tell."""
    return cache_bytes(3) or cache_bytes(2) or 16 << 20
