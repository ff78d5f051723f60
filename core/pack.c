// Blocks of GGUF files' types, taken apart and kept in panels (layouts.h). The types are those of ggml
// (ggml-common.h and ggml-quants.c in llama.cpp). Values stay what they are.

#include <string.h>

#include "layouts.h"
#include "model.h"
#include "values.h"

enum { OF_SUPER = SUPER / OFFRAMP_GROUP, HALF_OF_GROUP = OFFRAMP_GROUP / 2 };

// A block of a file: SUPER columns if its type has integers as scales, else GROUP. For each group, `ends` has
// the bytes of its scales, then of its minima; `units` has the float16 numbers that these are multiplied by.
typedef struct {
    uint8_t entries[SUPER], ends[OF_SUPER][4], units[2 * HALF_PRECISION];
} Taken;

// 16 bytes as 32 entries of 4 bits: first all low halves.
static void take_nibbles(const uint8_t *from, uint8_t *entries) {
    for (int i = 0; i < HALF_OF_GROUP; i++)
        entries[i] = from[i] & 15, entries[i + HALF_OF_GROUP] = from[i] >> 4;
}

// 32 bytes as entries of `bits` bits from bit `shift` on, above the bits that are there.
static void take_bits(const uint8_t *from, int shift, int bits, int above, uint8_t *entries) {
    for (int i = 0; i < OFFRAMP_GROUP; i++)
        entries[i] |= (uint8_t)((from[i] >> shift & ((1 << bits) - 1)) << above);
}

static void take_simple(const uint8_t *block, int fifth, int ends, Taken *t) {
    memcpy(t->ends[0], block, ends);
    take_nibbles(block + ends + (fifth ? 4 : 0), t->entries);
    for (int i = 0; fifth && i < OFFRAMP_GROUP; i++)
        t->entries[i] |= (uint8_t)((block[ends + i / 8] >> i % 8 & 1) << 4);
}

// What scales and minima are multiplied by. A file subtracts minima.
static void take_units(const uint8_t *units, Taken *t) {
    memcpy(t->units, units, sizeof t->units);
    t->units[3] ^= 0x80;
}

// 8 scales and 8 minima of 6 bits, from 12 bytes.
static void take_six_bits(const uint8_t *p, Taken *t) {
    for (int g = 0; g < 4; g++) {
        t->ends[g][0] = p[g] & 63, t->ends[g][1] = p[4 + g] & 63;
        t->ends[4 + g][0] = (uint8_t)((p[8 + g] & 15) | p[g] >> 6 << 4);
        t->ends[4 + g][1] = (uint8_t)(p[8 + g] >> 4 | p[4 + g] >> 6 << 4);
    }
}

static void take_q2_k(const uint8_t *block, Taken *t) {
    const uint8_t *q = block + 16;
    for (int g = 0; g < OF_SUPER; g++) {
        take_bits(q + g / 4 * 32, g % 4 * 2, 2, 0, t->entries + g * 32);
        for (int i = 0; i < 2; i++)
            t->ends[g][i] = block[2 * g + i] & 15, t->ends[g][2 + i] = block[2 * g + i] >> 4;
    }
    take_units(block + 80, t);
}

static void take_q3_k(const uint8_t *block, Taken *t) {
    const uint8_t *q = block + 32, *scales = block + 96;
    for (int g = 0; g < OF_SUPER; g++) {
        take_bits(q + g / 4 * 32, g % 4 * 2, 2, 0, t->entries + g * 32);
        take_bits(block, g, 1, 2, t->entries + g * 32);
    }
    for (int j = 0; j < 2 * OF_SUPER; j++) {
        const int low = j < 8 ? scales[j] & 15 : scales[j - 8] >> 4,
                  high = scales[8 + j % 4] >> 2 * (j / 4) & 3;
        t->ends[j / 2][j % 2] = (uint8_t)((low | high << 4) - 32);
    }
    memcpy(t->units, block + 108, HALF_PRECISION);
}

