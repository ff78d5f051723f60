// A tokenizer is read from a file: its tokens, and their merges or scores.

#include "tokenizer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// Types of tokens in a file.
enum { ORDINARY = 1, CONTROL = 3, USER_DEFINED = 4, BYTE = 6 };

static uint64_t hash_of(const void *bytes, int64_t length) {  // FNV-1a
    const uint8_t *at = bytes;
    uint64_t hash = 0xcbf29ce484222325u;
    for (int64_t i = 0; i < length; i++) hash = (hash ^ at[i]) * 0x100000001b3u;
    return hash ^ hash >> 29;
}

// How far from its own slot an entry of a table may lie. Tables are at most half full, so entries of honest files
// lie within some dozens; those of others may collide, and would take a time that is quadratic.
enum { FURTHEST = 512 };

static int is_far(int64_t slot, uint64_t hash, int64_t slots) {
    return ((slot - (int64_t)(hash & (slots - 1))) & (slots - 1)) > FURTHEST;
}

// The slot of a token in the table: its own, or an empty one.
int64_t slot_of(const Tokenizer *t, const char *bytes, int64_t length) {
    int64_t slot = hash_of(bytes, length) & (t->slots - 1);
    for (; t->table[slot] >= 0; slot = (slot + 1) & (t->slots - 1)) {
        const Bytes *token = t->tokens + t->table[slot];
        if (token->length == length && !memcmp(token->at, bytes, length)) break;
    }
    return slot;
}
int32_t token_of(const Tokenizer *t, const char *bytes, int64_t length) {
    return t->table[slot_of(t, bytes, length)];
}

Merge *merge_at(const Tokenizer *t, int32_t left, int32_t right) {
    const int32_t pair[2] = {left, right};
    int64_t slot = hash_of(pair, sizeof pair) & (t->merges_slots - 1);
    while (t->merges[slot].rank >= 0 && (t->merges[slot].left != left || t->merges[slot].right != right))
        slot = (slot + 1) & (t->merges_slots - 1);
    return t->merges + slot;
}

int64_t write_pieces(char *to, Bytes text) {
    char *begin = to;
    for (int64_t i = 0; i < text.length; i++) {
        const int space = text.at[i] == ' ';
        memcpy(to, space ? "\xe2\x96\x81" : text.at + i, space ? 3 : 1);
        to += space ? 3 : 1;
    }
    return to - begin;
}

// GPT-2's alphabet: bytes that are printed stand for themselves, and the others for code points from 256 on, in
// their order.
enum { POINTS = 324 };
typedef struct {
    int16_t bytes[POINTS];  // that code points stand for; -1 for none
} Alphabet;

static Alphabet alphabet(void) {
    static const struct {
        int first, last;
    } own[] = {{'!', '~'}, {0xa1, 0xac}, {0xae, 0xff}};
    Alphabet a;
    memset(&a, -1, sizeof a);
    for (int byte = 0, next = 256; byte < 256; byte++) {
        int itself = 0;
        for (int i = 0; i < 3; i++) itself |= byte >= own[i].first && byte <= own[i].last;
        a.bytes[itself ? byte : next++] = (int16_t)byte;
    }
    return a;
}

// A token's text in GPT-2's alphabet as bytes. Text with other characters stays as it is.
static int64_t from_alphabet(const Alphabet *a, Bytes text, char *bytes) {
    const uint8_t *at = (const uint8_t *)text.at, *end = at + text.length;
    int64_t count = 0;
    while (at < end) {
        int32_t point;
        at += decode_point(at, end, &point);
        const int byte = point < 0 || point >= POINTS ? -1 : a->bytes[point];
        if (byte < 0) {
            memcpy(bytes, text.at, text.length);
            return text.length;
        }
        bytes[count++] = (char)byte;
    }
    return count;
}

// The byte that a token of the form <0x0A> stands for; -1 for others.
static int escaped_byte(Bytes text) {
    static const char digits[] = "0123456789ABCDEF";
    if (text.length != 6 || memcmp(text.at, "<0x", 3) || text.at[5] != '>') return -1;
    const char *high = memchr(digits, text.at[3], 16), *low = memchr(digits, text.at[4], 16);
    return high && low ? (int)(16 * (high - digits) + (low - digits)) : -1;
}

static int64_t slots_for(int64_t count) {
    int64_t slots = 16;
    while (slots < 2 * count) slots *= 2;
    return slots;
}

static offramp_status no_memory(offramp_error *error) {
    return fail(error, OFFRAMP_NO_MEMORY, "There is no memory for the tokens.");
}

enum { MOST_TOKENS = 1 << 24 };

