// Rules of plans: made by a test, or at random.

#pragma once
#include "models.h"

enum { D = 32, ROOM = 256, EXITS = 3, MOST_PARTS = 12 };  // ROOM: ids of a text, and positions

static const offramp_sampling GREEDY = {.top_p = 1, .penalty = 1};

// Rules, and what they point to. They stay where they are.
typedef struct {
    offramp_rules rules;
    offramp_exit exits[EXITS];
    offramp_block_costs costs[MOST_LAYERS];
    const int64_t *tokens;  // of the short list
    int64_t listed;
    int recurrent[EXITS], keys;  // whether a gate is a Mamba gate; whether there are second keys
    offramp_part *parts[MOST_PARTS];
    int parts_count;
} Rules;

static inline offramp_part *part_of_rules(Rules *r, const char *kind) {
    CHECK(r->parts_count < MOST_PARTS, "too many parts");
    return r->parts[r->parts_count++] = new_part(kind);
}
static inline void free_parts(const Rules *r) {
    for (int i = 0; i < r->parts_count; i++) offramp_part_free(r->parts[i]);
}

static inline void begin_rules(Rules *r, int64_t blocks) {
    memset(r, 0, sizeof *r);
    r->rules = (offramp_rules){.exits = r->exits,
                               .costs = r->costs,
                               .key = OFFRAMP_MAX_PROB,
                               .pending = 4,
                               .head_flops = 7001,
                               .exit_head_flops = 503};
    for (int64_t i = 0; i < blocks; i++)
        r->costs[i] = (offramp_block_costs){1000 + 10 * i, 3 + i, 101 + i, 51 + i};
    for (int i = 0; i <= OFFRAMP_MOST_DRAFTS; i++) r->rules.row_costs[i] = 0.01 * i;
}

static inline offramp_plan *plan_of(const Tiny *t, const Rules *r) {
    offramp_plan *plan = offramp_plan_new(t->model, &r->rules, &said);
    MADE(plan);
    return plan;
}

// A read-out that reads so many deep states; without an adapter if `noise` is 0.
static inline offramp_part *readout_part(Rules *r, int64_t reads, float noise) {
    enum { W = 32 };
    offramp_part *part = part_of_rules(r, "readout");
    if (noise == 0) return part;
    const offramp_weight in = weight_of(OFFRAMP_FLOAT32, 0, D + 2 * W, (1 + reads) * D, 0),
                         down = weight_of(OFFRAMP_FLOAT32, 0, D, W, 0);
    give(part, "in", &in), give(part, "down", &down), give_number(part, "gated", 1);
    give_floats(part, "mean", randoms(D, -0.1f, 0.1f), D),
        give_floats(part, "spread", randoms(D, 0.5f, 2), D);
    give_floats(part, "scale", randoms(D, -noise, noise), D);
    return part;
}

enum { LINEAR, FFN, RECURRENT, GATES };  // kinds of gates

static inline offramp_part *gate_part(Rules *r, int kind) {
    enum { WIDTH = 16, INNER = 16, STATES = 8, CHANNELS = INNER + 2 * STATES };
    offramp_part *part = part_of_rules(r, kind == RECURRENT ? "mamba_gate" : "gate");
    give_floats(part, "mean", randoms(D, -0.1f, 0.1f), D),
        give_floats(part, "spread", randoms(D, 0.5f, 2), D);
    give_number(part, "bias", 0);
    const int64_t rows = kind == LINEAR ? 1 : kind == FFN ? 2 * WIDTH : INNER + CHANNELS + 2;
    const offramp_weight in = weight_of(OFFRAMP_FLOAT32, 0, rows, kind == RECURRENT ? WIDTH : D, 0);
    give(part, "in", &in);
    if (kind == FFN) give_floats(part, "out", randoms(WIDTH, -1, 1), WIDTH);
    if (kind != RECURRENT) return part;
    const offramp_weight down = weight_of(OFFRAMP_FLOAT32, 0, WIDTH, D, 0),
                         out = weight_of(OFFRAMP_FLOAT32, 0, 1, INNER, 0);
    give(part, "down", &down), give(part, "out", &out);
    give_floats(part, "direct", randoms(D, -0.1f, 0.1f), D);
    give_floats(part, "gated_norm", randoms(INNER, 0.5f, 1.5f), INNER);
    give_floats(part, "conv", randoms(4 * CHANNELS, -0.7f, 0.7f), 4 * CHANNELS);
    give_floats(part, "dt_bias", randoms(2, -3, 1), 2), give_floats(part, "decay", randoms(2, -2, -0.1f), 2);
    give_floats(part, "skip", randoms(2, -1, 1), 2);
    give_number(part, "heads", 2), give_number(part, "states", STATES), give_number(part, "gated_eps", EPS);
    return part;
}

static inline offramp_part *sketch_part(Rules *r, int64_t V, int64_t candidates) {
    offramp_part *part = part_of_rules(r, "sketch");
    const offramp_weight reduce = weight_of(OFFRAMP_FLOAT32, 0, 8, D, 0),
                         expand = weight_of(OFFRAMP_FLOAT32, 0, V, 8, 0);
    give(part, "reduce", &reduce), give(part, "expand", &expand), give_number(part, "candidates", candidates);
    return part;
}

