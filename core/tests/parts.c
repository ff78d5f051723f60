// Parts, models and constants: what does not fit is refused in one sentence.

#include <stddef.h>

#include "models.h"

static void constants_are_those_of_the_header(void) {
#define IS(name) \
    CHECK(offramp_constant(#name) == (int64_t)(name), #name " is %d", (int)offramp_constant(#name))
#define SIZE(type) CHECK(offramp_constant(#type) == (int64_t)sizeof(type), #type)
#define PLACE(type, field) \
    CHECK(offramp_constant(#type "." #field) == (int64_t)offsetof(type, field), #type "." #field)
    IS(OFFRAMP_OK);
    IS(OFFRAMP_INVALID);
    IS(OFFRAMP_NO_MEMORY);
    IS(OFFRAMP_VERSION);
    IS(OFFRAMP_FLOAT32);
    IS(OFFRAMP_BFLOAT16);
    IS(OFFRAMP_INT8);
    IS(OFFRAMP_FLOAT16);
    IS(OFFRAMP_Q4_1);
    IS(OFFRAMP_IQ4_XS);
    IS(OFFRAMP_STACKED);
    IS(OFFRAMP_INT64);
    IS(OFFRAMP_UINT32);
    IS(OFFRAMP_GROUP);
    IS(OFFRAMP_PANEL);
    IS(OFFRAMP_MOST_DRAFTS);
    IS(OFFRAMP_GATE);
    IS(OFFRAMP_MAX_PROB);
    IS(OFFRAMP_MARGIN);
    IS(OFFRAMP_ENTROPY);
    IS(OFFRAMP_PROJECT);
    IS(OFFRAMP_COPY);
    IS(OFFRAMP_FREEZE);
    IS(OFFRAMP_DEFER);
    IS(OFFRAMP_VERIFY);
    IS(OFFRAMP_FROM_FULL);
    IS(OFFRAMP_FROM_TABLE);
    IS(OFFRAMP_NOT_FINITE);
    IS(OFFRAMP_NOTHING_FITS);
    IS(OFFRAMP_MOST_THREADS);
    SIZE(offramp_error);
    SIZE(offramp_weight);
    SIZE(offramp_rows);
    SIZE(offramp_sampling);
    SIZE(offramp_exit);
    SIZE(offramp_block_costs);
    SIZE(offramp_rules);
    SIZE(offramp_decision);
    SIZE(offramp_request);
    PLACE(offramp_weight, bias);
    PLACE(offramp_weight, pieces);
    PLACE(offramp_rows, count);
    PLACE(offramp_sampling, penalty);
    PLACE(offramp_sampling, seed);
    PLACE(offramp_exit, readout);
    PLACE(offramp_exit, key);
    PLACE(offramp_exit, readout_flops);
    PLACE(offramp_block_costs, state_flops);
    PLACE(offramp_rules, fill);
    PLACE(offramp_rules, key);
    PLACE(offramp_rules, decay);
    PLACE(offramp_rules, guesses);
    PLACE(offramp_rules, row_costs);
    PLACE(offramp_decision, confidence);
    PLACE(offramp_decision, rejected);
    PLACE(offramp_decision, source);
    PLACE(offramp_request, ids);
    PLACE(offramp_request, how);
    PLACE(offramp_request, allowed);
    PLACE(offramp_request, decisions);
    PLACE(offramp_request, failed);
    CHECK(offramp_constant("OFFRAMP") == -1 && offramp_constant("") == -1 &&
              offramp_constant("offramp_rows.") == -1,
          "unknown names");
    CHECK(offramp_version() == OFFRAMP_VERSION, "the version");
    CHECK(strlen(offramp_sources()) == 16 && *offramp_variant() && *offramp_kernels(),
          "names of the library");
}

static void parts_take_only_what_they_have(void) {
    static const char *const kinds[] = {"ends",       "attention", "mamba2", "mlp",       "gate",
                                        "mamba_gate", "readout",   "sketch", "shortlist", "guesses"};
    const offramp_weight w = weight_of(OFFRAMP_FLOAT32, 0, 8, 8, 0);
    char name[400];
    memset(name, 'x', sizeof name), name[399] = 0;
    NOT_MADE(offramp_part_new("", &said));
    NOT_MADE(offramp_part_new("attentio", &said));
    NOT_MADE(offramp_part_new(name, &said));
    CHECK(!offramp_part_new("attentions", NULL), "without a place for the error");
    for (int i = 0; i < 10; i++) {
        offramp_part *part = new_part(kinds[i]);
        REFUSED(offramp_part_weight(part, "norm", &w, &said));
        REFUSED(offramp_part_weight(part, name, &w, &said));
        REFUSED(offramp_part_array(part, "unknown", OFFRAMP_FLOAT32, w.values, 8, &said));
        REFUSED(offramp_part_array(part, name, OFFRAMP_FLOAT32, w.values, 8, &said));
        REFUSED(offramp_part_number(part, "number", 1, &said));
        REFUSED(offramp_part_number(part, name, 1, &said));
        for (int type = -1; type < 8; type++)
            REFUSED(offramp_part_array(part, "eps", type, w.values, 8, &said));
        offramp_part_free(part);
    }
    offramp_part *mlp = new_part("mlp");
    REFUSED(offramp_part_array(mlp, "norm", OFFRAMP_BFLOAT16, w.values, 8, &said));
    REFUSED(offramp_part_array(mlp, "norm", OFFRAMP_FLOAT32, NULL, 8, &said));
    REFUSED(offramp_part_array(mlp, "norm", OFFRAMP_FLOAT32, w.values, -8, &said));
    offramp_part *attention = new_part("attention");
    const double wrong[] = {-1, 0.5, NAN, INFINITY, -INFINITY, 1e18};
    for (int i = 0; i < 6; i++) REFUSED(offramp_part_number(attention, "rotary", wrong[i], &said));
    offramp_weight none = w;
    none.values = NULL;
    REFUSED(offramp_part_weight(mlp, "down", &none, &said));
    // What was refused was not given: the part still lacks it.
    offramp_weight wide = weight_of(OFFRAMP_FLOAT32, 0, 16, 8, 0);
    const float ones[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    give(mlp, "gate_up", &wide), give(mlp, "down", &w), give_floats(mlp, "norm", ones, 8),
        give_number(mlp, "activation", OFFRAMP_SILU);
    Shape shape = SMALL;
    shape.blocks = "", shape.hidden = 8;
    Tiny t = {.shape = shape};
    offramp_part *ends = ends_part(&shape, &t);
    NOT_MADE(model_made_of(ends, NULL, NULL, &mlp, 1));
    CHECK(strstr(said.message, "eps"), "it says '%s'", said.message);
    give_number(mlp, "eps", 1);
    t.model = model_made_of(ends, NULL, NULL, &mlp, 1);
    MADE(t.model);
    offramp_model_free(t.model);
    offramp_part_free(mlp), offramp_part_free(ends), offramp_part_free(attention);
}

// Makes a model of one block, with a part that was changed and others that fit, and frees the parts.
static offramp_model *with(offramp_part *attention, offramp_part *mixer, offramp_part *mlp,
                           offramp_part *ends) {
    Tiny t = {.shape = SMALL};
    Layer layer = {0};
    if (!ends) ends = ends_part(&SMALL, &t);
    if (!mlp) mlp = mlp_part(&SMALL, &layer);
    offramp_model *model = model_made_of(ends, &attention, &mixer, &mlp, 1);
    offramp_part_free(ends), offramp_part_free(attention), offramp_part_free(mixer), offramp_part_free(mlp);
    return model;
}

typedef struct {
    const char
        *name;  // of a number, or of a weight or an array that gets these many rows or numbers, and columns
    double value;
    int64_t columns;
} Change;

static void change(offramp_part *part, const Change *c) {
    offramp_weight w = {.type = OFFRAMP_FLOAT32, .rows = (int64_t)c->value, .columns = c->columns};
    if (c->columns > 0) {
        w.values = zeros(w.rows * w.columns);
        give(part, c->name, &w);
    } else if (c->columns < 0) {
        give_floats(part, c->name, zeros((int64_t)c->value + 1), (int64_t)c->value);
    } else {
        give_number(part, c->name, c->value);
    }
}

static void shapes_must_fit(void) {
    static const Change attention[] = {{"heads", 0, 0},          {"heads", 3, 0},        {"heads", 70000, 0},
                                       {"heads", 2147483647, 0}, {"dim", 0, 0},          {"dim", 12, 0},
                                       {"dim", 16, 0},           {"dim", 2147483640, 0}, {"qkv", 64, 24},
                                       {"qkv", 32, 32},          {"o", 24, 32},          {"o", 32, 24},
                                       {"norm", 31, -1},         {"q_norm", 8, -1},      {"k_norm", 8, -1}};
    static const Change mixer[] = {
        {"heads", 0, 0},           {"heads", 3, 0},           {"heads", 65536, 0}, {"groups", 0, 0},
        {"groups", 3, 0},          {"groups", 2147483647, 0}, {"states", 0, 0},    {"states", 12, 0},
        {"states", 2147483640, 0}, {"in", 100, 32},           {"out", 32, 24},     {"norm", 8, -1},
        {"gated_norm", 8, -1},     {"conv", 96, -1},          {"conv", 100, -1},   {"conv_bias", 32, -1},
        {"dt_bias", 3, -1},        {"decay", 5, -1},          {"skip", 0, -1}};
    static const Change mlp[] = {
        {"gate_up", 96, 32}, {"gate_up", 128, 24}, {"down", 24, 64}, {"norm", 24, -1}};
    static const Change ends[] = {
        {"head", 50, 24}, {"head", 51, 32}, {"norm", 24, -1}, {"embedding", 49, 32}, {"embedding", 50, 24}};
    for (size_t i = 0; i < sizeof attention / sizeof *attention; i++) {
        Layer layer = {0};
        offramp_part *part = attention_part(&SMALL, &layer);
        change(part, attention + i);
        NOT_MADE(with(part, NULL, NULL, NULL));
    }
    for (size_t i = 0; i < sizeof mixer / sizeof *mixer; i++) {
        Layer layer = {0};
        offramp_part *part = mixer_part(&SMALL, &layer);
        change(part, mixer + i);
        NOT_MADE(with(NULL, part, NULL, NULL));
    }
    for (size_t i = 0; i < sizeof mlp / sizeof *mlp; i++) {
        Layer layer = {0};
        offramp_part *part = mlp_part(&SMALL, &layer);
        change(part, mlp + i);
        NOT_MADE(with(NULL, NULL, part, NULL));
    }
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
        Tiny t = {.shape = SMALL};
        offramp_part *part = ends_part(&SMALL, &t);
        change(part, ends + i);
        NOT_MADE(with(NULL, NULL, NULL, part));
    }
}

// A state takes much memory for few weights, so it has a limit.
static void states_have_a_limit(void) {
    for (int64_t states = 1024; states <= 1032; states += 8) {
        Shape shape = SMALL;
        Layer layer = {0};
        shape.states = states;
        offramp_model *model = with(NULL, mixer_part(&shape, &layer), NULL, NULL);
        CHECK(!model == (states > 1024), "a mixer of %d states", (int)states);
        if (model) offramp_model_free(model);
    }
}

static void models_need_their_parts(void) {
    Layer layer = {0};
    Tiny t = {.shape = SMALL};
    offramp_part *ends = ends_part(&SMALL, &t), *mlp = mlp_part(&SMALL, &layer), *empty = new_part("mlp"),
                 *bare = new_part("ends");
    offramp_part *mixer = mixer_part(&SMALL, &layer);
    offramp_part *none = NULL;
    NOT_MADE(model_made_of(NULL, NULL, &mixer, NULL, 1));
    NOT_MADE(model_made_of(bare, NULL, &mixer, NULL, 1));
    NOT_MADE(model_made_of(mlp, NULL, &mixer, NULL, 1));
    NOT_MADE(model_made_of(ends, NULL, &none, NULL, 1));
    NOT_MADE(model_made_of(ends, NULL, NULL, NULL, 1));
    NOT_MADE(model_made_of(ends, NULL, &mlp, NULL, 1));
    NOT_MADE(model_made_of(ends, &mixer, NULL, NULL, 1));
    NOT_MADE(model_made_of(ends, NULL, &mixer, &mixer, 1));
    NOT_MADE(model_made_of(ends, NULL, &mixer, &empty, 1));
    NOT_MADE(model_made_of(ends, NULL, &mixer, NULL, -1));
    NOT_MADE(model_made_of(ends, NULL, &mixer, NULL, INT64_MAX));
    t.model = model_made_of(ends, NULL, &mixer, NULL, 1);
    MADE(t.model);
    static const int64_t counts[] = {0, -1, 257, INT64_MAX, INT64_MIN};
    for (int i = 0; i < 5; i++) REFUSED(offramp_model_threads(t.model, counts[i], &said));
    WORKS(offramp_model_threads(t.model, 256, &said));
    const offramp_part *strange[] = {NULL,
                                     ends,
                                     mlp,
                                     mixer,
                                     new_part("gate"),
                                     new_part("sketch"),
                                     new_part("shortlist"),
                                     new_part("guesses"),
                                     new_part("mamba_gate")};
    for (int i = 0; i < 9; i++) REFUSED(offramp_model_fits(t.model, strange[i], &said));
    for (int i = 4; i < 9; i++) offramp_part_free((offramp_part *)strange[i]);
    offramp_part_free(ends), offramp_part_free(mlp), offramp_part_free(empty), offramp_part_free(bare),
        offramp_part_free(mixer);
    offramp_model_free(t.model);
}

static void short_lists_and_tables_must_fit(void) {
    Shape shape = SMALL;
    shape.blocks = "";
    Tiny t = tiny(shape);
    offramp_part *list = new_part("shortlist"), *table = new_part("guesses");
    int64_t tokens[50] = {49};
    uint32_t keys[8] = {1, 2, 3, 4, 5, 6, 7, 0}, values[8] = {49 << 8 | 200};
    change(list, &(Change){"head", 50, 32});
    WORKS(offramp_part_array(list, "tokens", OFFRAMP_INT64, tokens, 50, &said));
    WORKS(offramp_model_fits(t.model, list, &said));
    tokens[49] = 50;
    REFUSED(offramp_model_fits(t.model, list, &said));
    tokens[49] = -1;
    REFUSED(offramp_model_fits(t.model, list, &said));
    tokens[49] = 0;
    for (int64_t n = 0; n < 52; n += 17) {
        WORKS(offramp_part_array(list, "tokens", OFFRAMP_INT64, tokens, n < 50 ? n : 49, &said));
        REFUSED(offramp_model_fits(t.model, list, &said));
    }
    change(list, &(Change){"head", 49, 24});
    REFUSED(offramp_model_fits(t.model, list, &said));
    change(list, &(Change){"head", 49, 32});
    WORKS(offramp_model_fits(t.model, list, &said));
    WORKS(offramp_part_array(table, "keys", OFFRAMP_UINT32, keys, 8, &said));
    WORKS(offramp_part_array(table, "values", OFFRAMP_UINT32, values, 8, &said));
    REFUSED(offramp_model_fits(t.model, table, &said));  // without a shortest context
    give_number(table, "shortest", 2), give_number(table, "longest", 65);
    REFUSED(offramp_model_fits(t.model, table, &said));
    give_number(table, "longest", 4);
    WORKS(offramp_model_fits(t.model, table, &said));
    keys[7] = 8;
    REFUSED(offramp_model_fits(t.model, table, &said));  // no slot is empty
    keys[7] = 0, values[3] = 50 << 8;
    REFUSED(offramp_model_fits(t.model, table, &said));
    values[3] = 0;
    WORKS(offramp_part_array(table, "keys", OFFRAMP_UINT32, keys, 7, &said));
    REFUSED(offramp_model_fits(t.model, table, &said));
    WORKS(offramp_part_array(table, "values", OFFRAMP_UINT32, values, 7, &said));
    REFUSED(offramp_model_fits(t.model, table, &said));
    offramp_part_free(list), offramp_part_free(table);
    offramp_model_free(t.model);
}

static void sketches_and_gates_must_fit(void) {
    static const Change sketch[] = {
        {"reduce", 8, 24}, {"reduce", 7, 32}, {"expand", 49, 8}, {"candidates", 0, 0}, {"candidates", 51, 0}};
    static const Change gate[] = {
        {"in", 2, 32}, {"in", 1, 24}, {"mean", 8, -1}, {"spread", 33, -1}, {"out", 2, -1}};
    static const Change whole[] = {{"reduce", 8, 32}, {"expand", 50, 8}, {"candidates", 50, 0}};
    static const Change linear[] = {{"in", 1, 32}, {"mean", 32, -1}, {"spread", 32, -1}, {"bias", 0, 0}};
    Shape shape = SMALL;
    shape.blocks = "m";
    Tiny t = tiny(shape);
    float h[32] = {0}, y[50];
    for (int i = 0; i < 5; i++) {
        offramp_part *part = new_part("sketch"), *asked = new_part("gate");
        for (int j = 0; j < 3; j++) change(part, whole + j);
        for (int j = 0; j < 4; j++) change(asked, linear + j);
        WORKS(offramp_model_fits(t.model, part, &said));
        WORKS(offramp_model_fits(t.model, asked, &said));
        change(part, sketch + i), change(asked, gate + i);
        REFUSED(offramp_model_fits(t.model, part, &said));
        REFUSED(offramp_model_fits(t.model, asked, &said));
        REFUSED(offramp_logits(t.model, part, h, 1, y, &said));
        REFUSED(offramp_ask(t.model, asked, h, 1, y, &said));
        REFUSED(offramp_logits(t.model, asked, h, 1, y, &said));
        REFUSED(offramp_ask(t.model, part, h, 1, y, &said));
        offramp_part_free(part), offramp_part_free(asked);
    }
    REFUSED(offramp_logits(t.model, NULL, h, -1, y, &said));
    offramp_model_free(t.model);
}

// Each change of a part that fits is refused.
static void changes_are_refused(const char *kind, const Change *whole, size_t count, const Change *wrong,
                                size_t changes) {
    Shape shape = SMALL;
    shape.blocks = "";
    Tiny t = tiny(shape);
    float h[3 * 32] = {0}, y[32];
    for (size_t i = 0; i < changes; i++) {
        offramp_part *part = new_part(kind);
        for (size_t j = 0; j < count; j++) change(part, whole + j);
        WORKS(offramp_model_fits(t.model, part, &said));
        change(part, wrong + i);
        REFUSED(offramp_model_fits(t.model, part, &said));
        REFUSED(offramp_ask(t.model, part, h, 1, y, &said));
        REFUSED(offramp_read_out(t.model, part, h, h + 32, 1, y, &said));
        offramp_part_free(part);
    }
    offramp_model_free(t.model);
}

static void mamba_gates_and_read_outs_must_fit(void) {
    static const Change gate[] = {{"down", 16, 32},  {"in", 98, 16},         {"out", 1, 32},
                                  {"mean", 32, -1},  {"spread", 32, -1},     {"direct", 32, -1},
                                  {"conv", 256, -1}, {"gated_norm", 32, -1}, {"dt_bias", 2, -1},
                                  {"decay", 2, -1},  {"skip", 2, -1},        {"heads", 2, 0},
                                  {"states", 16, 0}, {"gated_eps", 1, 0},    {"bias", 0, 0}};
    static const Change wrong[] = {
        {"down", 16, 24},       {"down", 24, 32},   {"in", 97, 16},    {"in", 98, 24},
        {"out", 2, 32},         {"out", 1, 24},     {"mean", 8, -1},   {"spread", 33, -1},
        {"direct", 31, -1},     {"conv", 64, -1},   {"conv", 100, -1}, {"conv_bias", 32, -1},
        {"gated_norm", 24, -1}, {"dt_bias", 3, -1}, {"decay", 1, -1},  {"skip", 0, -1},
        {"heads", 0, 0},        {"heads", 3, 0},    {"states", 12, 0}};
    changes_are_refused("mamba_gate", gate, sizeof gate / sizeof *gate, wrong, sizeof wrong / sizeof *wrong);
    static const Change readout[] = {{"in", 32 + 2 * 16, 64}, {"down", 32, 16},  {"mean", 32, -1},
                                     {"spread", 32, -1},      {"scale", 32, -1}, {"gated", 1, 0}};
    static const Change bad[] = {{"in", 64, 128},   {"in", 64, 48},    {"in", 64, 24},  {"in", 65, 64},
                                 {"in", 32, 64},    {"down", 24, 16},  {"down", 32, 8}, {"mean", 31, -1},
                                 {"spread", 0, -1}, {"scale", 33, -1}, {"gated", 0, 0}};
    changes_are_refused("readout", readout, sizeof readout / sizeof *readout, bad, sizeof bad / sizeof *bad);
}

int main(void) {
    constants_are_those_of_the_header();
    parts_take_only_what_they_have();
    states_have_a_limit();
    shapes_must_fit();
    models_need_their_parts();
    short_lists_and_tables_must_fit();
    sketches_and_gates_must_fit();
    mamba_gates_and_read_outs_must_fit();
    return 0;
}
