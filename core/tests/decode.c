// Greedy decoding: as one by one with the other functions of offramp.h, with a sketch, penalty, ends, gates
// and drafts.

#include "models.h"

enum { MOST = 40, DRAFTS = OFFRAMP_MOST_DRAFTS };
static const int64_t PROMPT[] = {3, 1, 4, 1, 5, 9, 2, 6};
enum { KNOWN = sizeof PROMPT / sizeof *PROMPT };

// A decoding, and room for what it finds.
typedef struct {
    int64_t ids[KNOWN + MOST];
    float confidences[MOST], h[32], deep[64];
    offramp_pass passes[MOST];
    offramp_steps steps;
} Decoding;

static void embed(const Tiny *t, int64_t id, float *h) { memcpy(h, t->embedding + id * 32, 32 * 4); }

// A session that has taken in the prompt, but its last token; the state of the token before, at the top and
// after `middle` blocks.
static offramp_session *prompted(const Tiny *t, int64_t middle, float *deep) {
    offramp_session *session = session_of(t, OFFRAMP_BFLOAT16);
    for (int64_t i = 0; i < KNOWN - 1; i++) {
        const offramp_rows row = {session, i, 1};
        float *h = deep;
        embed(t, PROMPT[i], h);
        WORKS(offramp_run(t->model, 0, middle, &row, 1, h, NULL, NULL, &said));
        memcpy(deep + 32, h, 32 * 4);
        WORKS(offramp_run(t->model, middle, t->count, &row, 1, h, NULL, NULL, &said));
    }
    return session;
}

static void prepare(Decoding *d, int64_t enough, int64_t most) {
    memset(d, 0, sizeof *d);
    memcpy(d->ids, PROMPT, sizeof PROMPT);
    d->steps = (offramp_steps){.ids = d->ids,
                               .known = KNOWN,
                               .enough = enough,
                               .most = most,
                               .penalty = 1,
                               .passes = d->passes,
                               .confidences = d->confidences,
                               .h = d->h,
                               .deep = d->deep};
}

// What decoding must find: token by token. Returns how many tokens there are.
static int64_t plainly(const Tiny *t, offramp_session *session, const Decoding *like, int64_t *ids,
                       float *h) {
    const offramp_steps *steps = &like->steps;
    const int64_t V = t->shape.vocabulary;
    const float penalty = (float)steps->penalty;
    float *y = zeros(V);
    memcpy(ids, PROMPT, sizeof PROMPT);
    for (int64_t n = 0; n < steps->enough; n++) {
        embed(t, ids[KNOWN - 1 + n], h);
        run_rows(t, session, h, 1);
        WORKS(offramp_logits(t->model, steps->sketch, h, 1, y, &said));
        for (int64_t v = 0; v < V; v++)
            for (int64_t i = 0, seen = 0; i < KNOWN + n && !seen && penalty != 1; i++)
                if ((seen = ids[i] == v)) y[v] = y[v] < 0 ? y[v] * penalty : y[v] / penalty;
        int64_t best = 0;
        for (int64_t v = 1; v < V; v++) best = y[v] > y[best] ? v : best;
        ids[KNOWN + n] = best;
        for (int64_t i = 0; i < steps->ends_count; i++)
            if (steps->ends[i] == best) return n + 1;
    }
    return steps->enough;
}

static Tiny model_of(const char *blocks, int64_t vocabulary, int type) {
    Shape shape = SMALL;
    shape.blocks = blocks, shape.vocabulary = vocabulary, shape.type = type,
    shape.fine = type == OFFRAMP_INT4;
    shape.positions = strchr(blocks, 'b') ? KNOWN + MOST : 0;
    return tiny(shape);
}

