// The LM head, a product, and a single gate.

#include "gates.h"
#include "head.h"

// y (R, N) = x (R, K) · weightᵀ. The scratch holds R · (K + 64) shared floats.
void offramp_product(const Weight *m, const float *x, int64_t R, float *y, const Scratch *scratch) {
    Crew crew = {0};
#pragma omp parallel num_threads(scratch->threads)
    {
        Hand hand = hand_of(&crew);
        const Rows rows = prepare(&hand, m, x, m->columns, R, scratch->floats);
        multiply(&hand, m, rows, R, (Out){y, m->rows, 0}, 0, m->rows);
    }
}

// y (R, V): logits of hidden states h (R, D), as `read_logits` puts them. The scratch has its floats.
void offramp_logits(const Head *head, const Sketch *sketch, const float *h, int64_t R, float *y, const Scratch *scratch) {
    Crew crew = {0};
    Found found[R];
    memset(found, 0, sizeof found);
#pragma omp parallel num_threads(scratch->threads)
    {
        Hand hand = hand_of(&crew);
        read_logits(&hand, head, sketch, h, R, scratch->head, found, y);
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
