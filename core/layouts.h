// Where the numbers of weights in panels stand, one layout for each type of GGUF files.
//
// A panel has PANEL rows, and blocks of GROUP columns. A block begins with `bits` planes of PANEL · 4 bytes.
// Let column k of row i stand in byte 4 i + k % 4, and let v = k / 4 (0 to 7). Then the planes are, as far as
// `bits` has them in it:
//
// | planes | hold |
// |--------|------|
// | 4 | the low 4 bits: of v in the low half of plane v % 4 for v < 4, else in its high half |
// | 2 | the next 2 bits (the low ones of 2 and 3 bits): of v in bits 2 (v % 4) of plane v / 4 |
// | 1 | the highest bit: of v in bit v |
//
// Then come scales, and minima if there are some: a weight is q · scale + low. Without minima, it is (q -
// centre) · scale; q of 8 bits is signed, and q of a code stands for a number of CODES. A scale is for GROUP
// columns, or for half as many with 2, 3 and 6 bits. Scales and minima are float16 numbers, one for each row;
// or with `super`, integers of 8 bits. These are multiplied by a float16 for SUPER columns, which stand
// before the blocks of these columns: PANEL for scales, then PANEL for minima. The last panel is filled up.
//
// Entries of 8 bits are kept otherwise: in blocks of LONG columns, first the bytes of each row, then the
// float16 scales of each row. So one row of a weight lies in few lines of the cache, and is quick to read:
// the candidates of a sketch are such rows. The last block is filled up.

#pragma once
#include "offramp.h"

enum { SUPER = 256 };                                    // columns
enum { PLANE = 4 * OFFRAMP_PANEL, HALF_PRECISION = 2 };  // bytes of a plane, and of a float16
// Columns of a block of 8 bits; bytes of its scales of a row, and of all of it.
enum { LONG = 64, SCALES_OF_LONG = LONG / OFFRAMP_GROUP * HALF_PRECISION };
enum { LONG_BYTES = OFFRAMP_PANEL * (LONG + SCALES_OF_LONG) };

typedef struct {
    int bits, codes, super, lows;  // all but bits: 0 or 1
} Layout;

static const Layout LAYOUTS[OFFRAMP_STACKED] = {
    [OFFRAMP_Q4_0] = {4, 0, 0, 0}, [OFFRAMP_Q4_1] = {4, 0, 0, 1},   [OFFRAMP_Q5_0] = {5, 0, 0, 0},
    [OFFRAMP_Q5_1] = {5, 0, 0, 1}, [OFFRAMP_Q8_0] = {8, 0, 0, 0},   [OFFRAMP_Q2_K] = {2, 0, 1, 1},
    [OFFRAMP_Q3_K] = {3, 0, 1, 0}, [OFFRAMP_Q4_K] = {4, 0, 1, 1},   [OFFRAMP_Q5_K] = {5, 0, 1, 1},
    [OFFRAMP_Q6_K] = {6, 0, 1, 0}, [OFFRAMP_IQ4_NL] = {4, 1, 0, 0}, [OFFRAMP_IQ4_XS] = {4, 1, 1, 0},
};

static const int8_t CODES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// Scales of a row in a block; bytes of a block (with 8 bits: of GROUP columns), and of what stands before the
// blocks of SUPER columns.
#define SCALES_OF(bits) ((bits) == 2 || (bits) == 3 || (bits) == 6 ? 2 : 1)
static inline int64_t bytes_of_block(Layout of) {
    return of.bits * PLANE +
           (1 + of.lows) * SCALES_OF(of.bits) * OFFRAMP_PANEL * (of.super ? 1 : HALF_PRECISION);
}
static inline int64_t bytes_before(Layout of) {
    return of.super ? (1 + of.lows) * OFFRAMP_PANEL * HALF_PRECISION : 0;
}
static inline int64_t bytes_of_panel(Layout of, int64_t columns) {
    if (of.bits == 8) return (columns + LONG - 1) / LONG * LONG_BYTES;
    return columns / OFFRAMP_GROUP * bytes_of_block(of) + columns / SUPER * bytes_before(of);
}
