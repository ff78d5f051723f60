// Products of rows with weights in any format, shared out among the threads of a call.
//
// Weights are read in the order in which they stand in memory: the processor fetches one stream ahead of
// time, but hardly several.
#pragma once
#include "rows.h"
#include "threads.h"

// The place for a product's results: rows `stride` apart. With `add`, they are added to what is there.
typedef struct {
    float *y;
    int64_t stride;
    int add;
} Out;

// The bytes of a row of weights, where rows stand one after another.
static inline int64_t row_bytes(const Weight *m) {
    return m->columns * (m->type == OFFRAMP_FLOAT32 ? 4 : m->type == OFFRAMP_INT8 ? 1 : 2);
}

// Multiplies R rows of x with rows `from` to `to` - 1 of the weight, and unless `apart` is 0 with as many
// from row `from` + `apart` on. The sum over the columns is made in pieces of DEPTH, whether there are few
// rows or many.
void product(const Weight *m, const Rows *x, int64_t R, Out out, int64_t from, int64_t to, int64_t apart);

// Multiplies R rows of x with rows `first` to `last` - 1 of the weight, shared out.
void multiply(Hand *hand, const Weight *m, Rows x, int64_t R, Out out, int64_t first, int64_t last);

// Multiplies row r of x with those rows of the weight that stand in `chosen`, in ascending order. Results go
// to their places.
void multiply_chosen(const Weight *m, const Rows *x, int64_t r, const int64_t *chosen, int64_t count,
                     Out out);

// The unit in which a weight's rows are shared out: whole panels, or a few rows.
int64_t unit_of(const Weight *m);

// Root mean square norm: x (n) / √(mean x² + eps) · weight.
void rms_norm(const float *x, const float *weight, float eps, float *out, int64_t n);

// Rows of a weight's columns, made narrow, shared out. `prepare_normed` norms rows h (R, K) to x first.
Rows prepare(Hand *hand, const Weight *m, const float *x, int64_t stride, int64_t R, float *room);
Rows prepare_normed(Hand *hand, const Weight *m, const float *h, const float *weight, float eps, int64_t R,
                    float *x, float *room);
