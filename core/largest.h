// Finds the largest of many numbers digit by digit, without sorting. In each pass, every number adds its
// weight to the bin of its digit. Then a walk down from the largest bin finds the digit.

#pragma once
#include <stdint.h>
#include <string.h>

enum {
    BITS = 11,
    BINS = 1 << BITS,
    DIGITS = 3,
    SAMPLED = 16,  // if there are many numbers, one of SAMPLED is looked at first
};

// A number whose order as an unsigned integer is that of the floats, and back.
static inline uint32_t ordered(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static inline float from_ordered(uint32_t number) {
    const uint32_t bits = number & 0x80000000u ? number ^ 0x80000000u : ~number;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// Finds the largest number such that it and all larger ones weigh `left` together; if all weigh less, the
// smallest of all. `left` and zeros are given.
typedef struct {
    double left;           // what numbers with the digits that are known weigh, of those that are wanted
    uint32_t known, mask;  // digits
    int shift;             // of the digit that is looked for
    double bins[BINS];
} Search;

static inline void begin_digit(Search *s, int digit) {
    static const int shifts[] = {32 - BITS, 32 - 2 * BITS, 0};
    s->shift = shifts[digit];
    memset(s->bins, 0, sizeof s->bins);
}

static inline void weigh(Search *s, float x, double weight) {
    const uint32_t number = ordered(x);
    if ((number & s->mask) == s->known) s->bins[(number & ~s->mask) >> s->shift & (BINS - 1)] += weight;
}

static inline void end_digit(Search *s) {
    int64_t found = -1;
    for (int64_t bin = BINS - 1; bin >= 0; bin--) {
        if (s->bins[bin] == 0) continue;
        if (found >= 0) s->left -= s->bins[found];
        found = bin;
        if (s->bins[bin] >= s->left) break;
    }
    if (found >= 0) s->known |= (uint32_t)found << s->shift;
    s->mask = ~0u << s->shift;
}

static inline float found_by(const Search *s) { return from_ordered(s->known); }

// How many of a sample's largest numbers to take, so that most likely n of all numbers are not below them.
static inline int64_t enough_of_sample(int64_t n) {
    const int64_t share = n / SAMPLED;
    return share + 4 * (int64_t)__builtin_sqrt((double)share) + 8;
}
