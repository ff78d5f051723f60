// Products of rows with weights in any format, and the helpers that all blocks share. Included by head.c, llama.c and mamba2.c.
//
// Activations are float32 in every weight format. A row's sums are added in the same order however many rows there are, so
// a chunk gives bit for bit what its tokens give one by one.

#pragma once
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef int16_t i16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef int8_t s8x16 __attribute__((vector_size(16)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));

enum { FLOAT32, BFLOAT16, INT8, INT4 };

typedef struct {
    int64_t kind, rows, columns;
    const void *w;       // INT4: byte j of a group of 32 holds weight j in its low half, weight j + 16 in its high half
    const float *scale;  // INT8: one a row; INT4: one a group
    const float *low;    // INT4: one a group
    const float *bias;   // or NULL
} Weight;

static inline v8 load(const float *p) {
    v8 v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline i16x16 load16(const int16_t *p) {
    i16x16 v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline float sum(v8 v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

// Eight numbers whose sum is the dot product.
static inline v8 dots(const float *a, const float *b, int64_t n) {
    v8 acc = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) acc += load(a + i) * load(b + i);
    for (; i < n; i++) acc[0] += a[i] * b[i];
    return acc;
}

static inline float dot(const float *a, const float *b, int64_t n) { return sum(dots(a, b, n)); }

static inline float exp_(float x) {  // Cephes: within 2 units in the last place
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = floorf(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

// Compilers do not find these two instructions by themselves.
#ifdef __AVX2__
#include <immintrin.h>
static inline i16x16 widen(s8x16 v) { return (i16x16)_mm256_cvtepi8_epi16((__m128i)v); }
static inline i32x8 add_pairs(i16x16 a, i16x16 b) { return (i32x8)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#else
static inline i16x16 widen(s8x16 v) { return __builtin_convertvector(v, i16x16); }
static inline i32x8 add_pairs(i16x16 a, i16x16 b) {
    i32x8 sums;
    for (int i = 0; i < 8; i++) sums[i] = (int32_t)a[2 * i] * b[2 * i] + (int32_t)a[2 * i + 1] * b[2 * i + 1];
    return sums;
}
#endif

// Rows that weights are multiplied with, `stride` apart. For integer weights they are 16-bit integers as well, with a
// scale for every 32. Rounding loses a hundred thousandth of the largest; twice as many products fit in an instruction.
typedef struct {
    const float *x;
    int64_t stride, groups;
    const int16_t *q;
    const float *scale, *sums;
} Rows;

static Rows prepare(const Weight *m, const float *x, int64_t stride, int64_t R, float *local) {
    const int64_t K = m->columns, G = K / 32;
    float *scale = local, *sums = local + R * G;
    int16_t *q = (int16_t *)(local + 2 * R * G);
    if (m->kind == INT8 || m->kind == INT4)
        for (int64_t i = 0; i < R * G; i++) {
            const float *p = x + i / G * stride + i % G * 32;
            float most = 1e-30f;
            for (int k = 0; k < 32; k++) most = fabsf(p[k]) > most ? fabsf(p[k]) : most;
            sums[i] = sum((load(p) + load(p + 8)) + (load(p + 16) + load(p + 24)));
            scale[i] = most / 32767 + 0 * sums[i];  // keeps a NaN, which an integer cannot hold
            const float factor = 32767 / most;
            for (int k = 0; k < 32; k++) q[32 * i + k] = (int16_t)(p[k] * factor + (p[k] < 0 ? -0.5f : 0.5f));
        }
    return (Rows){x, stride, G, q, scale, sums};
}

// Eight weights of row `w` from column `k` on, as float32.
static inline v8 weights(int64_t kind, const char *w, int64_t k) {
    if (kind == FLOAT32) return load((const float *)w + k);
    u16x8 v;
    memcpy(&v, w + 2 * k, sizeof v);
    return (v8)(__builtin_convertvector(v, i32x8) << 16);
}

// Row n of a weight times T rows of x from row r on.
static inline __attribute__((always_inline)) void row_times(
    const Weight *m, int64_t n, const Rows *x, int64_t r, float *out, int64_t kind, const int T) {
    const int64_t K = m->columns, G = x->groups;
    v8 acc[4] = {{0}};
    if (kind == INT8 || kind == INT4) {
        const char *w = (const char *)m->w + n * (kind == INT8 ? K : K / 2);
        for (int64_t g = 0; g < G; g++) {
            s8x16 a, b;
            memcpy(&a, w + (kind == INT8 ? 32 : 16) * g, sizeof a);
            if (kind == INT8) {
                memcpy(&b, w + 32 * g + 16, sizeof b);
            } else {
                b = (s8x16)((u8x16)a >> 4);
                a &= 15;
            }
            const i16x16 low = widen(a), high = widen(b);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const int16_t *q = x->q + ((r + t) * G + g) * 32;
                const v8 d = __builtin_convertvector(add_pairs(low, load16(q)) + add_pairs(high, load16(q + 16)), v8);
                acc[t] += d * (x->scale[(r + t) * G + g] * (kind == INT4 ? m->scale[n * G + g] : 1.0f));
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; t++)
            out[t] = kind == INT8 ? sum(acc[t]) * m->scale[n]
                                  : sum(acc[t] + dots(m->low + n * G, x->sums + (r + t) * G, G));
    } else {
        const char *w = (const char *)m->w + n * K * (kind == FLOAT32 ? 4 : 2);
        const float *p = x->x + r * x->stride;
        v8 more[4] = {{0}};  // two sums, so that one need not wait for the other
        int64_t k = 0;
        for (; k + 16 <= K; k += 16) {
            const v8 a = weights(kind, w, k), b = weights(kind, w, k + 8);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                acc[t] += a * load(p + t * x->stride + k);
                more[t] += b * load(p + t * x->stride + k + 8);
            }
        }
        if (k < K) {
            const v8 a = weights(kind, w, k);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) acc[t] += a * load(p + t * x->stride + k);
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) out[t] = sum(acc[t] + more[t]);
    }
    if (m->bias)
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) out[t] += m->bias[n];
}

// One function for each kind and each T, so that both are constants in its loops.
typedef void Times(const Weight *m, int64_t n, const Rows *x, int64_t r, float *out);
#define TIMES(kind, T)                                                                                               \
    static __attribute__((noinline)) void kind##_##T(const Weight *m, int64_t n, const Rows *x, int64_t r, float *out) { \
        row_times(m, n, x, r, out, kind, T);                                                                         \
    }
#define KIND(kind) TIMES(kind, 1) TIMES(kind, 2) TIMES(kind, 3) TIMES(kind, 4)
KIND(FLOAT32) KIND(BFLOAT16) KIND(INT8) KIND(INT4)
#define ROW(kind) {0, kind##_1, kind##_2, kind##_3, kind##_4}
static Times *const times[4][5] = {ROW(FLOAT32), ROW(BFLOAT16), ROW(INT8), ROW(INT4)};

// Rows `from` to `to` - 1 of the weight times R rows of x. The results go to y, whose rows stand `stride` apart, or are
// added to it.
static void product(const Weight *m, Rows x, int64_t R, float *y, int64_t stride, int add, int64_t from, int64_t to) {
    for (int64_t first = 0; first < R; first += 64) {  // 64 rows of x fit in the cache
        const int64_t last = R < first + 64 ? R : first + 64;
        for (int64_t n = from; n < to; n++)
            for (int64_t r = first; r < last;) {
                float out[4];
                const int64_t T = last - r >= 4 ? 4 : last - r;
                times[m->kind][T](m, n, &x, r, out);
                for (int64_t t = 0; t < T; t++, r++) y[r * stride + n] = add ? y[r * stride + n] + out[t] : out[t];
            }
    }
}

static inline void norm(const float *x, const float *weight, float eps, float *out, int64_t n) {
    float factor = 1.0f / sqrtf(dot(x, x, n) / n + eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
}

static void share(int64_t n, int t, int threads, int64_t *from, int64_t *to) {
    *from = n * t / threads;
    *to = n * (t + 1) / threads;
}

// Memory of one call: floats that all threads share, then `own` floats for each thread, enough for R · columns of the widest
// weight.
typedef struct {
    float *floats;
    int64_t own, threads;
} Scratch;
