// The memory of one text in a model's blocks. The functions of offramp.h keep it between calls; a call gets
// tables of it.

#pragma once
#include "drafts.h"
#include "model.h"

enum { UNIT = 8 };  // positions of keys and values that are read at once; a window drops as many

// Keys and values of one block for positions from `base` on, (capacity, 2H, P) in float32 or bfloat16. If a
// token sees only a window, little more than the window is kept.
typedef struct {
    char *buffer;
    int64_t base, capacity, length;
} Keys;

// A mixer's window (taps - 1, C) and state (H, P, N), zeros before the first token. During a watch, also
// those at its beginning, and a journal of the tokens since then, with a row of `note_floats` for each, from
// row `start` on.
//
// Going back repeats no token at once: the next pass does it, when it has the state at hand and all threads
// work. So the first `due` rows of the journal, of the time before the watch, may be missing in the state: in
// `h`, or at the beginning of a watch in `old_h`. While `stands` is set, `h` holds nothing yet: the state is
// `old_h`, and then the watch's rows. So neither a watch nor going back copies a state.
typedef struct {
    float *window, *h;
    int64_t length;
    int watched, stands;
    int64_t since, room;  // the length at the beginning of the watch; rows that the journal has room for
    float *old_window, *old_h, *journal;
    int64_t start, due;
} Mixed;

// The memory of a block: of its attention and of its mixer, as far as it has them.
typedef struct {
    Keys keys;
    Mixed mixed;
} Memory;

// What a plan's exits keep of one text: the memories of Mamba gates, and the tokens that wait for deeper
// blocks. `waits`: how many, at each exit. `waiting` (room, D) are their states, oldest first: tokens at
// later exits are older. `run`: the number of the text's tokens that the exits have seen.
typedef struct {
    int64_t plan, count, run;  // the plan's number (0: none), and its exits
    const Mixer **shapes;
    Mixed *gates;  // used where there is a shape
    int64_t *waits, room;
    float *waiting;
} AtExits;

struct offramp_session {
    offramp_model *model;
    Memory *blocks;
    int64_t tokens;  // the tokens that are expected
    int half;        // keys and values are kept in bfloat16
    int broken;      // a request failed on the way
    Estimates estimates;
    AtExits exits;
};

static inline int64_t window_floats(const Mixer *m) { return (m->taps - 1) * m->channels; }
static inline int64_t state_floats(const Mixer *m) { return m->inner * m->states; }
// A journal's row: the inputs of the convolution (C). With a state, also its outputs (C), and step sizes: of
// heads (H), or of channels (E) and then Mamba's B (N).
static inline int64_t note_floats(const Mixer *m) {
    if (m->kind == CONVOLUTION) return m->channels;
    return 2 * m->channels + (m->kind == MAMBA ? m->inner + m->states : m->heads);
}
// The bytes that a position's keys and values take.
static inline int64_t place_bytes(const offramp_session *s, const Attention *a) {
    return 2 * a->heads * a->dim * (s->half ? 2 : 4);
}

// Whether block i, which has attention, still has all keys that a token at position `length` sees.
int can_crop_keys(const offramp_session *session, int64_t i, int64_t length);

// Makes room in block i for tokens at positions `first` to `end` - 1. 0 if there is no memory.
int make_room(offramp_session *session, int64_t i, int64_t first, int64_t end);

// Counts tokens that memories of a block (OFFRAMP_KEYS …) have taken in: the length of keys becomes `end`,
// and a mixer's grows by `count`.
void count_tokens(offramp_session *session, int64_t i, int64_t end, int64_t count, int64_t what);
void count_mixed(Mixed *mixed, int64_t count);

// A watch of a mixer: makes room for `rows` tokens (0 if there is no memory), of which rows that an earlier
// watch put off take at most a third; begins one, unless there is
// one; ends it; and goes back, during it, to the first `length` tokens of the text.
int prepare_watch(const Mixer *shape, Mixed *mixed, int64_t rows);
void begin_watch(const Mixer *shape, Mixed *mixed);
void end_watch(const Mixer *shape, Mixed *mixed);
void crop_mixed(const Mixer *shape, Mixed *mixed, int64_t length);

// Without a watch: lets the state take in the journal's rows that it lacks.
void bring_up_to_date(const Mixer *shape, Mixed *mixed);

// Forgets a block's tokens from position `length` on, which must be possible.
void forget_tokens(offramp_session *session, int64_t i, int64_t length);

// How many tokens wait at exits.
static inline int64_t waiting(const offramp_session *session) {
    int64_t count = 0;
    for (int64_t e = 0; e < session->exits.count; e++) count += session->exits.waits[e];
    return count;
}

// Whether a session whose text has `run` tokens can go on with the exits of a plan, whose gates have mixers
// of these shapes (NULL for others).
offramp_status check_exits(const offramp_session *session, int64_t run, int64_t plan, int64_t count,
                           const Mixer *const *shapes, offramp_error *error);

// Prepares a session for them. `room` tokens wait at most. 0 if there is no memory.
int prepare_exits(offramp_session *session, int64_t plan, int64_t count, const Mixer *const *shapes,
                  int64_t room);
