// Products with weights in panels (layouts.h). For a file that says their BITS, and CODES if these are codes.

#pragma once
#include "layouts.h"
#include "products_kind.h"

#ifdef CODES_OF_4_BITS
enum { IN_CODES = 1 };
#else
enum { IN_CODES = 0 };
#endif

// Vectors that a panel's rows take; scales of a row in a block, and the vectors of weights that one is for.
enum { PARTS = PANEL / LANES, SCALES = SCALES_OF(BITS), WITH_SCALE = EIGHT / SCALES };

// Rows from which on it pays to fetch weights ahead of time: one where a panel of 8 bits is read in two
// parts.
enum { FETCHED = BITS == 8 && PARTS == 2 ? 1 : 2 };

// What is subtracted from weights, where no minimum is kept.
enum { CENTRE = BITS == 8 || IN_CODES ? OFFSET : 1 << (BITS - 1) };

// Lanes of two vectors: those with these numbers, the same in all lanes of 128 bits. gcc has clang's builtin
// from version 12 on.
#if WIDE
#define EACH(a, b, c, d) \
    a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12
#else
#define EACH(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLED(x, y, ...) __builtin_shufflevector(x, y, EACH(__VA_ARGS__))
#else
#define SHUFFLED(x, y, ...) __builtin_shuffle(x, y, (vi){EACH(__VA_ARGS__)})
#endif

// 16 bytes from each of several places, `far` bytes apart, in lanes of 128 bits.
ALWAYS vi lanes_of(const uint8_t *from, int far) {
#define SIXTEEN(i) _mm_loadu_si128((const __m128i *)(from + (i) * far))
#if WIDE
    const __m512i v = _mm512_inserti32x4(_mm512_castsi128_si512(SIXTEEN(0)), SIXTEEN(1), 1);
    return (vi)_mm512_inserti32x4(_mm512_inserti32x4(v, SIXTEEN(2), 2), SIXTEEN(3), 3);
#elif defined(__AVX2__)
    return (vi)_mm256_inserti128_si256(_mm256_castsi128_si256(SIXTEEN(0)), SIXTEEN(1), 1);
#else
    vi v;
    memcpy(&v, from, 16), memcpy((char *)&v + 16, from + far, 16);
    return v;
#endif
}

// Columns 4 v to 4 v + 3 of a block's rows: of part `part` of them. Entries of 8 bits: see `turned`.
ALWAYS vb weights_of(const uint8_t *block, int part, int v) {
#define PLANE_AT(i)                                                                   \
    ({                                                                                \
        vu plane;                                                                     \
        memcpy(&plane, block + (i) * PLANE + part * (int)sizeof plane, sizeof plane); \
        plane;                                                                        \
    })
#define MOVED(bits, from, to) ((from) < (to) ? (bits) << ((to) - (from)) : (bits) >> ((from) - (to)))
    enum { TWO = BITS >= 4 ? 4 : 0, ONE = BITS == 5 ? 4 : 2 };  // planes of 2 bits, and of 1, begin there
    vu w = {0};
    if (BITS >= 4) w = MOVED(PLANE_AT(v % 4), v < 4 ? 0 : 4, 0) & 0x0f0f0f0f;
    if (BITS == 6) w |= MOVED(PLANE_AT(TWO + v / 4), 2 * (v % 4), 4) & 0x30303030;
    if (BITS < 4) w = MOVED(PLANE_AT(TWO + v / 4), 2 * (v % 4), 0) & 0x03030303;
    if (BITS == 5) w |= MOVED(PLANE_AT(ONE), v, 4) & 0x10101010;
    if (BITS == 3) w |= MOVED(PLANE_AT(ONE), v, 2) & 0x04040404;
    return IN_CODES ? look_up(CODES, (vb)w) : (vb)w;
}

