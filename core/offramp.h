// offramp: early exits for causal language models. The C library: blocks of a model, their memory of texts,
// exits, and decoding.
//
// A model is put together from parts: attention, a mixer (Mamba-2, Mamba or a convolution) and an MLP for
// each block, as far as it has them, and the two ends. A part has named weights, arrays and numbers;
// `offramp_part_new` lists them. A session is the blocks' memory of one text. A plan says at which exits
// tokens may leave, and what happens then.
//
//     offramp_part *part = offramp_part_new("mlp", &error);
//     offramp_part_weight(part, "gate_up", &weight, &error);
//     ...
//     offramp_model *model = offramp_model_new(ends, attentions, mixers, mlps, blocks, &error);
//     offramp_plan *plan = offramp_plan_new(model, &rules, &error);
//     offramp_session *session = offramp_session_new(model, OFFRAMP_BFLOAT16, 256, &error);
//     offramp_step(plan, &request, 1, 16, NULL, &error);
//
// Memory. The caller owns the part, model, plan, session or file that a function returns, and frees it with
// the function named `..._free` (NULL is allowed there). The one exception is the model of a file. Numbers of
// weights and arrays are not copied: they must outlive the parts, and the models and plans made of these. A
// freed model stays until the last of its sessions and plans is freed. Parts may be freed once a model is
// made of them; a plan's parts must outlive the plan.
//
// Errors. A function that can fail returns NULL or a status other than OFFRAMP_OK, and writes one sentence to
// its `error`, unless that is NULL. Functions without an `error` say what they return instead. A call with a
// wrong argument changes nothing.
//
// Threads. Models are independent of each other. Calls with one model run one at a time; the others wait. A
// call uses as many threads as `offramp_model_threads` says. The results do not depend on their number. After
// fork(), the child may use the parent's models, too, if none of them was in a call then.
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

// Numbers for bindings of other languages: a constant by its name ("OFFRAMP_INT8", "OFFRAMP_MOST_DRAFTS"),
// the size of a structure ("offramp_weight"), or the offset of one of its fields ("offramp_weight.rows"). -1
// for an unknown name.
OFFRAMP_API int64_t offramp_constant(const char *name);

// Parts of a model --------------------------------------------------------------------------------

// How the numbers of weights and arrays are kept.
typedef enum {
    OFFRAMP_FLOAT32,
    OFFRAMP_BFLOAT16,
    OFFRAMP_FLOAT16,  // weights only, as all types from here to OFFRAMP_STACKED
    OFFRAMP_INT8,     // symmetric, with one scale for each row
    // The types of GGUF files, in panels: layouts.h says where their numbers stand.
    OFFRAMP_Q4_0,
    OFFRAMP_Q4_1,
    OFFRAMP_Q5_0,
    OFFRAMP_Q5_1,
    OFFRAMP_Q8_0,
    OFFRAMP_Q2_K,
    OFFRAMP_Q3_K,
    OFFRAMP_Q4_K,
    OFFRAMP_Q5_K,
    OFFRAMP_Q6_K,
    OFFRAMP_IQ4_NL,
    OFFRAMP_IQ4_XS,
    OFFRAMP_STACKED,  // weights of several types, one above another
    OFFRAMP_INT64,    // arrays only
    OFFRAMP_UINT32,   // arrays only
} offramp_type;

enum {
    OFFRAMP_GROUP = 32,        // columns of a row that are rounded together
    OFFRAMP_PANEL = 16,        // rows of a weight in panels that are kept together
    OFFRAMP_MOST_DRAFTS = 31,  // drafts of one pass
    OFFRAMP_DEPTHS = 3,        // drafts of an exit in a row, of which `accepted` tells
    OFFRAMP_MOST_THREADS = 256,
};

// The matrix of a linear layer: x (R, columns) → x · weightᵀ + bias (R, rows).
typedef struct {
    int64_t type;  // offramp_type
    int64_t
        fine;  // 1: rows of x are rounded to 16 bits before they are multiplied with integers, 0: to 8 bits;
               // 1: rows of x are not rounded to bfloat16 before they are multiplied with it
    int64_t rows, columns;
    const void *values;   // of a stacked weight, as many offramp_weight as `pieces` says
    const float *scales;  // of an int8 weight, else NULL: (rows), or (rows, columns / OFFRAMP_GROUP)
    const float *bias;    // (rows), or NULL; of a stacked weight, each piece has its own
    int64_t pieces;       // of a stacked weight, else 0; `fine` is that of the whole
} offramp_weight;

