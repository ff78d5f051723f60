// Attention and the MLP: right, and bit for bit the same however a text is cut into calls, and beside
// whichever others it stands.

#include "models.h"

enum { MOST = 530 };      // tokens: more than two STRETCHes of attend.h, and no multiple of a PIECE
static int64_t T = MOST;  // of a text

// Turns dims 2 i and 2 i + 1 of x (P) by the pairs of one position.
static void turn(double *x, const float *pairs, int64_t P) {
    for (int64_t p = 0; p < P; p += 2) {
        const double re = x[p], im = x[p + 1];
        x[p] = re * pairs[p] - im * pairs[p + 1], x[p + 1] = re * pairs[p + 1] + im * pairs[p];
    }
}

// Queries, keys and values of one token, (Q + 2H, P).
static void project_reference(const Tiny *t, const Layer *l, const double *h, int64_t position, double *qkv) {
    const Shape *s = &t->shape;
    const int64_t D = s->hidden, P = s->dim, Q = s->queries, H = s->heads;
    double x[256];
    if (s->norm_after)
        memcpy(x, h, D * sizeof *x);
    else
        norm_reference(h, l->norm, EPS, x, D);
    product_reference(&l->qkv, x, qkv);
    if (s->norms == 1) {
        for (int64_t i = 0; i < Q; i++) norm_reference(qkv + i * P, l->q_norm, EPS, qkv + i * P, P);
        for (int64_t i = Q; i < Q + H; i++) norm_reference(qkv + i * P, l->k_norm, EPS, qkv + i * P, P);
    } else if (s->norms == 2) {
        norm_reference(qkv, l->q_norm, EPS, qkv, Q * P);
        norm_reference(qkv + Q * P, l->k_norm, EPS, qkv + Q * P, H * P);
    }
    for (int64_t i = 0; i < Q + H && t->rotary; i++) turn(qkv + i * P, t->rotary + position * P, P);
}

// Adds y (D), after its norm where norms stand after, to h.
static void add_reference(const Shape *s, const float *norm, double *y, double *h) {
    if (s->norm_after) norm_reference(y, norm, EPS, y, s->hidden);
    for (int64_t k = 0; k < s->hidden; k++) h[k] += y[k];
}

static void mlp_reference(const Shape *s, const Layer *l, double *h) {
    double x[256], both[512], y[256];
    if (s->norm_after)
        memcpy(x, h, s->hidden * sizeof *x);
    else
        norm_reference(h, l->mlp_norm, EPS, x, s->hidden);
    product_reference(&l->gate_up, x, both);
    for (int64_t k = 0; k < s->width; k++) x[k] = silu_reference(both[k]) * both[s->width + k];
    product_reference(&l->down, x, y);
    add_reference(s, l->mlp_norm, y, h);
}

// One block over the T tokens h (T, D), in place; `all` (T, Q + 2H, P) is what it projects.
static void block_reference(const Tiny *t, const Layer *l, double *h, double *all) {
    const Shape *s = &t->shape;
    const int64_t D = s->hidden, P = s->dim, Q = s->queries, H = s->heads, each = (Q + 2 * H) * P;
    double mixed[256], y[256], weights[MOST];
    for (int64_t r = 0; r < T; r++) project_reference(t, l, h + r * D, r, all + r * each);
    for (int64_t r = 0; r < T; r++) {
        const int64_t first = s->window && r >= s->window ? r - s->window + 1 : 0;
        for (int64_t q = 0; q < Q; q++) {
            const int64_t head = q / (Q / H);
            double total = 0, sums[64] = {0};
            for (int64_t j = first; j <= r; j++) {
                double score = 0;
                for (int64_t p = 0; p < P; p++)
                    score += all[r * each + q * P + p] * all[j * each + (Q + head) * P + p];
                weights[j] = exp(score * 1.5 / sqrt(P)), total += weights[j];
            }
            for (int64_t j = first; j <= r; j++)
                for (int64_t p = 0; p < P; p++)
                    sums[p] += weights[j] * all[j * each + (Q + H + head) * P + p];
            for (int64_t p = 0; p < P; p++) mixed[q * P + p] = sums[p] / total;
        }
        product_reference(&l->o, mixed, y);
        add_reference(s, l->norm, y, h + r * D);
        if (l->has_mlp) mlp_reference(s, l, h + r * D);
    }
}