// Four vectors as `weights_of` gives them, of entries of 8 bits: of a part of the rows, the 16 columns that
// begin at `from`.
ALWAYS void turned(const uint8_t *from, int part, vb *w) {
    vi v[4], u[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) v[i] = lanes_of(from + (part * LANES + i) * LONG, 4 * LONG);
    for (int i = 0; i < 2; i++) {
        u[i] = SHUFFLED(v[2 * i], v[2 * i + 1], 0, LANES, 1, LANES + 1);
        u[i + 2] = SHUFFLED(v[2 * i], v[2 * i + 1], 2, LANES + 2, 3, LANES + 3);
    }
    for (int i = 0; i < 4; i += 2) {
        w[i] = (vb)SHUFFLED(u[i], u[i + 1], 0, 1, LANES, LANES + 1);
        w[i + 1] = (vb)SHUFFLED(u[i], u[i + 1], 2, 3, LANES + 2, LANES + 3);
    }
}

// Whether weights are signed bytes, and not a few bits.
enum { IN_BYTES = BITS == 8 || IN_CODES };

// Vectors of weights whose products are added before the sums are widened.
enum { HELD = IN_BYTES || IN_16_BITS(BITS) > WITH_SCALE ? WITH_SCALE : IN_16_BITS(BITS) };

// Adds the products of weights with the same four numbers of a row in all lanes.
// `whole_of` then widens the sums.
ALWAYS vi dot_four(vi sums, vb w, const int8_t *q) {
    int32_t four;
    memcpy(&four, q, 4);
    return IN_BYTES ? dot_bytes(sums, w, (vb)(four - (vi){0})) : add_small(sums, w, (vb)(four - (vi){0}));
}
ALWAYS vi whole_of(vi sums) { return IN_BYTES ? sums : widened(sums); }

// Scales or minima number `s` of a block, for one part of the rows; `ends` are all of the block, `unit` is
// what integers are multiplied by.
ALWAYS vf numbers_of(Layout of, const uint8_t *ends, int s, int part, vf unit) {
    const int64_t at = s * PANEL + part * LANES;
    return of.super ? from_int8((const int8_t *)ends + at) * unit : from_float16((const uint16_t *)ends + at);
}

// Scale number `s` of each row of a part, in a block of entries of 8 bits.
ALWAYS vf scales_of_long(const uint8_t *ends, int64_t s, int part) {
    vu pairs;
    memcpy(&pairs, ends + part * (int)sizeof pairs, sizeof pairs);
    const half_vf scales = __builtin_convertvector(pairs >> 16 * (int32_t)s, half_vf);
    return from_float16((const uint16_t *)&scales);
}

