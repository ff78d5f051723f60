// A text becomes ids: added tokens are found, the rest is cut into words, and pairs are merged.

#include <stdlib.h>
#include <string.h>

#include "tokenizer.h"

// Merging -----------------------------------------------------------------------------------------

// A word's tokens so far, as a list: those that were merged into the one before have the id -1. A heap has
// the merges that can be made: the one with the lowest rank, of several the first, on top.
typedef struct {
    int32_t id, before, after, begin;
} Symbol;
typedef struct {
    int32_t rank, second, at, merged;
} Candidate;
typedef struct {
    const char *text;
    int64_t length, count, heaped, room;
    Symbol *symbols;
    Candidate *heap;
} Word;

static int comes_first(Candidate a, Candidate b) {
    if (a.rank != b.rank) return a.rank < b.rank;
    return a.second != b.second ? a.second < b.second : a.at < b.at;
}

static void push(Word *w, Candidate c) {
    int64_t i = w->heaped++;
    for (; i && comes_first(c, w->heap[(i - 1) / 2]); i = (i - 1) / 2) w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = c;
}

static Candidate pop(Word *w) {
    const Candidate top = w->heap[0], last = w->heap[--w->heaped];
    int64_t i = 0;
    for (int64_t child; (child = 2 * i + 1) < w->heaped; i = child) {
        if (child + 1 < w->heaped && comes_first(w->heap[child + 1], w->heap[child])) child++;
        if (!comes_first(w->heap[child], last)) break;
        w->heap[i] = w->heap[child];
    }
    w->heap[i] = last;
    return top;
}

// The merge of a symbol with the one after it; its rank is -1 if they do not merge.
static Candidate merge_of(const Tokenizer *t, const Word *w, int32_t at) {
    const Symbol *own = w->symbols + at, *next = w->symbols + own->after;
    if (!t->pieces) {
        const Merge *m = merge_at(t, own->id, next->id);
        return (Candidate){m->rank, 0, at, m->merged};
    }
    const int64_t end = next->after >= 0 ? w->symbols[next->after].begin : w->length;
    const int32_t merged = token_of(t, w->text + own->begin, end - own->begin);
    return (Candidate){merged, own->id, at, merged};
}

static void consider(const Tokenizer *t, Word *w, int32_t at) {
    if (at < 0 || w->symbols[at].after < 0) return;
    const Candidate c = merge_of(t, w, at);
    if (c.rank >= 0) push(w, c);
}

static void merge(const Tokenizer *t, Word *w) {
    Symbol *s = w->symbols;
    w->heaped = 0;
    for (int64_t i = 0; i < w->count; i++)
        s[i].before = (int32_t)i - 1, s[i].after = i + 1 < w->count ? (int32_t)i + 1 : -1;
    for (int64_t i = 0; i < w->count; i++) consider(t, w, (int32_t)i);
    while (w->heaped) {
        const Candidate c = pop(w);
        Symbol *own = s + c.at;
        if (own->id < 0 || own->after < 0 || merge_of(t, w, c.at).merged != c.merged) continue;  // long gone
        Symbol *next = s + own->after;
        own->id = c.merged, own->after = next->after, next->id = -1;
        if (own->after >= 0) s[own->after].before = c.at;
        consider(t, w, own->before), consider(t, w, c.at);
    }
}

// Words -------------------------------------------------------------------------------------------

typedef struct {
    int64_t *ids, count, room;
} Found;

static void add_id(Found *f, int64_t id) {
    if (f->count < f->room) f->ids[f->count] = id;
    f->count++;
}

static void add_symbol(Word *w, int32_t id, int64_t begin) {
    if (id >= 0) w->symbols[w->count++] = (Symbol){.id = id, .begin = (int32_t)begin};
}

// A word's first tokens: bytes, or characters. A character that is no token becomes its bytes'.
static void begin_word(const Tokenizer *t, Word *w) {
    const uint8_t *text = (const uint8_t *)w->text;
    w->count = 0;
    for (int64_t at = 0, next; at < w->length; at = next) {
        int32_t point;
        next = t->pieces ? at + decode_point(text + at, text + w->length, &point) : at + 1;
        const int32_t id = t->pieces ? token_of(t, w->text + at, next - at) : -1;
        if (id >= 0)
            add_symbol(w, id, at);
        else
            for (int64_t i = at; i < next; i++) add_symbol(w, t->of_byte[text[i]], i);
    }
}

// The ids of a word. 0 if there is no memory.
static int add_word(const Tokenizer *t, Word *w, Found *found) {
    const int64_t whole = w->length == 1 || t->whole_words ? token_of(t, w->text, w->length) : -1;
    if (whole >= 0) {
        add_id(found, whole);
        return 1;
    }
    if (w->length > w->room) {
        free(w->symbols), free(w->heap);
        w->room = 2 * w->length;
        w->symbols = malloc(w->room * sizeof *w->symbols), w->heap = malloc(3 * w->room * sizeof *w->heap);
        if (!w->symbols || !w->heap) return 0;
    }
    begin_word(t, w);
    merge(t, w);
    for (int64_t i = 0; i < w->count; i = w->symbols[i].after >= 0 ? w->symbols[i].after : w->count)
        add_id(found, w->symbols[i].id);
    return 1;
}

// Words of a piece of text without added tokens, which is UTF-8. 0 if there is no memory.
static int add_words(const Tokenizer *t, Word *w, const char *text, int64_t length, Found *found) {
    char *own = t->pieces ? malloc(3 * length + 1) : NULL;
    Points points = {0};
    if (t->pieces && !own) return 0;
    if (own) length = write_pieces(own, (Bytes){text, length}), text = own;
    int whole = length <= INT32_MAX && points_of(&points, text, length);
    for (int64_t at = 0, end; whole && at < points.count; at = end) {
        end = word_end(t->cuts, &points, at);
        w->text = text + points.begins[at], w->length = points.begins[end] - points.begins[at];
        whole = add_word(t, w, found);
    }
    free_points(&points), free(own);
    return whole;
}

// The added token that a text begins with; NULL if there is none.
static const Added *added_at(const Tokenizer *t, const char *text, int64_t length) {
    const int first = (uint8_t)*text;
    for (int64_t i = t->added_from[first]; i < t->added_from[first + 1]; i++) {
        const Bytes own = t->added[i].bytes;
        if (own.length <= length && !memcmp(own.at, text, own.length)) return t->added + i;
    }
    return NULL;
}

int special_at(const Tokenizer *t, const char *text, int64_t length) {
    const int first = (uint8_t)*text;
    for (int64_t i = t->added_from[first]; i < t->added_from[first + 1]; i++) {
        const Bytes own = t->added[i].bytes;
        if (t->special[t->added[i].id] && own.length <= length && !memcmp(own.at, text, own.length)) return 1;
    }
    return 0;
}

int64_t tokenise(const Tokenizer *t, const char *given, int64_t length, int64_t *ids, int64_t room) {
    int64_t copied;
    char *text = valid_copy(given, length, &copied);
    Word w = {0};
    Found found = {ids, 0, room};
    int whole = text != NULL;
    for (int64_t begin = 0, at = 0; whole && begin < copied;) {
        const Added *added = NULL;
        while (at < copied && !(added = added_at(t, text + at, copied - at))) at++;
        if (at > begin) whole = add_words(t, &w, text + begin, at - begin, &found);
        if (added) add_id(&found, added->id);
        begin = at += added ? added->bytes.length : 0;
    }
    free(text), free(w.symbols), free(w.heap);
    return whole ? found.count : -1;
}
