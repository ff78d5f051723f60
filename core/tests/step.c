// Steps: what is decided is what the rules say, token after token; and it depends neither on other texts
// of a call, nor on how many tokens a call decides, nor on threads.

#include "steps.h"

enum { MOST = 14 };

// Steps the texts of a condition in a random order, in calls of random sizes, with some threads.
static void step_randomly(const Tiny *t, offramp_plan *plan, Text **texts, int64_t threads) {
    WORKS(offramp_model_threads(t->model, threads, &said));
    Text *order[TEXTS] = {texts[0], texts[1], texts[2]};
    for (int i = 0; i < TEXTS; i++) {
        const int64_t j = below(TEXTS);
        Text *other = order[i];
        order[i] = order[j], order[j] = other, texts[i]->piece = below(4);
    }
    for (int any = 1; any;) {
        const int count = 1 + (int)below(TEXTS);
        any = step(plan, order, count, MOST, 1 + below(4));
        if (!any && count < TEXTS) any = step(plan, order, TEXTS, MOST, 1 + below(2));
    }
}

// One condition: texts that are decided by hand, and stepped alone, together, and with threads.
static void steps_follow_the_rules(const Tiny *t, Rules *r, const Prompts *p) {
    offramp_plan *plan = plan_of(t, r);
    Text *wanted[TEXTS];
    float *deep[TEXTS];
    const double tolerance = r->rules.confidence || r->keys ? 1e-5 : 0;
    WORKS(offramp_model_threads(t->model, 1, &said));
    for (int i = 0; i < TEXTS; i++) {
        wanted[i] = text_like(t, p, i);
        ByHand *b = by_hand(t, r, wanted[i]);
        decide_all_by_hand(b, MOST);
        deep[i] = copied(wanted[i]->deep, 2 * D);
        if (!wanted[i]->r.failed) read_by_hand(b, wanted[i]->r.known);
    }
    Text *first[TEXTS];
    for (int threads = 0; threads <= 3; threads++) {
        Text *found[TEXTS];
        for (int i = 0; i < TEXTS; i++) found[i] = text_like(t, p, i);
        if (threads)
            step_randomly(t, plan, found, threads);
        else
            for (int i = 0; i < TEXTS; i++) step_all(plan, found + i, 1, MOST, 1);
        for (int i = 0; i < TEXTS; i++) {
            if (!found[i]->r.failed) {
                CHECK(same(found[i]->deep, deep[i], 2 * D), "the state of the newest token");
                read_all(plan, found + i, 1);
            }
            are_alike(t, found[i], threads ? first[i] : wanted[i], threads ? 0 : tolerance,
                      threads ? "together" : "by hand");
            if (threads)
                offramp_session_free(found[i]->r.session);
            else
                first[i] = found[i];
        }
    }
    for (int i = 0; i < TEXTS; i++)
        offramp_session_free(wanted[i]->r.session), offramp_session_free(first[i]->r.session);
    offramp_plan_free(plan);
}

static void all_fills_follow_the_rules(int64_t conditions) {
    for (int64_t n = 0; n < conditions; n++) {
        const int mark = kept_count;
        const Tiny t = random_model(BLOCKS[n % MODELS], n % 2);
        const offramp_fill fill = (offramp_fill)(n / MODELS % 4);
        Rules rules;
        Prompts prompts;
        random_rules(&t, &rules, fill, fill != OFFRAMP_DEFER);
        random_prompts(&t, &prompts, 1);
        steps_follow_the_rules(&t, &rules, &prompts);
        free_parts(&rules);
        offramp_model_free(t.model);
        free_from(mark);
    }
}

// Requests -----------------------------------------------------------------------------------------

