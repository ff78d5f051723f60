// How a token is chosen: the most probable one, or one that is drawn. Rules and their order are those of
// transformers' logits processors; decode/sampling.py has them in Python.
//
// A draw is the Gumbel-max trick (Gumbel 1954; arXiv 1411.0030): where E are independent and exponentially
// distributed, the largest logit / temperature - log(E) is that of token t with t's probability. E is a
// function of the seed, the position (the number of ids before) and the token alone. So it depends neither on
// other rows nor on threads, and a draft and full depth decide a position under the same noise:
//
//     key = splitmix64's finaliser of seed + 0x9E3779B97F4A7C15 · (position + 1); its low and high 32 bits
//     x = fmix32(fmix32(t + low) ^ high), with fmix32 of MurmurHash3
//     u = min(float32(x) · 2⁻³² + 2⁻³³, 1 - 2⁻²⁴)
//     E = -log(1 - u)

#pragma once
#include "head.h"

// How the token after a text of `known` ids is chosen: see offramp_choose.
typedef struct {
    const offramp_sampling *how;
    const int64_t *ids;
    int64_t known;
    const uint32_t *allowed;
} Choice;

// Memory for choosing in R rows: the lowest logit that may be drawn (R), a bit for each token that the text
// has (R, (V + 31) / 32), and the best of each CHUNK (R, chunks).
typedef struct {
    float *least;
    uint32_t *seen;
    Best *bests;
} ChooseRoom;

ChooseRoom room_for_choices(int64_t R, int64_t V, Arena *arena);

// Checks settings and the ids of a text for `choose_rows`.
offramp_status check_choice(const Choice *choice, int64_t V, offramp_error *error);

// Chooses a token for each of R rows of logits y (R, V), shared out among threads; it changes y. `chosen` (R)
// are ids, or -1 and -2 as in offramp_choose. The choices do not change before all threads are done.
void choose_rows(Hand *hand, const Choice *choices, int64_t R, float *y, int64_t V, const ChooseRoom *room,
                 int64_t *chosen);
