// Makes a model of a GGUF file's weights, each in the file's own type.

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "file.h"

// What the architectures that offramp runs from a file differ in.
typedef struct {
    const char *name;
    int halves;  // dims that turn together are half a head apart in the file, and not side by side
} Architecture;
static const Architecture ARCHITECTURES[] = {{"llama", 0}, {"qwen2", 1}, {"qwen3", 1}};

// What is known while a model is made. `turned`: dims of a head that turn with positions. `coarse`: names of
// weights whose rows may be rounded to 8 bits, where offramp's export says so.
typedef struct {
    offramp_file *file;
    const Gguf *gguf;
    const Architecture *kind;
    offramp_error *error;
    Bytes *coarse;
    int64_t coarse_count, block, blocks, hidden, queries, heads, dim, turned;
    double eps;
} Loading;

static const Entry *key_of(const Loading *l, const char *key) {
    char whole[160];
    snprintf(whole, sizeof whole, "%s.%s", l->kind->name, key);
    return entry_of(l->gguf, whole);
}

static const Tensor *of_block(const Loading *l, const char *name, const char *what) {
    char whole[160];
    snprintf(whole, sizeof whole, "blk.%lld.%s.%s", (long long)l->block, name, what);
    return tensor_of(l->gguf, whole);
}

static offramp_status missing(const Loading *l, const char *names) {
    return fail(l->error, OFFRAMP_INVALID,
                "The file has no tensors %s for block %lld, or some of another type or shape.", names,
                (long long)l->block);
}

// Whether rows are rounded to 16 bits before they are multiplied with a weight of a block.
static int is_fine(const Loading *l, const char *field) {
    char whole[160];
    snprintf(whole, sizeof whole, "%lld.%s", (long long)l->block, field);
    for (int64_t i = 0; i < l->coarse_count; i++)
        if (bytes_are(l->coarse[i], whole)) return 0;
    return 1;
}

// A vector of float32 numbers, as it lies in the file; NULL if there is none of this length.
static const float *vector_of(const Tensor *t, int64_t count) {
    return t && t->type == OFFRAMP_FLOAT32 && t->dims == 1 && t->shape[0] == count ? (const float *)t->values
                                                                                   : NULL;
}

// The file's pages of a tensor that was copied need not stay in memory.
static void let_go(const Tensor *t) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE),
                    begin = ((uintptr_t)t->values + page - 1) / page * page,
                    end = ((uintptr_t)t->values + t->bytes) / page * page;
    if (end > begin) madvise((void *)begin, end - begin, MADV_DONTNEED);
}

// Matrices of one type as one weight, one above another, in the type that the file has them in. Rows of a
// matrix are `orders`[0], … if that is not NULL. 0 if they do not fit, or if there is no memory.
static int join(Loading *l, const Tensor *const *tensors, const float *const *biases,
                const int64_t *const *orders, int count, offramp_weight *w) {
    const Tensor *t = *tensors;
    if (!t || t->dims != 2 || t->type < 0 || t->type >= OFFRAMP_STACKED || t->type == OFFRAMP_INT8) return 0;
    const int64_t row_bytes = t->bytes / t->shape[1];
    const int packs = t->type >= OFFRAMP_Q4_0;
    *w = (offramp_weight){.type = t->type, .columns = t->shape[0], .fine = packs};
    l->file->plain &= t->type == OFFRAMP_FLOAT32;
    int copies = count > 1, has_bias = 0;
    for (int i = 0; i < count; i++) {
        if (tensors[i]->dims != 2 || tensors[i]->shape[0] != w->columns) return 0;
        w->rows += tensors[i]->shape[1], copies |= orders[i] != NULL, has_bias |= biases[i] != NULL;
    }
    const int64_t bytes = packs ? offramp_packed_bytes(t->type, w->rows, w->columns) : w->rows * row_bytes;
    uint8_t *from = copies ? malloc(w->rows * row_bytes) : (uint8_t *)t->values;
    float *bias = has_bias ? keep(l->file, w->rows * (int64_t)sizeof *bias) : NULL;
    for (int64_t i = 0, row = 0; i < count; i++)
        for (int64_t r = 0; r < tensors[i]->shape[1]; r++, row++) {
            const int64_t place = orders[i] ? orders[i][r] : r;
            if (copies && from)
                memcpy(from + row * row_bytes, tensors[i]->values + place * row_bytes, row_bytes);
            if (bias) bias[row] = biases[i] ? biases[i][r] : 0;
        }
    void *own = from && (copies || packs) && bytes > 0 ? keep(l->file, bytes) : NULL;
    if (own && packs && offramp_pack(t->type, from, w->rows, w->columns, own, l->error)) own = NULL;
    if (own && !packs) memcpy(own, from, bytes);
    if (copies) free(from);
    for (int i = 0; i < count && (copies || packs); i++) let_go(tensors[i]);
    w->values = copies || packs ? own : t->values, w->bias = bias;
    return w->values && (bias || !has_bias);
}

