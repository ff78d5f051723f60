// Choices of tokens, against references in float64: what may be drawn, and what is.

#include "choose.h"

#include "models.h"

static const offramp_sampling GREEDY = {.top_p = 1, .penalty = 1};

static Tiny model_of(int64_t V, int threads) {
    Shape shape = SMALL;
    shape.blocks = "", shape.vocabulary = V;
    const Tiny t = tiny(shape);
    WORKS(offramp_model_threads(t.model, threads, &said));
    return t;
}

// The token that the library chooses. The logits stay.
static int64_t chosen_by(const Tiny *t, const offramp_sampling *how, const int64_t *ids, int64_t known,
                         const uint32_t *allowed, const float *y) {
    int64_t id = -77;
    float *changed = malloc(t->shape.vocabulary * sizeof *y);
    memcpy(changed, y, t->shape.vocabulary * sizeof *y);
    WORKS(offramp_choose(t->model, how, ids, known, allowed, changed, &id, &said));
    free(changed);
    return id;
}

// The reference -----------------------------------------------------------------------------------

static uint32_t mixed(uint32_t x) {
    x ^= x >> 16, x *= 0x85EBCA6Bu, x ^= x >> 13, x *= 0xC2B2AE35u;
    return x ^ x >> 16;
}

static double noise_of(uint64_t seed, int64_t position, int64_t token) {
    uint64_t z = seed + 0x9E3779B97F4A7C15u * (uint64_t)(position + 1);
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u, z = (z ^ z >> 27) * 0x94D049BB133111EBu, z ^= z >> 31;
    const uint32_t x = mixed(mixed((uint32_t)token + (uint32_t)z) ^ (uint32_t)(z >> 32));
    const float u = fminf((float)x * 0x1p-32f + 0x1p-33f, 1 - 0x1p-24f);
    return -log(-log1p(-(double)u));
}

typedef struct {
    double logit;
    int64_t id;
} Token;

static int by_logit(const void *a, const void *b) {
    const double x = ((const Token *)a)->logit, y = ((const Token *)b)->logit;
    return x < y ? 1 : x > y ? -1 : 0;
}

// Sorts logits y (V), and keeps what may be drawn. Returns how many tokens are kept, or -1 where float32 may
// decide otherwise.
static int64_t kept_of(const offramp_sampling *how, const double *y, int64_t V, Token *tokens) {
    int64_t count = 0;
    double total = 0, before = 0;
    for (int64_t t = 0; t < V; t++)
        if (y[t] > -INFINITY) tokens[count++] = (Token){y[t], t};
    qsort(tokens, count, sizeof *tokens, by_logit);
    if (how->top_k && how->top_k < count) {
        const double least = tokens[how->top_k - 1].logit;
        for (count = how->top_k; count < V && tokens[count].logit == least;) count++;
    }
    for (int64_t i = 0; i < count; i++) total += exp((tokens[i].logit - tokens[0].logit) / how->temperature);
    int64_t kept = 0;
    for (; kept < count && (how->top_p == 1 || before < how->top_p * total); kept++) {
        before += exp((tokens[kept].logit - tokens[0].logit) / how->temperature);
        if (how->top_p < 1 && fabs(before / total - how->top_p) < 2e-6) return -1;
    }
    while (kept < count && tokens[kept].logit == tokens[kept - 1].logit) kept++;
    for (int64_t i = 0; i < kept; i++) {
        const double share = exp((tokens[i].logit - tokens[0].logit) / how->temperature);
        if (how->min_p && share < 1 && fabs(share / how->min_p - 1) < 1e-4) return -1;
        if (share < how->min_p) return i;
    }
    return kept;
}

