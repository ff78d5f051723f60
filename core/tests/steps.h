// Texts that are stepped, and what a step must find: token by token, with the other functions of offramp.h.

#pragma once
#include "rules.h"

enum { TEXTS = 3 };  // of a condition

// Texts -------------------------------------------------------------------------------------------

// A text, the request about it, and what was found so far.
typedef struct {
    offramp_request r;
    int64_t ids[ROOM], decided, asked, passes, rejected,
        piece;  // piece: tokens that are read at once (0: all)
    float deep[2 * D];
    offramp_decision decisions[ROOM];
} Text;

static inline Text *text_with(offramp_session *session, const int64_t *ids, int64_t known) {
    Text *x = memory(sizeof *x);
    memcpy(x->ids, ids, known * sizeof *ids);
    x->r = (offramp_request){
        .session = session, .ids = x->ids, .known = known, .prompt = known, .how = GREEDY, .deep = x->deep};
    return x;
}

static inline Text *text_of(const Tiny *t, offramp_type keys, const int64_t *ids, int64_t known) {
    return text_with(session_of(t, keys), ids, known);
}

static inline Text *fork_of(const Text *x) {
    Text *twin = memory(sizeof *twin);
    *twin = *x;
    twin->r.session = offramp_session_fork(x->r.session, &said);
    MADE(twin->r.session);
    twin->r.ids = twin->ids, twin->r.deep = twin->deep;
    return twin;
}

static inline int is_over(const Text *x, int64_t most) {
    int over = x->decided >= most || x->r.failed;
    for (int64_t i = 0; x->decided && i < x->r.ends_count; i++)
        over |= x->decisions[x->decided - 1].id == x->r.ends[i];
    return over;
}

// One call for the texts that are not over: they read what they have not read, or decide up to `most` in all.
// Returns how many there were.
static inline int step(offramp_plan *plan, Text *const *texts, int count, int64_t most, int64_t rounds) {
    offramp_request *requests[80] = {NULL};
    int asked = 0;
    for (int i = 0; i < count; i++) {
        Text *x = texts[i];
        if (is_over(x, most)) continue;
        const int64_t unread = x->r.known - 1 - x->r.run;
        x->r.reads = x->piece && x->piece < unread ? x->piece : unread;
        x->r.most = most - x->decided, x->r.decisions = x->decisions + x->decided;
        requests[asked++] = &x->r;
    }
    WORKS(offramp_step(plan, requests, asked, rounds, NULL, &said));
    for (int i = 0; i < asked; i++) {
        Text *x = (Text *)requests[i];
        const int64_t found = x->r.decided;
        CHECK(x->r.reads || x->r.failed ? !found || !x->r.reads : found > 0, "%d tokens", (int)found);
        CHECK(found <= rounds * (OFFRAMP_MOST_DRAFTS + 1) && (!found || found <= x->r.most),
              "%d tokens of %d", (int)found, (int)x->r.most);
        for (int64_t n = 0; n < found; n++) {
            offramp_decision *d = x->decisions + x->decided + n;
            CHECK(d->id == x->ids[x->r.known + n], "a decision is not what stands in the text");
            d->passes += x->passes, d->rejected += x->rejected;
        }
        x->r.known += found, x->decided += found, x->asked += x->r.asked;
        if (!found) continue;
        x->passes = x->decisions[x->decided - 1].passes, x->rejected = x->decisions[x->decided - 1].rejected;
        CHECK(x->r.failed || x->r.run == x->r.known - 1, "%d of %d tokens have been run", (int)x->r.run,
              (int)x->r.known);
    }
    return asked;
}

// Decides `most` tokens of each text.
static inline void step_all(offramp_plan *plan, Text *const *texts, int count, int64_t most, int64_t rounds) {
    while (step(plan, texts, count, most, rounds)) {}
}

// Reads the texts to their ends, at full depth: then no token waits.
static inline void read_all(offramp_plan *plan, Text *const *texts, int count) {
    offramp_request *requests[8];
    for (int i = 0; i < count; i++)
        texts[i]->r.reads = texts[i]->r.known - texts[i]->r.run, requests[i] = &texts[i]->r;
    WORKS(offramp_step(plan, requests, count, 1, NULL, &said));
}

static inline int same_decisions(const offramp_decision *a, const offramp_decision *b, double tolerance) {
    const int sure =
        isnan(a->confidence) ? isnan(b->confidence) : fabs(a->confidence - b->confidence) <= tolerance;
    return sure && a->id == b->id && a->block == b->block && a->flops == b->flops && a->blocks == b->blocks &&
           a->passes == b->passes && a->rejected == b->rejected && a->source == b->source;
}

