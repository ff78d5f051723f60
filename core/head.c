#include "head.h"

#include "largest.h"

// A list of estimates: `counts` of them from each piece, CHUNK apart.
typedef struct {
    float *numbers;
    int32_t *counts;
    int64_t pieces;
} Listed;

// The n-th largest in the list.
static float nth_largest(const Listed *l, int64_t n) {
    Search search = {.left = (double)n};
    for (int digit = 0; digit < DIGITS; digit++) {
        begin_digit(&search, digit);
        for (int64_t p = 0; p < l->pieces; p++)
            for (int i = 0; i < l->counts[p]; i++) weigh(&search, l->numbers[p * CHUNK + i], 1);
        end_digit(&search);
    }
    return found_by(&search);
}

// Lists, shared out, the estimates y (V) that are not below a bound.
static void list(Hand *hand, const Listed *l, const float *y, int64_t V, float bound) {
    EACH_PIECE(p, hand, l->pieces) {
        const int64_t from = p * CHUNK, to = min_(V, from + CHUNK);
        int32_t count = 0;
        for (int64_t i = from; i < to; i += LANES)
            for (uint32_t lanes = not_below(y + i, min_(LANES, to - i), bound); lanes; lanes &= lanes - 1)
                l->numbers[from + count++] = y[i + __builtin_ctz(lanes)];
        l->counts[p] = count;
    }
}

// The n-th largest, 1 ≤ n ≤ V, of the estimates y (V). A sample gives a bound. Then only estimates that are
// not below it are searched.
static float least_of_likeliest(Hand *hand, const Listed *l, const float *y, int64_t V, int64_t n,
                                Found *found) {
    const int64_t wanted = enough_of_sample(n);
    EACH_PIECE(i, hand, 1) {
        int64_t sampled = 0;
        for (int64_t j = 0; j < V; j += SAMPLED) l->numbers[sampled++] = y[j];
        *l->counts = sampled;
        found->bound =
            wanted < sampled ? nth_largest(&(Listed){l->numbers, l->counts, 1}, wanted) : -INFINITY;
    }
    list(hand, l, y, V, found->bound);
    EACH_PIECE(i, hand, 1) {
        for (int64_t p = 0; p < l->pieces; p++) found->listed += l->counts[p];
        if (found->listed >= n) found->least = nth_largest(l, n);
    }
    if (found->listed >= n) return found->least;
    list(hand, l, y, V, -INFINITY);
    EACH_PIECE(i, hand, 1) found->least = nth_largest(l, n);
    return found->least;
}

// Puts, shared out, the head's logits where the estimates y (V) of row r are not below `least`, and −inf
// elsewhere.
static void read_chosen(Hand *hand, const Weight *head, const Rows *x, int64_t r, float least, float *y,
                        int64_t V) {
    float *estimates = y + r * V;
    EACH_PIECE(piece, hand, chunks_of(V)) {
        int64_t chosen[CHUNK], count = 0;
        for (int64_t i = piece * CHUNK, to = min_(V, i + CHUNK); i < to; i += LANES) {
            const int64_t left = min_(LANES, to - i);
            for (uint32_t lanes = not_below(estimates + i, left, least); lanes; lanes &= lanes - 1)
                chosen[count++] = i + __builtin_ctz(lanes);
            store_up_to(estimates + i, all(-INFINITY), left);
        }
        multiply_chosen(head, x, r, chosen, count, (Out){y, V, 0});
    }
}

HeadRoom room_for_head(const Weight *head, const Sketch *sketch, int64_t R, Arena *arena) {
    const int64_t D = head->columns, pieces = sketch ? chunks_of(head->rows) : 0,
                  k = sketch ? sketch->reduce.rows : 0;
    return (HeadRoom){
        .x = take_floats(arena, R * D),
        .narrow = take_floats(arena, narrow_room(R, D)),
        .z = take_floats(arena, R * k),
        .z_narrow = take_floats(arena, sketch ? narrow_room(R, D > k ? D : k) : 0),
        .numbers = take_floats(arena, pieces * CHUNK),
        .counts = take(arena, pieces * (int64_t)sizeof(int32_t)),
    };
}

// The logits of candidates, from rows that are normed.
static void read_candidates(Hand *hand, const Weight *head, const Sketch *sketch, Rows rows, int64_t R,
                            const HeadRoom *room, Found *found, float *y) {
    const Weight *reduce = &sketch->reduce, *expand = &sketch->expand;
    const int64_t V = head->rows, D = head->columns, k = reduce->rows;
    const Listed listed = {room->numbers, room->counts, chunks_of(V)};
    const Rows whole = prepare(hand, reduce, room->x, D, R, room->z_narrow);
    multiply(hand, reduce, whole, R, (Out){room->z, k, 0}, 0, k);
    multiply(hand, expand, prepare(hand, expand, room->z, k, R, room->z_narrow), R, (Out){y, V, 0}, 0, V);
    for (int64_t r = 0; r < R; r++) {
        const float least = least_of_likeliest(hand, &listed, y + r * V, V, sketch->candidates, found + r);
        read_chosen(hand, head, &rows, r, least, y, V);
    }
}

// Scales logits, and caps them: cap · tanh(logit / cap). Those of −inf stay.
static void finish(Hand *hand, const Ends *ends, int64_t count, float *y) {
    const float scale = ends->logit_scale, cap = ends->cap;
    if (scale == 1 && !cap) return;
    EACH_PIECE(piece, hand, chunks_of(count)) {
        for (int64_t i = piece * CHUNK, to = min_(count, i + CHUNK); i < to; i += LANES) {
            const vf v = load_up_to(y + i, to - i) * scale;
            store_up_to(y + i, cap ? choose(v == all(-INFINITY), v, cap * tanh_(v / cap)) : v, to - i);
        }
    }
}

void read_logits(Hand *hand, const Ends *ends, const Weight *head, const Sketch *sketch, const float *h,
                 int64_t R, const HeadRoom *room, Found *found, float *y) {
    const int64_t V = head->rows;
    const Rows rows = prepare_normed(hand, head, h, floats(ends->norm), ends->eps, R, room->x, room->narrow);
    if (sketch)
        read_candidates(hand, head, sketch, rows, R, room, found, y);
    else
        multiply(hand, head, rows, R, (Out){y, V, 0}, 0, V);
    finish(hand, ends, R * V, y);
}

Best best_of(const float *y, int64_t from, int64_t to) {
    vf tops = all(-INFINITY);
    vi bad = {0};
    for (int64_t i = from; i < to; i += LANES) {
        const vf v = to - i < LANES
                         ? choose(COUNT < (int32_t)(to - i), load_up_to(y + i, to - i), all(-INFINITY))
                         : load(y + i);
        tops = choose(v > tops, v, tops);
        bad |= v != v;
    }
    const Best best = {largest(tops), (int32_t)from};
    for (int i = 0; i < LANES; i++)
        if (bad[i]) return (Best){NAN, (int32_t)from};
    for (int64_t i = from; i < to; i++)
        if (y[i] == best.logit) return (Best){best.logit, (int32_t)i};
    return best;
}

Best best_among(const Best *bests, int64_t count) {
    Best best = bests[0];
    for (int64_t i = 1; i < count; i++)
        if (bests[i].logit > best.logit || isnan(bests[i].logit)) best = bests[i];
    return best;
}
