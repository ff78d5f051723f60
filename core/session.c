#include "session.h"

#include <stdlib.h>

#include "replay.h"

enum {
    SPARE = 64,     // tokens beyond a window that can still be forgotten
    AT_ONCE = 256,  // room for new tokens before a window slides
};

static const Block *block_of(const offramp_session *s, int64_t i) { return s->model->blocks + i; }

// The tokens of the watch, in its journal.
static float *rows_of_watch(const Mixer *shape, const Mixed *m) {
    return m->start ? m->journal + m->start * note_floats(shape) : m->journal;
}

// Copies the state to h (H, P, N).
static void read_state(const Mixer *shape, const Mixed *m, float *h) {
    memcpy(h, m->stands ? m->old_h : m->h, state_floats(shape) * sizeof(float));
    mixer_replay(shape, h, m->journal, m->due);
    if (m->stands) mixer_replay(shape, h, rows_of_watch(shape, m), m->length - m->since);
}

void bring_up_to_date(const Mixer *shape, Mixed *m) {
    mixer_replay(shape, m->h, m->journal, m->due);
    m->due = 0;
}

void end_watch(const Mixer *shape, Mixed *m) {
    if (m->stands) {
        float *h = m->h;
        m->h = m->old_h, m->old_h = h;
        const int64_t rows = m->length - m->since;
        if (rows) {
            memmove(m->journal, rows_of_watch(shape, m), rows * note_floats(shape) * sizeof(float));
            m->due = rows;
            if (3 * rows > m->room) bring_up_to_date(shape, m);  // the next watch needs the rest
        }
    }
    m->watched = m->stands = 0;
}

static void free_watch(Mixed *m) {
    free(m->old_window), free(m->old_h), free(m->journal);
    m->old_window = m->old_h = m->journal = NULL;
    m->room = 0;
}

static void free_mixed(Mixed *m) {
    free_watch(m);
    free(m->window), free(m->h);
}

static int make_mixed(const Mixer *shape, Mixed *m) {
    m->window = calloc(window_floats(shape), sizeof(float));
    m->h = calloc(state_floats(shape) + 1, sizeof(float));
    return m->window && m->h;
}

static void free_exits(AtExits *exits) {
    for (int64_t e = 0; exits->gates && e < exits->count; e++) free_mixed(exits->gates + e);
    free(exits->shapes), free(exits->gates), free(exits->waits), free(exits->waiting);
    *exits = (AtExits){0};
}

void offramp_session_free(offramp_session *s) {
    if (!s) return;
    for (int64_t i = 0; s->blocks && i < s->model->count; i++) {
        free(s->blocks[i].keys.buffer);
        free_mixed(&s->blocks[i].mixed);
    }
    free_exits(&s->exits);
    offramp_model_free(s->model);
    free(s->blocks);
    free(s);
}

offramp_session *offramp_session_new(offramp_model *model, offramp_type keys, int64_t tokens,
                                     offramp_error *error) {
    if (keys != OFFRAMP_FLOAT32 && keys != OFFRAMP_BFLOAT16) {
        fail(error, OFFRAMP_INVALID, "Keys and values are kept in float32 or bfloat16.");
        return NULL;
    }
    offramp_session *s = calloc(1, sizeof *s);
    int whole = s != NULL;
    if (s) {
        *s = (offramp_session){.model = model,
                               .blocks = calloc(model->count + 1, sizeof *s->blocks),
                               .tokens = tokens,
                               .half = keys == OFFRAMP_BFLOAT16,
                               .estimates = new_estimates()};
        atomic_fetch_add(&model->users, 1);
        whole = s->blocks != NULL;
    }
    for (int64_t i = 0; whole && i < model->count; i++) {
        if (model->blocks[i].mixes) whole = make_mixed(&model->blocks[i].mixer, &s->blocks[i].mixed);
    }
    if (whole) return s;
    offramp_session_free(s);
    fail(error, OFFRAMP_NO_MEMORY, "There is no memory for another session.");
    return NULL;
}

static float *copy_of(const float *floats, int64_t count) {
    float *copy = floats ? malloc((count + 1) * sizeof *copy) : NULL;
    if (copy) memcpy(copy, floats, count * sizeof *copy);
    return copy;
}

