// Going back: what a mixer remembers after some rows of a journal, without its weights.

#pragma once
#include "model.h"

// Repeats on a state h (H, P, N) what R rows of a journal did in the pass that wrote it, bit for bit.
void mamba2_replay(const Mamba2 *m, float *h, const float *journal, int64_t R);

// The window (taps - 1, C) after R rows of a journal, whose pass began with the window `old`. It is another
// place than `old`.
void mamba2_window(const Mamba2 *m, float *window, const float *old, const float *journal, int64_t R);
