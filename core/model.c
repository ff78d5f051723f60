#include "model.h"

#include <stdio.h>
#include <stdlib.h>

enum {
    MOST_HEADS = 1 << 16,   // of one block
    MOST_STATES = 1 << 10,  // of one channel
    MOST_BLOCKS = 1 << 16,  // of a model
    VECTOR = 8,             // such a multiple can be read in whole vectors everywhere
    MOST_DEEP = 2,          // deep states that a read-out reads: the top one and a middle one
};

static int has_shape(const Weight *m, int64_t rows, int64_t columns) {
    return m->rows == rows && m->columns == columns;
}

// Whether an array has so many numbers, or is not there.
static int has(Array array, int64_t count) { return !array.values || array.count == count; }

static offramp_status check_ends(const offramp_part *part, offramp_error *error) {
    if (check_kind(part, "ends", error)) return OFFRAMP_INVALID;
    const Ends *e = &part->ends;
    const int64_t D = e->head.columns;
    NEED(e->cap >= 0, "A cap of logits is 0 or more.");
    NEED(e->norm.count == D, "The final norm has %lld numbers, but the head has %lld columns.",
         (long long)e->norm.count, (long long)D);
    NEED(D % VECTOR == 0, "A hidden size of %lld is not a multiple of %d.", (long long)D, VECTOR);
    NEED(e->embedding.columns == D && e->embedding.rows >= e->head.rows,
         "The embedding has fewer tokens than the head.");
    return OFFRAMP_OK;
}

// Whether the norms around a part fit D dims, and its factors `results` results. Without a factor, it is 1.
static offramp_status check_around(Around *a, int64_t D, int64_t results, offramp_error *error) {
    NEED(has(a->norm, D) && has(a->after, D), "A norm does not fit a hidden size of %lld.", (long long)D);
    NEED(has(a->factors, results), "A part needs a factor for each of %lld results.", (long long)results);
    if (a->factor == 0) a->factor = 1;
    return OFFRAMP_OK;
}

static offramp_status check_attention(const offramp_part *part, Attention *found, int64_t D,
                                      offramp_error *error) {
    if (check_kind(part, "attention", error)) return OFFRAMP_INVALID;
    Attention a = part->attention;
    const int64_t H = a.heads, P = a.dim;
    NEED(H > 0 && H < MOST_HEADS && P > 0 && P % VECTOR == 0, "%lld heads of %lld dims cannot be run.",
         (long long)H, (long long)P);
    a.queries = a.qkv.rows / P - 2 * H;
    NEED(a.queries > 0 && a.queries % H == 0 && has_shape(&a.qkv, (a.queries + 2 * H) * P, D) &&
             has_shape(&a.o, D, a.queries * P),
         "The matrices of an attention do not fit %lld heads of %lld dims.", (long long)H, (long long)P);
    if (check_around(&a.around, D, a.qkv.rows, error)) return OFFRAMP_INVALID;
    NEED(has(a.q_norm, a.norm_heads ? P : a.queries * P) && has(a.k_norm, a.norm_heads ? P : H * P) &&
             !a.q_norm.values == !a.k_norm.values,
         "The norms of an attention do not fit its heads.");
    *found = a;
    return OFFRAMP_OK;
}

// Whether a mixer's shapes fit each other and so many inputs and outputs. Computes the other sizes from them.
static offramp_status check_mamba2(Mixer *m, int64_t inputs, int64_t outputs, offramp_error *error) {
    const int64_t H = m->heads, E = m->out.columns, C = E + 2 * m->groups * m->states;
    NEED(H > 0 && H < MOST_HEADS && E % H == 0 && m->groups > 0 && H % m->groups == 0 && m->states > 0 &&
             m->states <= MOST_STATES && m->states % VECTOR == 0,
         "A mixer of %lld heads and %lld states in %lld groups cannot be run.", (long long)H,
         (long long)m->states, (long long)m->groups);
    NEED(has_shape(&m->in, E + C + H, inputs) && has_shape(&m->out, outputs, E),
         "The matrices of a mixer do not fit its heads.");
    NEED(has(m->gated_norm, E) && has(m->conv_bias, C) && m->dt_bias.count == H && m->decay.count == H &&
             m->skip.count == H && m->conv.count % C == 0 && m->conv.count / C > 1,
         "The vectors of a mixer do not fit its heads.");
    m->dim = E / H, m->inner = E, m->channels = C, m->taps = m->conv.count / C;
    return OFFRAMP_OK;
}