// The bytes of a weight in panels, of a type from OFFRAMP_Q4_0 to OFFRAMP_IQ4_XS; -1 for a shape that it
// cannot have.
OFFRAMP_API int64_t offramp_packed_bytes(offramp_type type, int64_t rows, int64_t columns);

// Makes panels of the blocks of a GGUF file: rows one after another, as the file has them. The values stay
// what they are.
OFFRAMP_API offramp_status offramp_pack(offramp_type type, const void *blocks, int64_t rows, int64_t columns,
                                        void *panels, offramp_error *error);

// Panels of `count` rows of a weight in panels, and the values (count, columns) of rows of any weight.
OFFRAMP_API offramp_status offramp_pick(const offramp_weight *weight, const int64_t *rows, int64_t count,
                                        void *panels, offramp_error *error);
OFFRAMP_API offramp_status offramp_values(const offramp_weight *weight, const int64_t *rows, int64_t count,
                                          float *values, offramp_error *error);

// The measure of an exit's confidence: its gate; or from the probabilities of its logits, that of the most
// probable token, that minus the second's, or 1 - entropy / log V (exits/policy.py).
typedef enum { OFFRAMP_GATE, OFFRAMP_MAX_PROB, OFFRAMP_MARGIN, OFFRAMP_ENTROPY } offramp_confidence;

// An MLP's function of its first product (W), or of the first half of it (2W), which then multiplies the
// other half: SiLU, GELU by its approximation with tanh, or the square of ReLU.
typedef enum { OFFRAMP_SILU, OFFRAMP_GELU, OFFRAMP_SQUARED_RELU } offramp_activation;

typedef struct offramp_part offramp_part;