// A panel of a weight times T rows of x. Lane i belongs to row i of the panel (of a part of it where vectors
// are short).
ALWAYS void panel_of(const Layout of, const Tile *c, const Out *out, const int T, const int fine) {
    const Rows x = *c->x;
    const Place place = stands_at(&x, c->r);
    const int64_t before = bytes_before(of), bytes = bytes_of_block(of), start = c->from / GROUP;
    const uint8_t *panel = (const uint8_t *)c->m->values + c->n / PANEL * bytes_of_panel(of, c->m->columns) +
                           start * bytes + c->from / SUPER * before;
    for (int part = 0; part < PARTS; part++) {
        vf acc[MOST_ROWS] = {0}, unit = {0}, low_unit = {0};
        const uint8_t *block = panel;
        for (int64_t g = start; g < c->to / GROUP; g++, block += bytes) {
            if (of.super && g % (SUPER / GROUP) == 0) {
                const uint16_t *units = (const uint16_t *)block + part * LANES;
                unit = from_float16(units), low_unit = of.lows ? from_float16(units + PANEL) : unit;
                block += before;
            }
            for (int64_t line = 0; T >= FETCHED && part == 0 && line < bytes; line += 64) fetch(block + line);
            const uint8_t *ends = block + BITS * PLANE;
            const int64_t at = place.first + g * place.apart;
            const int8_t *q = (const int8_t *)x.narrow + at * GROUP, *rest = x.low + at * GROUP;
            vb eight[EIGHT];
            vf scales_of_8_bits = {0};
            if (BITS == 8) {
                const int64_t s = g % (LONG / GROUP);
                const uint8_t *rows = block - s * bytes;
                turned(rows + s * GROUP, part, eight), turned(rows + s * GROUP + 16, part, eight + 4);
                scales_of_8_bits = scales_of_long(rows + PANEL * LONG, s, part);
            }
#pragma GCC unroll 2
            for (int s = 0; s < SCALES; s++) {
                vi whole[MOST_ROWS] = {0}, less[MOST_ROWS] = {0};
#pragma GCC unroll 4
                for (int first = 0; first < WITH_SCALE; first += HELD) {
                    vi sums[MOST_ROWS] = {0}, rests[MOST_ROWS] = {0};
#pragma GCC unroll 8
                    for (int i = first; i < first + HELD; i++) {
                        const int v =
                            SCALES == 1 ? i / 2 + i % 2 * 4 : s * WITH_SCALE + i;  // halves of a plane
                        const vb w = BITS == 8 ? eight[v] : weights_of(block, part, v);
                        EACH_ROW sums[t] = dot_four(sums[t], w, q + t * GROUP + 4 * v);
                        if (fine) EACH_ROW rests[t] = dot_four(rests[t], w, rest + t * GROUP + 4 * v);
                    }
                    EACH_ROW whole[t] += whole_of(sums[t]);
                    if (fine) EACH_ROW less[t] += whole_of(rests[t]);
                }
                if (fine) EACH_ROW whole[t] = whole[t] * BASE + less[t];
                const vf scales = BITS == 8 ? scales_of_8_bits : numbers_of(of, ends, s, part, unit);
                const vf lows = of.lows ? numbers_of(of, ends, SCALES + s, part, low_unit) : scales * -CENTRE;
                EACH_ROW {
                    const float *sums = SCALES == 1 ? x.sums + at + t : x.halves + 2 * (at + t) + s;
                    acc[t] = fma_(__builtin_convertvector(whole[t], vf) * x.scale[at + t], scales, acc[t]);
                    acc[t] = fma_(lows, all(*sums), acc[t]);
                }
            }
        }
        vf sums[MOST_ROWS];  // so that `acc` stays in registers
        EACH_ROW sums[t] = acc[t];
        store_lanes(c, out, T, c->n + part * LANES, sums);
    }
}

// The commonest layout is known while this is compiled, so that its blocks take fewer instructions.
ALWAYS void panel_tile(const Tile *c, const Out *out, const int T, const int fine) {
    const Layout of = LAYOUTS[c->m->type], commonest = {4, 0, 0, 1};
    if (BITS == 4 && !IN_CODES && !fine && !of.super && of.lows)
        panel_of(commonest, c, out, T, fine);
    else
        panel_of(of, c, out, T, fine);
}

#define PANELS(T) FUNCTION(panel_##T, panel_tile(c, out, T, 0))
#define FINE_PANELS(T) FUNCTION(fine_panel_##T, panel_tile(c, out, T, 1))
UP_TO_EIGHT(PANELS)
UP_TO_FOUR(FINE_PANELS)
#if BITS > 3 && !defined(CODES_OF_4_BITS)
FIVE_TO_EIGHT(FINE_PANELS)
#else
// Types that are rare: many fine rows are multiplied in two parts, which takes more time and less code.
static void fine_panel_twice(const Tile *c, const Out *out, int T) {
    static Multiply *const rest[] = {fine_panel_1, fine_panel_2, fine_panel_3, fine_panel_4};
    Tile others = *c;
    others.r += 4;
    fine_panel_4(c, out);
    rest[T - 5](&others, out);
}

#define IN_TWO_PARTS(T) FUNCTION(fine_panel_##T, fine_panel_twice(c, out, T))
FIVE_TO_EIGHT(IN_TWO_PARTS)
#endif

#if BITS == 8
// Where PANEL rows of a weight are kept: the beginnings of their panels, and their places in these.
typedef struct {
    const uint8_t *panels[PANEL];
    int places[PANEL];
} Places;