static void take_q45_k(const uint8_t *block, int fifth, Taken *t) {
    const uint8_t *high = block + 16, *q = high + (fifth ? 32 : 0);
    for (int g = 0; g < OF_SUPER; g++) {
        take_bits(q + g / 2 * 32, g % 2 * 4, 4, 0, t->entries + g * 32);
        if (fifth) take_bits(high, g, 1, 4, t->entries + g * 32);
    }
    take_six_bits(block + 4, t);
    take_units(block, t);
}

static void take_q6_k(const uint8_t *block, Taken *t) {
    for (int g = 0; g < OF_SUPER; g++) {
        take_bits(block + g / 4 * 64 + g % 2 * 32, g % 4 / 2 * 4, 4, 0, t->entries + g * 32);
        take_bits(block + 128 + g / 4 * 32, g % 4 * 2, 2, 4, t->entries + g * 32);
        memcpy(t->ends[g], block + 192 + 2 * g, 2);
    }
    memcpy(t->units, block + 208, HALF_PRECISION);
}

static void take_iq4_xs(const uint8_t *block, Taken *t) {
    for (int g = 0; g < OF_SUPER; g++) {
        const int low = block[4 + g / 2] >> g % 2 * 4 & 15, high = block[2 + g / 4] >> g % 4 * 2 & 3;
        take_nibbles(block + 8 + g * HALF_OF_GROUP, t->entries + g * 32);
        t->ends[g][0] = (uint8_t)((low | high << 4) - 32);
    }
    memcpy(t->units, block, HALF_PRECISION);
}

static void take_block(offramp_type type, const uint8_t *block, Taken *t) {
    memset(t, 0, sizeof *t);
    switch ((int)type) {
        case OFFRAMP_Q4_0:
        case OFFRAMP_IQ4_NL: take_simple(block, 0, 2, t); break;
        case OFFRAMP_Q4_1: take_simple(block, 0, 4, t); break;
        case OFFRAMP_Q5_0: take_simple(block, 1, 2, t); break;
        case OFFRAMP_Q5_1: take_simple(block, 1, 4, t); break;
        case OFFRAMP_Q8_0: memcpy(t->ends[0], block, 2), memcpy(t->entries, block + 2, OFFRAMP_GROUP); break;
        case OFFRAMP_Q2_K: take_q2_k(block, t); break;
        case OFFRAMP_Q3_K: take_q3_k(block, t); break;
        case OFFRAMP_Q4_K: take_q45_k(block, 0, t); break;
        case OFFRAMP_Q5_K: take_q45_k(block, 1, t); break;
        case OFFRAMP_Q6_K: take_q6_k(block, t); break;
        case OFFRAMP_IQ4_XS: take_iq4_xs(block, t); break;
    }
}

// Bytes of a file's blocks.
static const int BLOCK_BYTES[OFFRAMP_STACKED] = {
    [OFFRAMP_Q4_0] = 18,  [OFFRAMP_Q4_1] = 20,  [OFFRAMP_Q5_0] = 22,   [OFFRAMP_Q5_1] = 24,
    [OFFRAMP_Q8_0] = 34,  [OFFRAMP_Q2_K] = 84,  [OFFRAMP_Q3_K] = 110,  [OFFRAMP_Q4_K] = 144,
    [OFFRAMP_Q5_K] = 176, [OFFRAMP_Q6_K] = 210, [OFFRAMP_IQ4_NL] = 18, [OFFRAMP_IQ4_XS] = 136,
};

// Puts 32 entries into the planes of a block, as row i of a panel. Four bytes of each plane are the row's.
static void put_entries(uint8_t *block, int bits, int i, const uint8_t *entries) {
    uint32_t v[8], planes[6] = {0}, *plane = planes;  // v: columns 4 v to 4 v + 3
    memcpy(v, entries, sizeof v);
    if (bits >= 4)
        for (int p = 0; p < 4; p++) *plane++ = (v[p] & 0x0f0f0f0f) | (v[p + 4] & 0x0f0f0f0f) << 4;
    const int begun = bits >= 4 ? 4 : 0;
    for (int p = 0; bits & 2 && p < 2; p++, plane++)
        for (int n = 0; n < 4; n++) *plane |= (v[4 * p + n] >> begun & 0x03030303) << 2 * n;
    for (int n = 0; bits & 1 && n < 8; n++) *plane |= (v[n] >> (bits - 1) & 0x01010101) << n;
    for (int p = 0; p < bits; p++) memcpy(block + p * PLANE + 4 * i, planes + p, 4);
}

