#include "choose.h"

#include <float.h>

#include "largest.h"

static const double LEAST_TEMPERATURE = 1e-6;  // below it, logits over the temperature would overflow

static int64_t words_of(int64_t V) { return (V + 31) / 32; }

static int draws(const Choice *c) { return c->how->temperature > 0; }

static float temperature_of(const Choice *c) {
    return (float)(c->how->temperature > LEAST_TEMPERATURE ? c->how->temperature : LEAST_TEMPERATURE);
}

ChooseRoom room_for_choices(int64_t R, int64_t V, Arena *arena) {
    return (ChooseRoom){
        .least = take_floats(arena, R),
        .seen = take(arena, R * words_of(V) * (int64_t)sizeof(uint32_t)),
        .bests = take(arena, R * chunks_of(V) * (int64_t)sizeof(Best)),
    };
}

// The tokens that may be chosen -------------------------------------------------------------------

// Makes logits y (V) of tokens that are not allowed −inf. A NaN stays, and so does +inf: they are found
// later.
static void mask(float *y, int64_t V, const uint32_t *allowed) {
    for (int64_t i = 0; i < V; i += LANES) {
        const vf v = load_up_to(y + i, V - i);
        const vi bits = (vi){0} + (int32_t)(allowed[i / 32] >> i % 32);
        store_up_to(y + i, choose(-(bits >> COUNT & 1) | ~(v < INFINITY), v, all(-INFINITY)), V - i);
    }
}

// Makes the tokens of the text less likely: the library's repetition penalty. `seen` has a bit for each
// token.
static void penalise(const Choice *c, float *y, int64_t V, uint32_t *seen) {
    const float penalty = (float)c->how->penalty;
    memset(seen, 0, words_of(V) * sizeof *seen);
    for (const int64_t *id = c->ids; id < c->ids + c->known; id++) {
        if (seen[*id / 32] >> *id % 32 & 1) continue;
        seen[*id / 32] |= 1u << *id % 32;
        y[*id] = y[*id] < 0 ? y[*id] * penalty : y[*id] / penalty;
    }
}

// A row for a draw. The largest of its logits y (V) is `top`.
typedef struct {
    const float *y;
    int64_t V;
    float top, temperature;
} Row;

static float top_of(const float *y, int64_t V) {
    vf tops = all(-INFINITY);
    for (int64_t i = 0; i < V; i += LANES) {
        const vf v = load_up_to(y + i, V - i);
        tops = choose((v > tops) & (COUNT < (int32_t)min_(LANES, V - i)), v, tops);
    }
    return largest(tops);
}

// Probabilities of tokens from i on, as multiples of the top one's.
static inline vf shares(const Row *row, int64_t i) {
    return exp_((load_up_to(row->y + i, row->V - i) - row->top) / row->temperature);
}

// The sum for all tokens whose logits are not below a bound.
static double total_share(const Row *row, float bound) {
    double total = 0;
    for (int64_t from = 0; from < row->V; from += CHUNK) {
        vf sums = {0};
        for (int64_t i = from, to = min_(row->V, from + CHUNK); i < to; i += LANES) {
            if (!not_below(row->y + i, min_(LANES, to - i), bound)) continue;
            const vi counts =
                (load_up_to(row->y + i, to - i) >= bound) & (COUNT < (int32_t)min_(LANES, to - i));
            sums += choose(counts, shares(row, i), (vf){0});
        }
        total += sum(sums);
    }
    return total;
}

// The largest logit such that it and all larger ones weigh so much together. Only logits that are not below a
// bound count: 1 each, or their share.
static float least_of_weight(const Row *row, float bound, double weight, int by_share) {
    Search search = {.left = weight};
    for (int digit = 0; digit < DIGITS; digit++) {
        begin_digit(&search, digit);
        for (int64_t i = 0; i < row->V; i += LANES) {
            uint32_t lanes = not_below(row->y + i, min_(LANES, row->V - i), bound);
            if (!lanes) continue;
            const vf weights = by_share ? shares(row, i) : all(1);
            for (; lanes; lanes &= lanes - 1) {
                const int lane = __builtin_ctz(lanes);
                weigh(&search, row->y[i + lane], weights[lane]);
            }
        }
        end_digit(&search);
    }
    return found_by(&search);
}

