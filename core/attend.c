#include "attend.h"

// Vectors of values in registers.
enum { DIMS = 4 };

ALWAYS vf numbers(const char *p, int64_t dim, int64_t left, int half) {
    return half ? from_bfloat16((const uint16_t *)p + dim, left) : load_up_to((const float *)p + dim, left);
}

#define KEYS_MULTIPLY_BFLOAT16(half) ((half) && MULTIPLIES_BFLOAT16)

// Adds the products of a query and of `count` keys, over the dims from p on, of which there are `left`. Where
// the processor multiplies bfloat16, the query is rounded to it, too.
ALWAYS void add_products(const float *q, const char *keys, int64_t step, int64_t p, int64_t left,
                         int64_t count, vf *acc, int half) {
#if MULTIPLIES_BFLOAT16
    if (half) {
        const vf high = left > LANES ? load_up_to(q + p + LANES, left - LANES) : (vf){0};
        const __m512bh two = _mm512_cvtne2ps_pbh((__m512)high, (__m512)load_up_to(q + p, left));
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) {
            const uint16_t *key = (const uint16_t *)(keys + i * step) + p;
            const __m512i v =
                left < 32 ? _mm512_maskz_loadu_epi16((1u << left) - 1, key) : _mm512_loadu_si512(key);
            acc[i] = (vf)_mm512_dpbf16_ps((__m512)acc[i], two, (__m512bh)v);
        }
        return;
    }
#endif
    const vf part = load_up_to(q + p, left);
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) acc[i] = fma_(part, numbers(keys + i * step, p, left, half), acc[i]);
}

// Scores of G queries, P apart, with the keys of positions j to j + EIGHT - 1, of which there are `count`.
ALWAYS void scores_of(const float *q, const Seen *seen, int64_t j, int64_t count, float *scores, const int G,
                      const int half) {
    const int64_t P = seen->P, step = seen->step, width = KEYS_MULTIPLY_BFLOAT16(half) ? 2 * LANES : LANES;
    const char *keys = seen->keys + j * step;
    for (int g = 0; g < G; g++, q += P, scores += PIECE) {
        vf acc[EIGHT] = {0};
        int64_t p = 0;
        if (count >= EIGHT) {
            for (; p + width <= P; p += width) add_products(q, keys, step, p, width, EIGHT, acc, half);
            if (p < P) add_products(q, keys, step, p, P - p, EIGHT, acc, half);
        } else {
            for (; p < P; p += width) add_products(q, keys, step, p, min_(P - p, width), count, acc, half);
        }
        sums_of(acc, scores);
        for (int i = 0; i < EIGHT; i++) scores[i] *= seen->scale;
        for (int i = 0; seen->cap > 0 && i < EIGHT; i += LANES) {
            const vf v = load_up_to(scores + i, EIGHT - i);
            store_up_to(scores + i, seen->cap * tanh_(v / seen->cap), EIGHT - i);
        }
    }
}

// Adds the values of positions `from` to `to` - 1, each times its weight, to V vectors of the outputs of G
// queries, from `dim` on (one vector may be cut short). Earlier sums are multiplied by `keep` first.
ALWAYS void values_of(const Seen *seen, int64_t dim, int64_t from, int64_t to, const float *weights,
                      const float *keep, float *out, const int G, const int V, const int half) {
    const int64_t P = seen->P, left = P - dim;
    vf acc[4][DIMS];
    for (int g = 0; g < G; g++)
        for (int v = 0; v < V; v++)
            acc[g][v] = load_up_to(out + g * P + dim + v * LANES, left - v * LANES) * keep[g];
    for (int64_t j = from; j < to; j++) {
        vf value[DIMS];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            value[v] = numbers(seen->values + j * seen->step, dim + v * LANES, V > 1 ? LANES : left, half);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[g][v] = fma_(value[v], all(weights[g * PIECE + j]), acc[g][v]);
    }
    for (int g = 0; g < G; g++)
        for (int v = 0; v < V; v++) store_up_to(out + g * P + dim + v * LANES, acc[g][v], left - v * LANES);
}