static offramp_status check_mamba(Mixer *m, int64_t D, offramp_error *error) {
    const int64_t E = m->out.columns, N = m->states, L = m->steps.columns;
    NEED(N > 0 && N <= MOST_STATES && N % VECTOR == 0 && E < MOST_HEADS,
         "A mixer of %lld channels and %lld states cannot be run.", (long long)E, (long long)N);
    NEED(has_shape(&m->in, 2 * E, D) && has_shape(&m->out, D, E) && has_shape(&m->low, L + 2 * N, E) &&
             m->steps.rows == E,
         "The matrices of a mixer do not fit its channels.");
    NEED(has(m->conv_bias, E) && m->decay.count == E * N && m->skip.count == E && m->conv.count % E == 0 &&
             m->conv.count / E > 1 && has(m->dt_norm, L) && has(m->b_norm, N) && has(m->c_norm, N) &&
             !m->dt_norm.values == !m->b_norm.values && !m->dt_norm.values == !m->c_norm.values,
         "The vectors of a mixer do not fit its channels.");
    m->inner = m->channels = E, m->taps = m->conv.count / E;
    return OFFRAMP_OK;
}

static offramp_status check_convolution(Mixer *m, int64_t D, offramp_error *error) {
    const int64_t C = m->out.columns;
    NEED(has_shape(&m->in, 3 * C, D) && has_shape(&m->out, D, C) && has(m->conv_bias, C) &&
             m->conv.count % C == 0 && m->conv.count / C > 1,
         "The shapes of a convolution do not fit.");
    m->inner = m->channels = C, m->taps = m->conv.count / C;
    return OFFRAMP_OK;
}

static offramp_status check_mixer(const offramp_part *part, Mixer *found, int64_t D, offramp_error *error) {
    const char *const kinds[] = {[MAMBA2] = "mamba2", [MAMBA] = "mamba", [CONVOLUTION] = "convolution"};
    MixerKind kind = CONVOLUTION;
    while (kind > MAMBA2 && strcmp(part->kind->name, kinds[kind])) kind--;
    if (check_kind(part, kinds[kind], error)) return OFFRAMP_INVALID;
    *found = part->mixer;
    found->kind = kind;
    if (check_around(&found->around, D, found->in.rows, error)) return OFFRAMP_INVALID;
    if (kind == MAMBA) return check_mamba(found, D, error);
    return kind == MAMBA2 ? check_mamba2(found, D, D, error) : check_convolution(found, D, error);
}

static offramp_status check_mlp(const offramp_part *part, Mlp *found, int64_t D, offramp_error *error) {
    if (check_kind(part, "mlp", error)) return OFFRAMP_INVALID;
    Mlp m = part->mlp;
    const int64_t W = m.down.columns;
    if (check_around(&m.around, D, m.gate_up.rows, error)) return OFFRAMP_INVALID;
    NEED((has_shape(&m.gate_up, 2 * W, D) || has_shape(&m.gate_up, W, D)) && has_shape(&m.down, D, W),
         "The matrices of an MLP do not fit.");
    NEED(m.activation <= OFFRAMP_SQUARED_RELU, "There is no activation %lld.", (long long)m.activation);
    *found = m;
    return OFFRAMP_OK;
}

offramp_status check_gate(const offramp_part *part, int64_t D, offramp_error *error) {
    if (check_kind(part, "gate", error)) return OFFRAMP_INVALID;
    const Gate *g = &part->gate;
    const int fits = g->out.values ? g->in.rows == 2 * g->out.count : g->in.rows == 1;
    NEED(fits && g->in.columns == D && g->mean.count == D && g->spread.count == D,
         "A gate's shapes do not fit %lld dims.", (long long)D);
    return OFFRAMP_OK;
}

