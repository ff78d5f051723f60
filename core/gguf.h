// GGUF files (version 2 and 3), mapped: what they say, and where their tensors are. A file is a stranger's:
// every size that it states is checked before it is used.

#pragma once
#include "model.h"

// Bytes of a file, such as a text, which does not end with a zero.
typedef struct {
    const char *at;
    int64_t length;
} Bytes;

// What a file says under a key: a number, a text, or an array of one of these. `at` is where its bytes are.
typedef struct {
    Bytes key;
    uint32_t type, inner;  // of GGUF; `inner`: of an array's elements
    int64_t count;         // of elements; 1 if it is no array
    const uint8_t *at;
} Entry;

// A tensor: its shape, columns first, and its bytes. `type` is an offramp_type, or -1 for one that offramp
// cannot run.
typedef struct {
    Bytes name;
    int64_t shape[4];
    int type, dims;
    int64_t bytes;
    const uint8_t *values;
} Tensor;

// Entries by their keys and tensors by their names, each in the order of `memcmp`, none twice.
typedef struct {
    const uint8_t *map;
    int64_t size, entries_count, tensors_count;
    int stream;
    Entry *entries;
    Tensor *tensors;
} Gguf;

// Maps a file. On an error, `file` needs no closing.
offramp_status gguf_open(Gguf *file, const char *path, offramp_error *error);
void gguf_close(Gguf *file);

// The entry of a key, and the tensor of a name; NULL if there is none.
const Entry *entry_of(const Gguf *file, const char *key);
const Tensor *tensor_of(const Gguf *file, const char *name);

// Values of an entry, or `otherwise` if it is NULL or of another kind. Element `i` of an array.
double real_of(const Entry *entry, int64_t i, double otherwise);
int64_t integer_of(const Entry *entry, int64_t i, int64_t otherwise);

// All texts of an array, or the one text of an entry, in `texts` (room for `count`). 0 if it holds no texts.
int texts_of(const Entry *entry, Bytes *texts);

// The one text of an entry; an empty one if it holds none.
Bytes text_of(const Entry *entry);

int bytes_are(Bytes bytes, const char *other);