// A row of a panel: for a span of SUPER or GROUP columns, where its units stand, where its blocks do, and
// their bytes.
typedef struct {
    Layout of;
    int64_t groups, before, bytes,
        number;  // groups of a span; bytes before its blocks; of a block; of a scale
} Spans;

static Spans spans_of(offramp_type type) {
    const Layout of = LAYOUTS[type];
    return (Spans){of, of.super ? OF_SUPER : 1, bytes_before(of), bytes_of_block(of),
                   of.super ? 1 : HALF_PRECISION};
}

static void put_span(const Spans *s, uint8_t *span, int i, const Taken *t) {
    const int numbers = (1 + s->of.lows) * SCALES_OF(s->of.bits);
    for (int u = 0; u < 1 + s->of.lows && s->before; u++)
        memcpy(span + (u * OFFRAMP_PANEL + i) * HALF_PRECISION, t->units + u * HALF_PRECISION,
               HALF_PRECISION);
    for (int64_t g = 0; g < s->groups; g++) {
        uint8_t *block = span + s->before + g * s->bytes, *ends = block + s->of.bits * PLANE;
        put_entries(block, s->of.bits, i, t->entries + g * OFFRAMP_GROUP);
        for (int n = 0; n < numbers; n++)
            memcpy(ends + (n * OFFRAMP_PANEL + i) * s->number, t->ends[g] + n * s->number, s->number);
    }
}

// Where a group of a row of 8 bits stands: its entries and its scale.
static uint8_t *long_entries(uint8_t *panel, int i, int64_t group) {
    return panel + group / 2 * LONG_BYTES + i * LONG + group % 2 * OFFRAMP_GROUP;
}
static uint8_t *long_scale(uint8_t *panel, int i, int64_t group) {
    return panel + group / 2 * LONG_BYTES + OFFRAMP_PANEL * LONG + i * SCALES_OF_LONG +
           group % 2 * HALF_PRECISION;
}

static offramp_status check_packed(offramp_type type, int64_t rows, int64_t columns, offramp_error *error) {
    NEED((int)type >= OFFRAMP_Q4_0 && type < OFFRAMP_STACKED, "Such weights are not kept in panels.");
    NEED(rows > 0 && columns > 0 && rows <= INT32_MAX && columns <= INT32_MAX &&
             columns % (LAYOUTS[type].super ? SUPER : OFFRAMP_GROUP) == 0,
         "%lld rows of %lld columns cannot be kept in panels of this type.", (long long)rows,
         (long long)columns);
    return OFFRAMP_OK;
}

int64_t offramp_packed_bytes(offramp_type type, int64_t rows, int64_t columns) {
    if (check_packed(type, rows, columns, NULL)) return -1;
    return (rows + OFFRAMP_PANEL - 1) / OFFRAMP_PANEL * bytes_of_panel(LAYOUTS[type], columns);
}

offramp_status offramp_pack(offramp_type type, const void *blocks, int64_t rows, int64_t columns,
                            void *panels, offramp_error *error) {
    if (check_packed(type, rows, columns, error)) return OFFRAMP_INVALID;
    const Spans s = spans_of(type);
    const int64_t width = s.groups * OFFRAMP_GROUP, panel_bytes = bytes_of_panel(s.of, columns);
    const uint8_t *block = blocks;
    memset(panels, 0, offramp_packed_bytes(type, rows, columns));
    for (int64_t row = 0; row < rows; row++) {
        uint8_t *panel = (uint8_t *)panels + row / OFFRAMP_PANEL * panel_bytes;
        const int i = row % OFFRAMP_PANEL;
        for (int64_t n = 0; n < columns / width; n++, block += BLOCK_BYTES[type]) {
            Taken taken;
            take_block(type, block, &taken);
            if (s.of.bits < 8) {
                put_span(&s, panel + n * (s.before + s.groups * s.bytes), i, &taken);
                continue;
            }
            memcpy(long_entries(panel, i, n), taken.entries, OFFRAMP_GROUP);
            memcpy(long_scale(panel, i, n), taken.ends[0], HALF_PRECISION);
        }
    }
    return OFFRAMP_OK;
}

