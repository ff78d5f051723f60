// Tokens that wait: what they decide, that they become exact at the top, forks, and other plans.

#include "steps.h"

enum { MOST = 24 };

// After all that waited went to the top, a text is as one that full depth read.
static void states_are_exact(const Tiny *t, offramp_plan *plan, const Rules *r, Text *x) {
    Text *exact = text_with(offramp_session_new(t->model, OFFRAMP_BFLOAT16, 4, &said), x->ids, x->r.known);
    read_all(plan, &x, 1);
    read_by_hand(by_hand(t, r, exact), exact->r.known);
    CHECK(all_the_same(t, x->r.session, exact->r.session), "states are not exact");
    CHECK(same(x->deep, exact->deep, D * (r->rules.middle ? 2 : 1)), "the newest state");
    offramp_session_free(exact->r.session);
}

// Steps a text in calls of different sizes. Forks in between go on alike, alone and together.
static void forks_go_on_alike(const Tiny *t, offramp_plan *plan, const Rules *r, const Prompts *p, int i) {
    Text *x = text_like(t, p, i), *whole = text_like(t, p, i);
    WORKS(offramp_model_threads(t->model, 1 + i, &said));
    step_all(plan, &whole, 1, MOST, 3);
    while (step(plan, &x, 1, MOST, 1 + below(2))) {
        Text *fork = fork_of(x), *both[] = {fork, x};
        if (below(2)) both[0] = x, both[1] = fork;
        if (below(2)) step(plan, both, 2, MOST, 1);
        step_all(plan, &fork, 1, MOST, 1 + below(5));
        are_alike(t, fork, whole, 0, "a fork");
        offramp_session_free(fork->r.session);
    }
    are_alike(t, x, whole, 0, "in small calls");
    if (r->rules.fill == OFFRAMP_DEFER && !x->r.failed && i != 1) states_are_exact(t, plan, r, x);
    offramp_session_free(x->r.session), offramp_session_free(whole->r.session);
}

static void all_forks_go_on_alike(int64_t conditions) {
    for (int64_t n = 0; n < conditions; n++) {
        const int mark = kept_count;
        const Tiny t = random_model(BLOCKS[n % MODELS], n % 2);
        Rules rules;
        Prompts prompts;
        random_rules(&t, &rules, n % 4 ? OFFRAMP_DEFER : (offramp_fill)below(3), 1);
        random_prompts(&t, &prompts, 1);
        offramp_plan *plan = plan_of(&t, &rules);
        for (int i = 0; i < TEXTS; i++) forks_go_on_alike(&t, plan, &rules, &prompts, i);
        offramp_plan_free(plan), free_parts(&rules);
        offramp_model_free(t.model);
        free_from(mark);
    }
}

// An exit that every token leaves at.
static void open_exit(Rules *r, int64_t blocks, int64_t after, int64_t tail, offramp_fill fill) {
    begin_rules(r, blocks);
    r->rules.fill = fill, r->rules.count = 1, r->rules.confidence = OFFRAMP_MAX_PROB;
    *r->exits = (offramp_exit){
        .after = after, .tail = tail, .perhaps = 1, .key = 1, .readout = readout_part(r, 0, 0)};
}

// So many tokens leave, and then one takes them along to the top.
static void so_many_wait(void) {
    const Tiny t = random_model("anm", 0);
    const int64_t ids[] = {3, 1, 4, 1, 5};
    for (int64_t pending = 1; pending <= 64; pending += pending < 4 ? 1 : 60) {
        Rules rules;
        open_exit(&rules, 3, 1, pending % 2, OFFRAMP_DEFER);
        rules.rules.pending = pending;
        offramp_plan *plan = plan_of(&t, &rules);
        Text *x = text_of(&t, OFFRAMP_BFLOAT16, ids, 5);
        step_all(plan, &x, 1, 150, 7);
        for (int64_t n = 0; n < 150; n++) {
            const int top = n % (pending + 1) == pending;
            CHECK(x->decisions[n].block == (top ? 3 : 1), "token %d, of %d that wait", (int)n, (int)pending);
            CHECK(x->decisions[n].passes == n / (pending + 1) + top, "passes");
        }
        CHECK(offramp_session_length(x->r.session, 0) == 154 &&
                  offramp_session_length(x->r.session, 1) == 154 - 150 % (pending + 1),
              "a block has %d tokens", (int)offramp_session_length(x->r.session, 1));
        states_are_exact(&t, plan, &rules, x);
        offramp_session_free(x->r.session), offramp_plan_free(plan), free_parts(&rules);
    }
    offramp_model_free(t.model);
}

