// Products of rows with weights in any format, and the helpers that all blocks share. For head.c, llama.c and mamba2.c.
//
// A row's sums are added in the same order however many rows there are, so a chunk of any length gives bit for bit what its
// tokens give one by one, and no sequence depends on its neighbours. What rows are multiplied as:
//
// | weights | rows |
// |---------|------|
// | float32 | float32 |
// | bfloat16 | bfloat16 where the processor multiplies it (AVX512-BF16), else float32 |
// | int8 | 16-bit integers with a scale for every BLOCK columns |
// | int4 | bfloat16 where the processor multiplies it, as are the weights then; else as with int8 |

#pragma once
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define WIDE 1
#define LANES 16  // float32 numbers in a vector
#else
#define WIDE 0
#define LANES 8
#endif
#if WIDE && defined(__AVX512BF16__)
#define MULTIPLIES_BFLOAT16 1
#else
#define MULTIPLIES_BFLOAT16 0
#endif
#if WIDE || defined(__AVX2__)
#include <immintrin.h>
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef int16_t vs __attribute__((vector_size(4 * LANES)));       // twice LANES
typedef int8_t half_vs __attribute__((vector_size(2 * LANES)));   // as many bytes as vs has numbers
typedef uint8_t nibbles __attribute__((vector_size(16)));
typedef uint16_t half_vf __attribute__((vector_size(2 * LANES)));  // LANES bfloat16 numbers

#if WIDE
static const vi COUNT = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
static const vi COUNT = {0, 1, 2, 3, 4, 5, 6, 7};
#endif

enum { FLOAT32, BFLOAT16, INT8, INT4 };
// Columns with one scale, of int4 weights and of rows; columns multiplied in one go; floats of unpacked int4 weights.
enum { GROUP = 32, BLOCK = 128, DEPTH = 2048, PANEL = 1 << 15 };

typedef struct {
    int64_t kind, rows, columns;
    const void *w;       // INT4: byte j of a group of 32 holds weight j in its low half, weight j + 16 in its high half
    const float *scale;  // INT8: one a row; INT4: one a group
    const float *low;    // INT4: one a group
    const float *bias;   // or NULL
} Weight;

// Memory of one call: floats that all threads share, then `own` floats for each thread, of which the first PANEL are for
// `product`.
typedef struct {
    float *floats;
    int64_t own, threads;
} Scratch;

static inline int64_t min_(int64_t a, int64_t b) { return a < b ? a : b; }

static inline vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

// The first n numbers, at most LANES, and zeros.
static inline vf load_up_to(const float *p, int64_t n) {
    if (n >= LANES) return load(p);
#if WIDE
    return (vf)_mm512_maskz_loadu_ps((1u << n) - 1, p);
#else
    vf v = {0};
    for (int64_t i = 0; i < n; i++) v[i] = p[i];
    return v;
#endif
}

static inline void store_up_to(float *p, vf v, int64_t n) {
    if (n >= LANES) {
        store(p, v);
        return;
    }
#if WIDE
    _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v);
#else
    for (int64_t i = 0; i < n; i++) p[i] = v[i];
#endif
}

// a · b + c with one rounding, where the processor can. Elsewhere products and sums are rounded one by one
// (-ffp-contract=off): if the compiler chose, the same sum could be rounded differently in two places.
static inline vf fma_(vf a, vf b, vf c) {
#if WIDE
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

static inline vf all(float x) { return x - (vf){0}; }

enum { EIGHT = 8 };  // vectors that are summed at once

// Sums of vectors. `sum` and `sums_of`, for EIGHT vectors, add the lanes in the same order.
#if WIDE
static inline float sum(vf v) {
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return c[0] + c[1];
}

static inline void sums_of(const vf *v, float *out) {
    __m512 pairs[4], fours[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
        pairs[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const __m512 a = pairs[2 * i], b = pairs[2 * i + 1];
        fours[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    }
    const __m512 a = fours[0], b = fours[1];
    const __m512 eights = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
    const __m512 all = _mm512_add_ps(eights, _mm512_shuffle_ps(eights, eights, 0xB1));
    // Lanes 0, 4, 8, 12 hold the sums of the first four, and lanes 2, 6, 10, 14 those of the others.
    const __m512i places = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 4, 8, 12, 2, 6, 10, 14);
    _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(places, all)));
}
#else
static inline float sum(vf v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

static inline void sums_of(const vf *v, float *out) {
    for (int i = 0; i < EIGHT; i++) out[i] = sum(v[i]);
}
#endif

static inline float largest(vf v) {
#if WIDE
    return _mm512_reduce_max_ps((__m512)v);
#else
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

// LANES numbers whose sum is the dot product.
static inline vf dots(const float *a, const float *b, int64_t n) {
    vf acc = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) acc = fma_(load(a + i), load(b + i), acc);
    return i < n ? fma_(load_up_to(a + i, n - i), load_up_to(b + i, n - i), acc) : acc;
}

// Lanes of a where the mask is -1, of b where it is 0.
static inline vf choose(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

// x within bounds; a NaN stays.
static inline vf clamped(vf x, float low, float high) {
#if WIDE
    return (vf)_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), (__m512)x));