// An empty part of one of these kinds. What stands in brackets may be left out.
//
// | kind | weights | arrays |
// |------|---------|--------|
// | ends | head (V, D), embedding (at least V, D) | norm (D) |
// | attention | qkv ((Q + 2H) · P, D), o (D, Q · P) | [norm], [norm_after] (D), [factors], [q_norm], [k_norm] |
// | mamba2 | in (E + C + H, D), out (D, E) | [norm], [norm_after] (D), [factors], [gated_norm] (E), |
// | | | conv (taps, C), [conv_bias] (C), dt_bias, decay, skip (H) |
// | mamba | in (2E, D), out (D, E), low (L + 2N, E), | [norm], [norm_after] (D), [factors], conv (taps, E), |
// | | steps (E, L) | [conv_bias] (E), decay (E, N), skip (E), [dt_norm] (L), |
// | | | [b_norm], [c_norm] (N) |
// | convolution | in (3C, D), out (D, C) | [norm], [norm_after] (D), [factors], conv (taps, C), [conv_bias] (C) |
// | mlp | gate_up (2W, D) or (W, D), down (D, W) | [norm], [norm_after] (D), [factors] |
// | gate | in (2W, D) with out, or (1, D) | mean, spread (D), [out] (W) |
// | mamba_gate | down (W, D), in (E + C + H, W), | mean, spread, direct (D), gated_norm (E), |
// | | out (1, E) | conv (taps, C), [conv_bias] (C), dt_bias, decay, skip (H) |
// | readout | [in] (A, K) or (D + A, K), [down] (D, W) | [mean], [spread], [scale] (D) |
// | sketch | reduce (k, D), expand (V, k) | |
// | shortlist | head (n, D) | tokens (n) int64 |
// | guesses | | keys, values uint32 |
//
// | kind | numbers |
// |------|---------|
// | ends | eps, [scale], [logit_scale], [cap] |
// | attention | heads (H), dim (P), eps, [factor], scale, [cap], [window], [rotary], [norm_heads], [head_eps] |
// | mamba2 | heads (H), groups (G), states, eps, [factor], [gate_last], gated_eps, dt_low, dt_high |
// | mamba | states (N), eps, [factor], [inner_eps] |
// | convolution | eps, [factor] |
// | mlp | activation, eps, [factor] |
// | gate | bias |
// | mamba_gate | heads (H), states, gated_eps, bias |
// | readout | [gated] |
// | sketch | candidates |
// | guesses | shortest, longest |
//
// - ends: embeddings are multiplied by `scale`, and logits by `logit_scale` (without one: 1); with a cap,
//   they become cap · tanh(logit / cap).
// - attention, mixers and mlp: norm and norm_after stand before and after a part; eps is that of both.
//   factors: what the results of a part's first product are multiplied with. factor: what is added to the
//   hidden state is multiplied with it (without one: 1).
// - attention: rows of qkv are Q query heads, H key heads and H value heads of P dims; dims that the rotary
//   embedding turns together stand side by side. window: tokens that a token sees, itself included (0: all).
//   rotary: the number of its rotary table (0: no positions). cap: that of scores, as of logits.
//   norm_heads: q_norm and k_norm are (P) over each head, else over all heads.
// - mamba2 (arXiv 2405.21060, section 7): E = H · P inner dims, C = E + 2 · G · states channels; rows of in:
//   z (E), x, B and C (C), dt (H). decay is A < 0. The outputs, times silu(z), are normed over each group, if
//   there is a gated_norm; with gate_last, they are normed first.
// - mamba (2312.00752, section 3.4): rows of in: z, then x (E); of low: step sizes at a rank of L, B and C
//   (N), which are normed if there are norms; the bias of steps is added to step sizes.
// - convolution: rows of in: a gate, x and B (C); x · B is convolved, and multiplied by the gate.
// - mlp: activation is an offramp_activation.
// - gate, mamba_gate and readout: exits/gates.py and exits/readouts.py say what they compute.
// - mamba_gate: a mixer of one group reads `down` times the standardised state; to its output, `direct` times
//   that state is added.
// - readout: K = D (the standardised state), plus D for each deep state (0 to 2) at a root mean square of 1.
//   A = 2W with `gated`, for silu(first W) · last W, else W. If `in` begins with D more rows, their results
//   are added to the adapter's output; else the state is, scaled to a root mean square of 1.
//   With `scale`, which needs these rows, the sum times it is added to the state. Without `in`, the state
//   stays as it is.
// - guesses: a table of n-grams (exits/ngrams.py).
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

// A model of these ends and of `blocks` blocks: block i has attentions[i] and mixers[i], side by side, and
// then mlps[i]. Some of them may be NULL, and so may tables of nothing but NULL. Fails if shapes do not fit
// each other.
OFFRAMP_API offramp_model *offramp_model_new(const offramp_part *ends, const offramp_part *const *attentions,
                                             const offramp_part *const *mixers,
                                             const offramp_part *const *mlps, int64_t blocks,
                                             offramp_error *error);
OFFRAMP_API void offramp_model_free(offramp_model *model);

// Its hidden size D, and how many blocks it has.
OFFRAMP_API int64_t offramp_model_hidden(const offramp_model *model);
OFFRAMP_API int64_t offramp_model_blocks(const offramp_model *model);

// Checks that another part, such as a gate or a sketch, fits the model.
OFFRAMP_API offramp_status offramp_model_fits(const offramp_model *model, const offramp_part *part,
                                              offramp_error *error);

// How many threads the next calls use: 1 at first, and OFFRAMP_MOST_THREADS at most.
OFFRAMP_API offramp_status offramp_model_threads(offramp_model *model, int64_t threads, offramp_error *error);

// Gives the model a rotary table (RoPE, arXiv 2104.09864): at position t, dims 2 i and 2 i + 1 of a head turn by
// t · frequencies[i], and are multiplied by `factor`. Dims from 2 · count on do not turn. The frequencies are
// copied. Tables have the numbers 1 and 2. Attention with positions needs its table before its first token.
OFFRAMP_API offramp_status offramp_model_rotary(offramp_model *model, int64_t table, const float *frequencies,
                                                int64_t count, double factor, offramp_error *error);

