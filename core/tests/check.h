// What the tests share: checks, random numbers that are the same each time, and tiny models that are made
// through offramp.h.

#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layouts.h"

// Ends the test with a line that says what is not true.
#define CHECK(truth, ...)                                                       \
    do {                                                                        \
        if (!(truth)) {                                                         \
            fprintf(stderr, "%s:%d: not so: %s: ", __FILE__, __LINE__, #truth); \
            fprintf(stderr, __VA_ARGS__);                                       \
            fputc('\n', stderr);                                                \
            exit(1);                                                            \
        }                                                                       \
    } while (0)

// What a call with `&said` last must do: work, or say in one sentence what is wrong.
static offramp_error said;
#define WORKS(call) CHECK((call) == OFFRAMP_OK, "%s", said.message)
#define MADE(call) CHECK((call) != NULL, "%s", said.message)
#define REFUSED(call)                                                   \
    do {                                                                \
        *said.message = 0;                                              \
        CHECK((call) == OFFRAMP_INVALID, "it is not refused");          \
        CHECK(is_sentence(said.message), "it says '%s'", said.message); \
    } while (0)
#define NOT_MADE(call)                                                  \
    do {                                                                \
        *said.message = 0;                                              \
        CHECK((call) == NULL, "it is not refused");                     \
        CHECK(is_sentence(said.message), "it says '%s'", said.message); \
    } while (0)

static inline int is_sentence(const char *text) {
    const size_t length = strnlen(text, sizeof said.message);
    return length > 10 && length < sizeof said.message - 1 && text[length - 1] == '.';
}

// Memory until the test ends. It is as large as asked for, so that a sanitizer sees what is read beyond it.
static void *kept[1 << 16];
static int kept_count;

// Frees what came after the first `mark` pieces of memory.
static inline void free_from(int mark) {
    while (kept_count > mark) free(kept[--kept_count]);
}
static void free_all(void) { free_from(0); }

static inline void *memory(int64_t bytes) {
    if (!kept_count) atexit(free_all);
    CHECK(kept_count < 1 << 16, "the test keeps too much");
    return kept[kept_count++] = calloc(1, bytes);
}

static uint64_t random_state = 88172645463325252u;

static inline uint64_t random_bits(void) {  // xorshift64*
    random_state ^= random_state >> 12, random_state ^= random_state << 25,
        random_state ^= random_state >> 27;
    return random_state * 2685821657736338717u >> 16;
}
static inline int64_t below(int64_t n) { return (int64_t)(random_bits() % (uint64_t)n); }
static inline float uniform(float low, float high) {
    return low + (high - low) * (float)(random_bits() & 0xffffff) / 0x1000000;
}

static inline float *randoms(int64_t count, float low, float high) {
    float *x = memory(count * 4);
    for (int64_t i = 0; i < count; i++) x[i] = uniform(low, high);
    return x;
}
static inline float *zeros(int64_t count) { return memory(count * 4); }
static inline float *copied(const float *x, int64_t count) { return memcpy(memory(count * 4), x, count * 4); }
static inline int same(const void *a, const void *b, int64_t floats) { return !memcmp(a, b, floats * 4); }

static inline float half_of(uint16_t bits) {  // of a bfloat16 number
    const uint32_t whole = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &whole, sizeof x);
    return x;
}
static inline double float16_of(uint16_t bits) {
    const int exponent = bits >> 10 & 31, rest = bits & 1023;
    const double size = exponent ? ldexp(1024 + rest, exponent - 25) : ldexp(rest, -24);
    return bits & 0x8000 ? -size : size;
}

// A random float16 number about as large as x, and of its sign.
static inline uint16_t random_float16(float x) {
    const int exponent = x == 0 ? 0 : 15 + (int)floorf(log2f(fabsf(x)));
    return (uint16_t)((x < 0 ? 0x8000 : 0) | (exponent > 0 ? exponent : 0) << 10 | below(512));
}

// Whether in some groups all weights in panels are the largest that there are. So sums are, too.
static int some_largest;

