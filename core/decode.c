// Greedy decoding of one session: several tokens in one call, each from its embedding to the choice of the
// next.
//
// A round is a pass to the top: drafts, if there is a drafter, then the newest token and the drafts in one
// chunk, then full depth's choice after each of them. What is learned of a round, and what threads decide by,
// is written once and has a place of its own, so that a thread that comes late decides the same.

#include "blocks.h"
#include "drafts.h"
#include "head.h"
#include "replay.h"

// One call. For drafts, block i has room for another state of a mixer, spare[i], for the window before drafts
// entered it, windows[i], and for a journal of MOST_DRAFTS + 1 rows, journals[i].
typedef struct {
    offramp_model *model;
    offramp_session *session;
    offramp_steps *steps;
    const Sketch *sketch;
    const Drafter *drafter;
    int64_t position, rows;  // of the first token; the most rows of a round
    int64_t *ids;            // of which number t is what the t-th round token is: ids[0] is the newest known
    // Laid out:
    float *h, *middles, *deep,
        *y;  // (rows, D) each: of the round's rows, and before block `middle`; (2, D); (rows, V)
    Best *bests;
    uint32_t *seen;  // a bit for each token, for each row
    HeadRoom head;
    Found *found;  // (most, rows)
    Round *rounds;
    DraftRoom draft;
    Desk desk;
    Buffers buffers;
    MemoryAt *memory;
    float **spare, **windows, **journals;
    int64_t *sequences;
} Decoder;

static int64_t seen_words(const Decoder *d) { return (d->model->vocabulary + 31) / 32; }

static void lay_decoder(void *context, Arena *arena) {
    Decoder *d = context;
    const offramp_model *model = d->model;
    const int64_t D = model->hidden, V = model->vocabulary, N = model->count, R = d->rows,
                  most = d->steps->most;
    const int saves = d->drafter != NULL;
    d->h = take_floats(arena, R * D), d->middles = take_floats(arena, R * D),
    d->deep = take_floats(arena, 2 * D);
    d->y = take_floats(arena, R * V);
    d->bests = take(arena, R * chunks_of(V) * (int64_t)sizeof(Best));
    d->seen = take(arena, R * seen_words(d) * (int64_t)sizeof(uint32_t));
    d->head = room_for_head(&model->ends.head, d->sketch, R, arena);
    d->found = take(arena, most * R * (int64_t)sizeof(Found));
    d->rounds = take(arena, most * (int64_t)sizeof(Round));
    if (d->drafter) d->draft = room_for_drafts(d->drafter, arena);
    d->desk = desk_for_gates(d->steps->gates, D, arena);
    d->buffers = buffers_for(model, R, d->position + most, arena);
    d->memory = take(arena, N * (int64_t)sizeof(MemoryAt));
    d->spare = take(arena, N * (int64_t)sizeof(float *));
    d->windows = take(arena, N * (int64_t)sizeof(float *)),
    d->journals = take(arena, N * (int64_t)sizeof(float *));
    d->sequences = take(arena, R * (int64_t)sizeof(int64_t));
    for (int64_t i = 0; saves && i < N; i++) {
        if (model->blocks[i].attends) continue;
        const Mamba2 *m = &model->blocks[i].mamba2;
        float *spare = take_floats(arena, state_floats(m)), *window = take_floats(arena, window_floats(m));
        float *journal = take_floats(arena, (MOST_DRAFTS + 1) * note_floats(m));
        if (arena->base) d->spare[i] = spare, d->windows[i] = window, d->journals[i] = journal;
    }
}

// What one thread works with.
typedef struct {
    Decoder *d;
    Worker w;
    int64_t at[MOST_DRAFTS + 1];  // positions of the rows
} Stepper;

