// Running a range of a model's blocks: all rows of a call in one pass over the weights.

#pragma once
#include "products.h"
#include "session.h"

// The rows of one call. Row r is at position positions[r] of sequence sequences[r]; the rows of a sequence
// follow each other. `end` is one more than the highest position.
typedef struct {
    float *h;  // (count, D)
    int64_t count, end;
    const int64_t *positions, *sequences;
} Tokens;

// The keys of one block for one sequence: the place of position 0 (which may lie before the memory, if a
// window has slid), and whether they are in bfloat16.
typedef struct {
    char *places;
    int64_t half;
} KeysAt;

// A mixer's memory of one sequence. The state is read from `h` and written to `fresh`, which may be the same
// place. `notes` (or NULL) receives the journal of the rows: see Mixed in session.h. The state in `h` lacks
// rows of the journal, which it takes in first: `due` of them for good, and `kept` ones from row `start` on,
// which go to `fresh` only.
typedef struct {
    float *window, *fresh, *notes, *h;
    const float *journal;
    int64_t due, start, kept;
} StateAt;

// The memory of one block for one sequence. A block with attention alone uses only `keys`, one with a mixer
// alone only `state`.
typedef struct {
    KeysAt keys;
    StateAt state;
} MemoryAt;

// Memory that the threads of a call share, and for each thread `own` floats of `local`. `qkv` and `in` are
// the projections of attention and of a mixer.
typedef struct {
    float *x, *qkv, *in, *conv, *low, *inner, *room, *parts, *local;
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

// The rows of h as the first weight of a part takes them: normed, if a norm stands before the part.
Rows enter_part(Worker *worker, const Around *around, const Weight *first);

// Multiplies a part's rows with its last weight, and adds the results to h: normed, if a norm stands after
// the part, and times its factor. `unused` is room for (count, D).
void leave_part(Worker *worker, const Around *around, const Weight *last, Rows rows, float *unused);

// Runs the worker's rows through blocks `start` to `stop` - 1. `memory` has entries for each of N blocks and
// `sequences` sequences. With `remember_blocks`, the blocks only remember the rows, in the memories that
// `what` (OFFRAMP_KEYS …) says.
void run_blocks(Worker *worker, int64_t start, int64_t stop, const MemoryAt *memory, int64_t sequences);
void remember_blocks(Worker *worker, int64_t start, int64_t stop, const MemoryAt *memory, int64_t sequences,
                     int64_t what);

// A session's memory of block i, and a memory of a mixer.
MemoryAt memory_at(const offramp_session *session, int64_t i);
StateAt state_at(const Mixer *shape, const Mixed *mixed);
