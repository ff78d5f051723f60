#include "drafts.h"

#include "gates.h"

// Drafts that a share is mostly of; rounds after which an exit is asked again at the latest.
enum { NEWEST = 16, LONGEST = 64 };

Estimates new_estimates(void) { return (Estimates){{0, 0.5, 0.5, 0.5}, {1, 4, 4, 4}, 0.5, 1, 1, 0, NEWEST}; }

DraftRoom room_for_drafts(const Drafter *d, Arena *arena) {
    const int64_t D = d->down.rows, K = d->in.columns, W = d->down.columns, n = d->head.rows;
    return (DraftRoom){
        .x = take_floats(arena, K),
        .act = take_floats(arena, d->in.rows),
        .out = take_floats(arena, D),
        .narrow = take_floats(arena, narrow_room(1, K > W ? K : W)),
        .y = take_floats(arena, n),
        .sums = take_floats(arena, chunks_of(n)),
        .bests = take(arena, chunks_of(n) * (int64_t)sizeof(Best)),
        .head = room_for_head(&d->head, NULL, 1, arena),
    };
}

// Scales a state h (D) to a root mean square of 1: `unit` of exits/parts.py.
static void to_unit(const float *h, int64_t D, float *x) {
    const float scale = 1 / sqrtf(sum(dots(h, h, D)) / D + 1e-6f);
    for (int64_t k = 0; k < D; k++) x[k] = scale * h[k];
}

void adapt(Hand *hand, const Drafter *d, const float *h, const float *top, const float *middle,
           const DraftRoom *room) {
    const int64_t D = d->down.rows, W = d->down.columns, K = d->in.columns;
    const float *scale = floats(d->scale);
    float *gate = room->act + D, *up = gate + W;
    const Rows in = rows_of(&d->in, room->x, K, 1, room->narrow),
               act = rows_of(&d->down, up, W, 1, room->narrow);
    EACH_PIECE(i, hand, 1) {
        standardise(h, floats(d->mean), floats(d->spread), D, room->x);
        to_unit(top, D, room->x + D);
        if (d->middle) to_unit(middle, D, room->x + 2 * D);
        if (narrows(kind_of(&d->in))) make_narrow(&d->in, &in, 0);
    }
    multiply(hand, &d->in, in, 1, (Out){room->act, D + 2 * W, 0}, 0, D + 2 * W);
    EACH_PIECE(i, hand, 1) {
        times_silu(up, gate, W);
        if (narrows(kind_of(&d->down))) make_narrow(&d->down, &act, 0);
    }
    multiply(hand, &d->down, act, 1, (Out){room->act, D, 1}, 0, D);
    EACH_PIECE(i, hand, 1)
    for (int64_t k = 0; k < D; k++) room->out[k] = scale ? h[k] + scale[k] * room->act[k] : room->act[k];
}

