// The rows of one call, for llama.c and mamba2.c.

#pragma once
#include "products.h"

// Row r is at position positions[r] of sequence sequences[r]; turn (count, P) are the rotary pairs. The rows of a sequence follow
// each other. `taken` is `sequences` for mixers: -1 for padding, which no state takes in. `journal`, unless it is NULL, receives
// what each row does to the memory of a mixer: (blocks, stride, 2C + H), of which the first `count` rows of a block are written:
// the convolution's inputs, its outputs, and dt.
typedef struct {
    float *h;  // (count, D)
    int64_t count;
    const int64_t *positions, *sequences, *taken;
    const float *turn;
    int64_t end;  // one more than the highest position
    float *journal;
    int64_t stride;
} Tokens;
