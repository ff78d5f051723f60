// Products of rows with weights in any format. For head.c, llama.c and mamba2.c.
//
// A row's sums are added in the same order however many rows there are, so a chunk of any length gives bit for bit what its
// tokens give one by one, and no sequence depends on its neighbours. What rows are multiplied as:
//
// | weights | rows |
// |---------|------|
// | float32 | float32 |
// | bfloat16 | bfloat16 where the processor multiplies it (AVX512-BF16), else float32 |
// | int8 | 8-bit integers with a scale for every 64 columns; `fine`: 16-bit ones |
// | int4 | 8-bit integers with a scale for every GROUP columns; `fine`: 16-bit ones |
//
// Weights are read in the order in which they stand in memory: the processor fetches one stream ahead of time, but hardly several.

#pragma once
#include "crew.h"
#include "vectors.h"

enum { FLOAT32, BFLOAT16, INT8, INT4, FINE_INT8, FINE_INT4, KINDS };
#define IS_INT8(kind) ((kind) == INT8 || (kind) == FINE_INT8)
#define IS_INT4(kind) ((kind) == INT4 || (kind) == FINE_INT4)
#define IS_FINE(kind) ((kind) >= FINE_INT8)
// Columns with one scale, of int4 weights and of rows; columns multiplied in one go; bytes of weights that stay in the cache.
enum { GROUP = 32, DEPTH = 2048, CACHED = 1 << 17 };
// An int4 weight stands in panels of ROWS rows, and a panel in blocks of GROUP columns: byte 4 i + c of its quarter j holds column
// 4 j + c of row i in its low half, and column 16 + 4 j + c in its high half. Then come the rows' scales, then their minima, as
// float16. The last panel is filled up.
enum { ROWS = 16, HALVES = ROWS / LANES, NIBBLES = ROWS * GROUP / 2, PANEL_BLOCK = NIBBLES + 4 * ROWS };

typedef struct {
    int64_t kind, rows, columns;
    const void *w;
    const float *scale;  // of each row of an int8 weight, else NULL
    const float *bias;   // or NULL
} Weight;

// Memory of one call: floats that all threads share, then `own` floats for each thread; and floats for the head (head.h), for a
// drafter (drafts.h), and for memories that drafts may spoil (mamba2.c).
typedef struct {
    float *floats;
    int64_t own, threads;
    float *head, *desk, *saved;
} Scratch;

// Rows as they are multiplied, `stride` apart. For integer weights and where bfloat16 is multiplied, `q` holds them in 8 or 16
// bits, `width` numbers a row, zeros after the last column. A 16-bit integer is BASE · a byte of `q` + a byte of `rest`.
typedef struct {
    const float *x;
    int64_t stride, width, groups;
    const void *q;
    const int8_t *rest;
    const float *scale, *sums, *offset;  // of each group of a row: its scale, the sum of its numbers; of each row: see dot_bytes
} Rows;

static inline int narrow(int64_t kind) {
    return kind >= INT8 || (kind == BFLOAT16 && MULTIPLIES_BFLOAT16);
}

// Columns of a row with one scale.
static inline int64_t columns_of_scale(int64_t kind) { return IS_INT8(kind) ? 2 * GROUP : GROUP; }

// Where the narrow rows of x (R, K) go: `room` has at least R · (K + 64) floats.
static Rows rows_in(const Weight *m, const float *x, int64_t stride, int64_t R, float *room) {
    const int64_t width = (m->columns + 63) / 64 * 64, groups = width / columns_of_scale(m->kind);
    float *scale = room, *sums = scale + R * groups, *offset = sums + R * groups;
    // A vector that crosses cache lines takes twice as long.
    const char *q = (const char *)(((uintptr_t)(offset + R) + 63) / 64 * 64);
    return (Rows){x, stride, width, groups, q, (const int8_t *)q + R * width, scale, sums, offset};
}

enum { BASE = 255 };

static inline vi rounded(vf v) { return __builtin_convertvector(v + choose(v < 0, all(-0.5f), all(0.5f)), vi); }

static inline void store_bytes(int8_t *p, vi v) {
#if WIDE
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)v));
#else
    const quarter_vb bytes = __builtin_convertvector(v, quarter_vb);
    memcpy(p, &bytes, sizeof bytes);
#endif
}

