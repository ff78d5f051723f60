// offramp: early exits for causal language models. The C library: blocks of a model, what they remember of
// texts, and decoding.
//
// A model is put together from parts: a mixer (attention or Mamba-2) and perhaps an MLP for each block, and
// the two ends. A part has named weights, arrays and numbers; `offramp_part_new` lists them. A session is
// what the blocks remember of one text.
//
//     offramp_part *part = offramp_part_new("mlp", &error);
//     offramp_part_weight(part, "gate_up", &weight, &error);
//     ...
//     offramp_model *model = offramp_model_new(ends, mixers, mlps, blocks, &error);
//     offramp_session *session = offramp_session_new(model, OFFRAMP_BFLOAT16, 256, &error);
//     offramp_decode(model, session, &steps, &error);
//
// Memory. What a function named `..._new` or `..._fork` returns belongs to the caller, who frees it with the
// function named `..._free` (NULL is allowed there). Numbers of weights and arrays are not copied: they must
// outlive the parts, and the models that are made of these. A model that is freed goes with the last of its
// sessions. Parts may be freed once a model is made of them.
//
// Errors. A function that can fail returns NULL or a status other than OFFRAMP_OK, and writes one sentence to
// its `error`, unless that is NULL. A call with a wrong argument changes nothing.
//
// Threads. Models are independent of each other. Of calls with one model, one runs at a time, and others
// wait. A call uses as many threads as `offramp_model_threads` says. What is computed does not depend on their
// number. After fork(), the child may use the parent's models, too, if none of them was in a call then.
//
// Shapes: D hidden size, V tokens of the vocabulary, N blocks, R rows (tokens of one call), W width of an MLP
// or an adapter. All arrays are row-major.

#ifndef OFFRAMP_H
#define OFFRAMP_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define OFFRAMP_API __attribute__((visibility("default")))
#else
#define OFFRAMP_API
#endif

typedef enum {
    OFFRAMP_OK,
    OFFRAMP_INVALID,    // an argument is wrong: a shape, a name, a range
    OFFRAMP_NO_MEMORY,  // the system gives no more memory, or no more threads
} offramp_status;

typedef struct {
    char message[248];  // one sentence, which ends with a zero
} offramp_error;

// About the library -------------------------------------------------------------------------------

// The version of this interface. A program compares it with the one that it was compiled with.
#define OFFRAMP_VERSION 1
OFFRAMP_API int64_t offramp_version(void);

// The set of instructions that the library was compiled for, such as "x86-64-v4-vnni"; the first 16
// hexadecimal digits of the SHA-256 of its sources; and the instructions that multiply, such as "AVX-512 and
// VNNI". Constant strings.
OFFRAMP_API const char *offramp_variant(void);
OFFRAMP_API const char *offramp_sources(void);
OFFRAMP_API const char *offramp_kernels(void);

// What a binding of another language has to know: a constant by its name ("OFFRAMP_INT8",
// "OFFRAMP_MOST_DRAFTS"), the size of a structure ("offramp_weight"), or the offset of one of its fields
// ("offramp_weight.rows"). -1 for an unknown name.
OFFRAMP_API int64_t offramp_constant(const char *name);

// Parts of a model --------------------------------------------------------------------------------

// How the numbers of weights and arrays are kept.
typedef enum {
    OFFRAMP_FLOAT32,
    OFFRAMP_BFLOAT16,
    OFFRAMP_INT8,    // weights: symmetric, with one scale for each row
    OFFRAMP_INT4,    // weights: q · scale + low, for OFFRAMP_GROUP columns each, in panels: see products.h
    OFFRAMP_INT64,   // arrays only
    OFFRAMP_UINT32,  // arrays only
} offramp_type;

enum {
    OFFRAMP_GROUP = 32,       // columns of an int4 weight that have one scale
    OFFRAMP_PANEL = 16,       // rows of an int4 weight that are kept together
    OFFRAMP_MOST_DRAFTS = 7,  // drafts of one pass
    OFFRAMP_MOST_THREADS = 256,
};

