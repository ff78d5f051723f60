#include "rows.h"

// Columns of a row with one scale.
static int64_t columns_of_scale(Form form) { return form == BYTES || form == FINE_BYTES ? 2 * GROUP : GROUP; }

Form form_of(const Weight *m) {
    if (m->type == OFFRAMP_INT8) return m->fine ? FINE_BYTES : BYTES;
    if (in_panels(m)) return m->fine ? FINE_GROUPS : GROUPS;
    if (m->type == OFFRAMP_BFLOAT16) return m->fine || !MULTIPLIES_BFLOAT16 ? SINGLES : PAIRS;
    const Weight *piece = m->values;
    for (int64_t i = 0; i < m->pieces; i++)
        if (in_panels(piece + i)) return m->fine ? FINE_GROUPS : GROUPS;
    return SINGLES;
}

Rows rows_of(const Weight *m, const float *x, int64_t stride, int64_t R, float *room) {
    const Form form = form_of(m);
    const int64_t K = m->columns, width = (K + 63) / 64 * 64, groups = width / columns_of_scale(form);
    float *scale = room, *sums = scale + R * groups, *offset = sums + R * groups, *halves = offset + R;
    // A vector that crosses cache lines takes twice as long.
    const char *narrow = (const char *)(((uintptr_t)(halves + R * width / HALF) + 63) / 64 * 64);
    return (Rows){form,  x,    R,      stride, K, width, groups, narrow, (const int8_t *)narrow + R * width,
                  scale, sums, halves, offset};
}

static inline vi rounded(vf v) {
    return __builtin_convertvector(v + choose(v < 0, all(-0.5f), all(0.5f)), vi);
}

static inline void store_bytes(int8_t *p, vi v) {
#if WIDE
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)  // gcc 12 would take the numbers one by one
    const __m256i all = (__m256i)v;
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(words, words));
#else
    const quarter_vb bytes = __builtin_convertvector(v, quarter_vb);
    memcpy(p, &bytes, sizeof bytes);
#endif
}

// `count` columns of a row, a multiple of GROUP, as integers of 8 bits, or with `low` of 16; their scale, and
// the sum of the numbers that they stand for, in all and for every HALF columns.
static inline void quantise(const float *p, int64_t count, int8_t *q, int8_t *low, float *scale, float *total,
                            float *halves) {
    const float range = low ? 127 * BASE + 127 : 127;
    vf tops = all(1e-30f), nothing = {0};
    for (int k = 0; k < count; k += LANES) {
        const vf v = load(p + k), size = choose(v < 0, -v, v);
        tops = choose(size > tops, size, tops);
        nothing += v * 0;
    }
    const float most = largest(tops), factor = range / most;
    float all_sums = 0;
    *scale = most / range + sum(nothing);  // keeps a NaN, which an integer cannot hold
    for (int half = 0; half < count; half += HALF) {
        vu sums = {0};  // a NaN becomes an integer so large that sums wrap around
        for (int k = half; k < half + HALF; k += LANES) {
            const vi whole = rounded(load(p + k) * factor);
            const vi high = low ? rounded(__builtin_convertvector(whole, vf) * (1.0f / BASE)) : whole;
            store_bytes(q + k, high);
            if (low) store_bytes(low + k, (vi)((vu)whole - (vu)high * BASE));
            sums += (vu)whole;
        }
        const float own = sum(__builtin_convertvector((vi)sums, vf));
        halves[half / (HALF)] = *scale * own, all_sums += own;
    }
    *total = *scale * all_sums;
}

#if MULTIPLIES_BFLOAT16
// A row of K numbers as bfloat16; beyond the last column, zeros.
static void to_pairs(const float *p, int64_t K, int64_t width, int16_t *narrow) {
    for (int64_t k = 0; k < width; k += 32) {
        const vf low = k < K ? load_up_to(p + k, K - k) : (vf){0};
        const vf high = k + LANES < K ? load_up_to(p + k + LANES, K - k - LANES) : (vf){0};
        const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        memcpy(narrow + k, &both, sizeof both);
    }
}
#endif

void make_narrow(const Rows *x, int64_t r) {
    const int64_t K = x->columns;
    const float *p = x->x + r * x->stride;
    if (x->form == SINGLES) return;
#if MULTIPLIES_BFLOAT16
    if (x->form == PAIRS) {
        to_pairs(p, K, x->width, (int16_t *)x->narrow + r * x->width);
        return;
    }
#endif
    const int64_t columns = columns_of_scale(x->form);
    const Place place = stands_at(x, r);
    const int fine = x->form == FINE_BYTES || x->form == FINE_GROUPS;
    float offset = 0;
    for (int64_t k = 0, at = place.first; k < K; k += columns, at += place.apart) {
        int8_t *q = (int8_t *)x->narrow + at * columns, *low = fine ? (int8_t *)x->low + at * columns : NULL;
        const int64_t count = min_(K - k, columns);
        quantise(p + k, count, q, low, (float *)x->scale + at, (float *)x->sums + at,
                 (float *)x->halves + at * (columns / HALF));
        memset(q + count, 0, columns - count);
        if (low) memset(low + count, 0, columns - count);
        offset += OFFSET * x->sums[at];
    }
    ((float *)x->offset)[r] = offset;
}