// The token that is chosen, or -1 where float32 may decide otherwise.
static int64_t reference(const offramp_sampling *how, const int64_t *ids, int64_t known,
                         const uint32_t *allowed, const float *y, int64_t V) {
    double *logits = calloc(V, sizeof *logits), best = -INFINITY, second = -INFINITY;
    Token *tokens = calloc(V, sizeof *tokens);
    for (int64_t t = 0; t < V; t++) logits[t] = !allowed || allowed[t / 32] >> t % 32 & 1 ? y[t] : -INFINITY;
    for (int64_t t = 0; t < V; t++)
        for (int64_t n = 0; n < known; n++)
            if (ids[n] == t) {
                logits[t] = logits[t] < 0 ? logits[t] * how->penalty : logits[t] / how->penalty;
                break;
            }
    offramp_sampling by = *how;
    if (!by.temperature) by.temperature = 1, by.top_k = 0, by.top_p = 1, by.min_p = 0;
    const int64_t kept = kept_of(&by, logits, V, tokens);
    int64_t id = -1;
    for (int64_t i = 0; i < kept; i++) {
        double score = tokens[i].logit / by.temperature;
        if (how->temperature) score += noise_of(how->seed, known, tokens[i].id);
        if (score > best)
            second = best, best = score, id = tokens[i].id;
        else if (score > second)
            second = score;
    }
    free(logits), free(tokens);
    return kept > 0 && best - second > 1e-5 * (1 + fabs(best)) ? id : -1;
}

// Claims ------------------------------------------------------------------------------------------

static offramp_sampling some_settings(int64_t V) {
    static const double temperatures[] = {0, 0.3, 1, 1, 1.7}, top_ps[] = {0.05, 0.6, 0.95, 1, 1, 0.999},
                        min_ps[] = {0, 0, 0.01, 0.2, 1}, penalties[] = {1, 1, 1.3, 0.8};
    const int64_t top_ks[] = {0, 0, 1, 5, 50, V - 1, V, 2 * V};
    return (offramp_sampling){temperatures[below(5)], top_ps[below(6)], min_ps[below(5)],
                              penalties[below(4)],    top_ks[below(8)], random_bits() << 16};
}

static void choices_are_right(void) {
    static const int64_t sizes[] = {1, 7, 16, 50, 333, 1024, 1025, 5000};
    int64_t sure = 0, cases = 0;
    for (int s = 0; s < 8; s++) {
        const int64_t V = sizes[s];
        const int mark = kept_count;
        const Tiny t = model_of(V, 1 + s % 3);
        uint32_t *allowed = memory((V + 31) / 32 * 4);
        for (int i = 0; i < (V < 5000 ? 300 : 60); i++) {
            const float width = uniform(0.5f, 12);
            float *y = zeros(V);
            int64_t ids[9];
            for (int64_t v = 0; v < V; v++) y[v] = width * (uniform(-1, 1) + uniform(-1, 1) + uniform(-1, 1));
            for (int64_t v = 0; v < (V + 31) / 32; v++)
                allowed[v] = (uint32_t)(random_bits() & random_bits());
            allowed[0] |= 1;
            for (int n = 0; n < 9; n++) ids[n] = below(V);
            for (int64_t n = i % 4 == 1 ? V / 2 : 0; n > 0; n--) y[below(V)] = -INFINITY;
            y[0] = uniform(-1, 1);
            const offramp_sampling how = some_settings(V);
            const int64_t known = below(10);
            const uint32_t *mask = i % 3 ? NULL : allowed;
            const int64_t wanted = reference(&how, ids, known, mask, y, V);
            const int64_t found = chosen_by(&t, &how, ids, known, mask, y);
            cases++, sure += wanted >= 0;
            CHECK(wanted < 0 || found == wanted, "%d and not %d of %d, at %g, %g, %g, %d, %g", (int)found,
                  (int)wanted, (int)V, how.temperature, how.top_p, how.min_p, (int)how.top_k, how.penalty);
        }
        offramp_model_free(t.model);
        free_from(mark);
    }
    CHECK(sure > cases * 0.9, "only %d of %d cases were sure", (int)sure, (int)cases);
}

