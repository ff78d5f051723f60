// Products with int4 weights, which stand in panels: see products.h. For a file that says KIND.

#pragma once
#include "products_kind.h"

// Adds the products of two vectors of int4 weights, each with the same four numbers of a row in all lanes.
ALWAYS vi dot_two(vi acc, vb low, vb high, const int8_t *q) {
    int32_t first, second;
    memcpy(&first, q, 4);
    memcpy(&second, q + 16, 4);
    return dot_nibbles(dot_nibbles(acc, low, (vb)(first - (vi){0})), high, (vb)(second - (vi){0}));
}

// Vectors that a row of a panel's rows takes; bytes of numbers, and of a block with its scales and minima.
enum { HALVES = PANEL / LANES, NIBBLES = PANEL * GROUP / 2, PANEL_BLOCK = NIBBLES + 4 * PANEL };

// Puts the results of half a panel, from row n on, for the tile's row t, where they belong.
ALWAYS void store_lanes(const Tile *c, const Out *out, int t, int64_t n, vf acc) {
    const int64_t first = c->first - n, last = c->last - n;
    const float *bias = c->m->bias && !c->from ? c->m->bias + n : NULL;
    float *y = out->y + (c->r + t) * out->stride + n;
    if (first <= 0 && last >= LANES) {
        const vf s = bias ? acc + load(bias) : acc;
        store(y, out->add ? load(y) + s : s);
        return;
    }
    for (int64_t i = first < 0 ? 0 : first; i < min_(last, LANES); i++) {
        const float s = bias ? acc[i] + bias[i] : acc[i];
        y[i] = out->add ? y[i] + s : s;
    }
}

// A panel of an int4 weight times T rows of x. Lane i belongs to row i of the panel (of half of it where
// vectors are short).
ALWAYS void panel_tile(const Tile *c, const Out *out, const int T) {
    const Weight *m = c->m;
    const Rows x = *c->x;
    const uint8_t *panel = (const uint8_t *)m->values + c->n / PANEL * (m->columns / GROUP) * PANEL_BLOCK;
    for (int half = 0; half < HALVES; half++) {
        vf acc[MOST_ROWS] = {0};
        for (int64_t g = c->from / GROUP; g < c->to / GROUP; g++) {
            const uint8_t *block = panel + g * PANEL_BLOCK;
            const int64_t place = c->r * x.width + g * GROUP;
            const int8_t *q = (const int8_t *)x.narrow + place, *rest = x.low + place;
            vi whole[MOST_ROWS] = {0}, less[MOST_ROWS] = {0};
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                vi both;
                memcpy(&both, block + j * PANEL * 4 + half * sizeof both, sizeof both);
                const vb low = (vb)(both & 0x0f0f0f0f), high = (vb)((both >> 4) & 0x0f0f0f0f);
                EACH_ROW whole[t] = dot_two(whole[t], low, high, q + t * x.width + 4 * j);
                if (IS_FINE(KIND)) EACH_ROW less[t] = dot_two(less[t], low, high, rest + t * x.width + 4 * j);
            }
            if (IS_FINE(KIND)) EACH_ROW whole[t] = whole[t] * BASE + less[t];
            const uint16_t *scale = (const uint16_t *)(block + NIBBLES) + half * LANES;
            const vf scales = from_float16(scale), lows = from_float16(scale + PANEL);
            EACH_ROW {
                const int64_t at = (c->r + t) * x.groups + g;
                acc[t] = fma_(__builtin_convertvector(whole[t], vf) * x.scale[at], scales, acc[t]);
                acc[t] = fma_(lows, all(x.sums[at]), acc[t]);
            }
        }
        EACH_ROW store_lanes(c, out, t, c->n + half * LANES, acc[t]);
    }
}

#define PANELS(T) FUNCTION(panel_##T, panel_tile(c, out, T))
UP_TO_EIGHT(PANELS)

// Multiplies whole panels, and picks the wanted results.
static void scattered(const Weight *m, const Rows *x, int64_t r, const int64_t *rows, int64_t count,
                      const Out *out) {
    float results[PANEL];
    for (int64_t i = 0; i < count;) {
        const int64_t from = rows[i] / PANEL * PANEL, to = min_(from + PANEL, m->rows), K = m->columns;
        for (int64_t first = 0; first < K; first += DEPTH) {
            const Tile tile = {m, x, from, PANEL, 0, r, first, min_(K, first + DEPTH), from, to};
            panel_1(&tile, &(Out){results - from, 0, first > 0});
        }
        for (; i < count && rows[i] < to; i++) out->y[r * out->stride + rows[i]] = results[rows[i] - from];
    }
}

#define PRODUCTS {TABLE(panel_), {0}, 0, 0, 0, scattered}
