// Sessions: what they remember, forget, copy and fork; and calls that are refused.

#include "models.h"

static Tiny model_of(const char *blocks, int64_t window) {
    Shape shape = SMALL;
    shape.blocks = blocks, shape.window = window;
    return tiny(shape);
}

static void run_randoms(const Tiny *t, offramp_session *session, int64_t count) {
    float *h = malloc(count * 32 * 4 + 1);
    for (int64_t i = 0; i < count * 32; i++) h[i] = uniform(-1, 1);
    run_rows(t, session, h, count);
    free(h);
}

// Whether both answer the same rows, now, with the same bits.
static void go_on_alike(const Tiny *t, offramp_session *a, offramp_session *b, int64_t count) {
    const float *given = randoms(count * 32, -1, 1);
    float *of_a = copied(given, count * 32), *of_b = copied(given, count * 32);
    run_rows(t, a, of_a, count), run_rows(t, b, of_b, count);
    CHECK(same(of_a, of_b, count * 32) && all_the_same(t, a, b), "two sessions go on differently");
}

// Two sessions remember the same, and so do their forks, which go on alike.
static void forks_are_alike(const Tiny *t, const offramp_session *a, const offramp_session *b) {
    CHECK(all_the_same(t, a, b), "two sessions differ");
    offramp_session *of_a = offramp_session_fork(a, &said), *of_b = offramp_session_fork(b, &said);
    MADE(of_a);
    MADE(of_b);
    CHECK(all_the_same(t, of_a, b), "a fork differs");
    go_on_alike(t, of_a, of_b, 2);
    offramp_session_free(of_a), offramp_session_free(of_b);
}

// A fork goes on by itself; it is as large as it says.
static void forks_are_independent(const char *blocks, offramp_type keys) {
    const Tiny t = model_of(blocks, 20);
    for (int64_t length = 0; length < 400; length += 1 + length) {
        offramp_session *a = offramp_session_new(t.model, keys, 4, &said), *b, *c;
        run_randoms(&t, a, length);
        b = offramp_session_fork(a, &said), c = offramp_session_fork(a, &said);
        MADE(b);
        MADE(c);
        CHECK(all_the_same(&t, a, b), "a fork of %d tokens", (int)length);
        const int64_t bytes = offramp_session_bytes(a);
        CHECK(offramp_session_bytes(b) == bytes && (length ? bytes > 0 : bytes >= 0), "%d bytes", (int)bytes);
        run_randoms(&t, b, 9);
        CHECK(all_the_same(&t, a, c), "a fork's tokens went to its origin");
        go_on_alike(&t, a, c, 70);
        offramp_session_free(a), offramp_session_free(b);
        run_randoms(&t, c, 5);
        offramp_session_free(c);
    }
    offramp_model_free(t.model);
}

// A cropped session goes on as one that never had more.
static void crops_leave_nothing(offramp_type keys) {
    const Tiny t = model_of("ab", 0);
    offramp_session *a = session_of(&t, keys), *b = session_of(&t, keys), *before;
    const float *given = randoms(90 * 32, -1, 1);
    run_rows(&t, a, copied(given, 90 * 32), 90), run_rows(&t, b, copied(given, 37 * 32), 37);
    before = offramp_session_fork(a, &said);
    CHECK(offramp_session_can_forget(a, 37) && offramp_session_can_forget(a, 0), "attention can forget");
    CHECK(!offramp_session_can_forget(a, -1), "there are no tokens before the first");
    REFUSED(offramp_session_crop(a, -1, 0, 2, &said));
    REFUSED(offramp_session_crop(a, INT64_MIN, 0, 2, &said));
    REFUSED(offramp_session_crop(a, 5, -1, 2, &said));
    REFUSED(offramp_session_crop(a, 5, 0, 3, &said));
    REFUSED(offramp_session_crop(a, 5, 2, 1, &said));
    CHECK(all_the_same(&t, a, before), "a refused crop changed something");
    WORKS(offramp_session_crop(a, 91, 0, 2, &said));
    CHECK(offramp_session_length(a, 0) == 90, "a crop made a text longer");
    WORKS(offramp_session_crop(a, 37, 0, 1, &said));
    CHECK(offramp_session_length(a, 0) == 37 && offramp_session_length(a, 1) == 90, "a crop of one block");
    WORKS(offramp_session_crop(a, 37, 1, 2, &said));
    go_on_alike(&t, a, b, 40);
    WORKS(offramp_session_crop(a, 0, 0, 2, &said));
    offramp_session_free(b);
    b = session_of(&t, keys);
    go_on_alike(&t, a, b, 3);
    offramp_session_free(a), offramp_session_free(b), offramp_session_free(before);
    offramp_model_free(t.model);
}