// `count` columns of a row, a multiple of GROUP, as integers of 8 bits, or with `rest` of 16; their scale, and the sum of what they
// stand for.
static inline void quantise(const float *p, int64_t count, int8_t *q, int8_t *rest, float *scale, float *total) {
    const float range = rest ? 127 * BASE + 127 : 127;
    vf tops = all(1e-30f), nothing = {0};
    for (int k = 0; k < count; k += LANES) {
        const vf v = load(p + k), size = choose(v < 0, -v, v);
        tops = choose(size > tops, size, tops);
        nothing += v * 0;
    }
    const float most = largest(tops), factor = range / most;
    vi sums = {0};
    for (int k = 0; k < count; k += LANES) {
        const vi whole = rounded(load(p + k) * factor);
        const vi high = rest ? rounded(__builtin_convertvector(whole, vf) * (1.0f / BASE)) : whole;
        store_bytes(q + k, high);
        if (rest) store_bytes(rest + k, whole - high * BASE);
        sums += whole;
    }
    *scale = most / range + sum(nothing);  // keeps a NaN, which an integer cannot hold
    *total = *scale * sum(__builtin_convertvector(sums, vf));
}

// Makes row r narrow, for a weight that is multiplied with narrow rows.
static void pack(const Weight *m, const Rows *x, int64_t r) {
    const int64_t K = m->columns, G = x->groups;
    const float *p = x->x + r * x->stride;
#if MULTIPLIES_BFLOAT16
    if (m->kind == BFLOAT16) {
        int16_t *q = (int16_t *)x->q + r * x->width;
        for (int64_t k = 0; k < x->width; k += 32) {  // beyond the last column, zeros
            const vf low = k < K ? load_up_to(p + k, K - k) : (vf){0};
            const vf high = k + LANES < K ? load_up_to(p + k + LANES, K - k - LANES) : (vf){0};
            const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
            memcpy(q + k, &both, sizeof both);
        }
        return;
    }
#endif
    int8_t *q = (int8_t *)x->q + r * x->width, *rest = IS_FINE(m->kind) ? (int8_t *)x->rest + r * x->width : NULL;
    float *scale = (float *)x->scale + r * G, *sums = (float *)x->sums + r * G, offset = 0;
    const int64_t columns = columns_of_scale(m->kind);
    for (int64_t k = 0, g = 0; k < K; k += columns, g++) {
        quantise(p + k, min_(K - k, columns), q + k, rest ? rest + k : NULL, scale + g, sums + g);
        offset += OFFSET * sums[g];
    }
    memset(q + K, 0, x->width - K);
    if (rest) memset(rest + K, 0, x->width - K);
    ((float *)x->offset)[r] = offset;
}

// Numbers of a row of weights that are multiplied in one go.
#define AT_ONCE(kind) (IS_INT8(kind) ? 4 * LANES : (kind) == BFLOAT16 && MULTIPLIES_BFLOAT16 ? 2 * LANES : LANES)

// The numbers of a row `w` from column k on, of which there are `left`, and zeros. A vector of another type is returned as `vi`.
ALWAYS vi weights_at(int64_t kind, const char *w, int64_t k, int64_t left) {
    if (kind == FLOAT32) return (vi)load_up_to((const float *)w + k, left);
    const char *from = w + (IS_INT8(kind) ? k : 2 * k);
#if WIDE
    if (IS_INT8(kind)) return (vi)(left >= 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8((1ull << left) - 1, from));
    if (MULTIPLIES_BFLOAT16) return (vi)(left >= 32 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((1u << left) - 1, from));
#else
    if (IS_INT8(kind)) {
        vi v;
        memcpy(&v, from, sizeof v);  // 32 columns, a group
        return v;
    }
#endif
    return (vi)from_bfloat16((const uint16_t *)from, left);
}

// Adds the products of weights, as `weights_at` gives them, and of row r from column k on, of which there are `left`.
ALWAYS vf times(int64_t kind, vf acc, vi weights, const Rows *x, int64_t r, int64_t k, int64_t left) {
    if (IS_INT8(kind)) {
        vb q;
        memcpy(&q, (const int8_t *)x->q + r * x->width + k, sizeof q);
        vi whole = dot_bytes((vi){0}, (vb)weights, q);
        if (IS_FINE(kind)) {
            memcpy(&q, x->rest + r * x->width + k, sizeof q);
            whole = dot_bytes(whole * BASE, (vb)weights, q);
        }
        return fma_(__builtin_convertvector(whole, vf), all(x->scale[r * x->groups + k / (2 * GROUP)]), acc);
    }
#if MULTIPLIES_BFLOAT16
    if (kind == BFLOAT16) {
        const __m512bh q = (__m512bh)_mm512_loadu_si512((const int16_t *)x->q + r * x->width + k);
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)weights, q);
    }