static int weight_of(Loading *l, const Tensor *t, offramp_weight *w) {
    return join(l, &t, (const float *const[]){NULL}, (const int64_t *const[]){NULL}, 1, w);
}

// Several matrices, one above another: a weight of each run of them that has one type, if it becomes panels.
// Others stay where the file has them.
static int stack_of(Loading *l, const Tensor *const *tensors, const float *const *biases,
                    const int64_t *const *orders, int count, offramp_weight *w) {
    offramp_weight *pieces = keep(l->file, count * (int64_t)sizeof *pieces);
    int64_t found = 0;
    int mixed = 0;
    if (!pieces) return 0;
    *w = (offramp_weight){.type = OFFRAMP_STACKED, .values = pieces};
    for (int i = 0, next; i < count; i = next) {
        if (!tensors[i]) return 0;
        const int type = tensors[i]->type;
        for (next = i + 1; next < count && type >= OFFRAMP_Q4_0 && tensors[next]; next++)
            if (tensors[next]->type != type) break;
        if (!join(l, tensors + i, biases + i, orders + i, next - i, pieces + found)) return 0;
        w->rows += pieces[found].rows, w->columns = pieces[found].columns, mixed |= type != pieces->type;
        if (pieces[found++].columns != pieces->columns) return 0;
    }
    w->pieces = found, w->fine = mixed || pieces->fine;
    if (found == 1) *w = *pieces;
    return 1;
}

// Rows of heads in the order that compiled code has: dims that turn together side by side. NULL where the
// file has them so.
static const int64_t *order_of(Loading *l, int64_t heads) {
    const int64_t P = l->dim, turned = l->turned;
    int64_t *order = l->kind->halves ? keep(l->file, heads * P * (int64_t)sizeof *order) : NULL;
    for (int64_t i = 0; order && i < heads * P; i++) {
        const int64_t p = i % P;
        order[i] = i - p + (p < turned ? p / 2 + p % 2 * (turned / 2) : p);
    }
    return order;
}

// A vector in the order of its rows.
static const float *in_order(Loading *l, const float *values, const int64_t *order, int64_t count) {
    float *own = values && order ? keep(l->file, count * (int64_t)sizeof *own) : NULL;
    for (int64_t i = 0; own && i < count; i++) own[i] = values[order[i]];
    return order ? own : values;
}

// Gives a part something. What is refused is found when the model is made: the part is not complete then.
static void give(const Loading *l, offramp_part *part, const char *name, const float *values, int64_t count) {
    if (values) offramp_part_array(part, name, OFFRAMP_FLOAT32, values, count, l->error);
}
static void give_weight(const Loading *l, offramp_part *part, const char *name, offramp_weight weight) {
    weight.fine &= is_fine(l, name);
    offramp_part_weight(part, name, &weight, l->error);
}
static void give_number(const Loading *l, offramp_part *part, const char *name, double value) {
    offramp_part_number(part, name, value, l->error);
}

// The norm before a part; 0 if the file has none.
static int give_norm(const Loading *l, offramp_part *part, const char *name) {
    const float *norm = vector_of(of_block(l, name, "weight"), l->hidden);
    give(l, part, "norm", norm, l->hidden);
    give_number(l, part, "eps", l->eps);
    return norm != NULL;
}

// Refuses a block with tensors that are not read here, as it would compute something else without them.
static int refused(const Loading *l, const char *const *names, int count, const char *what) {
    for (int i = 0; i < count; i++) {
        if (!of_block(l, names[i], what)) continue;
        fail(l->error, OFFRAMP_INVALID, "Block %lld has a tensor %s.%s that this program does not read.",
             (long long)l->block, names[i], what);
        return 1;
    }
    return 0;
}

