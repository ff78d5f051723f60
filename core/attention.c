// D hidden size, Q query heads, H key/value heads, P head dim, R rows.

#include "attention.h"

// Multiplies, norms and turns the queries, keys and values of one row (heads · P), and stores keys and values
// at `place` (2H, P).
static void store_row(const Attention *a, float *row, int64_t queries, const float *turn, char *place,
                      int64_t half) {
    const int64_t P = a->dim, H = a->heads;
    if (a->around.factors.values)
        multiply_by(row, floats(a->around.factors) + (a->queries - queries) * P, (queries + 2 * H) * P);
    if (a->k_norm.values) {
        const int64_t size = a->norm_heads ? P : 0;
        const float *q_norm = floats(a->q_norm), *k_norm = floats(a->k_norm);
        for (int64_t i = 0; i < (size ? queries : queries > 0); i++)
            rms_norm(row + i * P, q_norm, a->head_eps, row + i * P, size ? size : queries * P);
        for (int64_t i = 0; i < (size ? H : 1); i++)
            rms_norm(row + (queries + i) * P, k_norm, a->head_eps, row + (queries + i) * P,
                     size ? size : H * P);
    }
    if (a->rotary)
        for (int64_t i = 0; i < queries + H; i++)
            for (int64_t p = 0; p < P; p += 2) {
                float *x = row + i * P + p, re = x[0], im = x[1];
                x[0] = re * turn[p] - im * turn[p + 1];
                x[1] = re * turn[p + 1] + im * turn[p];
            }
    const int64_t kept = 2 * H * P;
    row += queries * P;
    if (!half)
        memcpy(place, row, kept * sizeof(float));
    else
        for (int64_t i = 0; i < kept; i += LANES)
            to_bfloat16((uint16_t *)place + i, load_up_to(row + i, kept - i), kept - i);
}

// The projections to `queries` query heads (all or none), keys and values. Keys and values are stored.
static void project(const Attention *a, Worker *w, const MemoryAt *memory, int64_t queries) {
    const Tokens *tokens = &w->tokens;
    const Buffers *b = &w->buffers;
    const int64_t P = a->dim, H = a->heads, all_rows = a->qkv.rows, R = tokens->count;
    const int64_t skip = (a->queries - queries) * P;
    const Rows rows = enter_part(w, &a->around, &a->qkv);
    multiply(w->hand, &a->qkv, rows, R, (Out){b->qkv, all_rows, 0}, skip, all_rows);
    EACH_PIECE(r, w->hand, R) {
        const KeysAt *keys = &memory[tokens->sequences[r]].keys;
        char *place = keys->places + tokens->positions[r] * 2 * H * P * (keys->half ? 2 : 4);
        const float *turn =
            a->rotary ? w->model->rotary[a->rotary - 1].pairs + tokens->positions[r] * P : NULL;
        store_row(a, b->qkv + r * all_rows + skip, queries, turn, place, keys->half);
    }
}

// Rows of one sequence that follow each other.
typedef struct {
    int64_t first, rows;
} Run;

// The rows from r on of the same sequence, at most EIGHT.
static Run run_from(const Tokens *tokens, int64_t r) {
    Run run = {r, 1};
    while (run.rows < EIGHT && r + run.rows < tokens->count &&
           tokens->sequences[r + run.rows] == tokens->sequences[r])
        run.rows++;
    return run;
}

// The stretches that a run sees: `from` to `to` - 1.
static void stretches(const Attention *a, const Worker *w, Run run, int64_t *from, int64_t *to) {
    const int64_t *position = w->tokens.positions + run.first;
    const int64_t first = position[0] + 1, last = position[run.rows - 1] + 1;
    *from = a->window && first > a->window ? (first - a->window) / STRETCH : 0;
    *to = (last + STRETCH - 1) / STRETCH;
}