// Decodes, and compares with `plainly`: tokens, memories, and the newest state.
static int64_t decoding_is_plain(const Tiny *t, Decoding *d, int64_t middle) {
    int64_t ids[KNOWN + MOST];
    float deep[64], h[32];
    offramp_session *one_by_one = prompted(t, middle, deep), *session = prompted(t, middle, d->deep);
    const int64_t count = plainly(t, one_by_one, d, ids, h);
    WORKS(offramp_decode(t->model, session, &d->steps, &said));
    // With drafts that stood there may be more.
    CHECK(d->steps.decided >= count && d->steps.decided <= d->steps.most, "%d tokens and not %d",
          (int)d->steps.decided, (int)count);
    CHECK(!memcmp(ids, d->ids, (KNOWN + count) * 8), "other tokens");
    int64_t decided = 0;
    for (int64_t p = 0; p < d->steps.passes_count; p++) {
        const offramp_pass pass = d->passes[p];
        CHECK(pass.drafts >= pass.stood && pass.stood >= 0 && pass.drafts <= DRAFTS &&
                  pass.asked <= pass.drafts + 1,
              "%d drafts, %d stood, %d asked", (int)pass.drafts, (int)pass.stood, (int)pass.asked);
        decided += pass.stood + 1;
    }
    CHECK(decided == d->steps.decided, "passes have %d tokens, and %d are decided", (int)decided,
          (int)d->steps.decided);
    for (int64_t i = 0; i < t->count; i++)
        CHECK(offramp_session_length(session, i) == KNOWN - 1 + decided, "block %d has %d tokens", (int)i,
              (int)offramp_session_length(session, i));
    if (d->steps.decided == count) {
        CHECK(all_the_same(t, session, one_by_one), "memories differ");
        if (!d->steps.drafter && count) CHECK(same(h, d->h, 32), "the newest state differs");
    }
    offramp_session_free(session), offramp_session_free(one_by_one);
    return d->steps.decided;
}

static void plain_decoding(const Tiny *t, offramp_part *sketch) {
    const int64_t ends[] = {-5, 7, 1000};
    Decoding d;
    for (int threads = 1; threads <= 3; threads++) {
        WORKS(offramp_model_threads(t->model, threads, &said));
        for (int with = 0; with < 8; with++) {
            prepare(&d, MOST - 1, MOST);
            if (with & 1) d.steps.penalty = 1.3;
            if (with & 2) d.steps.sketch = sketch;
            if (with & 4) d.steps.ends = ends, d.steps.ends_count = 3;
            decoding_is_plain(t, &d, 0);
            for (int i = 0; i < d.steps.decided; i++)
                CHECK(isnan(d.confidences[i]) && !d.passes[i].drafts && !d.passes[i].asked,
                      "a plain token has a confidence");
        }
        // A token that must come ends the text.
        prepare(&d, 9, 9);
        decoding_is_plain(t, &d, 0);
        const int64_t end = d.ids[KNOWN + 2], decided = d.ids[KNOWN] == end       ? 1
                                                        : d.ids[KNOWN + 1] == end ? 2
                                                                                  : 3;
        prepare(&d, 9, 9);
        d.steps.ends = &end, d.steps.ends_count = 1;
        CHECK(decoding_is_plain(t, &d, 0) == decided, "an end token ends a text");
        // Nothing is wanted: nothing changes.
        prepare(&d, 0, 0);
        for (int k = 0; k < 32; k++) d.h[k] = 5;
        CHECK(decoding_is_plain(t, &d, 0) == 0 && d.h[0] == 5 && d.h[31] == 5, "nothing was wanted");
    }
}

static offramp_part *sketch_part(int64_t V, int64_t candidates, offramp_weight *reduce,
                                 offramp_weight *expand) {
    offramp_part *part = new_part("sketch");
    *reduce = weight_of(OFFRAMP_FLOAT32, 0, 8, 32, 0), *expand = weight_of(OFFRAMP_FLOAT32, 0, V, 8, 0);
    give(part, "reduce", reduce), give(part, "expand", expand),
        give_number(part, "candidates", (double)candidates);
    return part;
}

// Drafts ------------------------------------------------------------------------------------------

// A drafter whose exit reads out the state after `after` blocks, a little changed by `noise`.
typedef struct {
    int64_t after, tail, middle, alike;
    float noise;
    const int64_t *table;  // a text whose tokens a table of n-grams expects, or NULL
    int shortlist;
} DrafterShape;

static uint32_t key_of(const int64_t *ids, int64_t n) {
    uint32_t key = (uint32_t)n;
    for (int64_t i = 0; i < n; i++) key = (key ^ (uint32_t)ids[i]) * 0x9E3779B1u, key ^= key >> 15;
    return key ? key : 1;
}

static void give_table(offramp_part *part, const int64_t *text, int64_t count) {
    enum { SLOTS = 256 };
    uint32_t *keys = memory(SLOTS * 4), *values = memory(SLOTS * 4);
    for (int64_t i = 2; i < count; i++) {
        const uint32_t key = key_of(text + i - 2, 2);
        int64_t slot = key % SLOTS;
        while (keys[slot] && keys[slot] != key) slot = (slot + 1) % SLOTS;
        keys[slot] = key, values[slot] = (uint32_t)text[i] << 8 | 240;
    }
    WORKS(offramp_part_array(part, "keys", OFFRAMP_UINT32, keys, SLOTS, &said));
    WORKS(offramp_part_array(part, "values", OFFRAMP_UINT32, values, SLOTS, &said));
    give_number(part, "shortest", 2), give_number(part, "longest", 3);
}

