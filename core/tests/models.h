// Tiny random models for the tests, made through offramp.h.

#pragma once
#include "check.h"

// A letter for each block: 'a' attention and an MLP, 'b' attention alone, 'm' Mamba-2, 'n' Mamba-2 and an
// MLP, 'p' Mamba, 'q' a convolution, 's' attention and Mamba-2 side by side, and an MLP.
typedef struct {
    const char *blocks;
    int type, fine, bias, norm_after, peculiar;  // peculiar: with what few families have
    int norms;                                   // of queries and keys: 0 none, 1 over each head, 2 over all
    int64_t hidden, vocabulary, width;           // D, V, W
    int64_t queries, heads, dim, window, positions;  // of attention; positions: 0 for none
    int64_t mixers, groups, inner, states, taps;     // of Mamba-2: heads, their groups, dims of a head, ...
} Shape;

static const Shape SMALL = {.hidden = 32,
                            .vocabulary = 50,
                            .width = 64,
                            .queries = 4,
                            .heads = 2,
                            .dim = 8,
                            .mixers = 4,
                            .groups = 2,
                            .inner = 8,
                            .states = 16,
                            .taps = 4};

// Blocks of the models that random rules are tried on.
enum { MODELS = 8 };
static const char *const BLOCKS[MODELS] = {"aa", "mmm", "anm", "nmba", "bmab", "mnab", "sap", "qsp"};

// One block's numbers.
typedef struct {
    int attends, mixes, has_mlp;  // mixes: the letter of the mixer, or 0
    offramp_weight qkv, o, in, out, low, steps, gate_up, down;
    float *norm, *q_norm, *k_norm, *gated_norm, *conv, *conv_bias, *dt_bias, *decay, *skip, *mlp_norm;
} Layer;

enum { MOST_LAYERS = 8 };
static const double EPS = 1e-5, DT_LOW = 0.01, DT_HIGH = 0.9;

typedef struct {
    Shape shape;
    int64_t count;
    Layer layers[MOST_LAYERS];
    offramp_weight head;
    float *norm, *embedding, *rotary;
    offramp_model *model;
} Tiny;

static inline offramp_part *new_part(const char *kind) {
    offramp_part *part = offramp_part_new(kind, &said);
    CHECK(part, "%s", said.message);
    return part;
}
static inline void give(offramp_part *part, const char *name, const offramp_weight *weight) {
    WORKS(offramp_part_weight(part, name, weight, &said));
}
static inline void give_floats(offramp_part *part, const char *name, const float *values, int64_t count) {
    if (values) WORKS(offramp_part_array(part, name, OFFRAMP_FLOAT32, values, count, &said));
}
static inline void give_number(offramp_part *part, const char *name, double value) {
    WORKS(offramp_part_number(part, name, value, &said));
}

static inline offramp_part *attention_part(const Shape *s, Layer *l) {
    offramp_part *part = new_part("attention");
    const int64_t P = s->dim, Q = s->queries, H = s->heads, of_norm = s->norms == 1;
    l->qkv = weight_of(s->type, s->fine, (Q + 2 * H) * P, s->hidden, s->bias);
    l->o = weight_of(s->type, s->fine, s->hidden, Q * P, 0);
    l->norm = randoms(s->hidden, 0.5f, 1.5f);
    if (s->norms)
        l->q_norm = randoms(of_norm ? P : Q * P, 0.5f, 1.5f),
        l->k_norm = randoms(of_norm ? P : H * P, 0.5f, 1.5f);
    give(part, "qkv", &l->qkv), give(part, "o", &l->o);
    give_floats(part, s->norm_after ? "norm_after" : "norm", l->norm, s->hidden);
    give_floats(part, "q_norm", l->q_norm, of_norm ? P : Q * P),
        give_floats(part, "k_norm", l->k_norm, of_norm ? P : H * P);
    give_number(part, "heads", H), give_number(part, "dim", P), give_number(part, "factor", 1);
    give_number(part, "window", s->window), give_number(part, "rotary", s->positions > 0);
    give_number(part, "norm_heads", of_norm);
    give_number(part, "eps", EPS), give_number(part, "head_eps", EPS),
        give_number(part, "scale", 1.5 / sqrt(P));
    return part;
}