static double *doubles(const float *x, int64_t count) {
    double *y = memory(count * sizeof *y);
    for (int64_t i = 0; i < count; i++) y[i] = x[i];
    return y;
}

// What all blocks give, and what each of them projects.
typedef struct {
    double *h, *all[MOST_LAYERS];
} Wanted;

static Wanted reference(const Tiny *t, const float *given) {
    const Shape *s = &t->shape;
    Wanted wanted = {.h = doubles(given, T * s->hidden)};
    for (int64_t i = 0; i < t->count; i++) {
        wanted.all[i] = memory(T * (s->queries + 2 * s->heads) * s->dim * sizeof(double));
        block_reference(t, t->layers + i, wanted.h, wanted.all[i]);
    }
    return wanted;
}

// All tokens in one call, as the reference says: what comes out, and the keys and values that are kept.
static void one_call_is_right(const Tiny *t, offramp_session *session, const float *given, float *h,
                              const Wanted *wanted, double tolerance) {
    const Shape *s = &t->shape;
    const int64_t D = s->hidden, P = s->dim, H = s->heads, Q = s->queries, each = (Q + 2 * H) * P;
    memcpy(h, given, T * D * 4);
    run_rows(t, session, h, T);
    for (int64_t i = 0; i < t->count; i++) {
        float *keys = zeros(T * 2 * H * P);
        WORKS(offramp_session_keys(session, i, 0, keys, &said));
        for (int64_t r = 0; r < T; r++) {
            const double apart = distance(keys + r * 2 * H * P, wanted->all[i] + r * each + Q * P, 2 * H * P);
            CHECK(apart < tolerance, "keys of token %d in block %d: %g", (int)r, (int)i, apart);
        }
    }
    for (int64_t r = 0; r < T; r++) {
        const double apart = distance(h + r * D, wanted->h + r * D, D);
        CHECK(apart < tolerance, "token %d: %g", (int)r, apart);
    }
}

// The same tokens in calls of `most` rows at most, give the same bits.
static void cuts_do_not_matter(const Tiny *t, offramp_type keys, const float *given, const float *wanted,
                               int64_t most) {
    const int64_t D = t->shape.hidden;
    offramp_session *session = session_of(t, keys);
    float *h = copied(given, T * D);
    for (int64_t r = 0, count; r < T; r += count) {
        count = 1 + below(most);
        count = count > T - r ? T - r : count;
        run_rows(t, session, h + r * D, count);
        CHECK(same(h + r * D, wanted + r * D, count * D), "%d rows from position %d on, window %d",
              (int)count, (int)r, (int)t->shape.window);
    }
    offramp_session_free(session);
}

// Several sessions side by side, at different places of their texts, give what each gives alone.
static void neighbours_do_not_matter(const Tiny *t, offramp_type keys, const float *given,
                                     const float *wanted) {
    enum { SESSIONS = 5 };
    static const int64_t counts[] = {1, 3, 9, 20, 70, 300};
    const int64_t D = t->shape.hidden;
    offramp_session *sessions[SESSIONS];
    int64_t at[SESSIONS] = {0};
    for (int i = 0; i < SESSIONS; i++) sessions[i] = session_of(t, keys);
    float *h = zeros(SESSIONS * 300 * D);
    for (int call = 0; call < 12; call++) {
        offramp_rows rows[SESSIONS];
        int64_t total = 0;
        for (int i = 0; i < SESSIONS; i++) {
            int64_t count = call == 3 && i == 2 ? 0 : 1 + below(counts[call % 6]);
            count = count > T - at[i] ? T - at[i] : count;
            rows[i] = (offramp_rows){sessions[i], at[i], count};
            memcpy(h + total * D, given + at[i] * D, count * D * 4);
            total += count;
        }
        WORKS(offramp_run(t->model, 0, t->count, rows, SESSIONS, h, &said));
        for (int64_t i = 0, from = 0; i < SESSIONS; from += rows[i++].count) {
            CHECK(same(h + from * D, wanted + at[i] * D, rows[i].count * D), "session %d, call %d", (int)i,
                  call);
            at[i] += rows[i].count;
            CHECK(offramp_session_length(sessions[i], 0) == at[i], "the length");
        }
    }
    for (int i = 0; i < SESSIONS; i++) offramp_session_free(sessions[i]);
}

