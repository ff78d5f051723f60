// Attention of decoder blocks, and the gated MLP that follows.

#pragma once
#include "attend.h"
#include "blocks.h"

// Projects rows to queries, keys and values; keys and values are stored. There is a memory for each sequence.
void attention_project(const Attention *a, Worker *w, const MemoryAt *memory);

// The same for keys and values alone.
void attention_remember(const Attention *a, Worker *w, const MemoryAt *memory);

// After attention_project: attention and the output projection, added to h.
void attention_run(const Attention *a, Worker *w, const MemoryAt *memory);

// The gated MLP of a block, added to h.
void mlp_run(const Mlp *m, Worker *w);

// The number of floats that a row needs in Buffers: of `parts` (for few rows up to position
// `end` - 1), and of `local`.
static inline int64_t attention_parts(const Attention *a, int64_t end) {
    return softmax_floats(a->queries, a->dim) * (end / STRETCH + 1);
}
static inline int64_t attention_local(const Attention *a) {
    return 2 * softmax_floats(EIGHT * (a->queries / a->heads), a->dim);
}
