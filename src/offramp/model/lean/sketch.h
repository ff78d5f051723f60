// The head on those tokens only that a sketch of it finds likeliest. For head.c.

#pragma once
#include "products.h"

// A sketch: rows (D) times `reduce` (k, D) times `expand` (V, k) are estimates of the logits.
typedef struct {
    Weight reduce, expand;
    int64_t candidates;
} Sketch;

// CHUNK tokens are a piece; one of SAMPLED estimates is looked at first; rows of the head are asked for when AHEAD others are left.
enum { BITS = 11, BINS = 1 << BITS, CHUNK = 1024, DIGITS = 3, SAMPLED = 16, AHEAD = 3 };

// A number whose order as an unsigned integer is that of the floats, and back.
static inline uint32_t ordered(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static inline float from_ordered(uint32_t number) {
    const uint32_t bits = number & 0x80000000u ? number ^ 0x80000000u : ~number;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// What is known of the estimates of one row: a bound that a few more than the wanted number should not be below, how many are not,
// and the least that is wanted. Each row has its own, so that a thread that comes late still reads what the others decided by.
typedef struct {
    float bound, least;
    int64_t listed;
} Found;

// Estimates that are looked at, `counts` of them from each piece, CHUNK apart; and room to count in.
typedef struct {
    float *numbers;
    int32_t *counts, *bins;
    int64_t pieces;
} Listed;

// The n-th largest of what is listed, digit by digit.
static float nth_largest(const Listed *l, int64_t n) {
    static const int shifts[] = {32 - BITS, 32 - 2 * BITS, 0};
    uint32_t known = 0, mask = 0;
    for (int digit = 0; digit < DIGITS; digit++) {
        const int shift = shifts[digit];
        const uint32_t low = digit < 2 ? BINS - 1 : (1u << (32 - 2 * BITS)) - 1;
        memset(l->bins, 0, BINS * sizeof(int32_t));
        for (int64_t p = 0; p < l->pieces; p++)
            for (int i = 0; i < l->counts[p]; i++) {
                const uint32_t number = ordered(l->numbers[p * CHUNK + i]);
                if ((number & mask) == known) l->bins[(number >> shift) & low]++;
            }
        int64_t bin = BINS - 1;
        while (l->bins[bin] < n) n -= l->bins[bin--];
        known |= (uint32_t)bin << shift, mask |= low << shift;
    }
    return from_ordered(known);
}

// Lists, shared out, the estimates y (V) that are not below a bound.
static void list(Hand *h, const Listed *l, const float *y, int64_t V, float bound) {
    EACH_PIECE(p, h, l->pieces) {
        const int64_t from = p * CHUNK, to = min_(V, from + CHUNK);
        int32_t count = 0;
        for (int64_t i = from; i < to; i += LANES)
            for (uint32_t lanes = not_below(y + i, min_(LANES, to - i), bound); lanes; lanes &= lanes - 1)
                l->numbers[from + count++] = y[i + __builtin_ctz(lanes)];
        l->counts[p] = count;
    }
}

// The n-th largest, 1 ≤ n ≤ V, of the estimates y (V). A sample gives the bound; then only what is not below it is looked at.
static float least_of_likeliest(Hand *h, const Listed *l, const float *y, int64_t V, int64_t n, Found *found) {
    const int64_t share = n / SAMPLED, wanted = share + 4 * (int64_t)sqrtf(share) + 8;
    EACH_PIECE(i, h, 1) {
        int64_t sampled = 0;
        for (int64_t j = 0; j < V; j += SAMPLED) l->numbers[sampled++] = y[j];
        *l->counts = sampled;
        found->bound = wanted < sampled ? nth_largest(&(Listed){l->numbers, l->counts, l->bins, 1}, wanted) : -INFINITY;
    }
    list(h, l, y, V, found->bound);
    EACH_PIECE(i, h, 1) {
        for (int64_t p = 0; p < l->pieces; p++) found->listed += l->counts[p];
        if (found->listed >= n) found->least = nth_largest(l, n);
    }
    if (found->listed >= n) return found->least;
    list(h, l, y, V, -INFINITY);
    EACH_PIECE(i, h, 1) found->least = nth_largest(l, n);
    return found->least;
}

// EIGHT rows of a weight, or all `count` that are left, anywhere in it, times row r of x. Rows that come soon are asked for.
ALWAYS void scattered(const Weight *m, const Rows *x, int64_t r, const int64_t *rows, int64_t count, const Out *out, int64_t kind) {
    const int64_t K = m->columns, step = AT_ONCE(kind), bytes = row_bytes(m), some = min_(EIGHT, count);
    for (int64_t first = 0; first < K; first += DEPTH) {
        const int64_t to = min_(K, first + DEPTH);
        const Out added = {out->y, out->stride, first > 0};
        vf acc[EIGHT] = {0};
        float sums[EIGHT];
        for (int64_t i = 0; i < some; i++) {
            for (int64_t at = 0; !first && i + AHEAD < count && at < bytes; at += 64)
                expect((const char *)m->w + rows[i + AHEAD] * bytes + at);
            for (int64_t k = first; k < to; k += step) {
                const int64_t left = k + step <= to ? step : to - k;
                acc[i] = times(kind, acc[i], weights_at(kind, (const char *)m->w + rows[i] * bytes, k, left), x, r, k, left);
            }
        }
        sums_of(acc, sums);
        for (int64_t i = 0; i < some; i++) put(&(Tile){m, x, rows[i], 1, 0, r, first, to}, &added, kind, 0, rows[i], 1, sums + i);
    }
}

// The rows of a weight that stand in `rows`, in ascending order, times row r of x. Results go to their places in out.
static void chosen_rows(const Weight *m, const Rows *x, int64_t r, const int64_t *rows, int64_t count, const Out *out) {
    for (int64_t i = 0; i < count; i += EIGHT) switch (m->kind) {
            case FLOAT32: scattered(m, x, r, rows + i, count - i, out, FLOAT32); break;
            case BFLOAT16: scattered(m, x, r, rows + i, count - i, out, BFLOAT16); break;
            case INT8: scattered(m, x, r, rows + i, count - i, out, INT8); break;
            default: scattered(m, x, r, rows + i, count - i, out, FINE_INT8);
        }
}

// As `chosen_rows`, of an int4 weight: whole panels are multiplied.
static void chosen_of_panels(const Weight *m, const Rows *x, int64_t r, const int64_t *rows, int64_t count, const Out *out) {
    float panel[ROWS];
    for (int64_t i = 0; i < count;) {
        const int64_t from = rows[i] / ROWS * ROWS, to = min_(from + ROWS, m->rows), K = m->columns;
        for (int64_t first = 0; first < K; first += DEPTH)
            one[m->kind][0](&(Tile){m, x, from, ROWS, 0, r, first, min_(K, first + DEPTH), from, to}, &(Out){panel - from, 0, first > 0});
        for (; i < count && rows[i] < to; i++) out->y[r * out->stride + rows[i]] = panel[rows[i] - from];
    }
}

// Puts, shared out, the head's logits where the estimates y (V) of row r are not below `least`, and −inf elsewhere.
static void read_out(Hand *h, const Weight *head, const Rows *x, int64_t r, float least, float *y, int64_t V) {
    float *estimates = y + r * V;
    const Out out = {y, V, 0};
    EACH_PIECE(piece, h, (V + CHUNK - 1) / CHUNK) {
        int64_t chosen[CHUNK], count = 0;
        for (int64_t i = piece * CHUNK, to = min_(V, i + CHUNK); i < to; i += LANES) {
            const int64_t left = min_(LANES, to - i);
            for (uint32_t lanes = not_below(estimates + i, left, least); lanes; lanes &= lanes - 1)
                chosen[count++] = i + __builtin_ctz(lanes);
            store_up_to(estimates + i, all(-INFINITY), left);
        }
        (IS_INT4(head->kind) ? chosen_of_panels : chosen_rows)(head, x, r, chosen, count, &out);
    }
}
