// Products with weights whose rows stand one after another: floats and int8. For a file that says KIND.

#pragma once
#include "products_kind.h"

#define IS_INT8 (KIND == INT8 || KIND == FINE_INT8)

enum { FETCHED = 4 };  // rows from which on it pays to fetch weights ahead of time
enum { SIZE = KIND == FLOAT32 ? 4 : IS_INT8 ? 1 : 2 };  // bytes of a weight

// The numbers of a row of weights that are multiplied at once.
#define AT_ONCE (IS_INT8 ? 4 * LANES : KIND == PAIRED_BFLOAT16 ? 2 * LANES : LANES)

// The numbers of a row `w` from column k on, of which there are `left`, and zeros. A vector of another type
// is returned as `vi`.
ALWAYS vi weights_at(const char *w, int64_t k, int64_t left) {
    if (KIND == FLOAT32) return (vi)load_up_to((const float *)w + k, left);
    const char *from = w + (IS_INT8 ? k : 2 * k);
#if WIDE
    if (IS_INT8)
        return (vi)(left >= 64 ? _mm512_loadu_si512(from)
                               : _mm512_maskz_loadu_epi8((1ull << left) - 1, from));
    if (KIND == PAIRED_BFLOAT16)
        return (vi)(left >= 32 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((1u << left) - 1, from));
#else
    if (IS_INT8) {
        vi v;
        memcpy(&v, from, sizeof v);  // 32 columns, a group
        return v;
    }
#endif
    if (KIND == FLOAT16) return (vi)float16_up_to((const uint16_t *)from, left);
    return (vi)from_bfloat16((const uint16_t *)from, left);
}

// Adds the products of bytes of weights and of a row to `acc`.
ALWAYS vi times_bytes(vi acc, vi weights, const int8_t *q) {
    vb x;
    memcpy(&x, q, sizeof x);
    return dot_bytes(acc, (vb)weights, x);
}

// Adds the products of a row of weights, as `weights_at` gives them, and of row r from column k on, of which
// there are `left`.
ALWAYS vf times(vf acc, vi weights, const Rows *x, int64_t r, int64_t k, int64_t left) {
    if (IS_INT8) {
        const int64_t at = r * x->width + k;
        vi whole = times_bytes((vi){0}, weights, (const int8_t *)x->narrow + at);
        if (KIND == FINE_INT8) whole = times_bytes(whole * BASE, weights, x->low + at);
        const float *scale = x->scale + r * x->groups;
        return fma_(__builtin_convertvector(whole, vf), all(scale[k / (2 * GROUP)]), acc);
    }
#if MULTIPLIES_BFLOAT16
    if (KIND == PAIRED_BFLOAT16) {
        const __m512bh q = (__m512bh)_mm512_loadu_si512((const int16_t *)x->narrow + r * x->width + k);
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)weights, q);
    }
#endif
    return fma_((vf)weights, load_up_to(x->x + r * x->stride + k, left), acc);
}

typedef float four __attribute__((vector_size(4 * FOUR)));

// Puts the sums of the tile's row t, and of `count` weights from n on, where they belong.
ALWAYS void store_sums(const Tile *c, const Out *out, int t, int64_t n, int64_t count, const float *sums) {
    const Weight *m = c->m;
    float *y = out->y + (c->r + t) * out->stride + n;
    const float offset = IS_INT8 && !c->from ? c->x->offset[c->r + t] : 0;
    if (count == FOUR) {
        four s, part;
        memcpy(&s, sums, sizeof s);
        if (IS_INT8) memcpy(&part, m->scales + n, sizeof part), s = part * (s - offset);
        if (m->bias && !c->from) memcpy(&part, m->bias + n, sizeof part), s += part;
        if (out->add) memcpy(&part, y, sizeof part), s = part + s;
        memcpy(y, &s, sizeof s);
        return;
    }
    for (int i = 0; i < count; i++) {
        float s = IS_INT8 ? m->scales[n + i] * (sums[i] - offset) : sums[i];
        if (m->bias && !c->from) s += m->bias[n + i];
        y[i] = out->add ? y[i] + s : s;
    }
}

#ifdef __clang__
#define ONE_COPY __attribute__((noinline))
#else
#define ONE_COPY __attribute__((noinline, noclone))
#endif

// The same for T rows, whose sums are EIGHT apart. It is one function, since a copy in each place makes the
// library half as large again.
static ONE_COPY void store_rows(const Tile *c, const Out *out, int T, int64_t n, int64_t count,
                                const float *sums) {
    for (int t = 0; t < T; t++) store_sums(c, out, t, n, count, sums + t * EIGHT);
}