// A short list of every `step`-th token. The head is in float32.
static inline offramp_part *shortlist_part(Rules *r, const Tiny *t, int64_t step) {
    offramp_part *part = part_of_rules(r, "shortlist");
    const int64_t n = (t->shape.vocabulary + step - 1) / step;
    int64_t *tokens = memory(n * 8);
    float *rows = zeros(n * D);
    for (int64_t i = 0; i < n; i++) {
        tokens[i] = i * step;
        memcpy(rows + i * D, (const float *)t->head.values + i * step * D, D * 4);
    }
    const offramp_weight head = {.type = OFFRAMP_FLOAT32, .rows = n, .columns = D, .values = rows};
    give(part, "head", &head);
    WORKS(offramp_part_array(part, "tokens", OFFRAMP_INT64, tokens, n, &said));
    r->tokens = tokens, r->listed = n;
    return part;
}

// A table of n-grams by which each token of a text follows the two before it, but for every `wrong`-th one.
static inline offramp_part *guesses_part(Rules *r, const int64_t *text, int64_t count, int64_t wrong) {
    enum { SLOTS = 256 };
    offramp_part *part = part_of_rules(r, "guesses");
    uint32_t *keys = memory(SLOTS * 4), *values = memory(SLOTS * 4);
    for (int64_t i = 2; i < count; i++) {
        uint32_t key = 2;
        for (int64_t n = i - 2; n < i; n++) key = (key ^ (uint32_t)text[n]) * 0x9E3779B1u, key ^= key >> 15;
        int64_t slot = key % SLOTS;
        while (keys[slot] && keys[slot] != key) slot = (slot + 1) % SLOTS;
        keys[slot] = key, values[slot] = (uint32_t)(i % wrong ? text[i] : !text[i]) << 8 | 240;
    }
    WORKS(offramp_part_array(part, "keys", OFFRAMP_UINT32, keys, SLOTS, &said));
    WORKS(offramp_part_array(part, "values", OFFRAMP_UINT32, values, SLOTS, &said));
    give_number(part, "shortest", 2), give_number(part, "longest", 3);
    return part;
}

// At random ---------------------------------------------------------------------------------------

static inline Tiny random_model(const char *blocks, int positions) {
    Shape shape = SMALL;
    shape.blocks = blocks, shape.window = below(2) ? 0 : 6, shape.bias = below(2);
    shape.type = below(3) ? OFFRAMP_FLOAT32 : (int)below(6), shape.fine = below(2);
    shape.positions = positions ? ROOM : 0, shape.peculiar = below(2);
    return tiny(shape);
}

static inline void random_ids(int64_t *ids, int64_t count, int64_t V) {
    for (int64_t i = 0; i < count; i++) ids[i] = below(V);
}

static inline double one_of(const double *values) { return values[below(3)]; }

// Exits at random blocks. Few thresholds are such that all tokens leave, or none does.
static inline void random_exits(const Tiny *t, Rules *r, int tails) {
    static const double gates[] = {0, 0.45, 0.55},
                        measures[][3] = {{0, 0.1, 0.15}, {0, 0.02, 0.05}, {0, 0.1, 0.15}};
    offramp_rules *rules = &r->rules;
    const int64_t N = t->count;
    const int gated = rules->confidence == OFFRAMP_GATE;
    const int verifies = rules->fill == OFFRAMP_VERIFY;
    int64_t after = below(N) + verifies;
    for (; rules->count < EXITS && after < N + verifies; after += 1 + below(2)) {
        offramp_exit *at = r->exits + rules->count;
        const int kind = (int)below(GATES);
        *at = (offramp_exit){.after = after,
                             .tail = tails && below(2) ? below(N - after + 1) : 0,
                             .perhaps = 1,
                             .key = 1,
                             .asking = 0.01,
                             .gate_flops = 13 + rules->count,
                             .readout_flops = 29 + rules->count};
        at->threshold = one_of(gated ? gates : measures[rules->confidence - 1]);
        if (gated && below(2)) at->perhaps = 0.4, at->key = one_of(measures[rules->key - 1]), r->keys = 1;
        if (gated) at->gate = gate_part(r, kind), r->recurrent[rules->count] = kind == RECURRENT;
        rules->count++;
    }
    const int64_t last = r->exits[rules->count - 1].after;
    rules->middle = below(2) ? last + below(N - last + 1) : 0;
    for (int64_t e = 0; e < rules->count; e++)
        r->exits[e].readout = readout_part(r, below(rules->middle ? 3 : 2), below(3) ? 0.3f : 0);
}

static inline void random_rules(const Tiny *t, Rules *r, offramp_fill fill, int tails) {
    begin_rules(r, t->count);
    offramp_rules *rules = &r->rules;
    rules->fill = fill, rules->confidence = below(2) ? OFFRAMP_GATE : 1 + (offramp_confidence)below(3);
    rules->key = 1 + (offramp_confidence)below(3), rules->pending = 1 + below(5);
    rules->decay = below(3) ? 0 : 3;
    random_exits(t, r, tails);
    if (below(3) == 0) rules->sketch = sketch_part(r, t->shape.vocabulary, 8);
    const int64_t head = below(3);
    if (head == 1) rules->exit_sketch = sketch_part(r, t->shape.vocabulary, 8);
    if (head == 2 && t->shape.type == OFFRAMP_FLOAT32) rules->shortlist = shortlist_part(r, t, 3);
}