// Turns the scores s of positions `from` to `to` - 1 into weights. Returns the factor for earlier weights.
static float weights_from_scores(float *s, int64_t from, int64_t to, float *most, float *total) {
    const int64_t first = from / LANES * LANES;
    vf tops = all(*most), sums = {0};
    for (int64_t j = first; j < to; j += LANES) {
        const vi inside = (COUNT + (int32_t)j >= (int32_t)from) & (COUNT + (int32_t)j < (int32_t)to);
        const vf v = choose(inside, load(s + j), all(-INFINITY));
        tops = choose(v > tops, v, tops);
        store(s + j, v);
    }
    const float highest = largest(tops), keep = exp_(all(*most - highest))[0];
    for (int64_t j = first; j < to; j += LANES) {
        const vf v = load(s + j), weights = choose(v == all(-INFINITY), (vf){0}, exp_(v - highest));
        store(s + j, weights);
        sums += weights;
    }
    *total = *total * keep + sum(sums);
    *most = highest;
    return keep;
}

// One row's G queries over positions `from` to `to` - 1 of one piece. Brings their softmax up to date
// ("online softmax", arXiv 1805.02867).
ALWAYS void attend_to(const float *q, const Seen *seen, int64_t from, int64_t to, Softmax so_far, const int G,
                      const int half) {
    const int64_t P = seen->P;
    float scores[4 * PIECE], keep[4];
    for (int64_t j = from / EIGHT * EIGHT; j < to; j += EIGHT) {
        const char *next = seen->next + j / EIGHT * seen->ahead;
        for (int64_t at = 0; at < seen->ahead; at += 64) __builtin_prefetch(next + at, 0, 2);
        scores_of(q, seen, j, to - j, scores + j, G, half);
    }
    for (int g = 0; g < G; g++)
        keep[g] = weights_from_scores(scores + g * PIECE, from, to, so_far.most + g, so_far.total + g);
    int64_t dim = 0;
    for (; dim + DIMS * LANES <= P; dim += DIMS * LANES)
        values_of(seen, dim, from, to, scores, keep, so_far.out, G, DIMS, half);
    for (; dim < P; dim += LANES) values_of(seen, dim, from, to, scores, keep, so_far.out, G, 1, half);
}

// As `attend_to`, for any number of queries.
void attend_group(const float *q, const Seen *seen, int64_t from, int64_t to, Softmax so_far, int64_t group,
                  int half) {
    for (int64_t g = 0; g < group; g += 4) {
        const Softmax part = {so_far.most + g, so_far.total + g, so_far.out + g * seen->P};
        const float *queries = q + g * seen->P;
        switch (2 * min_(4, group - g) + half) {
            case 9: attend_to(queries, seen, from, to, part, 4, 1); break;
            case 8: attend_to(queries, seen, from, to, part, 4, 0); break;
            case 7: attend_to(queries, seen, from, to, part, 3, 1); break;
            case 6: attend_to(queries, seen, from, to, part, 3, 0); break;
            case 5: attend_to(queries, seen, from, to, part, 2, 1); break;
            case 4: attend_to(queries, seen, from, to, part, 2, 0); break;
            case 3: attend_to(queries, seen, from, to, part, 1, 1); break;
            default: attend_to(queries, seen, from, to, part, 1, 0);
        }
    }
}

void softmax_begin(Softmax s, int64_t queries, int64_t P) {
    for (int64_t i = 0; i < queries; i++) s.most[i] = -INFINITY, s.total[i] = 0;
    memset(s.out, 0, queries * P * sizeof(float));
}

// Adds one more part of the sum over the positions.
void softmax_merge(Softmax sum, Softmax part, int64_t queries, int64_t P) {
    for (int64_t i = 0; i < queries; i++) {
        if (part.most[i] == -INFINITY) continue;
        const float most = sum.most[i] > part.most[i] ? sum.most[i] : part.most[i];
        const float keep = sum.most[i] == -INFINITY ? 0 : exp_(all(sum.most[i] - most))[0],
                    add = exp_(all(part.most[i] - most))[0];
        sum.most[i] = most;
        sum.total[i] = sum.total[i] * keep + part.total[i] * add;
        for (int64_t p = i * P; p < (i + 1) * P; p++) sum.out[p] = sum.out[p] * keep + part.out[p] * add;
    }
}