static offramp_part *drafter_part(const Tiny *t, DrafterShape s) {
    enum { W = 32 };
    const int64_t K = s.middle ? 96 : 64, V = t->shape.vocabulary, n = s.shortlist ? V / 2 : V;
    offramp_part *part = new_part("drafter");
    float *in = randoms((32 + 2 * W) * K, -s.noise, s.noise), *costs = zeros(DRAFTS + 1);
    int64_t *tokens = memory(n * 8);
    for (int k = 0; k < 32; k++) in[k * K + k] += 1;
    for (int i = 0; i <= DRAFTS; i++) costs[i] = 0.01f * i;
    for (int64_t i = 0; i < n; i++) tokens[i] = i;
    offramp_weight head = t->head;
    head.rows = n;
    const offramp_weight maps = {OFFRAMP_FLOAT32, 0, 32 + 2 * W, K, in, NULL, NULL};
    const offramp_weight down = {OFFRAMP_FLOAT32, 0, 32, W, randoms(32 * W, -s.noise, s.noise), NULL, NULL};
    give(part, "in", &maps), give(part, "down", &down), give(part, "head", &head);
    float *ones = randoms(32, 1, 1);
    give_floats(part, "mean", zeros(32), 32), give_floats(part, "spread", ones, 32),
        give_floats(part, "costs", costs, DRAFTS + 1);
    if (s.tail) give_floats(part, "scale", randoms(32, 0, 0.01f), 32);
    if (s.shortlist) WORKS(offramp_part_array(part, "tokens", OFFRAMP_INT64, tokens, n, &said));
    if (s.table) give_table(part, s.table, KNOWN + MOST);
    give_number(part, "after", s.after), give_number(part, "tail", s.tail),
        give_number(part, "middle", s.middle);
    give_number(part, "most", DRAFTS), give_number(part, "alike", s.alike);
    give_number(part, "asking", 0.001), give_number(part, "floor", 0);
    WORKS(offramp_model_fits(t->model, part, &said));
    return part;
}

// Tokens are those of decoding without a drafter. Returns how many drafts stood.
static int64_t drafts_change_nothing(const Tiny *t, DrafterShape s, offramp_part *sketch, double penalty) {
    int64_t stood = 0;
    offramp_part *drafter = drafter_part(t, s);
    for (int threads = 1; threads <= 3; threads++) {
        Decoding d;
        const int64_t enough = MOST - 6 * (threads - 1);
        WORKS(offramp_model_threads(t->model, threads, &said));
        prepare(&d, enough, enough + 6 > MOST ? MOST : enough + 6);
        d.steps.drafter = drafter, d.steps.sketch = sketch, d.steps.penalty = penalty;
        decoding_is_plain(t, &d, s.middle);
        for (int64_t p = 0, n = 0; p < d.steps.passes_count; n += d.passes[p++].stood + 1) {
            stood += d.passes[p].stood;
            CHECK(isnan(d.confidences[n + d.passes[p].stood]), "full depth's own token has a confidence");
        }
    }
    offramp_part_free(drafter);
    return stood;
}

static void drafted_decoding(const Tiny *t) {
    const int64_t N = t->count, V = t->shape.vocabulary;
    Decoding d;
    prepare(&d, MOST, MOST);
    decoding_is_plain(t, &d, 0);
    offramp_weight reduce, expand;
    offramp_part *sketch = sketch_part(V, V / 2, &reduce, &expand);
    // The state at the top gives the very tokens; noise spoils some.
    CHECK(drafts_change_nothing(t, (DrafterShape){.after = N}, NULL, 1) > 20,
          "no draft of a perfect exit stood");
    CHECK(drafts_change_nothing(t, (DrafterShape){.after = N, .noise = 0.05f}, NULL, 1) > 0,
          "no draft stood");
    drafts_change_nothing(t, (DrafterShape){.after = N, .noise = 0.2f, .shortlist = 1}, sketch, 1.2);
    drafts_change_nothing(t, (DrafterShape){.after = N - 1, .noise = 0.02f, .middle = N - 1}, sketch, 1);
    drafts_change_nothing(t, (DrafterShape){.after = 1, .middle = N - 1, .alike = 2}, NULL, 1.1);
    drafts_change_nothing(t, (DrafterShape){.after = 0, .noise = 0.1f, .alike = 1}, NULL, 1);
    // Copies of the text itself, and a table that knows it.
    drafts_change_nothing(t, (DrafterShape){.after = 1, .alike = 1}, NULL, 1);
    CHECK(drafts_change_nothing(t, (DrafterShape){.after = 1, .table = d.ids}, NULL, 1) > 0,
          "a table that knows the text is no use");
    if (t->layers[N - 1].attends)
        drafts_change_nothing(t, (DrafterShape){.after = 1, .tail = 1, .noise = 0.3f}, NULL, 1);
    offramp_part_free(sketch);
}