// Runs rows h at places t + n and after of the call, row n and after of the round that begins with token t,
// through blocks `start` to `stop` - 1. Returns the number of blocks before the rows' end. The rows of a
// chunk go through a mixer together, and leave its old state where it is.
static int64_t run_rows(Stepper *s, float *h, int64_t t, int64_t n, int64_t rows, int64_t start, int64_t stop,
                        GatesAsked *gates) {
    const Decoder *d = s->d;
    for (int64_t r = 0; r < rows; r++) s->at[r] = d->position + t + n + r;
    s->w.tokens.h = h, s->w.tokens.count = rows;
    s->w.noting = d->drafter && n + rows > 1, s->w.noted = n;
    s->w.fresh = rows > 1 ? d->spare : NULL;
    return start + run_blocks(&s->w, start, stop, d->memory, 1, gates);
}

// Before drafts enter blocks: notes the windows of mixers, and their states where drafts enter one by one.
static void save_mixers(Stepper *s, int64_t start, int64_t stop, int one_by_one) {
    const Decoder *d = s->d;
    EACH_PIECE(k, s->w.hand, stop - start) {
        const int64_t i = start + k;
        const Block *b = d->model->blocks + i;
        if (b->attends) continue;
        memcpy(d->windows[i], d->memory[i].state.window, window_floats(&b->mamba2) * sizeof(float));
        if (one_by_one) memcpy(d->spare[i], d->memory[i].state.h, state_floats(&b->mamba2) * sizeof(float));
    }
}

// Keeps `kept` of the `made` rows of a round. Of all rows, each mixer has the state already; else it goes
// back to the old one, and repeats those that are kept. Blocks before `after` were saved after the first of
// them.
static void keep_rows(Stepper *s, int64_t after, int64_t kept, int64_t made) {
    const Decoder *d = s->d;
    EACH_PIECE(i, s->w.hand, d->model->count) {
        const Mamba2 *m = &d->model->blocks[i].mamba2;
        StateAt *state = &d->memory[i].state;
        if (d->model->blocks[i].attends) continue;
        const int shallow = i < after;
        if (shallow == (kept < made)) {  // the state to go on from is the spare one
            float *h = state->h;
            state->h = d->spare[i], d->spare[i] = h;
        }
        if (kept == made) continue;
        const float *journal = d->journals[i] + shallow * note_floats(m);
        mamba2_window(m, state->window, d->windows[i], journal, kept - shallow);
        mamba2_replay(m, state->h, journal, kept - shallow);
    }
}

// Puts the embedding of token t into row n of h.
static void embed(Stepper *s, int64_t t, int64_t n) {
    const Decoder *d = s->d;
    const Ends *ends = &d->model->ends;
    const int64_t D = d->model->hidden;
    float *h = d->h + n * D;
    EACH_PIECE(i, s->w.hand, 1) {
        const int64_t from = d->ids[t] * D;
        const uint16_t *half = (const uint16_t *)ends->embedding.values + from;
        if (ends->embedding.type == OFFRAMP_FLOAT32)
            memcpy(h, floats(ends->embedding) + from, D * sizeof(float));
        else
            for (int64_t k = 0; k < D; k += LANES) store_up_to(h + k, from_bfloat16(half + k, D - k), D - k);
    }
}

// Whether a text ends with a token.
static int ends_with(const Decoder *d, int64_t id) {
    int end = id < 0;
    for (int64_t i = 0; i < d->steps->ends_count; i++) end |= id == d->steps->ends[i];
    return end;
}

// Notes what full depth chooses after each row of a round, and which drafts stand.
static void judge(Decoder *d, Round *round, int64_t t) {
    const int64_t D = d->model->hidden, n = round->drafts, pieces = chunks_of(d->model->vocabulary);
    int64_t chosen[MOST_DRAFTS + 1], stood = 0;
    for (int64_t r = 0; r <= n; r++) {
        const Best best = best_among(d->bests + r * pieces, pieces);
        chosen[r] = isfinite(best.logit) ? best.id : -1;
    }
    while (stood < n && chosen[stood] == d->ids[t + 1 + stood]) stood++;
    d->ids[t + 1 + stood] = chosen[stood];
    memcpy(d->deep, d->h + stood * D, D * sizeof(float));
    if (d->drafter && d->drafter->middle) memcpy(d->deep + D, d->middles + stood * D, D * sizeof(float));
    round->ends = ends_with(d, chosen[stood]);
    round->stood = stood;
    if (d->drafter) learn_from(d->drafter, &d->session->estimates, round, chosen);
}

