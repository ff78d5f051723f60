// A file's tokenizer: byte-level BPE as GPT-2, SmolLM, Llama 3 and Qwen 2 have it, or SentencePiece's BPE. It
// gives the ids that Hugging Face's package `tokenizers` gives.

#pragma once
#include "gguf.h"
#include "words.h"

// A merge of two tokens, at slot `hash` of a table with open addressing. Of SentencePiece's tokens, any two that
// make one together may merge, and its id is their rank.
typedef struct {
    int32_t left, right, rank, merged;
} Merge;

// A token that is looked for in a text before anything else.
typedef struct {
    Bytes bytes;
    int64_t id;
} Added;

typedef struct {
    Cuts cuts;
    int pieces;       // SentencePiece's: tokens are made of characters, and U+2581 stands for a space
    int whole_words;  // a word that is a token is not cut (ignore_merges)
    int64_t count, slots, merges_slots, added_count, added_from[257];
    int64_t first;              // a token that begins every prompt; -1 if there is none
    Bytes *tokens, *shown;      // shown: the bytes that tokens stand for; those of `tokens` but for pieces
    char *bytes, *shown_bytes;  // that these point to
    uint8_t *special;
    int32_t *table, of_byte[256];  // table: tokens by their bytes, -1 for an empty slot
    Merge *merges;
    Added *added;  // by their first byte, the longest first
} Tokenizer;

// Reads it from a file, which must stay open. On an error, it needs no closing.
offramp_status tokenizer_open(Tokenizer *tokenizer, const Gguf *file, offramp_error *error);
void tokenizer_close(Tokenizer *tokenizer);

// The ids of a text. Bytes that are not UTF-8 are read as Python's errors="replace" reads them. Returns how
// many ids there are, of which `room` are written; -1 if there is no memory.
int64_t tokenise(const Tokenizer *tokenizer, const char *text, int64_t length, int64_t *ids, int64_t room);

// Whether a text begins as a special token does.
int special_at(const Tokenizer *tokenizer, const char *text, int64_t length);

// Writes a text in which U+2581 takes the place of spaces, of at most three times its length. Returns its length.
int64_t write_pieces(char *to, Bytes text);

// The slot of a token in the table: its own, or an empty one. The token there, and a merge's place.
int64_t slot_of(const Tokenizer *tokenizer, const char *bytes, int64_t length);
int32_t token_of(const Tokenizer *tokenizer, const char *bytes, int64_t length);
Merge *merge_at(const Tokenizer *tokenizer, int32_t left, int32_t right);