// A sketch whose sampled estimates mislead it: the candidates of each row are counted anew, in each round.
static void sketches_and_drafts_agree(void) {
    const int64_t V = 600;
    const Tiny t = model_of("m", V, OFFRAMP_FLOAT32);
    offramp_weight reduce, expand;
    offramp_part *sketch = sketch_part(V, 12, &reduce, &expand);
    for (int64_t v = 0; v < V; v += 16)
        for (int k = 0; k < 8; k++) ((float *)expand.values)[v * 8 + k] *= 100;
    drafts_change_nothing(&t, (DrafterShape){.after = 1, .noise = 0.2f}, sketch, 1);
    drafts_change_nothing(&t, (DrafterShape){.after = 1, .noise = 0.02f}, sketch, 1);
    offramp_part_free(sketch);
    offramp_model_free(t.model);
}

// Gates -------------------------------------------------------------------------------------------

static void gated_decoding(const Tiny *t) {
    offramp_part *part = new_part("gate");
    const offramp_weight in = weight_of(OFFRAMP_FLOAT32, 0, 1, 32, 0);
    give(part, "in", &in), give_floats(part, "mean", zeros(32), 32),
        give_floats(part, "spread", randoms(32, 1, 1), 32);
    give_number(part, "bias", 0);
    const offramp_part *parts[] = {part, part};
    const int64_t after[] = {1, t->count - 1};
    float seen[64], logits[2 * MOST], thresholds[] = {INFINITY, INFINITY}, largest = -INFINITY;
    const offramp_gates gates = {2, parts, after, thresholds, seen, logits};
    Decoding d;
    prepare(&d, 20, 20);
    d.steps.gates = &gates;
    CHECK(decoding_is_plain(t, &d, 0) == 20 && d.steps.run == 0, "a threshold of inf stopped a token");
    int64_t at = 0;
    for (int64_t n = 0; n < 20; n++)
        if (logits[2 * n + 1] > largest) largest = logits[2 * n + 1], at = n;
    // The token whose logit is largest is stopped, and those before it are not.
    thresholds[1] = nextafterf(largest, -INFINITY);
    for (int threads = 1; threads <= 3; threads++)
        for (int always = 0; always < 2; always++) {
            WORKS(offramp_model_threads(t->model, threads, &said));
            if (always) thresholds[0] = -INFINITY;
            const int64_t run = always ? 1 : t->count - 1, decided = always ? 0 : at;
            int64_t ids[KNOWN + MOST];
            float h[32], deep[64];
            offramp_session *session = prompted(t, 0, deep), *other = prompted(t, 0, deep);
            memcpy(ids, d.ids, sizeof ids);
            Decoding stopped;
            prepare(&stopped, 20, 20);
            stopped.steps.gates = &gates;
            WORKS(offramp_decode(t->model, session, &stopped.steps, &said));
            CHECK(stopped.steps.decided == decided && stopped.steps.run == run,
                  "%d tokens, %d blocks of the last, and not %d, %d", (int)stopped.steps.decided,
                  (int)stopped.steps.run, (int)decided, (int)run);
            CHECK(!memcmp(ids, stopped.ids, (KNOWN + decided) * 8), "tokens before the one that stopped");
            for (int64_t i = 0; i < t->count; i++)
                CHECK(offramp_session_length(session, i) == KNOWN - 1 + decided + (i < run),
                      "the length of block %d", (int)i);
            stopped.steps.enough = decided;
            plainly(t, other, &stopped, ids, h);
            embed(t, ids[KNOWN - 1 + decided], h);
            WORKS(offramp_run(t->model, 0, run, &(offramp_rows){other, KNOWN - 1 + decided, 1}, 1, h, NULL,
                              NULL, &said));
            CHECK(same(h, stopped.h, 32) && all_the_same(t, session, other),
                  "the state of the token that stopped");
            offramp_session_free(session), offramp_session_free(other);
            thresholds[0] = INFINITY;
        }
    offramp_part_free(part);
}

