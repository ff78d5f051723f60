// The final norm and the LM head, for all tokens or only for those that a sketch finds likeliest; and the
// choice of a token.

#pragma once
#include "model.h"
#include "products.h"

enum { CHUNK = 1024 };  // tokens of one piece

static inline int64_t chunks_of(int64_t V) { return (V + CHUNK - 1) / CHUNK; }

// The estimates of one row: a bound that a few more than the wanted number should reach, how many reach it,
// and the lowest wanted one. Each row has its own, so that a thread that comes late reads the same values as
// the others.
typedef struct {
    float bound, least;
    int64_t listed;
} Found;

// Memory for reading out R rows.
typedef struct {
    float *x, *narrow, *z, *z_narrow, *numbers;
    int32_t *counts;
} HeadRoom;

HeadRoom room_for_head(const Weight *head, const Sketch *sketch, int64_t R, Arena *arena);

// Puts logits of hidden states h (R, D) into y (R, V), shared out: after the final norm, by the head of
// `ends` or some rows of it, with the scale and the cap of `ends`. With a sketch (else NULL), only the
// candidates of each row get theirs (more if estimates are equal), and all others −inf. Rows (D) times
// `reduce` (k, D) times `expand` (V, k) are estimates of the logits. `found` (R) must be zeros, and must not
// be used again.
void read_logits(Hand *hand, const Ends *ends, const Weight *head, const Sketch *sketch, const float *h,
                 int64_t R, const HeadRoom *room, Found *found, float *y);

typedef struct {
    float logit;  // NaN if any is
    int32_t id;
} Best;

// The largest of the logits `from` to `to` - 1, the first of equals; and the largest of several.
Best best_of(const float *y, int64_t from, int64_t to);
Best best_among(const Best *bests, int64_t count);
