// Running a range of a model's blocks: all rows of a call in one pass over the weights.

#pragma once
#include "products.h"
#include "session.h"

// The rows of one call. Row r is at position positions[r] of sequence sequences[r]; the rows of a sequence
// follow each other. `end` is one more than the highest position. Row p of `rotary` are the rotary pairs of
// position p.
typedef struct {
    float *h;  // (count, D)
    int64_t count, end;
    const int64_t *positions, *sequences;
    const float *rotary;
} Tokens;

// The keys of one block for one sequence: the place of position 0 (which may lie before the memory, if a
// window has slid), and whether they are in bfloat16.
typedef struct {
    char *places;
    int64_t half;
} KeysAt;

// A mixer's memory of one sequence. The state is read from `h` and written to `fresh`, which may be the same
// place. `notes` (or NULL) receives the journal of the rows: see Mixed in session.h.
typedef struct {
    float *window, *fresh, *notes;
    const float *h;
} StateAt;

typedef union {
    KeysAt keys;
    StateAt state;
} MemoryAt;

// Memory that the threads of a call share, and for each thread `own` floats of `local`.
typedef struct {
    float *x, *mixed, *conv, *inner, *room, *parts, *local;
    int64_t own;
} Buffers;

// The data of one thread of a call. With `few` rows, threads also share out the positions in attention.
typedef struct {
    const offramp_model *model;
    Tokens tokens;
    Buffers buffers;
    Hand *hand;
    int few;
} Worker;

// Lays out the buffers for `rows` rows whose highest position is `end` - 1.
Buffers buffers_for(const offramp_model *model, int64_t rows, int64_t end, Arena *arena);

Worker worker_of(const offramp_model *model, const Tokens *tokens, const Buffers *buffers, Hand *hand);

// Runs the worker's rows through blocks `start` to `stop` - 1. `memory` has entries for each of N blocks and
// `sequences` sequences. With `remember_blocks`, the blocks only remember the rows; with `keys`, only blocks
// with attention do.
void run_blocks(Worker *worker, int64_t start, int64_t stop, const MemoryAt *memory, int64_t sequences);
void remember_blocks(Worker *worker, int64_t start, int64_t stop, const MemoryAt *memory, int64_t sequences,
                     int keys);

// A session's keys of block i, and its memory of a mixer.
MemoryAt memory_at(const offramp_session *session, int64_t i);
MemoryAt mixed_at(const Mamba2 *shape, const Mixed *mixed);