// One of 16 logits is looked at first: where these are the largest, or the smallest, the same may be drawn.
static void samples_do_not_mislead(void) {
    const int64_t V = 4000;
    const Tiny t = model_of(V, 1);
    for (int sign = -1; sign <= 1; sign++)
        for (int64_t k = 1; k < 200; k += 33) {
            offramp_sampling how = {1, 1, 0, 1, k, 3};
            float *y = randoms(V, -1, 1);
            for (int64_t v = 0; v < V; v += 16) y[v] += 5 * sign;
            for (how.seed = 0; how.seed < 20; how.seed++) {
                const int64_t wanted = reference(&how, NULL, 0, NULL, y, V);
                CHECK(wanted < 0 || chosen_by(&t, &how, NULL, 0, NULL, y) == wanted, "the %d largest",
                      (int)k);
            }
        }
    offramp_model_free(t.model);
}

// Equal logits at the border all stay, and the first of equal ones is most probable.
static void equal_logits_stay_or_go_together(void) {
    const Tiny t = model_of(40, 1);
    float y[40];
    for (int i = 0; i < 40; i++) y[i] = i % 10 == 3 ? 2 : -1;
    const offramp_sampling ways[] = {{1, 1, 0, 1, 2, 0}, {1, 0.01, 0, 1, 0, 0}, {1, 1, 1, 1, 0, 0}};
    for (int way = 0; way < 3; way++) {
        offramp_sampling how = ways[way];
        int counts[4] = {0};
        for (how.seed = 0; how.seed < 200; how.seed++) {
            const int64_t id = chosen_by(&t, &how, NULL, 0, NULL, y);
            CHECK(id % 10 == 3, "%d is drawn", (int)id);
            counts[id / 10]++;
        }
        for (int i = 0; i < 4; i++) CHECK(counts[i] > 20, "%d of 200 draws", counts[i]);
    }
    CHECK(chosen_by(&t, &GREEDY, NULL, 0, NULL, y) == 3, "not the first of equals");
    offramp_model_free(t.model);
}

static void what_cannot_be_chosen_is_said(void) {
    const offramp_sampling ways[] = {GREEDY, {1, 1, 0, 1, 0, 1}, {0.7, 0.9, 0.1, 1.2, 5, 2}};
    const int64_t sizes[] = {1, 15, 16, 17, 40, 2050}, ids[] = {0, 0};
    for (int s = 0; s < 6; s++) {
        const int64_t V = sizes[s];
        const Tiny t = model_of(V, 1 + s % 3);
        float *y = zeros(V);
        uint32_t *none = memory((V + 31) / 32 * 4), *one = memory((V + 31) / 32 * 4);
        for (int way = 0; way < 3; way++)
            for (int i = 0; i < 20; i++) {
                const int64_t at = i ? below(V) : V - 1;
                memset(one, 0, (V + 31) / 32 * 4);
                one[at / 32] |= 1u << at % 32;
                for (int64_t v = 0; v < V; v++) y[v] = uniform(-3, 3);
                CHECK(chosen_by(&t, ways + way, ids, 2, one, y) == at, "the only one that is allowed");
                CHECK(chosen_by(&t, ways + way, ids, 2, none, y) == -2, "none is allowed");
                y[at] = NAN;
                CHECK(chosen_by(&t, ways + way, ids, 2, NULL, y) == -1, "a NaN at %d of %d", (int)at, (int)V);
                CHECK(chosen_by(&t, ways + way, ids, 2, none, y) == -1, "a NaN that is not allowed");
                y[at] = INFINITY;
                CHECK(chosen_by(&t, ways + way, ids, 2, NULL, y) == -1, "inf at %d of %d", (int)at, (int)V);
                CHECK(chosen_by(&t, ways + way, ids, 2, none, y) == -1, "an inf that is not allowed");
                for (int64_t v = 0; v < V; v++) y[v] = -INFINITY;
                CHECK(chosen_by(&t, ways + way, ids, 2, NULL, y) == -1, "no logit");
                CHECK(chosen_by(&t, ways + way, ids, 2, one, y) == -2, "no logit of what is allowed");
                y[at] = uniform(-3, 3);
                CHECK(chosen_by(&t, ways + way, ids, 2, NULL, y) == at, "the only logit");
            }
        offramp_model_free(t.model);
    }
}

