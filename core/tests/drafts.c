// Drafts: tokens and memories are those of full depth, wherever drafts come from; and rejected ones leave no
// trace.

#include "steps.h"

#include "session.h"

enum { MOST = 40 };

static int64_t stood, rejected, from_exits, guessed, put_off;  // in all conditions

// In a pass, no more stand and are rejected than may be drafted. Counts are sums of all rows.
static void counts_are_right(const Tiny *t, const Rules *r, const Text *x) {
    const int64_t most = r->rules.pending < OFFRAMP_MOST_DRAFTS ? r->rules.pending : OFFRAMP_MOST_DRAFTS;
    int64_t rows = x->decided + x->rejected, flops = 0, blocks = 0, row_flops = r->rules.head_flops,
            known = 0;
    for (int64_t n = 0, first = 0; n < x->decided; n++) {
        const offramp_decision *d = x->decisions + n;
        flops += d->flops, blocks += d->blocks;
        if (n + 1 < x->decided && d[1].passes == d->passes) continue;
        const int64_t spoilt = d->rejected - (first ? x->decisions[first - 1].rejected : 0);
        CHECK(d->block == t->count && isnan(d->confidence), "a pass ends with what full depth decides");
        CHECK(n - first + spoilt <= most, "%d drafts and not %d at most", (int)(n - first + spoilt),
              (int)most);
        stood += n - first, first = n + 1;
    }
    rejected += x->rejected;
    // What depends on positions is left out; and gates for one token, which may be asked in vain.
    for (int64_t i = 0; i < t->count; i++) row_flops += r->costs[i].flops, known |= r->costs[i].seen_flops;
    if (r->rules.count > 1 || known) return;
    const offramp_exit *at = r->exits;
    const int64_t tail = r->rules.count ? at->tail : 0;
    CHECK(blocks == t->count * rows + tail * x->asked, "%d blocks for %d rows", (int)blocks, (int)rows);
    int64_t wanted = row_flops * rows;
    if (r->rules.count) {
        if (r->recurrent[0]) wanted += at->gate_flops * rows;
        wanted += (at->readout_flops + r->rules.exit_head_flops) * x->asked;
        for (int64_t i = t->count - tail; i < t->count; i++) wanted += r->costs[i].flops * x->asked;
    }
    const int vain = r->rules.count && at->gate && !r->recurrent[0];
    CHECK(vain ? flops >= wanted : flops == wanted, "%d FLOPs and not %d", (int)flops, (int)wanted);
}

// A gate's confidence in a draft is the one that it has where it saw the tokens of the text and no others.
static void gates_saw_no_other_drafts(const ByHand *b, const Rules *r, const Text *x) {
    for (int64_t n = 0; n < x->decided; n++) {
        const offramp_decision *d = x->decisions + n;
        int64_t e = 0;
        while (e < r->rules.count && (d->block != r->exits[e].after || isnan(d->confidence))) e++;
        const int drafted = e < r->rules.count, guess = !d->block && isnan(d->confidence);
        from_exits += drafted, guessed += guess;
        CHECK(drafted ? d->source == OFFRAMP_FROM_EXIT
              : guess ? d->source == OFFRAMP_FROM_TEXT || d->source == OFFRAMP_FROM_TABLE
                      : d->source == OFFRAMP_FROM_FULL && d->block == b->t->count,
              "token %d after block %d came from %d", (int)n, (int)d->block, (int)d->source);
        CHECK(d->source != OFFRAMP_FROM_TABLE || r->rules.guesses, "a token of a table that is not there");
        if (e == r->rules.count || r->rules.confidence || r->keys) continue;
        const int64_t last = x->r.prompt + n - 1, first = r->recurrent[e] ? 0 : last;
        float logits[ROOM];
        WORKS(offramp_ask(b->t->model, r->exits[e].gate, b->seen[e] + first * D, last + 1 - first, logits,
                          &said));
        const double sure = 1 / (1 + exp(-(double)logits[last - first]));
        CHECK(d->confidence == (r->exits[e].threshold > 0 || r->rules.decay > 0 ? sure : 1),
              "token %d: a gate is sure by %g, and not %g", (int)n, d->confidence, sure);
    }
}

