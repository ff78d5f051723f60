// Vectors of LANES float32 numbers, and functions of them, with the compiler's vector types. The processor's
// own instructions are used where the compiler would not find them: AVX-512, AVX2, VNNI, BF16, NEON.

#pragma once
#include <math.h>
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
// A vector multiplies bytes with the instruction of its own width: AVX-VNNI has none for 64 bytes.
#if (WIDE && defined(__AVX512VNNI__)) || (!WIDE && defined(__AVXVNNI__))
#define VNNI 1
#else
#define VNNI 0
#endif
#if WIDE || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef int16_t vs __attribute__((vector_size(4 * LANES)));        // two numbers for each lane
typedef int8_t vb __attribute__((vector_size(4 * LANES)));         // four bytes for each lane
typedef int8_t quarter_vb __attribute__((vector_size(LANES)));     // LANES bytes
typedef uint16_t half_vf __attribute__((vector_size(2 * LANES)));  // LANES bfloat16 or float16 numbers

#if WIDE
static const vi COUNT = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
static const vi COUNT = {0, 1, 2, 3, 4, 5, 6, 7};
#endif

#define ALWAYS static inline __attribute__((always_inline))

static inline int64_t min_(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

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
#elif defined(__ARM_NEON)
    const float32x4x2_t x = vld1q_f32_x2((const float *)&a), y = vld1q_f32_x2((const float *)&b),
                        z = vld1q_f32_x2((const float *)&c);
    const float32x4x2_t sums = {
        {vfmaq_f32(z.val[0], x.val[0], y.val[0]), vfmaq_f32(z.val[1], x.val[1], y.val[1])}};
    vf out;
    memcpy(&out, &sums, sizeof out);
    return out;
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
#ifdef __AVX2__
    __m128 pairs[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m256 a = (__m256)v[2 * i], b = (__m256)v[2 * i + 1];
        pairs[i] = _mm_hadd_ps(_mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)),
                               _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1)));
    }
    _mm_storeu_ps(out, _mm_hadd_ps(pairs[0], pairs[1]));
    _mm_storeu_ps(out + 4, _mm_hadd_ps(pairs[2], pairs[3]));
#else
    for (int i = 0; i < EIGHT; i++) out[i] = sum(v[i]);
#endif
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

// Bit i is set if number i, of at most LANES, is not less than a bound. So it is also set for a NaN.
static inline uint32_t not_below(const float *p, int64_t n, float bound) {
    const vf v = load_up_to(p, n);
    const uint32_t first = n < LANES ? (1u << n) - 1 : (uint32_t)((1ull << LANES) - 1);
#if WIDE
    return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(bound), _CMP_NLT_UQ) & first;
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(bound), _CMP_NLT_UQ)) & first;
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= (uint32_t)!(v[i] < bound) << i;
    return bits & first;
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

static inline vf log_(
    vf x) {  // Cephes: of positive numbers that are not subnormal, within 2 units in the last place
    vi n = ((vi)x >> 23) - 126;
    vf r = (vf)(((vi)x & 0x007fffff) | 0x3f000000);  // 0.5 to 1
    const vi small = r < 0.707106781f;
    n += small;
    r = choose(small, r + r, r) - 1.0f;
    const vf square = r * r, whole = __builtin_convertvector(n, vf);
    vf p = fma_(all(7.0376836292e-2f), r, all(-1.1514610310e-1f));
    p = fma_(p, r, all(1.1676998740e-1f));
    p = fma_(p, r, all(-1.2420140846e-1f));
    p = fma_(p, r, all(1.4249322787e-1f));
    p = fma_(p, r, all(-1.6668057665e-1f));
    p = fma_(p, r, all(2.0000714765e-1f));
    p = fma_(p, r, all(-2.4999993993e-1f));
    p = fma_(p, r, all(3.3333331174e-1f));
    p = fma_(p * r, square, fma_(whole, all(-2.12194440e-4f), square * -0.5f));
    return fma_(whole, all(0.693359375f), r + p);
}

