// Panels hold what a file's blocks hold: rows that are picked have the values that they had, whatever panel
// they were in. tests/test_weights.py compares these values with those of the package gguf.

#include "check.h"

enum { ROWS = 37, COLUMNS = 512, PICKED = 21 };

static const char *const NAMES[] = {"OFFRAMP_Q4_0", "OFFRAMP_Q4_1", "OFFRAMP_Q5_0",   "OFFRAMP_Q5_1",
                                    "OFFRAMP_Q8_0", "OFFRAMP_Q2_K", "OFFRAMP_Q3_K",   "OFFRAMP_Q4_K",
                                    "OFFRAMP_Q5_K", "OFFRAMP_Q6_K", "OFFRAMP_IQ4_NL", "OFFRAMP_IQ4_XS"};
enum { MOST_BYTES = 2 * COLUMNS };  // of a row in a file: more than any type has

static void rows_keep_their_values(offramp_type type) {
    uint8_t *blocks = memory(ROWS * MOST_BYTES);
    for (int i = 0; i < ROWS * MOST_BYTES; i++)
        blocks[i] = (uint8_t)(below(4) * 16 + below(8));  // no infinite scale
    const int64_t bytes = offramp_packed_bytes(type, ROWS, COLUMNS),
                  few = offramp_packed_bytes(type, PICKED, COLUMNS);
    uint8_t *panels = memory(bytes), *picked = memory(few);
    WORKS(offramp_pack(type, blocks, ROWS, COLUMNS, panels, &said));
    const offramp_weight whole = {.type = type, .rows = ROWS, .columns = COLUMNS, .values = panels},
                         part = {.type = type, .rows = PICKED, .columns = COLUMNS, .values = picked};
    int64_t rows[PICKED], own[PICKED];
    for (int i = 0; i < PICKED; i++) rows[i] = below(ROWS), own[i] = i;
    WORKS(offramp_pick(&whole, rows, PICKED, picked, &said));
    float *wanted = zeros(PICKED * COLUMNS), *found = zeros(PICKED * COLUMNS);
    WORKS(offramp_values(&whole, rows, PICKED, wanted, &said));
    WORKS(offramp_values(&part, own, PICKED, found, &said));
    CHECK(same(wanted, found, PICKED * COLUMNS), "the values of rows of type %d", (int)type);
    rows[3] = ROWS;
    REFUSED(offramp_pick(&whole, rows, PICKED, picked, &said));
    REFUSED(offramp_values(&whole, rows, PICKED, wanted, &said));
    REFUSED(offramp_pack(type, blocks, ROWS, 48, panels, &said));
    REFUSED(offramp_pack(type, blocks, 0, COLUMNS, panels, &said));
    CHECK(offramp_packed_bytes(type, -1, COLUMNS) == -1, "the bytes of no rows");
}

int main(void) {
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++)
        rows_keep_their_values((offramp_type)offramp_constant(NAMES[i]));
    REFUSED(offramp_pack(OFFRAMP_BFLOAT16, "", 1, 32, NULL, &said));
    return 0;
}