static inline int64_t inner_of(const Shape *s) { return s->mixers * s->inner; }
// The channels of a mixer's convolution, and the floats of its window and state.
static inline int64_t channels_of(const Shape *s, int mixes) {
    return inner_of(s) + (mixes == 'm' ? 2 * s->groups * s->states : 0);
}
static inline int64_t window_of(const Shape *s, int mixes) { return (s->taps - 1) * channels_of(s, mixes); }
static inline int64_t state_of(const Shape *s, int mixes) {
    return mixes == 'q' ? 0 : inner_of(s) * s->states;
}

// A Mamba mixer, with norms inside if there are some of queries and keys; or a convolution.
static inline offramp_part *other_mixer_part(const Shape *s, Layer *l, int mixes) {
    offramp_part *part = new_part(mixes == 'p' ? "mamba" : "convolution");
    // A rank above all other sizes has room for its rows, too.
    const int wide = s->type == OFFRAMP_INT8;
    const int64_t E = inner_of(s), N = s->states, L = wide ? 640 : 6;
    l->in = weight_of(s->type, s->fine, (mixes == 'p' ? 2 : 3) * E, s->hidden, s->bias);
    l->out = weight_of(s->type, s->fine, s->hidden, E, 0);
    l->norm = randoms(s->hidden, 0.5f, 1.5f), l->conv = randoms(s->taps * E, -0.7f, 0.7f);
    l->conv_bias = s->bias ? randoms(E, -0.5f, 0.5f) : NULL;
    give(part, "in", &l->in), give(part, "out", &l->out), give_number(part, "eps", EPS);
    give_floats(part, "norm", l->norm, s->hidden), give_floats(part, "conv", l->conv, s->taps * E);
    give_floats(part, "conv_bias", l->conv_bias, E);
    if (mixes == 'q') return part;
    l->low = weight_of(s->type, s->fine, L + 2 * N, E, 0),
    l->steps = weight_of(wide ? s->type : OFFRAMP_FLOAT32, s->fine, E, L, 1);
    l->decay = randoms(E * N, -2, -0.1f), l->skip = randoms(E, -1, 1);
    give(part, "low", &l->low), give(part, "steps", &l->steps), give_number(part, "states", N);
    give_floats(part, "decay", l->decay, E * N), give_floats(part, "skip", l->skip, E);
    if (!s->norms) return part;
    give_floats(part, "dt_norm", randoms(L, 0.5f, 1.5f), L),
        give_floats(part, "b_norm", randoms(N, 0.5f, 1.5f), N);
    give_floats(part, "c_norm", randoms(N, 0.5f, 1.5f), N), give_number(part, "inner_eps", EPS);
    return part;
}

static inline offramp_part *mixer_part(const Shape *s, Layer *l) {
    offramp_part *part = new_part("mamba2");
    const int64_t H = s->mixers, E = H * s->inner, C = E + 2 * s->groups * s->states;
    l->in = weight_of(s->type, s->fine, E + C + H, s->hidden, s->bias);
    l->out = weight_of(s->type, s->fine, s->hidden, E, 0);
    l->norm = randoms(s->hidden, 0.5f, 1.5f), l->gated_norm = randoms(E, 0.5f, 1.5f);
    l->conv = randoms(s->taps * C, -0.7f, 0.7f), l->conv_bias = s->bias ? randoms(C, -0.5f, 0.5f) : NULL;
    l->dt_bias = randoms(H, -2, 1), l->decay = randoms(H, -2, -0.1f), l->skip = randoms(H, -1, 1);
    give(part, "in", &l->in), give(part, "out", &l->out);
    give_floats(part, "norm", l->norm, s->hidden), give_floats(part, "gated_norm", l->gated_norm, E);
    give_floats(part, "conv", l->conv, s->taps * C), give_floats(part, "conv_bias", l->conv_bias, C);
    give_floats(part, "dt_bias", l->dt_bias, H), give_floats(part, "decay", l->decay, H),
        give_floats(part, "skip", l->skip, H);
    give_number(part, "heads", H), give_number(part, "groups", s->groups),
        give_number(part, "states", s->states);
    give_number(part, "eps", EPS), give_number(part, "gated_eps", EPS);
    give_number(part, "dt_low", DT_LOW), give_number(part, "dt_high", DT_HIGH);
    return part;
}

