// The form of rows in which they are multiplied with weights.
//
// A row's sums are added in the same order however many rows there are, so a chunk of any length gives bit
// for bit what its tokens give one by one, and no sequence depends on its neighbours. The form depends on the
// weights:
//
// | weights | rows |
// |---------|------|
// | float32, float16 | float32 |
// | bfloat16 | bfloat16 where the processor multiplies it (AVX512-BF16), else and with `fine` float32 |
// | int8 | 8-bit integers with a scale for every 64 columns; `fine`: 16-bit ones |
// | integers in panels | 8-bit integers with a scale for every GROUP columns; `fine`: 16-bit ones |
// | stacked | as the pieces need it; float32 too, for pieces of floats among panels |

#pragma once
#include "offramp.h"
#include "vectors.h"

typedef offramp_weight Weight;

typedef enum { SINGLES, PAIRS, BYTES, FINE_BYTES, GROUPS, FINE_GROUPS } Form;
enum { GROUP = OFFRAMP_GROUP, HALF = GROUP / 2, PANEL = OFFRAMP_PANEL };
enum { BASE = 255 };  // a 16-bit integer is BASE · its high byte + its low byte

static inline int in_panels(const Weight *m) { return m->type >= OFFRAMP_Q4_0 && m->type < OFFRAMP_STACKED; }

// The form that a weight needs.
Form form_of(const Weight *m);

enum { TOGETHER = 8 };  // rows that are multiplied with each weight at the same time

// Rows as they are multiplied, `count` of them, `stride` apart: `columns` numbers x in each. Unless the form
// is SINGLES, `narrow` holds them in bfloat16 or in 8-bit integers, `width` numbers a row, zeros after the
// last column; `low` has the low bytes of 16-bit integers. In the forms for panels, TOGETHER rows stand
// together (or those that are left): GROUP columns of each, then the next ones of each; and so do their
// scales and sums.
typedef struct {
    Form form;
    const float *x;
    int64_t count, stride, columns, width, groups;
    const void *narrow;
    const int8_t *low;
    const float *scale, *sums, *halves,
        *offset;  // of each group of a row: scale, sum of its numbers; of HALF columns: their sum; of each
                  // row: see dot_bytes
} Rows;

// Where the numbers of row r begin, counted in groups of columns, and how far apart its groups are.
typedef struct {
    int64_t first, apart;
} Place;

static inline Place stands_at(const Rows *x, int64_t r) {
    if (x->form != GROUPS && x->form != FINE_GROUPS) return (Place){r * x->groups, 1};
    const int64_t before = r / TOGETHER * TOGETHER;
    return (Place){before * x->groups + r - before, min_(TOGETHER, x->count - before)};
}

// The floats of room that the narrow forms of R rows of K columns need.
static inline int64_t narrow_room(int64_t R, int64_t K) { return R * (K + 64) + 64; }

// Rows x (R, columns of the weight), `stride` apart; their narrow form goes to `room`.
Rows rows_of(const Weight *m, const float *x, int64_t stride, int64_t R, float *room);

// Makes row r narrow, if it is multiplied so.
void make_narrow(const Rows *rows, int64_t r);