// In the first pass nothing has been learned: the chance that drafts stand is the product of confidences, and
// the next one has to be as much surer.
static void later_drafts_are_surer(const Rules *r, const Text *x) {
    double chance = 1;
    for (int64_t n = 0; n < x->decided && x->decisions[n].passes == x->decisions->passes; n++) {
        const offramp_decision *d = x->decisions + n;
        int64_t e = 0;
        while (e < r->rules.count && d->block != r->exits[e].after) e++;
        if (e == r->rules.count || isnan(d->confidence) || r->keys || r->rules.decay > 0) return;
        CHECK(d->confidence * chance > r->exits[e].threshold * (1 - 1e-9),
              "draft %d is sure by %g, with %g before it", (int)n, d->confidence, chance);
        chance *= d->confidence;
    }
}

static void tokens_are_those_of_full_depth(const Tiny *t, Rules *r, const Prompts *p) {
    const int64_t depth = D * (r->rules.middle ? 2 : 1);
    Text *wanted[TEXTS], *found[TEXTS];
    ByHand *b[TEXTS];
    float *deep[TEXTS];
    WORKS(offramp_model_threads(t->model, 1, &said));
    for (int i = 0; i < TEXTS; i++) {
        b[i] = by_hand(t, r, wanted[i] = text_like(t, p, i));
        decide_all_by_hand(b[i], MOST);
        deep[i] = copied(wanted[i]->deep, 2 * D);
        read_by_hand(b[i], wanted[i]->r.known);
        if (i == 0 && below(2))
            r->rules.guesses = guesses_part(r, wanted[i]->ids, wanted[i]->r.known, 1 + below(6));
    }
    offramp_plan *plan = plan_of(t, r);
    for (int times = 0; times < 4; times++) {
        WORKS(offramp_model_threads(t->model, times ? times : 1, &said));
        for (int i = 0; i < TEXTS; i++) found[i] = text_like(t, p, i);
        for (int i = 0; i < TEXTS && !times; i++) step_all(plan, found + i, 1, MOST, 3);
        if (times) step_all(plan, found, 1 + times % TEXTS, MOST, times);
        step_all(plan, found, TEXTS, MOST, 2);
        for (int i = 0; i < TEXTS; i++) {
            CHECK(found[i]->decided == wanted[i]->decided &&
                      !memcmp(found[i]->ids, wanted[i]->ids, wanted[i]->r.known * 8),
                  "other tokens");
            later_drafts_are_surer(r, found[i]), counts_are_right(t, r, found[i]);
            gates_saw_no_other_drafts(b[i], r, found[i]);
            CHECK(same(found[i]->deep, deep[i], depth), "the state of the newest token");
            read_all(plan, found + i, 1);
            CHECK(all_the_same(t, found[i]->r.session, wanted[i]->r.session), "memories differ");
            CHECK(same(found[i]->deep, wanted[i]->deep, depth), "the state of the last token");
            offramp_session_free(found[i]->r.session);
        }
    }
    for (int i = 0; i < TEXTS; i++) offramp_session_free(wanted[i]->r.session);
    offramp_plan_free(plan);
}

static void all_drafts_change_nothing(int64_t conditions) {
    for (int64_t n = 0; n < conditions; n++) {
        const int mark = kept_count;
        const Tiny t = random_model(BLOCKS[n % MODELS], n % 2);
        Rules rules;
        Prompts prompts;
        random_rules(&t, &rules, OFFRAMP_VERIFY, 1);
        if (n % 5 == 0) rules.rules.count = 0;
        rules.rules.alike = below(3), rules.rules.pending = 1 + below(31);
        for (int64_t i = 0; n % 3 && i < t.count; i++) rules.costs[i].seen_flops = 0;
        random_prompts(&t, &prompts, 0);
        tokens_are_those_of_full_depth(&t, &rules, &prompts);
        free_parts(&rules);
        offramp_model_free(t.model);
        free_from(mark);
    }
    CHECK(stood > 500 && rejected > 500 && from_exits > 500 && guessed > 500,
          "%d drafts stood, %d were rejected; %d came from exits, %d did not", (int)stood, (int)rejected,
          (int)from_exits, (int)guessed);
}

