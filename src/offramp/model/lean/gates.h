// Gates of exits, asked between blocks: a row stops at the first one that is sure enough. For head.c, llama.c and mamba2.c.
// exits/gates.py says what a gate computes.

#pragma once
#include "products.h"

typedef struct {
    int64_t after;     // the number of blocks that run before it
    Weight in;         // with `out`: a gate above an up projection, (2W, D); without: the only map, (1, D)
    const float *mean, *spread;
    const float *out;  // (W), or NULL
    float bias, threshold;
} Gate;

// The gates on a row's way, in order, and what they are told and say: hidden states (count, D) and logits.
typedef struct {
    const Gate *gates;
    int64_t count;
    float *seen, *logits;
} Gates;

// What the asking threads work with: x (D) and act (2W) are shared; room is as for `prepare`.
typedef struct {
    float *x, *act, *room;
} Asker;

enum { MOST_SPREADS = 8 };

// Standardise of exits/parts.py: h (D) to x.
static void standardise(const float *h, const float *mean, const float *spread, int64_t D, float *x) {
    for (int64_t k = 0; k < D; k++) {
        const float y = (h[k] - mean[k]) / spread[k];
        x[k] = y < -MOST_SPREADS ? -MOST_SPREADS : y > MOST_SPREADS ? MOST_SPREADS : y;
    }
}

// Asks a gate about a hidden state h (D), shared out. Writes its logit.
static void ask(Hand *hand, const Gate *gate, const float *h, const Asker *a, float *logit) {
    const int64_t D = gate->in.columns, W = gate->in.rows / 2;
    const Rows row = rows_in(&gate->in, a->x, D, 1, a->room);
    EACH_PIECE(i, hand, 1) {
        standardise(h, gate->mean, gate->spread, D, a->x);
        if (narrow(gate->in.kind)) pack(&gate->in, &row, 0);
    }
    multiply(hand, &gate->in, row, 1, (Out){a->act, gate->in.rows, 0}, 0, gate->in.rows);
    EACH_PIECE(i, hand, 1) {
        float sums = a->act[0];
        if (gate->out) {
            times_silu(a->act + W, a->act, W);
            sums = sum(dots(a->act + W, gate->out, W));
        }
        *logit = sums + gate->bias;
    }
}

// Asks the gates that stand after so many blocks, from *next on. Returns whether one of them is sure enough. What decides is kept,
// so that a thread that comes late decides the same.
static int stops(Hand *hand, const Gates *gates, int64_t *next, int64_t blocks, const float *h, const Asker *a) {
    while (gates && *next < gates->count && gates->gates[*next].after == blocks) {
        const Gate *gate = gates->gates + *next;
        float *logit = gates->logits + *next, *seen = gates->seen + *next * gate->in.columns;
        (*next)++;
        EACH_PIECE(i, hand, 1) memcpy(seen, h, gate->in.columns * sizeof(float));
        if (gate->threshold == -INFINITY) {  // every row stops
            EACH_PIECE(i, hand, 1) *logit = 0;
            return 1;
        }
        ask(hand, gate, seen, a, logit);
        if (*logit > gate->threshold) return 1;
    }
    return 0;
}
