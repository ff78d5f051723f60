// Mamba-2 mixers (arXiv 2405.21060), with the norm before them. mamba2.py says what is computed and in which layout.
//
// D hidden size, E inner width (H heads of P dims), G groups, N state size, W the convolution's width, C = E + 2GN channels.

#include "tokens.h"

typedef struct {
    Weight in, out;                                     // rows of `in`: z (E), x, B and C (C together), dt (H)
    const float *norm, *gated_norm, *conv, *conv_bias;  // conv (W, C); conv_bias may be NULL
    const float *dt_bias, *decay, *skip;                // (H) each: decay is A < 0, skip is D
    float eps, gated_eps, dt_low, dt_high;
} MambaBlock;

typedef struct {
    int64_t hidden, heads, dim, groups, states, width;  // all are 0 in a model without mixers
} MambaShape;

// What a block remembers of one sequence: (W - 1, C) and (H, P, N).
typedef struct {
    float *window, *h;
} MambaMemory;

static inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

enum { TOKENS = EIGHT, REGISTERS = 8 };  // tokens whose outputs are summed at once; vectors of a state in registers

// What T ≤ TOKENS tokens of a sequence feed to one head, and what they get.
typedef struct {
    const float *x[TOKENS], *B[TOKENS], *C[TOKENS];  // (P), (N), (N)
    float dt[TOKENS], keep[TOKENS], *y[TOKENS];      // keep is exp(dt · decay); y (P), NULL if it is not wanted
} Fed;

// V vectors of one row of a state, from column n on (one vector may be cut short), are taken from `old` and put into `state`: T
// tokens pass, the sums for y grow.
ALWAYS void pass(const MambaShape *s, const float *old, float *state, int64_t n, const float *in, const Fed *fed, int64_t T, vf *sums,
                 const int V) {
    vf v[REGISTERS];
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) v[i] = load_up_to(old + n + i * LANES, s->states - n - i * LANES);
    for (int64_t t = 0; t < T; t++) {
        vf even = sums[t], odd = {0};
        const vf fresh = all(in[t]), kept = all(fed->keep[t]);
#pragma GCC unroll 8
        for (int i = 0; i < V; i++) {
            const int64_t left = V > 1 ? LANES : s->states - n;
            v[i] = fma_(load_up_to(fed->B[t] + n + i * LANES, left), fresh, v[i] * kept);
            vf *part = i % 2 ? &odd : &even;
            *part = fma_(v[i], load_up_to(fed->C[t] + n + i * LANES, left), *part);
        }
        sums[t] = even + odd;
    }
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) store_up_to(state + n + i * LANES, v[i], s->states - n - i * LANES);
}

// The recurrence for T tokens and one head: the state (P, N) after `old`, which may be the same place; each y becomes C h + D x.
// Never inlined, so that a replay repeats it bit for bit. A row of the state stays in registers while the tokens pass.
static __attribute__((noinline)) void advance(const MambaShape *s, const float *old, float *state, const Fed *fed, int64_t T,
                                              float skip) {
    const int64_t N = s->states;
    for (int64_t p = 0; p < s->dim; p++, old += N, state += N) {
        vf sums[TOKENS] = {0};
        float in[TOKENS], y[TOKENS];
        for (int64_t t = 0; t < T; t++) in[t] = fed->dt[t] * fed->x[t][p];
        int64_t n = 0;
        for (; n + REGISTERS * LANES <= N; n += REGISTERS * LANES) pass(s, old, state, n, in, fed, T, sums, REGISTERS);
        for (; n < N; n += LANES) pass(s, old, state, n, in, fed, T, sums, 1);
        if (!fed->y[0]) continue;
        sums_of(sums, y);
        for (int64_t t = 0; t < T; t++) fed->y[t][p] = y[t] + skip * fed->x[t][p];
    }
}