// Norms of queries and keys over each head, where the file has some.
static int give_head_norms(Loading *l, offramp_part *part) {
    static const char *const names[][2] = {{"attn_q_norm", "q_norm"}, {"attn_k_norm", "k_norm"}};
    const int64_t *order = order_of(l, 1);
    for (int i = 0; i < 2; i++) {
        const float *norm = vector_of(of_block(l, names[i][0], "weight"), l->dim);
        if (!norm) return !refused(l, (const char *const[]){names[0][0], names[1][0]}, 2, "weight");
        give(l, part, names[i][1], in_order(l, norm, order, l->dim), l->dim);
    }
    give_number(l, part, "norm_heads", 1), give_number(l, part, "head_eps", l->eps);
    return 1;
}

static offramp_part *attention_of(Loading *l) {
    static const char *const names[] = {"attn_q", "attn_k", "attn_v"};
    const int64_t P = l->dim, rows[] = {l->queries * P, l->heads * P, l->heads * P};
    const Tensor *tensors[3];
    const float *biases[3];
    offramp_weight qkv, o;
    for (int i = 0; i < 3; i++) {
        tensors[i] = of_block(l, names[i], "weight");
        if (!tensors[i] || tensors[i]->type < 0 || tensors[i]->dims != 2 || tensors[i]->shape[1] != rows[i])
            return missing(l, "attn_q, attn_k and attn_v"), NULL;
    }
    const int64_t *const orders[] = {order_of(l, l->queries), order_of(l, l->heads), NULL};
    for (int i = 0; i < 3; i++) {
        biases[i] = in_order(l, vector_of(of_block(l, names[i], "bias"), rows[i]), orders[i], rows[i]);
        if (!biases[i] && refused(l, names + i, 1, "bias")) return NULL;
    }
    offramp_part *part = keep_part(l->file, "attention", l->error);
    if (!part) return NULL;
    if (!stack_of(l, tensors, biases, orders, 3, &qkv) ||
        !weight_of(l, of_block(l, "attn_output", "weight"), &o))
        return missing(l, "attn_q, attn_k, attn_v and attn_output"), NULL;
    give_weight(l, part, "qkv", qkv), give_weight(l, part, "o", o);
    if (!give_norm(l, part, "attn_norm")) return missing(l, "attn_norm"), NULL;
    if (!give_head_norms(l, part) || refused(l, (const char *const[]){"attn_output"}, 1, "bias")) return NULL;
    give_number(l, part, "heads", (double)l->heads), give_number(l, part, "dim", (double)P);
    give_number(l, part, "rotary", 1), give_number(l, part, "scale", 1 / sqrt((double)P));
    return part;
}

static offramp_part *mlp_of(Loading *l) {
    const Tensor *const tensors[] = {of_block(l, "ffn_gate", "weight"), of_block(l, "ffn_up", "weight")};
    offramp_weight gate_up, down;
    offramp_part *part = keep_part(l->file, "mlp", l->error);
    if (!part) return NULL;
    if (!stack_of(l, tensors, (const float *const[]){NULL, NULL}, (const int64_t *const[]){NULL, NULL}, 2,
                  &gate_up) ||
        !weight_of(l, of_block(l, "ffn_down", "weight"), &down))
        return missing(l, "ffn_gate, ffn_up and ffn_down"), NULL;
    give_weight(l, part, "gate_up", gate_up), give_weight(l, part, "down", down);
    if (!give_norm(l, part, "ffn_norm")) return missing(l, "ffn_norm"), NULL;
    if (refused(l, (const char *const[]){"ffn_gate", "ffn_up", "ffn_down"}, 3, "bias")) return NULL;
    give_number(l, part, "activation", OFFRAMP_SILU);
    return part;
}

static offramp_part *ends_of(Loading *l) {
    const Tensor *embedding = tensor_of(l->gguf, "token_embd.weight"),
                 *head = tensor_of(l->gguf, "output.weight"),
                 *norm = tensor_of(l->gguf, "output_norm.weight");
    offramp_weight own, read;
    offramp_part *part = keep_part(l->file, "ends", l->error);
    if (!part) return NULL;
    if (!weight_of(l, embedding, &own) || (head && !weight_of(l, head, &read)) || own.columns != l->hidden ||
        !vector_of(norm, l->hidden)) {
        fail(l->error, OFFRAMP_INVALID,
             "The file has no embedding, head and final norm that fit each other.");
        return NULL;
    }
    give_weight(l, part, "embedding", own), give_weight(l, part, "head", head ? read : own);
    give(l, part, "norm", vector_of(norm, l->hidden), l->hidden);
    give_number(l, part, "eps", l->eps);
    return part;
}

