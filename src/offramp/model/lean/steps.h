// Greedy decoding of one sequence: several tokens in one call, each from its embedding to the choice of the next. For llama.c and
// mamba2.c.

#pragma once
#include "gates.h"
#include "head.h"

// What is asked for, and what is found. ids[0] is the newest token, and ids[t + 1] the choice after token t; a choice is -1 where
// logits are not finite. Decoding ends after `most` tokens, after one of the `ends`, and where a gate stops a token.
typedef struct {
    const void *embedding;  // (V, D) in bfloat16, or float32 where `whole`
    int64_t whole;
    const Head *head;
    const Sketch *sketch;   // or NULL
    const int64_t *ends;
    int64_t ends_count, most;
    int64_t *ids;           // most + 1
    float *h, *top;         // (D): the newest token's hidden state, and that of the newest token that reached the top
    int64_t decided, run;   // tokens chosen; blocks run of a token that a gate stopped, else 0
    double seconds[4];      // of embeddings, blocks, heads and choices
} Steps;

// Puts the embedding of token t into h.
static void embed(Hand *hand, const Steps *s, int64_t t) {
    const int64_t D = s->head->weight.columns, from = s->ids[t] * D;
    const uint16_t *half = (const uint16_t *)s->embedding + from;
    EACH_PIECE(i, hand, 1) {
        if (s->whole) memcpy(s->h, (const float *)s->embedding + from, D * sizeof(float));
        else for (int64_t k = 0; k < D; k += LANES) store_up_to(s->h + k, from_bfloat16(half + k, D - k), D - k);
    }
}

typedef struct {
    float logit;  // NaN if any is
    int32_t id;
} Best;

// The largest of the logits `from` to `to` - 1, the first of equals.
static Best best_of(const float *y, int64_t from, int64_t to) {
    vf tops = all(-INFINITY);
    vi bad = {0};
    for (int64_t i = from; i < to; i += LANES) {
        const vf v = to - i < LANES ? choose(COUNT < (int32_t)(to - i), load_up_to(y + i, to - i), all(-INFINITY)) : load(y + i);
        tops = choose(v > tops, v, tops);
        bad |= v != v;
    }
    const Best best = {largest(tops), from};
    for (int i = 0; i < LANES; i++)
        if (bad[i]) return (Best){NAN, from};
    for (int64_t i = from; i < to; i++)
        if (y[i] == best.logit) return (Best){best.logit, i};
    return best;
}

// Reads out the newest token's h, and chooses what follows token t. `y` has V + 2 · CHUNK floats, and then those of `read_logits`.
static void decide(Hand *hand, Steps *s, int64_t t, float *y, Found *found) {
    const int64_t V = s->head->weight.rows, D = s->head->weight.columns, pieces = (V + CHUNK - 1) / CHUNK;
    Best *bests = (Best *)(y + V);
    const double start = omp_get_wtime();
    read_logits(hand, s->head, s->sketch, s->h, 1, y + V + 2 * CHUNK, found, y);
    const double read = omp_get_wtime();
    EACH_PIECE(p, hand, pieces) bests[p] = best_of(y, p * CHUNK, min_(V, (p + 1) * CHUNK));
    EACH_PIECE(i, hand, 1) {
        Best best = bests[0];
        for (int64_t p = 1; p < pieces; p++)
            if (bests[p].logit > best.logit || isnan(bests[p].logit)) best = bests[p];
        s->ids[t + 1] = isfinite(best.logit) ? best.id : -1;
        memcpy(s->top, s->h, D * sizeof(float));
    }
    if (!hand->t) s->seconds[2] += read - start, s->seconds[3] += omp_get_wtime() - read;
}

// Whether decoding ends with the choice after token t.
static int ends(const Steps *s, int64_t t) {
    int end = s->ids[t + 1] < 0;
    for (int64_t i = 0; i < s->ends_count; i++) end |= s->ids[t + 1] == s->ends[i];
    return end;
}

// What runs a token's h through the blocks: token t of these steps. Returns the number of blocks run.
typedef int64_t Run_token(void *worker, int64_t t, const Gates *gates);

// Takes the steps, shared out. `gates` (or NULL) has logits for every token; `found` (most) is zeros; `y` is as for `decide`.
static void take_steps(Hand *hand, Steps *s, int64_t blocks, const Gates *gates, float *y, Found *found, Run_token *run_token,
                       void *worker) {
    int64_t run = blocks, t = 0;
    for (int end = 0; t < s->most && !end;) {
        const double start = omp_get_wtime();
        embed(hand, s, t);
        const double embedded = omp_get_wtime();
        if (gates) {
            const Gates own = {gates->gates, gates->count, gates->seen, gates->logits + t * gates->count};
            run = run_token(worker, t, &own);
        } else {
            run = run_token(worker, t, NULL);
        }
        if (!hand->t) s->seconds[0] += embedded - start, s->seconds[1] += omp_get_wtime() - embedded;
        if (run < blocks) break;
        decide(hand, s, t, y, found + t);
        end = ends(s, t++);
    }
    if (!hand->t) s->decided = t, s->run = run < blocks ? run : 0;
}