offramp_status check_mamba_gate(const offramp_part *part, MambaGate *found, int64_t D, offramp_error *error) {
    if (check_kind(part, "mamba_gate", error)) return OFFRAMP_INVALID;
    MambaGate g = part->mamba_gate;
    NEED(g.down.columns == D && g.mean.count == D && g.spread.count == D && g.direct.count == D,
         "A gate's shapes do not fit %lld dims.", (long long)D);
    g.mixer.groups = 1, g.mixer.dt_high = INFINITY, g.mixer.around.factor = 1;
    if (check_mamba2(&g.mixer, g.down.rows, 1, error)) return OFFRAMP_INVALID;
    *found = g;
    return OFFRAMP_OK;
}

offramp_status check_readout(const offramp_part *part, Readout *found, int64_t D, offramp_error *error) {
    if (check_kind(part, "readout", error)) return OFFRAMP_INVALID;
    Readout r = part->readout;
    const int64_t W = r.down.columns, A = r.gated ? 2 * W : W;
    NEED(r.in.values || !part->given, "A read-out without 'in' can have no other weights or arrays.");
    r.hidden = D, r.reads = r.in.values ? r.in.columns / D - 1 : 0, r.skips = r.in.rows == D + A;
    if (r.in.values) {
        NEED(has_shape(&r.in, r.skips ? D + A : A, (1 + r.reads) * D) && r.reads >= 0 &&
                 r.reads <= MOST_DEEP && has_shape(&r.down, D, W) && r.mean.count == D &&
                 r.spread.count == D && has(r.scale, D),
             "A read-out's shapes do not fit %lld dims.", (long long)D);
        NEED(!r.scale.values || r.skips, "A read-out with a scale needs a linear map.");
    }
    *found = r;
    return OFFRAMP_OK;
}

offramp_status check_sketch(const offramp_part *part, int64_t D, int64_t V, offramp_error *error) {
    if (check_kind(part, "sketch", error)) return OFFRAMP_INVALID;
    const Sketch *s = &part->sketch;
    NEED(s->reduce.columns == D && has_shape(&s->expand, V, s->reduce.rows) &&
             s->reduce.type <= OFFRAMP_BFLOAT16,
         "The maps of a sketch do not fit a head of %lld tokens and %lld dims.", (long long)V, (long long)D);
    NEED(s->candidates > 0 && s->candidates <= V, "A sketch has %lld candidates of %lld tokens.",
         (long long)s->candidates, (long long)V);
    return OFFRAMP_OK;
}

offramp_status check_shortlist(const offramp_part *part, int64_t D, int64_t V, offramp_error *error) {
    if (check_kind(part, "shortlist", error)) return OFFRAMP_INVALID;
    const Shortlist *s = &part->shortlist;
    const int64_t n = s->head.rows, *tokens = s->tokens.values;
    NEED(s->head.columns == D && n <= V && s->tokens.count == n, "A short list does not fit the head.");
    for (int64_t i = 0; i < n; i++)
        NEED(tokens[i] >= 0 && tokens[i] < V, "A short list names tokens beyond the vocabulary.");
    return OFFRAMP_OK;
}

enum { MOST_CONTEXT = 64 };  // tokens that an n-gram has at most; each draft looks for all lengths

offramp_status check_guesses(const offramp_part *part, int64_t V, offramp_error *error) {
    if (check_kind(part, "guesses", error)) return OFFRAMP_INVALID;
    const Guesses *g = &part->guesses;
    const int64_t slots = g->keys.count;
    const uint32_t *keys = g->keys.values, *values = g->values.values;
    int64_t empty = 0;
    NEED(g->longest <= MOST_CONTEXT, "A table of n-grams may look at %d tokens, and not at %lld.",
         MOST_CONTEXT, (long long)g->longest);
    NEED(slots == g->values.count && !(slots & (slots - 1)) && g->shortest,
         "A table of n-grams needs a power of two slots, and some empty ones.");
    for (int64_t i = 0; i < slots; i++) {
        empty += !keys[i];
        NEED(values[i] >> 8 < V, "A table of n-grams names tokens beyond the vocabulary.");
    }
    NEED(empty, "A table of n-grams needs a power of two slots, and some empty ones.");
    return OFFRAMP_OK;
}