// At most FOUR weights, one after another, times T rows of x. With two streams, as many others at the same
// time: so twice as many sums run independently.
ALWAYS void in_turn(const Tile *c, const Out *out, const int T, const int streams) {
    const Rows x = *c->x;
    const int64_t row = row_bytes(c->m), to = c->to, apart = c->apart * row;
    const char *w = (const char *)c->m->values + c->n * row;
    vf acc[MOST_ROWS * EIGHT];
    for (int64_t i = 0; i < c->count; i++, w += row) {
        vf near[MOST_ROWS] = {0}, far[MOST_ROWS] = {0};
        int64_t k = c->from;
#define GO_ON(left)                                                                                \
    {                                                                                              \
        const vi u = weights_at(w, k, left), v = streams > 1 ? weights_at(w + apart, k, left) : u; \
        if (T >= FETCHED) fetch(w + k * SIZE);                                                     \
        if (T >= FETCHED && streams > 1) fetch(w + apart + k * SIZE);                              \
        EACH_ROW {                                                                                 \
            near[t] = times(near[t], u, &x, c->r + t, k, left);                                    \
            if (streams > 1) far[t] = times(far[t], v, &x, c->r + t, k, left);                     \
        }                                                                                          \
    }
        for (; k + AT_ONCE <= to; k += AT_ONCE) GO_ON(AT_ONCE)
        if (k < to) GO_ON(to - k)
#undef GO_ON
        EACH_ROW acc[t * EIGHT + i] = near[t], acc[t * EIGHT + FOUR + i] = far[t];
    }
    float sums[MOST_ROWS * EIGHT];
    for (int t = 0; t < T; t++) sums_of(acc + t * EIGHT, sums + t * EIGHT);
    store_rows(c, out, T, c->n, c->count, sums);
    if (streams > 1) store_rows(c, out, T, c->n + c->apart, c->count, sums + FOUR);
}

// N weights, read side by side, times T rows of x. That takes fewer loads of x, but is slow where weights
// come from memory.
ALWAYS void side_by_side(const Tile *c, const Out *out, const int N, const int T) {
    const Rows x = *c->x;
    const int64_t row = row_bytes(c->m);
    const char *w = (const char *)c->m->values + c->n * row;
    vf acc[24] = {0};
    int64_t k = c->from;
#define GO_ON(left)                                                                               \
    {                                                                                             \
        vi v[4];                                                                                  \
        EACH_WEIGHT v[i] = weights_at(w + i * row, k, left);                                      \
        EACH_ROW EACH_WEIGHT acc[t * N + i] = times(acc[t * N + i], v[i], &x, c->r + t, k, left); \
    }
    for (; k + AT_ONCE <= c->to; k += AT_ONCE) GO_ON(AT_ONCE)
    if (k < c->to) GO_ON(c->to - k)
#undef GO_ON
    float sums[24];
#pragma GCC unroll 3
    for (int j = 0; j < N * T; j += EIGHT) sums_of(acc + j, sums + j);
    EACH_ROW store_sums(c, out, t, c->n, N, sums + t * N);
}

// EIGHT rows of a weight, or all `count` that are left, anywhere in it, times row r of x. Rows that are
// needed soon are prefetched.
static void scattered_eight(const Weight *m, const Rows *x, int64_t r, const int64_t *rows, int64_t count,
                            const Out *out) {
    enum { AHEAD = 3 };  // rows are prefetched when so many others are left
    const int64_t K = m->columns, bytes = row_bytes(m), some = min_(EIGHT, count);
    for (int64_t first = 0; first < K; first += DEPTH) {
        const int64_t to = min_(K, first + DEPTH);
        const Out added = {out->y, out->stride, first > 0};
        vf acc[EIGHT] = {0};
        float sums[EIGHT];
        for (int64_t i = 0; i < some; i++) {
            for (int64_t at = 0; !first && i + AHEAD < count && at < bytes; at += 64)
                __builtin_prefetch((const char *)m->values + rows[i + AHEAD] * bytes + at);
            for (int64_t k = first; k < to; k += AT_ONCE) {
                const int64_t left = k + AT_ONCE <= to ? AT_ONCE : to - k;
                const vi weights = weights_at((const char *)m->values + rows[i] * bytes, k, left);
                acc[i] = times(acc[i], weights, x, r, k, left);
            }
        }
        sums_of(acc, sums);
        for (int64_t i = 0; i < some; i++)
            store_rows(&(Tile){m, x, rows[i], 1, 0, r, first, to, 0, 0}, &added, 1, rows[i], 1, sums + i);
    }
}

static void scattered(const Weight *m, const Rows *x, int64_t r, const int64_t *rows, int64_t count,
                      const Out *out) {
    for (int64_t i = 0; i < count; i += EIGHT) scattered_eight(m, x, r, rows + i, count - i, out);
}

#define STREAMS(T) \
    FUNCTION(one_stream_##T, in_turn(c, out, T, 1)) FUNCTION(two_streams_##T, in_turn(c, out, T, 2))
UP_TO_EIGHT(STREAMS)

// Weights and rows of a tile in the cache: as many as the registers hold.
#if WIDE
enum { CACHED_WEIGHTS = IS_INT8 ? 2 : 4, CACHED_ROWS = IS_INT8 ? 8 : 6 };
#else
enum { CACHED_WEIGHTS = IS_INT8 ? 2 : 3, CACHED_ROWS = IS_INT8 ? 5 : 4 };
#endif
FUNCTION(cached, side_by_side(c, out, CACHED_WEIGHTS, CACHED_ROWS))

#define PRODUCTS {TABLE(one_stream_), TABLE(two_streams_), cached, CACHED_WEIGHTS, CACHED_ROWS, scattered}