// The k-th largest logit. A sample gives a bound, and then only what is not below it is looked at.
static float kth_largest(const Row *row, int64_t k) {
    const int64_t wanted = enough_of_sample(k);
    int64_t found = 0;
    float bound = -INFINITY;
    if (wanted < row->V / SAMPLED) {
        Search search = {.left = (double)wanted};
        for (int digit = 0; digit < DIGITS; digit++) {
            begin_digit(&search, digit);
            for (int64_t i = 0; i < row->V; i += SAMPLED) weigh(&search, row->y[i], 1);
            end_digit(&search);
        }
        bound = found_by(&search);
    }
    for (int64_t i = 0; i < row->V; i += LANES)
        found += __builtin_popcount(not_below(row->y + i, min_(LANES, row->V - i), bound));
    return least_of_weight(row, found < k ? -INFINITY : bound, (double)k, 0);
}

// The lowest logit of y (V) that may be drawn. Each rule is about the tokens that the rules before it leave.
static float least_drawn(const Choice *c, const float *y, int64_t V) {
    const offramp_sampling *how = c->how;
    const Row row = {y, V, top_of(y, V), temperature_of(c)};
    const double T = row.temperature;
    float least = -FLT_MAX;  // −inf is never drawn
    if (!isfinite(row.top)) return least;
    if (how->top_k && how->top_k < V) least = fmaxf(least, kth_largest(&row, how->top_k));
    if (how->top_p < 1) {
        const double weight = how->top_p * total_share(&row, least);
        float bound = row.top;
        // Few tokens most likely have that weight; only they are then looked at one by one.
        for (double near = 4; bound > least && total_share(&row, bound) < weight; near *= 2)
            bound = fmaxf(least, (float)(row.top - T * near));
        least = least_of_weight(&row, bound, weight, 1);
    }
    if (how->min_p > 0) least = fmaxf(least, (float)(row.top + T * log(how->min_p)));
    return least;
}

// Draws -------------------------------------------------------------------------------------------

typedef struct {
    uint32_t low, high;
} Key;

static Key key_of(uint64_t seed, int64_t position) {
    uint64_t z = seed + 0x9E3779B97F4A7C15u * ((uint64_t)position + 1);
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return (Key){(uint32_t)z, (uint32_t)(z >> 32)};
}

static inline vu fmix32(vu x) {
    x = (x ^ x >> 16) * 0x85EBCA6Bu;
    x = (x ^ x >> 13) * 0xC2B2AE35u;
    return x ^ x >> 16;
}

// The noise of tokens from t on.
static inline vf noise(Key key, int64_t t) {
    const vu x = fmix32(fmix32((vu)COUNT + ((uint32_t)t + key.low)) ^ key.high);
    const vf high = __builtin_convertvector((vi)(x >> 16), vf),
             low = __builtin_convertvector((vi)(x & 0xffff), vf);
    const vf u = clamped((high * 0x1p16f + low) * 0x1p-32f + 0x1p-33f, 0, 1 - 0x1p-24f);
    return -log_(-log1p_(-u));
}

// Turns logits `from` to `to` - 1 of y into numbers of which the drawn token has the largest. A NaN stays.
static void add_noise(const Choice *c, float *y, int64_t from, int64_t to, float least) {
    const Key key = key_of(c->how->seed, c->known);
    const float temperature = temperature_of(c);
    for (int64_t i = from; i < to; i += LANES) {
        vf drawn = all(-INFINITY);
        if (not_below(y + i, min_(LANES, to - i), least)) {
            const vf v = load_up_to(y + i, to - i);
            drawn = choose(v < least, drawn, v / temperature + noise(key, i));
        }
        store_up_to(y + i, drawn, to - i);
    }
}