// Makes the ids that stand up to token t less likely: the library's repetition penalty. `seen` has a bit for
// each token.
static void penalise(const Decoder *d, int64_t t, float *y, uint32_t *seen) {
    const float penalty = (float)d->steps->penalty;
    memset(seen, 0, seen_words(d) * sizeof *seen);
    for (const int64_t *id = d->steps->ids; id <= d->ids + t; id++) {
        if (seen[*id / 32] >> *id % 32 & 1) continue;
        seen[*id / 32] |= 1u << *id % 32;
        y[*id] = y[*id] < 0 ? y[*id] * penalty : y[*id] / penalty;
    }
}

// Reads out the R rows of a round, and chooses.
static void decide(Stepper *s, Round *round, int64_t t, int64_t R) {
    Decoder *d = s->d;
    Hand *hand = s->w.hand;
    const Ends *ends = &d->model->ends;
    const int64_t V = d->model->vocabulary, pieces = chunks_of(V);
    const double start = seconds_now();
    Found *found = d->found + (round - d->rounds) * d->rows;
    read_logits(hand, &ends->head, floats(ends->norm), ends->eps, d->sketch, d->h, R, &d->head, found, d->y);
    const double read = seconds_now();
    if (d->steps->penalty != 1)
        EACH_PIECE(r, hand, R) penalise(d, t + r, d->y + r * V, d->seen + r * seen_words(d));
    EACH_PIECE(i, hand, R * pieces) {
        const int64_t p = i % pieces;
        d->bests[i] = best_of(d->y + i / pieces * V, p * CHUNK, min_(V, (p + 1) * CHUNK));
    }
    EACH_PIECE(i, hand, 1) judge(d, round, t);
    if (!hand->index) d->steps->seconds[2] += read - start, d->steps->seconds[3] += seconds_now() - read;
}

// Makes the drafts of the round that begins with token t. Row n of h is then token t + n, before block
// `after` of the drafter. Returns the number of drafts.
static int64_t make_drafts(Stepper *s, Round *round, int64_t t) {
    Decoder *d = s->d;
    Hand *hand = s->w.hand;
    const Drafter *drafter = d->drafter;
    const Ends *ends = &d->model->ends;
    const int64_t D = d->model->hidden, N = d->model->count,
                  most = min_(drafter->most, d->steps->most - t - 1);
    for (int64_t n = 0;; n++) {
        embed(s, t + n, n);
        if (drafter->after) run_rows(s, d->h + n * D, t, n, 1, 0, drafter->after, NULL);
        if (n == most) return n;
        EACH_PIECE(i, hand, 1) {
            if (!n) round->chance = 1;
            choose_source(drafter, &d->session->estimates, round, n, d->steps->ids, d->steps->known + t + n,
                          d->model->vocabulary);
        }
        if (round->source[n] == EXIT) {
            adapt(hand, drafter, d->h + n * D, n ? d->draft.out : d->deep, d->deep + D, &d->draft);
            if (drafter->tail) run_rows(s, d->draft.out, t, n, 1, N - drafter->tail, N, NULL);
            read_draft(hand, drafter, floats(ends->norm), ends->eps, &d->draft, round, n);
        }
        EACH_PIECE(i, hand, 1) {
            // Full depth decides without a draft whether the text ends.
            if (round->source[n] != NOTHING && !ends_with(d, round->draft[n]))
                choose_whether(drafter, &d->session->estimates, round, n);
            if (round->kept[n]) d->ids[t + n + 1] = round->draft[n];
        }
        if (!round->kept[n]) return n;
        if (!n) save_mixers(s, 0, drafter->after, 1);
    }
}

