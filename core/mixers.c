// What mixers have in common: projections, the convolution, and going back. D hidden size, E inner width, W
// the convolution's width, C channels.

#include "mixers.h"

#include "replay.h"

// The input projection, without its first `skip` rows.
static void project_in(const Mixer *m, Worker *w, int64_t skip) {
    const Rows rows = enter_part(w, &m->around, &m->in);
    const int64_t A = m->in.rows, R = w->tokens.count;
    const float *factors = floats(m->around.factors);
    multiply(w->hand, &m->in, rows, R, (Out){w->buffers.in, A, 0}, skip, A);
    if (factors)
        EACH_PIECE(r, w->hand, R) multiply_by(w->buffers.in + r * A + skip, factors + skip, A - skip);
}

// Of a convolution without a state behind it, the inputs are x · B.
static void multiply_inputs(const Mixer *m, Worker *w) {
    const int64_t C = m->channels, A = m->in.rows;
    if (m->kind == CONVOLUTION) EACH_PIECE(r, w->hand, w->tokens.count) {
            float *x = w->buffers.in + r * A + m->inner;
            multiply_by(x, x + C, C);
        }
}

// The convolution, and SiLU where a state follows, for channels `from` to `to` - 1. Updates the windows.
static void convolve(const Mixer *m, const Worker *w, const MemoryAt *memory, int64_t from, int64_t to) {
    const int64_t C = m->channels, W = m->taps, A = m->in.rows;
    const float *bias = floats(m->conv_bias), *conv = floats(m->conv);
    int64_t rows;
    for (int64_t first = 0; first < w->tokens.count; first += rows) {
        rows = rows_of_text(&w->tokens, first);
        const StateAt *state = &memory[w->tokens.sequences[first]].state;
        float *window = state->window;
        const float *in = w->buffers.in + first * A + m->inner;
        // Input t of the run; those before it, t < 0, are in the window.
#define INPUT(t) ((t) < 0 ? window + (W - 1 + (t)) * C : in + (t) * A)
        for (int64_t t = 0; t < rows; t++) {
            float *out = w->buffers.conv + (first + t) * C, *note = note_at(m, state, t);
            for (int64_t c = from; c < to; c += LANES) {
                const int64_t left = to - c;
                vf y = bias ? load_up_to(bias + c, left) : (vf){0};
                for (int64_t tap = 0; tap < W; tap++)
                    y = fma_(load_up_to(conv + tap * C + c, left),
                             load_up_to(INPUT(t + tap - W + 1) + c, left), y);
                store_up_to(out + c, m->kind == CONVOLUTION ? y : silu(y), left);
            }
            if (note) {
                memcpy(note + from, in + t * A + from, (to - from) * sizeof(float));
                if (m->kind != CONVOLUTION) memcpy(note + C + from, out + from, (to - from) * sizeof(float));
            }
        }
        for (int64_t tap = 0; tap < W - 1; tap++)  // rises, so nothing is overwritten before it is read
            memcpy(window + tap * C + from, INPUT(rows + tap - W + 1) + from, (to - from) * sizeof(float));
#undef INPUT
    }
}

// The outputs of a convolution times the gate, as outputs of the mixer.
static void gate_outputs(const Mixer *m, Worker *w) {
    const int64_t E = m->inner;
    EACH_PIECE(r, w->hand, w->tokens.count) {
        memcpy(w->buffers.x + r * E, w->buffers.conv + r * E, E * sizeof(float));
        multiply_by(w->buffers.x + r * E, w->buffers.in + r * m->in.rows, E);
    }
}

// Convolution and recurrence. With `gated`, buffer x receives the outputs.
static void advance_memories(const Mixer *m, Worker *w, const MemoryAt *memory, int gated) {
    const Division channels = divided(w->hand, m->channels, LANES);
    int64_t from, to;
    multiply_inputs(m, w);
    EACH_PIECE(piece, w->hand, channels.pieces) {
        part_of(&channels, piece, &from, &to);
        convolve(m, w, memory, from, to);
    }
    if (m->kind == MAMBA2) mamba2_advance(m, w, memory, gated);
    if (m->kind == MAMBA) mamba_advance(m, w, memory, gated);
    if (m->kind == CONVOLUTION && gated) gate_outputs(m, w);
}

void mixer_project(const Mixer *m, Worker *w) { project_in(m, w, 0); }

void mixer_run(const Mixer *m, Worker *w, const MemoryAt *memory) {
    advance_memories(m, w, memory, 1);
    const Rows rows = m->kind == MAMBA2 ? mamba2_outputs(m, w)
                                        : prepare(w->hand, &m->out, w->buffers.x, m->inner, w->tokens.count,
                                                  w->buffers.room);
    leave_part(w, &m->around, &m->out, rows, w->buffers.inner);
}

void mixer_remember(const Mixer *m, Worker *w, const MemoryAt *memory) {
    project_in(m, w, m->inner);
    advance_memories(m, w, memory, 0);
}

static void replay(const Mixer *m, const float *old, float *state, const float *journal, int64_t R,
                   int64_t from, int64_t to) {
    if (m->kind == MAMBA2) mamba2_replay(m, old, state, journal, R, from, to);
    if (m->kind == MAMBA) mamba_replay(m, old, state, journal, R, from, to);
}

void mixer_replay(const Mixer *m, float *h, const float *journal, int64_t R) {
    replay(m, h, h, journal, R, 0, m->kind == MAMBA2 ? m->heads : m->inner);
}

const float *caught_up(const Mixer *m, const StateAt *state, int64_t from, int64_t to) {
    replay(m, state->h, state->h, state->journal, state->due, from, to);
    if (!state->kept) return state->h;
    replay(m, state->h, state->fresh, state->journal + state->start * note_floats(m), state->kept, from, to);
    return state->fresh;
}

void mixer_window(const Mixer *m, float *window, const float *old, const float *journal, int64_t R) {
    const int64_t C = m->channels, W = m->taps;
    for (int64_t tap = 0; tap < W - 1; tap++) {
        const int64_t t =
            R + tap - W + 1;  // a row of the journal; those before its first are in the old window
        memcpy(window + tap * C, t < 0 ? old + (W - 1 + t) * C : journal + t * note_floats(m),
               C * sizeof(float));
    }
}
