#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include "layouts.h"
#include "model.h"

offramp_status fail(offramp_error *error, offramp_status status, const char *format, ...) {
    if (!error) return status;
    va_list values;
    va_start(values, format);
    vsnprintf(error->message, sizeof error->message, format, values);
    va_end(values);
    return status;
}

#define AT(type, field) offsetof(offramp_part, type.field)
// The fields that all parts of a block have, and those that all mixers have.
#define AROUND(type)                                                                               \
    {"norm", FLOATS, AT(type, around.norm), 1}, {"norm_after", FLOATS, AT(type, around.after), 1}, \
        {"factors", FLOATS, AT(type, around.factors), 1}, {"eps", REAL, AT(type, around.eps), 0},  \
        {"factor", REAL, AT(type, around.factor), 1}
#define MIXER(mixer)                                                      \
    {"in", WEIGHT, AT(mixer, in), 0}, {"out", WEIGHT, AT(mixer, out), 0}, \
        {"conv", FLOATS, AT(mixer, conv), 0}, {"conv_bias", FLOATS, AT(mixer, conv_bias), 1}
static const Kind KINDS_OF_PARTS[] = {
    {"ends",
     {{"head", WEIGHT, AT(ends, head), 0},
      {"norm", FLOATS, AT(ends, norm), 0},
      {"embedding", WEIGHT, AT(ends, embedding), 0},
      {"eps", REAL, AT(ends, eps), 0},
      {"scale", REAL, AT(ends, scale), 1},
      {"logit_scale", REAL, AT(ends, logit_scale), 1},
      {"cap", REAL, AT(ends, cap), 1}}},
    {"attention",
     {AROUND(attention),
      {"qkv", WEIGHT, AT(attention, qkv), 0},
      {"o", WEIGHT, AT(attention, o), 0},
      {"q_norm", FLOATS, AT(attention, q_norm), 1},
      {"k_norm", FLOATS, AT(attention, k_norm), 1},
      {"heads", COUNT_OF, AT(attention, heads), 0},
      {"dim", COUNT_OF, AT(attention, dim), 0},
      {"window", COUNT_OF, AT(attention, window), 1},
      {"rotary", COUNT_OF, AT(attention, rotary), 1},
      {"norm_heads", COUNT_OF, AT(attention, norm_heads), 1},
      {"head_eps", REAL, AT(attention, head_eps), 1},
      {"scale", REAL, AT(attention, scale), 0},
      {"cap", REAL, AT(attention, cap), 1}}},
    {"mamba2",
     {AROUND(mixer),
      MIXER(mixer),
      {"gated_norm", FLOATS, AT(mixer, gated_norm), 1},
      {"dt_bias", FLOATS, AT(mixer, dt_bias), 0},
      {"decay", FLOATS, AT(mixer, decay), 0},
      {"skip", FLOATS, AT(mixer, skip), 0},
      {"heads", COUNT_OF, AT(mixer, heads), 0},
      {"groups", COUNT_OF, AT(mixer, groups), 0},
      {"states", COUNT_OF, AT(mixer, states), 0},
      {"gate_last", COUNT_OF, AT(mixer, gate_last), 1},
      {"gated_eps", REAL, AT(mixer, gated_eps), 0},
      {"dt_low", REAL, AT(mixer, dt_low), 0},
      {"dt_high", REAL, AT(mixer, dt_high), 0}}},
    {"mamba",
     {AROUND(mixer),
      MIXER(mixer),
      {"low", WEIGHT, AT(mixer, low), 0},
      {"steps", WEIGHT, AT(mixer, steps), 0},
      {"decay", FLOATS, AT(mixer, decay), 0},
      {"skip", FLOATS, AT(mixer, skip), 0},
      {"dt_norm", FLOATS, AT(mixer, dt_norm), 1},
      {"b_norm", FLOATS, AT(mixer, b_norm), 1},
      {"c_norm", FLOATS, AT(mixer, c_norm), 1},
      {"states", COUNT_OF, AT(mixer, states), 0},
      {"inner_eps", REAL, AT(mixer, inner_eps), 1}}},
    {"convolution", {AROUND(mixer), MIXER(mixer)}},
    {"mlp",
     {AROUND(mlp),
      {"gate_up", WEIGHT, AT(mlp, gate_up), 0},
      {"down", WEIGHT, AT(mlp, down), 0},
      {"activation", COUNT_OF, AT(mlp, activation), 0}}},
    {"gate",
     {{"in", WEIGHT, AT(gate, in), 0},
      {"mean", FLOATS, AT(gate, mean), 0},
      {"spread", FLOATS, AT(gate, spread), 0},
      {"out", FLOATS, AT(gate, out), 1},
      {"bias", REAL, AT(gate, bias), 0}}},
    {"mamba_gate",
     {{"down", WEIGHT, AT(mamba_gate, down), 0},
      {"in", WEIGHT, AT(mamba_gate, mixer.in), 0},
      {"out", WEIGHT, AT(mamba_gate, mixer.out), 0},
      {"mean", FLOATS, AT(mamba_gate, mean), 0},
      {"spread", FLOATS, AT(mamba_gate, spread), 0},
      {"direct", FLOATS, AT(mamba_gate, direct), 0},
      {"gated_norm", FLOATS, AT(mamba_gate, mixer.gated_norm), 0},
      {"conv", FLOATS, AT(mamba_gate, mixer.conv), 0},
      {"conv_bias", FLOATS, AT(mamba_gate, mixer.conv_bias), 1},
      {"dt_bias", FLOATS, AT(mamba_gate, mixer.dt_bias), 0},
      {"decay", FLOATS, AT(mamba_gate, mixer.decay), 0},
      {"skip", FLOATS, AT(mamba_gate, mixer.skip), 0},
      {"heads", COUNT_OF, AT(mamba_gate, mixer.heads), 0},
      {"states", COUNT_OF, AT(mamba_gate, mixer.states), 0},
      {"gated_eps", REAL, AT(mamba_gate, mixer.gated_eps), 0},
      {"bias", REAL, AT(mamba_gate, bias), 0}}},
    {"readout",
     {{"in", WEIGHT, AT(readout, in), 1},
      {"down", WEIGHT, AT(readout, down), 1},
      {"mean", FLOATS, AT(readout, mean), 1},
      {"spread", FLOATS, AT(readout, spread), 1},
      {"scale", FLOATS, AT(readout, scale), 1},
      {"gated", COUNT_OF, AT(readout, gated), 1}}},
    {"sketch",
     {{"reduce", WEIGHT, AT(sketch, reduce), 0},
      {"expand", WEIGHT, AT(sketch, expand), 0},
      {"candidates", COUNT_OF, AT(sketch, candidates), 0}}},
    {"shortlist", {{"head", WEIGHT, AT(shortlist, head), 0}, {"tokens", INTEGERS, AT(shortlist, tokens), 0}}},
    {"guesses",
     {{"keys", KEYS, AT(guesses, keys), 0},
      {"values", KEYS, AT(guesses, values), 0},
      {"shortest", COUNT_OF, AT(guesses, shortest), 0},
      {"longest", COUNT_OF, AT(guesses, longest), 0}}},
};
offramp_part *offramp_part_new(const char *kind, offramp_error *error) {
    for (size_t i = 0; i < sizeof KINDS_OF_PARTS / sizeof *KINDS_OF_PARTS; i++) {
        if (strcmp(kind, KINDS_OF_PARTS[i].name)) continue;
        offramp_part *part = calloc(1, sizeof *part);
        if (part)
            part->kind = KINDS_OF_PARTS + i;
        else
            fail(error, OFFRAMP_NO_MEMORY, "There is no memory for a part of a model.");
        return part;
    }
    fail(error, OFFRAMP_INVALID, "There are no parts of the kind '%.40s'.", kind);
    return NULL;
}

