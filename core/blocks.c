#include "blocks.h"

#include "attention.h"
#include "mixers.h"

Buffers buffers_for(const offramp_model *model, int64_t rows, int64_t end, Arena *arena) {
    const int64_t D = model->hidden, few = min_(rows, EIGHT);
    int64_t x = D, qkv = 0, in = 0, conv = 0, low = 0, inner = D, widest = D, parts = 0, own = 0;
    for (int64_t i = 0; i < model->count; i++) {
        const Block *b = model->blocks + i;
        if (b->attends) {
            const Attention *a = &b->attention;
            x = larger(x, a->o.columns), widest = larger(widest, a->o.columns),
            qkv = larger(qkv, a->qkv.rows);
            parts = larger(parts, attention_parts(a, end)), own = larger(own, attention_local(a));
        }
        if (b->mixes) {
            const Mixer *m = &b->mixer;
            x = larger(x, m->inner), widest = larger(widest, m->inner), in = larger(in, m->in.rows);
            conv = larger(conv, m->channels), low = larger(low, mixer_low(m));
            if (m->kind == MAMBA) widest = larger(widest, m->steps.columns);
        }
        if (!b->has_mlp) continue;
        inner = larger(inner, b->mlp.gate_up.rows), widest = larger(widest, b->mlp.down.columns);
    }
    own = (own + 15) / 16 * 16;
    return (Buffers){
        .x = take_floats(arena, rows * x),
        .qkv = take_floats(arena, rows * qkv),
        .in = take_floats(arena, rows * in),
        .conv = take_floats(arena, rows * conv),
        .low = take_floats(arena, rows * low),
        .inner = take_floats(arena, rows * inner),
        .room = take_floats(arena, narrow_room(rows, widest)),
        .parts = take_floats(arena, few * parts),
        .local = take_floats(arena, model->pool.wanted * own),
        .own = own,
    };
}

Worker worker_of(const offramp_model *model, const Tokens *tokens, const Buffers *buffers, Hand *hand) {
    return (Worker){
        .model = model, .tokens = *tokens, .buffers = *buffers, .hand = hand, .few = tokens->count <= EIGHT};
}

Rows enter_part(Worker *w, const Around *a, const Weight *first) {
    const Buffers *b = &w->buffers;
    const float *h = w->tokens.h, *norm = floats(a->norm);
    return norm ? prepare_normed(w->hand, first, h, norm, a->eps, w->tokens.count, b->x, b->room)
                : prepare(w->hand, first, h, first->columns, w->tokens.count, b->room);
}

void leave_part(Worker *w, const Around *a, const Weight *last, Rows rows, float *unused) {
    const int64_t D = last->rows, R = w->tokens.count;
    const float *after = floats(a->after);
    float *h = w->tokens.h;
    const int at_once = !after && a->factor == 1;
    multiply(w->hand, last, rows, R, (Out){at_once ? h : unused, D, at_once}, 0, D);
    if (at_once) return;
    EACH_PIECE(r, w->hand, R) {
        float *y = unused + r * D;
        if (after) rms_norm(y, after, a->eps, y, D);
        for (int64_t k = 0; k < D; k++) h[r * D + k] += a->factor * y[k];
    }
}

// Attention and a mixer side by side both read h before one of them changes it.
static void run_mixers(const Block *b, Worker *w, const MemoryAt *memory) {
    if (b->attends) attention_project(&b->attention, w, memory);
    if (b->mixes) mixer_project(&b->mixer, w);
    if (b->attends) attention_run(&b->attention, w, memory);
    if (b->mixes) mixer_run(&b->mixer, w, memory);
}

void run_blocks(Worker *w, int64_t start, int64_t stop, const MemoryAt *memory, int64_t sequences) {
    for (int64_t i = start; i < stop; i++) {
        const Block *b = w->model->blocks + i;
        const MemoryAt *own = memory + i * sequences;
        run_mixers(b, w, own);
        if (b->has_mlp) mlp_run(&b->mlp, w);
    }
}