static inline offramp_part *mlp_part(const Shape *s, Layer *l) {
    offramp_part *part = new_part("mlp");
    l->gate_up = weight_of(s->type, s->fine, 2 * s->width, s->hidden, s->bias);
    l->down = weight_of(s->type, s->fine, s->hidden, s->width, s->bias);
    l->mlp_norm = randoms(s->hidden, 0.5f, 1.5f);
    give(part, "gate_up", &l->gate_up), give(part, "down", &l->down);
    give_floats(part, s->norm_after ? "norm_after" : "norm", l->mlp_norm, s->hidden);
    give_number(part, "eps", EPS), give_number(part, "activation", OFFRAMP_SILU);
    return part;
}

static inline offramp_part *ends_part(const Shape *s, Tiny *t) {
    offramp_part *part = new_part("ends");
    t->head = weight_of(s->type, s->fine, s->vocabulary, s->hidden, 0);
    t->norm = randoms(s->hidden, 0.5f, 1.5f), t->embedding = randoms(s->vocabulary * s->hidden, -1, 1);
    give(part, "head", &t->head);
    give_floats(part, "norm", t->norm, s->hidden);
    const offramp_weight embedding = {
        .type = OFFRAMP_FLOAT32, .rows = s->vocabulary, .columns = s->hidden, .values = t->embedding};
    give(part, "embedding", &embedding);
    give_number(part, "eps", EPS);
    return part;
}

// Gives a model a rotary table. Returns the pairs of the first positions: dims 2 i and 2 i + 1 turn together.
static inline float *give_rotary(offramp_model *model, int64_t table, int64_t positions, int64_t dim,
                                 double base) {
    float *pairs = zeros(positions * dim), *frequencies = zeros(dim / 2);
    for (int64_t i = 0; i < dim / 2; i++) frequencies[i] = (float)pow(base, -2.0 * i / dim);
    for (int64_t t = 0; t < positions; t++)
        for (int64_t i = 0; i < dim / 2; i++) {
            const double angle = (float)t * frequencies[i];
            pairs[t * dim + 2 * i] = (float)cos(angle), pairs[t * dim + 2 * i + 1] = (float)sin(angle);
        }
    WORKS(offramp_model_rotary(model, table, frequencies, dim / 2, 1, &said));
    return pairs;
}

static inline offramp_model *model_made_of(offramp_part *ends, offramp_part *const *attentions,
                                           offramp_part *const *mixers, offramp_part *const *mlps,
                                           int64_t count) {
    return offramp_model_new(ends, (const offramp_part *const *)attentions,
                             (const offramp_part *const *)mixers, (const offramp_part *const *)mlps, count,
                             &said);
}

// What few families have: a norm after a part too, factors, caps, other activations, two rotary tables.
static const float EMBEDDING_SCALE = 1.3f;

static inline void peculiar_ends(offramp_part *part) {
    give_number(part, "scale", EMBEDDING_SCALE), give_number(part, "logit_scale", 0.8),
        give_number(part, "cap", 4);
}
static inline void peculiar_part(offramp_part *part, const Shape *s, int64_t results) {
    give_floats(part, "norm_after", randoms(s->hidden, 0.5f, 1.5f), s->hidden);
    give_floats(part, "factors", randoms(results, 0.5f, 1.5f), results);
    give_number(part, "factor", 0.7);
}
static inline void peculiar_block(const Shape *s, const Layer *l, int64_t block, offramp_part *attention,
                                  offramp_part *mixer, offramp_part *mlp) {
    static const offramp_activation activations[] = {OFFRAMP_GELU, OFFRAMP_SQUARED_RELU, OFFRAMP_SILU};
    if (attention) {
        peculiar_part(attention, s, l->qkv.rows), give_number(attention, "cap", 2);
        if (s->positions) give_number(attention, "rotary", (double)(1 + block % 2));
    }
    if (mixer) peculiar_part(mixer, s, l->in.rows);
    if (l->mixes == 'm') give_number(mixer, "gate_last", 1);
    if (mlp) peculiar_part(mlp, s, l->gate_up.rows), give_number(mlp, "activation", activations[block % 3]);
}