void offramp_part_free(offramp_part *part) { free(part); }

// The place of a field of this name, which is marked as given; NULL if the part has none of this type.
static void *place_of(offramp_part *part, const char *name, unsigned holds, offramp_error *error) {
    const Field *fields = part->kind->fields;
    for (int i = 0; fields[i].name; i++) {
        if (strcmp(name, fields[i].name) || !(holds >> fields[i].holds & 1)) continue;
        part->given |= (uint64_t)1 << i;
        return (char *)part + fields[i].place;
    }
    fail(error, OFFRAMP_INVALID, "A part of the kind '%s' has no '%.40s' of this type.", part->kind->name,
         name);
    return NULL;
}

offramp_status check_weight(const Weight *m, const char *name, offramp_error *error) {
    const int64_t most = INT32_MAX;
    const int stacked = m->type == OFFRAMP_STACKED;
    if (m->type < OFFRAMP_FLOAT32 || m->type > OFFRAMP_STACKED)
        return fail(error, OFFRAMP_INVALID, "The weight '%.40s' has a type that weights cannot have.", name);
    // Columns that have one scale stand together.
    const int64_t unit = in_panels(m) && LAYOUTS[m->type].super ? SUPER
                         : m->type >= OFFRAMP_INT8 && !stacked  ? GROUP
                                                                : 1;
    if (m->rows < 1 || m->columns < 1 || m->rows > most || m->columns > most || m->columns % unit)
        return fail(error, OFFRAMP_INVALID,
                    "The weight '%.40s' has %lld rows of %lld; rows of a multiple of %lld are needed.", name,
                    (long long)m->rows, (long long)m->columns, (long long)unit);
    if (!m->values || (m->type == OFFRAMP_INT8 && !m->scales) || (stacked ? m->pieces < 1 : m->pieces != 0))
        return fail(error, OFFRAMP_INVALID, "The weight '%.40s' has no numbers.", name);
    int64_t rows = 0;
    for (int64_t i = 0; stacked && i < m->pieces; i++) {
        const Weight *piece = (const Weight *)m->values + i;
        if (check_weight(piece, name, error)) return OFFRAMP_INVALID;
        if (piece->type == OFFRAMP_STACKED || piece->type == OFFRAMP_INT8 || piece->columns != m->columns)
            return fail(error, OFFRAMP_INVALID,
                        "The weight '%.40s' has a piece that cannot be stacked: its type or its columns.",
                        name);
        rows += piece->rows;
    }
    if (stacked && rows != m->rows)
        return fail(error, OFFRAMP_INVALID, "The pieces of the weight '%.40s' have %lld rows, and not %lld.",
                    name, (long long)rows, (long long)m->rows);
    return OFFRAMP_OK;
}