// The same tokens, decided in the same way, and the same memories.
static inline void are_alike(const Tiny *t, const Text *a, const Text *b, double tolerance,
                             const char *what) {
    for (int64_t n = 0; n < a->decided && n < b->decided; n++) {
        const offramp_decision *x = a->decisions + n, *y = b->decisions + n;
        CHECK(same_decisions(x, y, tolerance),
              "%s: decision %d: %d %d %g, %d %d, %d %d and not %d %d %g, %d %d, %d %d", what, (int)n,
              (int)x->id, (int)x->block, x->confidence, (int)x->flops, (int)x->blocks, (int)x->passes,
              (int)x->rejected, (int)y->id, (int)y->block, y->confidence, (int)y->flops, (int)y->blocks,
              (int)y->passes, (int)y->rejected);
    }
    CHECK(a->decided == b->decided && a->asked == b->asked, "%s: %d tokens, %d asked, and not %d, %d", what,
          (int)a->decided, (int)a->asked, (int)b->decided, (int)b->asked);
    CHECK(a->r.failed == b->r.failed, "%s: failed %d and not %d", what, (int)a->r.failed, (int)b->r.failed);
    if (a->r.failed) return;
    CHECK(all_the_same(t, a->r.session, b->r.session), "%s: memories differ", what);
    CHECK(same(a->deep, b->deep, 2 * D), "%s: what read-outs read of the token before", what);
}

// At random ---------------------------------------------------------------------------------------

// How the texts of one condition begin, and how their tokens are chosen.
typedef struct {
    int64_t ids[TEXTS][8], known[TEXTS], ends[2];
    Text like;
    uint32_t allowed[2];
} Prompts;

static inline void random_prompts(const Tiny *t, Prompts *p, int masks) {
    p->like = (Text){.r = {.how = GREEDY, .whole = below(2)}};
    offramp_sampling *how = &p->like.r.how;
    if (below(2)) how->temperature = 0.7, how->seed = random_bits();
    if (below(3) == 0) how->top_k = 5;
    if (below(3) == 0) how->penalty = 1.3;
    for (int i = 0; i < TEXTS; i++) random_ids(p->ids[i], p->known[i] = 1 + below(8), t->shape.vocabulary);
    random_ids(p->ends, 2, t->shape.vocabulary);
    for (int i = 0; i < 2; i++) p->allowed[i] = (uint32_t)random_bits() | 1;
    if (masks && below(4) == 0) p->like.r.allowed = p->allowed;
    if (below(2)) p->like.r.ends = p->ends, p->like.r.ends_count = 2;
}

static inline Text *text_like(const Tiny *t, const Prompts *p, int i) {
    Text *x = text_of(t, i % 2 ? OFFRAMP_FLOAT32 : OFFRAMP_BFLOAT16, p->ids[i], p->known[i]);
    const offramp_request *like = &p->like.r;
    x->r.how = like->how, x->r.whole = like->whole ^ (i == 1), x->r.allowed = like->allowed;
    x->r.how.seed += i, x->r.ends = like->ends, x->r.ends_count = like->ends_count;
    return x;
}

// By hand -----------------------------------------------------------------------------------------

// A text that is decided by hand. `seen` are the states of its tokens at each exit, for gates.
typedef struct {
    const Tiny *t;
    const Rules *rules;
    Text *x;
    float seen[EXITS][ROOM * D];
    int64_t count[EXITS], waits[EXITS];
} ByHand;

static inline ByHand *by_hand(const Tiny *t, const Rules *rules, Text *x) {
    ByHand *b = memory(sizeof *b);
    b->t = t, b->rules = rules, b->x = x;
    return b;
}

// Runs one token through some blocks.
static inline void run_token(const ByHand *b, offramp_session *session, int64_t start, int64_t stop,
                             float *h) {
    const offramp_rows row = {session, b->x->r.run, 1};
    WORKS(offramp_run(b->t->model, start, stop, &row, 1, h, &said));
}

// Runs one token from block `start` to the top. Gates from number e on see it.
static inline void run_to_top(ByHand *b, int64_t start, int64_t e, float *h, float *middle) {
    const offramp_rules *rules = &b->rules->rules;
    for (; e < rules->count; e++) {
        run_token(b, b->x->r.session, start, rules->exits[e].after, h);
        memcpy(b->seen[e] + b->count[e]++ * D, h, D * 4);
        start = rules->exits[e].after;
    }
    if (rules->middle) {
        run_token(b, b->x->r.session, start, rules->middle, h);
        memcpy(middle, h, D * 4), start = rules->middle;
    }
    run_token(b, b->x->r.session, start, b->t->count, h);
}

