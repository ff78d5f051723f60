// What the blocks of a model remember of one text. The functions of offramp.h keep it between calls; a call
// gets tables of it.

#pragma once
#include "drafts.h"
#include "model.h"

// Keys and values of one block for positions from `base` on, (capacity, 2H, P) in float32 or bfloat16. Where
// a token sees only a window, few more are kept.
typedef struct {
    char *buffer;
    int64_t base, capacity, length;
} Keys;

// A mixer's window (taps - 1, C) and state (H, P, N), zeros before the first token. During a watch, those of
// its beginning, and a journal of the tokens since then, with a row of `note_floats` for each.
typedef struct {
    float *window, *h;
    int64_t length;
    int watched;
    int64_t since, room;  // the length at the beginning of the watch; rows that the journal has room for
    float *old_window, *old_h, *journal;
} Mixed;

typedef union {
    Keys keys;
    Mixed mixed;
} Memory;

struct offramp_session {
    offramp_model *model;
    Memory *blocks;
    int64_t tokens;  // that are expected
    int half;        // keys and values are kept in bfloat16
    Estimates estimates;
};

static inline int64_t window_floats(const Mamba2 *m) { return (m->taps - 1) * m->channels; }
static inline int64_t state_floats(const Mamba2 *m) { return m->inner * m->states; }
// A journal's row: the convolution's inputs and outputs, (C) each, and dt (H).
static inline int64_t note_floats(const Mamba2 *m) { return 2 * m->channels + m->heads; }
// The bytes that a position's keys and values take.
static inline int64_t place_bytes(const offramp_session *s, const Attention *a) {
    return 2 * a->heads * a->dim * (s->half ? 2 : 4);
}

// Whether block i, which attends, still has what a token at position `length` sees.
int can_crop_keys(const offramp_session *session, int64_t i, int64_t length);

// Makes room in block i for tokens at positions `first` to `end` - 1. 0 if there is no memory.
int make_room(offramp_session *session, int64_t i, int64_t first, int64_t end);

// Counts tokens that a block has taken in: its length becomes `end`, or for a mixer grows by `count`.
void count_tokens(offramp_session *session, int64_t i, int64_t end, int64_t count);
