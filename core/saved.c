// What offramp's export writes into a GGUF file: parts of the library by number. In a file of exits they are those
// of exits, with the rules of a plan for each mode; in a file of the architecture `offramp-model`, those of a
// whole model.
//
// `offramp.parts` counts the parts. Part 7 has its kind under `offramp.part.7.kind`, its numbers under
// `offramp.part.7.NAME`, its arrays as tensors `7.NAME`, and its weights as tensors of bytes `7.NAME`, with their
// type, rows, columns, whether they are fine, and how many pieces they have under `offramp.part.7.NAME`; biases
// and scales are tensors `7.NAME.bias` and `7.NAME.scales`, and the pieces of a stacked weight are weights
// `7.NAME.0`, … A part of the kind `ends` without an embedding has the head for it.
//
// The rules of the first mode are under `offramp.mode.0.NAME`, by the names of offramp_rules and of offramp_exit;
// `offramp.mode.0.name` is the mode's. A model's part 0 is its ends; `offramp.blocks.attention`, `.mixer` and
// `.mlp` name the parts of its blocks. Parts are named by their number; -1 is none.

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "file.h"
#include "layouts.h"
#include "plan.h"

enum { MOST_PARTS = 4096, MOST_PIECES = 64, MOST_MODES = 4096, NAME_ROOM = 160, MOST_EXITS = 64 };

