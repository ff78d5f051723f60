// The head on those tokens only that a sketch of it finds likeliest. For head.c.

#pragma once
#include "products.h"

enum { BITS = 11, BINS = 1 << BITS, CHUNK = 1024, DIGITS = 3 };  // CHUNK tokens are a piece

// A number whose order as an unsigned integer is that of the floats.
static inline uint32_t ordered(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// What finds the n-th largest of V numbers: its digits so far, with each the mask of what is known, and how many numbers with the
// known digits are still to be passed. For each piece, `bins`.
typedef struct {
    uint32_t known[DIGITS + 1], mask[DIGITS + 1];
    int64_t wanted[DIGITS + 1];
} Found;

// Finds, shared out, the `found->wanted[0]`-th largest of V numbers: known[DIGITS], as `ordered` gives it. Digit by digit, the
// digits of each of the `lots` parts of the numbers are counted in bins of its own.
static void find_nth_largest(Hand *h, const float *y, int64_t V, Found *found, int32_t *bins, int64_t lots) {
    static const int shifts[] = {32 - BITS, 32 - 2 * BITS, 0};
    for (int digit = 0; digit < DIGITS; digit++) {
        const int shift = shifts[digit];
        const uint32_t low = digit < 2 ? BINS - 1 : (1u << (32 - 2 * BITS)) - 1;
        EACH_PIECE(lot, h, lots) {
            int32_t *own = bins + lot * BINS;
            memset(own, 0, BINS * sizeof(int32_t));
            for (int64_t i = V * lot / lots; i < V * (lot + 1) / lots; i++) {
                const uint32_t number = ordered(y[i]);
                if ((number & found->mask[digit]) == found->known[digit]) own[(number >> shift) & low]++;
            }
        }
        EACH_PIECE(i, h, 1) {
            int64_t bin = BINS, above = 0, here = 0;
            while (above + here < found->wanted[digit] && bin > 0) {
                above += here, here = 0, bin--;
                for (int64_t lot = 0; lot < lots; lot++) here += bins[lot * BINS + bin];
            }
            found->wanted[digit + 1] = found->wanted[digit] - above;
            found->known[digit + 1] = found->known[digit] | (uint32_t)bin << shift;
            found->mask[digit + 1] = found->mask[digit] | low << shift;
        }
    }
}

// Row r of x times rows `from` to `to` - 1 of the weight, of which there is one, or a panel.
static inline void one_product(const Weight *m, const Rows *x, int64_t r, int64_t from, int64_t to, float *y, int64_t stride) {
    for (int64_t first = 0; first < m->columns; first += DEPTH) {
        const Out out = {y, stride, first > 0};
        one[m->kind][0](&(Tile){m, x, from, to - from, 0, r, first, min_(m->columns, first + DEPTH), from, to}, &out);
    }
}

// Puts, shared out, the head's logits where the estimates y (V) of row r are at least the least one, and −inf elsewhere. Of an int4
// head, whole panels are multiplied.
static void read_out(Hand *h, const Weight *head, const Rows *x, int64_t r, uint32_t least, float *y, int64_t V) {
    const int64_t bytes = IS_INT4(head->kind) ? 0 : row_bytes(head), several = IS_INT4(head->kind) ? ROWS : 1;
    float *row = y + r * V;
    EACH_PIECE(piece, h, (V + CHUNK - 1) / CHUNK) {
        int64_t chosen[CHUNK], count = 0;
        for (int64_t i = piece * CHUNK; i < (piece + 1) * CHUNK && i < V; i++) {
            if (ordered(row[i]) >= least) chosen[count++] = i;
            row[i] = -INFINITY;
        }
        for (int64_t c = 0; c < count; c++) {
            const int64_t from = chosen[c] / several * several, to = min_(from + several, V);
            if (c + 2 < count)
                for (int64_t at = 0; at < bytes; at += 64) expect((const char *)head->w + chosen[c + 2] * bytes + at);
            one_product(head, x, r, from, to, y, V);
            if (several == 1) continue;
            float panel[ROWS];
            memcpy(panel, row + from, (to - from) * sizeof(float));
            for (int64_t i = from; i < to; i++) row[i] = -INFINITY;
            for (; c < count && chosen[c] < to; c++) row[chosen[c]] = panel[chosen[c] - from];
            c--;
        }
    }
}
