// Attention of decoder blocks, with its norm before it (llama) or after it (olmo2), and the gated MLP that
// follows.

#pragma once
#include "attend.h"
#include "blocks.h"

// Norm and projections to queries, keys and values, which are stored; then attention, and the output
// projection, added to h. There is a memory for each sequence.
void attention_run(const Attention *a, Worker *w, const MemoryAt *memory);

// As attention_run, but only stores keys and values.
void attention_remember(const Attention *a, Worker *w, const MemoryAt *memory);

// The gated MLP of a block, added to h.
void mlp_run(const Mlp *m, Worker *w);

// The number of floats that a row needs in Buffers: of `x`, `mixed` and `parts` (for few rows up to position
// `end` - 1), and of `local`.
static inline int64_t attention_parts(const Attention *a, int64_t end) {
    return softmax_floats(a->queries, a->dim) * (end / STRETCH + 1);
}
static inline int64_t attention_local(const Attention *a) {
    return 2 * softmax_floats(EIGHT * (a->queries / a->heads), a->dim);
}