// y (R, rows) = x (R, columns) · weightᵀ + bias.
OFFRAMP_API offramp_status offramp_product(offramp_model *model, const offramp_weight *weight, const float *x,
                                           int64_t rows, float *y, offramp_error *error);

// y (R, V): the logits of hidden states h (R, D), after the final norm. With a sketch (else NULL), only those
// of each row's candidates (more if estimates are equal), and −inf for all others.
OFFRAMP_API offramp_status offramp_logits(offramp_model *model, const offramp_part *sketch, const float *h,
                                          int64_t rows, float *y, offramp_error *error);

// The logits (R) of a gate, or of a mamba_gate, for hidden states h (R, D). For a mamba_gate, the rows are
// one text's, from its first token on.
OFFRAMP_API offramp_status offramp_ask(offramp_model *model, const offramp_part *gate, const float *h,
                                       int64_t rows, float *logits, offramp_error *error);

// A read-out's output out (R, D) for hidden states h (R, D); out may be h. Given are the deep states (R,
// reads, D) that it reads, or NULL.
OFFRAMP_API offramp_status offramp_read_out(offramp_model *model, const offramp_part *readout, const float *h,
                                            const float *deep, int64_t rows, float *out,
                                            offramp_error *error);

// Sessions ----------------------------------------------------------------------------------------

typedef struct offramp_session offramp_session;

// An empty session. Keys and values are kept as `keys`, in OFFRAMP_FLOAT32 or OFFRAMP_BFLOAT16. `tokens` is
// how many are expected at first; memory grows. Attention with a window keeps little more than the window.
OFFRAMP_API offramp_session *offramp_session_new(offramp_model *model, offramp_type keys, int64_t tokens,
                                                 offramp_error *error);
OFFRAMP_API void offramp_session_free(offramp_session *session);

// A copy of a session, which goes on independently. It has no more room than its tokens need. Free the plan
// that stepped the session last only after the last `fork`, which reads the shapes of its Mamba gates.
OFFRAMP_API offramp_session *offramp_session_fork(const offramp_session *session, offramp_error *error);

typedef struct offramp_plan offramp_plan;  // see offramp_plan_new

// Gives the memory room for so many tokens when it next grows.
OFFRAMP_API void offramp_session_reserve(offramp_session *session, int64_t tokens);

// length: the number of tokens that a block remembers (0 for an MLP alone). first: the first position whose
// keys it still has, above 0 if a window has slid (-1 without attention). bytes: those that a fork takes.
// bytes_for: those of a session like this one with room for so many tokens (states of mixers count twice, for
// a watch).
OFFRAMP_API int64_t offramp_session_length(const offramp_session *session, int64_t block);
OFFRAMP_API int64_t offramp_session_first(const offramp_session *session, int64_t block);
OFFRAMP_API int64_t offramp_session_bytes(const offramp_session *session);
OFFRAMP_API int64_t offramp_session_bytes_for(const offramp_session *session, int64_t tokens);

// How many tokens wait at an exit of the plan that the session was last stepped with (see offramp_step).
OFFRAMP_API int64_t offramp_session_waits(const offramp_session *session, int64_t exit);

// Mixers can forget only the tokens that they take in during a watch, which keeps a journal of the tokens.
// `watch` begins one in blocks `start` to `stop` - 1 unless there is one, and `settle` ends all, but not while
// tokens wait at exits.
OFFRAMP_API offramp_status offramp_session_watch(offramp_session *session, int64_t start, int64_t stop,
                                                 offramp_error *error);
OFFRAMP_API void offramp_session_settle(offramp_session *session);

// Forgets every token from position `length` on, in blocks `start` to `stop` - 1. A mixer goes back to the
// beginning of its watch, and repeats the tokens that stay. Fails, and changes nothing, if a token came
// before the watch, or if a window has slid too far.
OFFRAMP_API offramp_status offramp_session_crop(offramp_session *session, int64_t length, int64_t start,
                                                int64_t stop, offramp_error *error);

// Whether all blocks can forget the tokens from position `length` on without a watch: no block has a mixer,
// and no window has slid too far.
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

