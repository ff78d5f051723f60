// The product of rows with the LM head's weights.

#include "products.h"

// y (R, N) = x (R, K) · weightᵀ, for the head.
void offramp_product(const Weight *m, const float *x, int64_t R, float *y, const Scratch *scratch) {
#pragma omp parallel num_threads(scratch->threads)
    {
        const int t = omp_get_thread_num(), n = omp_get_num_threads();
        int64_t from, to;
        share(m->rows, t, n, &from, &to);
        product(m, prepare(m, x, m->columns, R, scratch->floats + t * scratch->own), R, y, m->rows, 0, from, to);
    }
}
