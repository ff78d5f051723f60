// One answer: from a text to tokens, what they cost, and how it is printed.

#pragma once
#include <signal.h>
#include <stdio.h>

#include "offramp.h"

typedef struct {
    const offramp_file *model, *exits;  // exits: NULL for full depth
    offramp_plan *plan;
    const char *mode;
    int64_t number;  // of the mode in the exits' file; -1 for full depth
    offramp_sampling how;
    int64_t most;                       // tokens of an answer
    const volatile sig_atomic_t *stop;  // once it is not 0, the answer ends
} Settings;

// A text that grows: its ids, the session that remembers the first `run`, and what read-outs read.
typedef struct {
    offramp_session *session;
    int64_t *ids, known, run, room;
    float *deep;
} Text;

// A token of an answer: its decision, sums up to it, and the text that it completes (`length` bytes from
// `begin` on).
typedef struct {
    offramp_decision d;
    int64_t cumulative, passes, rejected, begin, length;
} Token;

typedef struct {
    Token *tokens;
    int64_t count, most, prompt;  // most: those that the answer may have
    char *text;
    int64_t length;
    double prefill, decode;  // seconds
    int ended;               // by a token that ends texts
} Answer;

// Continues a text after these ids, of which it perhaps knows a beginning. `shows` (or NULL) gets each token's
// text when it is decided. On an error, the text must be freed.
offramp_status answer(const Settings *s, Text *text, const int64_t *ids, int64_t count,
                      void (*shows)(const Answer *answer, const Token *token), Answer *to,
                      offramp_error *error);

void free_text(Text *text);
void free_answer(Answer *answer);

// Prints a stranger's text. On a terminal, U+FFFD takes the place of characters that a terminal obeys instead of
// showing them, and of what is not UTF-8; elsewhere the bytes stay as they are.
void print_shown(FILE *out, const char *text, int64_t length);

// Prints an answer as one line of JSON, with the fields of `offramp generate --json`. `prompt` may be NULL.
void print_json(FILE *out, const Settings *s, const char *prompt, const Answer *answer);