// Attention of a run's rows over one stretch, for the queries of the key/value heads `from` to `to` - 1. The
// results of each head are (rows, group) queries; the next head's follow. The pieces and stretches are the
// same for every row, so a row's results do not depend on the rows beside it.
static void attend(const Attention *a, const Worker *w, const KeysAt *at, Run run, int64_t stretch,
                   int64_t from, int64_t to, float *results) {
    const int64_t P = a->dim, H = a->heads, group = a->queries / H, queries = run.rows * group,
                  size = at->half ? 2 : 4;
    const int64_t step = 2 * H * P * size, *position = w->tokens.positions + run.first,
                  each = softmax_floats(queries, P);
    const int64_t end = min_((stretch + 1) * STRETCH, position[run.rows - 1] + 1);
    for (int64_t head = from; head < to; head++)
        softmax_begin(softmax_at(results + (head - from) * each, queries), queries, P);
    for (int64_t piece = stretch * STRETCH; piece < end; piece += PIECE) {
        for (int64_t head = from; head < to; head++) {
            const Softmax all_rows = softmax_at(results + (head - from) * each, queries);
            const char *keys = at->places + piece * step + head * P * size;
            for (int64_t r = 0; r < run.rows; r++) {
                const int64_t after = position[r] + 1,
                              start = a->window && after > a->window ? after - a->window : 0;
                const int64_t first = start > piece ? start - piece : 0, last = min_(after - piece, PIECE);
                // If there are few rows, the first one prefetches the next piece, each head its share.
                const int64_t ahead = r || !w->few ? 0 : PIECE * step / (to - from);
                const char *next = at->places + (piece + PIECE) * step + (head - from) * ahead;
                const Seen seen = {keys, keys + H * P * size,    step, P, a->scale, a->cap,
                                   next, ahead / (PIECE / EIGHT)};
                const Softmax so_far = {all_rows.most + r * group, all_rows.total + r * group,
                                        all_rows.out + r * group * P};
                const float *q = w->buffers.qkv + (run.first + r) * a->qkv.rows + head * group * P;
                if (first < last) attend_group(q, &seen, first, last, so_far, group, (int)at->half);
            }
        }
    }
}

// Writes the outputs of a run's rows, for one head, as the input of the next product.
static void finish(const Attention *a, const Worker *w, Run run, int64_t head, Softmax sum) {
    const int64_t P = a->dim, Q = a->queries, group = Q / a->heads;
    for (int64_t r = 0; r < run.rows; r++)
        for (int64_t g = 0; g < group; g++)
            for (int64_t p = 0; p < P; p++) {
                const int64_t i = r * group + g;
                w->buffers.x[(run.first + r) * Q * P + (head * group + g) * P + p] =
                    sum.out[i * P + p] / sum.total[i];
            }
}

static float *local_of(const Worker *w) { return w->buffers.local + w->hand->index * w->buffers.own; }

// Attention of many rows: a piece is a run and a head.
static void attend_many(const Attention *a, Worker *w, const MemoryAt *memory) {
    const int64_t H = a->heads, P = a->dim, group = a->queries / H;
    int64_t runs = 0, at = -1, from, to;
    for (int64_t r = 0; r < w->tokens.count; r += run_from(&w->tokens, r).rows) runs++;
    Run run = {0, 0};
    EACH_PIECE(i, w->hand, runs * H) {
        for (; at < i / H; at++) run = run_from(&w->tokens, run.first + run.rows);
        const int64_t queries = run.rows * group, head = i % H;
        const Softmax sum = softmax_at(local_of(w), queries);
        const Softmax part = softmax_at(local_of(w) + softmax_floats(queries, P), queries);
        softmax_begin(sum, queries, P);
        stretches(a, w, run, &from, &to);
        for (int64_t stretch = from; stretch < to; stretch++) {
            attend(a, w, &memory[w->tokens.sequences[run.first]].keys, run, stretch, head, head + 1,
                   part.most);
            softmax_merge(sum, part, queries, P);
        }
        finish(a, w, run, head, sum);
    }
}

// The stretches of few rows, one run after another. For number i: its run, its own number, and the place of
// its results.
typedef struct {
    Run run;
    int64_t stretch;
    float *place;
} Stretch;

static Stretch stretch_of(const Attention *a, const Worker *w, int64_t i) {
    const int64_t size = softmax_floats(a->queries, a->dim);
    Stretch found = {{0, 0}, 0, w->buffers.parts};
    for (int64_t from, to;; i -= to - from, found.place += (to - from) * found.run.rows * size) {
        found.run = run_from(&w->tokens, found.run.first + found.run.rows);
        stretches(a, w, found.run, &from, &to);
        if (i < to - from) return (Stretch){found.run, from + i, found.place + i * found.run.rows * size};
    }
}