#endif
    return fma_((vf)weights, load_up_to(x->x + r * x->stride + k, left), acc);
}

// Where the results of a product go: rows `stride` apart. With `add`, they are added to what is there.
typedef struct {
    float *y;
    int64_t stride;
    int add;
} Out;

// `count` weights from row n on, and in two streams as many from row n + `apart` on, times rows of x from row r on, over the
// columns `from` to `to` - 1. Of an int4 weight, it is the panel that begins at n, and the results of the weights `first` to
// `last` - 1 are wanted.
typedef struct {
    const Weight *m;
    const Rows *x;
    int64_t n, count, apart, r, from, to, first, last;
} Tile;

enum { MOST = 8, FOUR = 4 };  // rows of x in a tile; weights of a tile that stand together
#define EACH_WEIGHT _Pragma("GCC unroll 4") for (int i = 0; i < N; i++)
#define EACH_ROW _Pragma("GCC unroll 8") for (int t = 0; t < T; t++)

typedef float four __attribute__((vector_size(4 * FOUR)));

// Puts results for the tile's row t, and weights from n on, where they belong.
ALWAYS void put(const Tile *c, const Out *out, int64_t kind, int t, int64_t n, int64_t count, const float *sums) {
    const Weight *m = c->m;
    float *y = out->y + (c->r + t) * out->stride + n;
    const float offset = IS_INT8(kind) && !c->from ? c->x->offset[c->r + t] : 0;
    if (count == FOUR) {
        four s, part;
        memcpy(&s, sums, sizeof s);
        if (IS_INT8(kind)) memcpy(&part, m->scale + n, sizeof part), s = part * (s - offset);
        if (m->bias && !c->from) memcpy(&part, m->bias + n, sizeof part), s += part;
        if (out->add) memcpy(&part, y, sizeof part), s = part + s;
        memcpy(y, &s, sizeof s);
        return;
    }
    for (int i = 0; i < count; i++) {
        float s = IS_INT8(kind) ? m->scale[n + i] * (sums[i] - offset) : sums[i];
        if (m->bias && !c->from) s += m->bias[n + i];
        y[i] = out->add ? y[i] + s : s;
    }
}

static inline int64_t row_bytes(const Weight *m) { return m->columns * (m->kind == FLOAT32 ? 4 : m->kind == BFLOAT16 ? 2 : 1); }

// At most FOUR weights, one after another, times T rows of x. With two streams, as many others at the same time: then there are
// twice as many sums that do not wait for each other.
ALWAYS void in_turn(const Tile *c, const Out *out, int64_t kind, const int T, const int streams) {
    const Rows x = *c->x;
    const int64_t row = row_bytes(c->m), step = AT_ONCE(kind), to = c->to, apart = c->apart * row;
    const char *w = (const char *)c->m->w + c->n * row;
    vf acc[MOST * EIGHT];
    for (int64_t i = 0; i < c->count; i++, w += row) {
        vf one[MOST] = {0}, other[MOST] = {0};
        int64_t k = c->from;
#define GO_ON(left) \
    { \
        const vi u = weights_at(kind, w, k, left), v = streams > 1 ? weights_at(kind, w + apart, k, left) : u; \
        EACH_ROW { \
            one[t] = times(kind, one[t], u, &x, c->r + t, k, left); \
            if (streams > 1) other[t] = times(kind, other[t], v, &x, c->r + t, k, left); \
        } \
    }
        for (; k + step <= to; k += step) GO_ON(step)
        if (k < to) GO_ON(to - k)
#undef GO_ON
        EACH_ROW acc[t * EIGHT + i] = one[t], acc[t * EIGHT + FOUR + i] = other[t];
    }
    for (int t = 0; t < T; t++) {
        float sums[EIGHT];
        sums_of(acc + t * EIGHT, sums);
        put(c, out, kind, t, c->n, c->count, sums);
        if (streams > 1) put(c, out, kind, t, c->n + c->apart, c->count, sums + FOUR);
    }
}