// The matrix of a linear layer: x (R, columns) → x · weightᵀ + bias (R, rows).
typedef struct {
    int64_t type;  // offramp_type
    int64_t fine;  // 1: rows are rounded to 16 bits before they are multiplied with integers, 0: to 8 bits
    int64_t rows, columns;
    const void *values;
    const float *scales;  // (rows) of an int8 weight, else NULL
    const float *bias;    // (rows), or NULL
} offramp_weight;

typedef struct offramp_part offramp_part;

// An empty part of one of these kinds. What stands in brackets may be left out.
//
// | kind | weights | arrays |
// |------|---------|--------|
// | ends | head (V, D) | norm (D), embedding (at least V, D) in float32 or bfloat16 |
// | attention | qkv ((Q + 2H) · P, D), o (D, Q · P) | norm (D), [q_norm], [k_norm] |
// | mamba2 | in (E + C + H, D), out (D, E) | norm (D), gated_norm (E), conv (taps, C), [conv_bias] (C), |
// | | | dt_bias, decay, skip (H) |
// | mlp | gate_up (2W, D), down (D, W) | norm (D) |
// | gate | in (2W, D) with out, or (1, D) | mean, spread (D), [out] (W) |
// | sketch | reduce (k, D), expand (V, k) | |
// | drafter | in (D + 2W, 2D or 3D), down (D, W), | mean, spread (D), [scale] (D), [tokens] (n) int64, |
// | | head (n, D) | [keys], [values] uint32, costs (OFFRAMP_MOST_DRAFTS + 1) |
//
// | kind | numbers |
// |------|---------|
// | ends | eps |
// | attention | heads (H), dim (P), norm_first, eps, scale, [window], [rotary], [norm_heads], [head_eps] |
// | mamba2 | heads (H), groups (G), states, eps, gated_eps, dt_low, dt_high |
// | mlp | norm_first, eps |
// | gate | bias |
// | sketch | candidates |
// | drafter | after, tail, [middle], most, alike, [shortest], [longest], asking, floor |
//
// attention: rows of qkv are Q query heads, H key heads and H value heads of P dims; dims that the rotary
// embedding turns together stand side by side. window: tokens that a token sees, itself included (0: all).
// rotary: 1 with positions. norm_first: 1 if norms stand before attention and MLP, 0 if after them.
// norm_heads: q_norm and k_norm are (P) over each head, else over all heads. mamba2 (arXiv 2405.21060,
// section 7): E = H · P inner dims, C = E + 2 · G · states channels; rows of in: z (E), x, B and C (C), dt
// (H). decay is A < 0. gate and drafter: exits/gates.py and exits/readouts.py say what they compute; `keys`
// and `values` are a table of n-grams (exits/ngrams.py), `costs` what so many more rows of a pass cost, in
// steps of full depth.
OFFRAMP_API offramp_part *offramp_part_new(const char *kind, offramp_error *error);
OFFRAMP_API void offramp_part_free(offramp_part *part);
OFFRAMP_API offramp_status offramp_part_weight(offramp_part *part, const char *name,
                                               const offramp_weight *weight, offramp_error *error);
OFFRAMP_API offramp_status offramp_part_array(offramp_part *part, const char *name, offramp_type type,
                                              const void *values, int64_t count, offramp_error *error);
OFFRAMP_API offramp_status offramp_part_number(offramp_part *part, const char *name, double value,
                                               offramp_error *error);

// Models ------------------------------------------------------------------------------------------

typedef struct offramp_model offramp_model;

// A model of these ends and of `blocks` blocks: block i has mixers[i], attention or mamba2, and then mlps[i],
// which may be NULL. Fails if shapes do not fit each other.
OFFRAMP_API offramp_model *offramp_model_new(const offramp_part *ends, const offramp_part *const *mixers,
                                             const offramp_part *const *mlps, int64_t blocks,
                                             offramp_error *error);
OFFRAMP_API void offramp_model_free(offramp_model *model);