// Choices -----------------------------------------------------------------------------------------

// Whether a row's logits change before the best token is found.
static int prepares(const Choice *c) { return c->allowed || c->how->penalty != 1 || draws(c); }

static void prepare_row(const Choice *c, float *y, int64_t V, uint32_t *seen, float *least) {
    if (c->allowed) mask(y, V, c->allowed);
    if (c->how->penalty != 1) penalise(c, y, V, seen);
    const int limits = c->how->top_k || c->how->top_p < 1 || c->how->min_p > 0;
    if (draws(c)) *least = limits ? least_drawn(c, y, V) : -FLT_MAX;
}

void choose_rows(Hand *hand, const Choice *choices, int64_t R, float *y, int64_t V, const ChooseRoom *room,
                 int64_t *chosen) {
    const int64_t pieces = chunks_of(V);
    int any = 0;
    for (int64_t r = 0; r < R; r++) any |= prepares(choices + r);
    EACH_PIECE(r, hand, any ? R : 0)
    if (prepares(choices + r))
        prepare_row(choices + r, y + r * V, V, room->seen + r * words_of(V), room->least + r);
    EACH_PIECE(i, hand, R * pieces) {
        const int64_t r = i / pieces, from = i % pieces * CHUNK, to = min_(V, from + CHUNK);
        if (draws(choices + r)) add_noise(choices + r, y + r * V, from, to, room->least[r]);
        room->bests[i] = best_of(y + r * V, from, to);
    }
    EACH_PIECE(r, hand, R) {
        const Best best = best_among(room->bests + r * pieces, pieces);
        const int nothing = best.logit == -INFINITY && choices[r].allowed;
        chosen[r] = isfinite(best.logit) ? best.id : nothing ? -2 : -1;
    }
}

offramp_status check_choice(const Choice *choice, int64_t V, offramp_error *error) {
    const offramp_sampling *how = choice->how;
    NEED(how->temperature >= 0 && isfinite(how->temperature), "A temperature is 0 or more.");
    NEED(how->top_k >= 0, "A top-k is 0 or more, and not %lld.", (long long)how->top_k);
    NEED(how->top_p > 0 && how->top_p <= 1, "A top-p is above 0, and 1 at most.");
    NEED(how->min_p >= 0 && how->min_p <= 1, "A min-p is 0 to 1.");
    NEED(how->penalty > 0 && isfinite(how->penalty), "A repetition penalty is above 0.");
    NEED(choice->known >= 0, "A text has 0 or more ids, and not %lld.", (long long)choice->known);
    for (int64_t t = 0; t < choice->known; t++)
        NEED(choice->ids[t] >= 0 && choice->ids[t] < V, "There is no token %lld.", (long long)choice->ids[t]);
    return OFFRAMP_OK;
}

// The call ----------------------------------------------------------------------------------------

typedef struct {
    Choice choice;
    float *y;
    int64_t V, *id;
    ChooseRoom room;
} Call;

static void lay_call(void *context, Arena *arena) {
    Call *call = context;
    call->room = room_for_choices(1, call->V, arena);
}

static void work_on_call(Hand *hand, void *context) {
    const Call *call = context;
    choose_rows(hand, &call->choice, 1, call->y, call->V, &call->room, call->id);
}

offramp_status offramp_choose(offramp_model *model, const offramp_sampling *how, const int64_t *ids,
                              int64_t known, const uint32_t *allowed, float *y, int64_t *id,
                              offramp_error *error) {
    Call call = {.choice = {how, ids, known, allowed}, .y = y, .V = model->vocabulary, .id = id};
    offramp_status status = check_choice(&call.choice, call.V, error);
    if (status) return status;
    pool_enter(&model->pool);
    if (lay_out(model, lay_call, &call))
        pool_run(&model->pool, work_on_call, &call);
    else
        status = fail(error, OFFRAMP_NO_MEMORY, "There is no memory for a choice.");
    pool_leave(&model->pool);
    return status;
}
