// The kernel of attention: one row's queries over keys and values in float32 or bfloat16.

#pragma once
#include "vectors.h"

// The number of positions that are attended to at once, and the number whose softmax is one part of the sum.
// Both kinds of pieces begin at multiples of these numbers.
enum { PIECE = 64, STRETCH = 256 };

// What is attended to: keys and values of one head, in float32 or bfloat16 (`half`), `step` bytes from one
// position to the next, of P dims each.
typedef struct {
    const char *keys, *values;
    int64_t step, P;
    float scale, cap;  // scores are capped: cap · tanh(score / cap), unless it is 0
    const char *next;  // the next positions, to be fetched soon
    int64_t ahead;     // bytes of it to ask for with every EIGHT positions
} Seen;

// The outputs of queries so far (P dims each), not yet divided by `total`, the sum of their weights exp(score
// - most).
typedef struct {
    float *most, *total, *out;
} Softmax;

// The floats of a Softmax of so many queries, and one that begins at a place.
static inline int64_t softmax_floats(int64_t queries, int64_t P) { return queries * (P + 2); }
static inline Softmax softmax_at(float *place, int64_t queries) {
    return (Softmax){place, place + queries, place + 2 * queries};
}

void softmax_begin(Softmax softmax, int64_t queries, int64_t P);

// Adds one more part of the sum over the positions.
void softmax_merge(Softmax sum, Softmax part, int64_t queries, int64_t P);

// Brings the softmax of a row's queries (group, P) up to date with positions `from` to `to` - 1 of one piece
// ("online softmax", arXiv 1805.02867).
void attend_group(const float *q, const Seen *seen, int64_t from, int64_t to, Softmax so_far, int64_t group,
                  int half);