// A chi-square test: 8 tokens, one of them outside the top 7, over seeds and positions.
static void draws_follow_the_probabilities(void) {
    static const float y[] = {0, 1, 2, 0.5f, -1, 1.5f, 0.2f, -3};
    const Tiny t = model_of(8, 1);
    const int64_t ids[50] = {0}, draws = 40000;
    int counts[8] = {0};
    double total = 0, chi = 0;
    offramp_sampling how = {0.8, 1, 0, 1, 7, 0};
    for (how.seed = 0; how.seed < (uint64_t)draws / 50; how.seed++)
        for (int64_t known = 0; known < 50; known++) counts[chosen_by(&t, &how, ids, known, NULL, y)]++;
    for (int v = 0; v < 7; v++) total += exp(y[v] / 0.8);
    for (int v = 0; v < 7; v++) {
        const double expected = draws * exp(y[v] / 0.8) / total;
        chi += (counts[v] - expected) * (counts[v] - expected) / expected;
    }
    CHECK(!counts[7] && chi < 22.5, "%d, and chi-square %g", counts[7], chi);  // p = 0.001
    offramp_model_free(t.model);
}

// Of many equal tokens, each of 100 ranges is drawn as often; and two draws are independent.
static void noise_is_even(void) {
    const Tiny t = model_of(3000, 2);
    const float *y = zeros(3000);
    const int64_t ids[20] = {0};
    int counts[100] = {0}, pairs[100] = {0};
    double chi = 0, chi_pairs = 0;
    offramp_sampling how = {1, 1, 0, 1, 0, 0};
    int64_t last = 0, draws = 4000;
    for (int64_t i = 0; i < draws; i++) {
        how.seed = (uint64_t)(i / 20);
        const int64_t id = chosen_by(&t, &how, ids, i % 20, NULL, y);
        counts[id / 30]++, pairs[id % 10 * 10 + last % 10]++, last = id;
    }
    for (int i = 0; i < 100; i++) {
        chi += (counts[i] - draws / 100) * (counts[i] - draws / 100) / (draws / 100.0);
        chi_pairs += (pairs[i] - draws / 100) * (pairs[i] - draws / 100) / (draws / 100.0);
    }
    CHECK(chi < 148.2 && chi_pairs < 148.2, "chi-squares %g, %g", chi, chi_pairs);  // p = 0.001
    offramp_model_free(t.model);
}

typedef struct {
    const Choice *choices;
    int64_t R, V, *chosen;
    float *y;
    ChooseRoom room;
} Together;

static void lay(void *context, Arena *arena) {
    Together *all = context;
    all->room = room_for_choices(all->R, all->V, arena);
}

static void work(Hand *hand, void *context) {
    const Together *all = context;
    choose_rows(hand, all->choices, all->R, all->y, all->V, &all->room, all->chosen);
}

// Rows of several texts, each with settings of its own, are what each is alone, with any number of threads.
static void rows_do_not_depend_on_each_other(void) {
    enum { R = 9, V = 3001 };
    Tiny t = model_of(V, 1);
    for (int i = 0; i < 40; i++) {
        const int mark = kept_count;
        offramp_sampling how[R];
        Choice choices[R];
        int64_t alone[R], chosen[R], ids[R][8];
        uint32_t *allowed = memory((V + 31) / 32 * 4);
        const int64_t rows = 1 + below(R);
        float *y = randoms(R * V, -8, 8), *changed = zeros(R * V);
        for (int v = 0; v < V / 32; v++) allowed[v] = (uint32_t)random_bits();
        for (int r = 0; r < R; r++) {
            how[r] = i % 4 ? some_settings(V) : GREEDY;
            for (int n = 0; n < 8; n++) ids[r][n] = below(V);
            choices[r] = (Choice){how + r, ids[r], below(9), i % 4 && r % 3 == 0 ? allowed : NULL};
            const Choice *c = choices + r;
            alone[r] = chosen_by(&t, c->how, c->ids, c->known, c->allowed, y + r * V);
        }
        for (int threads = 1; threads <= 4; threads++) {
            Together all = {.choices = choices, .R = rows, .V = V, .chosen = chosen, .y = changed};
            memcpy(changed, y, R * V * sizeof *y);
            WORKS(offramp_model_threads(t.model, threads, &said));
            pool_enter(&t.model->pool);
            CHECK(lay_out(t.model, lay, &all), "no memory");
            pool_run(&t.model->pool, work, &all);
            pool_leave(&t.model->pool);
            for (int64_t r = 0; r < rows; r++)
                CHECK(chosen[r] == alone[r], "row %d of %d: %d and not %d", (int)r, (int)rows, (int)chosen[r],
                      (int)alone[r]);
        }
        WORKS(offramp_model_threads(t.model, 1, &said));
        free_from(mark);
    }
    offramp_model_free(t.model);
}