// The next tokens of one session: `count` of them, from position `first` on. Attention first forgets the
// tokens that it has from there on.
typedef struct {
    offramp_session *session;
    int64_t first, count;
} offramp_rows;

// Runs rows h (R, D), in place, through blocks `start` to `stop` - 1, which remember them. The rows are those
// of `sessions` sessions, one after another.
OFFRAMP_API offramp_status offramp_run(offramp_model *model, int64_t start, int64_t stop,
                                       const offramp_rows *rows, int64_t sessions, float *h,
                                       offramp_error *error);

// What a block remembers: keys and values of attention, the window and state of a mixer, or both.
enum { OFFRAMP_KEYS = 1, OFFRAMP_STATES = 2, OFFRAMP_BOTH = 3 };

// As offramp_run, but the blocks only remember the rows, as if h were the input of each block. h does not
// change. `what`: which memories take them.
OFFRAMP_API offramp_status offramp_remember(offramp_model *model, int64_t start, int64_t stop,
                                            const offramp_rows *rows, int64_t sessions, int64_t what,
                                            const float *h, offramp_error *error);

// Exits and rules ---------------------------------------------------------------------------------

// Fills: how skipped blocks remember a token that left early. `decode/fills.py` describes each. With
// OFFRAMP_VERIFY a token that an exit chose is a draft, and full depth decides.
typedef enum {
    OFFRAMP_PROJECT,
    OFFRAMP_COPY,
    OFFRAMP_FREEZE,
    OFFRAMP_DEFER,
    OFFRAMP_VERIFY,
} offramp_fill;

// An exit after `after` blocks, whose read-out is followed by the model's last `tail` blocks. A token leaves
// if its confidence is above `threshold`. In a plan with gates and second keys, it also leaves if the
// confidence is above `perhaps`, and the read-out's own is above `key` (1: there is no second key). With a
// threshold of 0 and no decay, the gate is not asked. `asking`: the bytes that a draft of this exit reads, as
// a share of those of full depth.
typedef struct {
    int64_t after, tail;
    const offramp_part *gate, *readout;  // gate: NULL without OFFRAMP_GATE
    double threshold, perhaps, key;
    double asking;
    int64_t gate_flops, readout_flops;
} offramp_exit;

// FLOPs of a block for one token: `flops`, and `seen_flops` for each position that it sees; and of its share
// in the fill `project`: `key_flops` in attention, `state_flops` in a mixer.
typedef struct {
    int64_t flops, seen_flops, key_flops, state_flops;
} offramp_block_costs;

// The rules of a plan. `confidence` and `key` (for second keys) name the measures. `decay`: thresholds are
// stricter at the beginning of an answer, for about so many tokens (0: they are not). Read-outs also read the
// state of the token before after `middle` blocks (0: they do not). `pending`: the most tokens that wait, or
// the most drafts. `sketch` and `exit_sketch` replace the head at the top and at exits; at exits, a
// `shortlist` may do so; each may be NULL. `guesses` (or NULL) is a table of n-grams for drafts. If the last
// `alike` tokens or more stand earlier in the text, the token that followed them is a draft (0: no look-up).
// `row_costs`: the costs of 0, 1, … more rows of a pass, in steps of full depth, 0 or more. `accepted`: the
// shares of an exit's first, second and later drafts that were right in training (0: unknown).
typedef struct {
    const offramp_exit *exits;
    int64_t count;
    offramp_fill fill;
    offramp_confidence confidence, key;
    int64_t middle, pending, alike;
    double decay;
    const offramp_part *sketch, *exit_sketch, *shortlist, *guesses;
    const offramp_block_costs *costs;  // of each block
    int64_t head_flops, exit_head_flops;
    double row_costs[OFFRAMP_MOST_DRAFTS + 1], accepted[OFFRAMP_DEPTHS];
} offramp_rules;

// A plan with these rules, which are copied. Fails if they do not fit the model.
OFFRAMP_API offramp_plan *offramp_plan_new(offramp_model *model, const offramp_rules *rules,
                                           offramp_error *error);
OFFRAMP_API void offramp_plan_free(offramp_plan *plan);

