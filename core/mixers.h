// Mixers: Mamba-2 (arXiv 2405.21060).

#pragma once
#include "blocks.h"

// The input projection of rows.
void mixer_project(const Mixer *m, Worker *w);

// After it: the rows pass through the memories, of which there is one for each sequence, and the output is added to h.
void mixer_run(const Mixer *m, Worker *w, const MemoryAt *memory);

// Projects rows, and only updates the memories.
void mixer_remember(const Mixer *m, Worker *w, const MemoryAt *memory);