static inline void read_by_hand(ByHand *b, int64_t known) {
    Text *x = b->x;
    for (; x->r.run < known; x->r.run++) {
        embed_by_hand(b->t, x->ids[x->r.run], x->deep);
        run_to_top(b, 0, 0, x->deep, x->deep + D);
    }
    memset(b->waits, 0, sizeof b->waits);
}

static inline int64_t flops_by_hand(const ByHand *b, int64_t start, int64_t stop, int64_t count) {
    int64_t flops = 0;
    for (int64_t i = start; i < stop; i++)
        for (int64_t p = b->x->r.run + 1 - count; p <= b->x->r.run; p++) {
            const int64_t window = b->t->layers[i].attends ? b->t->shape.window : 0;
            flops += b->rules->costs[i].flops +
                     b->rules->costs[i].seen_flops * (window && window < p + 1 ? window : p + 1);
        }
    return flops;
}

static inline double threshold_by_hand(const ByHand *b, double threshold) {
    const double decay = b->rules->rules.decay;
    return decay > 0 && threshold < 1 ? 0.9 * threshold + 0.1 * exp(-(b->x->r.known - b->x->r.prompt) / decay)
                                      : threshold;
}

// What an exit's head, or the one at the top, chooses after state h (D).
static inline int64_t choose_by_hand(const ByHand *b, const float *h, int top, double *confidence) {
    const offramp_rules *rules = &b->rules->rules;
    const int64_t V = b->t->shape.vocabulary;
    const offramp_part *sketch = !top ? rules->exit_sketch : b->x->r.whole ? NULL : rules->sketch;
    const int listed = !top && rules->shortlist;
    float *y = calloc(V, 4), *all = calloc(V, 4);
    WORKS(offramp_logits(b->t->model, sketch, h, 1, y, &said));
    memcpy(all, y, V * 4);
    for (int64_t v = 0; listed && v < V; v++) y[v] = -INFINITY;
    for (int64_t i = 0; listed && i < b->rules->listed; i++)
        y[b->rules->tokens[i]] = all[b->rules->tokens[i]];
    const offramp_confidence kind = rules->confidence ? rules->confidence : rules->key;
    *confidence = confidence_reference(kind, y, V, listed ? b->rules->listed : V);
    int64_t id;
    WORKS(
        offramp_choose(b->t->model, &b->x->r.how, b->x->ids, b->x->r.known, b->x->r.allowed, y, &id, &said));
    free(y), free(all);
    return id;
}

// Lets the blocks between an exit and its tail remember its state h (D).
static inline void fill_by_hand(const ByHand *b, const offramp_exit *at, const float *h, int64_t *flops) {
    const offramp_fill fill = b->rules->rules.fill;
    int64_t source = -1;
    for (int64_t i = 0; i < at->after; i++) source = b->t->layers[i].attends ? i : source;
    for (int64_t i = at->after; i < b->t->count - at->tail; i++) {
        const int attends = b->t->layers[i].attends;
        const offramp_rows row = {b->x->r.session, b->x->r.run, 1};
        if (fill == OFFRAMP_COPY && source >= 0) {
            if (attends) WORKS(offramp_session_copy(row.session, source, i, 1, &said));
            continue;
        }
        // The costs of a block say 0 for what it does not have; here they do not, and all is counted.
        *flops +=
            b->rules->costs[i].key_flops + (fill == OFFRAMP_PROJECT ? b->rules->costs[i].state_flops : 0);
        const int what = fill == OFFRAMP_PROJECT ? OFFRAMP_BOTH : OFFRAMP_KEYS;
        if (attends || fill == OFFRAMP_PROJECT)
            WORKS(offramp_remember(b->t->model, i, i + 1, &row, 1, what, h, &said));
    }
}