// Whether a gate, a sketch or a drafter fits the model. Calls look at shapes themselves; this looks at the
// tables of a drafter, too.
OFFRAMP_API offramp_status offramp_model_fits(const offramp_model *model, const offramp_part *part,
                                              offramp_error *error);

// How many threads the next calls use: 1 at first, and OFFRAMP_MOST_THREADS at most.
OFFRAMP_API offramp_status offramp_model_threads(offramp_model *model, int64_t threads, offramp_error *error);

// Gives the model the rotary pairs (positions, P), cos and sin side by side, which are not copied. Attention
// with positions needs them before its first token. After a call with another table, the old one may go.
OFFRAMP_API offramp_status offramp_model_rotary(offramp_model *model, const float *pairs, int64_t positions,
                                                int64_t dim, offramp_error *error);

// y (R, rows) = x (R, columns) · weightᵀ + bias.
OFFRAMP_API offramp_status offramp_product(offramp_model *model, const offramp_weight *weight, const float *x,
                                           int64_t rows, float *y, offramp_error *error);

// y (R, V): the logits of hidden states h (R, D), after the final norm. With a sketch (else NULL), only those
// of each row's candidates (more if estimates are equal), and −inf for all others.
OFFRAMP_API offramp_status offramp_logits(offramp_model *model, const offramp_part *sketch, const float *h,
                                          int64_t rows, float *y, offramp_error *error);

// The logit of a gate for a hidden state h (D).
OFFRAMP_API offramp_status offramp_ask(offramp_model *model, const offramp_part *gate, const float *h,
                                       float *logit, offramp_error *error);

// Sessions ----------------------------------------------------------------------------------------

typedef struct offramp_session offramp_session;

// An empty session. Keys and values are kept as `keys`, in OFFRAMP_FLOAT32 or OFFRAMP_BFLOAT16. `tokens` is
// how many are expected at first; memory grows. Attention with a window keeps little more than the window.
OFFRAMP_API offramp_session *offramp_session_new(offramp_model *model, offramp_type keys, int64_t tokens,
                                                 offramp_error *error);
OFFRAMP_API void offramp_session_free(offramp_session *session);

// A session that goes on independently, with no more room than its tokens need.
OFFRAMP_API offramp_session *offramp_session_fork(const offramp_session *session, offramp_error *error);

// When memory grows next, let it have room for so many tokens.
OFFRAMP_API void offramp_session_reserve(offramp_session *session, int64_t tokens);

// The number of tokens that a block has taken in; the first position whose keys it still has, which is not 0
// if a window has slid (-1 for a mixer); the bytes that a fork takes; those of a session like this one with
// room for so many tokens (states of mixers count twice, for a watch).
OFFRAMP_API int64_t offramp_session_length(const offramp_session *session, int64_t block);
OFFRAMP_API int64_t offramp_session_first(const offramp_session *session, int64_t block);
OFFRAMP_API int64_t offramp_session_bytes(const offramp_session *session);
OFFRAMP_API int64_t offramp_session_bytes_for(const offramp_session *session, int64_t tokens);

// Mixers can forget only the tokens that they take in during a watch: it keeps what each token did. `watch`
// begins one in blocks `start` to `stop` - 1 unless there is one, and `settle` ends all.
OFFRAMP_API offramp_status offramp_session_watch(offramp_session *session, int64_t start, int64_t stop,
                                                 offramp_error *error);
OFFRAMP_API void offramp_session_settle(offramp_session *session);

// Forgets every token from position `length` on, in blocks `start` to `stop` - 1. A mixer goes back to where
// its watch began, and repeats those that stay. Fails, and changes nothing, where a token came before the
// watch, or a window has slid too far.
OFFRAMP_API offramp_status offramp_session_crop(offramp_session *session, int64_t length, int64_t start,
                                                int64_t stop, offramp_error *error);

// Whether all blocks can forget these tokens without a watch: then no block has a Mamba-2 mixer.
OFFRAMP_API int offramp_session_can_forget(const offramp_session *session, int64_t length);