// Random weights in panels, as layouts.h says they are kept. Minima are what makes weights' mean small.
static inline uint8_t *panels_of(Layout of, int64_t rows, int64_t columns, float size) {
    const int64_t panels = (rows + OFFRAMP_PANEL - 1) / OFFRAMP_PANEL,
                  bytes = panels * bytes_of_panel(of, columns);
    const int scales = SCALES_OF(of.bits) * OFFRAMP_PANEL, most = 1 << (of.bits + 4 * of.codes);
    const float scale = 2 * size / most / (of.super ? 32 : 1), low = -scale * most / 2;
    uint8_t *values = memory(bytes), *p = values;
    for (int64_t i = 0; i < panels && of.bits == 8; i++)
        for (int64_t k = 0; k < columns; k += LONG) {
            for (int64_t b = 0; b < OFFRAMP_PANEL * LONG; b++) *p++ = (uint8_t)random_bits();
            for (int b = 0; b < OFFRAMP_PANEL * 2; b++, p += 2) {
                const uint16_t number = random_float16(scale);
                memcpy(p, &number, 2);
            }
        }
    for (int64_t i = 0; i < panels * (columns / OFFRAMP_GROUP) && of.bits < 8; i++) {
        for (int r = 0; of.super && i % (columns / OFFRAMP_GROUP) % (SUPER / OFFRAMP_GROUP) == 0 &&
                        r < (1 + of.lows) * OFFRAMP_PANEL;
             r++, p += 2) {
            const uint16_t unit = random_float16(r < OFFRAMP_PANEL ? scale : low);
            memcpy(p, &unit, 2);
        }
        const int largest = some_largest && below(4) == 0;
        for (int b = 0; b < of.bits * PLANE; b++) *p++ = (uint8_t)(largest ? 255 : random_bits());
        for (int r = 0; r < (1 + of.lows) * scales; r++) {
            const uint16_t number = random_float16(r < scales ? scale : low);
            if (of.super)
                *p++ = (uint8_t)(of.lows ? below(64) : below(64) - 32);
            else
                memcpy(p, &number, 2), p += 2;
        }
    }
    CHECK(p == values + bytes, "%d bytes were written and not %d", (int)(p - values), (int)bytes);
    return values;
}

// A number of panels, read bit by bit.
static inline double entry_of_panels(Layout of, const uint8_t *values, int64_t columns, int64_t row,
                                     int64_t column) {
    const int64_t g = column / OFFRAMP_GROUP, i = row % OFFRAMP_PANEL;
    if (of.bits == 8) {
        const uint8_t *block =
            values + row / OFFRAMP_PANEL * bytes_of_panel(of, columns) + column / 64 * 16 * 68;
        uint16_t scale;
        memcpy(&scale, block + 16 * 64 + 4 * i + column % 64 / 32 * 2, 2);
        return (int8_t)block[64 * i + column % 64] * float16_of(scale);
    }
    const int k = column % OFFRAMP_GROUP, v = k / 4, of_four = 4 * (int)i + k % 4;
    const uint8_t *panel = values + row / OFFRAMP_PANEL * bytes_of_panel(of, columns),
                  *block = panel + g * bytes_of_block(of) + (g / 8 + 1) * bytes_before(of),
                  *ends = block + of.bits * 64,
                  *units = panel + g / 8 * (8 * bytes_of_block(of) + bytes_before(of));
    int q = 0, begun = 0;
    const uint8_t *plane = block;
    if (of.bits & 4) q = plane[64 * (v % 4) + of_four] >> (v < 4 ? 0 : 4) & 15, plane += 4 * 64, begun = 4;
    if (of.bits & 2)
        q |= (plane[64 * (v / 4) + of_four] >> 2 * (v % 4) & 3) << begun, plane += 2 * 64, begun += 2;
    if (of.bits & 1) q |= (plane[of_four] >> v & 1) << begun;
    double weight = of.codes ? (double)CODES[q] : q, both[2] = {0};
    if (!of.codes && !of.lows) weight -= 1 << (of.bits - 1);
    const int scales = SCALES_OF(of.bits);
    for (int low = 0; low <= of.lows; low++) {
        const int64_t at = (low * scales + k * scales / 32) * OFFRAMP_PANEL + i;
        uint16_t bits;
        memcpy(&bits, of.super ? units + 2 * (low * OFFRAMP_PANEL + i) : ends + 2 * at, 2);
        both[low] = float16_of(bits) * (of.super ? (int8_t)ends[at] : 1);
    }
    return weight * both[0] + both[1];
}

