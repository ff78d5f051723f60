// Decoder blocks of the llama kind on a CPU: a range of blocks, all of their rows, in one call, with one pass over the weights.
// llama.py says what is computed and in which layout.
//
// D hidden size, Q query heads, H key/value heads, P head dim, F width of the MLP.

#include "products.h"

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

// The queries of row r that share key/value head `head`, over positions `start` to `end` - 1.
static void attend(const Shape *s, const float *q, const float *kv, int64_t head, int64_t start, int64_t end, float scale,
                   float *scores, float *out) {
    const int64_t P = s->dim, group = s->queries / s->heads, step = 2 * s->heads * P, S = end - start;
    const float *keys = kv + start * step + head * P, *values = keys + s->heads * P;
    for (int64_t i = 0; i < S; i++)
        for (int64_t g = 0; g < group; g++) scores[g * S + i] = scale * dot(q + g * P, keys + i * step, P);
    for (int64_t g = 0; g < group; g++) {
        float *p = scores + g * S, most = p[0], total = 0;
        for (int64_t i = 1; i < S; i++) most = p[i] > most ? p[i] : most;
        for (int64_t i = 0; i < S; i++) p[i] = exp_(p[i] - most);
        for (int64_t i = 0; i < S; i++) total += p[i];
        for (int64_t i = 0; i < S; i++) p[i] /= total;
    }
    memset(out, 0, group * P * sizeof(float));
    for (int64_t i = 0; i < S; i++)
        for (int64_t g = 0; g < group; g++) {
            const float p = scores[g * S + i];
            for (int64_t k = 0; k < P; k++) out[g * P + k] += p * values[i * step + k];
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
// R · (max(D, Q · P) + (Q + 2H) · P + max(2F, D)) shared floats; a thread's own also hold Q / H · (highest position + 1).
typedef struct {
    const Shape *s;
    const Tokens *tokens;
    float *x, *qkv, *mlp, *local;
    int t, n;  // this thread, number of threads
} Worker;

static Worker worker(const Shape *s, const Tokens *tokens, const Scratch *scratch) {
    const int64_t D = s->hidden, P = s->dim, Q = s->queries, F = s->width, R = tokens->count;
    float *x = scratch->floats, *qkv = x + R * (D > Q * P ? D : Q * P), *mlp = qkv + R * (Q + 2 * s->heads) * P;
    const int t = omp_get_thread_num();
    float *local = mlp + R * (2 * F > D ? 2 * F : D) + t * scratch->own;
    return (Worker){s, tokens, x, qkv, mlp, local, t, omp_get_num_threads()};
}

// Input norm, and the projections to `queries` query heads (all or none), keys and values. Keys and values are stored in kv.
static void project(const Block *b, const Worker *w, float *const *kv, int64_t queries) {
    const Shape *s = w->s;
    const Tokens *tokens = w->tokens;
    const int64_t D = s->hidden, P = s->dim, H = s->heads, A = (s->queries + 2 * H) * P, R = tokens->count;
    const int64_t skip = (s->queries - queries) * P, *position = tokens->positions, *sequence = tokens->sequences;
    int64_t from, to;
    if (b->norm_first)
        for (int64_t r = w->t; r < R; r += w->n) norm(tokens->h + r * D, b->attention_norm, b->eps, w->x + r * D, D);
#pragma omp barrier
    share(A - skip, w->t, w->n, &from, &to);
    const Rows rows = prepare(&b->qkv, b->norm_first ? w->x : tokens->h, D, R, w->local);
    product(&b->qkv, rows, R, w->qkv, A, 0, from + skip, to + skip);
#pragma omp barrier
    for (int64_t r = w->t; r < R; r += w->n)
        remember(b, s, w->qkv + r * A + skip, queries, tokens->turn + r * P, kv[sequence[r]] + position[r] * 2 * H * P);
#pragma omp barrier
}

// Attention over kv, its output projection, and the norm between attention and MLP. Adds to `h`.
static void attention(const Block *b, const Worker *w, float *const *kv) {
    const Shape *s = w->s;
    const Tokens *tokens = w->tokens;
    const int64_t D = s->hidden, P = s->dim, Q = s->queries, H = s->heads, A = (Q + 2 * H) * P, group = Q / H;
    const int64_t R = tokens->count;
    float *h = tokens->h, *x = w->x, *out = b->norm_first ? h : w->mlp;
    int64_t from, to;
    for (int64_t item = w->t; item < R * H; item += w->n) {
        const int64_t r = item / H, head = item % H, end = tokens->positions[r] + 1;
        const int64_t start = b->window && end > b->window ? end - b->window : 0;
        attend(s, w->qkv + r * A + head * group * P, kv[tokens->sequences[r]], head, start, end, b->scale, w->local,
               x + r * Q * P + head * group * P);
    }
#pragma omp barrier
    share(D, w->t, w->n, &from, &to);
    product(&b->o, prepare(&b->o, x, Q * P, R, w->local), R, out, D, b->norm_first, from, to);
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
    const Rows rows = prepare(&b->gate_up, b->norm_first ? x : h, D, R, w->local);
    product(&b->gate_up, rows, R, mlp, 2 * F, 0, from, to);
    product(&b->gate_up, rows, R, mlp, 2 * F, 0, F + from, F + to);
    for (int64_t r = 0; r < R; r++) {
        float *gate = mlp + r * 2 * F, *up = gate + F;
        for (int64_t k = from; k < to; k++) gate[k] = gate[k] / (1.0f + exp_(-gate[k])) * up[k];
    }
#pragma omp barrier
    share(D, w->t, w->n, &from, &to);
    product(&b->down, prepare(&b->down, mlp, 2 * F, R, w->local), R, out, D, b->norm_first, from, to);
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
void offramp_run(const Block *blocks, int64_t count, const Shape *s, float *const *kv, int64_t S, const Tokens *tokens,
                 const Scratch *scratch) {
#pragma omp parallel num_threads(scratch->threads)
    {
        const Worker w = worker(s, tokens, scratch);
        for (int64_t i = 0; i < count; i++) {
            project(blocks + i, &w, kv + i * S, s->queries);
            attention(blocks + i, &w, kv + i * S);
            gated_mlp(blocks + i, &w);
        }
    }
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
