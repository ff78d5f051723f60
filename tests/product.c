// Multiplies what a file holds, with the kernels of the processor that this is compiled for: all rows at once, and then a few at a
// time, which must give the same bits. Writes which kernels they are to standard error, and the product to standard output. For
// test_weights.py.

#include <stdio.h>
#include <stdlib.h>
#include "kernels.c"

static void *read(FILE *file, int64_t bytes) {
    void *place = aligned_alloc(64, (bytes + 127) / 64 * 64);
    if (fread(place, 1, bytes, file) != (size_t)bytes) exit(2);
    return place;
}

int main(int argc, char **argv) {
    FILE *file = argc > 1 ? fopen(argv[1], "rb") : NULL;
    if (!file) return 2;
    const int64_t *sizes = read(file, 5 * sizeof(int64_t));  // kind, rows, columns, bytes of the weight, rows of x
    const int64_t N = sizes[1], K = sizes[2], R = sizes[4];
    Weight weight = {sizes[0], N, K, read(file, sizes[3]), NULL, NULL};
    if (IS_INT8(weight.kind)) weight.scale = read(file, N * sizeof(float));
    const float *x = read(file, R * K * sizeof(float));
    float *y = malloc(R * N * sizeof(float)), *again = malloc(R * N * sizeof(float));
    const Scratch scratch = {malloc(R * (K + 64) * sizeof(float)), 0, 2, NULL};
    offramp_product(&weight, x, R, y, &scratch);
    for (int64_t count = 1; count <= MOST; count++) {
        for (int64_t r = 0; r < R; r += count) offramp_product(&weight, x + r * K, min_(count, R - r), again + r * N, &scratch);
        if (memcmp(y, again, R * N * sizeof(float))) return 1;
    }
    fprintf(stderr, "%s", offramp_kernels());
    return fwrite(y, sizeof(float), R * N, stdout) == (size_t)(R * N) ? 0 : 2;
}
