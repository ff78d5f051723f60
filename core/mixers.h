// Mixers: Mamba-2 (arXiv 2405.21060), Mamba (2312.00752), and convolutions without a state behind them
// (LFM2).

#pragma once
#include "blocks.h"

// The input projection of rows.
void mixer_project(const Mixer *m, Worker *w);

// After it: the rows pass through the memories, of which there is one for each sequence, and the output is
// added to h.
void mixer_run(const Mixer *m, Worker *w, const MemoryAt *memory);

// Projects rows, and only updates the memories.
void mixer_remember(const Mixer *m, Worker *w, const MemoryAt *memory);

// The recurrences, from the outputs of the convolution on. They update the states; with `gated`, buffer x
// receives the outputs times the gate.
void mamba2_advance(const Mixer *m, Worker *w, const MemoryAt *memory, int gated);
void mamba_advance(const Mixer *m, Worker *w, const MemoryAt *memory, int gated);

// Lets heads (of Mamba: channels) `from` to `to` - 1 of a state take in the rows that they lack. Returns the
// state, of which these have been read and brought up to date.
const float *caught_up(const Mixer *m, const StateAt *state, int64_t from, int64_t to);

// Mamba-2's norm of its outputs. Returns the rows for the output projection.
Rows mamba2_outputs(const Mixer *m, Worker *w);

// The floats that a row needs in Buffers: of `low`, for Mamba's step sizes, B and C at a low rank, and step
// sizes.
static inline int64_t mixer_low(const Mixer *m) { return m->kind == MAMBA ? m->low.rows + m->inner : 0; }

// A note of one row, the `t`-th of a run, for the journal of a memory; NULL where none is taken.
static inline float *note_at(const Mixer *m, const StateAt *state, int64_t t) {
    return state->notes ? state->notes + t * note_floats(m) : NULL;
}

// The rows from r on that belong to the same sequence, of which there is at least one.
static inline int64_t rows_of_text(const Tokens *tokens, int64_t r) {
    int64_t rows = 1;
    while (r + rows < tokens->count && tokens->sequences[r + rows] == tokens->sequences[r]) rows++;
    return rows;
}
