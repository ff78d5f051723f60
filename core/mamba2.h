// Mamba-2 mixers (arXiv 2405.21060), with the norm before them, if they have one.

#pragma once
#include "blocks.h"

// Runs the rows through a mixer, whose output is added to h. There is a memory for each sequence.
void mamba2_run(const Mamba2 *m, Worker *w, const MemoryAt *memory);

// The same, with the output at `out`. The worker's tokens and its buffers x, mixed, conv and room are used.
void mamba2_mix(const Mamba2 *m, Worker *w, const MemoryAt *memory, Out out);

// As mamba2_run, but only updates the memories.
void mamba2_remember(const Mamba2 *m, Worker *w, const MemoryAt *memory);