// Runs the R rows of the round that begins with token t from block `after` to the top. Returns the number of
// blocks before their end.
static int64_t run_chunk(Stepper *s, int64_t t, int64_t R, int64_t after, GatesAsked *gates) {
    const Decoder *d = s->d;
    const int64_t D = d->model->hidden, middle = d->drafter ? d->drafter->middle : 0;
    if (middle) {
        run_rows(s, d->h, t, 0, R, after, middle, NULL);
        EACH_PIECE(r, s->w.hand, R) memcpy(d->middles + r * D, d->h + r * D, D * sizeof(float));
        after = middle;
    }
    return run_rows(s, d->h, t, 0, R, after, d->model->count, gates);
}

static void take_steps(Hand *hand, void *context) {
    Decoder *d = context;
    offramp_steps *steps = d->steps;
    Stepper own = {.d = d};
    Stepper *s = &own;
    const Tokens tokens = {d->h, d->rows, d->position + steps->most, own.at, d->sequences, d->model->rotary};
    s->w = worker_of(d->model, &tokens, &d->buffers, hand);
    const int64_t N = d->model->count, after = d->drafter ? d->drafter->after : 0;
    int64_t run = N, t = 0, rounds = 0, n = 0;
    for (int end = 0; t < steps->enough && !end; rounds++) {
        Round *round = d->rounds + rounds;
        const double start = seconds_now();
        if (d->drafter)
            n = make_drafts(s, round, t);
        else
            embed(s, t, 0);
        const double embedded = seconds_now();
        GatesAsked asked = gates_for(steps->gates, t, &d->desk);
        if (n) save_mixers(s, after, N, 0);
        run = run_chunk(s, t, n + 1, after, &asked);
        if (!hand->index) {
            steps->seconds[d->drafter ? 4 : 0] += embedded - start;
            steps->seconds[1] += seconds_now() - embedded;
        }
        if (run < N) break;
        decide(s, round, t, n + 1);
        if (n) keep_rows(s, after, round->stood + 1, n + 1);
        t += round->stood + 1, end = round->ends;
    }
    if (!hand->index) steps->decided = t, steps->run = run < N ? run : 0, steps->passes_count = rounds;
}

// Writes down what was found, and what the session has taken in.
static void conclude(Decoder *d) {
    offramp_steps *steps = d->steps;
    const int64_t D = d->model->hidden;
    if (!steps->enough) return;
    for (int64_t p = 0, t = 0; p < steps->passes_count; t += d->rounds[p++].stood + 1) {
        const Round *round = d->rounds + p;
        steps->passes[p] = (offramp_pass){round->drafts, round->stood, 0};
        for (int n = 0; n <= MOST_DRAFTS; n++) steps->passes[p].asked += round->source[n] == EXIT;
        for (int64_t n = 0; n <= round->stood; n++)
            steps->confidences[t + n] =
                n < round->stood && round->source[n] == EXIT ? (float)round->sure[n] : NAN;
    }
    for (int64_t i = 0; i < d->model->count; i++) {
        const int64_t count = steps->decided + (i < steps->run);
        Mixed *mixed = &d->session->blocks[i].mixed;
        if (!d->model->blocks[i].attends && d->memory[i].state.h != mixed->h)
            memcpy(mixed->h, d->memory[i].state.h, state_floats(&d->model->blocks[i].mamba2) * sizeof(float));
        count_tokens(d->session, i, d->position + count, count);
    }
    memcpy(steps->h, d->h, D * sizeof(float));
    if (steps->deep)
        memcpy(steps->deep, d->deep, (d->drafter && d->drafter->middle ? 2 : 1) * D * sizeof(float));
}