// N weights, read side by side, times T rows of x. That takes fewer loads of x, but is slow where weights come from memory.
ALWAYS void side_by_side(const Tile *c, const Out *out, int64_t kind, const int N, const int T) {
    const Rows x = *c->x;
    const int64_t row = row_bytes(c->m);
    const char *w = (const char *)c->m->w + c->n * row;
    vf acc[24] = {0};
    int64_t k = c->from;
#define GO_ON(left) \
    { \
        vi v[4]; \
        EACH_WEIGHT v[i] = weights_at(kind, w + i * row, k, left); \
        EACH_ROW EACH_WEIGHT acc[t * N + i] = times(kind, acc[t * N + i], v[i], &x, c->r + t, k, left); \
    }
    for (; k + AT_ONCE(kind) <= c->to; k += AT_ONCE(kind)) GO_ON(AT_ONCE(kind))
    if (k < c->to) GO_ON(c->to - k)
#undef GO_ON
    float sums[24];
#pragma GCC unroll 3
    for (int j = 0; j < N * T; j += EIGHT) sums_of(acc + j, sums + j);
    EACH_ROW put(c, out, kind, t, c->n, N, sums + t * N);
}

// Adds the products of two vectors of int4 weights, each with the same four numbers of a row in all lanes.
ALWAYS vi dot_two(vi acc, vb low, vb high, const int8_t *q) {
    int32_t first, second;
    memcpy(&first, q, 4);
    memcpy(&second, q + 16, 4);
    return dot_nibbles(dot_nibbles(acc, low, (vb)(first - (vi){0})), high, (vb)(second - (vi){0}));
}

// A panel of an int4 weight times T rows of x. Lane i belongs to row i of the panel (of half of it where vectors are short).
ALWAYS void panel_tile(const Tile *c, const Out *out, int64_t kind, const int T) {
    const Weight *m = c->m;
    const Rows x = *c->x;
    const uint8_t *panel = (const uint8_t *)m->w + c->n / ROWS * (m->columns / GROUP) * PANEL_BLOCK;
    for (int half = 0; half < HALVES; half++) {
        vf acc[MOST] = {0};
        for (int64_t g = c->from / GROUP; g < c->to / GROUP; g++) {
            const uint8_t *block = panel + g * PANEL_BLOCK;
            const int64_t place = c->r * x.width + g * GROUP;
            const int8_t *q = (const int8_t *)x.q + place, *rest = x.rest + place;
            vi whole[MOST] = {0}, less[MOST] = {0};
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                vi both;
                memcpy(&both, block + j * ROWS * 4 + half * sizeof both, sizeof both);
                const vb low = (vb)(both & 0x0f0f0f0f), high = (vb)((both >> 4) & 0x0f0f0f0f);
                EACH_ROW whole[t] = dot_two(whole[t], low, high, q + t * x.width + 4 * j);
                if (IS_FINE(kind)) EACH_ROW less[t] = dot_two(less[t], low, high, rest + t * x.width + 4 * j);
            }
            if (IS_FINE(kind)) EACH_ROW whole[t] = whole[t] * BASE + less[t];
            const uint16_t *scale = (const uint16_t *)(block + NIBBLES) + half * LANES;
            const vf scales = from_float16(scale), lows = from_float16(scale + ROWS);
            EACH_ROW {
                const int64_t at = (c->r + t) * x.groups + g;
                acc[t] = fma_(__builtin_convertvector(whole[t], vf) * x.scale[at], scales, acc[t]);
                acc[t] = fma_(lows, all(x.sums[at]), acc[t]);
            }
        }
        const int64_t n = c->n + half * LANES, first = c->first - n, last = c->last - n;
        const float *bias = m->bias && !c->from ? m->bias + n : NULL;
        EACH_ROW {
            float *y = out->y + (c->r + t) * out->stride + n;
            if (first <= 0 && last >= LANES) {
                const vf s = bias ? acc[t] + load(bias) : acc[t];
                store(y, out->add ? load(y) + s : s);
            } else {
                for (int64_t i = first < 0 ? 0 : first; i < min_(last, LANES); i++) {
                    const float s = bias ? acc[t][i] + bias[i] : acc[t][i];
                    y[i] = out->add ? y[i] + s : s;
                }
            }
        }
    }
}