#else
    x = choose(x < low, all(low), x);
    return choose(x > high, all(high), x);
#endif
}

static inline vf exp_(vf x) {  // Cephes: within 2 units in the last place
    x = clamped(x, -87.0f, 88.0f);
    const vf scaled = fma_(x, all(1.44269504f), all(0.5f));
    vi n = __builtin_convertvector(scaled, vi);
    n += __builtin_convertvector(n, vf) > scaled;  // rounded down: a comparison that holds is -1
    const vf whole = __builtin_convertvector(n, vf);
    const vf r = fma_(whole, all(2.12194440e-4f), fma_(whole, all(-0.693359375f), x));
    vf p = fma_(all(1.9875691500e-4f), r, all(1.3981999507e-3f));
    p = fma_(p, r, all(8.3334519073e-3f));
    p = fma_(p, r, all(4.1665795894e-2f));
    p = fma_(p, r, all(1.6666665459e-1f));
    p = fma_(p, r, all(5.0000001201e-1f));
    p = fma_(p * r, r, r + 1.0f);
    return p * (vf)((n + 127) << 23);
}

static inline vf silu(vf x) { return x / (1.0f + exp_(-x)); }

// Dot products of 16-bit integers: lane i adds the products of numbers 2 i and 2 i + 1.
static inline vi dot_pairs(vi acc, vs a, vs b) {
#if WIDE && defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif WIDE
    return acc + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return acc + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    for (int i = 0; i < LANES; i++) acc[i] += (int32_t)a[2 * i] * b[2 * i] + (int32_t)a[2 * i + 1] * b[2 * i + 1];
    return acc;
#endif
}

static inline vs widen(half_vs v) {
#if WIDE
    return (vs)_mm512_cvtepi8_epi16((__m256i)v);
#elif defined(__AVX2__)
    return (vs)_mm256_cvtepi8_epi16((__m128i)v);
#else
    return __builtin_convertvector(v, vs);
#endif
}

// Rows as they are multiplied, `stride` apart. For integer weights and where bfloat16 is multiplied, `q` holds them in 16 bits,
// `width` numbers a row, zeros after the last column.
typedef struct {
    const float *x;
    int64_t stride, width;
    const int16_t *q;
    const float *scale, *sums;  // of each block of a row; of each group of a row
    float *panel;               // the calling thread's own PANEL floats
} Rows;

static inline int narrow(int64_t kind) {
    return kind == INT8 || kind == INT4 || (kind == BFLOAT16 && MULTIPLIES_BFLOAT16);
}

static inline int64_t blocks_in(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }

// Where the narrow rows of x (R, K) go: `room` has at least R · (K + 64) floats.
static Rows rows_in(const Weight *m, const float *x, int64_t stride, int64_t R, float *room, float *panel) {
    const int64_t K = m->columns, width = (K + 31) / 32 * 32;
    float *scale = room, *sums = scale + R * blocks_in(K);
    return (Rows){x, stride, width, (const int16_t *)(sums + R * (width / GROUP)), scale, sums, panel};
}

// One block of a row as 16-bit integers. Rounding loses a thirty-thousandth of the block's largest.
static inline void quantise(const float *p, int64_t n, int16_t *q, float *scale) {
    float most = 1e-30f, nothing = 0;
    for (int64_t k = 0; k < n; k++) most = fabsf(p[k]) > most ? fabsf(p[k]) : most;
    for (int64_t k = 0; k < n; k++) nothing += 0 * p[k];
    *scale = most / 32767 + nothing;  // keeps a NaN, which an integer cannot hold
    const float factor = 32767 / most;
    for (int64_t k = 0; k < n; k++) q[k] = (int16_t)(int32_t)(p[k] * factor + (p[k] < 0 ? -0.5f : 0.5f));
}

