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

// What is subtracted from weights, where no minimum is kept.
enum { CENTRE = BITS == 8 || IN_CODES ? OFFSET : 1 << (BITS - 1) };

// Columns 4 v to 4 v + 3 of a block's rows: of part `part` of them.
ALWAYS vb weights_of(const uint8_t *block, int part, int v) {
#define PLANE_AT(i)                                                                   \
    ({                                                                                \
        vu plane;                                                                     \
        memcpy(&plane, block + (i) * PLANE + part * (int)sizeof plane, sizeof plane); \
        plane;                                                                        \
    })
#define MOVED(bits, from, to) ((from) < (to) ? (bits) << ((to) - (from)) : (bits) >> ((from) - (to)))
    enum { TWO = BITS >= 4 ? 4 : 0, ONE = BITS == 5 ? 4 : 2 };  // planes of 2 bits, and of 1, begin there
    if (BITS == 8) return (vb)PLANE_AT(v);
    vu w = {0};
    if (BITS >= 4) w = MOVED(PLANE_AT(v % 4), v < 4 ? 0 : 4, 0) & 0x0f0f0f0f;
    if (BITS == 6) w |= MOVED(PLANE_AT(TWO + v / 4), 2 * (v % 4), 4) & 0x30303030;
    if (BITS < 4) w = MOVED(PLANE_AT(TWO + v / 4), 2 * (v % 4), 0) & 0x03030303;
    if (BITS == 5) w |= MOVED(PLANE_AT(ONE), v, 4) & 0x10101010;
    if (BITS == 3) w |= MOVED(PLANE_AT(ONE), v, 2) & 0x04040404;
    return IN_CODES ? look_up(CODES, (vb)w) : (vb)w;
}

// Adds the products of weights with the same four numbers of a row in all lanes.
ALWAYS vi dot_four(vi acc, vb w, const int8_t *q) {
    int32_t four;
    memcpy(&four, q, 4);
    return BITS == 8 || IN_CODES ? dot_bytes(acc, w, (vb)(four - (vi){0}))
                                 : dot_small(acc, w, (vb)(four - (vi){0}));
}

// Scales or minima number `s` of a block, for one part of the rows; `ends` are all of the block, `unit` is what
// integers are multiplied by.
ALWAYS vf numbers_of(Layout of, const uint8_t *ends, int s, int part, vf unit) {
    const int64_t at = s * PANEL + part * LANES;
    return of.super ? from_int8((const int8_t *)ends + at) * unit : from_float16((const uint16_t *)ends + at);
}

// A panel of a weight times T rows of x. Lane i belongs to row i of the panel (of a part of it where vectors are
// short).
ALWAYS void panel_of(const Layout of, const Tile *c, const Out *out, const int T, const int fine) {
    const Rows x = *c->x;
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
            const uint8_t *ends = block + BITS * PLANE;
            const int64_t place = c->r * x.width + g * GROUP;
            const int8_t *q = (const int8_t *)x.narrow + place, *rest = x.low + place;
#pragma GCC unroll 2
            for (int s = 0; s < SCALES; s++) {
                vi whole[MOST_ROWS] = {0}, less[MOST_ROWS] = {0};
#pragma GCC unroll 8
                for (int i = 0; i < WITH_SCALE; i++) {
                    const int v = SCALES == 1 ? i / 2 + i % 2 * 4 : s * WITH_SCALE + i;  // halves of a plane
                    const vb w = weights_of(block, part, v);
                    EACH_ROW whole[t] = dot_four(whole[t], w, q + t * x.width + 4 * v);
                    if (fine) EACH_ROW less[t] = dot_four(less[t], w, rest + t * x.width + 4 * v);
                }
                if (fine) EACH_ROW whole[t] = whole[t] * BASE + less[t];
                const vf scales = numbers_of(of, ends, s, part, unit);
                const vf lows = of.lows ? numbers_of(of, ends, SCALES + s, part, low_unit) : scales * -CENTRE;
                EACH_ROW {
                    const int64_t at = (c->r + t) * x.groups + g;
                    const float *sums = SCALES == 1 ? x.sums + at : x.halves + 2 * at + s;
                    acc[t] = fma_(__builtin_convertvector(whole[t], vf) * x.scale[at], scales, acc[t]);
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
    if (BITS == 4 && !IN_CODES && !of.super && of.lows)
        panel_of(commonest, c, out, T, fine);
    else
        panel_of(of, c, out, T, fine);
}

#define PANELS(T) \
    FUNCTION(panel_##T, panel_tile(c, out, T, 0)) FUNCTION(fine_panel_##T, panel_tile(c, out, T, 1))
UP_TO_EIGHT(PANELS)

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
