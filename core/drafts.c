#include "drafts.h"

// The number of newest drafts that a share mostly reflects; the longest pause of an exit, in rounds; the
// number of newest ids that prompt look-up searches, and how many of them it compares.
enum { NEWEST = 16, LONGEST = 64, LOOKED_BACK = 8192, COMPARED = 16 };

// The chance that an id follows if the last 1, 2, … ids stood before it earlier in the text: the shares in
// own answers of two models, one for code, which hardly differ (decode/drafts.py).
static const double REPEATED[COMPARED] = {0.2,  0.5,  0.62, 0.7,  0.74, 0.78, 0.81, 0.84,
                                          0.86, 0.88, 0.9,  0.91, 0.92, 0.93, 0.94, 0.97};
static const double DOUBT = 2;           // that share counts as much as so many other places in the text
static const double FEW = 4;             // drafts of each source that count as seen when a text begins
static const double LEAST_DOUBT = 0.01;  // no draft is more certain, and none more hopeless

Estimates new_estimates(void) {
    return (Estimates){{0, 0.5, 0.5, 0.5}, {1, FEW, 0, 0}, {0, 0.5, 0.5, 0.5}, 1, 1, 0, NEWEST};
}

void expect(Estimates *e, const double *accepted) {
    if (e->seen[NOTHING] == 1 && accepted[0] > 0) e->right[EXIT] = e->promised[EXIT] = accepted[0];
}

// An id, how many ids before it are alike, its chance to follow, and at how many other places as many are alike
// and at how many of these it followed.
typedef struct {
    int64_t id, alike, others, same;
    double chance;
} Match;

// The id that followed the ids that are most like the last ones: at least `alike`, or there is none. Of equal
// places, the newest counts, and what followed at the others says how much it is worth.
static Match looked_up(const int64_t *ids, int64_t count, int64_t alike) {
    const int64_t first = count > LOOKED_BACK ? count - LOOKED_BACK : 0;
    Match best = {-1, alike - 1, 0, 0, 0};
    for (int64_t at = count - 2; alike && at >= first && best.alike < COMPARED; at--) {
        if (ids[at] != ids[count - 1]) continue;
        int64_t n = 1;
        while (n < COMPARED && at - n >= first && ids[at - n] == ids[count - 1 - n]) n++;
        if (n > best.alike)
            best = (Match){ids[at + 1], n, 0, 0, 0};
        else if (n == best.alike)
            best.others++, best.same += ids[at + 1] == best.id;
    }
    if (best.id >= 0)
        best.chance = ((double)best.same + DOUBT * REPEATED[best.alike - 1]) / ((double)best.others + DOUBT);
    return best;
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

// The chance that a draft is right, by its promise and by what came true of its source's promises. What is
// scaled are odds: a factor for the chance itself would make drafts certain after a few lucky ones.
static double sure_of(const Estimates *e, int64_t source, double promise) {
    const double most = 1 - LEAST_DOUBT, p = fmin(fmax(promise, LEAST_DOUBT), most),
                 right = fmin(fmax(e->right[source], LEAST_DOUBT), most),
                 promised = fmin(fmax(e->promised[source], LEAST_DOUBT), most),
                 likely = p * right * (1 - promised), unlikely = (1 - p) * promised * (1 - right);
    return likely / (likely + unlikely);
}

// The same for the draft that was noted last.
static double sure_of_last(const Estimates *e, const Round *round) {
    return sure_of(e, round->source[round->drafts], round->promise[round->drafts]);
}

// The price of a row for a draft with this chance to be right. Some rows are dear because the pass takes the
// weights once more, and those after them are cheap. So many as are likely to follow share that: where each
// stands with the same chance, 1 / (1 - chance) of them stand up to the first that fails.
static double row_price(const Prices *prices, double chance) {
    const double run = 1 / (1 - fmin(chance, 1));
    return prices->rows[run < MOST_DRAFTS ? (int64_t)run - 1 : MOST_DRAFTS - 1];
}

void choose_source(const Free *from, Estimates *e, Round *round, int exits, const int64_t *ids, int64_t count,
                   const Prices *prices) {
    const int64_t n = round->drafts;
    const Match found = looked_up(ids, count, from->alike);
    const uint32_t value = from->guesses ? expected(from->guesses, ids, count) : 0;
    const double promise = (value & 255) / 255.0, repeated = found.chance,
                 table = value ? sure_of(e, TABLE, promise) : 0,
                 text = found.id >= 0 ? sure_of(e, TEXT, repeated) : 0, most = fmax(text, table),
                 later = from->accepted[0] > 0
                             ? from->accepted[min_(n, OFFRAMP_DEPTHS - 1)] / from->accepted[0]
                             : 1,
                 exit = e->right[EXIT] * later,
                 least = fmax((row_price(prices, exit) + prices->asking) * prices->tokens, prices->floor);
    int ask =
        exits && n < MOST_ASKED && (n == 0 || round->source[n - 1] == EXIT) && round->chance * exit > least;
    if (exits && n == 0 && ask) e->rest = e->pause = NEWEST;
    if (exits && n == 0 && !ask && --e->rest <= 0)
        ask = 1, e->rest = e->pause = e->pause < LONGEST ? 2 * e->pause : LONGEST;
    round->source[n] = most > 0 && (!ask || most >= exit) ? (text >= table ? TEXT : TABLE)
                       : ask                              ? EXIT
                                                          : NOTHING;
    round->draft[n] = round->source[n] == TEXT    ? found.id
                      : round->source[n] == TABLE ? (int64_t)(value >> 8)
                                                  : -1;
    round->promise[n] = round->source[n] == TEXT ? repeated : round->source[n] == TABLE ? promise : 0;
}

int pays(const Estimates *e, const Round *round, const Prices *prices) {
    const double sure = sure_of_last(e, round);
    if (isinf(prices->rows[0])) return 0;  // the pass has no room
    return round->chance * sure > fmax(row_price(prices, sure) * prices->tokens, prices->floor);
}

void keep_draft(const Estimates *e, Round *round) {
    round->chance *= sure_of_last(e, round);
    round->drafts++;
    if (round->drafts <= MOST_DRAFTS) round->source[round->drafts] = NOTHING;
}

static double one_more(double seen) { return seen < NEWEST ? seen + 1 : NEWEST; }
static void learn(double *estimate, double seen, double now) { *estimate += (now - *estimate) / seen; }

void learn_from(Estimates *e, const Round *round, int64_t stood, const int64_t *chosen, double cost) {
    for (int64_t n = 0; n <= stood && round->source[n] != NOTHING; n++) {
        const int64_t source = round->source[n];
        if (round->draft[n] < 0) continue;
        if (!e->seen[source])
            e->right[source] = e->promised[source] = round->promise[n], e->seen[source] = FEW;
        e->seen[source] = one_more(e->seen[source]);
        learn(e->right + source, e->seen[source], n < stood || round->draft[n] == chosen[n]);
        learn(e->promised + source, e->seen[source], round->promise[n]);
    }
    e->seen[NOTHING] = one_more(e->seen[NOTHING]);
    learn(&e->tokens, e->seen[NOTHING], stood + 1);
    learn(&e->cost, e->seen[NOTHING], cost);
}