// A text whose drafts come from exits and from itself.
static Text *drafting_text(const Tiny *t, Rules *rules, offramp_plan **plan) {
    const int64_t ids[] = {3, 1, 4, 1, 5};
    random_rules(t, rules, OFFRAMP_VERIFY, 1);
    rules->rules.alike = 1;
    *plan = plan_of(t, rules);
    return text_of(t, OFFRAMP_FLOAT32, ids, 5);
}

// What was learned of drafts goes with a fork, which drafts as the original does.
static void estimates_go_with_forks(const char *blocks) {
    const Tiny t = random_model(blocks, 0);
    Rules rules;
    offramp_plan *plan;
    Text *x = drafting_text(&t, &rules, &plan);
    const Estimates none = new_estimates();
    for (int64_t most = 5; most < 100; most += 7) {
        step_all(plan, &x, 1, most, 1);
        Text *fork = fork_of(x);
        CHECK(!memcmp(&x->r.session->estimates, &fork->r.session->estimates, sizeof none),
              "estimates of a fork");
        CHECK(memcmp(&x->r.session->estimates, &none, sizeof none), "nothing was learned");
        Text *both[] = {x, fork};
        for (int i = 0; i < 2; i++) step_all(plan, both + i, 1, most + 6, 2);
        are_alike(&t, x, fork, 0, "a fork");
        offramp_session_free(fork->r.session);
    }
    offramp_session_free(x->r.session), offramp_plan_free(plan), free_parts(&rules);
    offramp_model_free(t.model);
}

// Going back leaves rows of journals for the next pass. A fork, and a watch that begins then
// have the memories of a text that was read to here.
static void rows_are_put_off(const char *blocks) {
    const Tiny t = random_model(blocks, 0);
    Rules rules;
    offramp_plan *plan;
    Text *x = drafting_text(&t, &rules, &plan);
    offramp_session *s = x->r.session;
    float h[3 * D];
    for (int i = 0; i < 3 * D; i++) h[i] = (float)(i % 7 - 3) / 4;
    while (step(plan, &x, 1, 90, 1)) {
        for (int64_t i = 0; i < t.count; i++) put_off += s->blocks[i].mixed.due;
        const int64_t run = x->r.run;
        Text *read = text_of(&t, OFFRAMP_FLOAT32, x->ids, run), *copy = fork_of(x);
        read_all(plan, &read, 1);
        WORKS(offramp_session_watch(s, 0, t.count, &said));
        Text *watched = fork_of(x);
        CHECK(all_the_same(&t, copy->r.session, read->r.session), "a copy after drafts");
        CHECK(all_the_same(&t, s, read->r.session), "a session after drafts");
        WORKS(offramp_run(t.model, 0, t.count, &(offramp_rows){watched->r.session, run, 3}, 1, h, &said));
        WORKS(offramp_session_crop(watched->r.session, run, 0, t.count, &said));
        CHECK(all_the_same(&t, watched->r.session, read->r.session), "a fork during a watch");
        offramp_session_settle(s);
        CHECK(all_the_same(&t, s, read->r.session), "a session after a watch");
        offramp_session_free(copy->r.session), offramp_session_free(read->r.session);
        offramp_session_free(watched->r.session);
    }
    offramp_session_free(s), offramp_plan_free(plan), free_parts(&rules);
    offramp_model_free(t.model);
}

