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

// The team of threads that asks, and what it works with: x (D) and act (2W) are shared; room and local are as for `prepare`.
typedef struct {
    float *x, *act, *room, *local;
    int t, n;
} Asker;

enum { MOST_SPREADS = 8 };  // of Standardise in exits/parts.py

// Asks gate g about a hidden state h (D). All threads get the same logit. They may change x and act right after.
static float ask(const Gate *gate, const float *h, const Asker *a) {
    const int64_t D = gate->in.columns, W = gate->in.rows / 2;
    int64_t from, to;
    share(D, a->t, a->n, &from, &to);
    for (int64_t k = from; k < to; k++) {
        const float x = (h[k] - gate->mean[k]) / gate->spread[k];
        a->x[k] = x < -MOST_SPREADS ? -MOST_SPREADS : x > MOST_SPREADS ? MOST_SPREADS : x;
    }
#pragma omp barrier
    const Rows row = prepare(&gate->in, a->x, D, 1, a->room, a->local);
    if (gate->out) {
        share(W, a->t, a->n, &from, &to);
        product(&gate->in, row, 1, a->act, 2 * W, 0, from, to);
        product(&gate->in, row, 1, a->act, 2 * W, 0, W + from, W + to);
        for (int64_t k = from; k < to; k += LANES)
            store_up_to(a->act + k, silu(load_up_to(a->act + k, to - k)) * load_up_to(a->act + W + k, to - k), to - k);
    } else if (!a->t) {
        product(&gate->in, row, 1, a->act, 1, 0, 0, 1);
    }
#pragma omp barrier
    const float logit = (gate->out ? sum(dots(a->act, gate->out, W)) : a->act[0]) + gate->bias;
#pragma omp barrier
    return logit;
}

// Asks the gates that stand after so many blocks, from *next on. Returns whether one of them is sure enough.
static int stops(const Gates *gates, int64_t *next, int64_t blocks, const float *h, const Asker *a) {
    while (gates && *next < gates->count && gates->gates[*next].after == blocks) {
        const Gate *gate = gates->gates + *next;
        const int open = gate->threshold == -INFINITY;  // every row stops
        const float logit = open ? 0 : ask(gate, h, a);
        if (!a->t) {
            memcpy(gates->seen + *next * gate->in.columns, h, gate->in.columns * sizeof(float));
            gates->logits[*next] = logit;
        }
        (*next)++;
        if (open || logit > gate->threshold) return 1;
    }
    return 0;
}
