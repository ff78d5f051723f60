// Decoder blocks for a CPU, of the llama kind and of the Mamba-2 kind: a range of blocks, all of their rows, in one call.
//
// lean.py and lean_mamba.py say what is computed and in which layout; this file does the same with one pass over the
// weights. Activations are float32 whatever the weights are kept in. A row's sums are added in the same order however many rows there are, so
// a chunk gives bit for bit what its tokens give one by one.
//
// D hidden size, Q query heads, H key/value heads, P head dim, F width of the MLP.

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef int16_t i16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef int8_t s8x16 __attribute__((vector_size(16)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));

enum { FLOAT32, BFLOAT16, INT8, INT4 };

typedef struct {
    int64_t kind, rows, columns;
    const void *w;       // INT4: byte j of a group of 32 holds weight j in its low half, weight j + 16 in its high half
    const float *scale;  // INT8: one a row; INT4: one a group
    const float *low;    // INT4: one a group
    const float *bias;   // or NULL
} Weight;

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
    int64_t hidden, queries, heads, dim, width;
} Shape;

static inline v8 load(const float *p) {
    v8 v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline i16x16 load16(const int16_t *p) {
    i16x16 v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline float sum(v8 v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

// Eight parts of a dot product: their sum is what is asked for.
static inline v8 dots(const float *a, const float *b, int64_t n) {
    v8 acc = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) acc += load(a + i) * load(b + i);
    for (; i < n; i++) acc[0] += a[i] * b[i];
    return acc;
}

static inline float dot(const float *a, const float *b, int64_t n) { return sum(dots(a, b, n)); }

static inline float exp_(float x) {  // Cephes: within 2 units in the last place
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = floorf(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

// Compilers do not find these two by themselves.
#ifdef __AVX2__
#include <immintrin.h>
static inline i16x16 widen(s8x16 v) { return (i16x16)_mm256_cvtepi8_epi16((__m128i)v); }
static inline i32x8 add_pairs(i16x16 a, i16x16 b) { return (i32x8)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#else
static inline i16x16 widen(s8x16 v) { return __builtin_convertvector(v, i16x16); }
static inline i32x8 add_pairs(i16x16 a, i16x16 b) {
    i32x8 sums;
    for (int i = 0; i < 8; i++) sums[i] = (int32_t)a[2 * i] * b[2 * i] + (int32_t)a[2 * i + 1] * b[2 * i + 1];
    return sums;
}
#endif

// Rows that weights are multiplied with, `stride` apart. For integer weights they are 16-bit integers as well, with a
// scale for every 32: a hundred thousandth of the largest is lost, and twice as many products fit in an instruction.
typedef struct {
    const float *x;
    int64_t stride, groups;
    const int16_t *q;
    const float *scale, *sums;
} Rows;

static Rows prepare(const Weight *m, const float *x, int64_t stride, int64_t R, float *local) {
    const int64_t K = m->columns, G = K / 32;
    float *scale = local, *sums = local + R * G;
    int16_t *q = (int16_t *)(local + 2 * R * G);
    if (m->kind == INT8 || m->kind == INT4)
        for (int64_t i = 0; i < R * G; i++) {
            const float *p = x + i / G * stride + i % G * 32;
            float most = 1e-30f;
            for (int k = 0; k < 32; k++) most = fabsf(p[k]) > most ? fabsf(p[k]) : most;
            sums[i] = sum((load(p) + load(p + 8)) + (load(p + 16) + load(p + 24)));
            scale[i] = most / 32767 + 0 * sums[i];  // NaN stays NaN, which integers cannot be
            const float factor = 32767 / most;
            for (int k = 0; k < 32; k++) q[32 * i + k] = (int16_t)(p[k] * factor + (p[k] < 0 ? -0.5f : 0.5f));
        }
    return (Rows){x, stride, G, q, scale, sums};
}

// Eight weights of row `w` from column `k` on, as float32.
static inline v8 weights(int64_t kind, const char *w, int64_t k) {
    if (kind == FLOAT32) return load((const float *)w + k);
    u16x8 v;
    memcpy(&v, w + 2 * k, sizeof v);
    return (v8)(__builtin_convertvector(v, i32x8) << 16);
}

// Row n of a weight times T rows of x from row r on.
static inline __attribute__((always_inline)) void row_times(
    const Weight *m, int64_t n, const Rows *x, int64_t r, float *out, int64_t kind, const int T) {
    const int64_t K = m->columns, G = x->groups;
    v8 acc[4] = {{0}};
    if (kind == INT8 || kind == INT4) {
        const char *w = (const char *)m->w + n * (kind == INT8 ? K : K / 2);
        for (int64_t g = 0; g < G; g++) {
            s8x16 a, b;
            memcpy(&a, w + (kind == INT8 ? 32 : 16) * g, sizeof a);
            if (kind == INT8) {
                memcpy(&b, w + 32 * g + 16, sizeof b);
            } else {
                b = (s8x16)((u8x16)a >> 4);
                a &= 15;
            }
            const i16x16 low = widen(a), high = widen(b);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const int16_t *q = x->q + ((r + t) * G + g) * 32;
                const v8 d = __builtin_convertvector(add_pairs(low, load16(q)) + add_pairs(high, load16(q + 16)), v8);
                acc[t] += d * (x->scale[(r + t) * G + g] * (kind == INT4 ? m->scale[n * G + g] : 1.0f));
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; t++)
            out[t] = kind == INT8 ? sum(acc[t]) * m->scale[n]
                                  : sum(acc[t] + dots(m->low + n * G, x->sums + (r + t) * G, G));
    } else {
        const char *w = (const char *)m->w + n * K * (kind == FLOAT32 ? 4 : 2);
        const float *p = x->x + r * x->stride;
        v8 more[4] = {{0}};  // two sums, so that one need not wait for the other
        int64_t k = 0;
        for (; k + 16 <= K; k += 16) {
            const v8 a = weights(kind, w, k), b = weights(kind, w, k + 8);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                acc[t] += a * load(p + t * x->stride + k);
                more[t] += b * load(p + t * x->stride + k + 8);
            }
        }
        if (k < K) {
            const v8 a = weights(kind, w, k);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) acc[t] += a * load(p + t * x->stride + k);
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) out[t] = sum(acc[t] + more[t]);
    }
    if (m->bias)
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) out[t] += m->bias[n];
}

// One function for each kind and each T, so that both are constants in its loops.
typedef void Times(const Weight *m, int64_t n, const Rows *x, int64_t r, float *out);
#define TIMES(kind, T)                                                                                               \
    static __attribute__((noinline)) void kind##_##T(const Weight *m, int64_t n, const Rows *x, int64_t r, float *out) { \
        row_times(m, n, x, r, out, kind, T);                                                                         \
    }
#define KIND(kind) TIMES(kind, 1) TIMES(kind, 2) TIMES(kind, 3) TIMES(kind, 4)
KIND(FLOAT32) KIND(BFLOAT16) KIND(INT8) KIND(INT4)
#define ROW(kind) {0, kind##_1, kind##_2, kind##_3, kind##_4}
static Times *const times[4][5] = {ROW(FLOAT32), ROW(BFLOAT16), ROW(INT8), ROW(INT4)};

// Rows `from` to `to` - 1 of the weight times R rows of x: they go to y, whose rows stand `stride` apart, or are added to it.
static void product(const Weight *m, Rows x, int64_t R, float *y, int64_t stride, int add, int64_t from, int64_t to) {
    for (int64_t some = 0; some < R; some += 64) {  // as many rows of x as a cache holds
        const int64_t last = R < some + 64 ? R : some + 64;
        for (int64_t n = from; n < to; n++)
            for (int64_t r = some; r < last;) {
                float out[4];
                const int64_t T = last - r >= 4 ? 4 : last - r;
                times[m->kind][T](m, n, &x, r, out);
                for (int64_t t = 0; t < T; t++, r++) y[r * stride + n] = add ? y[r * stride + n] + out[t] : out[t];
            }
    }
}

static void norm(const float *x, const float *weight, float eps, float *out, int64_t n) {
    float factor = 1.0f / sqrtf(dot(x, x, n) / n + eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
}

static void share(int64_t n, int t, int threads, int64_t *from, int64_t *to) {
    *from = n * t / threads;
    *to = n * (t + 1) / threads;
}

// Queries, keys and values of one row (heads · P): normed, turned, keys and values stored at `place` (2H, P).
static void remember(const Block *b, const Shape *s, float *row, int64_t queries, const float *turn, float *place) {
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
    memcpy(place, row + queries * P, 2 * s->heads * P * sizeof(float));
}

// The queries of row r that share key/value head `head`, over positions `start` to `end` - 1.
static void attend(const Shape *s, const float *q, const float *kv, int64_t head, int64_t start, int64_t end, float scale,
                   float *scores, float *out) {
    const int64_t P = s->dim, group = s->queries / s->heads, step = 2 * s->heads * P, S = end - start;
    const float *keys = kv + start * step + head * P, *values = keys + s->heads * P;
    for (int64_t i = 0; i < S; i++)
        for (int64_t g = 0; g < group; g++) scores[g * S + i] = scale * dot(q + g * P, keys + i * step, P);
    for (int64_t g = 0; g < group; g++) {
        float *p = scores + g * S, most = p[0], total = 0;
        for (int64_t i = 1; i < S; i++) most = p[i] > most ? p[i] : most;
        for (int64_t i = 0; i < S; i++) p[i] = exp_(p[i] - most);
        for (int64_t i = 0; i < S; i++) total += p[i];
        for (int64_t i = 0; i < S; i++) p[i] /= total;
    }
    memset(out, 0, group * P * sizeof(float));
    for (int64_t i = 0; i < S; i++)
        for (int64_t g = 0; g < group; g++) {
            const float p = scores[g * S + i];
            for (int64_t k = 0; k < P; k++) out[g * P + k] += p * values[i * step + k];
        }
}

// `h` (R, D) through `count` blocks, in place. Row r is at position pos[r] of sequence seq[r] of S; turn (R, P) are its
// rotary pairs; kv[i · S + seq[r]] is what block i remembers of it, (capacity, 2H, P). With `fill`, only the memories are
// written. Scratch holds R · (max(D, Q · P) + (Q + 2H) · P + max(2F, D)) floats, then for each thread `own` floats: R · columns
// of the widest weight, or Q / H · (highest position + 1) if that is more.
void offramp_run(const Block *blocks, int64_t count, const Shape *s, float *const *kv, int64_t S, float *h, int64_t R,
                 const int64_t *pos, const int64_t *seq, const float *turn, int64_t fill, float *scratch, int64_t own,
                 int64_t threads) {
    const int64_t D = s->hidden, P = s->dim, Q = s->queries, H = s->heads, F = s->width, A = (Q + 2 * H) * P;
    const int64_t group = Q / H, step = 2 * H * P;
    float *x = scratch, *qkv = x + R * (D > Q * P ? D : Q * P), *mlp = qkv + R * A;
    float *mine = mlp + R * (2 * F > D ? 2 * F : D);
#pragma omp parallel num_threads(threads)
    {
        const int t = omp_get_thread_num(), n = omp_get_num_threads();
        float *local = mine + t * own;
        int64_t from, to;
        for (int64_t i = 0; i < count; i++) {
            const Block *b = blocks + i;
            const float *in = b->norm_first ? x : h;
            if (b->norm_first)
                for (int64_t r = t; r < R; r += n) norm(h + r * D, b->attention_norm, b->eps, x + r * D, D);
#pragma omp barrier
            share(fill ? step : A, t, n, &from, &to);
            const int64_t skip = fill ? Q * P : 0;
            product(&b->qkv, prepare(&b->qkv, in, D, R, local), R, qkv, A, 0, from + skip, to + skip);
#pragma omp barrier
            for (int64_t r = t; r < R; r += n)
                remember(b, s, qkv + r * A + skip, fill ? 0 : Q, turn + r * P,
                         kv[i * S + seq[r]] + pos[r] * step);
#pragma omp barrier
            if (fill) continue;
            for (int64_t item = t; item < R * H; item += n) {
                const int64_t r = item / H, head = item % H, end = pos[r] + 1;
                const int64_t start = b->window && end > b->window ? end - b->window : 0;
                attend(s, qkv + r * A + head * group * P, kv[i * S + seq[r]], head,
                       start, end, b->scale, local, x + r * Q * P + head * group * P);
            }
#pragma omp barrier
            share(D, t, n, &from, &to);
            float *out = b->norm_first ? h : mlp;
            product(&b->o, prepare(&b->o, x, Q * P, R, local), R, out, D, b->norm_first, from, to);
#pragma omp barrier
            for (int64_t r = t; r < R; r += n)
                if (b->norm_first) {
                    norm(h + r * D, b->mlp_norm, b->eps, x + r * D, D);
                } else {
                    norm(mlp + r * D, b->attention_norm, b->eps, x + r * D, D);
                    for (int64_t k = 0; k < D; k++) h[r * D + k] += x[r * D + k];
                }
#pragma omp barrier
            share(F, t, n, &from, &to);
            const Rows rows = prepare(&b->gate_up, in, D, R, local);
            product(&b->gate_up, rows, R, mlp, 2 * F, 0, from, to);
            product(&b->gate_up, rows, R, mlp, 2 * F, 0, F + from, F + to);
            for (int64_t r = 0; r < R; r++) {
                float *gate = mlp + r * 2 * F, *up = gate + F;
                for (int64_t k = from; k < to; k++) gate[k] = gate[k] / (1.0f + exp_(-gate[k])) * up[k];
            }
#pragma omp barrier
            share(D, t, n, &from, &to);
            out = b->norm_first ? h : x;
            product(&b->down, prepare(&b->down, mlp, 2 * F, R, local), R, out, D, b->norm_first, from, to);
#pragma omp barrier
            if (!b->norm_first) {
                for (int64_t r = t; r < R; r += n) {
                    norm(x + r * D, b->mlp_norm, b->eps, x + r * D, D);
                    for (int64_t k = 0; k < D; k++) h[r * D + k] += x[r * D + k];
                }
#pragma omp barrier
            }
        }
    }
}

// y (R, N) = x (R, K) · weightᵀ, for the head.
void offramp_product(const Weight *m, const float *x, int64_t R, float *y, float *scratch, int64_t own, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        const int t = omp_get_thread_num(), n = omp_get_num_threads();
        int64_t from, to;
        share(m->rows, t, n, &from, &to);
        product(m, prepare(m, x, m->columns, R, scratch + t * own), R, y, m->rows, 0, from, to);
    }
}

// ---- Mamba-2 (arXiv 2405.21060). E inner width, G groups, N state size, W the convolution's width, C = E + 2GN channels.

typedef struct {
    Weight in, out;                                     // rows of `in`: z (E), x, B and C (C together), dt (H)
    const float *norm, *gated_norm, *conv, *conv_bias;  // conv (W, C); conv_bias may be NULL
    const float *dt_bias, *decay, *skip;                // (H) each: decay is A < 0, skip is D
    float eps, gated_eps, dt_low, dt_high;
} MambaBlock;

typedef struct {
    int64_t hidden, heads, dim, groups, states, width;
} MambaShape;

// What a block remembers of a sequence: (W - 1, C) and (H, P, N).
typedef struct {
    float *window, *h;
} MambaMemory;

static inline void store(float *p, v8 v) { memcpy(p, &v, sizeof v); }

static inline float silu(float x) { return x / (1.0f + exp_(-x)); }

static inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// The recurrence for one row and one head: state (P, N) moves on; y (P), if asked for, is C h + D x. Never inlined, so that
// a replay repeats it bit for bit.
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

// `h` (R, D) through `count` blocks, in place; row r is the next token of sequence seq[r] of S, whose memory in block i is
// memory[i · S + seq[r]]; or nothing where that is -1. `journal`, unless NULL, is told by what each row moved a memory:
// (blocks, `noted` rows, 2C + H), the convolution's inputs and outputs, then dt. With `fill`, only the memories move on.
// Scratch holds R · (max(D, E) + 2E + 2GN + H + C) floats, then for each thread `own` floats: R · columns of the widest weight.
void offramp_mamba_run(const MambaBlock *blocks, int64_t count, const MambaShape *s, const MambaMemory *memory, int64_t S,
                       float *h, int64_t R, const int64_t *seq, float *journal, int64_t noted, int64_t fill,
                       float *scratch, int64_t own, int64_t threads) {
    const int64_t D = s->hidden, H = s->heads, P = s->dim, G = s->groups, N = s->states, W = s->width;
    const int64_t E = H * P, C = E + 2 * G * N, A = E + C + H;
    float *x = scratch, *rows = x + R * (D > E ? D : E), *conv = rows + R * A, *mine = conv + R * C;
#pragma omp parallel num_threads(threads)
    {
        const int t = omp_get_thread_num(), n = omp_get_num_threads();
        float *local = mine + t * own;
        int64_t from, to;
        for (int64_t i = 0; i < count; i++) {
            const MambaBlock *b = blocks + i;
            for (int64_t r = t; r < R; r += n) norm(h + r * D, b->norm, b->eps, x + r * D, D);
#pragma omp barrier
            const int64_t skip = fill ? E : 0;
            share(A - skip, t, n, &from, &to);
            product(&b->in, prepare(&b->in, x, D, R, local), R, rows, A, 0, from + skip, to + skip);
#pragma omp barrier
            share(C, t, n, &from, &to);
            for (int64_t r = 0; r < R; r++) {
                if (seq[r] < 0) continue;
                float *window = memory[i * S + seq[r]].window, *out = conv + r * C;
                const float *in = rows + r * A + E, *last = b->conv + (W - 1) * C;
                for (int64_t c = from; c < to; c++) out[c] = last[c] * in[c] + (b->conv_bias ? b->conv_bias[c] : 0.0f);
                for (int64_t w = 0; w < W - 1; w++) {
                    float *now = window + w * C;
                    const float *taps = b->conv + w * C, *next = w < W - 2 ? now + C : in;
                    for (int64_t c = from; c < to; c++) out[c] += taps[c] * now[c];
                    for (int64_t c = from; c < to; c++) now[c] = next[c];
                }
                for (int64_t c = from; c < to; c++) out[c] = silu(out[c]);
                if (journal) {
                    float *note = journal + (i * noted + r) * (2 * C + H);
                    memcpy(note + from, in + from, (to - from) * sizeof(float));
                    memcpy(note + C + from, out + from, (to - from) * sizeof(float));
                }
            }
#pragma omp barrier
            share(H, t, n, &from, &to);
            for (int64_t head = from; head < to; head++)
                for (int64_t r = 0; r < R; r++) {
                    if (seq[r] < 0) continue;
                    const float *B = conv + r * C + E + head / (H / G) * N, *z = rows + r * A + head * P;
                    float dt = softplus(rows[r * A + E + C + head] + b->dt_bias[head]), *y = x + r * E + head * P;
                    dt = dt < b->dt_low ? b->dt_low : dt > b->dt_high ? b->dt_high : dt;
                    if (journal) journal[(i * noted + r) * (2 * C + H) + 2 * C + head] = dt;
                    advance(s, memory[i * S + seq[r]].h + head * P * N, conv + r * C + head * P, B, B + G * N, dt,
                            expf(dt * b->decay[head]), b->skip[head], fill ? NULL : y);
                    if (!fill)
                        for (int64_t p = 0; p < P; p++) y[p] *= silu(z[p]);
                }
#pragma omp barrier
            if (fill) continue;
            for (int64_t r = t; r < R; r += n)
                for (int64_t g = 0; g < G; g++) {
                    float *part = x + r * E + g * (E / G);
                    norm(part, b->gated_norm + g * (E / G), b->gated_eps, part, E / G);
                }
#pragma omp barrier
            share(D, t, n, &from, &to);
            product(&b->out, prepare(&b->out, x, E, R, local), R, h, D, 1, from, to);
#pragma omp barrier
        }
    }
}

// Moves a state (H, P, N) on by R rows of a journal, as the pass that wrote it did.
void offramp_mamba_replay(const MambaBlock *b, const MambaShape *s, float *h, const float *journal, int64_t R) {
    const int64_t H = s->heads, P = s->dim, G = s->groups, N = s->states, C = H * P + 2 * G * N;
    for (int64_t head = 0; head < H; head++)
        for (int64_t r = 0; r < R; r++) {
            const float *conv = journal + r * (2 * C + H) + C, *B = conv + H * P + head / (H / G) * N;
            const float dt = conv[C + head];
            advance(s, h + head * P * N, conv + head * P, B, B, dt, expf(dt * b->decay[head]), 0, NULL);
        }
}