static offramp_status check_steps(const Decoder *d, offramp_error *error) {
    const offramp_model *model = d->model;
    const offramp_steps *steps = d->steps;
    const offramp_session *session = d->session;
    NEED(session->model == model, "A session belongs to another model.");
    NEED(steps->known > 0 && steps->enough >= 0 && steps->enough <= steps->most && steps->most <= INT32_MAX,
         "%lld of %lld tokens cannot be decided after %lld.", (long long)steps->enough,
         (long long)steps->most, (long long)steps->known);
    for (int64_t t = 0; t < steps->known; t++)
        NEED(steps->ids[t] >= 0 && steps->ids[t] < model->vocabulary, "There is no token %lld.",
             (long long)steps->ids[t]);
    NEED(steps->penalty > 0, "A repetition penalty is above 0.");
    NEED(!d->drafter || steps->deep, "A drafter reads states of the token before.");
    NEED(!d->drafter || !steps->gates, "A drafter does not go with gates.");
    NEED(!model->rotary_dim || d->position + steps->most <= model->positions,
         "There are rotary pairs for %lld positions only.", (long long)model->positions);
    for (int64_t i = 0; i < model->count; i++) {
        // The state of a mixer may have stayed as it was for tokens that left early.
        const int64_t length = offramp_session_length(session, i);
        NEED(length == d->position || (length < d->position && !model->blocks[i].attends),
             "Blocks have taken in different numbers of tokens.");
        NEED(model->blocks[i].attends || !session->blocks[i].mixed.watched,
             "A session that is watched cannot decode.");
    }
    if (steps->sketch && check_sketch(steps->sketch, model->hidden, model->vocabulary, error))
        return OFFRAMP_INVALID;
    if (steps->drafter && check_drafter(steps->drafter, model, error)) return OFFRAMP_INVALID;
    return check_gates(steps->gates, model->hidden, error);
}

static offramp_status decode(Decoder *d, offramp_error *error) {
    offramp_steps *steps = d->steps;
    const int64_t D = d->model->hidden, N = d->model->count;
    if (check_steps(d, error)) return OFFRAMP_INVALID;
    for (int64_t i = 0; i < N; i++)
        if (!make_room(d->session, i, d->position, d->position + steps->most))
            return fail(error, OFFRAMP_NO_MEMORY, "There is no memory for more tokens.");
    if (!lay_out(d->model, lay_decoder, d))
        return fail(error, OFFRAMP_NO_MEMORY, "There is no memory for a pass.");
    memset(d->found, 0, steps->most * d->rows * sizeof *d->found);
    memset(d->rounds, 0, steps->most * sizeof *d->rounds);
    memset(d->sequences, 0, d->rows * sizeof *d->sequences);
    memset(steps->seconds, 0, sizeof steps->seconds);
    memset(d->deep, 0, 2 * D * sizeof(float));
    if (d->drafter) memcpy(d->deep, steps->deep, (d->drafter->middle ? 2 : 1) * D * sizeof(float));
    const offramp_rows rows = {d->session, d->position, 0};
    for (int64_t i = 0; i < N; i++) {
        d->memory[i] = memory_at(&rows, i);
        if (!d->model->blocks[i].attends) d->memory[i].state.notes = d->drafter ? d->journals[i] : NULL;
    }
    pool_run(&d->model->pool, take_steps, d);
    conclude(d);
    return OFFRAMP_OK;
}

offramp_status offramp_decode(offramp_model *model, offramp_session *session, offramp_steps *steps,
                              offramp_error *error) {
    Decoder d = {.model = model, .session = session, .steps = steps, .ids = steps->ids + steps->known - 1};
    if (steps->sketch) d.sketch = &steps->sketch->sketch;
    if (steps->drafter) d.drafter = &steps->drafter->drafter;
    d.rows = d.drafter ? MOST_DRAFTS + 1 : 1;
    d.position = model->count ? offramp_session_length(session, 0) : 0;
    pool_enter(&model->pool);
    const offramp_status status = decode(&d, error);
    pool_leave(&model->pool);
    return status;
}
