// UTF-8, and how a text is cut into words before pairs of tokens are merged.

#pragma once
#include <stdint.h>

// As the regular expressions of GPT-2 (openai/gpt-2, encoder.py), Qwen 2, Llama 3 and mamba-tiny cut
// (model/vocabulary.py); or not at all.
typedef enum { WHOLE, GPT2, QWEN2, LLAMA3, TINY } Cuts;

// A text as code points: of each, its class and where its bytes begin. Three more of class -1 follow the last.
typedef struct {
    int32_t *points;
    int8_t *classes;
    int64_t *begins, count;
} Points;

// The code point at `at`, and its length. Of bytes that are not UTF-8, as many are taken as Python's
// errors="replace" reads as one: then `point` is -1.
int decode_point(const uint8_t *at, const uint8_t *end, int32_t *point);

// Whether Python's str.strip takes a code point away.
int is_white(int32_t point);

// A copy of a text in which U+FFFD takes the place of what is not UTF-8. The caller frees it; NULL if there
// is no memory.
char *valid_copy(const char *text, int64_t length, int64_t *copied);

// The code points of a text that is UTF-8, to be freed with `free_points`. 0 if there is no memory.
int points_of(Points *points, const char *text, int64_t length);
void free_points(Points *points);

// The code point behind the word that begins with code point `at`.
int64_t word_end(Cuts cuts, const Points *points, int64_t at);
