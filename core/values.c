#include "values.h"

#include "layouts.h"

// Entry k (0 to GROUP - 1) of row i in a block of a panel.
static float entry_of_block(Layout of, const uint8_t *block, int i, int k) {
    const int v = k / 4, byte = 4 * i + k % 4;
    int q = 0, begun = 0;
    if (of.bits & 4) q = block[v % 4 * PLANE + byte] >> (v < 4 ? 0 : 4) & 15, block += 4 * PLANE, begun = 4;
    if (of.bits & 2)
        q |= (block[v / 4 * PLANE + byte] >> 2 * (v % 4) & 3) << begun, block += 2 * PLANE, begun += 2;
    if (of.bits & 1) q |= (block[byte] >> v & 1) << begun;
    if (of.codes) return CODES[q];
    return (float)(of.lows ? q : q - (1 << (of.bits - 1)));
}

static float float16_at(const uint8_t *bytes, int64_t i) {
    uint16_t some[LANES] = {0};
    memcpy(some, bytes + 2 * i, 2);
    return from_float16(some)[0];
}

static void values_of_panel(const Weight *m, int64_t row, float *out) {
    const Layout of = LAYOUTS[m->type];
    const int64_t K = m->columns, before = bytes_before(of), bytes = bytes_of_block(of);
    const int i = (int)(row % PANEL), scales = SCALES_OF(of.bits);
    const uint8_t *block = (const uint8_t *)m->values + row / PANEL * bytes_of_panel(of, K), *units = block;
    for (int64_t first = 0; first < K; first += GROUP, block += bytes) {
        if (of.super && first % SUPER == 0) units = block, block += before;
        const uint8_t *ends = block + of.bits * PLANE;
        for (int k = 0; k < GROUP; k++) {
            float number[2] = {0};  // scale and minimum
            for (int low = 0; low <= of.lows; low++) {
                const int64_t at = (low * scales + k * scales / GROUP) * PANEL + i;
                number[low] =
                    of.super ? (int8_t)ends[at] * float16_at(units, low * PANEL + i) : float16_at(ends, at);
            }
            out[first + k] = entry_of_block(of, block, i, k) * number[0] + number[1];
        }
    }
}

static void values_of_long(const Weight *m, int64_t row, float *out) {
    const int64_t K = m->columns, i = row % PANEL;
    const uint8_t *block = (const uint8_t *)m->values + row / PANEL * bytes_of_panel(LAYOUTS[m->type], K);
    for (int64_t first = 0; first < K; first += LONG, block += LONG_BYTES)
        for (int64_t k = 0; k < min_(LONG, K - first); k++)
            out[first + k] = (int8_t)block[i * LONG + k] *
                             float16_at(block + PANEL * LONG + i * SCALES_OF_LONG, k / GROUP);
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
