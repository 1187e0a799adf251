# What Cython has no words for: the C of the kernels, but for OpenMP's in threads.pxi. Typed
# memoryviews of memory that no Python object owns, stores past the cache, fetches, aligned scratch,
# bits.
#
# Derivation: none. Tests: every test of the same bits (the stores at every alignment, through and
# past the cache: tests/test_same_bits.py).

cdef extern from *:
    """
    #include <float.h>
    #include <math.h>
    #include <stdint.h>
    #include <string.h>
    #ifndef BN_CY_FLAGS
    #define BN_CY_FLAGS ""
    #endif
    #if defined(__x86_64__) || defined(_M_X64)
    #include <immintrin.h>
    #define BN_STREAMS 1
    #else
    #define BN_STREAMS 0
    #endif
    #if defined(__GNUC__)
    #define BN_OPAQUE __attribute__((used))  /* as if assembly might write it */
    #else
    #define BN_OPAQUE
    #endif
    #if defined(_MSC_VER)
    #pragma fp_contract(off)  /* on by default before Visual Studio 2022 */
    #endif

    /* Typed memoryviews of memory that no object owns: theirs is None, which Cython counts no
       references to. As macros, for `sizeof`, and as Cython declares its struct after this. */
    #define bn_view(start, ...) ((__Pyx_memviewslice){ \\
        (struct __pyx_memoryview_obj *)Py_None, (char *)(start), __VA_ARGS__, {-1, -1, -1}})
    #define bn_row(start, width, size) bn_view(start, {width}, {size})
    #define bn_rows(start, rows, width, bytes, size) \\
        bn_view(start, {rows, width}, {bytes, size})
    #define bn_array(start, outer, features, inner, size) \\
        bn_view(start, {outer, features, inner}, \\
                {(features) * (inner) * (size), (inner) * (size), size})

    #if BN_STREAMS
    /* The pieces of a line that two runs or rows share meet in the buffer of such stores: ordinary
       ones would read the line first. */
    static inline void bn_stream_words(char *to, const char *from, size_t bytes) {
        for (size_t i = 0; i < bytes; i += 4) {
            int word;
            memcpy(&word, from + i, 4);
            _mm_stream_si32((int *)(to + i), word);
        }
    }
    #endif

    /* Copy floats or doubles past the cache, by non-temporal stores of whole lines and of words. */
    static inline void bn_stream(void *target, const void *source, size_t bytes) {
    #if BN_STREAMS
        char *to = (char *)target;
        const char *from = (const char *)source;
        size_t head = -(uintptr_t)to & 63;
        if (head) {
            if (head > bytes) head = bytes;
            bn_stream_words(to, from, head);
            to += head; from += head; bytes -= head;
        }
        for (; bytes >= 64; bytes -= 64, to += 64, from += 64) {
    #if defined(__AVX512F__)
            _mm512_stream_ps((float *)to, _mm512_loadu_ps((const float *)from));
    #elif defined(__AVX__)
            _mm256_stream_ps((float *)to, _mm256_loadu_ps((const float *)from));
            _mm256_stream_ps((float *)to + 8, _mm256_loadu_ps((const float *)from + 8));
    #else
            for (int i = 0; i < 16; i += 4)
                _mm_stream_ps((float *)to + i, _mm_loadu_ps((const float *)from + i));
    #endif
        }
        bn_stream_words(to, from, bytes);
    #else
        memcpy(target, source, bytes);
    #endif
    }

    /* Scratch that starts on a cache line: vectors across two lines load at half the speed. By an
       offset, so that the compiler still knows that nothing else can lie there. */
    #define bn_aligned(scratch) ((void *)((char *)(scratch) + (-(uintptr_t)(scratch) & 63)))

    /* Ask for memory that is to be read soon, into the second-level cache. */
    static inline void bn_fetch(const void *source, size_t bytes) {
    #if defined(__GNUC__)
        for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)source + i, 0, 2);
    #endif
    }

    /* Before a caller whose code is SSE's: dirty upper halves of the vector registers slow it. */
    static inline void bn_clear_vectors(void) {
    #if defined(__AVX__)
        _mm256_zeroupper();
    #endif
    }

    /* value where a > b, else 0: by an AND. Of a select, and of a mask whose zeros it knows, GCC
       makes a masked load, which waits for a. */
    #if defined(__AVX512F__) && defined(__GNUC__)
    static BN_OPAQUE long bn_nothing;  /* 0, which GCC does not know */
    #else
    enum { bn_nothing };
    #endif
    #define BN_WHERE(name, real, word) \\
        static inline real name(real value, real a, real b) { \\
            word bits; \\
            memcpy(&bits, &value, sizeof bits); \\
            bits &= a > b ? ~(word)0 : (word)bn_nothing; \\
            memcpy(&value, &bits, sizeof bits); \\
            return value; \\
        }
    BN_WHERE(bn_where_float, float, uint32_t)
    BN_WHERE(bn_where_double, double, uint64_t)

    static inline uint32_t bn_float_bits(float value) {
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        return bits;
    }

    /* NaN where there is doubt. GCC must not know its value: it would then select after the
       conversion to double, in twice as many vectors. */
    static BN_OPAQUE float bn_nan = NAN;
    static inline float bn_doubted(float value, uint32_t doubt) {
        return doubt ? bn_nan : value;
    }

    /* Which of 8*bytes values are positive, a bit each from the lowest of a byte on. */
    static inline void bn_sign_floats(unsigned char *bits, const float *y, size_t bytes) {
        size_t i = 0;
    #if defined(__AVX512F__)
        for (; i + 2 <= bytes; i += 2) {
            const __mmask16 some = _mm512_cmp_ps_mask(
                _mm512_loadu_ps(y + 8 * i), _mm512_setzero_ps(), _CMP_GT_OQ);
            memcpy(bits + i, &some, 2);
        }
    #endif
        for (; i < bytes; i++) {
    #if defined(__AVX__)
            bits[i] = (unsigned char)_mm256_movemask_ps(
                _mm256_cmp_ps(_mm256_loadu_ps(y + 8 * i), _mm256_setzero_ps(), _CMP_GT_OQ));
    #else
            unsigned some = 0;
            for (int k = 0; k < 8; k++) some |= (unsigned)(y[8 * i + k] > 0) << k;
            bits[i] = (unsigned char)some;
    #endif
        }
    }

    static inline void bn_sign_doubles(unsigned char *bits, const double *y, size_t bytes) {
        for (size_t i = 0; i < bytes; i++) {
    #if defined(__AVX__)
            const __m256d zero = _mm256_setzero_pd();
            bits[i] = (unsigned char)(
                _mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(y + 8 * i), zero, _CMP_GT_OQ))
                | _mm256_movemask_pd(
                    _mm256_cmp_pd(_mm256_loadu_pd(y + 8 * i + 4), zero, _CMP_GT_OQ)) << 4);
    #else
            unsigned some = 0;
            for (int k = 0; k < 8; k++) some |= (unsigned)(y[8 * i + k] > 0) << k;
            bits[i] = (unsigned char)some;
    #endif
        }
    }

    #if defined(__AVX2__)
    /* Bits from bit `at` on: 25 of them at the least. */
    static inline uint32_t bn_bits_at(const unsigned char *bits, size_t at) {
        uint32_t some;
        memcpy(&some, bits + at / 8, sizeof some);
        return some >> at % 8;
    }
    #endif

    /* Copy those of `count` values whose bit is set, and 0 for the others. The bits begin at bit
       `at`, from the lowest of a byte on; up to four bytes after the last one are read. */
    static inline void bn_open_floats(
            float *to, const float *from, const unsigned char *bits, size_t at, size_t count) {
        size_t i = 0;
    #if defined(__AVX512DQ__)
        for (; i + 16 <= count; i += 16)
            _mm512_storeu_si512(to + i, _mm512_and_si512(
                _mm512_movm_epi32((__mmask16)bn_bits_at(bits, at + i)),
                _mm512_loadu_si512(from + i)));
        const __mmask16 left = (__mmask16)((1 << (count - i)) - 1);
        _mm512_mask_storeu_ps(to + i, left, _mm512_maskz_loadu_ps(
            left & (__mmask16)bn_bits_at(bits, at + i), from + i));
        return;
    #elif defined(__AVX2__)
        const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        for (; i + 8 <= count; i += 8) {
            const __m256i some = _mm256_set1_epi32((int)bn_bits_at(bits, at + i));
            const __m256i open = _mm256_cmpeq_epi32(_mm256_and_si256(some, each), each);
            _mm256_storeu_ps(
                to + i, _mm256_and_ps(_mm256_castsi256_ps(open), _mm256_loadu_ps(from + i)));
        }
    #endif
        for (; i < count; i++)
            to[i] = bits[(at + i) / 8] >> (at + i) % 8 & 1 ? from[i] : 0;
    }

    static inline void bn_open_doubles(
            double *to, const double *from, const unsigned char *bits, size_t at, size_t count) {
        size_t i = 0;
    #if defined(__AVX512DQ__)
        for (; i + 8 <= count; i += 8)
            _mm512_storeu_si512(to + i, _mm512_and_si512(
                _mm512_movm_epi64((__mmask8)bn_bits_at(bits, at + i)),
                _mm512_loadu_si512(from + i)));
        const __mmask8 left = (__mmask8)((1 << (count - i)) - 1);
        _mm512_mask_storeu_pd(to + i, left, _mm512_maskz_loadu_pd(
            left & (__mmask8)bn_bits_at(bits, at + i), from + i));
        return;
    #elif defined(__AVX2__)
        const __m256i each = _mm256_setr_epi64x(1, 2, 4, 8);
        for (; i + 4 <= count; i += 4) {
            const __m256i some = _mm256_set1_epi64x(bn_bits_at(bits, at + i));
            const __m256i open = _mm256_cmpeq_epi64(_mm256_and_si256(some, each), each);
            _mm256_storeu_pd(
                to + i, _mm256_and_pd(_mm256_castsi256_pd(open), _mm256_loadu_pd(from + i)));
        }
    #endif
        for (; i < count; i++)
            to[i] = bits[(at + i) / 8] >> (at + i) % 8 & 1 ? from[i] : 0;
    }

    /* A flag that any thread may raise. */
    static inline void bn_raise_flag(int *flag) {
    #if defined(__GNUC__)
        __atomic_store_n(flag, 1, __ATOMIC_RELAXED);
    #else
        *(volatile int *)flag = 1;
    #endif
    }

    static inline void bn_stream_end(void) {
    #if BN_STREAMS
        _mm_sfence();
    #endif
    }
    """
    ctypedef double *unshared "double *__restrict"  # what no other argument points to
    float[::1] float_row "bn_row"(
        const void *start, Py_ssize_t width, Py_ssize_t size) noexcept nogil
    double[::1] double_row "bn_row"(
        const void *start, Py_ssize_t width, Py_ssize_t size) noexcept nogil
    float[:, ::1] float_rows "bn_rows"(
        const void *start, Py_ssize_t rows, Py_ssize_t width, Py_ssize_t bytes,
        Py_ssize_t size) noexcept nogil
    double[:, ::1] double_rows "bn_rows"(
        const void *start, Py_ssize_t rows, Py_ssize_t width, Py_ssize_t bytes,
        Py_ssize_t size) noexcept nogil
    float[:, :, ::1] float_array "bn_array"(
        const void *start, Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner,
        Py_ssize_t size) noexcept nogil
    double[:, :, ::1] double_array "bn_array"(
        const void *start, Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner,
        Py_ssize_t size) noexcept nogil
    void stream "bn_stream"(void *target, const void *source, size_t size) noexcept nogil
    void raise_flag "bn_raise_flag"(int *flag) noexcept nogil
    void end_streaming "bn_stream_end"() noexcept nogil
    void clear_vectors "bn_clear_vectors"() noexcept nogil
    void fetch "bn_fetch"(const void *source, size_t size) noexcept nogil
    void *aligned "bn_aligned"(void *scratch) noexcept nogil
    float where_float "bn_where_float"(float value, float a, float b) noexcept nogil
    double where_double "bn_where_double"(double value, double a, double b) noexcept nogil
    unsigned float_bits "bn_float_bits"(float value) noexcept nogil
    float doubted_float "bn_doubted"(float value, unsigned doubt) noexcept nogil
    void sign_floats "bn_sign_floats"(
        unsigned char *bits, const float *y, size_t bytes) noexcept nogil
    void sign_doubles "bn_sign_doubles"(
        unsigned char *bits, const double *y, size_t bytes) noexcept nogil
    void open_floats "bn_open_floats"(
        float *to, const float *source, const unsigned char *bits, size_t at,
        size_t count) noexcept nogil
    void open_doubles "bn_open_doubles"(
        double *to, const double *source, const unsigned char *bits, size_t at,
        size_t count) noexcept nogil
    const char *C_FLAGS "BN_CY_FLAGS"
    const double LARGEST "DBL_MAX"
    const bint STREAMS "BN_STREAMS"  # whether there are stores past the cache