// Drafts that are always right soon come many in a pass, and those that are always wrong hardly at all.
static void drafts_pay(int right) {
    const Tiny t = random_model("am", 0);
    const int64_t ids[] = {3, 1, 4, 1, 5};
    Rules rules;
    begin_rules(&rules, 2);
    rules.rules.fill = OFFRAMP_VERIFY, rules.rules.pending = 7;
    Text *text = text_of(&t, OFFRAMP_FLOAT32, ids, 5), *x = text_of(&t, OFFRAMP_FLOAT32, ids, 5);
    text->r.how.temperature = x->r.how.temperature = 2;
    decide_all_by_hand(by_hand(&t, &rules, text), 100);
    rules.rules.guesses = guesses_part(&rules, text->ids, text->r.known, right ? 1000 : 1);
    offramp_plan *plan = plan_of(&t, &rules);
    step_all(plan, &x, 1, 100, 1);
    CHECK(right ? x->passes < 40 : x->passes == 100 && x->rejected < 70, "%d passes, %d drafts were rejected",
          (int)x->passes, (int)x->rejected);
    offramp_session_free(x->r.session), offramp_session_free(text->r.session);
    offramp_plan_free(plan), free_parts(&rules);
    offramp_model_free(t.model);
}

// So many requests that their drafts must share a pass's rows get their own answers.
static void many_share_a_pass(void) {
    enum { MANY = 70 };
    const Tiny t = random_model("am", 0);
    Rules rules;
    begin_rules(&rules, 2);
    rules.rules.fill = OFFRAMP_VERIFY, rules.rules.pending = 31, rules.rules.alike = 1;
    for (int i = 0; i <= OFFRAMP_MOST_DRAFTS; i++) rules.rules.row_costs[i] = 0;
    Text *found[MANY], *alone[MANY];
    offramp_plan *plan = plan_of(&t, &rules);
    for (int i = 0; i < MANY; i++) {
        const int64_t own[] = {3, 1, 4, i % 50, 5, 3, 1, 4, i % 50, 5};
        found[i] = text_of(&t, OFFRAMP_FLOAT32, own, 10), alone[i] = text_of(&t, OFFRAMP_FLOAT32, own, 10);
        step_all(plan, alone + i, 1, MOST, 3);
    }
    step_all(plan, found, MANY, MOST, 2);
    for (int i = 0; i < MANY; i++) {
        CHECK(!memcmp(found[i]->ids, alone[i]->ids, alone[i]->r.known * 8), "request %d has other tokens", i);
        offramp_session_free(found[i]->r.session), offramp_session_free(alone[i]->r.session);
    }
    offramp_plan_free(plan), free_parts(&rules);
    offramp_model_free(t.model);
}

// A window slides while drafts come and go.
static void windows_slide(offramp_fill fill) {
    Shape shape = SMALL;
    shape.blocks = "bam", shape.window = 6, shape.vocabulary = 20;
    const Tiny t = tiny(shape);
    const int64_t known = 120, most = 120;
    int64_t ids[120];
    Rules rules;
    random_rules(&t, &rules, fill, fill == OFFRAMP_VERIFY);
    rules.rules.alike = 1;
    random_ids(ids, known, 20);
    Text *wanted = text_of(&t, OFFRAMP_BFLOAT16, ids, known), *x = text_of(&t, OFFRAMP_BFLOAT16, ids, known);
    offramp_plan *plan = plan_of(&t, &rules);
    ByHand *b = by_hand(&t, &rules, wanted);
    decide_all_by_hand(b, most), read_by_hand(b, wanted->r.known);
    for (x->piece = 50; x->decided < most; x->piece = 7) step(plan, &x, 1, most, 5);
    CHECK(!memcmp(x->ids, wanted->ids, wanted->r.known * 8), "tokens after a window slid");
    read_all(plan, &x, 1);
    CHECK(offramp_session_first(x->r.session, 0) > 0, "no window has slid");
    CHECK(all_the_same(&t, x->r.session, wanted->r.session), "memories after a window slid");
    offramp_session_free(x->r.session), offramp_session_free(wanted->r.session);
    offramp_plan_free(plan), free_parts(&rules);
    offramp_model_free(t.model);
}

int main(void) {
    all_drafts_change_nothing(60);
    for (int i = 0; i < MODELS; i++) estimates_go_with_forks(BLOCKS[i]), rows_are_put_off(BLOCKS[i]);
    CHECK(put_off > 50, "%d rows were put off", (int)put_off);
    drafts_pay(0), drafts_pay(1);
    many_share_a_pass();
    for (int i = 0; i < 6; i++) windows_slide(OFFRAMP_VERIFY), windows_slide(OFFRAMP_DEFER);
    return 0;
}
