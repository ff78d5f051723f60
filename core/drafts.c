#include "drafts.h"

// The number of newest drafts that a share mostly reflects; the longest pause of an exit, in rounds; the
// number of newest ids that prompt look-up searches.
enum { NEWEST = 16, LONGEST = 64, LOOKED_BACK = 1024 };

Estimates new_estimates(void) {
    return (Estimates){{0, 0.5, 0.5, 0.5}, {1, 4, 4, 4}, {0, 0.5, 0.5, 0.5}, 1, 1, 0, NEWEST};
}

// The id that followed the last `alike` of `count` ids when they last occurred, or -1.
static int64_t looked_up(const int64_t *ids, int64_t count, int64_t alike) {
    const int64_t *last = ids + count - alike, *first = count > LOOKED_BACK ? ids + count - LOOKED_BACK : ids;
    for (const int64_t *at = last - 1; alike && at >= first; at--)
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

// The table's value for the longest context that it knows at the end of `count` ids: 256 · a token + its
// chance to follow, in 1/255; 0 if it knows none. It is a hash table (exits/ngrams.py).
static uint32_t expected(const Guesses *g, const int64_t *ids, int64_t count) {
    const uint32_t *keys = g->keys.values, *values = g->values.values;
    const int64_t mask = g->keys.count - 1;
    for (int64_t n = min_(g->longest, count); n >= g->shortest; n--) {
        const uint32_t key = key_of(ids + count - n, n);
        for (int64_t slot = key & mask; keys[slot]; slot = (slot + 1) & mask)
            if (keys[slot] == key) return values[slot];
    }
    return 0;
}

// The chance that draft n is right, by its source's promise and the estimates.
static double sure_of(const Estimates *e, const Round *round) {
    const int64_t n = round->drafts, source = round->source[n];
    const double right = e->right[source];
    if (source == TEXT || !(e->promised[source] > 0)) return right;
    return fmin(1, round->promise[n] * right / e->promised[source]);
}

void choose_source(const Free *from, Estimates *e, Round *round, int exits, const int64_t *ids, int64_t count,
                   const Prices *prices) {
    const int64_t n = round->drafts;
    const double least = fmax((prices->row + prices->asking) * prices->tokens, prices->floor);
    const int64_t found = looked_up(ids, count, from->alike);
    const uint32_t value = from->guesses ? expected(from->guesses, ids, count) : 0;
    const double promise = (value & 255) / 255.0,
                 table = value ? promise * e->right[TABLE] / e->promised[TABLE] : 0,
                 text = found >= 0 ? e->right[TEXT] : 0, most = fmax(text, table), exit = e->right[EXIT];
    int ask = exits && (n == 0 || round->source[n - 1] == EXIT) && round->chance * exit > least;
    if (exits && n == 0 && ask) e->rest = e->pause = NEWEST;
    if (exits && n == 0 && !ask && --e->rest <= 0)
        ask = 1, e->rest = e->pause = e->pause < LONGEST ? 2 * e->pause : LONGEST;
    round->source[n] = most > 0 && (!ask || most >= exit) ? (text >= table ? TEXT : TABLE)
                       : ask                              ? EXIT
                                                          : NOTHING;
    round->draft[n] = round->source[n] == TEXT    ? found
                      : round->source[n] == TABLE ? (int64_t)(value >> 8)
                                                  : -1;
    round->promise[n] = round->source[n] == TABLE ? promise : 0;
}

int pays(const Estimates *e, const Round *round, const Prices *prices) {
    const double chance = round->chance * sure_of(e, round);
    return chance > fmax(prices->row * prices->tokens, prices->floor);
}

void keep_draft(const Estimates *e, Round *round) {
    round->chance *= sure_of(e, round);
    round->drafts++;
    if (round->drafts <= MOST_DRAFTS) round->source[round->drafts] = NOTHING;
}

static double one_more(double seen) { return seen < NEWEST ? seen + 1 : NEWEST; }
static void learn(double *estimate, double seen, double now) { *estimate += (now - *estimate) / seen; }

void learn_from(Estimates *e, const Round *round, int64_t stood, const int64_t *chosen, double cost) {
    for (int64_t n = 0; n <= stood && round->source[n] != NOTHING; n++) {
        const int64_t source = round->source[n];
        if (round->draft[n] < 0) continue;
        e->seen[source] = one_more(e->seen[source]);
        learn(e->right + source, e->seen[source], round->draft[n] == chosen[n]);
        if (source != TEXT) learn(e->promised + source, e->seen[source], round->promise[n]);
    }
    e->seen[NOTHING] = one_more(e->seen[NOTHING]);
    learn(&e->tokens, e->seen[NOTHING], stood + 1);
    learn(&e->cost, e->seen[NOTHING], cost);
}
