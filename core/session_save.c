// Sessions as bytes, for a program that goes on with a text after it has ended.

#include <stdlib.h>

#include "plan.h"

enum { EDITION = 1 };

// Bytes go one way or the other: into memory that has `room`, or out of it. Without room, they are counted.
typedef struct {
    char *at;
    int64_t used, room;
    int loads, bad;
} Passage;

static void pass(Passage *p, void *memory, int64_t bytes) {
    const int fits = bytes >= 0 && bytes <= p->room - p->used;
    if (fits && p->loads) memcpy(memory, p->at + p->used, bytes);
    if (fits && !p->loads) memcpy(p->at + p->used, memory, bytes);
    p->bad |= p->loads && !fits;
    p->used += bytes;
}

static void pass_number(Passage *p, int64_t *number) { pass(p, number, sizeof *number); }

static void pass_keys(Passage *p, offramp_session *s, int64_t i) {
    Keys *k = &s->blocks[i].keys;
    const int64_t each = place_bytes(s, &s->model->blocks[i].attention);
    pass_number(p, &k->base), pass_number(p, &k->length);
    if (p->loads && !p->bad) {
        // Only a window lets a block forget its first tokens, UNIT at a time.
        const int forgets = s->model->blocks[i].attention.window > 0 && k->base % UNIT == 0;
        p->bad = k->base < 0 || (k->base && !forgets) || k->length < k->base || k->length > INT32_MAX;
        const int64_t count = p->bad ? 0 : k->length - k->base;
        p->bad |= count > (p->room - p->used) / each;
        k->capacity = p->bad ? 0 : count;
        k->buffer = p->bad || !count ? NULL : malloc(count * each);
        p->bad |= (count && !k->buffer) || (!p->bad && !can_crop_keys(s, i, k->length));
    }
    if (!p->bad) pass(p, k->buffer, k->buffer ? (k->length - k->base) * each : 0);
}

static void pass_mixed(Passage *p, const Mixer *shape, Mixed *m) {
    if (!p->loads) bring_up_to_date(shape, m);
    pass_number(p, &m->length);
    p->bad |= p->loads && (m->length < 0 || m->length > INT32_MAX);
    pass(p, m->window, window_floats(shape) * (int64_t)sizeof(float));
    pass(p, m->h, state_floats(shape) * (int64_t)sizeof(float));
}

static int64_t mixed_bytes(const Mixer *shape) {
    return (int64_t)sizeof(int64_t) + (window_floats(shape) + state_floats(shape)) * (int64_t)sizeof(float);
}

// The memories of Mamba gates, for the plan that a text goes on with; without one, they are left out.
static void pass_gates(Passage *p, offramp_session *s, const offramp_plan *plan) {
    AtExits *exits = &s->exits;
    if (p->loads && plan) {
        const int made =
            prepare_exits(s, plan->number, plan->rules.count, plan->mixers, plan->rules.pending + 1);
        p->bad |= !made;
    }
    int64_t own = 0, bytes;
    for (int64_t e = 0; e < exits->count; e++) own += exits->shapes[e] ? mixed_bytes(exits->shapes[e]) : 0;
    bytes = own;
    pass_number(p, &bytes), pass_number(p, &exits->run);
    if (p->loads && !plan) {
        p->bad |= bytes < 0 || bytes > p->room - p->used;
        p->used += p->bad ? 0 : bytes;
        return;
    }
    p->bad |= p->loads && (bytes != own || exits->run < 0 || exits->run > INT32_MAX);
    for (int64_t e = 0; e < exits->count && !p->bad; e++) {
        if (!exits->shapes[e]) continue;
        pass_mixed(p, exits->shapes[e], exits->gates + e);
        p->bad |= exits->gates[e].length > exits->run;
    }
}

static void pass_session(Passage *p, offramp_session *s, const offramp_plan *plan) {
    const int64_t own[] = {EDITION, s->model->count, s->model->hidden, s->half};
    int64_t given[4];
    memcpy(given, own, sizeof own);
    for (int i = 0; i < 4; i++) pass_number(p, given + i);
    p->bad |= memcmp(given, own, sizeof own) != 0;
    for (int64_t i = 0; i < s->model->count && !p->bad; i++) {
        const Block *b = s->model->blocks + i;
        if (b->attends) pass_keys(p, s, i);
        if (b->mixes && !p->bad) pass_mixed(p, &b->mixer, &s->blocks[i].mixed);
    }
    if (!p->bad) pass_gates(p, s, plan);
    p->bad |= p->loads && p->used != p->room;
}

int64_t offramp_session_save(offramp_session *session, void *bytes, int64_t room) {
    for (int64_t i = 0; i < session->model->count; i++)
        if (session->blocks[i].mixed.watched) return -1;
    if (waiting(session) || session->broken) return -1;
    Passage p = {.at = bytes, .room = room};
    pass_session(&p, session, NULL);
    return p.used;
}

offramp_session *offramp_session_load(offramp_model *model, const offramp_plan *plan, offramp_type keys,
                                      const void *bytes, int64_t count, offramp_error *error) {
    offramp_session *s = offramp_session_new(model, keys, 0, error);
    if (!s) return NULL;
    Passage p = {.at = (char *)bytes, .room = count, .loads = 1};
    pass_session(&p, s, plan);
    if (!p.bad) return s;
    fail(error, OFFRAMP_INVALID, "These bytes are no session of this model, or not all of one.");
    offramp_session_free(s);
    return NULL;
}