// One function for each kind, and each number of rows, so that these are constants in its loops.
typedef void Multiply(const Tile *c, const Out *out);
#define FUNCTION(name, body) \
    static __attribute__((noinline)) void name(const Tile *c, const Out *out) { body; }
#define STREAMS(kind, T) FUNCTION(kind##_one_##T, in_turn(c, out, kind, T, 1)) FUNCTION(kind##_two_##T, in_turn(c, out, kind, T, 2))
#define PANELS(kind, T) FUNCTION(kind##_one_##T, panel_tile(c, out, kind, T))
#define UP_TO_EIGHT(make, kind) \
    make(kind, 1) make(kind, 2) make(kind, 3) make(kind, 4) make(kind, 5) make(kind, 6) make(kind, 7) make(kind, 8)
#define TABLE(name) {name##1, name##2, name##3, name##4, name##5, name##6, name##7, name##8}
UP_TO_EIGHT(STREAMS, FLOAT32) UP_TO_EIGHT(STREAMS, BFLOAT16) UP_TO_EIGHT(STREAMS, INT8) UP_TO_EIGHT(PANELS, INT4)
UP_TO_EIGHT(STREAMS, FINE_INT8) UP_TO_EIGHT(PANELS, FINE_INT4)
static Multiply *const one[KINDS][MOST] = {
    TABLE(FLOAT32_one_), TABLE(BFLOAT16_one_), TABLE(INT8_one_), TABLE(INT4_one_), TABLE(FINE_INT8_one_), TABLE(FINE_INT4_one_),
};
static Multiply *const two[KINDS][MOST] = {
    TABLE(FLOAT32_two_), TABLE(BFLOAT16_two_), TABLE(INT8_two_), {NULL}, TABLE(FINE_INT8_two_), {NULL},
};
#if WIDE  // weights and rows of a tile in the cache: as many as the registers hold
enum { FLOATS = 4, FLOAT_ROWS = 6, INTEGERS = 2, INTEGER_ROWS = 8 };
#else
enum { FLOATS = 3, FLOAT_ROWS = 4, INTEGERS = 2, INTEGER_ROWS = 5 };
#endif
FUNCTION(FLOAT32_many, side_by_side(c, out, FLOAT32, FLOATS, FLOAT_ROWS))
FUNCTION(BFLOAT16_many, side_by_side(c, out, BFLOAT16, FLOATS, FLOAT_ROWS))
FUNCTION(INT8_many, side_by_side(c, out, INT8, INTEGERS, INTEGER_ROWS))
FUNCTION(FINE_INT8_many, side_by_side(c, out, FINE_INT8, INTEGERS, INTEGER_ROWS))
static const struct {
    int64_t weights, rows;
    Multiply *multiply;
} many[KINDS] = {
    {FLOATS, FLOAT_ROWS, FLOAT32_many},
    {FLOATS, FLOAT_ROWS, BFLOAT16_many},
    {INTEGERS, INTEGER_ROWS, INT8_many},
    {0, 0, NULL},
    {INTEGERS, INTEGER_ROWS, FINE_INT8_many},
    {0, 0, NULL},
};

// Bytes that are to come into the cache.
typedef struct {
    const char *from, *to;
} Next;

// Asks for what will be needed soon.
static inline void expect(const void *place) { __builtin_prefetch(place); }

// Rows `from` to `to` - 1 of the weight, over the columns `first` to `last` - 1, times R rows of x, for weights that stay in the
// cache while all rows pass. Meanwhile `next` is fetched.
static void strips(const Weight *m, const Rows *x, int64_t R, int64_t first, int64_t last, const Out *out, int64_t from, int64_t to,
                   Next next) {
    const int64_t several = many[m->kind].weights, most = many[m->kind].rows;
    const int64_t share = (next.to - next.from) / (((to - from) / several + 1) * (R / most + 1)) + 64;
    for (int64_t r = 0, T; r < R; r += T) {
        T = min_(R - r, most);
        for (int64_t n = from, N; n < to; n += N) {
            N = to - n >= several ? several : 1;
            (T == most && N > 1 ? many[m->kind].multiply : one[m->kind][T - 1])(&(Tile){m, x, n, N, 0, r, first, last}, out);
            for (const char *stop = next.from + share; next.from < stop && next.from < next.to; next.from += 64) expect(next.from);
        }
    }
}

