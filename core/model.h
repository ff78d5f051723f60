// What a model is made of: the parts behind offramp.h's names, and the model itself.

#pragma once
#include <stddef.h>

#include "rows.h"
#include "threads.h"

// Numbers of an array, and how many.
typedef struct {
    const void *values;
    int64_t count;
} Array;

static inline const float *floats(Array array) { return array.values; }

typedef struct {
    Weight head, embedding;
    Array norm;
    float eps, scale, logit_scale, cap;  // the last three: of embeddings and logits (0: no cap)
} Ends;

// What stands around attention, a mixer or an MLP: a norm before it and one after it (or none), factors of
// the results of its first product (or none), and a factor of what is added to h.
typedef struct {
    Array norm, after, factors;
    float eps, factor;
} Around;

typedef struct {
    Around around;
    Weight qkv, o;
    Array q_norm, k_norm;
    int64_t heads, dim, window, rotary, norm_heads;
    float head_eps, scale, cap;
    int64_t queries;  // heads of queries, found from the shapes
} Attention;

// A mixer begins with a projection to a gate z (E) and to inputs of a convolution (C), and ends with a
// projection.
typedef enum { MAMBA2, MAMBA, CONVOLUTION } MixerKind;

typedef struct {
    MixerKind kind;
    Around around;
    Weight in, out, steps, low;  // steps, Mamba's: step sizes; low: these at a low rank, and B and C
    Array gated_norm, conv, conv_bias, dt_bias, decay, skip, dt_norm, b_norm, c_norm;
    int64_t heads, groups, states, gate_last;
    float gated_eps, dt_low, dt_high, inner_eps;
    int64_t dim, inner, channels, taps;  // P, E, C, and the width of the convolution, found from the shapes
} Mixer;

typedef struct {
    Around around;
    Weight gate_up, down;
    int64_t activation;
} Mlp;

typedef struct {
    Weight in;
    Array mean, spread, out;
    float bias;
} Gate;

typedef struct {
    Weight down;
    Array mean, spread, direct;
    float bias;
    Mixer mixer;  // without a norm before it, and with one output
} MambaGate;

typedef struct {
    Weight in, down;
    Array mean, spread, scale;
    int64_t gated;
    int64_t hidden, reads, skips;  // D, deep states, and whether `in` has a linear map; found from the shapes
} Readout;

typedef struct {
    Weight reduce, expand;
    int64_t candidates;
} Sketch;

typedef struct {
    Weight head;
    Array tokens;
} Shortlist;

typedef struct {
    Array keys, values;
    int64_t shortest, longest;
} Guesses;

// The type of a part's field. A count is a whole number of 0 or more.
typedef enum { WEIGHT, FLOATS, INTEGERS, KEYS, COUNT_OF, REAL } Holds;

typedef struct {
    const char *name;
    Holds holds;
    size_t place;
    int optional;
} Field;

typedef struct {
    const char *name;
    Field fields[24];
} Kind;

struct offramp_part {
    const Kind *kind;
    uint64_t given;  // a bit for each field
    union {
        Ends ends;
        Attention attention;
        Mixer mixer;
        Mlp mlp;
        Gate gate;
        MambaGate mamba_gate;
        Readout readout;
        Sketch sketch;
        Shortlist shortlist;
        Guesses guesses;
    };
};

// A block: attention, a mixer or both side by side, or neither; and then an MLP, or none.
typedef struct {
    int attends, mixes, has_mlp;
    Attention attention;
    Mixer mixer;
    Mlp mlp;
} Block;

// How queries and keys turn: `pairs` (positions, dim) of the first positions, cos and sin side by side, which
// grow with the texts; `dim` is 0 if no block needs them.
typedef struct {
    float *frequencies, *pairs, factor;
    int64_t count, positions, dim;
} Rotary;

enum { MOST_TABLES = 2 };

struct offramp_model {
    Pool pool;
    int64_t hidden, vocabulary, count;
    Ends ends;
    Block *blocks;
    Rotary rotary[MOST_TABLES];
    char *scratch;  // of one call
    int64_t scratch_bytes;
    _Atomic int64_t users;  // its sessions and plans, and 1 until it is freed
};

// In a call: lets the model have rotary pairs of the positions before `end`.
offramp_status reach(offramp_model *model, int64_t end, offramp_error *error);

// Writes a sentence, unless `error` is NULL, and returns the status.
offramp_status fail(offramp_error *error, offramp_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

// In a function with an `error`: a condition on its arguments. If it is false, the function returns with a
// sentence.
#define NEED(truth, ...) \
    if (!(truth)) return fail(error, OFFRAMP_INVALID, __VA_ARGS__)

enum { ROWS_AT_ONCE = 256 };  // rows that pass together; more would need much memory and gain nothing

// Checks that a part is of this kind and complete, and then that its shapes fit a model with hidden size D
// and vocabulary V. `found` is the part with the numbers that follow from its shapes.
offramp_status check_kind(const offramp_part *part, const char *kind, offramp_error *error);
offramp_status check_gate(const offramp_part *part, int64_t D, offramp_error *error);
offramp_status check_mamba_gate(const offramp_part *part, MambaGate *found, int64_t D, offramp_error *error);
offramp_status check_readout(const offramp_part *part, Readout *found, int64_t D, offramp_error *error);
offramp_status check_sketch(const offramp_part *part, int64_t D, int64_t V, offramp_error *error);
offramp_status check_shortlist(const offramp_part *part, int64_t D, int64_t V, offramp_error *error);
offramp_status check_guesses(const offramp_part *part, int64_t V, offramp_error *error);
offramp_status check_weight(const Weight *weight, const char *name, offramp_error *error);

// Memory of one call, given out piece by piece. Without a base, only the bytes are counted. So one function
// both lays out a call's memory and says how much is needed.
typedef struct {
    char *base;
    int64_t used;
} Arena;

static inline void *take(Arena *arena, int64_t bytes) {
    char *place = arena->base ? arena->base + arena->used : NULL;
    arena->used += (bytes + 63) / 64 * 64;
    return place;
}

static inline float *take_floats(Arena *arena, int64_t count) {
    return take(arena, count * (int64_t)sizeof(float));
}

// Lays out a call's memory: `lay(context, arena)` is called twice, without memory and with it. 0 if the
// system gives none.
int lay_out(offramp_model *model, void (*lay)(void *context, Arena *arena), void *context);
