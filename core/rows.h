// The form of rows in which they are multiplied with weights.
//
// A row's sums are added in the same order however many rows there are, so a chunk of any length gives bit
// for bit what its tokens give one by one, and no sequence depends on its neighbours. The form depends on the
// weights:
//
// | weights | rows |
// |---------|------|
// | float32 | float32 |
// | bfloat16 | bfloat16 where the processor multiplies it (AVX512-BF16), else float32 |
// | int8 | 8-bit integers with a scale for every 64 columns; `fine`: 16-bit ones |
// | int4 | 8-bit integers with a scale for every GROUP columns; `fine`: 16-bit ones |

#pragma once
#include "offramp.h"
#include "vectors.h"

typedef offramp_weight Weight;

// Formats, and how rows are rounded for them: a constant of each compiled product.
enum { FLOAT32, BFLOAT16, INT8, INT4, FINE_INT8, FINE_INT4, KINDS };
#define IS_INT8(kind) ((kind) == INT8 || (kind) == FINE_INT8)
#define IS_INT4(kind) ((kind) == INT4 || (kind) == FINE_INT4)
#define IS_FINE(kind) ((kind) >= FINE_INT8)
enum { GROUP = OFFRAMP_GROUP, PANEL = OFFRAMP_PANEL };
enum { BASE = 255 };  // a 16-bit integer is BASE · its high byte + its low byte

static inline int kind_of(const Weight *m) {
    return (int)m->type + (m->fine && m->type >= OFFRAMP_INT8 ? 2 : 0);
}

// Rows as they are multiplied, `stride` apart. For integer weights and where bfloat16 is multiplied, `narrow`
// holds them in 8 or 16 bits, `width` numbers a row, zeros after the last column; `low` has the low bytes of
// 16-bit integers.
typedef struct {
    const float *x;
    int64_t stride, width, groups;
    const void *narrow;
    const int8_t *low;
    const float *scale, *sums,
        *offset;  // of each group of a row: scale, sum of its numbers; of each row: see dot_bytes
} Rows;

// Whether rows are made narrow before they are multiplied with such weights.
static inline int narrows(int kind) { return kind >= INT8 || (kind == BFLOAT16 && MULTIPLIES_BFLOAT16); }

// The floats of room that the narrow forms of R rows of K columns need.
static inline int64_t narrow_room(int64_t R, int64_t K) { return R * (K + 64) + 64; }

// Rows x (R, columns of the weight), `stride` apart; their narrow form goes to `room`.
Rows rows_of(const Weight *m, const float *x, int64_t stride, int64_t R, float *room);

// Makes row r narrow, for a weight that is multiplied with narrow rows.
void make_narrow(const Weight *m, const Rows *rows, int64_t r);
