// Blocks of the Mamba-2 kind (arXiv 2405.21060) on a CPU: a range of blocks, all of their rows, in one call, with one pass
// over the weights. mamba2.py says what is computed and in which layout.
//
// D hidden size, E inner width (H heads of P dims), G groups, N state size, W the convolution's width, C = E + 2GN channels.

#include "products.h"

typedef struct {
    Weight in, out;                                     // rows of `in`: z (E), x, B and C (C together), dt (H)
    const float *norm, *gated_norm, *conv, *conv_bias;  // conv (W, C); conv_bias may be NULL
    const float *dt_bias, *decay, *skip;                // (H) each: decay is A < 0, skip is D
    float eps, gated_eps, dt_low, dt_high;
} MambaBlock;

typedef struct {
    int64_t hidden, heads, dim, groups, states, width;
} MambaShape;

// What a block remembers of one sequence: (W - 1, C) and (H, P, N).
typedef struct {
    float *window, *h;
} MambaMemory;

static inline void store(float *p, v8 v) { memcpy(p, &v, sizeof v); }

static inline float silu(float x) { return x / (1.0f + exp_(-x)); }

static inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// The recurrence for one row and one head: updates the state (P, N); y (P), unless it is NULL, becomes C h + D x. Never
// inlined, so that a replay repeats it bit for bit.
static __attribute__((noinline)) void advance(const MambaShape *s, float *state, const float *x, const float *B,
                                              const float *C, float dt, float decay, float skip, float *y) {
    const int64_t N = s->states;
    for (int64_t p = 0; p < s->dim; p++, state += N) {
        const float in = dt * x[p];
        v8 acc = {0};
        for (int64_t n = 0; n < N; n += 8) {
            const v8 v = load(state + n) * decay + load(B + n) * in;
            store(state + n, v);
            acc += v * load(C + n);
        }
        if (y) y[p] = sum(acc) + skip * x[p];
    }
}

// The rows of one call. Row r is the next token of sequence sequences[r], or padding where that is -1. `journal`, unless it
// is NULL, receives what each row does to a memory: (blocks, stride, 2C + H), of which the first `count` rows of a block are
// written: the convolution's inputs, its outputs, and dt.
typedef struct {
    float *h;  // (count, D)
    int64_t count;
    const int64_t *sequences;
    float *journal;
    int64_t stride;
} MambaTokens;

// What one thread of a call works with. The scratch holds R · (max(D, E) + E + C + H + C) shared floats.
typedef struct {
    const MambaShape *s;
    const MambaTokens *tokens;
    int64_t E, C, A;              // inner width, channels, rows of `in`
    float *x, *in, *conv, *local;  // in (R, A), conv (R, C)
    int t, n;
} MambaWorker;

static MambaWorker mamba_worker(const MambaShape *s, const MambaTokens *tokens, const Scratch *scratch) {
    const int64_t D = s->hidden, E = s->heads * s->dim, C = E + 2 * s->groups * s->states, A = E + C + s->heads;
    const int64_t R = tokens->count;
    float *x = scratch->floats, *in = x + R * (D > E ? D : E), *conv = in + R * A;
    const int t = omp_get_thread_num();
    return (MambaWorker){s, tokens, E, C, A, x, in, conv, conv + R * C + t * scratch->own, t, omp_get_num_threads()};
}

// Row r of a block's journal; NULL where there is none.
static float *note_of(const MambaWorker *w, int64_t block, int64_t r) {
    float *journal = w->tokens->journal;
    return journal ? journal + (block * w->tokens->stride + r) * (2 * w->C + w->s->heads) : NULL;
}

// Norm and input projection, without its first `skip` rows.
static void project_in(const MambaBlock *b, const MambaWorker *w, int64_t skip) {
    const int64_t D = w->s->hidden, R = w->tokens->count;
    int64_t from, to;
    for (int64_t r = w->t; r < R; r += w->n) norm(w->tokens->h + r * D, b->norm, b->eps, w->x + r * D, D);
#pragma omp barrier
    share(w->A - skip, w->t, w->n, &from, &to);
    product(&b->in, prepare(&b->in, w->x, D, R, w->local), R, w->in, w->A, 0, from + skip, to + skip);
#pragma omp barrier
}

// The convolution of x, B and C, and SiLU. Updates the windows in `memory`. `i` is the number of the block.
static void convolve(const MambaBlock *b, const MambaWorker *w, const MambaMemory *memory, int64_t i) {
    const int64_t C = w->C, W = w->s->width, *sequence = w->tokens->sequences;
    int64_t from, to;
    share(C, w->t, w->n, &from, &to);
    for (int64_t r = 0; r < w->tokens->count; r++) {
        if (sequence[r] < 0) continue;
        float *window = memory[sequence[r]].window, *out = w->conv + r * C, *note = note_of(w, i, r);
        const float *in = w->in + r * w->A + w->E, *last = b->conv + (W - 1) * C;
        for (int64_t c = from; c < to; c++) out[c] = last[c] * in[c] + (b->conv_bias ? b->conv_bias[c] : 0.0f);
        for (int64_t tap = 0; tap < W - 1; tap++) {
            float *now = window + tap * C;
            const float *taps = b->conv + tap * C, *next = tap < W - 2 ? now + C : in;
            for (int64_t c = from; c < to; c++) out[c] += taps[c] * now[c];
            for (int64_t c = from; c < to; c++) now[c] = next[c];
        }
        for (int64_t c = from; c < to; c++) out[c] = silu(out[c]);
        if (note) {
            memcpy(note + from, in + from, (to - from) * sizeof(float));
            memcpy(note + C + from, out + from, (to - from) * sizeof(float));
        }
    }
#pragma omp barrier
}

