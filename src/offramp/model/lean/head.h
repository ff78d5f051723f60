// The final norm and the LM head, whole or on the tokens that a sketch finds. For head.c, llama.c and mamba2.c.

#pragma once
#include "sketch.h"

typedef struct {
    Weight weight;
    const float *norm;
    float eps;
} Head;

// Puts logits of hidden states h (R, D) into y (R, V), shared out. With a sketch (else NULL), only the candidates of each row get
// theirs (more if estimates are equal), and all others −inf; `found` (R) is zeros. `floats` has room for R · (2D + 64), and with a
// sketch of k dims for R · (2k + 128) + n · (CHUNK + 1) + BINS more, for the n CHUNKs of V.
static void read_logits(Hand *hand, const Head *head, const Sketch *sketch, const float *h, int64_t R, float *floats, Found *found,
                        float *y) {
    const Weight *m = &head->weight;
    const int64_t V = m->rows, D = m->columns;
    float *x = floats, *room = x + R * D;
    const Rows rows = prepare_normed(hand, m, h, head->norm, head->eps, R, x, room);
    if (!sketch) {
        multiply(hand, m, rows, R, (Out){y, V, 0}, 0, V);
        return;
    }
    const Weight *reduce = &sketch->reduce, *expand = &sketch->expand;
    const int64_t k = reduce->rows, pieces = (V + CHUNK - 1) / CHUNK;
    float *z = room + R * (D + 64), *z_room = z + R * k, *numbers = z_room + R * (k + 128);
    int32_t *counts = (int32_t *)(numbers + pieces * CHUNK);
    const Listed listed = {numbers, counts, counts + pieces, pieces};
    multiply(hand, reduce, rows_in(reduce, x, D, R, z_room), R, (Out){z, k, 0}, 0, k);
    multiply(hand, expand, prepare(hand, expand, z, k, R, z_room), R, (Out){y, V, 0}, 0, V);
    for (int64_t r = 0; r < R; r++) {
        const float least = least_of_likeliest(hand, &listed, y + r * V, V, sketch->candidates, found + r);
        read_out(hand, m, &rows, r, least, y, V);
    }
}