// Appends to block `to` the keys and values of the newest `tokens` of another block `from`. Both have
// attention of one shape.
OFFRAMP_API offramp_status offramp_session_copy(offramp_session *session, int64_t from, int64_t to,
                                                int64_t tokens, offramp_error *error);

// The keys and values of a block's tokens from position `from` on, as float32 (length - from, 2H, P).
OFFRAMP_API offramp_status offramp_session_keys(const offramp_session *session, int64_t block, int64_t from,
                                                float *keys, offramp_error *error);

// A copy of a mixer's window (taps - 1, C) and state (H, P, states).
OFFRAMP_API offramp_status offramp_session_state(const offramp_session *session, int64_t block, float *window,
                                                 float *h, offramp_error *error);

// Running blocks ----------------------------------------------------------------------------------

// The next tokens of one session: `count` of them, from position `first` on. Attention forgets what it has
// from there on.
typedef struct {
    offramp_session *session;
    int64_t first, count;
} offramp_rows;

// Gates on a token's way, in order: `after[i]` blocks run before gate i, whose logit stops the token if it is
// above `thresholds[i]` (−inf: always, and the gate is not asked). Written for those on the way: hidden
// states `seen` (count, D) and `logits` (count), or for offramp_decode (most, count).
typedef struct {
    int64_t count;
    const offramp_part *const *gates;
    const int64_t *after;
    const float *thresholds;
    float *seen, *logits;
} offramp_gates;

// Runs rows h (R, D), in place, through blocks `start` to `stop` - 1, which remember them. The rows are those
// of `sessions` sessions, one after another. A single row may have gates (else NULL). `run` (or NULL) is the
// number of blocks that ran.
OFFRAMP_API offramp_status offramp_run(offramp_model *model, int64_t start, int64_t stop,
                                       const offramp_rows *rows, int64_t sessions, float *h,
                                       const offramp_gates *gates, int64_t *run, offramp_error *error);

// As offramp_run, but the blocks only remember the rows, as if h were the input of each of them. h stays.
OFFRAMP_API offramp_status offramp_remember(offramp_model *model, int64_t start, int64_t stop,
                                            const offramp_rows *rows, int64_t sessions, const float *h,
                                            offramp_error *error);

// Decoding ----------------------------------------------------------------------------------------

// A pass to the top: how many drafts were made, how many of them stood, and how many the exit made.
typedef struct {
    int64_t drafts, stood, asked;
} offramp_pass;

// Greedy decoding of one session. Given: `ids`, `known` of them, of which the last is the token to begin with
// and is not in the session yet. Decoding ends when `enough` tokens are decided (`most` at most, with drafts
// that stood), after one of the `ends`, and where a gate stops a token. `penalty` is that of repetition, of
// all ids (1: none). `sketch`, `drafter` and `gates` may be NULL. A drafter reads `deep`, of the token before
// the first: its state at the top, and after block `middle`.
//
// Found: the decided ids after the known ones, -1 where logits were not finite; `confidences` of those that
// an exit drafted, NaN of others; the passes; `run`, the number of blocks run of a last token that a gate
// stopped, else 0; `h` of the newest token, and `deep` of the newest that reached the top; seconds spent on
// embeddings, blocks, heads, choices, and drafts.
typedef struct {
    int64_t *ids;  // (known + most)
    int64_t known, enough, most;
    const int64_t *ends;
    int64_t ends_count;
    double penalty;
    const offramp_part *sketch, *drafter;
    const offramp_gates *gates;
    int64_t decided, run, passes_count;
    offramp_pass *passes;  // (most)
    float *confidences;    // (most)
    float *h, *deep;       // (D), (2, D); deep may be NULL without a drafter
    double seconds[5];
} offramp_steps;

OFFRAMP_API offramp_status offramp_decode(offramp_model *model, offramp_session *session,
                                          offramp_steps *steps, offramp_error *error);

#ifdef __cplusplus
}
#endif
#endif