void remember_blocks(Worker *w, int64_t start, int64_t stop, const MemoryAt *memory, int64_t sequences,
                     int64_t what) {
    for (int64_t i = start; i < stop; i++) {
        const Block *b = w->model->blocks + i;
        const MemoryAt *own = memory + i * sequences;
        if (b->attends && what & OFFRAMP_KEYS) attention_remember(&b->attention, w, own);
        if (b->mixes && what & OFFRAMP_STATES) mixer_remember(&b->mixer, w, own);
    }
}

// One call of `offramp_run` or `offramp_remember`, and the rows `from` to `to` - 1 of it that pass now.
typedef struct {
    offramp_model *model;
    int64_t start, stop, sessions, from, to;
    const offramp_rows *rows;
    float *h;
    int64_t what, remembers;  // which memories remember the rows; whether nothing else is done
    // Laid out for each piece of the rows:
    Tokens tokens;
    Buffers buffers;
    MemoryAt *memory;
} Call;

StateAt state_at(const Mixer *shape, const Mixed *m) {
    const int64_t rows = m->watched ? m->length - m->since : 0;
    return (StateAt){.window = m->window,
                     .fresh = m->h,
                     .notes = m->watched ? m->journal + (m->start + rows) * note_floats(shape) : NULL,
                     .h = m->stands ? m->old_h : m->h,
                     .journal = m->journal,
                     .due = m->due,
                     .start = m->start,
                     .kept = m->stands ? rows : 0};
}

MemoryAt memory_at(const offramp_session *s, int64_t i) {
    const Block *b = s->model->blocks + i;
    const Memory *memory = s->blocks + i;
    const Keys *keys = &memory->keys;
    MemoryAt found = {0};
    if (b->attends) found.keys = (KeysAt){keys->buffer - keys->base * place_bytes(s, &b->attention), s->half};
    if (b->mixes) found.state = state_at(&b->mixer, &memory->mixed);
    return found;
}

static void lay_call(void *context, Arena *arena) {
    Call *c = context;
    const int64_t count = c->to - c->from;
    int64_t *positions = take(arena, count * sizeof *positions),
            *sequences = take(arena, count * sizeof *sequences), end = 0;
    c->memory = take(arena, c->stop * c->sessions * sizeof *c->memory);
    for (int64_t q = 0, at = 0; q < c->sessions; at += c->rows[q++].count) {
        const offramp_rows *rows = c->rows + q;
        for (int64_t r = larger(at, c->from); r < min_(at + rows->count, c->to); r++) {
            end = larger(end, rows->first + r - at + 1);
            if (arena->base) positions[r - c->from] = rows->first + r - at, sequences[r - c->from] = q;
        }
        for (int64_t i = c->start; arena->base && i < c->stop; i++)
            c->memory[i * c->sessions + q] = memory_at(rows->session, i);
    }
    c->buffers = buffers_for(c->model, count, end, arena);
    c->tokens = (Tokens){c->h + c->from * c->model->hidden, count, end, positions, sequences};
}

static void work_on_call(Hand *hand, void *context) {
    const Call *c = context;
    Worker w = worker_of(c->model, &c->tokens, &c->buffers, hand);
    if (c->remembers)
        remember_blocks(&w, c->start, c->stop, c->memory, c->sessions, c->what);
    else
        run_blocks(&w, c->start, c->stop, c->memory, c->sessions);
}

