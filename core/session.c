#include "session.h"

#include <stdlib.h>

#include "replay.h"

enum {
    SPARE = 64,     // tokens beyond a window that can still be forgotten
    AT_ONCE = 256,  // room for tokens to come until a window slides
    UNIT = 8,       // in which positions are read
};

static const Block *block_of(const offramp_session *s, int64_t i) { return s->model->blocks + i; }

static void free_watch(Mixed *m) {
    free(m->old_window), free(m->old_h), free(m->journal);
    m->old_window = m->old_h = m->journal = NULL;
    m->watched = 0, m->room = 0;
}

void offramp_session_free(offramp_session *s) {
    if (!s) return;
    for (int64_t i = 0; s->blocks && i < s->model->count; i++) {
        Memory *memory = s->blocks + i;
        if (block_of(s, i)->attends) {
            free(memory->keys.buffer);
        } else {
            free_watch(&memory->mixed);
            free(memory->mixed.window), free(memory->mixed.h);
        }
    }
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
        *s = (offramp_session){model, calloc(model->count + 1, sizeof *s->blocks), tokens,
                               keys == OFFRAMP_BFLOAT16, new_estimates()};
        atomic_fetch_add(&model->users, 1);
        whole = s->blocks != NULL;
    }
    for (int64_t i = 0; whole && i < model->count; i++) {
        if (model->blocks[i].attends) continue;
        const Mamba2 *m = &model->blocks[i].mamba2;
        Mixed *mixed = &s->blocks[i].mixed;
        mixed->window = calloc(window_floats(m), sizeof(float)),
        mixed->h = calloc(state_floats(m), sizeof(float));
        whole = mixed->window && mixed->h;
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

// Copies what a block remembers to a new session, whose block has only its own numbers. 0 if there is no
// memory.
static int copy_keys(const offramp_session *s, int64_t i, Keys *k) {
    const int64_t bytes = needed_bytes(s, i), each = place_bytes(s, &block_of(s, i)->attention);
    if (!bytes) return 1;
    k->buffer = malloc(bytes);
    if (!k->buffer) return 0;
    k->base = s->blocks[i].keys.base, k->capacity = bytes / each;
    memcpy(k->buffer, s->blocks[i].keys.buffer, bytes);
    return 1;
}

static int copy_mixed(const offramp_session *s, int64_t i, Mixed *to) {
    const Mixed *from = &s->blocks[i].mixed;
    const Mamba2 *m = &block_of(s, i)->mamba2;
    memcpy(to->window, from->window, window_floats(m) * sizeof(float));
    memcpy(to->h, from->h, state_floats(m) * sizeof(float));
    to->length = from->length;
    if (!from->watched) return 1;
    to->watched = 1, to->since = from->since, to->room = from->length - from->since;
    to->old_window = copy_of(from->old_window, window_floats(m)),
    to->old_h = copy_of(from->old_h, state_floats(m));
    to->journal = copy_of(from->journal, to->room * note_floats(m));
    return to->old_window && to->old_h && (to->journal || !from->journal);
}

offramp_session *offramp_session_fork(const offramp_session *s, offramp_error *error) {
    offramp_session *twin =
        offramp_session_new(s->model, s->half ? OFFRAMP_BFLOAT16 : OFFRAMP_FLOAT32, s->tokens, error);
    for (int64_t i = 0; twin && i < s->model->count; i++) {
        Memory *to = twin->blocks + i;
        const int attends = block_of(s, i)->attends;
        if (attends) to->keys.length = s->blocks[i].keys.length;
        if (attends ? copy_keys(s, i, &to->keys) : copy_mixed(s, i, &to->mixed)) continue;
        offramp_session_free(twin);
        fail(error, OFFRAMP_NO_MEMORY, "There is no memory for another session.");
        return NULL;
    }
    return twin;
}

void offramp_session_reserve(offramp_session *s, int64_t tokens) {
    s->tokens = s->tokens > tokens ? s->tokens : tokens;
}

int64_t offramp_session_length(const offramp_session *s, int64_t block) {
    if (block < 0 || block >= s->model->count) return -1;
    return block_of(s, block)->attends ? s->blocks[block].keys.length : s->blocks[block].mixed.length;
}

int64_t offramp_session_first(const offramp_session *s, int64_t block) {
    if (block < 0 || block >= s->model->count || !block_of(s, block)->attends) return -1;
    return s->blocks[block].keys.base;
}

static int64_t mixed_bytes(const Mamba2 *m) {
    return (window_floats(m) + state_floats(m)) * (int64_t)sizeof(float);
}

int64_t offramp_session_bytes(const offramp_session *s) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < s->model->count; i++) {
        const Block *b = block_of(s, i);
        bytes += b->attends ? needed_bytes(s, i) : mixed_bytes(&b->mamba2);
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
        bytes += b->attends ? expected(&b->attention, tokens) * place_bytes(s, &b->attention)
                            : 2 * mixed_bytes(&b->mamba2);
    }
    return bytes;
}

// If there is no room for tokens up to `end`, lets go of those that none from position `first` on can see.
static void slide(const offramp_session *s, int64_t i, int64_t first, int64_t end) {
    const Attention *a = &block_of(s, i)->attention;
    Keys *k = &s->blocks[i].keys;
    const int64_t size = place_bytes(s, a), start = (first - a->window - SPARE) / UNIT * UNIT,
                  kept = first - start;
    if (!k->buffer || end - k->base <= k->capacity || start <= k->base) return;
    memmove(k->buffer, k->buffer + (start - k->base) * size, kept * size);
    k->base = start;
}

