// D hidden size, E inner width (H heads of P dims), G groups, N state size, W the convolution's width, C = E
// + 2GN channels.

#include "mixers.h"

#include "replay.h"

static inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

enum {
    TOKENS = EIGHT,
    REGISTERS = 8
};  // tokens whose outputs are summed at once; vectors of a state in registers

// The inputs and outputs of one head for T ≤ TOKENS tokens of a sequence.
typedef struct {
    const float *x[TOKENS], *B[TOKENS], *C[TOKENS];  // (P), (N), (N)
    float dt[TOKENS], keep[TOKENS], *y[TOKENS];  // keep is exp(dt · decay); y (P), NULL if it is not wanted
} Fed;

// Moves V vectors of one row of a state, from column n on (one vector may be cut short), from `old` to
// `state` over T tokens, and adds to the sums for y.
ALWAYS void advance_row(const Mixer *m, const float *old, float *state, int64_t n, const float *in,
                        const Fed *fed, int64_t T, vf *sums, const int V) {
    vf v[REGISTERS];
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) v[i] = load_up_to(old + n + i * LANES, m->states - n - i * LANES);
    for (int64_t t = 0; t < T; t++) {
        vf even = sums[t], odd = {0};
        const vf fresh = all(in[t]), kept = all(fed->keep[t]);
#pragma GCC unroll 8
        for (int i = 0; i < V; i++) {
            const int64_t left = V > 1 ? LANES : m->states - n;
            v[i] = fma_(load_up_to(fed->B[t] + n + i * LANES, left), fresh, v[i] * kept);
            vf *part = i % 2 ? &odd : &even;
            *part = fma_(v[i], load_up_to(fed->C[t] + n + i * LANES, left), *part);
        }
        sums[t] = even + odd;
    }
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) store_up_to(state + n + i * LANES, v[i], m->states - n - i * LANES);
}

// The recurrence for T tokens and one head: the state (P, N) after `old`, which may be the same place; each y
// becomes C h + D x. Never inlined, so that a replay repeats it bit for bit. A row of the state stays in
// registers for all tokens.
static __attribute__((noinline)) void advance(const Mixer *m, const float *old, float *state, const Fed *fed,
                                              int64_t T, float skip) {
    const int64_t N = m->states;
    for (int64_t p = 0; p < m->dim; p++, old += N, state += N) {
        vf sums[TOKENS] = {0};
        float in[TOKENS], y[TOKENS];
        for (int64_t t = 0; t < T; t++) in[t] = fed->dt[t] * fed->x[t][p];
        int64_t n = 0;
        for (; n + REGISTERS * LANES <= N; n += REGISTERS * LANES)
            advance_row(m, old, state, n, in, fed, T, sums, REGISTERS);
        for (; n < N; n += LANES) advance_row(m, old, state, n, in, fed, T, sums, 1);
        if (!fed->y[0]) continue;
        sums_of(sums, y);
        for (int64_t t = 0; t < T; t++) fed->y[t][p] = y[t] + skip * fed->x[t][p];
    }
}

void mamba2_replay(const Mixer *m, const float *old, float *state, const float *journal, int64_t R,
                   int64_t from, int64_t to) {
    const int64_t P = m->dim, N = m->states, C = m->channels;
    for (int64_t first = 0, T; first < R; first += T, old = state) {
        T = min_(TOKENS, R - first);
        for (int64_t head = from; head < to; head++) {
            Fed fed = {.y = {NULL}};
            for (int64_t t = 0; t < T; t++) {
                const float *conv = journal + (first + t) * note_floats(m) + C;
                fed.x[t] = conv + head * P,
                fed.B[t] = fed.C[t] = conv + m->inner + head / (m->heads / m->groups) * N;
                fed.dt[t] = conv[C + head], fed.keep[t] = expf(conv[C + head] * floats(m->decay)[head]);
            }
            advance(m, old + head * P * N, state + head * P * N, &fed, T, 0);
        }
    }
}

// The recurrence of heads `from` to `to` - 1. Updates the states. With `gated`, x receives y · silu(z).
static void recur(const Mixer *m, const Worker *w, const MemoryAt *memory, int gated, int64_t from,
                  int64_t to) {
    const int64_t P = m->dim, G = m->groups, N = m->states, E = m->inner, C = m->channels, A = m->in.rows;
    const float *dt_bias = floats(m->dt_bias), *decay = floats(m->decay), *skip = floats(m->skip);
    int64_t rows, T;
    for (int64_t head = from; head < to; head++)
        for (int64_t begin = 0; begin < w->tokens.count; begin += rows) {
            rows = rows_of_text(&w->tokens, begin);
            const StateAt *state = &memory[w->tokens.sequences[begin]].state;
            for (int64_t first = begin; first < begin + rows; first += T) {
                T = min_(TOKENS, begin + rows - first);
                Fed fed;
                for (int64_t t = 0; t < T; t++) {
                    const float *in = w->buffers.in + (first + t) * A + E + C,
                                *conv = w->buffers.conv + (first + t) * C;
                    float dt = softplus(in[head] + dt_bias[head]),
                          *note = note_at(m, state, first - begin + t);
                    dt = dt < m->dt_low ? m->dt_low : dt > m->dt_high ? m->dt_high : dt;
                    if (note) note[2 * C + head] = dt;
                    fed.x[t] = conv + head * P, fed.B[t] = conv + E + head / (m->heads / G) * N,
                    fed.C[t] = fed.B[t] + G * N;
                    fed.dt[t] = dt, fed.keep[t] = expf(dt * decay[head]);
                    fed.y[t] = gated ? w->buffers.x + (first + t) * E + head * P : NULL;
                }
                const float *old = first == begin ? caught_up(m, state, head, head + 1) : state->fresh;
                advance(m, old + head * P * N, state->fresh + head * P * N, &fed, T, skip[head]);
                for (int64_t t = 0; gated && !m->gate_last && t < T; t++)
                    times_silu(fed.y[t], w->buffers.in + (first + t) * A + head * P, P);
            }
        }
}

void mamba2_advance(const Mixer *m, Worker *w, const MemoryAt *memory, int gated) {
    const Division heads = divided(w->hand, m->heads, 1);
    int64_t from, to;
    EACH_PIECE(piece, w->hand, heads.pieces) {
        part_of(&heads, piece, &from, &to);
        recur(m, w, memory, gated, from, to);
    }
}

// The norm over each group, if there is one. Returns the rows for the output projection.
Rows mamba2_outputs(const Mixer *m, Worker *w) {
    const int64_t E = m->inner, each = E / m->groups, R = w->tokens.count;
    float *x = w->buffers.x;
    const Rows rows = rows_of(&m->out, x, E, R, w->buffers.room);
    EACH_PIECE(r, w->hand, R) {
        for (int64_t g = 0; m->gated_norm.values && g < m->groups; g++) {
            float *part = x + r * E + g * each;
            rms_norm(part, floats(m->gated_norm) + g * each, m->gated_eps, part, each);
        }
        if (m->gate_last) times_silu(x + r * E, w->buffers.in + r * m->in.rows, E);
        make_narrow(&rows, r);
    }
    return rows;
}
