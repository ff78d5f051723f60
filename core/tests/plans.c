// Plans and requests that are wrong: each is refused in a sentence, and changes nothing.

#include "steps.h"

static const int64_t IDS[] = {3, 1, 4, 1, 5};
enum { KNOWN = sizeof IDS / sizeof *IDS };

// Two exits of a model of three blocks, which fit.
static void begin_right(Rules *r, const Tiny *t) {
    begin_rules(r, t->count);
    r->rules.count = 2;
    for (int64_t e = 0; e < 2; e++)
        r->exits[e] = (offramp_exit){.after = 1 + e,
                                     .gate = gate_part(r, e ? RECURRENT : FFN),
                                     .readout = readout_part(r, 0, 0.3f),
                                     .threshold = 0.5,
                                     .perhaps = 1,
                                     .key = 1};
}

// What follows is refused once it was changed, and not before.
#define WRONG(change)                                         \
    do {                                                      \
        const int mark = kept_count;                          \
        Rules r;                                              \
        begin_right(&r, &t);                                  \
        offramp_plan_free(plan_of(&t, &r));                   \
        change;                                               \
        NOT_MADE(offramp_plan_new(t.model, &r.rules, &said)); \
        free_parts(&r), free_from(mark);                      \
    } while (0)

static void wrong_rules_are_refused(void) {
    Shape shape = SMALL;
    shape.blocks = "anm";
    const Tiny t = tiny(shape);
    WRONG(r.rules.fill = (offramp_fill)-1);
    WRONG(r.rules.fill = OFFRAMP_VERIFY + 1);
    WRONG(r.rules.confidence = (offramp_confidence)-1);
    WRONG(r.rules.confidence = OFFRAMP_ENTROPY + 1);
    WRONG(r.rules.key = OFFRAMP_GATE);
    WRONG(r.rules.key = OFFRAMP_ENTROPY + 1);
    WRONG(r.rules.pending = 0);
    WRONG(r.rules.pending = 65);
    WRONG(r.rules.pending = INT64_MIN);
    WRONG(r.rules.alike = -1);
    WRONG(r.rules.decay = -1);
    WRONG(r.rules.decay = NAN);
    WRONG(r.rules.row_costs[0] = NAN);
    WRONG(r.rules.row_costs[5] = -0.1);
    WRONG(r.rules.row_costs[5] = r.rules.row_costs[4] - 0.001);
    WRONG(r.rules.row_costs[OFFRAMP_MOST_DRAFTS] = 1e9);
    WRONG(r.rules.row_costs[OFFRAMP_MOST_DRAFTS] = INFINITY);
    WRONG(r.rules.middle = -1);
    WRONG(r.rules.middle = 1);
    WRONG(r.rules.middle = 4);
    WRONG(r.rules.count = -1);
    WRONG(r.rules.count = 5);
    WRONG(r.rules.count = INT64_MAX);
    WRONG(r.exits[1].after = 1);
    WRONG(r.exits[0].after = 3);
    WRONG(r.exits[0].after = -1);
    WRONG(r.exits[1].after = 4);
    WRONG(r.exits[1].after = INT64_MAX);
    WRONG(r.exits[0].tail = 3);
    WRONG(r.exits[1].tail = -1);
    WRONG(r.exits[1].tail = INT64_MAX);
    WRONG(r.exits[0].threshold = NAN);
    WRONG(r.exits[1].threshold = -0.1);
    WRONG(r.exits[1].threshold = 1.1);
    WRONG(r.exits[0].perhaps = NAN);
    WRONG(r.exits[0].key = NAN);
    WRONG(r.exits[0].asking = NAN);
    WRONG(r.exits[1].asking = -1);
    WRONG(r.exits[0].gate = NULL);
    WRONG(r.exits[0].gate = r.exits[0].readout);
    WRONG(r.exits[0].gate = part_of_rules(&r, "gate"));
    WRONG(r.exits[1].gate = part_of_rules(&r, "mamba_gate"));
    WRONG(r.exits[0].readout = NULL);
    WRONG(r.exits[0].readout = r.exits[0].gate);
    WRONG(r.exits[0].readout = readout_part(&r, 2, 0.3f));
    WRONG(give_floats((offramp_part *)r.exits[1].readout, "scale", zeros(D), D - 1));
    WRONG(r.rules.sketch = r.exits[0].gate);
    WRONG(r.rules.sketch = sketch_part(&r, 49, 8));
    WRONG(r.rules.exit_sketch = sketch_part(&r, 50, 51));
    WRONG(r.rules.shortlist = part_of_rules(&r, "shortlist"));
    WRONG((r.rules.shortlist = shortlist_part(&r, &t, 2), r.rules.exit_sketch = sketch_part(&r, 50, 8)));
    WRONG(r.rules.guesses = part_of_rules(&r, "guesses"));
    offramp_model_free(t.model);
}

