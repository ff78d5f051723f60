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

// Where the keys of a block and a sequence are: the place of position 0, or where it would be, and whether
// they are in bfloat16.
typedef struct {
    char *places;
    int64_t half;
} KeysAt;

// Where a mixer's memory of a sequence is: the state is read from `h` and written to `fresh`, which may be
// the same place. `notes` (or NULL) receives what each row does to it: see Mixed of session.h.
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

// What one thread of a call works with. `few` rows share the positions in attention, too.
typedef struct {
    const offramp_model *model;
    Tokens tokens;
    Buffers buffers;
    Hand *hand;
    int few;
} Worker;

// What lays out the buffers for `rows` rows whose highest position is `end` - 1.
Buffers buffers_for(const offramp_model *model, int64_t rows, int64_t end, Arena *arena);

Worker worker_of(const offramp_model *model, const Tokens *tokens, const Buffers *buffers, Hand *hand);

// Runs the worker's rows through blocks `start` to `stop` - 1. `memory` has entries for each of N blocks and
// `sequences` sequences. `remember_blocks` lets the blocks only remember the rows; `keys`: those with
// attention.
void run_blocks(Worker *worker, int64_t start, int64_t stop, const MemoryAt *memory, int64_t sequences);
void remember_blocks(Worker *worker, int64_t start, int64_t stop, const MemoryAt *memory, int64_t sequences,
                     int keys);

// Where a session keeps what block i remembers; and where a mixer's memory is.
MemoryAt memory_at(const offramp_session *session, int64_t i);
MemoryAt mixed_at(const Mamba2 *shape, const Mixed *mixed);
