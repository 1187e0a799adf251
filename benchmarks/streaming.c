/* How fast this machine streams memory: the yardstick of the benchmark. It shares nothing
 * with the package, because a yardstick must not be made of what it measures.
 *
 * Arrays start on a 64-byte boundary; n is a number of 64-byte lines.
 */
#include <stddef.h>

#define LINE 16 /* floats */

#if defined(__AVX512F__)
#include <immintrin.h>
typedef __m512 vec;
#define WIDTH 16
#define ZERO _mm512_setzero_ps
#define LOAD _mm512_load_ps
#define ADD _mm512_add_ps
#define STREAM _mm512_stream_ps
#elif defined(__AVX__)
#include <immintrin.h>
typedef __m256 vec;
#define WIDTH 8
#define ZERO _mm256_setzero_ps
#define LOAD _mm256_load_ps
#define ADD _mm256_add_ps
#define STREAM _mm256_stream_ps
#elif defined(__SSE2__)
#include <immintrin.h>
typedef __m128 vec;
#define WIDTH 4
#define ZERO _mm_setzero_ps
#define LOAD _mm_load_ps
#define ADD _mm_add_ps
#define STREAM _mm_stream_ps
#else
#error "non-temporal stores are written for x86-64"
#endif

/* Sum every float of a: the sum is wanted only so that the reads are made. */
float stream_read(const float *a, size_t n, int threads)
{
    float total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
    for (int t = 0; t < threads; t++) {
        const float *end = a + LINE * (n * (t + 1) / threads);
        vec sum[LINE / WIDTH * 4];
        const int lanes = sizeof sum / sizeof *sum;
        for (int k = 0; k < lanes; k++)
            sum[k] = ZERO();
        const float *p = a + LINE * (n * t / threads);
        for (; p + 4 * LINE <= end; p += 4 * LINE)
            for (int k = 0; k < lanes; k++)
                sum[k] = ADD(sum[k], LOAD(p + k * WIDTH));
        for (; p < end; p += WIDTH)
            sum[0] = ADD(sum[0], LOAD(p));
        for (int k = 1; k < lanes; k++)
            sum[0] = ADD(sum[0], sum[k]);
        total += ((const float *)sum)[0];
    }
    return total;
}

/* c = a + b with stores that do not read c's lines first. */
void stream_add(const float *a, const float *b, float *c, size_t n, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; t++) {
        const size_t end = LINE * (n * (t + 1) / threads);
        for (size_t i = LINE * (n * t / threads); i < end; i += WIDTH)
            STREAM(c + i, ADD(LOAD(a + i), LOAD(b + i)));
        _mm_sfence();
    }
}

/* b = a, likewise. */
void stream_copy(const float *a, float *b, size_t n, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; t++) {
        const size_t end = LINE * (n * (t + 1) / threads);
        for (size_t i = LINE * (n * t / threads); i < end; i += WIDTH)
            STREAM(b + i, LOAD(a + i));
        _mm_sfence();
    }
}
