// Mamba (arXiv 2312.00752, section 3.4): each channel has a step size and decays of its own. E channels, N
// state size, L rank of step sizes.

#include "mixers.h"

#include "replay.h"

enum { TOKENS = EIGHT };  // tokens that a state passes through while it is in registers

// The inputs and outputs of all channels for T ≤ TOKENS tokens of a sequence.
typedef struct {
    const float *x[TOKENS], *dt[TOKENS], *B[TOKENS], *C[TOKENS];  // (E), (E), (N), (N)
    float *y[TOKENS];                                             // (E), NULL if it is not wanted
} Fed;

// Moves a vector of a channel's state, from entry n on (it may be cut short), from `old` to `state` over T
// tokens, and adds to the sums for y.
ALWAYS void advance_vector(const Mixer *m, const float *old, float *state, int64_t channel, int64_t n,
                           const Fed *fed, int64_t T, vf *sums) {
    const int64_t left = m->states - n;
    const vf decay = load_up_to(floats(m->decay) + channel * m->states + n, left);
    vf v = load_up_to(old + n, left);
    for (int64_t t = 0; t < T; t++) {
        const float dt = fed->dt[t][channel];
        v = fma_(load_up_to(fed->B[t] + n, left), all(dt * fed->x[t][channel]), v * exp_(decay * dt));
        sums[t] = fma_(v, load_up_to(fed->C[t] + n, left), sums[t]);
    }
    store_up_to(state + n, v, left);
}

// The recurrence for T tokens and one channel: its state (N) after `old`, which may be the same place; each y
// becomes C h + D x. Never inlined, so that a replay repeats it bit for bit.
static __attribute__((noinline)) void advance(const Mixer *m, const float *old, float *state, int64_t channel,
                                              const Fed *fed, int64_t T, float skip) {
    vf sums[TOKENS] = {0};
    float y[TOKENS];
    for (int64_t n = 0; n < m->states; n += LANES) advance_vector(m, old, state, channel, n, fed, T, sums);
    if (!fed->y[0]) return;
    sums_of(sums, y);
    for (int64_t t = 0; t < T; t++) fed->y[t][channel] = y[t] + skip * fed->x[t][channel];
}

static inline vf softplus(vf x) { return choose(x > 20.0f, x, log1p_(exp_(x))); }

// Step sizes, B and C of all rows, from the outputs of the convolution. A row of `low` is (L + 2N), and then
// (E).
static void find_steps(const Mixer *m, Worker *w) {
    const int64_t E = m->inner, N = m->states, R = w->tokens.count, L = m->steps.columns,
                  all_of = mixer_low(m);
    float *low = w->buffers.low;
    const float *dt_norm = floats(m->dt_norm);
    multiply(w->hand, &m->low, prepare(w->hand, &m->low, w->buffers.conv, E, R, w->buffers.room), R,
             (Out){low, all_of, 0}, 0, m->low.rows);
    if (dt_norm) EACH_PIECE(r, w->hand, R) {
            float *row = low + r * all_of;
            rms_norm(row, dt_norm, m->inner_eps, row, L);
            rms_norm(row + L, floats(m->b_norm), m->inner_eps, row + L, N);
            rms_norm(row + L + N, floats(m->c_norm), m->inner_eps, row + L + N, N);
        }
    multiply(w->hand, &m->steps, prepare(w->hand, &m->steps, low, all_of, R, w->buffers.room), R,
             (Out){low + m->low.rows, all_of, 0}, 0, E);
}

void mamba_replay(const Mixer *m, const float *old, float *state, const float *journal, int64_t R,
                  int64_t from, int64_t to) {
    const int64_t E = m->inner, N = m->states;
    for (int64_t first = 0, T; first < R; first += T, old = state) {
        T = min_(TOKENS, R - first);
        Fed fed = {.y = {NULL}};
        for (int64_t t = 0; t < T; t++) {
            const float *note = journal + (first + t) * note_floats(m);
            fed.x[t] = note + E, fed.dt[t] = note + 2 * E, fed.B[t] = fed.C[t] = note + 3 * E;
        }
        for (int64_t e = from; e < to; e++) advance(m, old + e * N, state + e * N, e, &fed, T, 0);
    }
}

// The recurrence of channels `from` to `to` - 1. Updates the states. With `gated`, x receives y · silu(z).
static void recur(const Mixer *m, const Worker *w, const MemoryAt *memory, int gated, int64_t from,
                  int64_t to) {
    const int64_t E = m->inner, N = m->states, L = m->steps.columns, A = m->in.rows, all_of = mixer_low(m);
    int64_t rows, T;
    for (int64_t begin = 0; begin < w->tokens.count; begin += rows) {
        rows = rows_of_text(&w->tokens, begin);
        const StateAt *state = &memory[w->tokens.sequences[begin]].state;
        for (int64_t first = begin; first < begin + rows; first += T) {
            T = min_(TOKENS, begin + rows - first);
            Fed fed;
            for (int64_t t = 0; t < T; t++) {
                float *low = w->buffers.low + (first + t) * all_of, *dt = low + m->low.rows,
                      *note = note_at(m, state, first - begin + t);
                for (int64_t e = from; e < to; e += LANES)
                    store_up_to(dt + e, softplus(load_up_to(dt + e, to - e)), to - e);
                if (note) memcpy(note + 2 * E + from, dt + from, (to - from) * sizeof(float));
                if (note && !from && to)
                    memcpy(note + 3 * E, low + L, N * sizeof(float));  // once: pieces may be empty
                fed.x[t] = w->buffers.conv + (first + t) * E, fed.dt[t] = dt;
                fed.B[t] = low + L, fed.C[t] = low + L + N;
                fed.y[t] = gated ? w->buffers.x + (first + t) * E : NULL;
            }
            const float *old = first == begin ? caught_up(m, state, from, to) : state->fresh;
            for (int64_t e = from; e < to; e++)
                advance(m, old + e * N, state->fresh + e * N, e, &fed, T, floats(m->skip)[e]);
            for (int64_t t = 0; gated && t < T; t++)
                times_silu(fed.y[t] + from, w->buffers.in + (first + t) * A + from, to - from);
        }
    }
}

void mamba_advance(const Mixer *m, Worker *w, const MemoryAt *memory, int gated) {
    const Division channels = divided(w->hand, m->inner, LANES);
    int64_t from, to;
    find_steps(m, w);
    EACH_PIECE(piece, w->hand, channels.pieces) {
        part_of(&channels, piece, &from, &to);
        recur(m, w, memory, gated, from, to);
    }
}