cdef enum:
    LINE = 16  # floats of a cache line


cdef inline floating[::1] row_of(const floating *start, Py_ssize_t width) noexcept nogil:
    """A view of so many values."""
    if floating is float:
        return float_row(start, width, sizeof(float))
    else:
        return double_row(start, width, sizeof(double))


cdef inline floating[:, ::1] rows_of(
    const floating *start, Py_ssize_t rows, Py_ssize_t width, Py_ssize_t stride,
) noexcept nogil:
    """A view of rows of `width` values that begin `stride` values after each other."""
    if floating is float:
        return float_rows(start, rows, width, stride * <Py_ssize_t>sizeof(float), sizeof(float))
    else:
        return double_rows(start, rows, width, stride * <Py_ssize_t>sizeof(double), sizeof(double))


cdef inline floating[:, ::1] tile(
    const floating[:, ::1] rows, Py_ssize_t i, Py_ssize_t j, Py_ssize_t count, Py_ssize_t width,
) noexcept nogil:
    """A view of `count` rows of a view from row i on, and of `width` columns from j on."""
    if floating is float:
        return float_rows(&rows[i, j], count, width, rows.strides[0], sizeof(float))
    else:
        return double_rows(&rows[i, j], count, width, rows.strides[0], sizeof(double))


cdef inline floating[:, :, ::1] array_of(const floating *start, const Shape *shape) noexcept nogil:
    """A view of a whole array; of none where there is none."""
    cdef Py_ssize_t outer = 0 if start == NULL else shape.outer
    if floating is float:
        return float_array(start, outer, shape.features, shape.inner, sizeof(float))
    else:
        return double_array(start, outer, shape.features, shape.inner, sizeof(double))


cdef inline floating[:, :, ::1] array_like(
    const floating *start, const floating[:, :, ::1] array,
) noexcept nogil:
    """A view of memory that is shaped as an array."""
    if floating is float:
        return float_array(start, array.shape[0], array.shape[1], array.shape[2], sizeof(float))
    else:
        return double_array(start, array.shape[0], array.shape[1], array.shape[2], sizeof(double))


cdef inline floating[::1] parameter_of(const floating *start, const Shape *shape) noexcept nogil:
    """A view of one value a feature; of none where there is none."""
    return row_of(start, 0 if start == NULL else shape.features)
