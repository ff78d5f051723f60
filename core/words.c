#include "words.h"

#include <stdlib.h>
#include <string.h>

#include "offramp.h"
#include "unicode.h"

int decode_point(const uint8_t *at, const uint8_t *end, int32_t *point) {
    const int first = at[0], follow = first < 0xc2 || first > 0xf4 ? 0
                                      : first < 0xe0               ? 1
                                      : first < 0xf0               ? 2
                                                                   : 3;
    *point = first < 0x80 ? first : -1;
    if (!follow) return 1;
    int32_t value = first & (0x3f >> follow);
    for (int i = 1; i <= follow; i++) {
        const int low = i > 1           ? 0x80
                        : first == 0xe0 ? 0xa0
                        : first == 0xf0 ? 0x90
                                        : 0x80,
                  high = i > 1           ? 0xbf
                         : first == 0xed ? 0x9f
                         : first == 0xf4 ? 0x8f
                                         : 0xbf;
        if (at + i >= end || at[i] < low || at[i] > high) return i;
        value = value << 6 | (at[i] & 0x3f);
    }
    *point = value;
    return follow + 1;
}

int64_t offramp_character(const char *text, int64_t length) {
    int32_t point;
    const int count = decode_point((const uint8_t *)text, (const uint8_t *)text + length, &point);
    return point < 0 ? -count : count;
}

char *valid_copy(const char *text, int64_t length, int64_t *copied) {
    char *copy = malloc(3 * length + 1), *to = copy;
    const uint8_t *at = (const uint8_t *)text, *end = at + length;
    for (int n; copy && at < end; at += n) {
        int32_t point;
        n = decode_point(at, end, &point);
        memcpy(to, point < 0 ? "\xef\xbf\xbd" : (const char *)at, point < 0 ? 3 : n);
        to += point < 0 ? 3 : n;
    }
    *copied = copy ? to - copy : 0;
    return copy;
}

enum { OTHER, LETTER, NUMBER, SPACE };

static int within(const Range *ranges, int64_t count, uint32_t point) {
    int64_t low = 0;
    for (int64_t high = count; low < high;) {
        const int64_t middle = (low + high) / 2;
        if (ranges[middle].last < point)
            low = middle + 1;
        else
            high = middle;
    }
    return low < count && ranges[low].first <= point;
}

static int is_space(int32_t p) {
    return (p >= 9 && p <= 13) || p == ' ' || p == 0x85 || p == 0xa0 || p == 0x1680 ||
           (p >= 0x2000 && p <= 0x200a) || p == 0x2028 || p == 0x2029 || p == 0x202f || p == 0x205f ||
           p == 0x3000;
}

int is_white(int32_t point) { return is_space(point) || (point >= 0x1c && point <= 0x1f); }

static int class_of(int32_t p) {
    if (is_space(p)) return SPACE;
    if (within(LETTERS, sizeof LETTERS / sizeof *LETTERS, p)) return LETTER;
    return within(NUMBERS, sizeof NUMBERS / sizeof *NUMBERS, p) ? NUMBER : OTHER;
}

int points_of(Points *p, const char *text, int64_t length) {
    const int64_t room = length + 3;
    *p = (Points){.begins = malloc(room * sizeof *p->begins),
                  .points = malloc(room * sizeof *p->points),
                  .classes = malloc(room)};
    if (!p->begins || !p->points || !p->classes) {
        free_points(p);
        return 0;
    }
    for (int64_t at = 0; at < length; p->count++) {
        p->begins[p->count] = at;
        at += decode_point((const uint8_t *)text + at, (const uint8_t *)text + length, p->points + p->count);
        p->classes[p->count] = (int8_t)class_of(p->points[p->count]);
    }
    for (int i = 0; i < 3; i++)
        p->points[p->count + i] = 0, p->classes[p->count + i] = -1, p->begins[p->count + i] = length;
    return 1;
}

void free_points(Points *p) { free(p->begins), free(p->points), free(p->classes), *p = (Points){0}; }

static int64_t run_of(const Points *p, int64_t at, int class) {
    while (p->classes[at] == class) at++;
    return at;
}

static int is_line(const Points *p, int64_t at) { return p->points[at] == '\r' || p->points[at] == '\n'; }

// The end of 's, 't, 're, 've, 'm, 'll or 'd; `at` if there is none.
static int64_t contraction(const Points *p, int64_t at, int any_case) {
    if (p->points[at] != '\'' || p->classes[at + 1] < 0) return at;
    int32_t one = p->points[at + 1], two = p->classes[at + 2] < 0 ? 0 : p->points[at + 2];
    if (any_case) {
        one = one == 0x17f ? 's' : one >= 'A' && one <= 'Z' ? one + 32 : one;  // U+017F is a small s, too
        two = two >= 'A' && two <= 'Z' ? two + 32 : two;
    }
    if (one == 's' || one == 't' || one == 'm' || one == 'd') return at + 2;
    return (one == 'r' && two == 'e') || (one == 'v' && two == 'e') || (one == 'l' && two == 'l') ? at + 3
                                                                                                  : at;
}

// White space up to a word leaves its last one to the word.
static int64_t spaces(const Points *p, int64_t at) {
    const int64_t end = run_of(p, at, SPACE);
    return p->classes[end] < 0 || end == at + 1 ? end : end - 1;
}

static int64_t gpt2_word(const Points *p, int64_t at) {
    const int64_t end = contraction(p, at, 0), next = at + (p->points[at] == ' ');
    if (end > at) return end;
    const int class = p->classes[next];
    return class >= 0 && class != SPACE ? run_of(p, next, class) : spaces(p, at);
}

static int64_t qwen2_word(const Points *p, int64_t at, int digits) {
    const int64_t end = contraction(p, at, 1), next = at + (p->points[at] == ' ');
    const int class = p->classes[at];
    if (end > at) return end;
    if (class == LETTER) return run_of(p, at, LETTER);
    if (class != NUMBER && !is_line(p, at) && p->classes[at + 1] == LETTER) return run_of(p, at + 1, LETTER);
    if (class == NUMBER) {
        int64_t last = at + 1;
        while (last < at + digits && p->classes[last] == NUMBER) last++;
        return last;
    }
    if (p->classes[next] == OTHER) {
        int64_t last = run_of(p, next, OTHER);
        while (p->classes[last] >= 0 && is_line(p, last)) last++;
        return last;
    }
    for (int64_t last = run_of(p, at, SPACE); last > at; last--)
        if (is_line(p, last - 1)) return last;
    return spaces(p, at);
}

static int64_t tiny_word(const Points *p, int64_t at) {
    const int64_t end = contraction(p, at, 0), next = at + (p->points[at] == ' ');
    if (end > at) return end;
    if (p->classes[next] == NUMBER) return next + 1;
    if (p->classes[next] == OTHER) {
        int64_t last = run_of(p, next, OTHER);
        while (p->points[last] == '\n') last++;
        return last;
    }
    for (int64_t last = run_of(p, at, SPACE); last > at; last--)
        if (p->points[last - 1] == '\n') return last;
    return gpt2_word(p, at);
}

int64_t word_end(Cuts cuts, const Points *p, int64_t at) {
    if (cuts == WHOLE) return p->count;
    if (cuts == TINY) return tiny_word(p, at);
    return cuts == GPT2 ? gpt2_word(p, at) : qwen2_word(p, at, cuts == QWEN2 ? 1 : 3);
}