static void logarithms_are_precise(void) {
    double worst = 0, worst_of_more = 0;
    for (int i = 0; i < 200000; i++) {
        const float x = ldexpf(uniform(1, 2), (int)below(200) - 100),
                    u = -fminf(ldexpf(uniform(1, 2), -(int)below(34)), 1 - 0x1p-24f);
        const float a = log_(all(x))[0], b = log1p_(all(u))[0];
        // Where the logarithm is near 0, what is left of 1 is exact.
        worst = fmax(worst, fabs(a - log(x)) / fmax(fabs(log(x)), 1e-3));
        worst_of_more = fmax(worst_of_more, fabs(b / log1p(u) - 1));
    }
    CHECK(worst < 3e-7 && worst_of_more < 5e-7, "%g, %g", worst, worst_of_more);
    CHECK(log_(all(1))[0] == 0 && log1p_(all(0))[0] == 0, "log(1)");
}

static void wrong_arguments_are_refused(void) {
    const Tiny t = model_of(20, 1);
    const int64_t ids[] = {3, 20}, below_0[] = {-1};
    float *y = randoms(20, -1, 1), *kept_y = copied(y, 20);
    int64_t id = -77;
    const offramp_sampling wrong[] = {
        {-1, 1, 0, 1, 0, 0},  {NAN, 1, 0, 1, 0, 0},      {INFINITY, 1, 0, 1, 0, 0}, {0, 0, 0, 1, 0, 0},
        {0, 1.1, 0, 1, 0, 0}, {0, 1, -0.1, 1, 0, 0},     {0, 1, 1.1, 1, 0, 0},      {0, 1, 0, 0, 0, 0},
        {0, 1, 0, NAN, 0, 0}, {0, 1, 0, INFINITY, 0, 0}, {0, 1, 0, 1, -1, 0}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        REFUSED(offramp_choose(t.model, wrong + i, ids, 1, NULL, y, &id, &said));
    REFUSED(offramp_choose(t.model, &GREEDY, ids, 2, NULL, y, &id, &said));
    REFUSED(offramp_choose(t.model, &GREEDY, below_0, 1, NULL, y, &id, &said));
    REFUSED(offramp_choose(t.model, &GREEDY, ids, -1, NULL, y, &id, &said));
    CHECK(id == -77 && same(y, kept_y, 20), "a refused call changed something");
    WORKS(offramp_choose(t.model, &GREEDY, NULL, 0, NULL, y, &id, NULL));
    // A temperature near 0 draws the most probable token.
    CHECK(chosen_by(&t, &(offramp_sampling){1e-300, 1, 0, 1, 0, 9}, NULL, 0, NULL, y) == id, "near 0");
    offramp_model_free(t.model);
}

int main(void) {
    choices_are_right();
    samples_do_not_mislead();
    equal_logits_stay_or_go_together();
    what_cannot_be_chosen_is_said();
    draws_follow_the_probabilities();
    noise_is_even();
    rows_do_not_depend_on_each_other();
    logarithms_are_precise();
    wrong_arguments_are_refused();
    return 0;
}