// Makes row r narrow, for a weight that is multiplied with narrow rows.
static void pack(const Weight *m, const Rows *x, int64_t r) {
    const int64_t K = m->columns, B = blocks_in(K), G = x->width / GROUP;
    const float *p = x->x + r * x->stride;
    int16_t *q = (int16_t *)x->q + r * x->width;
#if MULTIPLIES_BFLOAT16
    if (m->kind != INT8) {
        for (int64_t k = 0; k < K; k += 32) {
            const vf high = k + LANES < K ? load_up_to(p + k + LANES, K - k - LANES) : (vf){0};
            const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)load_up_to(p + k, K - k));
            memcpy(q + k, &both, sizeof both);
        }
        return;
    }
#endif
    float *scale = (float *)x->scale + r * B, *sums = (float *)x->sums + r * G;
    for (int64_t b = 0; b < B; b++) quantise(p + b * BLOCK, min_(BLOCK, K - b * BLOCK), q + b * BLOCK, scale + b);
    for (int64_t g = 0; g < G; g++) {
        vf s = {0};
        for (int64_t k = 0; k < GROUP; k += LANES) s += load(p + g * GROUP + k);
        sums[g] = sum(s);
    }
}

// `count` weights of row `w` from column `k` on, as float32.
static inline vf widened(int64_t kind, const char *w, int64_t k, int64_t count) {
    if (kind == FLOAT32) return load_up_to((const float *)w + k, count);
    half_vf v = {0};
    if (count >= LANES) memcpy(&v, w + 2 * k, sizeof v);
    else memcpy(&v, w + 2 * k, 2 * count);
    return (vf)(__builtin_convertvector(v, vi) << 16);
}

// The 32 weights of group g of an integer row, as 16-bit integers: one vector, or two.
static inline void group(int64_t kind, const char *w, int64_t g, vs *out) {
    if (kind == INT8) {
        for (int i = 0; i < 16 / LANES; i++) {
            half_vs v;
            memcpy(&v, w + GROUP * g + 2 * LANES * i, sizeof v);
            out[i] = widen(v);
        }
        return;
    }
    nibbles both;
    memcpy(&both, w + GROUP / 2 * g, sizeof both);
#if WIDE
    const __m256i words = _mm256_cvtepu8_epi16((__m128i)both);
    const __m512i pair = _mm512_inserti64x4(_mm512_castsi256_si512(words), _mm256_srli_epi16(words, 4), 1);
    out[0] = (vs)_mm512_and_si512(pair, _mm512_set1_epi16(15));
#else
    out[0] = widen((half_vs)(both & 15));
    out[1] = widen((half_vs)(both >> 4));
#endif
}

#if MULTIPLIES_BFLOAT16
// 32 weights of a row from column k on, as bfloat16. Those of an int4 group are looked up in a table of its 16 values.
static inline __m512i in_bfloat16(const Weight *m, int64_t n, int64_t k) {
    const int64_t K = m->columns;
    if (m->kind == INT4) {
        const int64_t g = (n * K + k) / GROUP;
        const vf values = fma_(__builtin_convertvector(COUNT, vf), all(m->scale[g]), all(m->low[g]));
        const __m512i table = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh((__m512)values));
        const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)m->w + g));
        // Of an index the lowest five bits count, and the table stands there twice, so the high half need not be cleared.
        return _mm512_permutexvar_epi16(_mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1), table);
    }
    const int16_t *w = (const int16_t *)m->w + n * K + k;
    return k + 32 <= K ? _mm512_loadu_si512(w) : _mm512_maskz_loadu_epi16((1u << (K - k)) - 1, w);
}
#endif

// Asks for what will be needed soon: where several rows are read at once, the processor does not foresee it by itself.
static inline void expect(const void *place) { __builtin_prefetch(place); }

// Asks for group g of a row of integer weights, once a cache line: the row that is at least N further, and a few kilobytes.
static inline __attribute__((always_inline)) void expect_group(const Weight *m, int64_t kind, int64_t n, int64_t g, const int N) {
    const int64_t K = m->columns, at = (n + (K < 1024 ? 8 * N : K < 4096 ? 4 * N : N)) * (K / GROUP) + g;
    if (kind == INT8 && g % 2 == 0) expect((const char *)m->w + GROUP * at);
    if (kind == INT4 && g % 4 == 0) expect((const char *)m->w + GROUP / 2 * at);
    if (kind == INT4 && g % 16 == 0) expect(m->scale + at), expect(m->low + at);
}