static void test_of(Shape shape) {
    const Tiny t = tiny(shape);
    const int64_t D = shape.hidden;
    const float *given = randoms(T * D, -1, 1);
    float *h = zeros(T * D);
    const Wanted wanted = reference(&t, given);
    for (offramp_type keys = OFFRAMP_FLOAT32; keys <= OFFRAMP_BFLOAT16; keys++) {
        const int mark = kept_count;
        offramp_session *session = session_of(&t, keys);
        const int rough = keys == OFFRAMP_BFLOAT16 || shape.type != OFFRAMP_FLOAT32;
        one_call_is_right(&t, session, given, h, &wanted, rough ? 5e-2 : 1e-4);
        cuts_do_not_matter(&t, keys, given, h, 1);
        for (int threads = 2; threads <= 3; threads++) {
            WORKS(offramp_model_threads(t.model, threads, &said));
            cuts_do_not_matter(&t, keys, given, h, threads == 2 ? 12 : 290);
        }
        neighbours_do_not_matter(&t, keys, given, h);
        WORKS(offramp_model_threads(t.model, 1, &said));
        offramp_session_free(session);
        free_from(mark);
    }
    offramp_model_free(t.model);
}

// Blocks that only remember rows have the keys that they have after running them; h stays.
static void remembered_is_what_is_run(void) {
    Shape shape = SMALL;
    shape.blocks = "a", shape.positions = MOST;
    const Tiny t = tiny(shape);
    offramp_session *ran = session_of(&t, OFFRAMP_BFLOAT16), *told = session_of(&t, OFFRAMP_BFLOAT16);
    const float *given = randoms(T * 32, -1, 1), *h = copied(given, T * 32);
    const offramp_rows rows = {told, 0, T};
    WORKS(offramp_remember(t.model, 0, 1, &rows, 1, OFFRAMP_BOTH, h, &said));
    CHECK(same(h, given, T * 32), "h was changed");
    run_rows(&t, ran, copied(given, T * 32), T);
    CHECK(all_the_same(&t, ran, told), "keys differ");
    offramp_session_free(ran), offramp_session_free(told);
    offramp_model_free(t.model);
}

// What comes again at an earlier position stands in its place, and what came after is forgotten.
static void a_text_can_go_back(void) {
    Shape shape = SMALL;
    shape.blocks = "ab";
    const Tiny t = tiny(shape);
    offramp_session *session = session_of(&t, OFFRAMP_FLOAT32), *fresh = session_of(&t, OFFRAMP_FLOAT32);
    const float *given = randoms(100 * 32, -1, 1);
    float *h = copied(given, 100 * 32), *other = copied(given, 100 * 32);
    run_rows(&t, session, randoms(100 * 32, -1, 1), 100);
    WORKS(offramp_run(t.model, 0, 2, &(offramp_rows){session, 0, 60}, 1, h, &said));
    run_rows(&t, fresh, other, 60);
    CHECK(same(h, other, 60 * 32) && all_the_same(&t, session, fresh), "it still sees what it forgot");
    offramp_session_free(session), offramp_session_free(fresh);
    offramp_model_free(t.model);
}

int main(void) {
    Shape plain = SMALL, olmo = SMALL, qwen = SMALL, window = SMALL, wide = SMALL, whole = SMALL;
    plain.blocks = "a", plain.positions = MOST, plain.bias = 1;
    test_of(plain);
    T = 90;
    olmo.blocks = "aa", olmo.norm_after = 1, olmo.norms = 2, olmo.positions = MOST;
    test_of(olmo);
    qwen.blocks = "a", qwen.norms = 1, qwen.queries = 10, qwen.dim = 24, qwen.hidden = 40, qwen.width = 37;
    test_of(qwen);
    window.blocks = "ab", window.window = 70, window.queries = 6, window.positions = MOST;
    window.dim = 16;
    T = 290;
    test_of(window);
    wide.blocks = "a", wide.dim = 64, wide.heads = 1, wide.queries = 3, wide.window = 270;
    test_of(wide);
    T = 90;
    window.window = 1, window.blocks = "a";
    test_of(window);
    whole.blocks = "aa", whole.type = OFFRAMP_INT8, whole.fine = 1;
    test_of(whole);
    whole.type = OFFRAMP_Q4_1, whole.width = 96;
    test_of(whole);
    whole.type = OFFRAMP_BFLOAT16, whole.hidden = 24;
    test_of(whole);
    remembered_is_what_is_run();
    a_text_can_go_back();
    return 0;
}