offramp_status offramp_model_fits(const offramp_model *model, const offramp_part *part,
                                  offramp_error *error) {
    const char *kind = part ? part->kind->name : "";
    if (!strcmp(kind, "gate")) return check_gate(part, model->hidden, error);
    if (!strcmp(kind, "mamba_gate")) return check_mamba_gate(part, &(MambaGate){0}, model->hidden, error);
    if (!strcmp(kind, "readout")) return check_readout(part, &(Readout){0}, model->hidden, error);
    if (!strcmp(kind, "sketch")) return check_sketch(part, model->hidden, model->vocabulary, error);
    if (!strcmp(kind, "shortlist")) return check_shortlist(part, model->hidden, model->vocabulary, error);
    return check_guesses(part, model->vocabulary, error);
}

static offramp_status add_block(offramp_model *model, int64_t i, const offramp_part *attention,
                                const offramp_part *mixer, const offramp_part *mlp, offramp_error *error) {
    Block *b = model->blocks + i;
    const int64_t D = model->hidden;
    NEED(attention || mixer || mlp, "Block %lld has no parts.", (long long)i);
    b->attends = attention != NULL, b->mixes = mixer != NULL, b->has_mlp = mlp != NULL;
    if (attention && check_attention(attention, &b->attention, D, error)) return OFFRAMP_INVALID;
    if (mixer && check_mixer(mixer, &b->mixer, D, error)) return OFFRAMP_INVALID;
    if (mlp && check_mlp(mlp, &b->mlp, D, error)) return OFFRAMP_INVALID;
    if (!b->attends || !b->attention.rotary) return OFFRAMP_OK;
    NEED(b->attention.rotary <= MOST_TABLES, "There are %d rotary tables, and none has the number %lld.",
         MOST_TABLES, (long long)b->attention.rotary);
    Rotary *table = model->rotary + b->attention.rotary - 1;
    NEED(!table->dim || table->dim == b->attention.dim,
         "Blocks with positions have heads of different dims.");
    table->dim = b->attention.dim;
    return OFFRAMP_OK;
}

offramp_model *offramp_model_new(const offramp_part *ends, const offramp_part *const *attentions,
                                 const offramp_part *const *mixers, const offramp_part *const *mlps,
                                 int64_t blocks, offramp_error *error) {
    if (check_ends(ends, error)) return NULL;
    if (blocks < 0 || blocks > MOST_BLOCKS) {
        fail(error, OFFRAMP_INVALID, "A model cannot have %lld blocks.", (long long)blocks);
        return NULL;
    }
    offramp_model *model = aligned_alloc(64, (sizeof *model + 63) / 64 * 64);
    if (model) {
        memset(model, 0, sizeof *model);
        pool_begin(&model->pool);
        model->users = 1;
        model->blocks = calloc(blocks + 1, sizeof *model->blocks);
    }
    if (!model || !model->blocks) {
        offramp_model_free(model);
        fail(error, OFFRAMP_NO_MEMORY, "There is no memory for a model.");
        return NULL;
    }
    model->hidden = ends->ends.head.columns, model->vocabulary = ends->ends.head.rows;
    model->count = blocks, model->ends = ends->ends;
    if (!model->ends.scale) model->ends.scale = 1;
    if (!model->ends.logit_scale) model->ends.logit_scale = 1;
    for (int64_t i = 0; i < blocks; i++)
        if (add_block(model, i, attentions ? attentions[i] : NULL, mixers ? mixers[i] : NULL,
                      mlps ? mlps[i] : NULL, error)) {
            offramp_model_free(model);
            return NULL;
        }
    return model;
}