// Where the results of a product go: rows `stride` apart. With `add`, they are added to what is there.
typedef struct {
    float *y;
    int64_t stride;
    int add;
} Out;

// N rows of a weight from row n on times T rows of x from row r on, over the columns `from` to `to` - 1.
typedef struct {
    const Weight *m;
    const Rows *x;
    int64_t n, r, from, to;
} Tile;

enum { MOST_WEIGHTS = 4, MOST_ROWS = 8 };  // of a tile
#define EACH_WEIGHT _Pragma("GCC unroll 4") for (int i = 0; i < N; i++)
#define EACH_ROW _Pragma("GCC unroll 8") for (int t = 0; t < T; t++)
#define ALWAYS static inline __attribute__((always_inline))

// The three ways to multiply. Each adds to N · T vectors, of which acc[t · N + i] is for row r + t and weight n + i; the sum of a
// vector's lanes is the result.
#if MULTIPLIES_BFLOAT16
ALWAYS void bfloat16_tile(const Tile *c, vf *acc, int64_t kind, const int N, const int T) {
    const int64_t K = c->m->columns, width = c->x->width;
    const int16_t *q = c->x->q + c->r * width;
    Weight known = *c->m;
    known.kind = kind;  // so that the compiler knows it
    for (int64_t k = c->from; k < c->to; k += 32) {
        __m512i v[MOST_WEIGHTS];
        EACH_WEIGHT v[i] = in_bfloat16(&known, c->n + i, k);
        if (kind == BFLOAT16) EACH_WEIGHT expect((const int16_t *)known.w + (c->n + N + i) * K + k);
        else EACH_WEIGHT expect_group(&known, kind, c->n + i, k / GROUP, N);
        EACH_ROW {
            const __m512bh p = (__m512bh)_mm512_loadu_si512(q + t * width + k);
            EACH_WEIGHT acc[t * N + i] = (vf)_mm512_dpbf16_ps((__m512)acc[t * N + i], (__m512bh)v[i], p);
        }
    }
}
#endif

ALWAYS void float_tile(const Tile *c, vf *acc, int64_t kind, const int N, const int T) {
    const int64_t K = c->m->columns, size = kind == FLOAT32 ? 4 : 2, stride = c->x->stride;
    const char *w = (const char *)c->m->w + c->n * K * size;
    const float *p = c->x->x + c->r * stride;
    for (int64_t k = c->from; k < c->to; k += LANES) {
        vf v[MOST_WEIGHTS];
        EACH_WEIGHT v[i] = widened(kind, w + i * K * size, k, c->to - k);
        EACH_WEIGHT expect(w + ((N + i) * K + k) * size);
        EACH_ROW {
            const vf part = load_up_to(p + t * stride + k, c->to - k);
            EACH_WEIGHT acc[t * N + i] = fma_(v[i], part, acc[t * N + i]);
        }
    }
}

// Integers are added up as such over a block (int8), or over a group (int4).
ALWAYS void integer_tile(const Tile *c, vf *acc, int64_t kind, const int N, const int T) {
    const Weight *m = c->m;
    const Rows *x = c->x;
    const int64_t K = m->columns, G = x->width / GROUP, B = blocks_in(K), row = kind == INT8 ? K : K / 2;
    const char *w = (const char *)m->w + c->n * row;
    const int16_t *q = x->q + c->r * x->width;
    for (int64_t b = c->from / BLOCK; b * BLOCK < c->to; b++) {
        const int64_t last = min_(c->to, (b + 1) * BLOCK) / GROUP;
        vi whole[MOST_ROWS * MOST_WEIGHTS] = {0};
        vf part[MOST_ROWS * MOST_WEIGHTS] = {0};
        for (int64_t g = b * BLOCK / GROUP; g < last; g++)
            EACH_WEIGHT {
                vs v[16 / LANES];
                expect_group(m, kind, c->n + i, g, N);
                group(kind, w + i * row, g, v);
                const vf scale = kind == INT4 ? all(m->scale[(c->n + i) * G + g]) : all(1);
                EACH_ROW {
                    vi d = kind == INT8 ? whole[t * N + i] : (vi){0};
                    for (int j = 0; j < 16 / LANES; j++) {
                        vs p;
                        memcpy(&p, q + t * x->width + GROUP * g + 2 * LANES * j, sizeof p);
                        d = dot_pairs(d, v[j], p);
                    }
                    if (kind == INT8) whole[t * N + i] = d;
                    else part[t * N + i] = fma_(__builtin_convertvector(d, vf), scale, part[t * N + i]);
                }
            }
        EACH_ROW EACH_WEIGHT {
            const vf d = kind == INT8 ? __builtin_convertvector(whole[t * N + i], vf) : part[t * N + i];
            acc[t * N + i] = fma_(d, all(x->scale[(c->r + t) * B + b]), acc[t * N + i]);
        }
    }
    if (kind == INT8) return;
    const int64_t first = c->from / GROUP, groups = (c->to - c->from) / GROUP;
    EACH_ROW EACH_WEIGHT
        acc[t * N + i] += dots(m->low + (c->n + i) * G + first, x->sums + (c->r + t) * G + first, groups);
}

