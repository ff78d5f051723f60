// Greedy decoding of one sequence: several tokens in one call, each from its embedding to the choice of the next. For blocks.c.

#pragma once
#include "drafts.h"

// What is asked for, and what is found. ids[0] is the newest token, `before` others stand before it, and ids[t + 1] is the choice
// after token t; a choice is -1 where logits are not finite. Decoding ends when `enough` tokens are decided (`most` at most), after
// one of the `ends`, and where a gate stops a token.
typedef struct {
    const void *embedding;  // (V, D) in bfloat16, or float32 where `whole`
    int64_t whole;
    const Head *head;
    const Sketch *sketch;    // or NULL
    const Drafter *drafter;  // or NULL: no drafts
    Estimates *estimates;    // of the drafter
    double penalty;          // of repetition; 1 is none
    const int64_t *ends;
    int64_t ends_count, enough, most, before;
    int64_t *ids;           // before + most + 1, of which this is the newest
    float *h, *middles;     // (rows, D) each: hidden states of the newest rows, and those before block `middle` of the drafter
    float *deep;            // (2, D): the newest token's that reached the top, there, and before block `middle`
    int64_t decided, run;   // tokens chosen; blocks run of a token that a gate stopped, else 0
    Round *rounds;          // most, zeros
    int64_t rounds_count;
    double seconds[5];      // of embeddings, blocks, heads, choices, drafts
} Steps;

// What runs rows h at the places t + n of these steps, and after, through blocks `start` to `stop` - 1: row n, and after, of the
// round that begins with token t. Returns the number of blocks before its end. And what makes memories forget: `save` is called
// before drafts of a round enter these blocks, in a chunk or one by one; `keep` keeps the first `kept` of the `made` rows.
typedef struct {
    void *worker;
    int64_t blocks;
    int64_t (*run)(void *worker, float *h, int64_t t, int64_t n, int64_t rows, int64_t start, int64_t stop, const Gates *gates);
    void (*save)(void *worker, int64_t start, int64_t stop, int chunk);          // or NULL
    void (*keep)(void *worker, int64_t after, int64_t kept, int64_t made, int64_t blocks);  // or NULL
} Runner;

// Puts the embedding of token t into row n of h.
static void embed(Hand *hand, const Steps *s, int64_t t, int64_t n) {
    const int64_t D = s->head->weight.columns;
    float *h = s->h + n * D;
    EACH_PIECE(i, hand, 1) {
        const int64_t from = s->ids[t] * D;
        const uint16_t *half = (const uint16_t *)s->embedding + from;
        if (s->whole) memcpy(h, (const float *)s->embedding + from, D * sizeof(float));
        else for (int64_t k = 0; k < D; k += LANES) store_up_to(h + k, from_bfloat16(half + k, D - k), D - k);
    }
}

// Whether a text ends with a token.
static int ends_with(const Steps *s, int64_t id) {
    int end = id < 0;
    for (int64_t i = 0; i < s->ends_count; i++) end |= id == s->ends[i];
    return end;
}

// Notes what full depth chooses after each row of a round, and which drafts stand.
static void judge(Steps *s, Round *round, int64_t t, const Best *bests, int64_t pieces) {
    const int64_t D = s->head->weight.columns, n = round->drafts;
    int64_t chosen[MOST_DRAFTS + 1], stood = 0;
    for (int64_t r = 0; r <= n; r++) {
        const Best best = best_among(bests + r * pieces, pieces);
        chosen[r] = isfinite(best.logit) ? best.id : -1;
    }
    while (stood < n && chosen[stood] == s->ids[t + 1 + stood]) stood++;
    s->ids[t + 1 + stood] = chosen[stood];
    memcpy(s->deep, s->h + stood * D, D * sizeof(float));
    if (s->drafter && s->drafter->middle) memcpy(s->deep + D, s->middles + stood * D, D * sizeof(float));
    round->ends = ends_with(s, chosen[stood]);
    round->stood = stood;
    if (s->drafter) learn_from(s->drafter, s->estimates, round, chosen);
}

// Makes the ids that stand up to token t less likely: the library's repetition penalty. `seen` has a bit for each token.
static void penalise(const Steps *s, int64_t t, float *y, uint32_t *seen) {
    const float penalty = (float)s->penalty;
    memset(seen, 0, (s->head->weight.rows + 31) / 32 * sizeof *seen);
    for (const int64_t *id = s->ids - s->before; id <= s->ids + t; id++) {
        if (seen[*id / 32] >> *id % 32 & 1) continue;
        seen[*id / 32] |= 1u << *id % 32;
        y[*id] = y[*id] < 0 ? y[*id] * penalty : y[*id] / penalty;
    }
}

