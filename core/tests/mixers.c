// Mixers: Mamba-2 is right; all are the same however a text is cut into calls, and bit for bit what they were
// when tokens are forgotten.

#include "models.h"

enum { T = 45 };

static double softplus_reference(double x) { return log1p(exp(x)); }

// One mixer over T tokens h (T, D), in place. `window` (taps - 1, C) and `state` (H, P, N) begin as zeros.
static void mixer_reference(const Shape *s, const Layer *l, double *h, double *window, double *state) {
    const int64_t D = s->hidden, H = s->mixers, P = s->inner, G = s->groups, N = s->states, W = s->taps,
                  E = H * P, C = E + 2 * G * N;
    double x[512], in[1024], conv[512], y[512];
    for (int64_t t = 0; t < T; t++) {
        norm_reference(h + t * D, l->norm, EPS, x, D);
        product_reference(&l->in, x, in);
        for (int64_t c = 0; c < C; c++) {
            conv[c] = l->conv_bias ? l->conv_bias[c] : 0;
            for (int64_t tap = 0; tap < W; tap++)
                conv[c] += l->conv[tap * C + c] * (tap < W - 1 ? window[tap * C + c] : in[E + c]);
            conv[c] = silu_reference(conv[c]);
        }
        memmove(window, window + C, (W - 2) * C * sizeof *window);
        memcpy(window + (W - 2) * C, in + E, C * sizeof *window);
        for (int64_t i = 0; i < E; i++) {
            const int64_t head = i / P;
            const double *B = conv + E + head / (H / G) * N, *read = B + G * N;
            const double dt =
                fmin(fmax(softplus_reference(in[E + C + head] + l->dt_bias[head]), DT_LOW), DT_HIGH);
            double sum = l->skip[head] * conv[i], *own = state + i * N;
            for (int64_t n = 0; n < N; n++) {
                own[n] = own[n] * exp(dt * l->decay[head]) + dt * conv[i] * B[n];
                sum += own[n] * read[n];
            }
            y[i] = sum * silu_reference(in[i]);
        }
        for (int64_t g = 0; g < G; g++)
            norm_reference(y + g * E / G, l->gated_norm + g * E / G, EPS, y + g * E / G, E / G);
        product_reference(&l->out, y, x);
        for (int64_t k = 0; k < D; k++) h[t * D + k] += x[k];
    }
}

static void one_call_is_right(const Tiny *t, offramp_session *session, const float *given, float *h,
                              double tolerance) {
    const Shape *s = &t->shape;
    const int64_t D = s->hidden, C = s->mixers * s->inner + 2 * s->groups * s->states;
    const int64_t windows = (s->taps - 1) * C, states = s->mixers * s->inner * s->states;
    double *wanted = memory(T * D * sizeof *wanted);
    for (int64_t i = 0; i < T * D; i++) wanted[i] = given[i];
    memcpy(h, given, T * D * 4);
    run_rows(t, session, h, T);
    for (int64_t i = 0; i < t->count; i++) {
        double *window = memory(windows * sizeof *window), *state = memory(states * sizeof *state);
        float *own_window = zeros(windows), *own_state = zeros(states);
        mixer_reference(s, t->layers + i, wanted, window, state);
        WORKS(offramp_session_state(session, i, own_window, own_state, &said));
        CHECK(distance(own_window, window, windows) < tolerance, "the window of block %d", (int)i);
        CHECK(distance(own_state, state, states) < tolerance, "the state of block %d", (int)i);
    }
    for (int64_t r = 0; r < T; r++) {
        const double apart = distance(h + r * D, wanted + r * D, D);
        CHECK(apart < tolerance, "token %d: %g", (int)r, apart);
    }
}

// In calls of a few rows, and side by side with another session, rows and memories are the same, bit for bit.
static void cuts_do_not_matter(const Tiny *t, const offramp_session *whole, const float *given,
                               const float *wanted, int64_t most) {
    const int64_t D = t->shape.hidden;
    offramp_session *session = session_of(t, OFFRAMP_FLOAT32), *other = session_of(t, OFFRAMP_FLOAT32);
    float *h = zeros(2 * T * D);
    for (int64_t r = 0, count; r < T; r += count) {
        count = 1 + below(most);
        count = count > T - r ? T - r : count;
        memcpy(h, given, count * D * 4), memcpy(h + count * D, given + r * D, count * D * 4);
        const offramp_rows rows[] = {{other, 0, count}, {session, r, count}};
        WORKS(offramp_run(t->model, 0, t->count, rows, 2, h, &said));
        CHECK(same(h + count * D, wanted + r * D, count * D), "%d rows from position %d on", (int)count,
              (int)r);
    }
    CHECK(all_the_same(t, whole, session), "what is remembered, with up to %d rows", (int)most);
    offramp_session_free(session), offramp_session_free(other);
}

