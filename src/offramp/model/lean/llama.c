// Attention and the MLP of decoder blocks of the llama kind. llama.py says what is computed and in which layout.
//
// D hidden size, Q query heads, H key/value heads, P head dim, F width of the MLP.

#include "attention.h"
#include "tokens.h"

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
    int64_t hidden, queries, heads, dim, width;  // all are 0 in a model without attention
    int64_t half;  // 1: keys and values are kept in bfloat16, 0: in float32
} Shape;

// Queries, keys and values of one row (heads · P): normed, turned, keys and values stored at `place` (2H, P).
static void remember(const Block *b, const Shape *s, float *row, int64_t queries, const float *turn, char *place) {
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
    const int64_t kept = 2 * s->heads * P;
    row += queries * P;
    if (!s->half) memcpy(place, row, kept * sizeof(float));
    else for (int64_t i = 0; i < kept; i += LANES) to_bfloat16((uint16_t *)place + i, load_up_to(row + i, kept - i), kept - i);
}

// What one thread of a call works with in these blocks: buffers shared with the others, and a part of its own. The scratch holds
// R · (max(D, Q · P) + (Q + 2H) · P + max(2F, D)) shared floats, R · (K + 64) for the K columns of the widest weight, and for
// few rows R · Q · (P + 2) for each stretch up to the last position; a thread's own hold 2 · EIGHT · Q / H · (P + 2).
typedef struct {
    const Shape *s;
    const Tokens *tokens;
    float *x, *qkv, *mlp, *room, *parts, *local;
    int few;  // rows, so that threads share the positions
    Hand *hand;
} Worker;

static int64_t widest(const Shape *s) {
    const int64_t inner = s->queries * s->dim, outer = s->hidden > s->width ? s->hidden : s->width;
    return inner > outer ? inner : outer;
}

static Worker worker(const Shape *s, const Tokens *tokens, const Scratch *scratch, Hand *hand) {
    const int64_t D = s->hidden, P = s->dim, Q = s->queries, F = s->width, R = tokens->count;
    float *x = scratch->floats, *qkv = x + R * (D > Q * P ? D : Q * P), *mlp = qkv + R * (Q + 2 * s->heads) * P;
    float *room = mlp + R * (2 * F > D ? 2 * F : D);
    const int few = R <= EIGHT;
    float *parts = room + R * (widest(s) + 64), *local = parts + (few ? R * Q * (P + 2) * (tokens->end / STRETCH + 1) : 0);
    return (Worker){s, tokens, x, qkv, mlp, room, parts, local + hand->t * scratch->own, few, hand};
}

// Input norm, and the projections to `queries` query heads (all or none), keys and values. Keys and values are stored in kv.
static void project(const Block *b, Worker *w, char *const *kv, int64_t queries) {
    const Shape *s = w->s;
    const Tokens *tokens = w->tokens;
    const int64_t D = s->hidden, P = s->dim, H = s->heads, A = (s->queries + 2 * H) * P, R = tokens->count;
    const int64_t skip = (s->queries - queries) * P, *position = tokens->positions, *sequence = tokens->sequences;
    Hand *hand = w->hand;
    const Rows rows = b->norm_first ? prepare_normed(hand, &b->qkv, tokens->h, b->attention_norm, b->eps, R, w->x, w->room)
                                    : prepare(hand, &b->qkv, tokens->h, D, R, w->room);
    multiply(hand, &b->qkv, rows, R, (Out){w->qkv, A, 0}, skip, A);
    EACH_PIECE(r, hand, R) {
        char *place = kv[sequence[r]] + position[r] * 2 * H * P * (s->half ? 2 : 4);
        remember(b, s, w->qkv + r * A + skip, queries, tokens->turn + r * P, place);
    }
}

// Rows of one sequence that follow each other.
typedef struct {
    int64_t first, rows;
} Run;

// The rows from r on of the same sequence, at most EIGHT.
static Run run_from(const Tokens *tokens, int64_t r) {
    Run run = {r, 1};
    while (run.rows < EIGHT && r + run.rows < tokens->count && tokens->sequences[r + run.rows] == tokens->sequences[r]) run.rows++;
    return run;
}

// The stretches that a run sees: `from` to `to` - 1.
static void stretches(const Block *b, const Worker *w, Run run, int64_t *from, int64_t *to) {
    const int64_t first = w->tokens->positions[run.first] + 1, last = w->tokens->positions[run.first + run.rows - 1] + 1;
    *from = b->window && first > b->window ? (first - b->window) / STRETCH : 0;
    *to = (last + STRETCH - 1) / STRETCH;
}