// Reads out the rows of a round, and chooses. `y` has R · V floats, 2 · R for each CHUNK of V, and then those of
// `read_logits`.
static void decide(Hand *hand, Steps *s, Round *round, int64_t t, int64_t R, float *y, Found *found) {
    const int64_t V = s->head->weight.rows, pieces = (V + CHUNK - 1) / CHUNK;
    Best *bests = (Best *)(y + R * V);
    float *floats = y + R * (V + 2 * pieces);
    const double start = omp_get_wtime();
    read_logits(hand, s->head, s->sketch, s->h, R, floats, found, y);
    const double read = omp_get_wtime();
    if (s->penalty != 1)
        EACH_PIECE(r, hand, R) penalise(s, t + r, y + r * V, (uint32_t *)floats + r * ((V + 31) / 32));
    EACH_PIECE(i, hand, R * pieces) {
        const int64_t p = i % pieces;
        bests[i] = best_of(y + i / pieces * V, p * CHUNK, min_(V, (p + 1) * CHUNK));
    }
    EACH_PIECE(i, hand, 1) judge(s, round, t, bests, pieces);
    if (!hand->t) s->seconds[2] += read - start, s->seconds[3] += omp_get_wtime() - read;
}

// Makes the drafts of the round that begins with token t. Row n of h is then token t + n, before block `after` of the drafter.
// Returns the number of drafts.
static int64_t draft(Hand *hand, Steps *s, Round *round, int64_t t, const Desk *desk, const Runner *with) {
    const Drafter *d = s->drafter;
    const int64_t D = s->head->weight.columns, most = min_(d->most, s->most - t - 1), blocks = with->blocks;
    for (int64_t n = 0;; n++) {
        embed(hand, s, t + n, n);
        if (d->after) with->run(with->worker, s->h + n * D, t, n, 1, 0, d->after, NULL);
        if (n == most) return n;
        EACH_PIECE(i, hand, 1) {
            if (!n) round->chance = 1;
            choose_source(d, s->estimates, round, n, s->ids - s->before, s->before + t + n + 1);
        }
        if (round->source[n] == EXIT) {
            adapt(hand, d, s->h + n * D, n ? desk->out : s->deep, s->deep + D, desk);
            if (d->tail) with->run(with->worker, desk->out, t, n, 1, blocks - d->tail, blocks, NULL);
            guess(hand, d, desk, round, n);
        }
        EACH_PIECE(i, hand, 1) {
            // Full depth decides without a draft whether the text ends.
            if (round->source[n] != NOTHING && !ends_with(s, round->guess[n])) choose_whether(d, s->estimates, round, n);
            if (round->kept[n]) s->ids[t + n + 1] = round->guess[n];
        }
        if (!round->kept[n]) return n;
        if (!n && with->save) with->save(with->worker, 0, d->after, 0);
    }
}

// Runs the rows of the round that begins with token t from block `after` to the top. Returns the number of blocks before their end.
static int64_t run_chunk(Hand *hand, const Steps *s, int64_t t, int64_t R, int64_t after, const Gates *gates, const Runner *with) {
    const int64_t D = s->head->weight.columns, middle = s->drafter ? s->drafter->middle : 0;
    if (middle) {
        with->run(with->worker, s->h, t, 0, R, after, middle, NULL);
        EACH_PIECE(r, hand, R) memcpy(s->middles + r * D, s->h + r * D, D * sizeof(float));
        after = middle;
    }
    return with->run(with->worker, s->h, t, 0, R, after, with->blocks, gates);
}

// Takes the steps, shared out. `gates` (or NULL) has logits for every token; `found` (most) is zeros; `y` is as for `decide`, for
// all rows of a round, and then comes a drafter's desk.
static void take_steps(Hand *hand, Steps *s, const Gates *gates, float *y, float *place, Found *found, const Runner *with) {
    const int64_t after = s->drafter ? s->drafter->after : 0;
    const Desk desk = s->drafter ? desk_at(s->drafter, place) : (Desk){0};
    int64_t run = with->blocks, t = 0, rounds = 0;
    for (int end = 0; t < s->enough && !end;) {
        Round *round = s->rounds + rounds;
        const double start = omp_get_wtime();
        int64_t n = 0;
        if (s->drafter) n = draft(hand, s, round, t, &desk, with);
        else embed(hand, s, t, 0);
        const double embedded = omp_get_wtime();
        const Gates own = gates ? (Gates){gates->gates, gates->count, gates->seen, gates->logits + t * gates->count} : (Gates){0};
        if (n && with->save) with->save(with->worker, after, with->blocks, 1);
        run = run_chunk(hand, s, t, n + 1, after, gates ? &own : NULL, with);
        if (!hand->t) s->seconds[s->drafter ? 4 : 0] += embedded - start, s->seconds[1] += omp_get_wtime() - embedded;
        if (run < with->blocks) break;
        decide(hand, s, round, t, n + 1, y, found + t);
        if (n && with->keep) with->keep(with->worker, after, round->stood + 1, n + 1, with->blocks);
        t += round->stood + 1, end = round->ends, rounds++;
    }
    if (!hand->t) s->decided = t, s->run = run < with->blocks ? run : 0, s->rounds_count = rounds;
}