// For few rows: each weight is read once, and in order.
static void product_of_few(const Weight *m, const Rows *x, int64_t R, Out out, int64_t from, int64_t to, int64_t apart) {
    const int64_t K = m->columns;
    for (int64_t first = 0; first < K; first += DEPTH, out.add = 1)
        for (int64_t n = from; n < to; n += FOUR)
            (apart ? two : one)[m->kind][R - 1](
                &(Tile){m, x, n, min_(to - n, FOUR), apart, 0, first, min_(K, first + DEPTH)}, &out);
}

// For many rows: weights are cut into pieces that stay in the cache while all rows pass.
static void product_of_many(const Weight *m, const Rows *x, int64_t R, Out out, int64_t from, int64_t to) {
    const int64_t K = m->columns, bytes = row_bytes(m) / K;
    for (int64_t first = 0; first < K; first += DEPTH, out.add = 1) {
        const int64_t last = min_(K, first + DEPTH), piece = CACHED / (bytes * (last - first)) / 4 * 4;
        for (int64_t n = from; n < to; n += piece) {
            const int64_t end = min_(to, n + piece);
            const char *weights = (const char *)m->w + end * K * bytes;
            strips(m, x, R, first, last, &out, n, end, (Next){weights, weights + (K <= DEPTH ? min_(to - end, piece) * K * bytes : 0)});
        }
    }
}

// For int4 weights: a panel stays in the cache while all rows pass.
static void product_of_panels(const Weight *m, const Rows *x, int64_t R, Out out, int64_t from, int64_t to) {
    const int64_t K = m->columns;
    for (int64_t first = 0; first < K; first += DEPTH, out.add = 1)
        for (int64_t n = from / ROWS * ROWS; n < to; n += ROWS)
            for (int64_t r = 0, T; r < R; r += T) {
                T = min_(R - r, MOST);
                one[m->kind][T - 1](&(Tile){m, x, n, ROWS, 0, r, first, min_(K, first + DEPTH), from, to}, &out);
            }
}

// Rows `from` to `to` - 1 of the weight, and unless `apart` is 0 as many from row `from` + `apart` on, times R rows of x. The sum
// over the columns is made in pieces of DEPTH, for few rows as for many.
static void product(const Weight *m, const Rows *x, int64_t R, Out out, int64_t from, int64_t to, int64_t apart) {
    if (!IS_INT4(m->kind) && R <= MOST) {
        product_of_few(m, x, R, out, from, to, apart);
        return;
    }
    (IS_INT4(m->kind) ? product_of_panels : product_of_many)(m, x, R, out, from, to);
    if (apart) product(m, x, R, out, from + apart, to + apart, 0);
}

// Rows `first` to `last` - 1 of the weight times R rows of x, shared out. Few rows of x are multiplied with two streams of weights
// that are far apart.
static void multiply(Hand *h, const Weight *m, Rows x, int64_t R, Out out, int64_t first, int64_t last) {
    const int64_t rows = last - first, apart = !IS_INT4(m->kind) && R <= MOST ? rows / 2 : 0;
    const Division d = divided(h, apart ? apart : rows, IS_INT4(m->kind) ? ROWS : FOUR);
    EACH_PIECE(i, h, d.pieces) {
        int64_t from, to;
        part_of(&d, i, &from, &to);
        product(m, &x, R, out, first + from, first + to, apart);
        if (apart && to == d.total && rows % 2) product(m, &x, R, out, last - 1, last, 0);
    }
}

static inline void norm(const float *x, const float *weight, float eps, float *out, int64_t n) {
    const float factor = 1.0f / sqrtf(sum(dots(x, x, n)) / n + eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
}

// Makes rows narrow, shared out.
static Rows prepare(Hand *h, const Weight *m, const float *x, int64_t stride, int64_t R, float *room) {
    const Rows rows = rows_in(m, x, stride, R, room);
    if (narrow(m->kind)) EACH_PIECE(r, h, R) pack(m, &rows, r);
    return rows;
}

// Norms rows h (R, K) to x, and makes them narrow, shared out.
static Rows prepare_normed(Hand *h, const Weight *m, const float *in, const float *weight, float eps, int64_t R, float *x,
                           float *room) {
    const int64_t K = m->columns;
    const Rows rows = rows_in(m, x, K, R, room);
    EACH_PIECE(r, h, R) {
        norm(in + r * K, weight, eps, x + r * K, K);
        if (narrow(m->kind)) pack(m, &rows, r);
    }
    return rows;
}
