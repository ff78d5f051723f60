// The products of one format, for products.c. Each format has a file that says its KIND or its BITS and
// includes products_rows.h or products_panels.h, which hold the functions: these and the number of rows of x
// are constants in their loops.

#pragma once
#include "products.h"

// The columns that are multiplied at once; the bytes of weights that stay in the cache.
enum { DEPTH = 2048, CACHED = 1 << 17 };
enum { MOST_ROWS = TOGETHER, FOUR = 4 };  // rows of x in a tile; weights of a tile that stand together
enum { FEW_ROWS = MOST_ROWS + FOUR };     // so many rows take their weights straight from memory

// `count` weights from row n on, and in two streams as many from row n + `apart` on, times rows of x from row
// r on, over the columns `from` to `to` - 1. Of a weight in panels, it is the panel that begins at n, and the
// results of the weights `first` to `last` - 1 are wanted.
typedef struct {
    const Weight *m;
    const Rows *x;
    int64_t n, count, apart, r, from, to, first, last;
} Tile;

typedef void Multiply(const Tile *tile, const Out *out);
typedef void Choose(const Weight *m, const Rows *x, int64_t r, const int64_t *rows, int64_t count,
                    const Out *out);

// The functions of one format. The first is for 1 to MOST_ROWS rows of x, with one stream of weights or two.
// The second is for weights in the cache: `weights` of them times `rows` rows of x. The third is for
// scattered rows of weights. Panels have only the first.
typedef struct {
    Multiply *one_stream[MOST_ROWS], *two_streams[MOST_ROWS], *cached;
    int64_t weights, rows;
    Choose *scattered;
} Products;

// Formats of rows, and how rows of x are made narrow for them.
enum { FLOAT32, BFLOAT16, PAIRED_BFLOAT16, FLOAT16, INT8, FINE_INT8 };

extern const Products products_float32, products_bfloat16, products_paired_bfloat16, products_float16,
    products_int8, products_fine_int8;
// Formats in panels, by their bits; `codes`: of those. The second one is for `fine` rows of x.
extern const Products products_2_bits[2], products_3_bits[2], products_4_bits[2], products_codes[2],
    products_5_bits[2], products_6_bits[2], products_8_bits[2];

// Puts the sums of LANES weights in panels, from row n on, and of the tile's T rows, where they belong.
void store_lanes(const Tile *tile, const Out *out, int T, int64_t n, const vf *sums);

// Fetches weights into the second cache ahead of time. Where several rows are multiplied with each weight,
// the processor does not do so early enough by itself.
enum { AHEAD = 4096 };  // bytes
ALWAYS void fetch(const void *weights) { __builtin_prefetch((const char *)weights + AHEAD, 0, 2); }

#define EACH_WEIGHT _Pragma("GCC unroll 4") for (int i = 0; i < N; i++)
#define EACH_ROW _Pragma("GCC unroll 8") for (int t = 0; t < T; t++)
// One function for each number of rows.
#define FUNCTION(name, body) \
    static __attribute__((noinline)) void name(const Tile *c, const Out *out) { body; }
#define UP_TO_FOUR(make) make(1) make(2) make(3) make(4)
#define FIVE_TO_EIGHT(make) make(5) make(6) make(7) make(8)
#define UP_TO_EIGHT(make) UP_TO_FOUR(make) FIVE_TO_EIGHT(make)
#define TABLE(name) {name##1, name##2, name##3, name##4, name##5, name##6, name##7, name##8}