// In a hybrid, blocks forget together or not at all.
static void hybrids_forget_together(void) {
    const Tiny t = model_of("am", 0);
    offramp_session *a = session_of(&t, OFFRAMP_FLOAT32), *b;
    run_randoms(&t, a, 10);
    CHECK(!offramp_session_can_forget(a, 10), "a mixer cannot forget");
    b = offramp_session_fork(a, &said);
    REFUSED(offramp_session_crop(a, 9, 0, 2, &said));
    CHECK(all_the_same(&t, a, b), "attention has forgotten, and the mixer not");
    WORKS(offramp_session_crop(a, 10, 0, 2, &said));
    REFUSED(offramp_session_watch(a, 0, 3, &said));
    WORKS(offramp_session_watch(a, 0, 2, &said));
    run_randoms(&t, a, 5);
    WORKS(offramp_session_watch(a, 0, 2, &said));  // there is one: it goes on
    run_randoms(&t, a, 5);
    REFUSED(offramp_session_crop(a, 9, 0, 2, &said));
    REFUSED(offramp_session_crop(a, -1, 0, 2, &said));
    WORKS(offramp_session_crop(a, 10, 0, 2, &said));
    CHECK(all_the_same(&t, a, b), "back where the watch began");
    go_on_alike(&t, a, b, 6);
    offramp_session_settle(a), offramp_session_settle(a);
    offramp_session_free(a), offramp_session_free(b);
    offramp_model_free(t.model);
}

// The state of a watched mixer is that of one that is not watched: at the beginning, after some tokens, where
// they are forgotten half-way or wholly, again and again, and after the watch; and so are forks of it at each
// of these points.
static void watches_change_nothing(void) {
    const Tiny t = model_of("nm", 0);
    const float *given = randoms(40 * 32, -1, 1), *spoilt = randoms(8 * 32, -1, 1);
    for (int64_t known = 0; known <= 9; known += 3) {
        offramp_session *watched = session_of(&t, OFFRAMP_FLOAT32), *plain = session_of(&t, OFFRAMP_FLOAT32);
        run_rows(&t, watched, copied(given, 40 * 32), known),
            run_rows(&t, plain, copied(given, 40 * 32), known);
        for (int64_t round = 0, at = known; round < 12; round++) {
            const int64_t stay = below(3), spoils = below(8 - stay) + !stay;
            if (round % 4 == 0) WORKS(offramp_session_watch(watched, 0, 2, &said));
            forks_are_alike(&t, watched, plain);
            run_rows(&t, watched, copied(given + at * 32, 3 * 32), stay);
            run_rows(&t, watched, copied(spoilt, 8 * 32), spoils);
            WORKS(offramp_session_crop(watched, at + stay, 0, 2, &said));
            run_rows(&t, plain, copied(given + at * 32, 3 * 32), stay), at += stay;
            forks_are_alike(&t, watched, plain);
            if (below(2)) offramp_session_settle(watched), offramp_session_watch(watched, 0, 2, &said);
            if (round % 4 == 1) WORKS(offramp_session_crop(watched, at, 0, 2, &said));
            if (round % 4 == 3) offramp_session_settle(watched);
            forks_are_alike(&t, watched, plain);
        }
        offramp_session_free(watched), offramp_session_free(plain);
    }
    offramp_model_free(t.model);
}

