// The head on those tokens only that a sketch of it finds likeliest. For head.c.

#pragma once
#include "products.h"

enum { BITS = 11, BINS = 1 << BITS, CHUNK = 256 };  // CHUNK tokens in turn go to each thread

// A number whose order as an unsigned integer is that of the floats.
static inline uint32_t ordered(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The `wanted`-th largest of V numbers, as `ordered` gives it. Found digit by digit: each thread counts the digits of its own
// chunks in its bins, which stand `apart` floats from those of the next thread.
static uint32_t nth_largest(const float *y, int64_t V, int64_t wanted, float *bins, int64_t apart, int t, int n) {
    static const int shifts[] = {32 - BITS, 32 - 2 * BITS, 0};
    uint32_t known = 0, mask = 0;
    for (int digit = 0; digit < 3; digit++) {
        const int shift = shifts[digit];
        const uint32_t low = digit < 2 ? BINS - 1 : (1u << (32 - 2 * BITS)) - 1;
        int32_t *own = (int32_t *)(bins + t * apart);
        memset(own, 0, BINS * sizeof(int32_t));
        for (int64_t first = t * CHUNK; first < V; first += n * CHUNK)
            for (int64_t i = first; i < first + CHUNK && i < V; i++) {
                const uint32_t number = ordered(y[i]);
                if ((number & mask) == known) own[(number >> shift) & low]++;
            }
#pragma omp barrier
        int64_t bin = BINS, above = 0, here = 0;
        while (above + here < wanted && bin > 0) {
            above += here, here = 0, bin--;
            for (int other = 0; other < n; other++) here += ((int32_t *)(bins + other * apart))[bin];
        }
        wanted -= above;
        known |= (uint32_t)bin << shift;
        mask |= low << shift;
#pragma omp barrier
    }
    return known;
}

// Row r of x times weight row n.
static inline void one_product(const Weight *m, const Rows *x, int64_t r, int64_t n, float *y, int64_t stride) {
    for (int64_t first = 0; first < m->columns; first += DEPTH) {
        const Out out = {y, stride, first > 0};
        forms[m->kind].tiles[0][0](&(Tile){m, x, n, r, first, min_(m->columns, first + DEPTH)}, &out);
    }
}

// Puts the head's logits where the estimates y (V) of row r are at least the least one, and −inf elsewhere.
static void read_out(const Weight *head, const Rows *x, int64_t r, uint32_t least, float *y, int64_t V, int t, int n) {
    const int64_t bytes = (const int64_t[]){4, 2, 1, 0}[head->kind] * head->columns;
    float *row = y + r * V;
    for (int64_t first = t * CHUNK; first < V; first += n * CHUNK) {
        int64_t chosen[CHUNK], count = 0;
        for (int64_t i = first; i < first + CHUNK && i < V; i++) {
            if (ordered(row[i]) >= least) chosen[count++] = i;
            row[i] = -INFINITY;
        }
        for (int64_t c = 0; c < count; c++) {
            if (c + 2 < count)
                for (int64_t at = 0; at < bytes; at += 64) expect((const char *)head->w + chosen[c + 2] * bytes + at);
            one_product(head, x, r, chosen[c], y, V);
        }
    }
}