// What one thread of a call works with in mixers. The scratch holds R · (max(D, E) + E + C + H + C) shared floats, and R · (K + 64) for
// the K columns of the wider weight.
typedef struct {
    const MambaShape *s;
    const Tokens *tokens;
    int64_t E, C, A;              // inner width, channels, rows of `in`
    float *x, *in, *conv, *room;  // in (R, A), conv (R, C)
    float *const *fresh;          // where each block's new state goes, and the old one stays; NULL: in its place
    Hand *hand;
} MambaWorker;

static MambaWorker mamba_worker(const MambaShape *s, const Tokens *tokens, const Scratch *scratch, Hand *hand) {
    const int64_t D = s->hidden, E = s->heads * s->dim, C = E + 2 * s->groups * s->states, A = E + C + s->heads;
    const int64_t R = tokens->count, K = D > E ? D : E;
    float *x = scratch->floats, *in = x + R * K, *conv = in + R * A, *room = conv + R * C;
    return (MambaWorker){s, tokens, E, C, A, x, in, conv, room, NULL, hand};
}

// Row r of a block's journal; NULL where there is none.
static float *note_of(const MambaWorker *w, int64_t block, int64_t r) {
    float *journal = w->tokens->journal;
    return journal ? journal + (block * w->tokens->stride + r) * (2 * w->C + w->s->heads) : NULL;
}

// Norm and input projection, without its first `skip` rows.
static void project_in(const MambaBlock *b, MambaWorker *w, int64_t skip) {
    const int64_t R = w->tokens->count;
    const Rows rows = prepare_normed(w->hand, &b->in, w->tokens->h, b->norm, b->eps, R, w->x, w->room);
    multiply(w->hand, &b->in, rows, R, (Out){w->in, w->A, 0}, skip, w->A);
}

// The rows from r on that belong to the same sequence, of which there is at least one.
static int64_t run_of(const Tokens *tokens, int64_t r) {
    int64_t rows = 1;
    while (r + rows < tokens->count && tokens->taken[r + rows] == tokens->taken[r]) rows++;
    return rows;
}

// The convolution of x, B and C, and SiLU, for channels `from` to `to` - 1. Updates the windows in `memory`. `i` is the number of
// the block.
static void convolve(const MambaBlock *b, const MambaWorker *w, const MambaMemory *memory, int64_t i, int64_t from, int64_t to) {
    const int64_t C = w->C, W = w->s->width, *sequence = w->tokens->taken;
    int64_t rows;
    for (int64_t first = 0; first < w->tokens->count; first += rows) {
        rows = run_of(w->tokens, first);
        if (sequence[first] < 0) continue;
        float *window = memory[sequence[first]].window;
        const float *in = w->in + first * w->A + w->E;
        // Input t of the run; those before it, t < 0, are in the window.
#define INPUT(t) ((t) < 0 ? window + (W - 1 + (t)) * C : in + (t) * w->A)
        for (int64_t t = 0; t < rows; t++) {
            float *out = w->conv + (first + t) * C, *note = note_of(w, i, first + t);
            for (int64_t c = from; c < to; c += LANES) {
                const int64_t left = to - c;
                vf y = b->conv_bias ? load_up_to(b->conv_bias + c, left) : (vf){0};
                for (int64_t tap = 0; tap < W; tap++)
                    y = fma_(load_up_to(b->conv + tap * C + c, left), load_up_to(INPUT(t + tap - W + 1) + c, left), y);
                store_up_to(out + c, silu(y), left);
            }
            if (note) {
                memcpy(note + from, in + t * w->A + from, (to - from) * sizeof(float));
                memcpy(note + C + from, out + from, (to - from) * sizeof(float));
            }
        }
        for (int64_t tap = 0; tap < W - 1; tap++)  // rises, so nothing is overwritten before it is read
            memcpy(window + tap * C + from, INPUT(rows + tap - W + 1) + from, (to - from) * sizeof(float));
#undef INPUT
    }
}

