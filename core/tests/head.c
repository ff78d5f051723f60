// The head: logits, a sketch's candidates, the choice of a token; and gates.

#include "head.h"

#include "models.h"

static Tiny model_of(int type, int64_t vocabulary, const char *blocks) {
    Shape shape = SMALL;
    shape.blocks = blocks, shape.type = type, shape.vocabulary = vocabulary;
    return tiny(shape);
}

static void logits_reference(const Tiny *t, const float *h, double *y) {
    double x[256];
    for (int64_t k = 0; k < t->shape.hidden; k++) x[k] = h[k];
    norm_reference(x, t->norm, EPS, x, t->shape.hidden);
    product_reference(&t->head, x, y);
}

static void logits_are_right(void) {
    for (int type = OFFRAMP_FLOAT32; type <= OFFRAMP_INT4; type++) {
        const Tiny t = model_of(type, 1100, "");
        const int64_t V = 1100, R = 300;
        float *h = randoms(R * 32, -1, 1), *y = zeros(R * V), *alone = zeros(V);
        double *wanted = memory(V * 8);
        WORKS(offramp_logits(t.model, NULL, h, R, y, &said));
        for (int64_t r = 0; r < R; r += 29) {
            logits_reference(&t, h + r * 32, wanted);
            const double apart = distance(y + r * V, wanted, V);
            CHECK(apart < (type == OFFRAMP_FLOAT32 ? 1e-5 : 2e-2), "row %d, type %d: %g", (int)r, type,
                  apart);
            WORKS(offramp_logits(t.model, NULL, h + r * 32, 1, alone, &said));
            CHECK(same(alone, y + r * V, V), "row %d alone, type %d", (int)r, type);
        }
        offramp_model_free(t.model);
    }
}

typedef struct {
    offramp_weight reduce, expand;
    offramp_part *part;
} Sketched;

static Sketched sketch_of(int type, int64_t V, int64_t k, int64_t candidates) {
    Sketched s = {weight_of(OFFRAMP_FLOAT32, 0, k, 32, 0), weight_of(type, 0, V, k, 0), new_part("sketch")};
    give(s.part, "reduce", &s.reduce), give(s.part, "expand", &s.expand),
        give_number(s.part, "candidates", (double)candidates);
    return s;
}

// The estimates are products, which products.c tests; the candidates are their n largest, with the whole
// head's logits.
static void candidates_are(const Tiny *t, const Sketched *s, const float *h, int64_t R, int64_t n) {
    const int64_t V = t->shape.vocabulary, k = s->reduce.rows;
    float *y = zeros(R * V), *whole = zeros(R * V), *x = zeros(R * 32), *z = zeros(R * k),
          *estimates = zeros(R * V);
    for (int64_t r = 0; r < R; r++) rms_norm(h + r * 32, t->norm, EPS, x + r * 32, 32);
    WORKS(offramp_product(t->model, &s->reduce, x, R, z, &said));
    WORKS(offramp_product(t->model, &s->expand, z, R, estimates, &said));
    WORKS(offramp_logits(t->model, NULL, h, R, whole, &said));
    WORKS(offramp_logits(t->model, s->part, h, R, y, &said));
    for (int64_t r = 0; r < R; r++) {
        float least = INFINITY, most = -INFINITY;
        int64_t count = 0;
        for (int64_t v = r * V; v < (r + 1) * V; v++) {
            const int chosen = y[v] > -INFINITY;
            CHECK(!chosen || y[v] == whole[v], "a candidate's logit is %g and not %g", y[v], whole[v]);
            if (chosen)
                count++, least = fminf(least, estimates[v]);
            else
                most = fmaxf(most, estimates[v]);
        }
        CHECK(least > most || count == V, "a candidate of row %d has the estimate %g, another token %g",
              (int)r, least, most);
        CHECK(count == n, "%d candidates and not %d of %d in row %d", (int)count, (int)n, (int)V, (int)r);
    }
}

static void candidates_are_the_likeliest(void) {
    static const int64_t vocabularies[] = {5, 50, 1023, 1024, 2500}, wanted[] = {1, 3, 12, 40, 1000, 2500};
    for (int i = 0; i < 5; i++) {
        const int64_t V = vocabularies[i];
        const Tiny t = model_of(i % 2 ? OFFRAMP_INT8 : OFFRAMP_FLOAT32, V, "");
        const float *h = randoms(5 * 32, -1, 1);
        for (int j = 0; j < 6; j++) {
            const int64_t n = wanted[j] < V ? wanted[j] : V;
            const Sketched s = sketch_of(OFFRAMP_FLOAT32, V, 8, n);
            for (int threads = 1; threads <= 3; threads++) {
                WORKS(offramp_model_threads(t.model, threads, &said));
                candidates_are(&t, &s, h, threads == 1 ? 1 : 5, n);
            }
            offramp_part_free(s.part);
        }
        offramp_model_free(t.model);
    }
}