// A watch that goes on can go back to its beginning, and to any token since then, also in a fork.
static void watches_go_back(void) {
    const Tiny t = model_of("mn", 0);
    const float *given = randoms(20 * 32, -1, 1);
    offramp_session *s = session_of(&t, OFFRAMP_FLOAT32), *fork;
    run_rows(&t, s, copied(given, 20 * 32), 5);
    WORKS(offramp_session_watch(s, 0, 2, &said));
    for (int64_t length = 15; length >= 5; length -= 2) {
        const int64_t now = offramp_session_length(s, 0);
        run_rows(&t, s, copied(given + now * 32, (20 - now) * 32), 20 - now);
        fork = offramp_session_fork(s, &said);
        offramp_session *of_both[] = {s, fork}, *plain = session_of(&t, OFFRAMP_FLOAT32);
        run_rows(&t, plain, copied(given, 20 * 32), length);
        for (int i = 0; i < 2; i++) {
            WORKS(offramp_session_crop(of_both[i], length, 0, 2, &said));
            CHECK(all_the_same(&t, of_both[i], plain), "back at %d tokens", (int)length);
            REFUSED(offramp_session_crop(of_both[i], 4, 0, 2, &said));
        }
        go_on_alike(&t, fork, plain, 3);
        offramp_session_free(fork), offramp_session_free(plain);
    }
    offramp_session_free(s);
    offramp_model_free(t.model);
}

// A window that slides lets go of old keys, and rows come out as if it had not.
static void windows_slide(offramp_type keys) {
    const int64_t window = 30, length = 1200;
    const Tiny t = model_of("ab", window);
    offramp_session *small = session_of(&t, keys), *large = session_of(&t, keys), *before;
    const float *given = randoms(length * 32, -1, 1);
    float *h = copied(given, length * 32), *other = copied(given, length * 32);
    run_rows(&t, large, other, length);
    for (int64_t r = 0; r < length; r += 40) run_rows(&t, small, h + r * 32, 40);
    CHECK(same(h, other, length * 32), "rows of a window that slid");
    const int64_t first = offramp_session_first(small, 0);
    CHECK(first > 0 && first <= length - window, "keys from position %d on", (int)first);
    CHECK(offramp_session_bytes(small) < offramp_session_bytes_for(small, length),
          "it keeps more than it said");
    CHECK(offramp_session_bytes_for(small, length) == offramp_session_bytes_for(small, 10 * length),
          "a window has a limit");
    // What no longer has its window cannot be gone back to.
    before = offramp_session_fork(small, &said);
    float *row = copied(given, 32), *kept = zeros(2000 * 64);
    REFUSED(offramp_session_crop(small, first, 0, 2, &said));
    CHECK(!offramp_session_can_forget(small, first + window - 1), "it cannot forget so much");
    REFUSED(offramp_session_keys(small, 0, first - 1, kept, &said));
    REFUSED(offramp_run(t.model, 0, 2, &(offramp_rows){small, 0, 1}, 1, row, &said));
    REFUSED(offramp_run(t.model, 0, 2, &(offramp_rows){small, first + 1, 1}, 1, row, &said));
    REFUSED(
        offramp_remember(t.model, 0, 2, &(offramp_rows){small, first - 1, 1}, 1, OFFRAMP_BOTH, row, &said));
    CHECK(same(row, given, 32) && all_the_same(&t, small, before), "a refused call changed something");
    const int64_t back = first + window;
    CHECK(offramp_session_can_forget(small, back), "it can forget these");
    WORKS(offramp_session_crop(small, back, 0, 2, &said));
    WORKS(offramp_session_crop(large, back, 0, 2, &said));
    go_on_alike(&t, small, large, 100);
    offramp_session_free(small), offramp_session_free(large), offramp_session_free(before);
    offramp_model_free(t.model);
}