// The journal has room for `count` more rows.
static int lengthen_journal(const offramp_session *s, int64_t i, int64_t count) {
    Mixed *m = &s->blocks[i].mixed;
    const int64_t rows = m->length - m->since + count;
    if (!m->watched || rows <= m->room) return 1;
    const int64_t room = rows > 2 * m->room ? rows : 2 * m->room;
    float *longer = realloc(m->journal, room * note_floats(&block_of(s, i)->mamba2) * sizeof(float));
    if (!longer) return 0;
    m->journal = longer, m->room = room;
    return 1;
}

int make_room(offramp_session *s, int64_t i, int64_t first, int64_t end) {
    const Block *b = block_of(s, i);
    if (!b->attends) return lengthen_journal(s, i, end - first);
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

void count_tokens(offramp_session *s, int64_t i, int64_t end, int64_t count) {
    if (block_of(s, i)->attends)
        s->blocks[i].keys.length = end;
    else
        s->blocks[i].mixed.length += count;
}

static offramp_status check_range(const offramp_session *s, int64_t start, int64_t stop,
                                  offramp_error *error) {
    NEED(0 <= start && start <= stop && stop <= s->model->count,
         "There are %lld blocks, and none from %lld up to %lld.", (long long)s->model->count,
         (long long)start, (long long)stop);
    return OFFRAMP_OK;
}

static offramp_status check_block(const offramp_session *s, int64_t i, offramp_error *error) {
    NEED(0 <= i && i < s->model->count, "There are %lld blocks, and none has the number %lld.",
         (long long)s->model->count, (long long)i);
    return OFFRAMP_OK;
}

offramp_status offramp_session_watch(offramp_session *s, int64_t start, int64_t stop, offramp_error *error) {
    if (check_range(s, start, stop, error)) return OFFRAMP_INVALID;
    for (int64_t i = start; i < stop; i++) {
        Mixed *m = &s->blocks[i].mixed;
        if (block_of(s, i)->attends || m->watched) continue;
        const Mamba2 *shape = &block_of(s, i)->mamba2;
        m->old_window = copy_of(m->window, window_floats(shape)),
        m->old_h = copy_of(m->h, state_floats(shape));
        if (!m->old_window || !m->old_h) {
            free_watch(m);
            return fail(error, OFFRAMP_NO_MEMORY, "There is no memory to watch a mixer.");
        }
        m->watched = 1, m->since = m->length;
    }
    return OFFRAMP_OK;
}

void offramp_session_settle(offramp_session *s) {
    for (int64_t i = 0; i < s->model->count; i++)
        if (!block_of(s, i)->attends) free_watch(&s->blocks[i].mixed);
}

int can_crop_keys(const offramp_session *s, int64_t i, int64_t length) {
    const Keys *k = &s->blocks[i].keys;
    return !k->base || length >= k->base + block_of(s, i)->attention.window;
}

int offramp_session_can_forget(const offramp_session *s, int64_t length) {
    int can = length >= 0;
    for (int64_t i = 0; i < s->model->count; i++)
        can &= block_of(s, i)->attends && can_crop_keys(s, i, length);
    return can;
}

// Goes back to where a watch began, and repeats the tokens up to `length`.
static void crop_mixed(const Mamba2 *shape, Mixed *m, int64_t length) {
    const int64_t rows = length - m->since;
    memcpy(m->h, m->old_h, state_floats(shape) * sizeof(float));
    mamba2_replay(shape, m->h, m->journal, rows);
    mamba2_window(shape, m->window, m->old_window, m->journal, rows);
    m->length = length;
}

offramp_status offramp_session_crop(offramp_session *s, int64_t length, int64_t start, int64_t stop,
                                    offramp_error *error) {
    if (check_range(s, start, stop, error)) return OFFRAMP_INVALID;
    NEED(length >= 0, "A text cannot have %lld tokens.", (long long)length);
    for (int64_t i = start; i < stop; i++) {
        const Mixed *m = &s->blocks[i].mixed;
        if (block_of(s, i)->attends) {
            NEED(can_crop_keys(s, i, length),
                 "A window of %lld tokens has let go of what position %lld sees.",
                 (long long)block_of(s, i)->attention.window, (long long)length);
        } else {
            NEED(length >= m->length || (m->watched && length >= m->since),
                 "A Mamba state cannot forget tokens that it took in without a watch.");
        }
    }
    for (int64_t i = start; i < stop; i++) {
        Memory *memory = s->blocks + i;
        if (block_of(s, i)->attends)
            memory->keys.length = min_(memory->keys.length, length);
        else if (length < memory->mixed.length)
            crop_mixed(&block_of(s, i)->mamba2, &memory->mixed, length);
    }
    return OFFRAMP_OK;
}

offramp_status offramp_session_copy(offramp_session *s, int64_t from, int64_t to, int64_t tokens,
                                    offramp_error *error) {
    if (check_block(s, from, error) || check_block(s, to, error)) return OFFRAMP_INVALID;
    const Block *source = block_of(s, from), *goal = block_of(s, to);
    NEED(source->attends && goal->attends && source->attention.heads == goal->attention.heads &&
             source->attention.dim == goal->attention.dim,
         "Blocks %lld and %lld have no keys of one shape.", (long long)from, (long long)to);
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
    NEED(!block_of(s, block)->attends, "Block %lld has no mixer.", (long long)block);
    const Mamba2 *m = &block_of(s, block)->mamba2;
    memcpy(window, s->blocks[block].mixed.window, window_floats(m) * sizeof(float));
    memcpy(h, s->blocks[block].mixed.h, state_floats(m) * sizeof(float));
    return OFFRAMP_OK;
}
