// The product of rows with the LM head's weights.

#include "products.h"

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

// Whether int4 weights, and rows with bfloat16 and int4 weights, are rounded to bfloat16.
int64_t offramp_rounds_to_bfloat16(void) { return MULTIPLIES_BFLOAT16; }