void offramp_model_free(offramp_model *model) {
    if (!model || atomic_fetch_sub(&model->users, 1) > 1) return;
    pool_end(&model->pool);
    for (int i = 0; i < MOST_TABLES; i++) free(model->rotary[i].frequencies), free(model->rotary[i].pairs);
    free(model->blocks);
    free(model->scratch);
    free(model);
}

int64_t offramp_model_hidden(const offramp_model *model) { return model->hidden; }

int64_t offramp_model_blocks(const offramp_model *model) { return model->count; }

offramp_status offramp_model_threads(offramp_model *model, int64_t threads, offramp_error *error) {
    NEED(threads > 0 && threads <= MOST_THREADS, "A model can use 1 to %d threads, but not %lld.",
         MOST_THREADS, (long long)threads);
    pool_enter(&model->pool);
    model->pool.wanted = (int)threads;
    pool_leave(&model->pool);
    return OFFRAMP_OK;
}

offramp_status offramp_model_rotary(offramp_model *model, int64_t table, const float *frequencies,
                                    int64_t count, double factor, offramp_error *error) {
    NEED(table > 0 && table <= MOST_TABLES, "There are %d rotary tables, and none has the number %lld.",
         MOST_TABLES, (long long)table);
    Rotary *own = model->rotary + table - 1;
    NEED(count >= 0 && count <= INT32_MAX && (!own->dim || 2 * count <= own->dim),
         "%lld frequencies do not fit heads of %lld dims.", (long long)count, (long long)own->dim);
    float *copy = malloc((count + 1) * sizeof *copy);
    if (!copy) return fail(error, OFFRAMP_NO_MEMORY, "There is no memory for a rotary table.");
    memcpy(copy, frequencies, count * sizeof *copy);
    pool_enter(&model->pool);
    free(own->frequencies), free(own->pairs);
    own->frequencies = copy, own->count = count, own->factor = (float)factor;
    own->pairs = NULL, own->positions = 0;
    pool_leave(&model->pool);
    return OFFRAMP_OK;
}

enum { FEWEST_POSITIONS = 256, MOST_POSITIONS = 1 << 28 };

// Rotary pairs of all positions from the last one known on. The angle is a float32, as in transformers.
static void turn(const Rotary *table, float *pairs, int64_t positions) {
    for (int64_t t = table->positions; t < positions; t++)
        for (int64_t i = 0; i < table->dim / 2; i++) {
            const int turns = i < table->count;
            const double angle = turns ? (float)t * table->frequencies[i] : 0;
            const float factor = turns ? table->factor : 1;
            float *pair = pairs + t * table->dim + 2 * i;
            pair[0] = (float)cos(angle) * factor, pair[1] = (float)sin(angle) * factor;
        }
}

offramp_status reach(offramp_model *model, int64_t end, offramp_error *error) {
    for (int i = 0; i < MOST_TABLES; i++) {
        Rotary *table = model->rotary + i;
        if (!table->dim || end <= table->positions) continue;
        NEED(table->frequencies, "Attention needs the rotary table %d, which was not given.", i + 1);
        NEED(end <= MOST_POSITIONS, "No text can have %lld positions.", (long long)end);
        const int64_t positions = larger(FEWEST_POSITIONS, 2 * end);
        float *longer = realloc(table->pairs, positions * table->dim * sizeof *longer);
        if (!longer) return fail(error, OFFRAMP_NO_MEMORY, "There is no memory for more positions.");
        turn(table, longer, positions);
        table->pairs = longer, table->positions = positions;
    }
    return OFFRAMP_OK;
}

int lay_out(offramp_model *model, void (*lay)(void *context, Arena *arena), void *context) {
    Arena arena = {NULL, 0};
    lay(context, &arena);
    if (arena.used > model->scratch_bytes) {
        free(model->scratch);
        model->scratch_bytes = 0;
        model->scratch = aligned_alloc(64, arena.used);
        if (!model->scratch) return 0;
        model->scratch_bytes = arena.used;
    }
    lay(context, &(Arena){model->scratch, 0});
    return 1;
}