// Copied keys are those of the other block.
static void keys_are_copied(offramp_type keys, int64_t window) {
    const Tiny t = model_of("bbm", window);
    const int64_t each = 2 * t.shape.heads * t.shape.dim;
    offramp_session *s = session_of(&t, keys), *before;
    float *h = randoms(500 * 32, -1, 1), *of_first = zeros(500 * each), *of_second = zeros(600 * each);
    WORKS(offramp_session_copy(s, 0, 1, 0, &said));
    WORKS(offramp_session_keys(s, 0, 0, of_first, &said));
    const offramp_rows rows = {s, 0, 500};
    WORKS(offramp_run(t.model, 0, 1, &rows, 1, h, &said));
    WORKS(offramp_run(t.model, 1, 2, &(offramp_rows){s, 0, 7}, 1, h, &said));
    WORKS(offramp_session_copy(s, 0, 1, 33, &said));
    CHECK(offramp_session_length(s, 1) == 40, "33 keys were copied");
    WORKS(offramp_session_keys(s, 0, 500 - 33, of_first, &said));
    WORKS(offramp_session_keys(s, 1, 7, of_second, &said));
    CHECK(same(of_first, of_second, 33 * each), "other keys");
    before = offramp_session_fork(s, &said);
    static const int64_t wrong[][3] = {
        {0, 2, 1},         {2, 0, 1},         {0, 3, 1},         {-1, 1, 1},        {0, 1, -1}, {0, 1, 501},
        {INT64_MAX, 1, 1}, {0, INT64_MAX, 1}, {0, 1, INT64_MAX}, {0, 1, INT64_MIN}, {0, 0, 1}};
    for (int i = 0; i < 11; i++)
        REFUSED(offramp_session_copy(s, wrong[i][0], wrong[i][1], wrong[i][2], &said));
    CHECK(all_the_same(&t, s, before), "a refused copy changed something");
    // The buffer grows, or the window slides.
    for (int i = 0; i < 8; i++) {
        const int64_t length = offramp_session_length(s, 1);
        WORKS(offramp_session_keys(s, 0, 500 - 200, of_first, &said));
        WORKS(offramp_session_copy(s, 0, 1, 200, &said));
        WORKS(offramp_session_keys(s, 1, length, of_second, &said));
        CHECK(offramp_session_length(s, 1) == length + 200 && same(of_first, of_second, 200 * each),
              "200 keys more");
    }
    CHECK((offramp_session_first(s, 1) > 0) == (window > 0), "keys from position %d on",
          (int)offramp_session_first(s, 1));
    offramp_session_free(s), offramp_session_free(before);
    offramp_model_free(t.model);
}

// Memory is reserved, and a model lives as long as its sessions.
static void memory_is_as_said(void) {
    const Tiny t = model_of("am", 0);
    offramp_session *a = offramp_session_new(t.model, OFFRAMP_BFLOAT16, -3, &said);
    MADE(a);
    const int64_t key = 2 * 2 * 8 * 2, mixer = (3 * 96 + 32 * 16) * 4;
    CHECK(offramp_session_bytes_for(a, 100) == 100 * key + 2 * mixer, "%d bytes for 100 tokens",
          (int)offramp_session_bytes_for(a, 100));
    run_randoms(&t, a, 5);
    offramp_session_reserve(a, 300), offramp_session_reserve(a, 2);
    run_randoms(&t, a, 20);
    CHECK(offramp_session_bytes(a) == 25 * key + mixer, "%d bytes of 25 tokens",
          (int)offramp_session_bytes(a));
    CHECK(offramp_session_length(a, -1) == -1 && offramp_session_length(a, 2) == -1,
          "blocks that are not there");
    CHECK(offramp_session_first(a, 0) == 0 && offramp_session_first(a, 1) == -1 &&
              offramp_session_first(a, 9) == -1,
          "first keys");
    offramp_model_free(t.model);
    run_randoms(&t, a, 3);
    offramp_session *b = offramp_session_fork(a, &said);
    offramp_session_free(a);
    run_randoms(&t, b, 3);
    CHECK(offramp_session_length(b, 1) == 31, "a session after its model");
    offramp_session_free(b);
    offramp_session_free(NULL), offramp_model_free(NULL), offramp_part_free(NULL);
}