// How far dims turn at each position: as offramp's export found it, or by the base that the file names.
static offramp_status give_rotary(Loading *l) {
    offramp_error *error = l->error;
    if (entry_of(l->gguf, "offramp.rotary.1.frequencies")) return read_rotary(l->file, error);
    const double base = real_of(key_of(l, "rope.freq_base"), 0, 10000);
    const int64_t count = l->turned / 2;
    NEED(!key_of(l, "rope.scaling.type") && !tensor_of(l->gguf, "rope_freqs.weight"),
         "The file scales its rotary positions: offramp export --gguf writes it as this program reads it.");
    float *frequencies = keep(l->file, count * (int64_t)sizeof *frequencies);
    if (!frequencies) return fail(error, OFFRAMP_NO_MEMORY, "There is no memory for a rotary table.");
    for (int64_t i = 0; i < count; i++)
        frequencies[i] = 1 / powf((float)base, 2 * (float)i / (float)l->turned);
    return offramp_model_rotary(l->file->model, 1, frequencies, count, 1, error);
}

enum { MOST_HIDDEN = 1 << 20, MOST_HEADS = 1 << 16, MOST_LAYERS = 10000 };

static int lies_in(int64_t value, int64_t least, int64_t most) { return least <= value && value <= most; }

static offramp_status read_sizes(Loading *l) {
    offramp_error *error = l->error;
    l->hidden = integer_of(key_of(l, "embedding_length"), 0, 0);
    l->blocks = integer_of(key_of(l, "block_count"), 0, 0);
    l->queries = integer_of(key_of(l, "attention.head_count"), 0, 0);
    l->heads = integer_of(key_of(l, "attention.head_count_kv"), 0, l->queries);
    l->file->context = integer_of(key_of(l, "context_length"), 0, 2048);
    NEED(lies_in(l->hidden, 1, MOST_HIDDEN) && lies_in(l->blocks, 1, MOST_LAYERS) &&
             lies_in(l->queries, 1, MOST_HEADS) && lies_in(l->heads, 1, l->queries) && l->file->context > 1,
         "The file's sizes are not those of a model.");
    l->dim = integer_of(key_of(l, "attention.key_length"), 0, l->hidden / l->queries);
    l->turned = integer_of(key_of(l, "rope.dimension_count"), 0, l->dim);
    l->eps = real_of(key_of(l, "attention.layer_norm_rms_epsilon"), 0, 1e-5);
    NEED(lies_in(l->dim, 2, MOST_HEADS) && lies_in(l->turned, 0, l->dim) && l->turned % 2 == 0,
         "The file's sizes are not those of a model.");
    return OFFRAMP_OK;
}

static offramp_status load_parts(Loading *l, const offramp_part **attentions, const offramp_part **mlps) {
    l->block = -1;
    const offramp_part *ends = ends_of(l);
    if (!ends) return OFFRAMP_INVALID;
    for (l->block = 0; l->block < l->blocks; l->block++) {
        attentions[l->block] = attention_of(l);
        mlps[l->block] = attentions[l->block] ? mlp_of(l) : NULL;
        if (!mlps[l->block]) return OFFRAMP_INVALID;
    }
    l->file->model = offramp_model_new(ends, attentions, NULL, mlps, l->blocks, l->error);
    return l->file->model ? give_rotary(l) : OFFRAMP_INVALID;
}

offramp_status load_model(offramp_file *file, offramp_error *error) {
    Loading l = {.file = file, .gguf = &file->gguf, .error = error};
    const Bytes name = text_of(entry_of(l.gguf, "general.architecture"));
    for (size_t i = 0; i < sizeof ARCHITECTURES / sizeof *ARCHITECTURES; i++)
        if (bytes_are(name, ARCHITECTURES[i].name)) l.kind = ARCHITECTURES + i;
    NEED(l.kind,
         "The file is of the architecture '%.*s': offramp export --gguf writes it as this program reads it.",
         (int)min_(name.length, 40), name.at);
    offramp_status status = read_sizes(&l);
    if (status) return status;
    const Entry *coarse = entry_of(l.gguf, "offramp.coarse");
    const offramp_part **parts = calloc(2 * l.blocks, sizeof *parts);
    file->plain = 1;
    l.coarse = coarse ? calloc(coarse->count + 1, sizeof *l.coarse) : NULL;
    if (l.coarse && texts_of(coarse, l.coarse)) l.coarse_count = coarse->count;
    status = parts ? load_parts(&l, parts, parts + l.blocks)
                   : fail(error, OFFRAMP_NO_MEMORY, "There is no memory for a model.");
    free(parts), free(l.coarse);
    return status;
}
