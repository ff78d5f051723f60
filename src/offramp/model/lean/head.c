// The LM head, whole or on the tokens that a sketch finds, and a single gate.

#include "gates.h"
#include "sketch.h"

// y (R, N) = x (R, K) · weightᵀ, for the head. The scratch holds R · (K + 64) shared floats.
void offramp_product(const Weight *m, const float *x, int64_t R, float *y, const Scratch *scratch) {
#pragma omp parallel num_threads(scratch->threads)
    {
        const int t = omp_get_thread_num();
        float *panel = scratch->floats + R * (m->columns + 64) + t * scratch->own;
        int64_t from, to;
        share(m->rows, t, omp_get_num_threads(), &from, &to);
        product(m, prepare(m, x, m->columns, R, scratch->floats, panel), R, y, m->rows, 0, from, to);
    }
}

// y (R, V): logits of the head for rows x (R, D), of the `candidates` tokens of each row for which the sketch's estimates are
// highest (more if some are equal), −inf for all others. The estimates are rows z (R, k) times `sketch` (V, k). The scratch
// holds R · (k + 64) + R · (D + 64) shared floats.
void offramp_sketched(const Weight *sketch, const Weight *head, const float *z, const float *x, int64_t R, int64_t candidates,
                      float *y, const Scratch *scratch) {
#pragma omp parallel num_threads(scratch->threads)
    {
        const int64_t V = head->rows, k = sketch->columns, D = head->columns;
        const int t = omp_get_thread_num(), n = omp_get_num_threads();
        float *room = scratch->floats, *own = room + R * (k + 64) + R * (D + 64), *panel = own + t * scratch->own;
        int64_t from, to;
        share(V, t, n, &from, &to);
        product(sketch, prepare(sketch, z, k, R, room, panel), R, y, V, 0, from, to);
        const Rows rows = prepare(head, x, D, R, room + R * (k + 64), panel);
#pragma omp barrier
        for (int64_t r = 0; r < R; r++)
            read_out(head, &rows, r, nth_largest(y + r * V, V, candidates, own, scratch->own, t, n), y, V, t, n);
    }
}

// The logit of one gate for a hidden state h (D). The scratch holds 2D + 2W + 64 shared floats.
float offramp_ask(const Gate *gate, const float *h, const Scratch *scratch) {
    float logit = 0;
#pragma omp parallel num_threads(scratch->threads)
    {
        const int64_t D = gate->in.columns;
        float *x = scratch->floats, *act = x + D, *room = act + gate->in.rows;
        const int t = omp_get_thread_num();
        const Asker asker = {x, act, room, room + D + 64 + t * scratch->own, t, omp_get_num_threads()};
        const float own = ask(gate, h, &asker);
        if (!t) logit = own;
    }
    return logit;
}

// Whether int4 weights, and rows with bfloat16 and int4 weights, are rounded to bfloat16.
int64_t offramp_rounds_to_bfloat16(void) { return MULTIPLIES_BFLOAT16; }