// The recurrence. Updates the states in `memory`. With `gated`, x receives y · silu(z).
static void recur(const MambaBlock *b, const MambaWorker *w, const MambaMemory *memory, int64_t i, int gated) {
    const int64_t H = w->s->heads, P = w->s->dim, G = w->s->groups, N = w->s->states, E = w->E, C = w->C;
    const int64_t *sequence = w->tokens->sequences;
    int64_t from, to;
    share(H, w->t, w->n, &from, &to);
    for (int64_t head = from; head < to; head++)
        for (int64_t r = 0; r < w->tokens->count; r++) {
            if (sequence[r] < 0) continue;
            const float *row = w->in + r * w->A, *conv = w->conv + r * C, *B = conv + E + head / (H / G) * N;
            const float *z = row + head * P;
            float dt = softplus(row[E + C + head] + b->dt_bias[head]), *y = w->x + r * E + head * P;
            float *note = note_of(w, i, r);
            dt = dt < b->dt_low ? b->dt_low : dt > b->dt_high ? b->dt_high : dt;
            if (note) note[2 * C + head] = dt;
            advance(w->s, memory[sequence[r]].h + head * P * N, conv + head * P, B, B + G * N, dt,
                    expf(dt * b->decay[head]), b->skip[head], gated ? y : NULL);
            if (gated)
                for (int64_t p = 0; p < P; p++) y[p] *= silu(z[p]);
        }
#pragma omp barrier
}

// The norm over each group, and the output projection. Adds to `h`.
static void project_out(const MambaBlock *b, const MambaWorker *w) {
    const int64_t D = w->s->hidden, G = w->s->groups, E = w->E, R = w->tokens->count;
    int64_t from, to;
    for (int64_t r = w->t; r < R; r += w->n)
        for (int64_t g = 0; g < G; g++) {
            float *part = w->x + r * E + g * (E / G);
            norm(part, b->gated_norm + g * (E / G), b->gated_eps, part, E / G);
        }
#pragma omp barrier
    share(D, w->t, w->n, &from, &to);
    product(&b->out, prepare(&b->out, w->x, E, R, w->local), R, w->tokens->h, D, 1, from, to);
#pragma omp barrier
}

// Runs the rows through `count` blocks, h in place. memory[i · S + q] is what block i remembers of sequence q of S.
void offramp_mamba_run(const MambaBlock *blocks, int64_t count, const MambaShape *s, const MambaMemory *memory, int64_t S,
                       const MambaTokens *tokens, const Scratch *scratch) {
#pragma omp parallel num_threads(scratch->threads)
    {
        const MambaWorker w = mamba_worker(s, tokens, scratch);
        for (int64_t i = 0; i < count; i++) {
            project_in(blocks + i, &w, 0);
            convolve(blocks + i, &w, memory + i * S, i);
            recur(blocks + i, &w, memory + i * S, i, 1);
            project_out(blocks + i, &w);
        }
    }
}

// Only updates the memories, as if the rows were the input of each of the blocks.
void offramp_mamba_remember(const MambaBlock *blocks, int64_t count, const MambaShape *s, const MambaMemory *memory,
                            int64_t S, const MambaTokens *tokens, const Scratch *scratch) {
#pragma omp parallel num_threads(scratch->threads)
    {
        const MambaWorker w = mamba_worker(s, tokens, scratch);
        for (int64_t i = 0; i < count; i++) {
            project_in(blocks + i, &w, w.E);
            convolve(blocks + i, &w, memory + i * S, i);
            recur(blocks + i, &w, memory + i * S, i, 0);
        }
    }
}

// Repeats on a state (H, P, N) what R rows of a journal did in the pass that wrote it.
void offramp_mamba_replay(const MambaBlock *b, const MambaShape *s, float *h, const float *journal, int64_t R) {
    const int64_t H = s->heads, P = s->dim, G = s->groups, N = s->states, C = H * P + 2 * G * N;
    for (int64_t head = 0; head < H; head++)
        for (int64_t r = 0; r < R; r++) {
            const float *conv = journal + r * (2 * C + H) + C, *B = conv + H * P + head / (H / G) * N;
            const float dt = conv[C + head];
            advance(s, h + head * P * N, conv + head * P, B, B, dt, expf(dt * b->decay[head]), 0, NULL);
        }
}