static inline void embed_by_hand(const Tiny *t, int64_t id, float *h) {
    const int64_t hidden = t->shape.hidden;
    for (int64_t i = 0; i < hidden; i++)
        h[i] = t->embedding[id * hidden + i] * (t->shape.peculiar ? EMBEDDING_SCALE : 1);
}

static inline Tiny tiny(Shape shape) {
    Tiny t = {.shape = shape, .count = (int64_t)strlen(shape.blocks)};
    offramp_part *attentions[MOST_LAYERS] = {NULL}, *mixers[MOST_LAYERS] = {NULL},
                 *mlps[MOST_LAYERS] = {NULL};
    offramp_part *ends = ends_part(&shape, &t);
    for (int64_t i = 0; i < t.count; i++) {
        Layer *l = t.layers + i;
        const int letter = shape.blocks[i];
        l->attends = letter < 'm' || letter == 's',
        l->has_mlp = letter == 'a' || letter == 'n' || letter == 's';
        l->mixes = letter < 'm' ? 0 : letter == 'p' || letter == 'q' ? letter : 'm';
        if (l->attends) attentions[i] = attention_part(&shape, l);
        if (l->mixes)
            mixers[i] = l->mixes == 'm' ? mixer_part(&shape, l) : other_mixer_part(&shape, l, letter);
        if (l->has_mlp) mlps[i] = mlp_part(&shape, l);
        if (shape.peculiar) peculiar_block(&shape, l, i, attentions[i], mixers[i], mlps[i]);
    }
    if (shape.peculiar) peculiar_ends(ends);
    t.model = model_made_of(ends, attentions, mixers, mlps, t.count);
    CHECK(t.model, "%s", said.message);
    for (int64_t i = 0; i < t.count; i++)
        offramp_part_free(attentions[i]), offramp_part_free(mixers[i]), offramp_part_free(mlps[i]);
    offramp_part_free(ends);
    if (shape.positions && strpbrk(shape.blocks, "abs")) {
        if (shape.peculiar) give_rotary(t.model, 2, shape.positions, shape.dim, 1000);
        t.rotary = give_rotary(t.model, 1, shape.positions, shape.dim, 100);
    }
    return t;
}

static inline offramp_session *session_of(const Tiny *t, offramp_type keys) {
    offramp_session *session = offramp_session_new(t->model, keys, 16, &said);
    CHECK(session, "%s", said.message);
    return session;
}

// Runs `count` rows h of one session through all blocks, after what it has.
static inline void run_rows(const Tiny *t, offramp_session *session, float *h, int64_t count) {
    const offramp_rows rows = {session, offramp_session_length(session, 0), count};
    WORKS(offramp_run(t->model, 0, t->count, &rows, 1, h, &said));
}

// Whether two sessions remember the same of a block, bit for bit.
static inline int remember_the_same(const Tiny *t, const offramp_session *a, const offramp_session *b,
                                    int64_t block) {
    const Shape *s = &t->shape;
    const Layer *l = t->layers + block;
    const int64_t length = offramp_session_length(a, block), each = 2 * s->heads * s->dim;
    if (offramp_session_length(b, block) != length) return 0;
    int64_t from = offramp_session_first(a, block), other = offramp_session_first(b, block);
    from = from > other ? from : other;
    const int64_t keys = l->attends ? (length - from) * each : 0,
                  window = l->mixes ? window_of(s, l->mixes) : 0,
                  count = keys + window + (l->mixes ? state_of(s, l->mixes) : 0);
    float *of_a = calloc(count + 1, 4), *of_b = calloc(count + 1, 4);
    if (l->attends) {
        WORKS(offramp_session_keys(a, block, from, of_a, &said));
        WORKS(offramp_session_keys(b, block, from, of_b, &said));
    }
    if (l->mixes) {
        WORKS(offramp_session_state(a, block, of_a + keys, of_a + keys + window, &said));
        WORKS(offramp_session_state(b, block, of_b + keys, of_b + keys + window, &said));
    }
    const int equal = same(of_a, of_b, count);
    free(of_a), free(of_b);
    return equal;
}

static inline int all_the_same(const Tiny *t, const offramp_session *a, const offramp_session *b) {
    int equal = 1;
    for (int64_t i = 0; i < t->count; i++) equal &= remember_the_same(t, a, b, i);
    return equal;
}
