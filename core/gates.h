// Gates of exits, asked between blocks: a row stops at the first one that is sure enough. exits/gates.py says
// what they compute.

#pragma once
#include "model.h"
#include "products.h"

// Memory to ask gates in: x (D) and act (2W) are shared; room is for narrow rows.
typedef struct {
    float *x, *act, *room;
} Desk;

Desk desk_for_gates(const offramp_gates *gates, int64_t D, Arena *arena);

// The gates on the way of one row, for one thread: which is next, and where their hidden states and logits
// go.
typedef struct {
    const offramp_gates *gates;
    float *seen, *logits;
    int64_t next;
    const Desk *desk;
} GatesAsked;

// The gates, or NULL for none, on the way of token number t of a call.
GatesAsked gates_for(const offramp_gates *gates, int64_t t, const Desk *desk);

// Standardise of exits/parts.py: h (D) to x.
void standardise(const float *h, const float *mean, const float *spread, int64_t D, float *x);

// Asks a gate about a hidden state h (D), shared out. Writes its logit.
void ask_gate(Hand *hand, const Gate *gate, const float *h, const Desk *desk, float *logit);

// Asks the gates that stand after so many blocks about the row h (D), shared out. Returns whether one of them
// is sure enough. What decides is kept, so that a thread that comes late decides the same.
int gates_stop(Hand *hand, GatesAsked *asked, int64_t blocks, const float *h);