// log(1 + x), x > -1, with a correction for the digits of a small x that 1 + x loses.
static inline vf log1p_(vf x) {
    const vf one_more = 1.0f + x, kept = one_more - 1.0f;
    return choose(kept == 0.0f, x, log_(one_more) * (x / kept));
}

static inline vf silu(vf x) { return x / (1.0f + exp_(-x)); }
static inline vf tanh_(vf x) { return 1.0f - 2.0f / (1.0f + exp_(2.0f * x)); }

// GELU (arXiv 1606.08415) by its approximation with tanh.
static inline vf gelu(vf x) { return x / (1.0f + exp_(-1.5957691216f * (x + 0.044715f * x * x * x))); }

// y (n) becomes y · factors.
static inline void multiply_by(float *y, const float *factors, int64_t n) {
    for (int64_t k = 0; k < n; k += LANES)
        store_up_to(y + k, load_up_to(y + k, n - k) * load_up_to(factors + k, n - k), n - k);
}

// y (n) becomes y · silu(gate).
static inline void times_silu(float *y, const float *gate, int64_t n) {
    for (int64_t k = 0; k < n; k += LANES)
        store_up_to(y + k, load_up_to(y + k, n - k) * silu(load_up_to(gate + k, n - k)), n - k);
}

// The first n bfloat16 numbers, at most LANES, and zeros.
static inline vf from_bfloat16(const uint16_t *p, int64_t n) {
#if WIDE
    const __m256i v =
        n < LANES ? _mm256_maskz_loadu_epi16((1u << n) - 1, p) : _mm256_loadu_si256((const __m256i *)p);
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16);
#else
    half_vf v = {0};
    if (n >= LANES)
        memcpy(&v, p, sizeof v);
    else
        memcpy(&v, p, 2 * n);
#ifdef __AVX2__  // gcc 12 would take four instructions to convert
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)v), 16);
#else
    return (vf)(__builtin_convertvector(v, vi) << 16);
#endif
#endif
}

// Rounds to the nearest bfloat16 numbers; a NaN stays. Writes the first n, at most LANES.
static inline void to_bfloat16(uint16_t *p, vf v, int64_t n) {
    const vi bits = (vi)v, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const vi kept = (vi)choose(v != v, (vf)(bits | 0x10000), (vf)rounded);
    const half_vf halves = __builtin_convertvector((kept >> 16) & 0xffff, half_vf);
    if (n >= LANES)
        memcpy(p, &halves, sizeof halves);
    else
        memcpy(p, &halves, 2 * n);
}

// Float16 numbers as float32.
static inline vf from_float16(const uint16_t *p) {
#if WIDE
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__) && defined(__AVX2__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    half_vf v;
    memcpy(&v, p, sizeof v);
    const vi bits = __builtin_convertvector(v, vi);
    const vf size = (vf)((bits & 0x7fff) << 13) * 0x1p112f;  // the exponents are biased by 15 and by 127
    // The largest exponent is that of infinity and NaN.
    const vi large = ((bits & 0x7c00) == 0x7c00) & 0x7f800000;
    return (vf)((vi)size | large | (bits & 0x8000) << 16);
#endif
}

// The first n float16 numbers, at most LANES, and zeros.
static inline vf float16_up_to(const uint16_t *p, int64_t n) {
    if (n >= LANES) return from_float16(p);
    uint16_t some[LANES] = {0};
    memcpy(some, p, 2 * n);
    return from_float16(some);
}

// LANES bytes as float32.
static inline vf from_int8(const int8_t *p) {
#if WIDE
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    quarter_vb v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vf);
#endif
}

// Of a table of 16 bytes, those at places 0 to 15.
static inline vb look_up(const int8_t *table, vb places) {
#if WIDE
    const __m512i wide = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    return (vb)_mm512_shuffle_epi8(wide, (__m512i)places);
#elif defined(__AVX2__)
    const __m256i wide = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return (vb)_mm256_shuffle_epi8(wide, (__m256i)places);
#elif defined(__aarch64__)
    const int8x16_t all = vld1q_s8(table);
    const uint8x16x2_t at = vld1q_u8_x2((const uint8_t *)&places);
    const int8x16x2_t found = {{vqtbl1q_s8(all, at.val[0]), vqtbl1q_s8(all, at.val[1])}};
    memcpy(&places, &found, sizeof places);
    return places;
#else
    for (int i = 0; i < 4 * LANES; i++) places[i] = table[places[i]];
    return places;
#endif
}

