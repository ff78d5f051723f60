#include "gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

// GGUF's types of values.
enum { UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 };
static const int8_t VALUE_BYTES[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

// ggml's types of tensors: offramp's name, and the columns and bytes of a block.
typedef struct {
    int number, type, columns, bytes;
} Kept;
static const Kept TYPES[] = {
    {0, OFFRAMP_FLOAT32, 1, 4},   {1, OFFRAMP_FLOAT16, 1, 2},   {30, OFFRAMP_BFLOAT16, 1, 2},
    {2, OFFRAMP_Q4_0, 32, 18},    {3, OFFRAMP_Q4_1, 32, 20},    {6, OFFRAMP_Q5_0, 32, 22},
    {7, OFFRAMP_Q5_1, 32, 24},    {8, OFFRAMP_Q8_0, 32, 34},    {10, OFFRAMP_Q2_K, 256, 84},
    {11, OFFRAMP_Q3_K, 256, 110}, {12, OFFRAMP_Q4_K, 256, 144}, {13, OFFRAMP_Q5_K, 256, 176},
    {14, OFFRAMP_Q6_K, 256, 210}, {20, OFFRAMP_IQ4_NL, 32, 18}, {23, OFFRAMP_IQ4_XS, 256, 136},
    {24, OFFRAMP_INT8, 1, 1},     {26, OFFRAMP_UINT32, 1, 4},   {27, OFFRAMP_INT64, 1, 8},
};
enum { MOST_ENTRIES = 1 << 16, MOST_TENSORS = 1 << 20, DEEPEST = 4 };

// Reads the header: `at` is the next byte. Once something is wrong, `bad` stays set, and nothing is read.
typedef struct {
    const uint8_t *at, *end;
    int bad;
} Header;

static const uint8_t *skip(Header *h, uint64_t bytes) {
    const uint8_t *at = h->at;
    if (h->bad || bytes > (uint64_t)(h->end - h->at)) {
        h->bad = 1;
        return NULL;
    }
    h->at += bytes;
    return at;
}

static uint64_t number(Header *h, int bytes) {
    uint64_t value = 0;
    const uint8_t *at = skip(h, bytes);
    if (at) memcpy(&value, at, bytes);  // as the file, this machine has the low bytes first
    return value;
}

static Bytes text(Header *h) {
    const uint64_t length = number(h, 8);
    const uint8_t *at = skip(h, length);
    return at ? (Bytes){(const char *)at, (int64_t)length} : (Bytes){"", 0};
}

static void skip_value(Header *h, uint32_t type, int depth) {
    if (type == STRING) {
        text(h);
    } else if (type == ARRAY && depth < DEEPEST) {
        const uint32_t inner = (uint32_t)number(h, 4);
        const uint64_t count = number(h, 8);
        const int simple = inner <= FLOAT64 && VALUE_BYTES[inner];
        if (count > (uint64_t)(h->end - h->at)) h->bad = 1;
        if (simple && !h->bad) skip(h, count * VALUE_BYTES[inner]);
        for (uint64_t i = 0; !simple && i < count && !h->bad; i++) skip_value(h, inner, depth + 1);
    } else if (type <= FLOAT64 && VALUE_BYTES[type]) {
        skip(h, VALUE_BYTES[type]);
    } else {
        h->bad = 1;
    }
}

static void read_entry(Header *h, Entry *e) {
    e->key = text(h);
    e->type = (uint32_t)number(h, 4), e->count = 1;
    Header inside = *h;
    if (e->type == ARRAY) e->inner = (uint32_t)number(&inside, 4), e->count = (int64_t)number(&inside, 8);
    e->at = inside.at;
    skip_value(h, e->type, 0);
}

static void read_tensor(Header *h, Tensor *t, uint64_t *offset) {
    t->name = text(h);
    t->dims = (int)number(h, 4);
    if (t->dims < 1 || t->dims > 4) h->bad = 1;
    uint64_t entries = 1;
    for (int i = 0; !h->bad && i < 4; i++) {
        const uint64_t size = i < t->dims ? number(h, 8) : 1;
        if (!size || size > INT32_MAX || entries > INT64_MAX / 16 / size) h->bad = 1;
        entries *= size, t->shape[i] = (int64_t)size;
    }
    const uint64_t kind = number(h, 4);
    *offset = number(h, 8);
    t->type = -1;
    for (size_t i = 0; !h->bad && i < sizeof TYPES / sizeof *TYPES; i++) {
        if ((uint64_t)TYPES[i].number != kind) continue;
        if (t->shape[0] % TYPES[i].columns) h->bad = 1;
        t->type = TYPES[i].type, t->bytes = (int64_t)(entries / TYPES[i].columns) * TYPES[i].bytes;
    }
}

// Puts the tensors' places in order: the header is over, and their bytes follow.
static void place_tensors(Gguf *file, Header *h, const uint64_t *offsets) {
    int64_t unit = 32;
    for (int64_t i = 0; i < file->entries_count; i++)  // they are not in their order yet
        if (bytes_are(file->entries[i].key, "general.alignment")) unit = integer_of(file->entries + i, 0, 0);
    if (unit < 1 || unit > 1 << 20 || unit & (unit - 1)) h->bad = 1;
    if (h->bad) return;
    const uint64_t begin = ((uint64_t)(h->at - file->map) + unit - 1) / unit * unit,
                   size = (uint64_t)file->size;
    uint64_t left = begin > size ? 0 : size - begin;
    for (int64_t i = 0; i < file->tensors_count; i++) {
        Tensor *t = file->tensors + i;
        const uint64_t offset = offsets[i];
        if (begin > size || offset % unit || offset > size - begin ||
            (uint64_t)t->bytes > size - begin - offset || (uint64_t)t->bytes > left)
            h->bad = 1;
        if (h->bad) return;
        left -= (uint64_t)t->bytes;  // tensors do not share bytes: what is made of them has a limit
        t->values = file->map + begin + offset;
    }
}

static int compare(Bytes a, Bytes b) {
    const int order = memcmp(a.at, b.at, min_(a.length, b.length));
    return order ? order : (a.length > b.length) - (a.length < b.length);
}
static int by_key(const void *a, const void *b) {
    return compare(((const Entry *)a)->key, ((const Entry *)b)->key);
}
static int by_name(const void *a, const void *b) {
    return compare(((const Tensor *)a)->name, ((const Tensor *)b)->name);
}

static int names_something_twice(const Gguf *file) {
    int twice = 0;
    for (int64_t i = 1; i < file->entries_count; i++)
        twice |= !by_key(file->entries + i - 1, file->entries + i);
    for (int64_t i = 1; i < file->tensors_count; i++)
        twice |= !by_name(file->tensors + i - 1, file->tensors + i);
    return twice;
}

static offramp_status read_header(Gguf *file, const char *path, offramp_error *error) {
    Header h = {file->map, file->map + file->size, 0};
    const uint32_t magic = (uint32_t)number(&h, 4), version = (uint32_t)number(&h, 4);
    NEED(magic == 0x46554747 && (version == 2 || version == 3),
         "%.200s is not a GGUF file of version 2 or 3.", path);
    const uint64_t tensors = number(&h, 8), entries = number(&h, 8);
    NEED(!h.bad && tensors <= MOST_TENSORS && entries <= MOST_ENTRIES,
         "%.200s is damaged: its header ends early.", path);
    file->entries = calloc(entries + 1, sizeof *file->entries);
    file->tensors = calloc(tensors + 1, sizeof *file->tensors);
    uint64_t *offsets = calloc(tensors + 1, sizeof *offsets);
    if (!file->entries || !file->tensors || !offsets) {
        free(offsets);
        return fail(error, OFFRAMP_NO_MEMORY, "There is no memory for the header of %.200s.", path);
    }
    for (uint64_t i = 0; i < entries && !h.bad; i++) read_entry(&h, file->entries + i);
    file->entries_count = h.bad ? 0 : (int64_t)entries;
    for (uint64_t i = 0; i < tensors && !h.bad; i++) read_tensor(&h, file->tensors + i, offsets + i);
    file->tensors_count = h.bad ? 0 : (int64_t)tensors;
    place_tensors(file, &h, offsets);
    free(offsets);
    if (!h.bad) qsort(file->entries, file->entries_count, sizeof *file->entries, by_key);
    if (!h.bad) qsort(file->tensors, file->tensors_count, sizeof *file->tensors, by_name);
    NEED(h.bad || !names_something_twice(file), "%.200s is damaged: its header has a key or a tensor twice.",
         path);
    NEED(!h.bad, "%.200s is damaged: its header is not complete, or names bytes that it does not have.",
         path);
    return OFFRAMP_OK;
}

offramp_status gguf_open(Gguf *file, const char *path, offramp_error *error) {
    *file = (Gguf){0};
    struct stat facts;
    const int stream = open(path, O_RDONLY | O_CLOEXEC);
    NEED(stream >= 0, "%.200s cannot be opened: %s.", path, strerror(errno));
    const int known = !fstat(stream, &facts) && S_ISREG(facts.st_mode) && facts.st_size > 0;
    void *map = known ? mmap(NULL, facts.st_size, PROT_READ, MAP_PRIVATE, stream, 0) : MAP_FAILED;
    if (map == MAP_FAILED) close(stream);
    NEED(map != MAP_FAILED, "%.200s cannot be read: it is empty, or no file.", path);
    file->map = map, file->size = facts.st_size, file->stream = stream;
    const offramp_status status = read_header(file, path, error);
    if (status) gguf_close(file);
    return status;
}

void gguf_close(Gguf *file) {
    if (file->map) munmap((void *)file->map, file->size), close(file->stream);
    free(file->entries), free(file->tensors);
    *file = (Gguf){0};
}

int bytes_are(Bytes bytes, const char *other) {
    return bytes.length == (int64_t)strlen(other) && !memcmp(bytes.at, other, bytes.length);
}

static Bytes bytes_of(const char *text) { return (Bytes){text, (int64_t)strlen(text)}; }

const Entry *entry_of(const Gguf *file, const char *key) {
    const Entry wanted = {.key = bytes_of(key)};
    return bsearch(&wanted, file->entries, file->entries_count, sizeof wanted, by_key);
}

const Tensor *tensor_of(const Gguf *file, const char *name) {
    const Tensor wanted = {.name = bytes_of(name)};
    return bsearch(&wanted, file->tensors, file->tensors_count, sizeof wanted, by_name);
}

double real_of(const Entry *entry, int64_t i, double otherwise) {
    const uint32_t type = !entry ? STRING : entry->type == ARRAY ? entry->inner : entry->type;
    if (!entry || i < 0 || i >= entry->count || type > FLOAT64 || !VALUE_BYTES[type]) return otherwise;
    const uint8_t *at = entry->at + i * VALUE_BYTES[type];
    uint64_t bits = 0;
    float single;
    double twice;
    memcpy(&bits, at, VALUE_BYTES[type]), memcpy(&single, &bits, sizeof single),
        memcpy(&twice, &bits, sizeof twice);
    switch (type) {
        case INT8: return (int8_t)bits;
        case INT16: return (int16_t)bits;
        case INT32: return (int32_t)bits;
        case INT64: return (double)(int64_t)bits;
        case FLOAT32: return single;
        case FLOAT64: return twice;
        default: return (double)bits;
    }
}

int64_t integer_of(const Entry *entry, int64_t i, int64_t otherwise) {
    const double value = real_of(entry, i, NAN);
    return value >= -0x1p53 && value <= 0x1p53 && value == floor(value) ? (int64_t)value : otherwise;
}

int texts_of(const Entry *entry, Bytes *texts) {
    const uint32_t type = !entry ? ARRAY : entry->type == ARRAY ? entry->inner : entry->type;
    if (type != STRING) return 0;
    const uint8_t *at = entry->at;
    for (int64_t i = 0; i < entry->count; i++) {  // their lengths were checked when the header was read
        uint64_t length;
        memcpy(&length, at, sizeof length);
        texts[i] = (Bytes){(const char *)at + sizeof length, (int64_t)length};
        at += sizeof length + length;
    }
    return 1;
}

Bytes text_of(const Entry *entry) {
    Bytes text = {"", 0};
    if (entry && entry->type == STRING) texts_of(entry, &text);
    return text;
}