// The recurrence of heads `from` to `to` - 1. Updates the states in `memory`. With `gated`, x receives y · silu(z).
static void recur(const MambaBlock *b, const MambaWorker *w, const MambaMemory *memory, int64_t i, int gated, int64_t from,
                  int64_t to) {
    const int64_t H = w->s->heads, P = w->s->dim, G = w->s->groups, N = w->s->states, E = w->E, C = w->C;
    const int64_t *sequence = w->tokens->taken, R = w->tokens->count;
    int64_t T;
    for (int64_t head = from; head < to; head++)
        for (int64_t first = 0; first < R; first += T) {
            T = min_(TOKENS, run_of(w->tokens, first));
            if (sequence[first] < 0) continue;
            Fed fed;
            for (int64_t t = 0; t < T; t++) {
                const float *in = w->in + (first + t) * w->A + E + C, *conv = w->conv + (first + t) * C;
                float dt = softplus(in[head] + b->dt_bias[head]), *note = note_of(w, i, first + t);
                dt = dt < b->dt_low ? b->dt_low : dt > b->dt_high ? b->dt_high : dt;
                if (note) note[2 * C + head] = dt;
                fed.x[t] = conv + head * P, fed.B[t] = conv + E + head / (H / G) * N, fed.C[t] = fed.B[t] + G * N;
                fed.dt[t] = dt, fed.keep[t] = expf(dt * b->decay[head]);
                fed.y[t] = gated ? w->x + (first + t) * E + head * P : NULL;
            }
            float *h = memory[sequence[first]].h, *fresh = w->fresh ? w->fresh[i] : h;
            advance(w->s, h + head * P * N, fresh + head * P * N, &fed, T, b->skip[head]);
            for (int64_t t = 0; gated && t < T; t++) {
                const float *z = w->in + (first + t) * w->A + head * P;
                times_silu(fed.y[t], z, P);
            }
        }
}

// Convolution and recurrence, shared out.
static void advance_memories(const MambaBlock *b, MambaWorker *w, const MambaMemory *memory, int64_t i, int gated) {
    Hand *hand = w->hand;
    const Division channels = divided(hand, w->C, LANES), heads = divided(hand, w->s->heads, 1);
    int64_t from, to;
    EACH_PIECE(piece, hand, channels.pieces) {
        part_of(&channels, piece, &from, &to);
        convolve(b, w, memory, i, from, to);
    }
    EACH_PIECE(piece, hand, heads.pieces) {
        part_of(&heads, piece, &from, &to);
        recur(b, w, memory, i, gated, from, to);
    }
}

// The norm over each group, and the output projection. Adds to `h`.
static void project_out(const MambaBlock *b, MambaWorker *w) {
    const int64_t D = w->s->hidden, G = w->s->groups, E = w->E, R = w->tokens->count;
    const Rows rows = rows_in(&b->out, w->x, E, R, w->room);
    EACH_PIECE(r, w->hand, R) {
        for (int64_t g = 0; g < G; g++) {
            float *part = w->x + r * E + g * (E / G);
            norm(part, b->gated_norm + g * (E / G), b->gated_eps, part, E / G);
        }
        if (narrow(b->out.kind)) pack(&b->out, &rows, r);
    }
    multiply(w->hand, &b->out, rows, R, (Out){w->tokens->h, D, 1}, 0, D);
}

// Repeats on a state (H, P, N) what R rows of a journal did in the pass that wrote it.
void offramp_mamba_replay(const MambaBlock *b, const MambaShape *s, float *h, const float *journal, int64_t R) {
    const int64_t H = s->heads, P = s->dim, G = s->groups, N = s->states, C = H * P + 2 * G * N;
    for (int64_t head = 0; head < H; head++)
        for (int64_t first = 0; first < R; first += TOKENS) {
            const int64_t T = min_(TOKENS, R - first);
            Fed fed = {.y = {NULL}};
            for (int64_t t = 0; t < T; t++) {
                const float *conv = journal + (first + t) * (2 * C + H) + C;
                fed.x[t] = conv + head * P, fed.B[t] = fed.C[t] = conv + H * P + head / (H / G) * N;
                fed.dt[t] = conv[C + head], fed.keep[t] = expf(conv[C + head] * b->decay[head]);
            }
            advance(s, h + head * P * N, h + head * P * N, &fed, T, 0);
        }
}