// Wrong calls are refused, and change nothing.
static void wrong_calls_are_refused(void) {
    const Tiny t = model_of("am", 0), other = model_of("m", 0);
    NOT_MADE(offramp_session_new(t.model, OFFRAMP_INT8, 4, &said));
    offramp_session *s = session_of(&t, OFFRAMP_FLOAT32), *stranger = session_of(&other, OFFRAMP_FLOAT32),
                    *before;
    run_randoms(&t, s, 6);
    before = offramp_session_fork(s, &said);
    float *h = randoms(64, -1, 1), *given = copied(h, 64), *keys = zeros(1000);
    const struct {
        int64_t start, stop, first, count;
    } wrong[] = {{-1, 2, 6, 1},        {0, 3, 6, 1},         {2, 1, 6, 1},
                 {INT64_MIN, 2, 6, 1}, {0, INT64_MAX, 6, 1}, {0, 2, 7, 1},
                 {0, 2, -1, 1},        {0, 2, 6, -1},        {0, 2, INT64_MIN, INT64_MIN},
                 {1, 2, INT64_MAX, 1}, {1, 2, 6, INT64_MAX}, {0, 2, INT64_MAX, 1}};
    for (int i = 0; i < 12; i++) {
        const offramp_rows rows = {s, wrong[i].first, wrong[i].count};
        REFUSED(offramp_run(t.model, wrong[i].start, wrong[i].stop, &rows, 1, h, &said));
        REFUSED(offramp_remember(t.model, wrong[i].start, wrong[i].stop, &rows, 1, OFFRAMP_BOTH, h, &said));
    }
    const offramp_rows twice[] = {{s, 6, 1}, {s, 6, 1}}, strange[] = {{s, 6, 1}, {stranger, 0, 1}},
                       none[] = {{NULL, 0, 1}};
    REFUSED(offramp_run(t.model, 0, 2, twice, 2, h, &said));
    REFUSED(offramp_run(t.model, 0, 2, strange, 2, h, &said));
    REFUSED(offramp_run(t.model, 0, 2, none, 1, h, &said));
    REFUSED(offramp_session_keys(s, 1, 0, keys, &said));
    REFUSED(offramp_session_keys(s, 0, 7, keys, &said));
    REFUSED(offramp_session_keys(s, 0, -1, keys, &said));
    REFUSED(offramp_session_keys(s, INT64_MAX, 0, keys, &said));
    REFUSED(offramp_session_state(s, 0, keys, keys, &said));
    REFUSED(offramp_session_state(s, 2, keys, keys, &said));
    REFUSED(offramp_session_state(s, INT64_MAX, keys, keys, &said));
    CHECK(same(h, given, 64) && all_the_same(&t, s, before), "a refused call changed something");
    WORKS(offramp_run(t.model, 1, 1, &(offramp_rows){s, 6, 1}, 1, h, &said));
    CHECK(same(h, given, 64), "no block was to be run");
    WORKS(offramp_run(t.model, 0, 2, &(offramp_rows){s, 6, 0}, 1, h, &said));
    WORKS(offramp_run(t.model, 0, 2, NULL, 0, h, &said));
    CHECK(same(h, given, 64) && all_the_same(&t, s, before), "calls without rows");
    offramp_session_free(s), offramp_session_free(stranger), offramp_session_free(before);
    offramp_model_free(t.model), offramp_model_free(other.model);
}

// Attention that knows positions needs its table, which has no more frequencies than heads have pairs of dims.
static void positions_need_their_table(void) {
    Shape shape = SMALL;
    shape.blocks = "a", shape.positions = 1;
    const Tiny t = tiny(shape);
    offramp_session *s = session_of(&t, OFFRAMP_FLOAT32);
    float h[32] = {0}, wide[16] = {0};
    REFUSED(offramp_model_rotary(t.model, 1, wide, shape.dim / 2 + 1, 1, &said));
    REFUSED(offramp_model_rotary(t.model, 3, wide, 1, 1, &said));
    run_randoms(&t, s, 300);
    REFUSED(offramp_run(t.model, 0, 1, &(offramp_rows){s, 300, INT32_MAX}, 1, h, &said));
    offramp_session_free(s);
    offramp_model_free(t.model);
}

int main(void) {
    for (offramp_type keys = OFFRAMP_FLOAT32; keys <= OFFRAMP_BFLOAT16; keys++) {
        forks_are_independent("ab", keys);
        forks_are_independent("bmn", keys);
        crops_leave_nothing(keys);
        windows_slide(keys);
        keys_are_copied(keys, 0), keys_are_copied(keys, 25);
    }
    hybrids_forget_together();
    watches_change_nothing();
    watches_go_back();
    memory_is_as_said();
    wrong_calls_are_refused();
    positions_need_their_table();
    return 0;
}