// What mixers took in while tokens wait may still be forgotten, so nothing is settled.
static void what_waits_is_not_settled(void) {
    const Tiny t = random_model("anm", 0);
    const int64_t ids[] = {3, 1, 4, 1, 5};
    int64_t waited = 0;
    for (int i = 0; i < 6; i++) {
        Rules rules;
        open_exit(&rules, 3, 1, 1, OFFRAMP_DEFER);
        rules.rules.pending = 5, rules.exits->threshold = 0.02 * (1 + i);
        offramp_plan *plan = plan_of(&t, &rules);
        Text *x = text_of(&t, OFFRAMP_FLOAT32, ids, 5), *y = text_of(&t, OFFRAMP_FLOAT32, ids, 5);
        while (step(plan, &x, 1, 60, 1))
            waited += offramp_session_waits(x->r.session, 0), offramp_session_settle(x->r.session);
        step_all(plan, &y, 1, 60, 1);
        are_alike(&t, x, y, 0, "settled while tokens wait");
        offramp_session_free(x->r.session), offramp_session_free(y->r.session);
        offramp_plan_free(plan), free_parts(&rules);
    }
    CHECK(waited > 20, "%d tokens waited", (int)waited);
    offramp_model_free(t.model);
}

// While tokens wait, a session goes on with its own plan only. A call that refuses it changes no session.
static void other_plans_wait(void) {
    const Tiny t = random_model("am", 0);
    const int64_t ids[] = {3, 1, 4, 1, 5};
    Rules rules[3];
    for (int i = 0; i < 3; i++) open_exit(rules + i, 2, 1, 0, i == 2 ? OFFRAMP_PROJECT : OFFRAMP_DEFER);
    rules[2].rules.confidence = OFFRAMP_GATE, rules[2].exits->gate = gate_part(rules + 2, RECURRENT);
    rules[2].exits->threshold = 0.5;
    rules[2].recurrent[0] = 1;
    offramp_plan *plan = plan_of(&t, rules), *other = plan_of(&t, rules + 1), *gated = plan_of(&t, rules + 2);
    Text *x = text_of(&t, OFFRAMP_FLOAT32, ids, 5), *y = text_of(&t, OFFRAMP_FLOAT32, ids, 5);
    step_all(plan, &x, 1, 2, 1), step_all(gated, &y, 1, 6, 1);
    Text *before = fork_of(x), *unlike = fork_of(y);
    offramp_request *both[] = {&y->r, &x->r};
    for (int i = 0; i < 2; i++) both[i]->reads = 0, both[i]->most = 3;
    REFUSED(offramp_step(other, both, 2, 1, NULL, &said));
    REFUSED(offramp_step(other, both + 1, 1, 1, NULL, &said));
    are_alike(&t, x, before, 0, "a refused text"), are_alike(&t, y, unlike, 0, "beside a refused text");
    // What was forgotten or run otherwise is not what exits know of.
    offramp_request astray = before->r;
    for (astray.run = 0; astray.run < 7; astray.run++) {
        if (astray.run == before->r.run) continue;
        Text *other_way = fork_of(before);
        astray.session = other_way->r.session, astray.known = astray.run + 1, astray.most = 3;
        WORKS(offramp_session_crop(astray.session, astray.run, 0, 1, &said));
        REFUSED(offramp_step(plan, (offramp_request *[]){&astray}, 1, 1, NULL, &said));
        offramp_session_free(other_way->r.session);
    }
    step_all(plan, &x, 1, 9, 2), step_all(plan, &before, 1, 9, 2), are_alike(&t, x, before, 0, "after it");
    step_all(gated, &y, 1, 12, 2), step_all(gated, &unlike, 1, 12, 2),
        are_alike(&t, y, unlike, 0, "beside it, after it");
    // Where none waits, any plan goes on, but for one with a Mamba gate.
    read_all(plan, &x, 1);
    x->ids[x->r.known++] = 7, x->r.reads = 0;
    REFUSED(offramp_step(gated, both + 1, 1, 1, NULL, &said));
    step_all(other, &x, 1, 12, 2);
    offramp_session_free(x->r.session), offramp_session_free(y->r.session);
    offramp_session_free(before->r.session), offramp_session_free(unlike->r.session);
    offramp_plan_free(plan), offramp_plan_free(other), offramp_plan_free(gated);
    for (int i = 0; i < 3; i++) free_parts(rules + i);
    offramp_model_free(t.model);
}