// One of 16 estimates is looked at first. Where these are the largest, or the smallest, candidates are the
// same.
static void samples_do_not_mislead(void) {
    for (int sign = -1; sign <= 1; sign += 2) {
        const int64_t V = 3000;
        const Tiny t = model_of(OFFRAMP_FLOAT32, V, "");
        const Sketched s = sketch_of(OFFRAMP_FLOAT32, V, 8, 100);
        for (int64_t v = 0; v < V; v += 16)
            for (int k = 0; k < 8; k++) ((float *)s.expand.values)[v * 8 + k] *= sign > 0 ? 30 : 0.001f;
        candidates_are(&t, &s, randoms(4 * 32, -1, 1), 4, 100);
        offramp_part_free(s.part);
        offramp_model_free(t.model);
    }
}

// Of equal estimates all are candidates; a NaN is found.
static void equal_estimates_are_all_taken(void) {
    const Tiny t = model_of(OFFRAMP_FLOAT32, 200, "");
    const Sketched s = sketch_of(OFFRAMP_FLOAT32, 200, 8, 3);
    memset((void *)s.expand.values, 0, 200 * 8 * 4);
    float *h = randoms(32, -1, 1), y[200], whole[200];
    WORKS(offramp_logits(t.model, NULL, h, 1, whole, &said));
    WORKS(offramp_logits(t.model, s.part, h, 1, y, &said));
    CHECK(same(y, whole, 200), "equal estimates");
    h[3] = NAN;
    WORKS(offramp_logits(t.model, s.part, h, 1, y, &said));
    int found = 0;
    for (int v = 0; v < 200; v++) found += isnan(y[v]);
    CHECK(found, "a NaN is lost");
    offramp_part_free(s.part);
    offramp_model_free(t.model);
}

static void the_first_of_equals_is_best(void) {
    float y[100];
    for (int count = 1; count < 100; count += 7)
        for (int from = 0; from < 3 && from < count; from++) {
            for (int i = 0; i < 100; i++) y[i] = uniform(-1, 0);
            for (int i = count; i < 100; i++) y[i] = 9;  // beyond the end
            const int at = from + (int)below(count - from), again = at + (int)below(count - at);
            y[at] = y[again] = 1;
            const Best best = best_of(y, from, count);
            CHECK(best.id == at && best.logit == 1, "%d and not %d of %d", best.id, at, count);
            y[at] = NAN;
            CHECK(isnan(best_of(y, from, count).logit), "the NaN at %d of %d", at, count);
            for (int i = 0; i < count; i++) y[i] = -INFINITY;
            CHECK(best_of(y, from, count).id == from && best_of(y, from, count).logit == -INFINITY,
                  "all are -inf");
        }
    const Best bests[] = {{1, 4}, {3, 9}, {3, 12}, {2, 20}}, bad[] = {{1, 4}, {NAN, 9}, {3, 12}},
               first[] = {{NAN, 4}, {3, 9}};
    CHECK(best_among(bests, 4).id == 9, "the first of equals among pieces");
    CHECK(isnan(best_among(bad, 3).logit) && isnan(best_among(first, 2).logit), "a NaN among pieces");
}

// Gates -------------------------------------------------------------------------------------------

typedef struct {
    offramp_weight in;
    float *mean, *spread, *out;
    float bias;
    offramp_part *part;
} Gated;

static Gated gate_of(int type, int64_t width) {
    Gated g = {weight_of(type, 0, width ? 2 * width : 1, 32, 0),
               randoms(32, -0.5f, 0.5f),
               randoms(32, 0.02f, 2),
               width ? randoms(width, -1, 1) : NULL,
               0.25f,
               new_part("gate")};
    give(g.part, "in", &g.in), give_floats(g.part, "mean", g.mean, 32),
        give_floats(g.part, "spread", g.spread, 32);
    give_floats(g.part, "out", g.out, width), give_number(g.part, "bias", g.bias);
    return g;
}

static double gate_reference(const Gated *g, const float *h, int64_t width) {
    double x[32], act[256], sum = 0;
    for (int k = 0; k < 32; k++) x[k] = fmin(fmax(((double)h[k] - g->mean[k]) / g->spread[k], -8), 8);
    product_reference(&g->in, x, act);
    for (int64_t k = 0; k < width; k++) sum += silu_reference(act[k]) * act[width + k] * g->out[k];
    return g->bias + (width ? sum : act[0]);
}

static void gates_are_right(void) {
    const Tiny t = model_of(OFFRAMP_FLOAT32, 50, "");
    for (int64_t width = 0; width <= 37; width += width ? 30 : 7)
        for (int type = OFFRAMP_FLOAT32; type <= OFFRAMP_INT4; type++) {
            const Gated g = gate_of(type, width);
            WORKS(offramp_model_fits(t.model, g.part, &said));
            for (int threads = 1; threads <= 3; threads++) {
                float h[32], logit = NAN;
                for (int k = 0; k < 32; k++) h[k] = uniform(-2, 2);
                WORKS(offramp_model_threads(t.model, threads, &said));
                WORKS(offramp_ask(t.model, g.part, h, &logit, &said));
                const double wanted = gate_reference(&g, h, width);
                CHECK(fabs(logit - wanted) < (type ? 0.05 : 1e-5) * (5 + fabs(wanted)),
                      "a gate of type %d: %g and not %g", type, logit, wanted);
            }
            offramp_part_free(g.part);
        }
    offramp_model_free(t.model);
}