// The rows number `first` on of a list of `count`. The last one fills up.
static Places places_of(const Weight *m, const int64_t *rows, int64_t first, int64_t count) {
    Places of;
    for (int i = 0; i < PANEL; i++) {
        const int64_t row = rows[min_(first + i, count - 1)];
        of.panels[i] =
            (const uint8_t *)m->values + row / PANEL * bytes_of_panel(LAYOUTS[m->type], m->columns);
        of.places[i] = (int)(row % PANEL);
    }
    return of;
}

// Columns `from` to `to` - 1 of some rows as one panel. Those of the `next` rows, far apart, are fetched
// meanwhile.
static void gather(const Places *rows, const Places *next, int64_t from, int64_t to, uint8_t *panel) {
    for (int64_t k = from; k < to; k += LONG) {
        const int64_t at = k / LONG * LONG_BYTES, scales = PANEL * LONG;
        uint8_t *block = panel + at - from / LONG * LONG_BYTES;
        for (int i = 0; i < PANEL; i++) {
            const uint8_t *own = rows->panels[i] + at, *later = next->panels[i] + at;
            __builtin_prefetch(later + next->places[i] * LONG), __builtin_prefetch(later + scales);
            memcpy(block + i * LONG, own + rows->places[i] * LONG, LONG);
            memcpy(block + scales + i * SCALES_OF_LONG, own + scales + rows->places[i] * SCALES_OF_LONG,
                   SCALES_OF_LONG);
        }
    }
}

// Multiplies any rows of a weight, which are put into panels.
ALWAYS void pick(const Weight *m, const Rows *x, int64_t r, const int64_t *rows, int64_t count,
                 const Out *out, Multiply *multiply_panel) {
    _Alignas(64) uint8_t panel[DEPTH / LONG * LONG_BYTES];
    float results[PANEL], biases[PANEL];
    Weight one = *m;
    one.bias = m->bias ? biases : NULL;
    Places now, next = count ? places_of(m, rows, 0, count) : (Places){0};
    for (int64_t first = 0; first < count; first += PANEL) {
        now = next, next = places_of(m, rows, first + PANEL, count);
        for (int i = 0; m->bias && i < PANEL; i++) biases[i] = m->bias[rows[min_(first + i, count - 1)]];
        for (int64_t from = 0, to; from < m->columns; from = to) {
            to = min_(m->columns, from + DEPTH);
            gather(&now, &next, from, to, panel);
            one.values = panel - from / LONG * LONG_BYTES;
            multiply_panel(&(Tile){&one, x, 0, PANEL, 0, r, from, to, 0, PANEL},
                           &(Out){results, 0, from > 0});
        }
        for (int64_t i = first; i < min_(count, first + PANEL); i++)
            out->y[r * out->stride + rows[i]] = results[i - first];
    }
}
#else
// Multiplies whole panels, and picks the wanted results.
ALWAYS void pick(const Weight *m, const Rows *x, int64_t r, const int64_t *rows, int64_t count,
                 const Out *out, Multiply *panel) {
    float results[PANEL];
    for (int64_t i = 0; i < count;) {
        const int64_t from = rows[i] / PANEL * PANEL, to = min_(from + PANEL, m->rows), K = m->columns;
        for (int64_t first = 0; first < K; first += DEPTH) {
            const Tile tile = {m, x, from, PANEL, 0, r, first, min_(K, first + DEPTH), from, to};
            panel(&tile, &(Out){results - from, 0, first > 0});
        }
        for (; i < count && rows[i] < to; i++) out->y[r * out->stride + rows[i]] = results[rows[i] - from];
    }
}

#endif

static void scattered(const Weight *m, const Rows *x, int64_t r, const int64_t *rows, int64_t count,
                      const Out *out) {
    pick(m, x, r, rows, count, out, panel_1);
}

static void fine_scattered(const Weight *m, const Rows *x, int64_t r, const int64_t *rows, int64_t count,
                           const Out *out) {
    pick(m, x, r, rows, count, out, fine_panel_1);
}

#define PRODUCTS                                                                                       \
    {                                                                                                  \
        {TABLE(panel_), {0}, 0, 0, 0, scattered}, { TABLE(fine_panel_), {0}, 0, 0, 0, fine_scattered } \
    }