// Where the results of `queries` queries of P dims lie one after another.
static Softmax softmax_at(float *place, int64_t queries) { return (Softmax){place, place + queries, place + 2 * queries}; }

// Attention of a run's rows over one stretch, for the queries of the key/value heads `from` to `to` - 1. The results of each head
// are (rows, group) queries; the next head's follow. The pieces and stretches are the same for every row, so what a row gets does
// not depend on the rows beside it.
static void attend(const Block *b, const Worker *w, const char *kv, Run run, int64_t stretch, int64_t from, int64_t to, float *results) {
    const Shape *s = w->s;
    const int64_t P = s->dim, Q = s->queries, H = s->heads, A = (Q + 2 * H) * P, group = Q / H, queries = run.rows * group;
    const int64_t size = s->half ? 2 : 4, step = 2 * H * P * size, *position = w->tokens->positions + run.first;
    const int64_t end = min_((stretch + 1) * STRETCH, position[run.rows - 1] + 1);
    for (int64_t head = from; head < to; head++) begin(softmax_at(results + (head - from) * queries * (P + 2), queries), queries, P);
    for (int64_t piece = stretch * STRETCH; piece < end; piece += KEYS) {
        for (int64_t head = from; head < to; head++) {
            const Softmax all_rows = softmax_at(results + (head - from) * queries * (P + 2), queries);
            const char *keys = kv + piece * step + head * P * size;
            for (int64_t r = 0; r < run.rows; r++) {
                const int64_t after = position[r] + 1, start = b->window && after > b->window ? after - b->window : 0;
                const int64_t first = start > piece ? start - piece : 0, last = min_(after - piece, KEYS);
                // The first of few rows asks for the next piece, each head for its share.
                const int64_t ahead = r || !w->few ? 0 : KEYS * step / (to - from);
                const char *next = kv + (piece + KEYS) * step + (head - from) * ahead;
                const Seen seen = {keys, keys + H * P * size, step, P, b->scale, next, ahead / (KEYS / EIGHT)};
                const Softmax so_far = {all_rows.most + r * group, all_rows.total + r * group, all_rows.out + r * group * P};
                if (first < last) attend_group(w->qkv + r * A + run.first * A + head * group * P, &seen, first, last, so_far, group, s->half);
            }
        }
    }
}

// Puts the outputs of a run's rows, for one head, where the next product finds them.
static void finish(const Worker *w, Run run, int64_t head, Softmax sum) {
    const int64_t P = w->s->dim, Q = w->s->queries, group = Q / w->s->heads;
    for (int64_t r = 0; r < run.rows; r++)
        for (int64_t g = 0; g < group; g++)
            for (int64_t p = 0; p < P; p++) {
                const int64_t i = r * group + g;
                w->x[(run.first + r) * Q * P + (head * group + g) * P + p] = sum.out[i * P + p] / sum.total[i];
            }
}

// Attention of many rows: a piece is a run and a head.
static void attend_many(const Block *b, Worker *w, char *const *kv) {
    const int64_t H = w->s->heads, P = w->s->dim, group = w->s->queries / H;
    int64_t runs = 0, at = -1, from, to;
    for (int64_t r = 0; r < w->tokens->count; r += run_from(w->tokens, r).rows) runs++;
    Run run = {0, 0};
    EACH_PIECE(i, w->hand, runs * H) {
        for (; at < i / H; at++) run = run_from(w->tokens, run.first + run.rows);
        const int64_t queries = run.rows * group, head = i % H;
        const Softmax sum = softmax_at(w->local, queries), part = softmax_at(w->local + queries * (P + 2), queries);
        begin(sum, queries, P);
        stretches(b, w, run, &from, &to);
        for (int64_t stretch = from; stretch < to; stretch++) {
            attend(b, w, kv[w->tokens->sequences[run.first]], run, stretch, head, head + 1, part.most);
            merge(sum, part, queries, P);
        }
        finish(w, run, head, sum);
    }
}

// The stretches of few rows, one run after another: of number i, its run, its own number, and where its results go.
typedef struct {
    Run run;
    int64_t stretch;
    float *place;
} Stretch;

static Stretch stretch_of(const Block *b, const Worker *w, int64_t i) {
    const int64_t size = w->s->queries * (w->s->dim + 2);
    Stretch found = {{0, 0}, 0, w->parts};
    for (int64_t from, to;; i -= to - from, found.place += (to - from) * found.run.rows * size) {
        found.run = run_from(w->tokens, found.run.first + found.run.rows);
        stretches(b, w, found.run, &from, &to);
        if (i < to - from) return (Stretch){found.run, from + i, found.place + i * found.run.rows * size};
    }
}

