// Decoder blocks of the llama kind on a CPU: a range of blocks, all of their rows, in one call and one pass over the weights.
// llama.py says what is computed and in which layout.
//
// D hidden size, Q query heads, H key/value heads, P head dim, F width of the MLP.

#include "gates.h"

typedef struct {
    Weight qkv, o, gate_up, down;
    const float *attention_norm, *mlp_norm, *q_norm, *k_norm;  // the last two may be NULL
    int64_t window;       // tokens that a token sees, itself included; 0: all
    int64_t rotary;       // 0: no positions in this block
    int64_t norm_first;   // 1: norms stand before attention and MLP, 0: after them
    int64_t norm_heads;   // 1: q_norm and k_norm are over each head, 0: over all heads
    float eps, attention_eps, scale;
} Block;

typedef struct {
    int64_t hidden, queries, heads, dim, width;
} Shape;

// Queries, keys and values of one row (heads · P): normed, turned, keys and values stored at `place` (2H, P).
static void remember(const Block *b, const Shape *s, float *row, int64_t queries, const float *turn, float *place) {
    const int64_t P = s->dim;
    if (b->k_norm) {
        const int64_t size = b->norm_heads ? P : 0;
        for (int64_t i = 0; i < (size ? queries : queries > 0); i++)
            norm(row + i * P, b->q_norm, b->attention_eps, row + i * P, size ? size : queries * P);
        for (int64_t i = 0; i < (size ? s->heads : 1); i++)
            norm(row + (queries + i) * P, b->k_norm, b->attention_eps, row + (queries + i) * P, size ? size : s->heads * P);
    }
    if (b->rotary)
        for (int64_t i = 0; i < queries + s->heads; i++)
            for (int64_t p = 0; p < P; p += 2) {
                float *x = row + i * P + p, re = x[0], im = x[1];
                x[0] = re * turn[p] - im * turn[p + 1];
                x[1] = re * turn[p + 1] + im * turn[p];
            }
    memcpy(place, row + queries * P, 2 * s->heads * P * sizeof(float));
}

enum { KEYS = 64, DIMS = 4 };  // positions that are attended to in one go, cut at multiples; vectors of values in registers

// What is attended to: the keys and values of one head, `step` floats from one position to the next, of P dims each.
typedef struct {
    const float *keys, *values;
    int64_t step, P;
    float scale;
    int fresh;  // they are probably not in the cache
} Seen;

// Scores of G queries, P apart, with the keys of positions j to j + EIGHT - 1, of which there are `count`.
ALWAYS void scores_of(const float *q, const Seen *seen, int64_t j, int64_t count, float *scores, const int G) {
    const int64_t P = seen->P, step = seen->step;
    const float *keys = seen->keys + j * step, scale = seen->scale;
    for (int g = 0; g < G; g++, q += P, scores += KEYS) {
        vf acc[EIGHT] = {0};
        if (count >= EIGHT) {
            int64_t p = 0;
            for (; p + LANES <= P; p += LANES) {
                const vf part = load(q + p);
#pragma GCC unroll 8
                for (int i = 0; i < EIGHT; i++) acc[i] = fma_(part, load(keys + i * step + p), acc[i]);
            }
            if (p < P)
                for (int i = 0; i < EIGHT; i++)
                    acc[i] = fma_(load_up_to(q + p, P - p), load_up_to(keys + i * step + p, P - p), acc[i]);
            sums_of(acc, scores);
            for (int i = 0; i < EIGHT; i++) scores[i] *= scale;
        } else {
            for (int i = 0; i < count; i++) scores[i] = scale * sum(dots(q, keys + i * step, P));
        }
    }
}

// The outputs of queries so far (P dims each), not yet divided by `total`, the sum of their weights exp(score - most).
typedef struct {
    float *most, *total, *out;
} Softmax;