// Lane i adds the products of bytes 4 i to 4 i + 3. `dot_small`: w is 0 to 63. `dot_bytes`: no byte is
// -128, and OFFSET times the sum of x must be subtracted from the result.
//
// `add_small` is the same as `dot_small`, but its sums are complete only when they are `widened`. Without VNNI
// they have 16 bits until then, which takes fewer instructions: IN_16_BITS is how many vectors may be added,
// where weights have so many bits.
#define OFFSET (VNNI ? 128 : 0)
#define IN_16_BITS(bits) ((bits) <= 4 ? 8 : (bits) == 5 ? 4 : 2)
#if VNNI
#if WIDE
static inline vi dot_small(vi acc, vb w, vb x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
}
#else
static inline vi dot_small(vi acc, vb w, vb x) {
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)x);
}
#endif
static inline vi dot_bytes(vi acc, vb w, vb x) { return dot_small(acc, w ^ -128, x); }
#elif defined(__AVX2__)
#if WIDE
static inline vi pairs_of(vb w, vb x) { return (vi)_mm512_maddubs_epi16((__m512i)w, (__m512i)x); }
static inline vi widened(vi sums) { return (vi)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(1)); }
static inline vb size_of(vb w) { return (vb)_mm512_abs_epi8((__m512i)w); }
static inline vb with_sign(vb x, vb w) {
    const __mmask64 below = _mm512_movepi8_mask((__m512i)w);
    return (vb)_mm512_mask_sub_epi8((__m512i)x, below, _mm512_setzero_si512(), (__m512i)x);
}
#else
static inline vi pairs_of(vb w, vb x) { return (vi)_mm256_maddubs_epi16((__m256i)w, (__m256i)x); }
static inline vi widened(vi sums) { return (vi)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)); }
static inline vb size_of(vb w) { return (vb)_mm256_abs_epi8((__m256i)w); }
static inline vb with_sign(vb x, vb w) { return (vb)_mm256_sign_epi8((__m256i)x, (__m256i)w); }
#endif
// A sum that is made now: gcc would do many products before the first sum, and keep them in memory.
#define IN_ORDER(sum)             \
    ({                            \
        __auto_type made = (sum); \
        __asm__("" : "+v"(made)); \
        (vi) made;                \
    })
static inline vi add_small(vi sums, vb w, vb x) { return IN_ORDER((vs)sums + (vs)pairs_of(w, x)); }
static inline vi dot_small(vi acc, vb w, vb x) { return IN_ORDER(acc + widened(pairs_of(w, x))); }
static inline vi dot_bytes(vi acc, vb w, vb x) { return dot_small(acc, size_of(w), with_sign(x, w)); }
#else
static inline vi dot_bytes(vi acc, vb w, vb x) {
#if defined(__ARM_FEATURE_DOTPROD)
    const int8x16x2_t u = vld1q_s8_x2((const int8_t *)&w), v = vld1q_s8_x2((const int8_t *)&x);
    const int32x4x2_t a = vld1q_s32_x2((const int32_t *)&acc);
    const int32x4x2_t sums = {
        {vdotq_s32(a.val[0], u.val[0], v.val[0]), vdotq_s32(a.val[1], u.val[1], v.val[1])}};
    memcpy(&acc, &sums, sizeof acc);
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 4 * i; j < 4 * i + 4; j++) acc[i] += (int32_t)w[j] * x[j];
#endif
    return acc;
}
static inline vi dot_small(vi acc, vb w, vb x) { return dot_bytes(acc, w, x); }
#endif
#if VNNI || !defined(__AVX2__)
static inline vi add_small(vi sums, vb w, vb x) { return dot_small(sums, w, x); }
static inline vi widened(vi sums) { return sums; }
#endif