// Whether a token leaves at exit e, where its state is h (D). Then `out` is what the head read.
static inline int leaves_by_hand(ByHand *b, int64_t e, const float *h, float *out, offramp_decision *d) {
    const offramp_rules *rules = &b->rules->rules;
    const offramp_exit *at = rules->exits + e;
    const int64_t tail = b->t->count - at->tail, gated = rules->confidence == OFFRAMP_GATE,
                  key = at->perhaps < 1 && at->key < 1;
    const double threshold = threshold_by_hand(b, at->threshold);
    double sure = 1, confidence;
    if (gated && threshold > 0) {
        const int recurrent = b->rules->recurrent[e];
        const int64_t first = recurrent ? 0 : b->count[e] - 1;
        float logits[ROOM];
        WORKS(offramp_ask(b->t->model, at->gate, b->seen[e] + first * D, b->count[e] - first, logits, &said));
        sure = 1 / (1 + exp(-(double)logits[b->count[e] - first - 1]));
        d->flops += recurrent ? 0 : at->gate_flops;
        if (!(sure > (key ? fmin(threshold, at->perhaps) : threshold))) return 0;
    }
    b->x->asked++;
    d->flops += at->readout_flops + rules->exit_head_flops + flops_by_hand(b, tail, b->t->count, 1);
    d->blocks += at->tail;
    offramp_session *before = b->x->r.session;
    b->x->r.session = offramp_session_fork(before, &said);
    MADE(b->x->r.session);
    WORKS(offramp_read_out(b->t->model, at->readout, h, b->x->deep, 1, out, &said));
    run_token(b, b->x->r.session, tail, b->t->count, out);
    d->id = choose_by_hand(b, out, 0, &confidence);
    int leaves = sure > threshold;
    if (!gated || !leaves) {
        sure = !gated || b->rules->keys ? confidence : sure;
        leaves = (!gated || b->rules->keys) && sure > (gated ? threshold_by_hand(b, at->key) : threshold);
    }
    leaves &= d->id >= 0;
    d->confidence = sure, d->block = at->after, d->source = leaves ? OFFRAMP_FROM_EXIT : OFFRAMP_FROM_FULL;
    // Where tokens wait, all blocks will run for them, and what a tail did is forgotten.
    if (leaves && rules->fill < OFFRAMP_DEFER) {
        offramp_session_free(before);
        fill_by_hand(b, at, h, &d->flops);
    } else {
        offramp_session_free(b->x->r.session);
        b->x->r.session = before;
    }
    return leaves;
}

// Puts a decided token at the end of the text.
static inline void append(ByHand *b, offramp_decision d) {
    Text *x = b->x;
    d.passes = x->passes;
    x->ids[x->r.known++] = d.id, x->decisions[x->decided++] = d, x->r.run++;
}

// Decides the next token. The text has been read but for its last one. What OFFRAMP_VERIFY finds is what full
// depth decides.
static inline void decide_by_hand(ByHand *b) {
    const offramp_rules *rules = &b->rules->rules;
    Text *x = b->x;
    const int64_t defers = rules->fill == OFFRAMP_DEFER, N = b->t->count;
    int64_t start = 0, climbing = 1, waiting = 0;
    offramp_decision d = {0};
    float h[D], out[D], middle[D];
    embed_by_hand(b->t, x->ids[x->r.run], h);
    for (int64_t e = 0; e < rules->count; e++) waiting += b->waits[e];
    const int asks = rules->fill < OFFRAMP_DEFER || (defers && waiting < rules->pending);
    for (int64_t e = 0; e < rules->count; e++) {
        const offramp_exit *at = rules->exits + e;
        run_token(b, x->r.session, start, at->after, h);
        memcpy(b->seen[e] + b->count[e]++ * D, h, D * 4);
        d.flops += flops_by_hand(b, start, at->after, climbing);
        d.flops += b->rules->recurrent[e] ? at->gate_flops * climbing : 0;
        d.blocks += (at->after - start) * climbing;
        start = at->after;
        if (asks && leaves_by_hand(b, e, h, out, &d)) {
            b->waits[e] += climbing;
            memcpy(x->deep, out, D * 4);
            if (defers) run_to_top(b, start, e + 1, h, middle);
            append(b, d);
            return;
        }
        climbing += defers ? b->waits[e] : 0, b->waits[e] = 0;
    }
    run_to_top(b, start, rules->count, h, x->deep + D);
    memcpy(x->deep, h, D * 4);
    d.flops += flops_by_hand(b, start, N, climbing) + rules->head_flops, d.blocks += (N - start) * climbing;
    d.id = choose_by_hand(b, h, 1, &d.confidence), d.block = N, d.confidence = NAN;
    if (d.id < 0) {
        x->r.failed = d.id == -1 ? OFFRAMP_NOT_FINITE : OFFRAMP_NOTHING_FITS;
        return;
    }
    x->passes++;
    append(b, d);
}

static inline void decide_all_by_hand(ByHand *b, int64_t most) {
    read_by_hand(b, b->x->r.known - 1);
    while (!is_over(b->x, most)) decide_by_hand(b);
}