// Choosing a token --------------------------------------------------------------------------------

// How a token is chosen. At a temperature of 0 the most probable one (the first of equals), else one is
// drawn: of the `top_k` most probable tokens (0: of all), of these the most probable ones that together have
// a probability of `top_p` (1: all), and of these those with at least `min_p` (0: all) times the highest
// probability. Tokens with equal logits stay or go together. A draw is a function of the seed, of how many
// ids were before, and of the logits. `penalty` is that of repetition, of all ids of the text (1: none).
typedef struct {
    double temperature, top_p, min_p, penalty;
    int64_t top_k;
    uint64_t seed;
} offramp_sampling;

// Chooses a token by logits y (V), which it changes, after a text of `known` ids. A token whose logit is −inf
// is not chosen. `allowed` has a bit for each token, in (V + 31) / 32 words from the lowest bit of the first
// on; NULL allows all. `id` is -1 if the logits are not finite, and -2 if all allowed tokens have −inf.
OFFRAMP_API offramp_status offramp_choose(offramp_model *model, const offramp_sampling *how,
                                          const int64_t *ids, int64_t known, const uint32_t *allowed,
                                          float *y, int64_t *id, offramp_error *error);

// Decoding ----------------------------------------------------------------------------------------

// What a decided token came from: full depth, an exit, the text (prompt look-up), or the table of n-grams.
enum { OFFRAMP_FROM_FULL, OFFRAMP_FROM_EXIT, OFFRAMP_FROM_TEXT, OFFRAMP_FROM_TABLE };

// A decided token: the number of blocks before the exit that chose or drafted it (N: full depth chose it, 0:
// it came from the text or the table); the confidence of the exit, else NaN; FLOPs, and blocks run for one
// token each; the request's passes to the top in this call so far, and the number of its drafts that they
// rejected; what the token came from (OFFRAMP_FROM_…).
typedef struct {
    int64_t id, block;
    double confidence;
    int64_t flops, blocks, passes, rejected, source;
} offramp_decision;

// Why a request failed: logits were NaN or infinite; or `allowed` allows no token.
enum { OFFRAMP_NOT_FINITE = 1, OFFRAMP_NOTHING_FITS };

// A request: a session, and its text. Given: `known` ids, `ids`. The first `prompt` of them are the prompt,
// and the first `run` have been run. With `reads`, so many more are read at full depth, and nothing is
// decided. Otherwise `run` must be `known` - 1, and up to `most` tokens are decided, or until one of the
// `ends`. `allowed` (or NULL) has a bit for each token that may come next; then one token is decided, and
// nothing is drafted. `whole`: full depth reads out all tokens, even if the plan has a sketch. `deep` (D, or
// 2, D) are the states of the token before that read-outs read: at the top, and perhaps after `middle`
// blocks. They begin as zeros, and the caller keeps them between calls.
//
// Found: `decided` tokens, which are put after the known ids, and their `decisions`; `run`; `asked`, how
// often exits read out; `failed`: if it is not 0, the session is half-written, and refused from then on. A call
// decides at most `rounds` · (OFFRAMP_MOST_DRAFTS + 1) tokens, and has at most 131,072 rows: `reads`, and for
// each other request one, its drafts, and room for those that may wait.
typedef struct {
    offramp_session *session;
    int64_t *ids;  // room for known + most
    int64_t known, prompt, reads, most;
    const int64_t *ends;
    int64_t ends_count;
    offramp_sampling how;
    const uint32_t *allowed;
    int64_t whole;
    float *deep;
    offramp_decision *decisions;  // room for most
    int64_t run, decided, asked, failed;
} offramp_request;

// Steps the requests, which must have different sessions: each reads, or decides at least one token, in up to
// `rounds` passes to the top. They share the passes over the weights. The tokens of one do not depend on the
// others. To cancel a request, do not step it again. `seconds` (4, or NULL): spent on blocks, exits, the top, and between.
OFFRAMP_API offramp_status offramp_step(offramp_plan *plan, offramp_request *const *requests, int64_t count,
                                        int64_t rounds, double *seconds, offramp_error *error);

// Files -------------------------------------------------------------------------------------------