static offramp_status make_room(Tokenizer *t, const Entry *tokens, offramp_error *error) {
    NEED(tokens && tokens->count > 0 && tokens->count <= MOST_TOKENS, "The file names no tokens.");
    t->count = tokens->count, t->slots = slots_for(t->count);
    t->tokens = malloc(t->count * sizeof *t->tokens), t->special = calloc(t->count, 1);
    t->table = malloc(t->slots * sizeof *t->table), t->added = malloc(t->count * sizeof *t->added);
    if (!t->tokens || !t->special || !t->table || !t->added) return no_memory(error);
    NEED(texts_of(tokens, t->tokens), "The file names no tokens.");
    int64_t bytes = 0;
    for (int64_t i = 0; i < t->count; i++) bytes += (t->pieces ? 3 : 1) * t->tokens[i].length;
    t->bytes = malloc(bytes + 1);
    if (!t->bytes) return no_memory(error);
    memset(t->table, -1, t->slots * sizeof *t->table);
    return OFFRAMP_OK;
}

static int is_spaces(Bytes text) {
    for (int64_t i = 0; i < text.length; i++)
        if (text.at[i] != ' ') return 0;
    return text.length > 0;
}

static offramp_status read_tokens(Tokenizer *t, const Gguf *file, offramp_error *error) {
    const Entry *types = entry_of(file, "tokenizer.ggml.token_type");
    const offramp_status status = make_room(t, entry_of(file, "tokenizer.ggml.tokens"), error);
    if (status) return status;
    memset(t->of_byte, -1, sizeof t->of_byte);
    const Alphabet letters = alphabet();
    char *to = t->bytes;
    for (int64_t i = 0; i < t->count; i++) {
        Bytes *token = t->tokens + i;
        const int64_t type = integer_of(types, i, ORDINARY), spaces = t->pieces && is_spaces(*token);
        const int added = type == CONTROL || (type == USER_DEFINED && !spaces),
                  byte = type == BYTE ? escaped_byte(*token) : -1;
        int64_t length = token->length;
        if (spaces)  // as Hugging Face reads them
            length = write_pieces(to, *token);
        else if (added || t->pieces)
            memcpy(to, token->at, length);
        else
            length = from_alphabet(&letters, *token, to);
        *token = (Bytes){to, length}, to += length;
        t->special[i] = type == CONTROL;
        if (added && length) t->added[t->added_count++] = (Added){*token, i};
        if (byte >= 0) t->of_byte[byte] = (int32_t)i;
        const int64_t slot = slot_of(t, token->at, length);
        NEED(!is_far(slot, hash_of(token->at, length), t->slots),
             "The file's tokens collide: it was made to be slow.");
        if (t->table[slot] < 0 && type != BYTE) t->table[slot] = (int32_t)i;
    }
    for (int byte = 0; byte < 256 && !t->pieces; byte++)
        t->of_byte[byte] = token_of(t, (char[]){(char)byte}, 1);
    return OFFRAMP_OK;
}

// A piece's text: spaces where it has U+2581. Returns its length.
static int64_t write_shown(char *to, Bytes piece) {
    char *begin = to;
    for (int64_t at = 0; at < piece.length;) {
        const int space = at + 3 <= piece.length && !memcmp(piece.at + at, "\xe2\x96\x81", 3);
        *to++ = space ? ' ' : piece.at[at];
        at += space ? 3 : 1;
    }
    return to - begin;
}

// What tokens stand for. 0 if there is no memory.
static int show_tokens(Tokenizer *t) {
    int64_t bytes = 0;
    t->shown = t->tokens;
    if (!t->pieces) return 1;
    for (int64_t i = 0; i < t->count; i++) bytes += t->tokens[i].length;
    char *to = t->shown_bytes = malloc(bytes + 1);
    t->shown = malloc(t->count * sizeof *t->shown);
    if (!to || !t->shown) return 0;
    for (int64_t i = 0; i < t->count; i++) {
        const int byte = escaped_byte(t->tokens[i]), is_byte = byte >= 0 && t->of_byte[byte] == i;
        const int64_t length = is_byte ? 1 : write_shown(to, t->tokens[i]);
        if (is_byte) *to = (char)byte;
        t->shown[i] = (Bytes){to, length}, to += length;
    }
    return 1;
}

static int by_first_byte(const void *a, const void *b) {
    const Added *one = a, *two = b;
    const int first = (uint8_t)*one->bytes.at - (uint8_t)*two->bytes.at;
    return first ? first : (two->bytes.length > one->bytes.length) - (two->bytes.length < one->bytes.length);
}

static void sort_added(Tokenizer *t) {
    qsort(t->added, t->added_count, sizeof *t->added, by_first_byte);
    for (int byte = 0, i = 0; byte <= 256; byte++) {
        while (i < t->added_count && (uint8_t)*t->added[i].bytes.at < byte) i++;
        t->added_from[byte] = i;
    }
}

// Puts a merge into the table. 0 if it is far from its place.
static int read_merge(Tokenizer *t, const Alphabet *letters, Bytes text, int32_t rank, char *both) {
    const char *cut = text.length ? memchr(text.at + 1, ' ', text.length - 1) : NULL;
    if (!cut) return 1;
    const int64_t left = from_alphabet(letters, (Bytes){text.at, cut - text.at}, both),
                  right =
                      from_alphabet(letters, (Bytes){cut + 1, text.at + text.length - cut - 1}, both + left);
    const int32_t ids[] = {token_of(t, both, left), token_of(t, both + left, right),
                           token_of(t, both, left + right)};
    if (ids[0] < 0 || ids[1] < 0 || ids[2] < 0) return 1;
    Merge *place = merge_at(t, ids[0], ids[1]);
    *place = (Merge){ids[0], ids[1], rank, ids[2]};
    return !is_far(place - t->merges, hash_of(ids, 2 * sizeof *ids), t->merges_slots);
}

