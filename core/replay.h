// Going back: computes a mixer's memory after some rows of a journal, without its weights.

#pragma once
#include "model.h"

// Repeats R rows of a journal on a state h (H, P, N), bit for bit as in the pass that wrote them.
void mixer_replay(const Mixer *m, float *h, const float *journal, int64_t R);

// The same for each kind: for heads (of Mamba: channels) `from` to `to` - 1, from the state `old` to `state`,
// which may be the same place.
void mamba2_replay(const Mixer *m, const float *old, float *state, const float *journal, int64_t R,
                   int64_t from, int64_t to);
void mamba_replay(const Mixer *m, const float *old, float *state, const float *journal, int64_t R,
                  int64_t from, int64_t to);

// Writes the window (taps - 1, C) after R rows of a journal, whose pass began with the window `old`, to
// another place than `old`.
void mixer_window(const Mixer *m, float *window, const float *old, const float *journal, int64_t R);