offramp_status offramp_part_weight(offramp_part *part, const char *name, const offramp_weight *weight,
                                   offramp_error *error) {
    if (check_weight(weight, name, error)) return OFFRAMP_INVALID;
    Weight *place = place_of(part, name, 1 << WEIGHT, error);
    if (!place) return OFFRAMP_INVALID;
    *place = *weight;
    return OFFRAMP_OK;
}

offramp_status offramp_part_array(offramp_part *part, const char *name, offramp_type type, const void *values,
                                  int64_t count, offramp_error *error) {
    unsigned holds = 0;
    if (type == OFFRAMP_FLOAT32) holds = 1 << FLOATS;
    if (type == OFFRAMP_INT64) holds = 1 << INTEGERS;
    if (type == OFFRAMP_UINT32) holds = 1 << KEYS;
    if (count < 0 || (count && !values))
        return fail(error, OFFRAMP_INVALID, "The array '%.40s' has no numbers.", name);
    Array *place = place_of(part, name, holds, error);
    if (!place) return OFFRAMP_INVALID;
    *place = (Array){values, count};
    return OFFRAMP_OK;
}

offramp_status offramp_part_number(offramp_part *part, const char *name, double value, offramp_error *error) {
    float *real = place_of(part, name, 1 << REAL, NULL);
    if (real) {
        *real = (float)value;
        return OFFRAMP_OK;
    }
    const uint64_t given = part->given;
    int64_t *count = place_of(part, name, 1 << COUNT_OF, error);
    if (!count) return OFFRAMP_INVALID;
    if (!(value >= 0 && value <= INT32_MAX && value == floor(value))) {
        part->given = given;
        return fail(error, OFFRAMP_INVALID, "'%.40s' is a whole number of 0 or more, and not %g.", name,
                    value);
    }
    *count = (int64_t)value;
    return OFFRAMP_OK;
}

offramp_status check_kind(const offramp_part *part, const char *kind, offramp_error *error) {
    if (!part || strcmp(part->kind->name, kind))
        return fail(error, OFFRAMP_INVALID, "A part of the kind '%s' is needed here.", kind);
    const Field *fields = part->kind->fields;
    for (int i = 0; fields[i].name; i++)
        if (!fields[i].optional && !(part->given >> i & 1))
            return fail(error, OFFRAMP_INVALID, "A part of the kind '%s' lacks its '%s'.", kind,
                        fields[i].name);
    return OFFRAMP_OK;
}