// The bytes of keys and values that a block's tokens need.
static int64_t needed_bytes(const offramp_session *s, int64_t i) {
    const Keys *k = &s->blocks[i].keys;
    return k->buffer ? (k->length - k->base) * place_bytes(s, &block_of(s, i)->attention) : 0;
}

// Copies a block's memory to a new session, whose block has no buffer yet. 0 if there is no memory.
static int copy_keys(const offramp_session *s, int64_t i, Keys *k) {
    const int64_t bytes = needed_bytes(s, i), each = place_bytes(s, &block_of(s, i)->attention);
    if (!bytes) return 1;
    k->buffer = malloc(bytes);
    if (!k->buffer) return 0;
    k->base = s->blocks[i].keys.base, k->capacity = bytes / each;
    memcpy(k->buffer, s->blocks[i].keys.buffer, bytes);
    return 1;
}

// Copies a mixer's memory to a new one.
static int copy_mixed(const Mixer *shape, const Mixed *from, Mixed *to) {
    memcpy(to->window, from->window, window_floats(shape) * sizeof(float));
    read_state(shape, from, to->h);
    to->length = from->length;
    if (!from->watched) return 1;
    const int64_t rows = from->length - from->since;
    to->watched = 1, to->since = from->since, to->room = rows;
    to->old_window = copy_of(from->old_window, window_floats(shape)),
    to->old_h = copy_of(from->old_h, state_floats(shape));
    to->journal = rows ? copy_of(rows_of_watch(shape, from), rows * note_floats(shape)) : NULL;
    if (to->old_h) mixer_replay(shape, to->old_h, from->journal, from->due);
    return to->old_window && to->old_h && (to->journal || !rows);
}

static int copy_exits(const offramp_session *s, offramp_session *to) {
    const AtExits *from = &s->exits;
    if (!from->plan) return 1;
    if (!prepare_exits(to, from->plan, from->count, from->shapes, from->room)) return 0;
    to->exits.run = from->run;
    memcpy(to->exits.waits, from->waits, from->count * sizeof *from->waits);
    memcpy(to->exits.waiting, from->waiting, from->room * s->model->hidden * sizeof(float));
    for (int64_t e = 0; e < from->count; e++)
        if (from->shapes[e] && !copy_mixed(from->shapes[e], from->gates + e, to->exits.gates + e)) return 0;
    return 1;
}

offramp_session *offramp_session_fork(const offramp_session *s, offramp_error *error) {
    offramp_session *twin =
        offramp_session_new(s->model, s->half ? OFFRAMP_BFLOAT16 : OFFRAMP_FLOAT32, s->tokens, error);
    if (!twin) return NULL;
    int whole = copy_exits(s, twin);
    for (int64_t i = 0; whole && i < s->model->count; i++) {
        Memory *to = twin->blocks + i;
        const Block *b = block_of(s, i);
        to->keys.length = s->blocks[i].keys.length;
        if (b->attends) whole = copy_keys(s, i, &to->keys);
        if (whole && b->mixes) whole = copy_mixed(&b->mixer, &s->blocks[i].mixed, &to->mixed);
    }
    twin->estimates = s->estimates, twin->broken = s->broken;
    if (whole) return twin;
    offramp_session_free(twin);
    fail(error, OFFRAMP_NO_MEMORY, "There is no memory for another session.");
    return NULL;
}

void offramp_session_reserve(offramp_session *s, int64_t tokens) {
    s->tokens = s->tokens > tokens ? s->tokens : tokens;
}

int64_t offramp_session_length(const offramp_session *s, int64_t block) {
    if (block < 0 || block >= s->model->count) return -1;
    const Block *b = block_of(s, block);
    return b->attends ? s->blocks[block].keys.length : b->mixes ? s->blocks[block].mixed.length : 0;
}

int64_t offramp_session_waits(const offramp_session *s, int64_t exit) {
    return exit >= 0 && exit < s->exits.count ? s->exits.waits[exit] : 0;
}

int64_t offramp_session_first(const offramp_session *s, int64_t block) {
    if (block < 0 || block >= s->model->count || !block_of(s, block)->attends) return -1;
    return s->blocks[block].keys.base;
}

static int64_t mixed_bytes(const Mixer *m) {
    return (window_floats(m) + state_floats(m)) * (int64_t)sizeof(float);
}

