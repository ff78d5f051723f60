// Drafts: guesses at the tokens that follow, which full depth then decides in one chunk. For steps.h. They come from an exit, and
// for nothing from the text, where it repeats itself (prompt look-up), and from a table of what often follows a few tokens.

#pragma once
#include "gates.h"
#include "head.h"

enum { MOST_DRAFTS = 7 };  // of a round
enum { NOTHING, EXIT, TEXT, TABLE, SOURCES };  // what a draft comes from

// A hash table of `mask` + 1 slots (exits/ngrams.py). A value is 256 · a token + its chance to follow, in 1/255.
typedef struct {
    const uint32_t *keys, *values;
    int64_t mask, shortest, longest;
} Ngrams;

// An exit that drafts: exits/readouts.py says what its read-out computes (DeepAdapter).
typedef struct {
    int64_t after, tail, middle;  // blocks before it; the model's last blocks that run after it; blocks before the middle state
    Weight in, down;              // (D + 2W, 2D or 3D), of which the first D rows are added to the output; (D, W)
    const float *mean, *spread;   // (D) each, of the hidden states that it reads
    const float *scale;           // (D): the output is h + scale · y; NULL: it is y
    Head head;                    // of the tokens that it can draft
    const int64_t *tokens;        // their ids, or NULL for the whole vocabulary
    const Ngrams *ngrams;         // or NULL
    int64_t most, alike;          // drafts of a round; tokens that stand earlier, too, where a text repeats itself (0: none)
    float rows[MOST_DRAFTS + 1];  // what so many more rows of a chunk cost, in steps of full depth
    float asking, floor;          // what one draft costs; least chance of a draft
} Drafter;

// What is learned from the drafts of one sequence. It decides how many drafts are made.
typedef struct {
    double right[SOURCES], seen[SOURCES];  // share of each source's newest drafts that were right; how many (NOTHING: rounds)
    double promised;                       // mean chance of the table's newest drafts
    double tokens, cost;                   // of a round; the cost in steps of full depth
    int64_t rest, pause;                   // rounds until an exit whose drafts do not pay is asked again: now, and next time
} Estimates;

// A round: drafts, and full depth's decisions about them. What a thread decides by stands here, and is written once, so that a
// thread that comes late decides the same.
typedef struct {
    int64_t source[MOST_DRAFTS + 1], guess[MOST_DRAFTS + 1], kept[MOST_DRAFTS + 1];
    double sure[MOST_DRAFTS + 1];  // the exit's probability, or how often such drafts were right
    double promise[MOST_DRAFTS + 1];  // the table's chance
    double chance;                 // that all drafts so far stand
    int64_t drafts, stood, ends;   // drafts; those that full depth chose too; whether the text ends
} Round;

enum { NEWEST = 16, LONGEST = 64 };  // drafts that a share is mostly of; rounds after which an exit is asked again at the latest

// What an exit works with: x (K columns of `in`), act (D + 2W), out (D), narrow as for `prepare`, floats as for `read_logits`, and
// logits y (n), followed by 3 numbers for each CHUNK of them.
typedef struct {
    float *x, *act, *out, *narrow, *floats, *y;
} Desk;

static Desk desk_at(const Drafter *d, float *place) {
    const int64_t D = d->down.rows, W = d->down.columns, K = d->in.columns;
    float *act = place + K, *out = act + D + 2 * W, *narrow = out + D, *floats = narrow + K + W + 64;
    return (Desk){place, act, out, narrow, floats, floats + 2 * D + 64};
}

// Scales a state h (D) to a root mean square of 1: `unit` of exits/parts.py.
static void to_unit(const float *h, int64_t D, float *x) {
    const float scale = 1 / sqrtf(sum(dots(h, h, D)) / D + 1e-6f);
    for (int64_t k = 0; k < D; k++) x[k] = scale * h[k];
}