ALWAYS void tile(const Tile *c, const Out *out, int64_t kind, const int N, const int T) {
    const Weight *m = c->m;
    vf acc[MOST_ROWS * MOST_WEIGHTS] = {0};
    float sums[MOST_ROWS * MOST_WEIGHTS], bias[MOST_WEIGHTS];
#if MULTIPLIES_BFLOAT16
    if (kind == BFLOAT16 || kind == INT4) bfloat16_tile(c, acc, kind, N, T);
    else
#endif
        if (kind == FLOAT32 || kind == BFLOAT16) float_tile(c, acc, kind, N, T);
        else integer_tile(c, acc, kind, N, T);
#pragma GCC unroll 4
    for (int j = 0; j < N * T; j += EIGHT) sums_of(acc + j, sums + j);
    EACH_WEIGHT bias[i] = m->bias && !c->from ? m->bias[c->n + i] : 0;
    EACH_ROW {
        float *y = out->y + (c->r + t) * out->stride + c->n;
        if (kind == INT8) EACH_WEIGHT sums[t * N + i] *= m->scale[c->n + i];
        if (out->add) EACH_WEIGHT y[i] += sums[t * N + i] + bias[i];
        else EACH_WEIGHT y[i] = sums[t * N + i] + bias[i];
    }
}

// One function for each kind, and each number of weights and of rows that is used, so that these are constants in its loops.
typedef void Multiply(const Tile *c, const Out *out);
#define TILE(kind, N, T) \
    static __attribute__((noinline)) void kind##_##N##_##T(const Tile *c, const Out *out) { tile(c, out, kind, N, T); }
#define TILES(kind, N, most) TILE(kind, N, 1) TILE(kind, N, 2) TILE(kind, N, 4) TILE(kind, N, most)
#define ROW(kind, N, most) {kind##_##N##_1, kind##_##N##_2, kind##_##N##_4, kind##_##N##_##most}
#define KIND(kind, N, most) TILES(kind, 1, most) TILES(kind, N, most)
#define FORM(kind, N, most) {N, most, {ROW(kind, 1, most), ROW(kind, N, most)}}
#if WIDE  // as many weights and rows as 32 registers hold
#define FLOAT_TILES(make, kind) make(kind, 4, 6)
#define INTEGER_TILES(make, kind) make(kind, 2, 8)
#else
#define FLOAT_TILES(make, kind) make(kind, 2, 5)
#define INTEGER_TILES(make, kind) make(kind, 2, 5)
#endif
FLOAT_TILES(KIND, FLOAT32) FLOAT_TILES(KIND, BFLOAT16) INTEGER_TILES(KIND, INT8) INTEGER_TILES(KIND, INT4)
static const struct {
    int64_t weights, rows;  // the most of a tile
    Multiply *tiles[2][4];  // [one weight, or the most][1, 2, 4 or the most rows]
} forms[4] = {
    FLOAT_TILES(FORM, FLOAT32), FLOAT_TILES(FORM, BFLOAT16), INTEGER_TILES(FORM, INT8), INTEGER_TILES(FORM, INT4),
};

// Bytes that are to come into the cache.
typedef struct {
    const char *from, *to;
} Next;