static offramp_status check_call(const Call *c, offramp_error *error) {
    const offramp_model *model = c->model;
    NEED(0 <= c->start && c->start <= c->stop && c->stop <= model->count,
         "There are %lld blocks, and none from %lld up to %lld.", (long long)model->count,
         (long long)c->start, (long long)c->stop);
    for (int64_t q = 0; q < c->sessions; q++) {
        const offramp_rows *rows = c->rows + q;
        NEED(rows->session && rows->session->model == model, "A session belongs to another model.");
        for (int64_t other = 0; other < q; other++)
            NEED(rows->session != c->rows[other].session, "A session is given twice.");
        NEED(rows->count >= 0 && rows->first >= 0 && rows->count <= INT32_MAX &&
                 rows->first <= INT64_MAX - rows->count,
             "%lld rows from position %lld on are not a valid range.", (long long)rows->count,
             (long long)rows->first);
        for (int64_t i = c->start; i < c->stop; i++) {
            if (!model->blocks[i].attends || !(c->what & OFFRAMP_KEYS)) continue;
            NEED(rows->first <= rows->session->blocks[i].keys.length,
                 "Block %lld has %lld tokens, and cannot go on at position %lld.", (long long)i,
                 (long long)rows->session->blocks[i].keys.length, (long long)rows->first);
            NEED(can_crop_keys(rows->session, i, rows->first),
                 "The window of block %lld no longer has the keys that position %lld sees.", (long long)i,
                 (long long)rows->first);
        }
    }
    return OFFRAMP_OK;
}

// Makes room for all rows, and runs them piece by piece.
static offramp_status run_call(Call *c, offramp_error *error) {
    int64_t total = 0, end = 0;
    for (int64_t q = 0; q < c->sessions; q++) end = larger(end, c->rows[q].first + c->rows[q].count);
    const offramp_status status = reach(c->model, end, error);
    if (status) return status;
    for (int64_t q = 0; q < c->sessions; total += c->rows[q++].count)
        for (int64_t i = c->start; i < c->stop; i++)
            if (!make_room(c->rows[q].session, i, c->rows[q].first, c->rows[q].first + c->rows[q].count))
                return fail(error, OFFRAMP_NO_MEMORY, "There is no memory for more tokens.");
    for (c->from = 0; c->from < total; c->from = c->to) {
        c->to = min_(total, c->from + ROWS_AT_ONCE);
        if (!lay_out(c->model, lay_call, c))
            return fail(error, OFFRAMP_NO_MEMORY, "There is no memory for a pass.");
        pool_run(&c->model->pool, work_on_call, c);
        for (int64_t q = 0, at = 0; q < c->sessions; at += c->rows[q++].count) {
            const int64_t first = larger(at, c->from), last = min_(at + c->rows[q].count, c->to);
            for (int64_t i = c->start; first < last && i < c->stop; i++)
                count_tokens(c->rows[q].session, i, c->rows[q].first + last - at, last - first, c->what);
        }
    }
    return OFFRAMP_OK;
}

static offramp_status enter_call(Call *c, offramp_error *error) {
    pool_enter(&c->model->pool);
    offramp_status status = check_call(c, error);
    if (!status) status = run_call(c, error);
    pool_leave(&c->model->pool);
    return status;
}

offramp_status offramp_run(offramp_model *model, int64_t start, int64_t stop, const offramp_rows *rows,
                           int64_t sessions, float *h, offramp_error *error) {
    Call call = {.model = model,
                 .start = start,
                 .stop = stop,
                 .sessions = sessions,
                 .rows = rows,
                 .h = h,
                 .what = OFFRAMP_BOTH};
    return enter_call(&call, error);
}

offramp_status offramp_remember(offramp_model *model, int64_t start, int64_t stop, const offramp_rows *rows,
                                int64_t sessions, int64_t what, const float *h, offramp_error *error) {
    NEED(what >= OFFRAMP_KEYS && what <= OFFRAMP_BOTH, "Blocks cannot remember %lld.", (long long)what);
    Call call = {.model = model,
                 .start = start,
                 .stop = stop,
                 .sessions = sessions,
                 .rows = rows,
                 .h = (float *)h,
                 .what = what,
                 .remembers = 1};
    return enter_call(&call, error);
}