// The exit's state for a hidden state h (D), given the top and a middle one of the token before, shared out: `desk->out`, before its
// tail.
static void adapt(Hand *hand, const Drafter *d, const float *h, const float *top, const float *middle, const Desk *desk) {
    const int64_t D = d->down.rows, W = d->down.columns, K = d->in.columns;
    float *gate = desk->act + D, *up = gate + W;
    const Rows in = rows_in(&d->in, desk->x, K, 1, desk->narrow), act = rows_in(&d->down, up, W, 1, desk->narrow);
    EACH_PIECE(i, hand, 1) {
        standardise(h, d->mean, d->spread, D, desk->x);
        to_unit(top, D, desk->x + D);
        if (d->middle) to_unit(middle, D, desk->x + 2 * D);
        if (narrow(d->in.kind)) pack(&d->in, &in, 0);
    }
    multiply(hand, &d->in, in, 1, (Out){desk->act, D + 2 * W, 0}, 0, D + 2 * W);
    EACH_PIECE(i, hand, 1) {
        times_silu(up, gate, W);
        if (narrow(d->down.kind)) pack(&d->down, &act, 0);
    }
    multiply(hand, &d->down, act, 1, (Out){desk->act, D, 1}, 0, D);
    EACH_PIECE(i, hand, 1)
        for (int64_t k = 0; k < D; k++) desk->out[k] = d->scale ? h[k] + d->scale[k] * desk->act[k] : desk->act[k];
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

// The largest of several, the first of equals.
static Best best_among(const Best *bests, int64_t count) {
    Best best = bests[0];
    for (int64_t i = 1; i < count; i++)
        if (bests[i].logit > best.logit || isnan(bests[i].logit)) best = bests[i];
    return best;
}

// Reads out `desk->out`, and notes the most probable token and its probability as draft n.
static void guess(Hand *hand, const Drafter *d, const Desk *desk, Round *round, int64_t n) {
    const int64_t V = d->head.weight.rows, pieces = (V + CHUNK - 1) / CHUNK;
    Best *bests = (Best *)(desk->y + V);
    float *sums = desk->y + V + 2 * pieces;
    read_logits(hand, &d->head, NULL, desk->out, 1, desk->floats, NULL, desk->y);
    EACH_PIECE(p, hand, pieces) bests[p] = best_of(desk->y, p * CHUNK, min_(V, (p + 1) * CHUNK));
    EACH_PIECE(p, hand, pieces) {
        const vf most = all(best_among(bests, pieces).logit);
        vf total = {0};
        for (int64_t i = p * CHUNK, to = min_(V, i + CHUNK); i < to; i += LANES) {
            const vf e = exp_(load_up_to(desk->y + i, to - i) - most);
            total += to - i < LANES ? choose(COUNT < (int32_t)(to - i), e, (vf){0}) : e;
        }
        sums[p] = sum(total);
    }
    EACH_PIECE(i, hand, 1) {
        float total = 0;
        for (int64_t p = 0; p < pieces; p++) total += sums[p];
        const int32_t best = best_among(bests, pieces).id;
        round->guess[n] = d->tokens ? d->tokens[best] : best;
        round->sure[n] = 1 / total;  // NaN for logits that are not finite: then nothing is drafted
    }
}

// The id that followed the last `alike` of `count` ids where they stood before, or -1.
static int64_t looked_up(const int64_t *ids, int64_t count, int64_t alike) {
    const int64_t *last = ids + count - alike;
    for (const int64_t *at = last - 1; alike && at >= ids; at--)
        if (at[alike - 1] == last[alike - 1] && !memcmp(at, last, alike * sizeof *ids)) return at[alike];
    return -1;
}

// The hash of n ids: `_hashes` of exits/ngrams.py.
static uint32_t key_of(const int64_t *ids, int64_t n) {
    uint32_t key = (uint32_t)n;
    for (int64_t i = 0; i < n; i++) {
        key = (key ^ (uint32_t)ids[i]) * 0x9E3779B1u;
        key ^= key >> 15;
    }
    return key ? key : 1;
}

// The table's value for the longest context that it knows at the end of `count` ids, or 0.
static uint32_t expected(const Ngrams *g, const int64_t *ids, int64_t count) {
    for (int64_t n = min_(g->longest, count); n >= g->shortest; n--) {
        const uint32_t key = key_of(ids + count - n, n);
        for (int64_t slot = key & g->mask; g->keys[slot]; slot = (slot + 1) & g->mask)
            if (g->keys[slot] == key) return g->values[slot];
    }
    return 0;
}

// Decides where draft n of a round comes from: from whichever source is likelier to be right, if it is likely enough to stand.
// `ids` are all ids so far, drafts among them. An exit goes on only from its own drafts, whose states it knows.
static void choose_source(const Drafter *d, Estimates *e, Round *round, int64_t n, const int64_t *ids, int64_t count) {
    const double rate = fmax(1, e->tokens / e->cost), row = d->rows[n + 1] - d->rows[n];
    const double asks = fmax((row + d->asking) * rate, d->floor);
    const int64_t found = looked_up(ids, count, d->alike);
    const uint32_t value = d->ngrams ? expected(d->ngrams, ids, count) : 0;
    const double promise = (value & 255) / 255.0, table = value ? promise * e->right[TABLE] / e->promised : 0;
    const double text = found >= 0 ? e->right[TEXT] : 0, free = fmax(text, table), exit = e->right[EXIT];
    int ask = (n == 0 || round->source[n - 1] == EXIT) && round->chance * exit > asks;
    if (n == 0 && ask) e->rest = e->pause = NEWEST;
    if (n == 0 && !ask && --e->rest <= 0) ask = 1, e->rest = e->pause = e->pause < LONGEST ? 2 * e->pause : LONGEST;
    round->source[n] = free > 0 && (!ask || free >= exit) ? (text >= table ? TEXT : TABLE) : ask ? EXIT : NOTHING;
    if (round->source[n] == TEXT) round->guess[n] = found, round->sure[n] = fmin(text, 1);
    if (round->source[n] == TABLE) round->guess[n] = value >> 8, round->sure[n] = fmin(table, 1), round->promise[n] = promise;
}

// Decides whether draft n is tried.
static void choose_whether(const Drafter *d, const Estimates *e, Round *round, int64_t n) {
    const double rate = fmax(1, e->tokens / e->cost), chance = round->chance * round->sure[n];
    round->kept[n] = chance > fmax((d->rows[n + 1] - d->rows[n]) * rate, d->floor);
    if (round->kept[n]) round->chance = chance, round->drafts = n + 1;
}

static double one_more(double seen) { return seen < NEWEST ? seen + 1 : NEWEST; }
static void learn(double *estimate, double seen, double now) { *estimate += (now - *estimate) / seen; }

// Learns from a round what full depth chose.
static void learn_from(const Drafter *d, Estimates *e, const Round *round, const int64_t *chosen) {
    double asked = 0;
    for (int64_t n = 0; n <= MOST_DRAFTS && round->source[n] != NOTHING; n++) {
        asked += round->source[n] == EXIT;
        const int64_t source = round->source[n];
        if (n > round->stood) continue;
        e->seen[source] = one_more(e->seen[source]);
        learn(e->right + source, e->seen[source], round->guess[n] == chosen[n]);
        if (source == TABLE) learn(&e->promised, e->seen[source], round->promise[n]);
    }
    e->seen[NOTHING] = one_more(e->seen[NOTHING]);
    learn(&e->tokens, e->seen[NOTHING], round->stood + 1);
    learn(&e->cost, e->seen[NOTHING], 1 + d->rows[round->drafts] + d->asking * asked);
}
