// The head: logits, a sketch's candidates, and the best of them.

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
    for (int type = OFFRAMP_FLOAT32; type <= OFFRAMP_Q4_1; type++) {
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

int main(void) {
    logits_are_right();
    candidates_are_the_likeliest();
    samples_do_not_mislead();
    equal_estimates_are_all_taken();
    the_first_of_equals_is_best();
    return 0;
}