// An open GGUF file (version 2 or 3): a model's weights with its tokenizer, or exits as offramp's export writes
// them. Of models, the architectures llama, qwen2 and qwen3 are read, in the file's own precision.
typedef struct offramp_file offramp_file;

// Takes a sentence about a file that a user may want to know.
typedef void (*offramp_log)(void *context, const char *sentence);

// Opens a file, and makes what it describes. It stays mapped. Free it only after its sessions and plans.
// Several threads may use it. `log` (or NULL) is called before the function returns, with what the file does
// not say.
OFFRAMP_API offramp_file *offramp_file_new(const char *path, offramp_log log, void *context,
                                           offramp_error *error);
OFFRAMP_API void offramp_file_free(offramp_file *file);

// The model, which is freed with the file (NULL for exits); how many tokens a text may have; and the tokens
// that end a text, which belong to the file.
OFFRAMP_API offramp_model *offramp_file_model(const offramp_file *file);
OFFRAMP_API int64_t offramp_file_context(const offramp_file *file);
OFFRAMP_API const int64_t *offramp_file_ends(const offramp_file *file, int64_t *count);

// An empty session of the model, as `offramp_session_new` makes it, with keys and values in bfloat16 unless all
// weights are float32.
OFFRAMP_API offramp_session *offramp_file_session(const offramp_file *file, int64_t tokens,
                                                  offramp_error *error);

// What a file says under a key, as GGUF has it: the text, which belongs to the file and does not end with a
// zero, or NULL if there is none; number i of an array (i = 0 for a single number), or `otherwise` without
// one; and how many numbers there are.
OFFRAMP_API const char *offramp_file_text(const offramp_file *file, const char *key, int64_t *length);
OFFRAMP_API double offramp_file_number(const offramp_file *file, const char *key, int64_t i,
                                       double otherwise);
OFFRAMP_API int64_t offramp_file_count(const offramp_file *file, const char *key);

// A plan for a mode: "full", or one of those that the file of exits has ("exact", "early", "early:3").
// `exits` may be NULL for "full". Both files must outlive the plan. Fails if the exits learned from other
// weights.
OFFRAMP_API offramp_plan *offramp_file_plan(const offramp_file *model, const offramp_file *exits,
                                            const char *mode, offramp_error *error);

// The number of a mode in a file of exits, by which its keys are named ("offramp.mode.0.policy"); -1 if it has
// no such mode.
OFFRAMP_API int64_t offramp_file_mode(const offramp_file *exits, const char *name);

// The ids of a text of so many bytes, as Hugging Face's tokenizers give them; what is not UTF-8 is read as
// Python's errors="replace" does. `whole`: the text begins with the token that begins every text, if the model
// has one. Returns how many ids there are, of which `room` are written; -1 if there is no memory.
OFFRAMP_API int64_t offramp_tokenise(const offramp_file *file, const char *text, int64_t length, int whole,
                                     int64_t *ids, int64_t room);

// The bytes of a token, which belong to the file and need not be whole characters, and whether it is special:
// it stands for no text.
OFFRAMP_API const char *offramp_token(const offramp_file *file, int64_t id, int64_t *length, int *special);

// The length of the character that a text of so many bytes begins with. Bytes that are not UTF-8: minus the
// number of them that Python's errors="replace" reads as one.
OFFRAMP_API int64_t offramp_character(const char *text, int64_t length);

enum { OFFRAMP_SYSTEM, OFFRAMP_USER, OFFRAMP_ASSISTANT };  // roles

typedef struct {
    int64_t role;
    const char *text;
} offramp_message;

// The ids of a talk by the model's chat template, up to where the answer begins. Perhaps the first message is
// the system's; then the user and the assistant take turns, and the last message is the user's. Special tokens
// count as such only where the template puts them: in a message they are text. Returns how many ids there are,
// of which `room` are written; -1 for other messages, for a file without a template that offramp's export could
// keep, and if there is no memory.
OFFRAMP_API int64_t offramp_chat(const offramp_file *file, const offramp_message *messages, int64_t count,
                                 int64_t *ids, int64_t room);

#ifdef __cplusplus
}
#endif
#endif