int64_t offramp_session_bytes(const offramp_session *s) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < s->model->count; i++) {
        const Block *b = block_of(s, i);
        if (b->attends) bytes += needed_bytes(s, i);
        if (b->mixes) bytes += mixed_bytes(&b->mixer);
    }
    return bytes;
}

// Positions that a buffer for so many tokens has.
static int64_t expected(const Attention *a, int64_t tokens) {
    const int64_t most = a->window + SPARE + AT_ONCE;
    return a->window && tokens > most ? most : tokens;
}

int64_t offramp_session_bytes_for(const offramp_session *s, int64_t tokens) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < s->model->count; i++) {
        const Block *b = block_of(s, i);
        if (b->attends) bytes += expected(&b->attention, tokens) * place_bytes(s, &b->attention);
        if (b->mixes) bytes += 2 * mixed_bytes(&b->mixer);
    }
    return bytes;
}

// If there is no room for tokens up to `end`, drops those that no token from position `first` on can see.
static void slide(const offramp_session *s, int64_t i, int64_t first, int64_t end) {
    const Attention *a = &block_of(s, i)->attention;
    Keys *k = &s->blocks[i].keys;
    // Tokens that wait are not in this block yet.
    const int64_t size = place_bytes(s, a), start = (first - a->window - SPARE) / UNIT * UNIT,
                  kept = min_(k->length, first) - start;
    if (!k->buffer || end - k->base <= k->capacity || start <= k->base) return;
    memmove(k->buffer, k->buffer + (start - k->base) * size, kept * size);
    k->base = start;
}

// Gives the journal room for `count` more rows.
static int lengthen_journal(const Mixer *shape, Mixed *m, int64_t count) {
    const int64_t rows = (m->watched ? m->start + m->length - m->since : m->due) + count;
    if (rows <= m->room) return 1;
    const int64_t room = rows > 2 * m->room ? rows : 2 * m->room;
    float *longer = realloc(m->journal, room * note_floats(shape) * sizeof(float));
    if (!longer) return 0;
    m->journal = longer, m->room = room;
    return 1;
}

int make_room(offramp_session *s, int64_t i, int64_t first, int64_t end) {
    const Block *b = block_of(s, i);
    Mixed *m = &s->blocks[i].mixed;
    if (b->mixes && m->watched && !lengthen_journal(&b->mixer, m, end - first)) return 0;
    if (!b->attends) return 1;
    Keys *k = &s->blocks[i].keys;
    if (b->attention.window) slide(s, i, first, end);
    const int64_t needed = end - k->base, size = place_bytes(s, &b->attention);
    if (needed <= k->capacity) return 1;
    const int64_t wanted = expected(&b->attention, s->tokens), twice = k->buffer ? 2 * needed : needed;
    const int64_t capacity = needed <= wanted ? wanted : twice;
    char *larger = calloc(capacity, size);
    if (!larger) return 0;
    if (k->buffer) memcpy(larger, k->buffer, (min_(k->length, first) - k->base) * size);
    free(k->buffer);
    k->buffer = larger, k->capacity = capacity;
    return 1;
}

void count_mixed(Mixed *m, int64_t count) {
    m->length += count;
    if (count) m->stands = 0, m->due = 0;
}

void count_tokens(offramp_session *s, int64_t i, int64_t end, int64_t count, int64_t what) {
    if (what & OFFRAMP_KEYS) s->blocks[i].keys.length = end;
    if (what & OFFRAMP_STATES) count_mixed(&s->blocks[i].mixed, count);
}

static offramp_status check_range(const offramp_session *s, int64_t start, int64_t stop,
                                  offramp_error *error) {
    NEED(0 <= start && start <= stop && stop <= s->model->count,
         "There are %lld blocks, and none from %lld up to %lld.", (long long)s->model->count,
         (long long)start, (long long)stop);
    return OFFRAMP_OK;
}

static offramp_status check_block(const offramp_session *s, int64_t i, offramp_error *error) {
    NEED(0 <= i && i < s->model->count, "There are %lld blocks, so none has the number %lld.",
         (long long)s->model->count, (long long)i);
    return OFFRAMP_OK;
}

int prepare_watch(const Mixer *shape, Mixed *m, int64_t rows) {
    if (!m->old_window) m->old_window = malloc(window_floats(shape) * sizeof(float));
    if (!m->old_h) m->old_h = malloc((state_floats(shape) + 1) * sizeof(float));
    return m->old_window && m->old_h && lengthen_journal(shape, m, rows);
}