// Weights (rows, columns) whose products with numbers around 1 are around 1.
static inline offramp_weight weight_of(int type, int fine, int64_t rows, int64_t columns, int bias) {
    offramp_weight w = {.type = type, .fine = fine, .rows = rows, .columns = columns};
    const float size = sqrtf(3.0f / columns);
    const int64_t count = rows * columns;
    if (type == OFFRAMP_FLOAT32) w.values = randoms(count, -size, size);
    if (type == OFFRAMP_BFLOAT16 || type == OFFRAMP_FLOAT16) {
        uint16_t *values = memory(count * 2);
        for (int64_t i = 0; i < count; i++) {
            const float x = uniform(-size, size);
            memcpy(values + i, (const char *)&x + 2, 2);
            if (type == OFFRAMP_FLOAT16) values[i] = random_float16(x);
        }
        w.values = values;
    }
    if (type == OFFRAMP_INT8) {
        int8_t *values = memory(count);
        for (int64_t i = 0; i < count; i++) values[i] = (int8_t)(below(255) - 127);
        w.values = values, w.scales = randoms(rows, 0.5f * size / 127, size / 127);
    }
    if (type >= OFFRAMP_Q4_0) w.values = panels_of(LAYOUTS[type], rows, columns, size);
    if (bias) w.bias = randoms(rows, -1, 1);
    return w;
}

// A weight's number, of a piece if it is stacked.
static inline double entry(const offramp_weight *w, int64_t row, int64_t column) {
    const int64_t at = row * w->columns + column;
    if (w->type == OFFRAMP_STACKED)
        for (const offramp_weight *piece = w->values;; row -= piece->rows, piece++)
            if (row < piece->rows) return entry(piece, row, column);
    if (w->type == OFFRAMP_FLOAT32) return ((const float *)w->values)[at];
    if (w->type == OFFRAMP_BFLOAT16) return half_of(((const uint16_t *)w->values)[at]);
    if (w->type == OFFRAMP_FLOAT16) return float16_of(((const uint16_t *)w->values)[at]);
    if (w->type == OFFRAMP_INT8) return (double)((const int8_t *)w->values)[at] * w->scales[row];
    return entry_of_panels(LAYOUTS[w->type], w->values, w->columns, row, column);
}

static inline double bias_of(const offramp_weight *w, int64_t row) {
    if (w->type == OFFRAMP_STACKED)
        for (const offramp_weight *piece = w->values;; row -= piece->rows, piece++)
            if (row < piece->rows) return bias_of(piece, row);
    return w->bias ? w->bias[row] : 0;
}

// What references are made of. y (rows) = weight · x (columns) + bias, and a norm of x (n) by its root mean
// square.
static inline void product_reference(const offramp_weight *w, const double *x, double *y) {
    for (int64_t n = 0; n < w->rows; n++) {
        y[n] = bias_of(w, n);
        for (int64_t k = 0; k < w->columns; k++) y[n] += entry(w, n, k) * x[k];
    }
}
static inline void norm_reference(const double *x, const float *weight, double eps, double *y, int64_t n) {
    double squares = 0;
    for (int64_t i = 0; i < n; i++) squares += x[i] * x[i];
    const double factor = 1 / sqrt(squares / n + eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor * weight[i];
}
static inline double silu_reference(double x) { return x / (1 + exp(-x)); }

// The confidence of logits (n), `listed` of which are those of tokens.
static inline double confidence_reference(offramp_confidence kind, const float *y, int64_t n,
                                          int64_t listed) {
    double total = 0, moment = 0, most = -INFINITY, second = -INFINITY;
    int64_t best = 0;
    for (int64_t i = 0; i < n; i++)
        if (y[i] > most) most = y[i], best = i;
    for (int64_t i = 0; i < n; i++) {
        const double x = y[i] - most;
        total += exp(x), moment += y[i] > -INFINITY ? x * exp(x) : 0;
        if (i != best) second = fmax(second, x);
    }
    if (kind == OFFRAMP_MAX_PROB) return 1 / total;
    if (kind == OFFRAMP_MARGIN) return (1 - exp(second)) / total;
    return listed == 1 ? 1 : 1 + (moment / total - log(total)) / log(listed);
}

// How far numbers are from those expected, as a share of the largest expected.
static inline double distance(const float *found, const double *expected, int64_t count) {
    double most = 0, furthest = 0;
    for (int64_t i = 0; i < count; i++) {
        if (isnan(found[i])) return INFINITY;
        most = fmax(most, fabs(expected[i])), furthest = fmax(furthest, fabs(found[i] - expected[i]));
    }
    return most > 0 ? furthest / most : furthest;
}