// Adds the values of positions `from` to `to` - 1, each times its weight, to V vectors of the outputs of G queries, from `dim`
// on (one vector may be cut short). What was there before is multiplied by `keep` first.
ALWAYS void values_of(const Seen *seen, int64_t dim, int64_t from, int64_t to, const float *weights, const float *keep, float *out,
                      const int G, const int V) {
    const int64_t P = seen->P, left = P - dim;
    const float *values = seen->values + dim;
    vf acc[4][DIMS];
    for (int g = 0; g < G; g++)
        for (int v = 0; v < V; v++) acc[g][v] = load_up_to(out + g * P + dim + v * LANES, left - v * LANES) * keep[g];
    for (int64_t j = from; j < to; j++) {
        vf value[DIMS];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) value[v] = load_up_to(values + j * seen->step + v * LANES, V > 1 ? LANES : left);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[g][v] = fma_(value[v], all(weights[g * KEYS + j]), acc[g][v]);
    }
    for (int g = 0; g < G; g++)
        for (int v = 0; v < V; v++) store_up_to(out + g * P + dim + v * LANES, acc[g][v], left - v * LANES);
}

// Turns the scores s of positions `from` to `to` - 1 into weights. Returns what earlier weights are to be multiplied by.
static float weigh(float *s, int64_t from, int64_t to, float *most, float *total) {
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

// One row's G queries over positions `from` to `to` - 1 of one piece. Brings their softmax up to date ("online softmax", arXiv
// 1805.02867).
ALWAYS void attend_to(const float *q, const Seen *seen, int64_t from, int64_t to, Softmax so_far, const int G) {
    const int64_t P = seen->P;
    float scores[4 * KEYS], keep[4];
    for (int64_t j = from / EIGHT * EIGHT; j < to; j += EIGHT) {
        if (seen->fresh)
            for (int64_t i = j; i < j + EIGHT; i++)
                for (int64_t p = 0; p < P; p += 16) {
                    expect(seen->keys + (i + 2 * EIGHT) * seen->step + p);
                    expect(seen->values + i * seen->step + p);
                }
        scores_of(q, seen, j, to - j, scores + j, G);
    }
    for (int g = 0; g < G; g++) keep[g] = weigh(scores + g * KEYS, from, to, so_far.most + g, so_far.total + g);
    int64_t dim = 0;
    for (; dim + DIMS * LANES <= P; dim += DIMS * LANES) values_of(seen, dim, from, to, scores, keep, so_far.out, G, DIMS);
    for (; dim < P; dim += LANES) values_of(seen, dim, from, to, scores, keep, so_far.out, G, 1);
}

// As `attend_to`, for any number of queries.
static void attend_group(const float *q, const Seen *seen, int64_t from, int64_t to, Softmax so_far, int64_t group) {
    for (int64_t g = 0; g < group; g += 4) {
        const Softmax part = {so_far.most + g, so_far.total + g, so_far.out + g * seen->P};
        switch (min_(4, group - g)) {
            case 4: attend_to(q + g * seen->P, seen, from, to, part, 4); break;
            case 3: attend_to(q + g * seen->P, seen, from, to, part, 3); break;
            case 2: attend_to(q + g * seen->P, seen, from, to, part, 2); break;
            default: attend_to(q + g * seen->P, seen, from, to, part, 1);
        }
    }
}

// The rows of one call. Row r is at position positions[r] of sequence sequences[r]; turn (count, P) are the rotary pairs.
typedef struct {
    float *h;  // (count, D)
    int64_t count;
    const int64_t *positions, *sequences;
    const float *turn;
} Tokens;

// What one thread of a call works with: buffers shared with the others, and a part of its own. The scratch holds
// R · (max(D, Q · P) + (Q + 2H) · P + max(2F, D)) shared floats, and R · (K + 64) for the K columns of the widest weight; a
// thread's own hold 2 · EIGHT · Q / H beside PANEL.
typedef struct {
    const Shape *s;
    const Tokens *tokens;
    float *x, *qkv, *mlp, *room, *local;
    int t, n;
} Worker;

static int64_t widest(const Shape *s) {
    const int64_t inner = s->queries * s->dim, outer = s->hidden > s->width ? s->hidden : s->width;
    return inner > outer ? inner : outer;
}

static Worker worker(const Shape *s, const Tokens *tokens, const Scratch *scratch) {
    const int64_t D = s->hidden, P = s->dim, Q = s->queries, F = s->width, R = tokens->count;
    float *x = scratch->floats, *qkv = x + R * (D > Q * P ? D : Q * P), *mlp = qkv + R * (Q + 2 * s->heads) * P;
    float *room = mlp + R * (2 * F > D ? 2 * F : D);
    const int t = omp_get_thread_num();
    return (Worker){s, tokens, x, qkv, mlp, room, room + R * (widest(s) + 64) + t * scratch->own, t, omp_get_num_threads()};
}

// Input norm, and the projections to `queries` query heads (all or none), keys and values. Keys and values are stored in kv.
static void project(const Block *b, const Worker *w, float *const *kv, int64_t queries) {
    const Shape *s = w->s;
    const Tokens *tokens = w->tokens;
    const int64_t D = s->hidden, P = s->dim, H = s->heads, A = (s->queries + 2 * H) * P, R = tokens->count;
    const int64_t skip = (s->queries - queries) * P, *position = tokens->positions, *sequence = tokens->sequences;
    int64_t from, to;
    if (b->norm_first) {
        for (int64_t r = w->t; r < R; r += w->n) norm(tokens->h + r * D, b->attention_norm, b->eps, w->x + r * D, D);
#pragma omp barrier
    }
    share(A - skip, w->t, w->n, &from, &to);
    const Rows rows = prepare(&b->qkv, b->norm_first ? w->x : tokens->h, D, R, w->room, w->local);
    product(&b->qkv, rows, R, w->qkv, A, 0, from + skip, to + skip);
#pragma omp barrier
    for (int64_t r = w->t; r < R; r += w->n)
        remember(b, s, w->qkv + r * A + skip, queries, tokens->turn + r * P, kv[sequence[r]] + position[r] * 2 * H * P);
#pragma omp barrier
}

// Attention of `rows` rows of one sequence that follow each other, for the queries of one key/value head. The pieces of the
// positions are the same for every row, so what a row gets does not depend on the rows beside it.
static void attend(const Block *b, const Worker *w, const float *kv, int64_t first, int64_t rows, int64_t head) {
    const Shape *s = w->s;
    const int64_t P = s->dim, Q = s->queries, H = s->heads, A = (Q + 2 * H) * P, group = Q / H, step = 2 * H * P;
    const int64_t *position = w->tokens->positions + first, end = position[rows - 1] + 1;
    const float *q = w->qkv + first * A + head * group * P;
    float *out = w->x + first * Q * P + head * group * P, *most = w->local + PANEL, *total = most + rows * group;
    for (int64_t i = 0; i < rows * group; i++) most[i] = -INFINITY, total[i] = 0;
    for (int64_t r = 0; r < rows; r++) memset(out + r * Q * P, 0, group * P * sizeof(float));
    const int64_t oldest = b->window && position[0] + 1 > b->window ? position[0] + 1 - b->window : 0;
    for (int64_t piece = oldest / KEYS * KEYS; piece < end; piece += KEYS) {
        const float *keys = kv + piece * step + head * P;
        for (int64_t r = 0; r < rows; r++) {
            const int64_t after = position[r] + 1, start = b->window && after > b->window ? after - b->window : 0;
            const int64_t from = start > piece ? start - piece : 0, to = min_(after - piece, KEYS);
            const Seen seen = {keys, keys + H * P, step, P, b->scale, !r};
            const Softmax so_far = {most + r * group, total + r * group, out + r * Q * P};
            if (from < to) attend_group(q + r * A, &seen, from, to, so_far, group);
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < group; g++)
            for (int64_t p = 0; p < P; p++) out[r * Q * P + g * P + p] /= total[r * group + g];
}

// Attention over kv, its output projection, and the norm between attention and MLP. Adds to `h`.
static void attention(const Block *b, const Worker *w, float *const *kv) {
    const Shape *s = w->s;
    const Tokens *tokens = w->tokens;
    const int64_t D = s->hidden, Q = s->queries, H = s->heads, P = s->dim, R = tokens->count, *sequence = tokens->sequences;
    float *h = tokens->h, *x = w->x, *out = b->norm_first ? h : w->mlp;
    int64_t from, to, item = 0, rows;
    for (int64_t r = 0; r < R; r += rows) {
        for (rows = 1; rows < EIGHT && r + rows < R && sequence[r + rows] == sequence[r];) rows++;
        for (int64_t head = 0; head < H; head++)
            if (item++ % w->n == w->t) attend(b, w, kv[sequence[r]], r, rows, head);
    }
#pragma omp barrier
    share(D, w->t, w->n, &from, &to);
    product(&b->o, prepare(&b->o, x, Q * P, R, w->room, w->local), R, out, D, b->norm_first, from, to);
#pragma omp barrier
    for (int64_t r = w->t; r < R; r += w->n)
        if (b->norm_first) {
            norm(h + r * D, b->mlp_norm, b->eps, x + r * D, D);
        } else {
            norm(out + r * D, b->attention_norm, b->eps, x + r * D, D);
            for (int64_t k = 0; k < D; k++) h[r * D + k] += x[r * D + k];
        }
#pragma omp barrier
}

// The MLP. Adds to `h`.
static void gated_mlp(const Block *b, const Worker *w) {
    const int64_t D = w->s->hidden, F = w->s->width, R = w->tokens->count;
    float *h = w->tokens->h, *x = w->x, *mlp = w->mlp, *out = b->norm_first ? h : x;
    int64_t from, to;
    share(F, w->t, w->n, &from, &to);
    const Rows rows = prepare(&b->gate_up, b->norm_first ? x : h, D, R, w->room, w->local);
    product(&b->gate_up, rows, R, mlp, 2 * F, 0, from, to);
    product(&b->gate_up, rows, R, mlp, 2 * F, 0, F + from, F + to);
    for (int64_t r = 0; r < R; r++) {
        float *gate = mlp + r * 2 * F, *up = gate + F;
        for (int64_t k = from; k < to; k += LANES)
            store_up_to(gate + k, silu(load_up_to(gate + k, to - k)) * load_up_to(up + k, to - k), to - k);
    }
#pragma omp barrier
    share(D, w->t, w->n, &from, &to);
    product(&b->down, prepare(&b->down, mlp, 2 * F, R, w->room, w->local), R, out, D, b->norm_first, from, to);
#pragma omp barrier
    if (!b->norm_first) {
        for (int64_t r = w->t; r < R; r += w->n) {
            norm(x + r * D, b->mlp_norm, b->eps, x + r * D, D);
            for (int64_t k = 0; k < D; k++) h[r * D + k] += x[r * D + k];
        }
#pragma omp barrier
    }
}

// Runs the rows through `count` blocks, h in place. kv[i · S + q] is what block i remembers of sequence q of S, (capacity, 2H, P).
// A single row may have gates (else NULL). Returns the number of blocks run.
int64_t offramp_run(const Block *blocks, int64_t count, const Shape *s, float *const *kv, int64_t S, const Tokens *tokens,
                    const Gates *gates, const Scratch *scratch) {
    int64_t run = count;
#pragma omp parallel num_threads(scratch->threads)
    {
        const Worker w = worker(s, tokens, scratch);
        const Asker asker = {w.x, w.mlp, w.room, w.local, w.t, w.n};
        int64_t gate = 0;
        for (int64_t i = 0; i < count; i++) {
            project(blocks + i, &w, kv + i * S, s->queries);
            attention(blocks + i, &w, kv + i * S);
            gated_mlp(blocks + i, &w);
            if (stops(gates, &gate, i + 1, tokens->h, &asker)) {
                if (!w.t) run = i + 1;
                break;
            }
        }
    }
    return run;
}

// Stores only the keys and values, as if the rows were the input of each of the blocks.
void offramp_remember(const Block *blocks, int64_t count, const Shape *s, float *const *kv, int64_t S, const Tokens *tokens,
                      const Scratch *scratch) {
#pragma omp parallel num_threads(scratch->threads)
    {
        const Worker w = worker(s, tokens, scratch);
        for (int64_t i = 0; i < count; i++) project(blocks + i, &w, kv + i * S, 0);
    }
}