// Weights that are not finite fail the request that needs them, and no other.
static void nan_fails_one_request(offramp_fill fill, int64_t conditions) {
    enum { BAD = 49 };
    for (int64_t n = 0; n < conditions; n++) {
        const int mark = kept_count;
        Shape shape = SMALL;
        shape.blocks = BLOCKS[n % MODELS];
        const Tiny t = tiny(shape);
        Rules rules;
        random_rules(&t, &rules, fill, 1);
        rules.rules.exit_sketch = NULL,
        rules.rules.shortlist = shortlist_part(&rules, &t, 3);  // BAD is no draft
        offramp_plan *plan = plan_of(&t, &rules);
        int64_t ids[TEXTS][5];
        for (int i = 0; i < TEXTS; i++) random_ids(ids[i], 5, 40);
        ids[1][n % 2 && rules.exits->after ? 2 : 4] = BAD;
        t.embedding[BAD * D + 3] = NAN;
        Text *alone[TEXTS], *found[TEXTS];
        const uint32_t good[] = {UINT32_MAX, 0xff};  // the bad token is not decided
        for (int i = 0; i < TEXTS; i++) {
            alone[i] = text_of(&t, OFFRAMP_FLOAT32, ids[i], 5),
            found[i] = text_of(&t, OFFRAMP_FLOAT32, ids[i], 5);
            alone[i]->r.allowed = found[i]->r.allowed = n % 4 > 1 || i == 1 ? good : NULL;
            alone[i]->r.how.temperature = found[i]->r.how.temperature = i == 1 ? 0 : 0.5;
            step_all(plan, alone + i, 1, MOST, 1);
        }
        WORKS(offramp_model_threads(t.model, 1 + n % 3, &said));
        step_all(plan, found, TEXTS, MOST, 1);
        for (int i = 0; i < TEXTS; i++)
            if (fill != OFFRAMP_VERIFY)
                are_alike(&t, found[i], alone[i], 0, "beside a NaN");
            else
                CHECK(found[i]->decided == alone[i]->decided &&
                          !memcmp(found[i]->ids, alone[i]->ids, found[i]->r.known * 8),
                      "beside a NaN");
        CHECK(found[1]->r.failed == OFFRAMP_NOT_FINITE && !found[1]->decided, "a NaN gave %d tokens",
              (int)found[1]->decided);
        for (int i = 0; i < TEXTS; i++)
            offramp_session_free(alone[i]->r.session), offramp_session_free(found[i]->r.session);
        offramp_plan_free(plan), free_parts(&rules);
        offramp_model_free(t.model);
        free_from(mark);
    }
}

// A text whose request failed goes on no more, and neither does a fork of it.
static void is_half_written(offramp_plan *plan, const Text *x) {
    Text *both[] = {fork_of(x), fork_of(x)};
    offramp_session_free(both[0]->r.session), both[0]->r.session = x->r.session;
    for (int i = 0; i < 2; i++) {
        both[i]->r.allowed = NULL, both[i]->r.most = 1, both[i]->r.reads = 0;
        REFUSED(offramp_step(plan, (offramp_request *[]){&both[i]->r}, 1, 1, NULL, &said));
        CHECK(strstr(said.message, "half-written"), "it says '%s'", said.message);
    }
    offramp_session_free(both[1]->r.session);
}

// Where tokens are masked, one is decided in a call, and it is allowed; where none is, the request fails.
static void masks_are_kept(void) {
    for (int64_t n = 0; n < 40; n++) {
        const int mark = kept_count;
        const Tiny t = random_model(BLOCKS[n % MODELS], 0);
        Rules rules;
        random_rules(&t, &rules, (offramp_fill)(n % 5), 1);
        offramp_plan *plan = plan_of(&t, &rules);
        int64_t ids[4];
        random_ids(ids, 4, 50);
        Text *x = text_of(&t, OFFRAMP_FLOAT32, ids, 4);
        uint32_t mask[2] = {0};
        x->r.whole = 1, x->r.allowed = mask, x->r.how.temperature = n % 2;
        step(plan, &x, 1, 9, 5);
        for (int64_t decided = 1; decided < 9; decided++) {
            const int64_t id = below(50);
            mask[id / 32] = 1u << id % 32, mask[1 - id / 32] = 0;
            step(plan, &x, 1, 9, 5);
            CHECK(x->decided == decided && x->ids[x->r.known - 1] == id,
                  "%d tokens were decided, %d the last", (int)x->decided, (int)x->ids[x->r.known - 1]);
        }
        mask[0] = 0, mask[1] = UINT32_MAX << 18;  // beyond the vocabulary
        step(plan, &x, 1, 99, 5);
        CHECK(x->r.failed == OFFRAMP_NOTHING_FITS && x->decided == 8, "what fits nothing gave a token");
        is_half_written(plan, x);
        offramp_session_free(x->r.session), offramp_plan_free(plan), free_parts(&rules);
        offramp_model_free(t.model);
        free_from(mark);
    }
}

int main(void) {
    all_fills_follow_the_rules(120);
    for (int fill = OFFRAMP_PROJECT; fill <= OFFRAMP_VERIFY; fill++) nan_fails_one_request(fill, 12);
    masks_are_kept();
    return 0;
}