void begin_watch(const Mixer *shape, Mixed *m) {
    if (m->watched) return;
    float *h = m->h;
    memcpy(m->old_window, m->window, window_floats(shape) * sizeof(float));
    m->h = m->old_h, m->old_h = h;
    m->watched = m->stands = 1, m->since = m->length, m->start = m->due;
}

offramp_status offramp_session_watch(offramp_session *s, int64_t start, int64_t stop, offramp_error *error) {
    if (check_range(s, start, stop, error)) return OFFRAMP_INVALID;
    for (int64_t i = start; i < stop; i++) {
        const Mixer *shape = &block_of(s, i)->mixer;
        Mixed *m = &s->blocks[i].mixed;
        if (!block_of(s, i)->mixes || m->watched) continue;
        if (!prepare_watch(shape, m, 1))
            return fail(error, OFFRAMP_NO_MEMORY, "There is no memory to watch a mixer.");
        begin_watch(shape, m);
    }
    return OFFRAMP_OK;
}

void offramp_session_settle(offramp_session *s) {
    if (waiting(s)) return;  // what waits may still be forgotten
    for (int64_t i = 0; i < s->model->count; i++)
        if (block_of(s, i)->mixes) {
            Mixed *m = &s->blocks[i].mixed;
            end_watch(&block_of(s, i)->mixer, m);
            bring_up_to_date(&block_of(s, i)->mixer, m);
            free_watch(m);
        }
}

int can_crop_keys(const offramp_session *s, int64_t i, int64_t length) {
    const Keys *k = &s->blocks[i].keys;
    return !k->base || length >= k->base + block_of(s, i)->attention.window;
}

int offramp_session_can_forget(const offramp_session *s, int64_t length) {
    int can = length >= 0;
    for (int64_t i = 0; i < s->model->count; i++)
        can &= !block_of(s, i)->mixes && can_crop_keys(s, i, length);
    return can;
}

void crop_mixed(const Mixer *shape, Mixed *m, int64_t length) {
    const int64_t rows = length - m->since;
    m->length = length, m->stands = 1;
    mixer_window(shape, m->window, m->old_window, rows_of_watch(shape, m), rows);
}

// The tokens that a block forgets of those from position `length` on. A fill may have given tokens to
// attention alone; a mixer beside it forgets as many as attention does.
static int64_t forgotten(const offramp_session *s, int64_t i, int64_t length) {
    const Block *b = block_of(s, i);
    const int64_t gone = offramp_session_length(s, i) - length;
    return (b->attends || b->mixes) && gone > 0 ? gone : 0;
}

void forget_tokens(offramp_session *s, int64_t i, int64_t length) {
    Memory *memory = s->blocks + i;
    const int64_t gone = forgotten(s, i, length);
    memory->keys.length -= gone;
    if (block_of(s, i)->mixes && gone)
        crop_mixed(&block_of(s, i)->mixer, &memory->mixed, memory->mixed.length - gone);
}

offramp_status offramp_session_crop(offramp_session *s, int64_t length, int64_t start, int64_t stop,
                                    offramp_error *error) {
    if (check_range(s, start, stop, error)) return OFFRAMP_INVALID;
    NEED(length >= 0, "A text cannot have %lld tokens.", (long long)length);
    for (int64_t i = start; i < stop; i++) {
        const Mixed *m = &s->blocks[i].mixed;
        NEED(can_crop_keys(s, i, length),
             "A window of %lld tokens no longer has the keys that position %lld sees.",
             (long long)block_of(s, i)->attention.window, (long long)length);
        const int64_t gone = forgotten(s, i, length);
        NEED(!block_of(s, i)->mixes || !gone || (m->watched && m->length - gone >= m->since),
             "A Mamba state cannot forget tokens that it took in without a watch.");
    }
    for (int64_t i = start; i < stop; i++) forget_tokens(s, i, length);
    return OFFRAMP_OK;
}