// Where mixers have stayed as they were, they have fewer tokens than the text. No plan under which tokens
// wait goes on with it; others do.
static void frozen_texts_do_not_wait(void) {
    const Tiny t = random_model("am", 0);
    const int64_t ids[] = {3, 1, 4, 1, 5};
    Rules rules[4];
    static const offramp_fill fills[] = {OFFRAMP_FREEZE, OFFRAMP_DEFER, OFFRAMP_VERIFY, OFFRAMP_PROJECT};
    offramp_plan *plans[4];
    for (int i = 0; i < 4; i++)
        open_exit(rules + i, 2, 1, i % 2, fills[i]), plans[i] = plan_of(&t, rules + i);
    Text *x = text_of(&t, OFFRAMP_FLOAT32, ids, 5);
    step_all(plans[0], &x, 1, 3, 2);
    offramp_request *requests[] = {&x->r};
    x->r.reads = 0, x->r.most = 3;
    for (int i = 1; i < 3; i++) REFUSED(offramp_step(plans[i], requests, 1, 1, NULL, &said));
    step_all(plans[3], &x, 1, 6, 2), step_all(plans[0], &x, 1, 9, 1);
    offramp_session_free(x->r.session);
    for (int i = 0; i < 4; i++) offramp_plan_free(plans[i]), free_parts(rules + i);
    offramp_model_free(t.model);
}

// Where a window slides in a fork, tokens that wait are not in the deeper block yet.
static void forks_slide_while_tokens_wait(void) {
    Shape shape = SMALL;
    shape.blocks = "aa", shape.window = 32;
    const Tiny t = tiny(shape);
    const int64_t ids[] = {3, 1, 4, 1, 5};
    Rules rules;
    open_exit(&rules, 2, 1, 0, OFFRAMP_DEFER);
    rules.rules.pending = 20;
    offramp_plan *plan = plan_of(&t, &rules);
    for (int64_t most = 90; most < 130; most += 6) {
        Text *x = text_of(&t, OFFRAMP_BFLOAT16, ids, 5), *fork;
        step_all(plan, &x, 1, most, 3);
        fork = fork_of(x);
        step_all(plan, &fork, 1, 180, 3), step_all(plan, &x, 1, 180, 3);
        are_alike(&t, fork, x, 0, "a fork whose window slides");
        offramp_session_free(x->r.session), offramp_session_free(fork->r.session);
    }
    offramp_plan_free(plan), free_parts(&rules);
    offramp_model_free(t.model);
}

int main(void) {
    all_forks_go_on_alike(60);
    so_many_wait();
    what_waits_is_not_settled();
    other_plans_wait();
    frozen_texts_do_not_wait();
    forks_slide_while_tokens_wait();
    return 0;
}