void read_draft(Hand *hand, const Drafter *d, const float *norm, float eps, const DraftRoom *room,
                Round *round, int64_t n) {
    const int64_t V = d->head.rows, pieces = chunks_of(V), *tokens = d->tokens.values;
    const float *y = room->y;
    read_logits(hand, &d->head, norm, eps, NULL, room->out, 1, &room->head, NULL, room->y);
    EACH_PIECE(p, hand, pieces) room->bests[p] = best_of(y, p * CHUNK, min_(V, (p + 1) * CHUNK));
    EACH_PIECE(p, hand, pieces) {
        const vf most = all(best_among(room->bests, pieces).logit);
        vf total = {0};
        for (int64_t i = p * CHUNK, to = min_(V, i + CHUNK); i < to; i += LANES) {
            const vf e = exp_(load_up_to(y + i, to - i) - most);
            total += to - i < LANES ? choose(COUNT < (int32_t)(to - i), e, (vf){0}) : e;
        }
        room->sums[p] = sum(total);
    }
    EACH_PIECE(i, hand, 1) {
        float total = 0;
        for (int64_t p = 0; p < pieces; p++) total += room->sums[p];
        const int32_t best = best_among(room->bests, pieces).id;
        round->draft[n] = tokens ? tokens[best] : best;
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

// The table's value for the longest context that it knows at the end of `count` ids, or 0: 256 · a token +
// its chance to follow, in 1/255. It is a hash table (exits/ngrams.py).
static uint32_t expected(const Drafter *d, const int64_t *ids, int64_t count) {
    const uint32_t *keys = d->keys.values, *values = d->values.values;
    const int64_t mask = d->keys.count - 1;
    for (int64_t n = min_(d->longest, count); keys && n >= d->shortest; n--) {
        const uint32_t key = key_of(ids + count - n, n);
        for (int64_t slot = key & mask, looks = 0; keys[slot] && looks <= mask;
             slot = (slot + 1) & mask, looks++)
            if (keys[slot] == key) return values[slot];
    }
    return 0;
}

void choose_source(const Drafter *d, Estimates *e, Round *round, int64_t n, const int64_t *ids, int64_t count,
                   int64_t V) {
    const float *costs = floats(d->costs);
    const double rate = fmax(1, e->tokens / e->cost), row = costs[n + 1] - costs[n];
    const double asks = fmax((row + d->asking) * rate, d->floor);
    const int64_t found = looked_up(ids, count, d->alike);
    uint32_t value = expected(d, ids, count);
    if (value >> 8 >= V) value = 0;
    const double promise = (value & 255) / 255.0, table = value ? promise * e->right[TABLE] / e->promised : 0;
    const double text = found >= 0 ? e->right[TEXT] : 0, free = fmax(text, table), exit = e->right[EXIT];
    int ask = (n == 0 || round->source[n - 1] == EXIT) && round->chance * exit > asks;
    if (n == 0 && ask) e->rest = e->pause = NEWEST;
    if (n == 0 && !ask && --e->rest <= 0)
        ask = 1, e->rest = e->pause = e->pause < LONGEST ? 2 * e->pause : LONGEST;
    round->source[n] = free > 0 && (!ask || free >= exit) ? (text >= table ? TEXT : TABLE)
                       : ask                              ? EXIT
                                                          : NOTHING;
    if (round->source[n] == TEXT) round->draft[n] = found, round->sure[n] = fmin(text, 1);
    if (round->source[n] == TABLE)
        round->draft[n] = value >> 8, round->sure[n] = fmin(table, 1), round->promise[n] = promise;
}

void choose_whether(const Drafter *d, const Estimates *e, Round *round, int64_t n) {
    const float *costs = floats(d->costs);
    const double rate = fmax(1, e->tokens / e->cost), chance = round->chance * round->sure[n];
    round->kept[n] = chance > fmax((costs[n + 1] - costs[n]) * rate, d->floor);
    if (round->kept[n]) round->chance = chance, round->drafts = n + 1;
}

static double one_more(double seen) { return seen < NEWEST ? seen + 1 : NEWEST; }
static void learn(double *estimate, double seen, double now) { *estimate += (now - *estimate) / seen; }

void learn_from(const Drafter *d, Estimates *e, const Round *round, const int64_t *chosen) {
    double asked = 0;
    for (int64_t n = 0; n <= MOST_DRAFTS && round->source[n] != NOTHING; n++) {
        asked += round->source[n] == EXIT;
        const int64_t source = round->source[n];
        if (n > round->stood) continue;
        e->seen[source] = one_more(e->seen[source]);
        learn(e->right + source, e->seen[source], round->draft[n] == chosen[n]);
        if (source == TABLE) learn(&e->promised, e->seen[source], round->promise[n]);
    }
    e->seen[NOTHING] = one_more(e->seen[NOTHING]);
    learn(&e->tokens, e->seen[NOTHING], round->stood + 1);
    learn(&e->cost, e->seen[NOTHING], 1 + floats(d->costs)[round->drafts] + d->asking * asked);
}