static const Entry *key_of(const offramp_file *file, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
static const Entry *key_of(const offramp_file *file, const char *format, ...) {
    char name[NAME_ROOM];
    va_list values;
    va_start(values, format);
    vsnprintf(name, sizeof name, format, values);
    va_end(values);
    return entry_of(&file->gguf, name);
}

static const Tensor *tensor_at(const offramp_file *file, int64_t part, const char *field, const char *what) {
    char name[NAME_ROOM];
    snprintf(name, sizeof name, "%lld.%.60s%s", (long long)part, field, what);
    return tensor_of(&file->gguf, name);
}

const offramp_part *part_at(const offramp_file *file, int64_t number) {
    return number >= 0 && number < file->parts_count ? file->parts[number] : NULL;
}

static int64_t entries_of(const Tensor *t) { return t->shape[0] * t->shape[1] * t->shape[2] * t->shape[3]; }

// The bytes of a weight; -1 for a type or a shape that it cannot have.
static int64_t bytes_of(const offramp_weight *w) {
    if (w->type >= OFFRAMP_Q4_0 && w->type <= OFFRAMP_IQ4_XS)
        return offramp_packed_bytes(w->type, w->rows, w->columns);
    const int64_t each = w->type == OFFRAMP_FLOAT32                                  ? 4
                         : w->type == OFFRAMP_BFLOAT16 || w->type == OFFRAMP_FLOAT16 ? 2
                         : w->type == OFFRAMP_INT8                                   ? 1
                                                                                     : -1;
    return w->rows > 0 && w->columns > 0 && w->rows <= INT32_MAX && w->columns <= INT32_MAX
               ? w->rows * w->columns * each
               : -1;
}

static const float *beside(const offramp_file *file, int64_t number, const char *field, const char *what,
                           int64_t count) {
    const Tensor *t = tensor_at(file, number, field, what);
    return t && t->type == OFFRAMP_FLOAT32 && entries_of(t) == count ? (const float *)t->values : NULL;
}

static offramp_status damaged(int64_t part, const char *field, offramp_error *error) {
    return fail(error, OFFRAMP_INVALID, "The file is damaged: '%.60s' of part %lld.", field, (long long)part);
}

// The weight of a part under a name, as the file says it; of one in pieces, without them. 0 if it does not fit.
static int weight_at(const offramp_file *file, int64_t number, const char *name, offramp_weight *w) {
    const Entry *shape = key_of(file, "offramp.part.%lld.%.60s", (long long)number, name);
    const Tensor *t = tensor_at(file, number, name, "");
    *w = (offramp_weight){.type = integer_of(shape, 0, -1),
                          .rows = integer_of(shape, 1, -1),
                          .columns = integer_of(shape, 2, -1),
                          .fine = integer_of(shape, 3, 0) == 1};
    if (w->type == OFFRAMP_STACKED) {
        w->pieces = integer_of(shape, 4, 0);
        return 1;
    }
    if (!t || t->type != OFFRAMP_INT8 || t->bytes != bytes_of(w)) return 0;
    w->values = t->values;
    w->bias = beside(file, number, name, ".bias", w->rows);
    w->scales = beside(file, number, name, ".scales", w->rows);
    return 1;
}

// The pieces of a weight; NULL if they do not fit, or if there is no memory.
static const offramp_weight *pieces_of(offramp_file *file, int64_t number, const char *name, int64_t count) {
    const int bad = count < 1 || count > MOST_PIECES;
    offramp_weight *pieces = bad ? NULL : keep(file, count * (int64_t)sizeof *pieces);
    for (int64_t i = 0; pieces && i < count; i++) {
        char piece[NAME_ROOM];
        snprintf(piece, sizeof piece, "%.40s.%lld", name, (long long)i);
        if (!weight_at(file, number, piece, pieces + i) || !pieces[i].values) return NULL;
    }
    return pieces;
}

// `from`: the name of the weight in the file.
static offramp_status read_weight(offramp_file *file, int64_t number, const char *field, const char *from,
                                  offramp_error *error) {
    offramp_weight w;
    if (!weight_at(file, number, from, &w)) return damaged(number, field, error);
    if (w.type == OFFRAMP_STACKED) w.values = pieces_of(file, number, from, w.pieces);
    return offramp_part_weight(file->parts[number], field, &w, error);
}

static offramp_status read_field(offramp_file *file, int64_t number, const Field *field,
                                 offramp_error *error) {
    const Tensor *t = tensor_at(file, number, field->name, "");
    const Entry *given = key_of(file, "offramp.part.%lld.%.60s", (long long)number, field->name);
    const int is_number = field->holds == COUNT_OF || field->holds == REAL;
    if (field->holds == WEIGHT && !given &&
        !strcmp(field->name, "embedding"))  // a head that is the embedding
        return read_weight(file, number, field->name, "head", error);
    if (field->holds == WEIGHT ? !given : is_number ? !given : !t)
        return OFFRAMP_OK;  // what is needed is missed when a model or a plan is made
    if (field->holds == WEIGHT) return read_weight(file, number, field->name, field->name, error);
    if (is_number) return offramp_part_number(file->parts[number], field->name, real_of(given, 0, 0), error);
    if (t->type < 0) return damaged(number, field->name, error);
    return offramp_part_array(file->parts[number], field->name, t->type, t->values, entries_of(t), error);
}

offramp_status load_saved_parts(offramp_file *file, offramp_error *error) {
    const int64_t count = integer_of(key_of(file, "offramp.parts"), 0, -1);
    NEED(count >= 0 && count <= MOST_PARTS, "The file names no parts.");
    for (int64_t i = 0; i < count; i++) {
        const Bytes kind = text_of(key_of(file, "offramp.part.%lld.kind", (long long)i));
        char name[NAME_ROOM];
        snprintf(name, sizeof name, "%.*s", (int)min_(kind.length, NAME_ROOM - 1), kind.at);
        offramp_part *part = keep_part(file, name, error);
        if (!part) return OFFRAMP_INVALID;
        for (const Field *field = part->kind->fields; field->name; field++)
            if (read_field(file, i, field, error)) return OFFRAMP_INVALID;
    }
    return OFFRAMP_OK;
}

// Models ------------------------------------------------------------------------------------------

offramp_status read_rotary(offramp_file *file, offramp_error *error) {
    for (int table = 1; table <= MOST_TABLES; table++) {
        const Entry *given = key_of(file, "offramp.rotary.%d.frequencies", table);
        if (!given) continue;
        float *frequencies = keep(file, given->count * (int64_t)sizeof *frequencies);
        if (!frequencies) return fail(error, OFFRAMP_NO_MEMORY, "There is no memory for a rotary table.");
        for (int64_t i = 0; i < given->count; i++) frequencies[i] = (float)real_of(given, i, 0);
        const double factor = real_of(key_of(file, "offramp.rotary.%d.factor", table), 0, 1);
        if (offramp_model_rotary(file->model, table, frequencies, given->count, factor, error))
            return OFFRAMP_INVALID;
    }
    return OFFRAMP_OK;
}

static offramp_status make_model(offramp_file *file, const offramp_part **parts, int64_t blocks,
                                 offramp_error *error) {
    static const char *const names[] = {"attention", "mixer", "mlp"};
    for (int64_t k = 0; k < 3; k++)
        for (int64_t i = 0; i < blocks; i++)
            parts[k * blocks + i] =
                part_at(file, integer_of(key_of(file, "offramp.blocks.%s", names[k]), i, -1));
    file->model =
        offramp_model_new(part_at(file, 0), parts, parts + blocks, parts + 2 * blocks, blocks, error);
    return file->model ? read_rotary(file, error) : OFFRAMP_INVALID;
}

offramp_status load_saved_model(offramp_file *file, offramp_error *error) {
    const Entry *named = key_of(file, "offramp.blocks.mlp");
    const int64_t blocks = named ? named->count : 0;
    NEED(blocks > 0 && blocks <= MOST_PARTS, "The file names no blocks.");
    file->plain = integer_of(key_of(file, "offramp.keys_in_float32"), 0, 0) == 1;
    file->context = integer_of(key_of(file, "offramp.context"), 0, 0);
    NEED(file->context > 1, "The file's sizes are not those of a model.");
    if (load_saved_parts(file, error)) return OFFRAMP_INVALID;
    const offramp_part **parts = malloc(3 * blocks * sizeof *parts);
    const offramp_status status = parts ? make_model(file, parts, blocks, error)
                                        : fail(error, OFFRAMP_NO_MEMORY, "There is no memory for a model.");
    free(parts);
    return status;
}

// Plans -------------------------------------------------------------------------------------------

// A field of a structure, under its name.
typedef struct {
    const char *name;
    enum { INTEGER, NUMBER, PART } is;
    size_t place;
} Given;

#define RULE(name, is) {#name, is, offsetof(offramp_rules, name)}
static const Given RULES[] = {
    RULE(middle, INTEGER),     RULE(pending, INTEGER),         RULE(alike, INTEGER),  RULE(decay, NUMBER),
    RULE(sketch, PART),        RULE(exit_sketch, PART),        RULE(shortlist, PART), RULE(guesses, PART),
    RULE(head_flops, INTEGER), RULE(exit_head_flops, INTEGER),
};
#define OF_EXIT(name, is) {"exits." #name, is, offsetof(offramp_exit, name)}
static const Given EXIT_RULES[] = {
    OF_EXIT(after, INTEGER),      OF_EXIT(tail, INTEGER),
    OF_EXIT(gate, PART),          OF_EXIT(readout, PART),
    OF_EXIT(threshold, NUMBER),   OF_EXIT(perhaps, NUMBER),
    OF_EXIT(key, NUMBER),         OF_EXIT(asking, NUMBER),
    OF_EXIT(gate_flops, INTEGER), OF_EXIT(readout_flops, INTEGER),
};
#define COUNT(table) (sizeof(table) / sizeof *(table))

static void read_given(const offramp_file *file, int64_t mode, const Given *fields, size_t count, int64_t i,
                       void *structure) {
    for (size_t f = 0; f < count; f++) {
        const Entry *given = key_of(file, "offramp.mode.%lld.%s", (long long)mode, fields[f].name);
        void *place = (char *)structure + fields[f].place;
        if (fields[f].is == INTEGER) *(int64_t *)place = integer_of(given, i, 0);
        if (fields[f].is == NUMBER) *(double *)place = real_of(given, i, 0);
        if (fields[f].is == PART) *(const offramp_part **)place = part_at(file, integer_of(given, i, -1));
    }
}

static void read_numbers(const offramp_file *file, int64_t mode, const char *name, double *values,
                         int64_t count) {
    const Entry *given = key_of(file, "offramp.mode.%lld.%s", (long long)mode, name);
    for (int64_t i = 0; i < count; i++) values[i] = real_of(given, i, 0);
}

static Bytes name_of(const offramp_file *exits, int64_t mode) {
    return text_of(key_of(exits, "offramp.mode.%lld.name", (long long)mode));
}

int64_t offramp_file_mode(const offramp_file *exits, const char *name) {
    for (int64_t i = 0; i < MOST_MODES && name_of(exits, i).length; i++)
        if (bytes_are(name_of(exits, i), name)) return i;
    return -1;
}

static offramp_status no_mode(const offramp_file *exits, const char *name, offramp_error *error) {
    char listed[NAME_ROOM] = "";
    int64_t used = 0;
    for (int64_t i = 0; i < MOST_MODES && name_of(exits, i).length; i++) {
        const Bytes own = name_of(exits, i);
        used += snprintf(listed + used, sizeof listed - used, ", %.*s", (int)min_(own.length, 20), own.at);
        used = min_(used, (int64_t)sizeof listed - 1);
    }
    return fail(error, OFFRAMP_INVALID, "These exits have no mode '%.20s', only full%s.", name, listed);
}

// The costs of blocks, as offramp's export wrote them beside the weights; NULL where it did not.
static offramp_block_costs *costs_of(const offramp_file *model, int64_t blocks) {
    static const char *const names[] = {"flops", "seen_flops", "key_flops", "state_flops"};
    offramp_block_costs *costs = calloc(blocks + 1, sizeof *costs);
    for (int64_t i = 0; costs && i < blocks; i++) {
        int64_t *numbers[] = {&costs[i].flops, &costs[i].seen_flops, &costs[i].key_flops,
                              &costs[i].state_flops};
        for (int k = 0; k < 4; k++)
            *numbers[k] = integer_of(key_of(model, "offramp.costs.%s", names[k]), i, 0);
    }
    return costs;
}

static offramp_status read_rules(const offramp_file *exits, const char *name, offramp_rules *rules,
                                 offramp_exit *places, offramp_error *error) {
    const int64_t mode = offramp_file_mode(exits, name);
    if (mode < 0) return no_mode(exits, name, error);
    const Entry *after = key_of(exits, "offramp.mode.%lld.exits.after", (long long)mode);
    rules->count = after ? after->count : 0, rules->exits = places;
    NEED(rules->count <= MOST_EXITS, "The exits' file has more exits than a model can use.");
    read_given(exits, mode, RULES, COUNT(RULES), 0, rules);
    for (int64_t e = 0; e < rules->count; e++)
        read_given(exits, mode, EXIT_RULES, COUNT(EXIT_RULES), e, places + e);
    int64_t names[3];
    static const char *const kinds[] = {"fill", "confidence", "key"};
    for (int k = 0; k < 3; k++)
        names[k] = integer_of(key_of(exits, "offramp.mode.%lld.%s", (long long)mode, kinds[k]), 0, -1);
    NEED(names[0] >= OFFRAMP_PROJECT && names[0] <= OFFRAMP_VERIFY && names[1] >= OFFRAMP_GATE &&
             names[1] <= OFFRAMP_ENTROPY && names[2] > OFFRAMP_GATE && names[2] <= OFFRAMP_ENTROPY,
         "The exits' file is damaged: the rules of the mode %.20s.", name);
    rules->fill = (offramp_fill)names[0];
    rules->confidence = (offramp_confidence)names[1], rules->key = (offramp_confidence)names[2];
    read_numbers(exits, mode, "row_costs", rules->row_costs, OFFRAMP_MOST_DRAFTS + 1);
    read_numbers(exits, mode, "accepted", rules->accepted, OFFRAMP_DEPTHS);
    return OFFRAMP_OK;
}

// Whether exits learned from these weights, as far as both files say what they are.
static offramp_status fits(const offramp_file *model, const offramp_file *exits, offramp_error *error) {
    const Bytes own = text_of(key_of(model, "offramp.fingerprint")),
                learned = text_of(key_of(exits, "offramp.fingerprint"));
    NEED(!own.length || !learned.length ||
             (own.length == learned.length && !memcmp(own.at, learned.at, own.length)),
         "These exits learned from other weights than the model's: offramp export --gguf writes both files.");
    return OFFRAMP_OK;
}

offramp_plan *offramp_file_plan(const offramp_file *model, const offramp_file *exits, const char *mode,
                                offramp_error *error) {
    offramp_rules rules = {.key = OFFRAMP_MAX_PROB, .pending = 1};
    offramp_exit places[MOST_EXITS] = {0};
    if (!model->model || (exits && exits->model))
        return fail(error, OFFRAMP_INVALID, "A plan needs the file of a model, and perhaps one of exits."),
               NULL;
    const int full = !strcmp(mode, "full");
    if (!full && !exits)
        return fail(error, OFFRAMP_INVALID, "The mode %.20s needs exits, and none are given.", mode), NULL;
    if (exits && fits(model, exits, error)) return NULL;
    if (!full && read_rules(exits, mode, &rules, places, error)) return NULL;
    if (full) rules.head_flops = integer_of(key_of(model, "offramp.head_flops"), 0, 0);
    offramp_block_costs *costs = costs_of(model, model->model->count);
    rules.costs = costs;
    offramp_plan *plan = costs ? offramp_plan_new(model->model, &rules, error) : NULL;
    if (!costs) fail(error, OFFRAMP_NO_MEMORY, "There is no memory for a plan.");
    const offramp_file *const files[] = {model, exits};
    for (int i = 0; plan && i < 2; i++)
        if (files[i])
            plan->files[i].stream = files[i]->gguf.stream, plan->files[i].bytes = files[i]->gguf.size;
    free(costs);
    return plan;
}