// Rows `from` to `to` - 1 of the weight, over the columns `first` to `last` - 1, times R rows of x. Meanwhile `next` is fetched.
static void strips(const Weight *m, const Rows *x, int64_t R, int64_t first, int64_t last, const Out *out, int64_t from, int64_t to,
                   Next next) {
    const int64_t several = forms[m->kind].weights, most = forms[m->kind].rows;
    const int64_t share = (next.to - next.from) / (((to - from) / several + 1) * (R / most + 1)) + 64;
    for (int64_t r = 0, T; r < R; r += T) {
        const int64_t left = R - r;
        const int form = left >= most ? 3 : left >= 4 ? 2 : left >= 2;
        T = form == 3 ? most : 1 << form;
        for (int64_t n = from, N; n < to; n += N) {
            N = to - n >= several ? several : 1;
            forms[m->kind].tiles[N > 1][form](&(Tile){m, x, n, r, first, last}, out);
            for (const char *stop = next.from + share; next.from < stop && next.from < next.to; next.from += 64) expect(next.from);
        }
    }
}

#if MULTIPLIES_BFLOAT16
// Unpacks rows `from` to `to` - 1 of an int4 weight over the columns `first` to `last` - 1, as a weight of its own.
static Weight unpacked(const Weight *m, int64_t first, int64_t last, int64_t from, int64_t to, float *panel) {
    const int64_t K = last - first;
    for (int64_t n = from; n < to; n++)
        for (int64_t k = 0; k < K; k += 32) _mm512_storeu_si512((int16_t *)panel + (n - from) * K + k, in_bfloat16(m, n, first + k));
    return (Weight){BFLOAT16, to - from, K, panel, NULL, NULL, m->bias && !first ? m->bias + from : NULL};
}
#endif

// For few rows: each weight is read once and in order.
static void product_of_few(const Weight *m, const Rows *x, int64_t R, Out out, int64_t from, int64_t to) {
    const int64_t K = m->columns, several = forms[m->kind].weights;
    const Out more = {out.y, out.stride, 1};
    for (int64_t n = from; n < to; n += several)
        for (int64_t first = 0; first < K; first += DEPTH)
            strips(m, x, R, first, min_(K, first + DEPTH), first ? &more : &out, n, min_(to, n + several), (Next){NULL, NULL});
}

// For many rows: weights are cut into panels that stay in the cache while all rows pass, and int4 weights are unpacked once.
static void product_of_many(const Weight *m, const Rows *x, int64_t R, Out out, int64_t from, int64_t to) {
    static const int64_t bits[] = {32, 16, 8, 4}, unpacked_bits[] = {32, 16, 8, 16};
    const int64_t K = m->columns, row = K * bits[m->kind] / 8;
    for (int64_t first = 0; first < K; first += DEPTH, out.add = 1) {
        const int64_t last = min_(K, first + DEPTH), panel = PANEL * 32 / (unpacked_bits[m->kind] * (last - first)) / 4 * 4;
        for (int64_t n = from; n < to; n += panel) {
            const int64_t end = min_(to, n + panel);
            const char *weights = m->w;
            const Next next = {weights + end * row, weights + (K <= DEPTH ? min_(to, end + panel) : end) * row};
#if MULTIPLIES_BFLOAT16
            if (m->kind == INT4) {
                const Weight plain = unpacked(m, first, last, n, end, x->panel);
                const Out moved = {out.y + n, out.stride, out.add};
                Rows part = *x;
                part.q += first;
                strips(&plain, &part, R, 0, last - first, &moved, 0, end - n, next);
                continue;
            }
#endif
            strips(m, x, R, first, last, &out, n, end, next);
        }
    }
}

// Rows `from` to `to` - 1 of the weight times R rows of x. The results go to y, whose rows stand `stride` apart, or are
// added to it. The sum over the columns is made in pieces of DEPTH, for few rows as for many.
static void product(const Weight *m, Rows x, int64_t R, float *y, int64_t stride, int add, int64_t from, int64_t to) {
    (R > EIGHT ? product_of_many : product_of_few)(m, &x, R, (Out){y, stride, add}, from, to);
}

static inline void norm(const float *x, const float *weight, float eps, float *out, int64_t n) {
    const float factor = 1.0f / sqrtf(sum(dots(x, x, n)) / n + eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
}

static void share(int64_t n, int t, int threads, int64_t *from, int64_t *to) {
    *from = n * t / threads;
    *to = n * (t + 1) / threads;
}

// The rows of one thread are made narrow by it; every thread waits until all are.
static Rows prepare(const Weight *m, const float *x, int64_t stride, int64_t R, float *room, float *panel) {
    const Rows rows = rows_in(m, x, stride, R, room, panel);
    if (narrow(m->kind)) {
        for (int64_t r = omp_get_thread_num(); r < R; r += omp_get_num_threads()) pack(m, &rows, r);
#pragma omp barrier
    }
    return rows;
}
