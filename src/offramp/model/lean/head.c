// The LM head, whole or on the tokens that a sketch finds, and a single gate.

#include "gates.h"
#include "sketch.h"

// y (R, N) = x (R, K) · weightᵀ, for the head. The scratch holds R · (K + 64) shared floats.
void offramp_product(const Weight *m, const float *x, int64_t R, float *y, const Scratch *scratch) {
    Crew crew = {0};
#pragma omp parallel num_threads(scratch->threads)
    {
        Hand hand = hand_of(&crew);
        const Rows rows = prepare(&hand, m, x, m->columns, R, scratch->floats);
        multiply(&hand, m, rows, R, (Out){y, m->rows, 0}, 0, m->rows);
    }
}

// y (R, V): logits of the head for rows x (R, D), of the `candidates` tokens of each row for which the sketch's estimates are
// highest (more if some are equal), −inf for all others. The estimates are rows z (R, k) times `sketch` (V, k). The scratch
// holds R · (k + 64) + R · (D + 64) shared floats; a thread's own hold BINS.
void offramp_sketched(const Weight *sketch, const Weight *head, const float *z, const float *x, int64_t R, int64_t candidates,
                      float *y, const Scratch *scratch) {
    Crew crew = {0};
    Found found = {0};
#pragma omp parallel num_threads(scratch->threads)
    {
        Hand hand = hand_of(&crew);
        const int64_t V = head->rows, k = sketch->columns, D = head->columns;
        float *room = scratch->floats, *bins = room + R * (k + 64) + R * (D + 64);
        multiply(&hand, sketch, prepare(&hand, sketch, z, k, R, room), R, (Out){y, V, 0}, 0, V);
        const Rows rows = prepare(&hand, head, x, D, R, room + R * (k + 64));
        for (int64_t r = 0; r < R; r++) {
            EACH_PIECE(i, &hand, 1) found.wanted[0] = candidates;
            find_nth_largest(&hand, y + r * V, V, &found, (int32_t *)bins, hand.n);
            read_out(&hand, head, &rows, r, found.known[DIGITS], y, V);
        }
    }
}

// The logit of one gate for a hidden state h (D). The scratch holds 2D + 2W + 64 shared floats.
float offramp_ask(const Gate *gate, const float *h, const Scratch *scratch) {
    Crew crew = {0};
    float logit = 0;
#pragma omp parallel num_threads(scratch->threads)
    {
        Hand hand = hand_of(&crew);
        float *x = scratch->floats, *act = x + gate->in.columns;
        ask(&hand, gate, h, &(Asker){x, act, act + gate->in.rows}, &logit);
    }
    return logit;
}

// Which of the processor's instructions multiply.
const char *offramp_kernels(void) { return KERNELS; }