// Attention of few rows: threads share the stretches, too; where there are fewer than threads, also the heads. Each result gets a
// place of its own in `parts`. Then the parts of each run become one, and its rows narrow for the next product.
static Rows attend_few(const Block *b, Worker *w, char *const *kv) {
    const int64_t H = w->s->heads, P = w->s->dim, group = w->s->queries / H, R = w->tokens->count;
    int64_t runs = 0, all = 0, from, to;
    for (int64_t r = 0; r < R; runs++) {
        const Run run = run_from(w->tokens, r);
        stretches(b, w, run, &from, &to);
        r += run.rows, all += to - from;
    }
    const int64_t heads = all < w->hand->n ? 1 : H;
    EACH_PIECE(i, w->hand, all * H / heads) {
        const Stretch s = stretch_of(b, w, i * heads / H);
        const int64_t head = i * heads % H;
        float *place = s.place + head * s.run.rows * group * (P + 2);
        attend(b, w, kv[w->tokens->sequences[s.run.first]], s.run, s.stretch, head, head + heads, place);
    }
    const Rows rows = rows_in(&b->o, w->x, w->s->queries * P, R, w->room);
    EACH_PIECE(i, w->hand, runs) {
        float *place = w->parts;
        Run run = {0, 0};
        for (int64_t at = -1; at < i; at++) {
            place += at < 0 ? 0 : (to - from) * H * run.rows * group * (P + 2);
            run = run_from(w->tokens, run.first + run.rows);
            stretches(b, w, run, &from, &to);
        }
        const int64_t queries = run.rows * group, size = queries * (P + 2);
        const Softmax sum = softmax_at(w->local, queries);
        for (int64_t head = 0; head < H; head++) {
            begin(sum, queries, P);
            for (int64_t n = 0; n < to - from; n++) merge(sum, softmax_at(place + (n * H + head) * size, queries), queries, P);
            finish(w, run, head, sum);
        }
        for (int64_t r = run.first; r < run.first + run.rows && narrow(b->o.kind); r++) pack(&b->o, &rows, r);
    }
    return rows;
}

// Attention over kv, and its output projection. Adds to `h`.
static void attention(const Block *b, Worker *w, char *const *kv) {
    const Shape *s = w->s;
    const int64_t D = s->hidden, R = w->tokens->count;
    float *h = w->tokens->h, *x = w->x, *out = b->norm_first ? h : w->mlp;
    if (!w->few) attend_many(b, w, kv);
    const Rows rows = w->few ? attend_few(b, w, kv) : prepare(w->hand, &b->o, x, s->queries * s->dim, R, w->room);
    multiply(w->hand, &b->o, rows, R, (Out){out, D, b->norm_first}, 0, D);
    if (!b->norm_first)
        EACH_PIECE(r, w->hand, R) {
            norm(out + r * D, b->attention_norm, b->eps, x + r * D, D);
            for (int64_t k = 0; k < D; k++) h[r * D + k] += x[r * D + k];
        }
}

// The MLP. Adds to `h`.
static void gated_mlp(const Block *b, Worker *w) {
    const int64_t D = w->s->hidden, F = w->s->width, R = w->tokens->count;
    float *h = w->tokens->h, *x = w->x, *mlp = w->mlp, *out = b->norm_first ? h : x;
    Hand *hand = w->hand;
    Rows rows = b->norm_first ? prepare_normed(hand, &b->gate_up, h, b->mlp_norm, b->eps, R, x, w->room)
                              : prepare(hand, &b->gate_up, h, D, R, w->room);
    const Division d = divided(hand, F, IS_INT4(b->gate_up.kind) ? ROWS : FOUR);
    EACH_PIECE(i, hand, d.pieces) {
        int64_t from, to;
        part_of(&d, i, &from, &to);
        product(&b->gate_up, &rows, R, (Out){mlp, 2 * F, 0}, from, to, F);
        for (int64_t r = 0; r < R; r++) times_silu(mlp + r * 2 * F + F + from, mlp + r * 2 * F + from, to - from);
    }
    rows = prepare(hand, &b->down, mlp + F, 2 * F, R, w->room);
    multiply(hand, &b->down, rows, R, (Out){out, D, b->norm_first}, 0, D);
    if (!b->norm_first)
        EACH_PIECE(r, hand, R) {
            norm(x + r * D, b->mlp_norm, b->eps, x + r * D, D);
            for (int64_t k = 0; k < D; k++) h[r * D + k] += x[r * D + k];
        }
}