// A mixer that forgets what it took in during a watch is what it was before, and goes on as if nothing had
// been there.
static void forgetting_leaves_nothing(const Tiny *t, const float *given, const float *wanted) {
    const int64_t D = t->shape.hidden, before = 11;
    for (int64_t stay = 0; stay <= 14; stay++) {
        offramp_session *session = session_of(t, OFFRAMP_FLOAT32), *fresh = session_of(t, OFFRAMP_FLOAT32);
        float *h = copied(given, T * D), *spoilt = randoms(20 * D, -1, 1);
        run_rows(t, session, h, before);
        WORKS(offramp_session_watch(session, 0, t->count, &said));
        run_rows(t, session, h + before * D, stay / 2),
            run_rows(t, session, h + (before + stay / 2) * D, stay - stay / 2);
        offramp_session *fork = offramp_session_fork(session, &said);
        MADE(fork);
        run_rows(t, session, spoilt, 7), run_rows(t, session, spoilt + 7 * D, 1),
            run_rows(t, session, spoilt + 8 * D, 12);
        run_rows(t, fork, copied(spoilt, D), 1);
        WORKS(offramp_session_crop(session, before + stay, 0, t->count, &said));
        WORKS(offramp_session_crop(fork, before + stay, 0, t->count, &said));
        run_rows(t, fresh, copied(given, T * D), before + stay);
        CHECK(all_the_same(t, session, fresh), "%d tokens stay", (int)stay);
        CHECK(all_the_same(t, fork, fresh), "%d tokens of a fork stay", (int)stay);
        REFUSED(offramp_session_crop(session, before - 1, 0, t->count, &said));
        WORKS(offramp_session_crop(fork, before, 0, t->count, &said));
        offramp_session_settle(session);
        REFUSED(offramp_session_crop(session, before + stay - 1, 0, t->count, &said));
        CHECK(all_the_same(t, session, fresh), "a refused crop changed something");
        run_rows(t, session, h + (before + stay) * D, T - before - stay);
        CHECK(same(h + (before + stay) * D, wanted + (before + stay) * D, (T - before - stay) * D),
              "it goes on differently");
        offramp_session_free(session), offramp_session_free(fresh), offramp_session_free(fork);
    }
}

static void test_of(Shape shape) {
    const Tiny t = tiny(shape);
    const int64_t D = shape.hidden;
    const float *given = randoms(T * D, -1, 1);
    float *h = copied(given, T * D);
    offramp_session *session = session_of(&t, OFFRAMP_FLOAT32), *told = session_of(&t, OFFRAMP_FLOAT32);
    if (strspn(shape.blocks, "m") == strlen(shape.blocks))
        one_call_is_right(&t, session, given, h, shape.type == OFFRAMP_FLOAT32 ? 1e-4 : 5e-2);
    else
        run_rows(&t, session, h, T);  // tests/ compares these with the library's
    for (int threads = 1; threads <= 3; threads++) {
        WORKS(offramp_model_threads(t.model, threads, &said));
        cuts_do_not_matter(&t, session, given, h, 1);
        cuts_do_not_matter(&t, session, given, h, 19);
        forgetting_leaves_nothing(&t, given, h);
    }
    // Only remembered, the first block has the same memory, also in two parts.
    const offramp_rows rows = {told, 0, T};
    WORKS(offramp_remember(t.model, 0, t.count, &rows, 1, OFFRAMP_KEYS, given, &said));
    WORKS(offramp_remember(t.model, 0, t.count, &rows, 1, OFFRAMP_STATES, given, &said));
    CHECK(remember_the_same(&t, session, told, 0), "remembered differently");
    REFUSED(offramp_remember(t.model, 0, t.count, &rows, 1, 0, given, &said));
    REFUSED(offramp_remember(t.model, 0, t.count, &rows, 1, 4, given, &said));
    offramp_session_free(session), offramp_session_free(told);
    offramp_model_free(t.model);
}

// More rows than pass together.
static void long_texts_are_cut(void) {
    Shape shape = SMALL;
    shape.blocks = "m";
    const Tiny t = tiny(shape);
    offramp_session *session = session_of(&t, OFFRAMP_FLOAT32), *bit = session_of(&t, OFFRAMP_FLOAT32);
    const float *given = randoms(600 * 32, -1, 1);
    float *h = copied(given, 600 * 32), *other = copied(given, 600 * 32);
    WORKS(offramp_session_watch(session, 0, 1, &said));
    run_rows(&t, session, h, 600);
    run_rows(&t, bit, other, 100), run_rows(&t, bit, other + 100 * 32, 200),
        run_rows(&t, bit, other + 300 * 32, 300);
    CHECK(same(h, other, 600 * 32) && all_the_same(&t, session, bit), "600 rows in one call");
    WORKS(offramp_session_crop(session, 300, 0, 1, &said));
    run_rows(&t, session, copied(given + 300 * 32, 300 * 32), 300);
    CHECK(all_the_same(&t, session, bit), "600 rows of a watch, of which 300 were forgotten");
    offramp_session_free(session), offramp_session_free(bit);
    offramp_model_free(t.model);
}

int main(void) {
    Shape plain = SMALL, odd = SMALL, large = SMALL, whole = SMALL;
    plain.blocks = "mm", plain.bias = 1;
    test_of(plain);
    odd.blocks = "mm", odd.mixers = 3, odd.groups = 1, odd.inner = 5, odd.states = 8, odd.taps = 2,
    odd.hidden = 24;
    test_of(odd);
    large.blocks = "m", large.mixers = 2, large.states = 136, large.taps = 7, large.groups = 1;
    test_of(large);
    Shape mamba = SMALL, conv = SMALL, both = SMALL;
    mamba.blocks = "pp", mamba.bias = 1;
    test_of(mamba);
    mamba.norms = 1, mamba.states = 24, mamba.inner = 5;
    test_of(mamba);
    conv.blocks = "qq", conv.taps = 3;
    test_of(conv);
    both.blocks = "sq", both.positions = T + 1;
    test_of(both);
    whole.blocks = "m", whole.type = OFFRAMP_INT8, whole.fine = 1;
    test_of(whole);
    whole.type = OFFRAMP_Q4_1;
    test_of(whole);
    whole.type = OFFRAMP_BFLOAT16;
    test_of(whole);
    long_texts_are_cut();
    return 0;
}
