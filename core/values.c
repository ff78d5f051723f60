#include "values.h"

#include "layouts.h"

// The four bytes of row i in plane p of a block.
static uint32_t in_plane(const uint8_t *block, int i, int p) {
    uint32_t bytes;
    memcpy(&bytes, block + p * PLANE + 4 * i, sizeof bytes);
    return bytes;
}

// The GROUP entries of row i in a block of a panel.
static void entries_of_block(Layout of, const uint8_t *block, int i, uint8_t *entries) {
    uint32_t v[8] = {0};  // columns 4 v to 4 v + 3
    const int begun = of.bits & 4;
    for (int p = 0; p < begun; p++)
        v[p] = in_plane(block, i, p) & 0x0f0f0f0f, v[p + 4] = in_plane(block, i, p) >> 4 & 0x0f0f0f0f;
    for (int n = 0; of.bits & 2 && n < 8; n++)
        v[n] |= (in_plane(block, i, begun + n / 4) >> 2 * (n % 4) & 0x03030303) << begun;
    for (int n = 0; of.bits & 1 && n < 8; n++)
        v[n] |= (in_plane(block, i, of.bits - 1) >> n & 0x01010101) << (of.bits - 1);
    memcpy(entries, v, sizeof v);
}

static float float16_at(const uint8_t *bytes, int64_t i) {
    uint16_t some[LANES] = {0};
    memcpy(some, bytes + 2 * i, 2);
    return from_float16(some)[0];
}

static void values_of_panel(const Weight *m, int64_t row, float *out) {
    const Layout of = LAYOUTS[m->type];
    const int64_t K = m->columns, before = bytes_before(of), bytes = bytes_of_block(of);
    const int i = (int)(row % PANEL), scales = SCALES_OF(of.bits), centre = of.lows ? 0 : 1 << (of.bits - 1);
    const uint8_t *block = (const uint8_t *)m->values + row / PANEL * bytes_of_panel(of, K), *units = block;
    for (int64_t first = 0; first < K; first += GROUP, block += bytes) {
        if (of.super && first % SUPER == 0) units = block, block += before;
        const uint8_t *ends = block + of.bits * PLANE;
        uint8_t entries[GROUP];
        entries_of_block(of, block, i, entries);
        for (int n = 0; n < scales; n++) {
            float number[2] = {0};  // scale and minimum
            for (int low = 0; low <= of.lows; low++) {
                const int64_t at = (low * scales + n) * PANEL + i;
                number[low] =
                    of.super ? (int8_t)ends[at] * float16_at(units, low * PANEL + i) : float16_at(ends, at);
            }
            for (int k = n * GROUP / scales; k < (n + 1) * GROUP / scales; k++) {
                const int q = of.codes ? CODES[entries[k]] : entries[k] - centre;
                out[first + k] = (float)q * number[0] + number[1];
            }
        }
    }
}

static void values_of_long(const Weight *m, int64_t row, float *out) {
    const int64_t K = m->columns, i = row % PANEL;
    const uint8_t *block = (const uint8_t *)m->values + row / PANEL * bytes_of_panel(LAYOUTS[m->type], K);
    for (int64_t first = 0; first < K; first += GROUP) {
        const int64_t half = first / GROUP % 2;
        const int8_t *entries = (const int8_t *)block + i * LONG + half * GROUP;
        const float scale = float16_at(block + PANEL * LONG + i * SCALES_OF_LONG, half);
        for (int k = 0; k < GROUP; k++) out[first + k] = entries[k] * scale;
        block += half * LONG_BYTES;
    }
}

void values_of_row(const Weight *m, int64_t row, float *out) {
    const int64_t K = m->columns;
    const char *values = m->values;
    if (m->type == OFFRAMP_STACKED) {
        const Weight *piece = m->values;
        for (; row >= piece->rows; piece++) row -= piece->rows;
        values_of_row(piece, row, out);
        return;
    }
    if (in_panels(m)) {
        (LAYOUTS[m->type].bits == 8 ? values_of_long : values_of_panel)(m, row, out);
        return;
    }
    for (int64_t k = 0; k < K; k += LANES) {
        const int64_t at = row * K + k, left = K - k;
        vf v = {0};
        if (m->type == OFFRAMP_FLOAT32) v = load_up_to((const float *)values + at, left);
        if (m->type == OFFRAMP_BFLOAT16) v = from_bfloat16((const uint16_t *)values + at, left);
        if (m->type == OFFRAMP_FLOAT16) v = float16_up_to((const uint16_t *)values + at, left);
        if (m->type == OFFRAMP_INT8)
            for (int64_t i = 0; i < min_(left, LANES); i++) v[i] = (int8_t)values[at + i] * m->scales[row];
        store_up_to(out + k, v, left);
    }
}
