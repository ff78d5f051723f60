// Exits: gates, read-outs and the confidence of logits, for several rows at once, which may be those of
// several texts at one exit. exits/gates.py, exits/readouts.py and exits/policy.py say what they compute.
//
// What a row gets does not depend, bit for bit, on how many rows there are.

#pragma once
#include "blocks.h"
#include "head.h"

// Memory to ask a gate about R rows in: standardised rows x (R, D), what `in`, or a Mamba gate's `down`,
// makes of them, and narrow rows; and that of a Mamba gate's mixer.
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

// Memory to read out R rows in: x (R, K), what is added up and the adapter's inner rows (R, D + A), and
// narrow rows.
typedef struct {
    float *x, *act, *narrow;
} ReadoutRoom;

ReadoutRoom room_for_read_outs(const Readout *readout, int64_t R, Arena *arena);

// What a read-out makes of hidden states h (R, D), shared out: `out` (R, D), which may be h. `deep`: where
// each row's deep states (reads, D) are; NULL for a read-out without them.
void read_outs(Hand *hand, const Readout *readout, const float *h, const float *const *deep, int64_t R,
               const ReadoutRoom *room, float *out);

// For each CHUNK of a row's logits: the best, the second best, and sums of exponentials and of exponentials
// times exponents.
typedef struct {
    Best *bests;
    float *seconds, *sums, *moments;
} ConfidenceRoom;

ConfidenceRoom room_for_confidences(int64_t R, int64_t n, Arena *arena);

// How sure logits y (R, n) are, by one of the measures of offramp_confidence, but not OFFRAMP_GATE, shared
// out: `sure` (R). Logits of −inf add nothing. NaN for a row with a NaN or inf, or with nothing but −inf.
void confidences(Hand *hand, offramp_confidence kind, const float *y, int64_t R, int64_t n,
                 const ConfidenceRoom *room, float *sure);