// Keys of different shapes cannot be copied.
static void copied_keys_have_one_shape(void) {
    Shape shape = SMALL, other = SMALL;
    other.heads = 4;
    Tiny t = {.shape = SMALL, .count = 3};
    offramp_part *ends = ends_part(&shape, &t),
                 *attentions[] = {attention_part(&shape, t.layers), NULL,
                                  attention_part(&other, t.layers + 2)},
                 *mixers[] = {NULL, mixer_part(&shape, t.layers + 1), NULL};
    t.model = model_made_of(ends, attentions, mixers, NULL, 3);
    MADE(t.model);
    WRONG(r.rules.fill = OFFRAMP_COPY);
    for (int i = 0; i < 3; i++) offramp_part_free(attentions[i]), offramp_part_free(mixers[i]);
    offramp_part_free(ends), offramp_model_free(t.model);
}

static void wrong_requests_are_refused(void) {
    Shape shape = SMALL;
    shape.blocks = "anm", shape.positions = 20;
    const Tiny t = tiny(shape), stranger = tiny(shape);
    Rules rules;
    begin_right(&rules, &t);
    offramp_plan *plan = plan_of(&t, &rules);
    Text *x = text_of(&t, OFFRAMP_FLOAT32, IDS, KNOWN), *y = text_of(&t, OFFRAMP_FLOAT32, IDS, KNOWN),
         *before;
    Text *strange = text_of(&stranger, OFFRAMP_FLOAT32, IDS, KNOWN);
    step_all(plan, &x, 1, 3, 1);
    x->r.reads = 0, x->r.most = 2, y->r.reads = 2;
    x->r.decisions = x->decisions + 3;
    before = fork_of(x);
    offramp_request *requests[] = {&y->r, &x->r}, kept = x->r, *twice[] = {&x->r, &x->r};
#define REFUSES(change)                                                                                  \
    do {                                                                                                 \
        change;                                                                                          \
        REFUSED(offramp_step(plan, requests, 2, 1, NULL, &said));                                        \
        CHECK(all_the_same(&t, kept.session, before->r.session) && same(x->deep, before->deep, 2 * D) && \
                  offramp_session_length(y->r.session, 0) == 0 && x->r.decided == kept.decided,          \
              "a refused step changed something");                                                       \
        x->r = kept;                                                                                     \
    } while (0)
    REFUSES(x->r.session = NULL);
    REFUSES(x->r.session = strange->r.session);
    REFUSES(x->r.session = y->r.session);
    REFUSES(x->r.run = -1);
    REFUSES(x->r.run -= 1);
    REFUSES(x->r.run += 1);
    REFUSES(x->r.known -= 1);
    REFUSES(x->r.known += 1);
    REFUSES(x->r.known = INT64_MAX);
    REFUSES(x->r.reads = -1);
    REFUSES(x->r.reads = 2);
    REFUSES(x->r.reads = INT64_MAX);
    REFUSES(x->r.most = 0);
    REFUSES(x->r.most = INT64_MIN);
    REFUSES(x->r.deep = NULL);
    REFUSES(x->r.how.temperature = -1);
    REFUSES(x->r.how.temperature = NAN);
    REFUSES(x->r.how.top_p = 0);
    REFUSES(x->r.how.top_k = -1);
    REFUSES(x->r.how.min_p = 2);
    REFUSES(x->r.how.penalty = 0);
    const int64_t last = x->ids[x->r.known - 1];
    for (int64_t id = -1; id <= 50; id += 51) {
        REFUSES(x->ids[x->r.known - 1] = id);
        x->ids[x->r.known - 1] = last;
        REFUSES(x->ids[0] = id);
        x->ids[0] = IDS[0];
        REFUSES(y->ids[1] = id);
        y->ids[1] = IDS[1];
    }
    int64_t *many = memory(131074 * (int64_t)sizeof *many), *few = y->r.ids;
    memset(many, 0, 131074 * sizeof *many);
    const int64_t known = y->r.known;
    y->r.ids = many, y->r.known = 131074;
    REFUSES(y->r.reads = 131073);
    CHECK(strstr(said.message, "too many for a pass"), "it says '%s'", said.message);
    y->r.ids = few, y->r.known = known, y->r.reads = 2;
    static const int64_t rounds[] = {0, -1, 257, INT64_MAX};
    for (int i = 0; i < 4; i++) REFUSED(offramp_step(plan, requests, 2, rounds[i], NULL, &said));
    REFUSED(offramp_step(plan, requests, -1, 1, NULL, &said));
    REFUSED(offramp_step(plan, requests, 1025, 1, NULL, &said));
    REFUSED(offramp_step(plan, twice, 2, 1, NULL, &said));
    CHECK(all_the_same(&t, x->r.session, before->r.session), "a refused step changed something");
    requests[0] = &before->r, before->r.decisions = before->decisions + 3;
    double seconds[4] = {-1, -1, -1, -1};
    WORKS(offramp_step(plan, requests, 2, 2, seconds, &said));
    CHECK(x->r.decided == 2 && all_the_same(&t, x->r.session, before->r.session),
          "it goes on as a fork does");
    for (int i = 0; i < 4; i++) CHECK(seconds[i] >= 0 && seconds[i] < 9, "%g seconds", seconds[i]);
    WORKS(offramp_step(plan, NULL, 0, 1, seconds, &said));
    offramp_session_free(x->r.session), offramp_session_free(y->r.session);
    offramp_session_free(before->r.session), offramp_session_free(strange->r.session);
    offramp_plan_free(plan), offramp_plan_free(NULL), free_parts(&rules);
    offramp_model_free(t.model), offramp_model_free(stranger.model);
}

// A plan outlives its model, and a session that has gone ahead in some blocks cannot be stepped.
static void lives_and_lengths(void) {
    Shape shape = SMALL;
    shape.blocks = "am";
    const Tiny t = tiny(shape);
    Rules rules;
    begin_rules(&rules, 2);
    offramp_plan *plan = plan_of(&t, &rules);
    Text *x = text_of(&t, OFFRAMP_FLOAT32, IDS, KNOWN);
    x->r.deep = NULL;
    offramp_model_free(t.model);
    step_all(plan, &x, 1, 4, 2);
    float h[D] = {0};
    const offramp_rows row = {x->r.session, x->r.run, 1};
    WORKS(offramp_run(t.model, 0, 1, &row, 1, h, &said));
    x->r.most = 1;
    REFUSED(offramp_step(plan, (offramp_request *[]){&x->r}, 1, 1, NULL, &said));
    offramp_session_free(x->r.session), offramp_plan_free(plan);
}

int main(void) {
    wrong_rules_are_refused();
    copied_keys_have_one_shape();
    wrong_requests_are_refused();
    lives_and_lengths();
    return 0;
}