// Runs one row with gates at 1, 2 and 3 of 4 blocks. Returns the number of blocks run; what gates saw must be
// the row there.
static int64_t run_with_gates(const Tiny *t, const Gated *g, const float *thresholds, const float *given,
                              float *logits) {
    const offramp_part *parts[] = {g[0].part, g[1].part, g[2].part};
    const int64_t after[] = {1, 2, 3};
    float seen[3 * 32], h[32], rest[32];
    for (int i = 0; i < 3; i++) logits[i] = -77;
    const offramp_gates gates = {3, parts, after, thresholds, seen, logits};
    offramp_session *session = session_of(t, OFFRAMP_FLOAT32), *other = session_of(t, OFFRAMP_FLOAT32);
    const offramp_rows row = {session, 0, 1}, again = {other, 0, 1};
    int64_t run = -1;
    memcpy(h, given, sizeof h), memcpy(rest, given, sizeof rest);
    WORKS(offramp_run(t->model, 0, 4, &row, 1, h, &gates, &run, &said));
    for (int64_t i = 0; i < run; i++) {
        WORKS(offramp_run(t->model, i, i + 1, &again, 1, rest, NULL, NULL, &said));
        if (i == 3) break;
        CHECK(same(seen + i * 32, rest, 32), "what gate %d saw", (int)i);
        float logit;
        WORKS(offramp_ask(t->model, g[i].part, rest, &logit, &said));
        CHECK(logits[i] == (thresholds[i] == -INFINITY ? 0 : logit), "the logit of gate %d", (int)i);
    }
    CHECK(same(h, rest, 32), "the row where it stopped");
    for (int64_t i = 0; i < 4; i++) {
        CHECK(offramp_session_length(session, i) == (i < run), "block %d has %d tokens", (int)i,
              (int)offramp_session_length(session, i));
        if (i < 3 && i >= run) CHECK(logits[i] == -77, "a gate that was not reached was asked");
    }
    offramp_session_free(session), offramp_session_free(other);
    return run;
}

static void rows_stop_at_gates(void) {
    const Tiny t = model_of(OFFRAMP_FLOAT32, 50, "amnb");
    const Gated gates[] = {gate_of(OFFRAMP_FLOAT32, 0), gate_of(OFFRAMP_FLOAT32, 20),
                           gate_of(OFFRAMP_BFLOAT16, 16)};
    for (int threads = 1; threads <= 3; threads++) {
        const float *given = randoms(32, -1, 1);
        float logits[3], never[] = {INFINITY, INFINITY, INFINITY}, others[3];
        WORKS(offramp_model_threads(t.model, threads, &said));
        CHECK(run_with_gates(&t, gates, never, given, logits) == 4, "a threshold of inf stopped a row");
        for (int i = 0; i < 3; i++) {
            float at[] = {INFINITY, INFINITY, INFINITY};
            at[i] = -INFINITY;
            CHECK(run_with_gates(&t, gates, at, given, others) == i + 1,
                  "a threshold of -inf did not stop the row at gate %d", i);
            at[i] = nextafterf(logits[i], -INFINITY);
            CHECK(run_with_gates(&t, gates, at, given, others) == i + 1,
                  "a gate above its threshold did not stop the row");
            at[i] = logits[i];
            CHECK(run_with_gates(&t, gates, at, given, others) == 4,
                  "a gate that is not above its threshold stopped the row");
        }
    }
    // Gates go with one row.
    offramp_session *session = session_of(&t, OFFRAMP_FLOAT32);
    const offramp_part *part = gates[0].part, *wrong = NULL;
    const int64_t after = 1;
    const float threshold = 0;
    float seen[32], logit, h[64] = {0};
    const offramp_gates one = {1, &part, &after, &threshold, seen, &logit},
                        bad = {1, &wrong, &after, &threshold, seen, &logit};
    REFUSED(offramp_run(t.model, 0, 4, &(offramp_rows){session, 0, 2}, 1, h, &one, NULL, &said));
    REFUSED(offramp_run(t.model, 0, 4, &(offramp_rows){session, 0, 1}, 1, h, &bad, NULL, &said));
    REFUSED(offramp_ask(t.model, NULL, h, &logit, &said));
    CHECK(offramp_session_length(session, 0) == 0, "a refused run was counted");
    offramp_session_free(session);
    for (int i = 0; i < 3; i++) offramp_part_free(gates[i].part);
    offramp_model_free(t.model);
}

int main(void) {
    logits_are_right();
    candidates_are_the_likeliest();
    samples_do_not_mislead();
    equal_estimates_are_all_taken();
    the_first_of_equals_is_best();
    gates_are_right();
    rows_stop_at_gates();
    return 0;
}