static offramp_status read_merges(Tokenizer *t, const Gguf *file, offramp_error *error) {
    const Entry *merges = entry_of(file, "tokenizer.ggml.merges");
    NEED(merges && merges->count > 0 && merges->count <= MOST_TOKENS, "The file's tokenizer has no merges.");
    t->merges_slots = slots_for(merges->count), t->merges = malloc(t->merges_slots * sizeof *t->merges);
    Bytes *texts = malloc(merges->count * sizeof *texts);
    int64_t longest = 0;
    const int named = texts && texts_of(merges, texts);
    for (int64_t i = 0; named && i < merges->count; i++) longest = larger(longest, texts[i].length);
    char *both = malloc(longest + 1);
    if (!texts || !t->merges || !both) {
        free(texts), free(both);
        return no_memory(error);
    }
    const Alphabet letters = alphabet();
    for (int64_t i = 0; i < t->merges_slots; i++) t->merges[i].rank = -1;
    int near = 1;
    for (int64_t i = 0; longest && near && i < merges->count; i++)
        near = read_merge(t, &letters, texts[i], (int32_t)i, both);
    free(texts), free(both);
    NEED(near, "The file's merges collide: it was made to be slow.");
    NEED(longest, "The file's tokenizer has no merges.");
    return OFFRAMP_OK;
}

// SentencePiece's tokens are merged in the order of their scores, which must be that of their ids.
static offramp_status check_scores(const Tokenizer *t, const Gguf *file, offramp_error *error) {
    const Entry *scores = entry_of(file, "tokenizer.ggml.scores"),
                *types = entry_of(file, "tokenizer.ggml.token_type");
    double before = INFINITY;
    for (int64_t i = 0; i < t->count; i++) {
        if (integer_of(types, i, ORDINARY) != ORDINARY) continue;
        const double score = real_of(scores, i, NAN);
        NEED(score <= before, "The file's tokens are not in the order of their scores.");
        before = score;
    }
    return OFFRAMP_OK;
}

static offramp_status read_kind(Tokenizer *t, const Gguf *file, offramp_error *error) {
    static const struct {
        const char *name;
        Cuts cuts;
    } known[] = {
        {"smollm", GPT2}, {"gpt-2", GPT2}, {"qwen2", QWEN2}, {"llama-bpe", LLAMA3}, {"mamba-tiny", TINY}};
    const Bytes model = text_of(entry_of(file, "tokenizer.ggml.model")),
                pre = text_of(entry_of(file, "tokenizer.ggml.pre"));
    t->pieces = bytes_are(model, "llama");
    NEED(t->pieces || bytes_are(model, "gpt2"),
         "The file's tokenizer is of the kind '%.*s', which offramp does not read.",
         (int)min_(model.length, 40), model.at);
    const int begins = integer_of(entry_of(file, "tokenizer.ggml.add_bos_token"), 0, t->pieces) == 1;
    t->first = begins ? integer_of(entry_of(file, "tokenizer.ggml.bos_token_id"), 0, -1) : -1;
    NEED(!t->pieces || integer_of(entry_of(file, "tokenizer.ggml.add_space_prefix"), 0, 1) == 0,
         "The file's tokenizer puts a space before a text, which offramp does not.");
    if (t->pieces) return OFFRAMP_OK;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (!bytes_are(pre, known[i].name)) continue;
        t->cuts = known[i].cuts, t->whole_words = t->cuts == LLAMA3;
        return OFFRAMP_OK;
    }
    return fail(error, OFFRAMP_INVALID,
                "The file's tokenizer cuts words as '%.*s' does, which offramp does not.",
                (int)min_(pre.length, 40), pre.at);
}

offramp_status tokenizer_open(Tokenizer *t, const Gguf *file, offramp_error *error) {
    *t = (Tokenizer){0};
    offramp_status status = read_kind(t, file, error);
    if (!status) status = read_tokens(t, file, error);
    if (!status) status = t->pieces ? check_scores(t, file, error) : read_merges(t, file, error);
    if (!status && t->first >= t->count)
        status = fail(error, OFFRAMP_INVALID, "The file's texts begin with a token that it does not name.");
    if (!status && !show_tokens(t)) status = no_memory(error);
    if (status)
        tokenizer_close(t);
    else
        sort_added(t);
    return status;
}

void tokenizer_close(Tokenizer *t) {
    if (t->shown != t->tokens) free(t->shown);
    free(t->tokens), free(t->bytes), free(t->special), free(t->table), free(t->merges);
    free(t->added), free(t->shown_bytes);
    *t = (Tokenizer){0};
}