// Attention of few rows: threads also share out the stretches, and the heads if there are fewer stretches
// than threads. Each result gets a place of its own in `parts`. Then the parts of each run become one, and
// its rows narrow for the next product.
static Rows attend_few(const Attention *a, Worker *w, const MemoryAt *memory) {
    const Tokens *tokens = &w->tokens;
    const int64_t H = a->heads, P = a->dim, group = a->queries / H, R = tokens->count;
    int64_t runs = 0, count = 0, from, to;
    for (int64_t r = 0; r < R; runs++) {
        const Run run = run_from(tokens, r);
        stretches(a, w, run, &from, &to);
        r += run.rows, count += to - from;
    }
    const int64_t heads = count < w->hand->count ? 1 : H;
    EACH_PIECE(i, w->hand, count * H / heads) {
        const Stretch s = stretch_of(a, w, i * heads / H);
        const int64_t head = i * heads % H;
        float *place = s.place + head * softmax_floats(s.run.rows * group, P);
        attend(a, w, &memory[tokens->sequences[s.run.first]].keys, s.run, s.stretch, head, head + heads,
               place);
    }
    const Rows rows = rows_of(&a->o, w->buffers.x, a->queries * P, R, w->buffers.room);
    EACH_PIECE(i, w->hand, runs) {
        float *place = w->buffers.parts;
        Run run = {0, 0};
        for (int64_t at = -1; at < i; at++) {
            place += at < 0 ? 0 : (to - from) * H * softmax_floats(run.rows * group, P);
            run = run_from(tokens, run.first + run.rows);
            stretches(a, w, run, &from, &to);
        }
        const int64_t queries = run.rows * group, size = softmax_floats(queries, P);
        const Softmax sum = softmax_at(local_of(w), queries);
        for (int64_t head = 0; head < H; head++) {
            softmax_begin(sum, queries, P);
            for (int64_t n = 0; n < to - from; n++)
                softmax_merge(sum, softmax_at(place + (n * H + head) * size, queries), queries, P);
            finish(a, w, run, head, sum);
        }
        for (int64_t r = run.first; r < run.first + run.rows; r++) make_narrow(&rows, r);
    }
    return rows;
}

void attention_project(const Attention *a, Worker *w, const MemoryAt *memory) {
    project(a, w, memory, a->queries);
}

void attention_remember(const Attention *a, Worker *w, const MemoryAt *memory) { project(a, w, memory, 0); }

void attention_run(const Attention *a, Worker *w, const MemoryAt *memory) {
    const Buffers *b = &w->buffers;
    const int64_t R = w->tokens.count;
    if (!w->few) attend_many(a, w, memory);
    const Rows rows =
        w->few ? attend_few(a, w, memory) : prepare(w->hand, &a->o, b->x, a->queries * a->dim, R, b->room);
    leave_part(w, &a->around, &a->o, rows, b->inner);
}

static vf activated(const Mlp *m, vf x) {
    if (m->activation == OFFRAMP_GELU) return gelu(x);
    if (m->activation == OFFRAMP_SILU) return silu(x);
    const vf above = choose(x > 0, x, (vf){0});
    return above * above;
}

// The input of an MLP's last product, from results of its first one: places `from` to `to` - 1 of W, which
// stand last. A gate, if there is one, stands before them.
static void activate(const Mlp *m, float *inner, int64_t from, int64_t to) {
    const int64_t W = m->down.columns, A = m->gate_up.rows, gated = A > W;
    const float *factors = floats(m->around.factors);
    if (factors) multiply_by(inner + from, factors + from, to - from);
    if (factors && gated) multiply_by(inner + W + from, factors + W + from, to - from);
    for (int64_t k = from; k < to; k += LANES) {
        const vf x = activated(m, load_up_to(inner + k, to - k));
        float *y = inner + A - W + k;
        store_up_to(y, gated ? load_up_to(y, to - k) * x : x, to - k);
    }
}

void mlp_run(const Mlp *m, Worker *w) {
    const Buffers *b = &w->buffers;
    const int64_t W = m->down.columns, A = m->gate_up.rows, R = w->tokens.count;
    float *inner = b->inner;
    Rows rows = enter_part(w, &m->around, &m->gate_up);
    const Division d = divided(w->hand, W, unit_of(&m->gate_up));
    EACH_PIECE(i, w->hand, d.pieces) {
        int64_t from, to;
        part_of(&d, i, &from, &to);
        product(&m->gate_up, &rows, R, (Out){inner, A, 0}, from, to, A - W);
        for (int64_t r = 0; r < R; r++) activate(m, inner + r * A, from, to);
    }
    rows = prepare(w->hand, &m->down, inner + A - W, A, R, b->room);
    leave_part(w, &m->around, &m->down, rows, b->x);
}