// Copies row i of a panel to row j of another.
static void copy_row(const Spans *s, int64_t columns, const uint8_t *from, int i, uint8_t *to, int j) {
    const int numbers = (1 + s->of.lows) * SCALES_OF(s->of.bits);
    const int64_t groups = columns / OFFRAMP_GROUP, span = s->before + s->groups * s->bytes;
    for (int64_t g = 0; s->of.bits == 8 && g < groups; g++) {
        memcpy(long_entries(to, j, g), long_entries((uint8_t *)from, i, g), OFFRAMP_GROUP);
        memcpy(long_scale(to, j, g), long_scale((uint8_t *)from, i, g), HALF_PRECISION);
    }
    for (int64_t g = 0; s->of.bits < 8 && g < groups; g++) {
        const int64_t at = g / s->groups * span, block = at + s->before + g % s->groups * s->bytes,
                      ends = block + s->of.bits * PLANE;
        for (int u = 0; g % s->groups == 0 && s->before && u < 1 + s->of.lows; u++)
            memcpy(to + at + (u * OFFRAMP_PANEL + j) * HALF_PRECISION,
                   from + at + (u * OFFRAMP_PANEL + i) * HALF_PRECISION, HALF_PRECISION);
        for (int p = 0; p < s->of.bits; p++)
            memcpy(to + block + p * PLANE + 4 * j, from + block + p * PLANE + 4 * i, 4);
        for (int n = 0; n < numbers; n++)
            memcpy(to + ends + (n * OFFRAMP_PANEL + j) * s->number,
                   from + ends + (n * OFFRAMP_PANEL + i) * s->number, s->number);
    }
}

offramp_status offramp_pick(const offramp_weight *weight, const int64_t *rows, int64_t count, void *panels,
                            offramp_error *error) {
    if (check_weight(weight, "to pick from", error)) return OFFRAMP_INVALID;
    if (check_packed((offramp_type)weight->type, count, weight->columns, error)) return OFFRAMP_INVALID;
    for (int64_t n = 0; n < count; n++)
        NEED(rows[n] >= 0 && rows[n] < weight->rows, "The weight has no row %lld.", (long long)rows[n]);
    const Spans s = spans_of((offramp_type)weight->type);
    const int64_t panel_bytes = bytes_of_panel(s.of, weight->columns);
    memset(panels, 0, offramp_packed_bytes((offramp_type)weight->type, count, weight->columns));
    for (int64_t n = 0; n < count; n++)
        copy_row(&s, weight->columns, (const uint8_t *)weight->values + rows[n] / OFFRAMP_PANEL * panel_bytes,
                 rows[n] % OFFRAMP_PANEL, (uint8_t *)panels + n / OFFRAMP_PANEL * panel_bytes,
                 n % OFFRAMP_PANEL);
    return OFFRAMP_OK;
}

offramp_status offramp_values(const offramp_weight *weight, const int64_t *rows, int64_t count, float *values,
                              offramp_error *error) {
    if (check_weight(weight, "to read", error)) return OFFRAMP_INVALID;
    for (int64_t n = 0; n < count; n++)
        NEED(rows[n] >= 0 && rows[n] < weight->rows, "The weight has no row %lld.", (long long)rows[n]);
    for (int64_t n = 0; n < count; n++) values_of_row(weight, rows[n], values + n * weight->columns);
    return OFFRAMP_OK;
}
