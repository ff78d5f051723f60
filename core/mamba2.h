// Mamba-2 mixers (arXiv 2405.21060), with the norm before them.

#pragma once
#include "blocks.h"

// Runs the rows through a mixer, whose output is added to h. There is a memory for each sequence; `block` is
// its number in the call.
void mamba2_run(const Mamba2 *m, Worker *w, const MemoryAt *memory, int64_t block);

// Only updates the memories.
void mamba2_remember(const Mamba2 *m, Worker *w, const MemoryAt *memory, int64_t block);