// Logits that are not finite give the id -1, and end the text.
static void nan_ends_a_text(void) {
    Tiny t = model_of("am", 50, OFFRAMP_FLOAT32);
    Decoding d;
    float deep[64];
    offramp_session *session = prompted(&t, 0, deep);
    t.norm[4] = NAN;
    prepare(&d, 9, 9);
    WORKS(offramp_decode(t.model, session, &d.steps, &said));
    CHECK(d.steps.decided == 1 && d.ids[KNOWN] == -1, "a NaN gave the token %d", (int)d.ids[KNOWN]);
    offramp_session_free(session);
    offramp_model_free(t.model);
}

// Refused decodings change nothing.
static void refusals(void) {
    const Tiny t = model_of("bm", 50, OFFRAMP_FLOAT32), stranger = model_of("m", 50, OFFRAMP_FLOAT32);
    offramp_part *drafter = drafter_part(&t, (DrafterShape){.after = 1}), *gate = new_part("gate");
    const offramp_gates none = {0},
                        wrong = {1, (const offramp_part *[]){gate}, (int64_t[]){1}, (float[]){0}, NULL, NULL};
    float deep[64];
    offramp_session *session = prompted(&t, 0, deep), *before = prompted(&t, 0, deep),
                    *apart = prompted(&t, 0, deep);
    Decoding d;
#define TRY(change)                                                                         \
    do {                                                                                    \
        prepare(&d, 5, 9);                                                                  \
        change;                                                                             \
        REFUSED(offramp_decode(t.model, session, &d.steps, &said));                         \
        CHECK(all_the_same(&t, session, before), "a refused decoding changed the session"); \
    } while (0)
    TRY(d.steps.known = 0);
    TRY(d.steps.known = -1);
    TRY(d.steps.enough = 10);
    TRY(d.steps.enough = -1);
    TRY(d.steps.most = (int64_t)1 << 40);
    TRY(d.steps.most = INT64_MAX);
    TRY(d.ids[2] = 50);
    TRY(d.ids[KNOWN - 1] = -1);
    TRY(d.steps.penalty = 0);
    TRY(d.steps.penalty = NAN);
    TRY(d.steps.sketch = drafter);
    TRY(d.steps.drafter = gate);
    TRY((d.steps.drafter = drafter, d.steps.deep = NULL));
    TRY((d.steps.drafter = drafter, d.steps.gates = &none));
    TRY(d.steps.gates = &wrong);
    TRY(d.steps.most = MOST + 2);  // beyond the rotary pairs
    REFUSED(offramp_decode(stranger.model, session, &d.steps, &said));
    WORKS(offramp_session_watch(session, 0, 2, &said));
    TRY((void)0);
    offramp_session_settle(session);
    float h[32] = {0};
    WORKS(offramp_run(t.model, 1, 2, &(offramp_rows){apart, KNOWN - 1, 1}, 1, h, NULL, NULL, &said));
    prepare(&d, 5, 9);
    REFUSED(offramp_decode(t.model, apart, &d.steps, &said));
    prepare(&d, 5, 9);
    WORKS(offramp_decode(t.model, session, &d.steps, &said));
    offramp_session_free(session), offramp_session_free(before), offramp_session_free(apart);
    offramp_part_free(drafter), offramp_part_free(gate);
    offramp_model_free(t.model), offramp_model_free(stranger.model);
}

int main(void) {
    static const char *const blocks[] = {"aa", "bb", "mm", "anm", "nma"};
    for (int i = 0; i < 5; i++) {
        const int64_t V = i == 3 ? 1500 : 50;
        const Tiny t = model_of(blocks[i], V, i < 4 ? i : OFFRAMP_FLOAT32);
        offramp_weight reduce, expand;
        offramp_part *sketch = sketch_part(V, 9, &reduce, &expand);
        plain_decoding(&t, sketch);
        drafted_decoding(&t);
        gated_decoding(&t);
        offramp_part_free(sketch);
        offramp_model_free(t.model);
    }
    const Tiny bare = model_of("", 50, OFFRAMP_FLOAT32);  // without blocks
    Decoding d;
    prepare(&d, 5, 5);
    offramp_session *session = session_of(&bare, OFFRAMP_FLOAT32);
    WORKS(offramp_decode(bare.model, session, &d.steps, &said));
    CHECK(d.steps.decided == 5, "a model without blocks");
    offramp_session_free(session);
    offramp_model_free(bare.model);
    sketches_and_drafts_agree();
    nan_ends_a_text();
    refusals();
    return 0;
}
