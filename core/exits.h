// Exits: gates, read-outs and the confidence of logits, for several rows at once. The rows may be of several
// texts at one exit. exits/gates.py, exits/readouts.py and exits/policy.py say what they compute.
//
// A row's results do not depend on the number of rows, bit for bit.

#pragma once
#include "blocks.h"
#include "head.h"

// Memory for asking a gate about R rows: standardised rows x (R, D), the output of `in` (or of a Mamba gate's
// `down`), and narrow rows; and the memory of a Mamba gate's mixer.
typedef struct {
    float *x, *act, *narrow;
    Buffers mixer;
} GateRoom;

GateRoom room_for_gates(const Gate *gate, int64_t R, Arena *arena);
GateRoom room_for_mamba_gates(const MambaGate *gate, int64_t R, Arena *arena);

// The logits (R) of a gate for hidden states h (R, D), shared out.
void ask_gates(Hand *hand, const Gate *gate, const float *h, int64_t R, const GateRoom *room, float *logits);

// The same for a Mamba gate, which has a memory for each text, and sees each of its rows once, in order. Row
// r is of text sequences[r]; the rows of a text follow each other.
void ask_mamba_gates(Hand *hand, const MambaGate *gate, const float *h, int64_t R, const int64_t *sequences,
                     const MemoryAt *memory, const GateRoom *room, float *logits);

// Memory for reading out R rows: x (R, K), the terms of the sum and the adapter's inner rows (R, D + A), and
// narrow rows.
typedef struct {
    float *x, *act, *narrow;
} ReadoutRoom;

ReadoutRoom room_for_read_outs(const Readout *readout, int64_t R, Arena *arena);

// A read-out's output for hidden states h (R, D), shared out: `out` (R, D), which may be h. `deep`: pointers
// to each row's deep states (reads, D); NULL for a read-out without them.
void read_outs(Hand *hand, const Readout *readout, const float *h, const float *const *deep, int64_t R,
               const ReadoutRoom *room, float *out);

// For each CHUNK of a row's logits: the best, the second best, and sums of exponentials and of exponentials
// times exponents.
typedef struct {
    Best *bests;
    float *seconds, *sums, *moments;
} ConfidenceRoom;

ConfidenceRoom room_for_confidences(int64_t R, int64_t n, Arena *arena);

// The confidence of logits y (R, n), shared out: `sure` (R). The measure is one of offramp_confidence, but
// not OFFRAMP_GATE. Logits of −inf add nothing. NaN for a row with a NaN or inf, or with nothing but −inf.
void confidences(Hand *hand, offramp_confidence kind, const float *y, int64_t R, int64_t n,
                 const ConfidenceRoom *room, float *sure);