offramp_status offramp_session_copy(offramp_session *s, int64_t from, int64_t to, int64_t tokens,
                                    offramp_error *error) {
    if (check_block(s, from, error) || check_block(s, to, error)) return OFFRAMP_INVALID;
    const Block *source = block_of(s, from), *goal = block_of(s, to);
    NEED(source->attends && goal->attends && source->attention.heads == goal->attention.heads &&
             source->attention.dim == goal->attention.dim,
         "Blocks %lld and %lld do not have keys of the same shape.", (long long)from, (long long)to);
    NEED(from != to, "The keys of block %lld cannot be copied to itself.", (long long)from);
    const Keys *k = &s->blocks[from].keys;
    Keys *own = &s->blocks[to].keys;
    NEED(tokens >= 0 && tokens <= k->length - k->base, "Block %lld does not have %lld keys.", (long long)from,
         (long long)tokens);
    if (!tokens) return OFFRAMP_OK;
    const int64_t size = place_bytes(s, &source->attention), first = k->length - tokens,
                  end = own->length + tokens;
    if (!make_room(s, to, own->length, end))
        return fail(error, OFFRAMP_NO_MEMORY, "There is no memory for more tokens.");
    memcpy(own->buffer + (own->length - own->base) * size, k->buffer + (first - k->base) * size,
           tokens * size);
    own->length = end;
    return OFFRAMP_OK;
}

offramp_status offramp_session_keys(const offramp_session *s, int64_t block, int64_t from, float *keys,
                                    offramp_error *error) {
    if (check_block(s, block, error)) return OFFRAMP_INVALID;
    const Keys *k = &s->blocks[block].keys;
    NEED(block_of(s, block)->attends && from >= k->base && from <= k->length,
         "Block %lld has no keys from position %lld on.", (long long)block, (long long)from);
    const int64_t each = place_bytes(s, &block_of(s, block)->attention) / (s->half ? 2 : 4),
                  count = (k->length - from) * each;
    const int64_t skip = (from - k->base) * each;
    if (!count) return OFFRAMP_OK;
    if (!s->half)
        memcpy(keys, (const float *)k->buffer + skip, count * sizeof(float));
    else
        for (int64_t i = 0; i < count; i += LANES)
            store_up_to(keys + i, from_bfloat16((const uint16_t *)k->buffer + skip + i, count - i),
                        count - i);
    return OFFRAMP_OK;
}

offramp_status offramp_session_state(const offramp_session *s, int64_t block, float *window, float *h,
                                     offramp_error *error) {
    if (check_block(s, block, error)) return OFFRAMP_INVALID;
    NEED(block_of(s, block)->mixes, "Block %lld has no mixer.", (long long)block);
    const Mixer *m = &block_of(s, block)->mixer;
    memcpy(window, s->blocks[block].mixed.window, window_floats(m) * sizeof(float));
    read_state(m, &s->blocks[block].mixed, h);
    return OFFRAMP_OK;
}

offramp_status check_exits(const offramp_session *s, int64_t run, int64_t plan, int64_t count,
                           const Mixer *const *shapes, offramp_error *error) {
    const AtExits *exits = &s->exits;
    const int same = exits->plan == plan;
    NEED(same || !waiting(s), "Tokens of this session wait at exits of another plan.");
    NEED(run == exits->run || !waiting(s),
         "Tokens of this session wait, so it cannot go on after %lld tokens.", (long long)exits->run);
    for (int64_t e = 0; e < count; e++)
        NEED(!shapes[e] || run == (same ? exits->run : 0),
             "A Mamba gate must see a text from its beginning on.");
    return OFFRAMP_OK;
}

int prepare_exits(offramp_session *s, int64_t plan, int64_t count, const Mixer *const *shapes, int64_t room) {
    AtExits *exits = &s->exits;
    if (exits->plan == plan) return 1;
    free_exits(exits);
    *exits = (AtExits){plan,
                       count,
                       0,
                       calloc(count + 1, sizeof *exits->shapes),
                       calloc(count + 1, sizeof *exits->gates),
                       calloc(count + 1, sizeof *exits->waits),
                       room,
                       calloc(room * s->model->hidden + 1, sizeof(float))};
    int whole = exits->shapes && exits->gates && exits->waits && exits->waiting;
    for (int64_t e = 0; whole && e < count; e++) {
        exits->shapes[e] = shapes[e];
        whole = !shapes[e] || make_mixed(shapes[e], exits->gates + e);
    }
    if (!whole) free_exits(exits);
    return whole;
}
