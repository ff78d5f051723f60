#include "lanes.h"

int64_t rows_for(const offramp_plan *plan, const offramp_request *request) {
    return (plan->waits ? plan->rules.pending : 0) + (request->reads ? request->reads : 1);
}

offramp_status check_request(const offramp_plan *plan, offramp_request *const *requests, int64_t q,
                             offramp_error *error) {
    const offramp_model *model = plan->model;
    const offramp_request *r = requests[q];
    const offramp_session *session = r->session;
    NEED(session && session->model == model, "A session belongs to another model.");
    NEED(!session->broken, "A session is half-written, since a request failed.");
    for (int64_t other = 0; other < q; other++)
        NEED(requests[other]->session != session, "A session is given twice.");
    NEED(0 <= r->run && r->run <= r->known && r->known < INT32_MAX && r->reads >= 0 &&
             r->reads <= r->known - r->run,
         "%lld of %lld tokens have been run, so %lld more cannot be read.", (long long)r->run,
         (long long)r->known, (long long)r->reads);
    NEED(r->reads || (r->known - r->run == 1 && r->most > 0),
         "A token is decided after one id that is not run yet, and not after %lld.",
         (long long)(r->known - r->run));
    for (int64_t t = r->run; t < r->known; t++)
        NEED(r->ids[t] >= 0 && r->ids[t] < model->vocabulary, "There is no token %lld.",
             (long long)r->ids[t]);
    NEED(r->deep || !plan->rules.count, "A request needs 'deep' if there are exits.");
    if (check_exits(session, r->run, plan->number, plan->rules.count, plan->mixers, error))
        return OFFRAMP_INVALID;
    const Choice choice = {.how = &r->how, .ids = r->ids, .known = r->known, .allowed = r->allowed};
    if (!r->reads && check_choice(&choice, model->vocabulary, error)) return OFFRAMP_INVALID;
    for (int64_t i = 0; i < model->count; i++) {
        const int64_t length = offramp_session_length(session, i);
        // A block may have fewer tokens: those that wait are not in deeper blocks yet, and fills may leave
        // states of mixers as they were.
        int64_t least = model->blocks[i].attends ? r->run : 0;
        if (plan->waits && (model->blocks[i].attends || model->blocks[i].mixes))
            least = r->run - waiting(session);
        NEED(length >= least && length <= r->run,
             "Block %lld has taken in %lld tokens, but the text has %lld.", (long long)i, (long long)length,
             (long long)r->run);
        // A mixer beside an attention has a length of its own.
        const int64_t mixed = session->blocks[i].mixed.length;
        NEED(!model->blocks[i].mixes || (mixed <= r->run && (!plan->waits || mixed >= least)),
             "The mixer of block %lld has taken in %lld tokens, but the text has %lld.", (long long)i,
             (long long)mixed, (long long)r->run);
    }
    return OFFRAMP_OK;
}

int64_t rows_of_call(const offramp_plan *plan, const offramp_request *r, int64_t rounds) {
    return r->reads ? r->reads
                    : min_(r->most, rounds * (plan->rules.fill == OFFRAMP_VERIFY ? MOST_DRAFTS + 1 : 1));
}

offramp_status prepare_session(const offramp_plan *plan, const offramp_request *r, int64_t rounds,
                               offramp_error *error) {
    offramp_session *session = r->session;
    const int64_t count = plan->rules.count, room = plan->rules.pending + 1;
    int whole = prepare_exits(session, plan->number, count, plan->mixers, room);
    for (int64_t i = 0; whole && i < plan->model->count; i++) {
        const Block *b = plan->model->blocks + i;
        whole = make_room(session, i, r->run, r->run + rows_of_call(plan, r, rounds));
        if (whole && b->mixes && (plan->takes_back || r->allowed))
            whole = prepare_watch(&b->mixer, &session->blocks[i].mixed, 3 * room);
    }
    for (int64_t e = 0; whole && e < count; e++)
        if (plan->mixers[e]) whole = prepare_watch(plan->mixers[e], session->exits.gates + e, 3 * room);
    return whole ? OFFRAMP_OK : fail(error, OFFRAMP_NO_MEMORY, "There is no memory for more tokens.");
}

static int64_t depth_of(const Lanes *l) { return l->plan->model->count; }
static const offramp_exit *exit_of(const Lanes *l, const Lane *lane) {
    return l->plan->exits + lane->segment;
}
static int verifies(const Lanes *l) { return l->plan->rules.fill == OFFRAMP_VERIFY; }

static int ends_with(const Lane *lane, int64_t id) {
    int end = 0;
    for (int64_t i = 0; i < lane->request->ends_count; i++) end |= id == lane->request->ends[i];
    return end;
}

static Prices prices_of(const Lanes *l, const Lane *lane) {
    const offramp_plan *plan = l->plan;
    const Estimates *e = &lane->session->estimates;
    const int64_t requests = l->deciding, width = l->width + l->reading;
    const double plain = pass_cost(plan, requests), now = pass_cost(plan, width);
    Prices prices = {.asking = plan->rules.count ? plan->exits[0].asking * plain / requests : 0,
                     .tokens = WORTH * fmax(requests / plain, e->tokens / e->cost),
                     .floor = plan->rules.count ? plan->exits[0].threshold : 0};
    double least = INFINITY;
    for (int64_t n = 0; n < MOST_DRAFTS; n++) {
        if (l->width + n < widest_pass(requests))
            least = fmin(least, (pass_cost(plan, width + n + 1) - now) / (n + 1));
        prices.rows[n] = least;
    }
    return prices;
}

// Appends a draft, with the work of its climb.
static void draft(Lane *lane, int64_t id, int64_t block, double confidence) {
    lane->drafts[lane->round.drafts] = (offramp_decision){.id = id,
                                                          .block = block,
                                                          .confidence = confidence,
                                                          .flops = lane->spent.flops,
                                                          .blocks = lane->spent.blocks,
                                                          .source = lane->round.source[lane->round.drafts]};
    keep_draft(&lane->session->estimates, &lane->round);
    lane->request->ids[lane->known++] = id;
    lane->spent = (Spent){0};
}

// Makes the drafts that cost nothing. Returns whether exits are asked for one more.
static int seek_drafts(Lanes *l, Lane *lane) {
    const offramp_plan *plan = l->plan;
    const offramp_request *r = lane->request;
    const int64_t most = min_(min_(plan->rules.pending, MOST_DRAFTS), r->most - r->decided - 1);
    Round *round = &lane->round;
    if (r->allowed) return 0;
    while (round->drafts < most) {
        const Prices prices = prices_of(l, lane);
        choose_source(&plan->free, &lane->session->estimates, round, plan->rules.count > 0, r->ids,
                      lane->known, &prices);
        const int64_t source = round->source[round->drafts], id = round->draft[round->drafts];
        if (source == EXIT) return 1;
        if (source == NOTHING || ends_with(lane, id) || !pays(&lane->session->estimates, round, &prices))
            return 0;
        draft(lane, id, 0, NAN);
        l->width++;
    }
    return 0;
}

static void set_out(Lanes *l, Lane *lane) {
    const offramp_plan *plan = l->plan;
    const int64_t reads = lane->request->reads;
    if (reads)
        lane->asks = 0;
    else if (verifies(l))
        lane->asks = seek_drafts(l, lane);
    else
        lane->asks = plan->rules.count && (!plan->waits || waiting(lane->session) < plan->rules.pending);
    const int64_t end = reads ? lane->run + reads : lane->known;
    lane->climbing = end - lane->run, lane->rows += lane->climbing, lane->run = end;
    lane->segment = 0, lane->climbs = 1;
}

int begin_round(Lanes *l) {
    int any = 0;
    l->deciding = l->reading = 0;
    if (!l->rounds) return 0;
    l->rounds--;
    for (int64_t q = 0; q < l->count; q++) {
        const Lane *lane = l->lanes + q;
        if (!lane->over) l->deciding += !lane->request->reads, l->reading += lane->request->reads;
    }
    l->width = l->deciding;
    for (int64_t q = 0; q < l->count; q++) {
        Lane *lane = l->lanes + q;
        if (lane->over) continue;
        lane->round = (Round){.chance = 1};
        lane->spent = (Spent){0};
        set_out(l, lane);
        any = 1;
    }
    return any;
}

static Mixed *mixed_of(const Lanes *l, const Lane *lane, int64_t i) {
    return l->plan->model->blocks[i].mixes ? &lane->session->blocks[i].mixed : NULL;
}

void enter_blocks(const Lanes *l, Lane *lane, int64_t start, int64_t stop) {
    for (int64_t i = start; i < stop; i++) {
        Mixed *m = mixed_of(l, lane, i);
        const Mixer *shape = &l->plan->model->blocks[i].mixer;
        if (!m) continue;
        // The exact states replace those that tokens put into the tails' blocks when they left early.
        if (m->watched && m->length > first_of(lane)) crop_mixed(shape, m, first_of(lane));
        if (lane->round.drafts) begin_watch(shape, m);
    }
}

void leave_blocks(const Lanes *l, Lane *lane, int64_t start, int64_t stop) {
    for (int64_t i = start; i < stop; i++)
        count_tokens(lane->session, i, lane->run, lane->climbing, OFFRAMP_BOTH);
    if (lane->request->reads) return;
    lane->spent.flops = plus(lane->spent.flops, flops_of(l->plan, start, stop, first_of(lane), lane->run));
    lane->spent.blocks += (stop - start) * lane->climbing;
}

void enter_ahead(const Lanes *l, Lane *lane, int64_t start, int64_t stop) {
    if (!l->plan->takes_back && !lane->request->allowed) return;
    for (int64_t i = start; i < stop; i++) {
        Mixed *m = mixed_of(l, lane, i);
        if (m) begin_watch(&l->plan->model->blocks[i].mixer, m);
    }
}

void count_asking(const Lanes *l, Lane *lane) {
    lane->round.asked += exit_of(l, lane)->asking * pass_cost(l->plan, l->deciding) / l->deciding;
}

double threshold_of(const Lanes *l, const Lane *lane, double threshold) {
    return decayed(l->plan, threshold, lane->known - lane->request->prompt) / lane->round.chance;
}

// Forgets the newest token in the tail of the exit.
static void take_back(const Lanes *l, Lane *lane) {
    const int64_t N = depth_of(l), tail = exit_of(l, lane)->tail;
    for (int64_t i = N - tail; i < N; i++)
        forget_tokens(lane->session, i, offramp_session_length(lane->session, i) - 1);
}

static void fail_lane(Lane *lane, int64_t why) {
    lane->request->failed = why, lane->session->broken = 1;
    lane->over = 1, lane->climbs = lane->leaves = 0;
}

void consider_leaving(Lanes *l, Lane *lane, int64_t chosen, double confidence) {
    const offramp_plan *plan = l->plan;
    const offramp_exit *exit = exit_of(l, lane);
    const int gated = plan->rules.confidence == OFFRAMP_GATE;
    if (chosen == -1 || (plan->measures && isnan(confidence))) {
        fail_lane(lane, OFFRAMP_NOT_FINITE);
        return;
    }
    lane->leaves = lane->sure > threshold_of(l, lane, exit->threshold);
    if (!gated || !lane->leaves) {
        lane->sure = plan->measures ? confidence : lane->sure;
        lane->leaves =
            plan->measures && lane->sure > threshold_of(l, lane, gated ? exit->key : exit->threshold);
    }
    lane->chosen = chosen;
    if (chosen < 0) lane->leaves = 0;
    if (verifies(l)) {
        Round *round = &lane->round;
        Prices prices = prices_of(l, lane);
        prices.floor = 0;
        round->draft[round->drafts] = chosen, round->promise[round->drafts] = lane->sure;
        if (lane->leaves && (ends_with(lane, chosen) || !pays(&lane->session->estimates, round, &prices)))
            lane->leaves = lane->asks = 0;
        l->width += lane->leaves;
    }
    if (!lane->leaves) take_back(l, lane);
}

// Records a decided token. Its id is already in the text.
static void decide(Lane *lane, offramp_decision decision) {
    offramp_request *r = lane->request;
    decision.passes = lane->passes, decision.rejected = lane->rejected;
    r->decisions[r->decided++] = decision;
    if (r->decided == r->most || r->allowed || ends_with(lane, decision.id)) lane->over = 1;
}

// No token is a draft any more, and none of those that do not wait can be forgotten.
static void settle(const Lanes *l, Lane *lane) {
    if (waiting(lane->session)) return;
    for (int64_t i = 0; i < depth_of(l); i++)
        if (mixed_of(l, lane, i)) end_watch(&l->plan->model->blocks[i].mixer, mixed_of(l, lane, i));
    for (int64_t e = 0; e < l->plan->rules.count; e++)
        if (l->plan->mixers[e]) end_watch(l->plan->mixers[e], lane->session->exits.gates + e);
}

void pass_exit(Lanes *l, Lane *lane, const float *state) {
    const offramp_exit *exit = exit_of(l, lane);
    int64_t *waits = lane->session->exits.waits + lane->segment;
    if (!lane->climbs) return;
    if (!lane->leaves) {
        lane->climbing += *waits, *waits = 0;
        lane->segment++;
        return;
    }
    lane->leaves = 0;
    lane->spent.flops = plus(lane->spent.flops, fill_flops(l->plan, exit));
    memcpy(lane->request->deep, state, l->plan->model->hidden * sizeof(float));
    if (l->plan->waits)
        *waits += lane->climbing;
    else
        lane->rows = 0;
    lane->climbing = 0;
    if (verifies(l)) {
        draft(lane, lane->chosen, exit->after, lane->sure);
        set_out(l, lane);
        return;
    }
    lane->climbs = 0;
    lane->request->ids[lane->known++] = lane->chosen;
    decide(lane, (offramp_decision){.id = lane->chosen,
                                    .block = exit->after,
                                    .confidence = lane->sure,
                                    .flops = lane->spent.flops,
                                    .blocks = lane->spent.blocks,
                                    .source = EXIT});
    settle(l, lane);
}

// Forgets every token from position `length` on.
static void forget(const Lanes *l, Lane *lane, int64_t length) {
    for (int64_t i = 0; i < depth_of(l); i++) forget_tokens(lane->session, i, length);
    for (int64_t e = 0; e < l->plan->rules.count; e++) {
        Mixed *gate = lane->session->exits.gates + e;
        if (l->plan->mixers[e] && gate->length > length) crop_mixed(l->plan->mixers[e], gate, length);
    }
    lane->run = min_(lane->run, length);
}

// Keeps the states of this row's token that read-outs will read.
static void keep_deep(const Lanes *l, Lane *lane, int64_t row) {
    const int64_t D = l->plan->model->hidden;
    if (!lane->request->deep) return;
    memcpy(lane->request->deep, lane->h + row * D, D * sizeof(float));
    if (l->plan->rules.middle) memcpy(lane->request->deep + D, lane->middles + row * D, D * sizeof(float));
}

void judge(Lanes *l, Lane *lane, const int64_t *chosen) {
    const int64_t last = lane->rows - 1, drafts = lane->round.drafts, first = lane->known - drafts;
    int64_t stood = 0;
    lane->climbs = 0;
    if (lane->request->reads) {
        keep_deep(l, lane, last);
        lane->over = 1, lane->rows = lane->climbing = 0;
        settle(l, lane);
        return;
    }
    while (stood < drafts && lane->drafts[stood].id == chosen[stood]) stood++;
    if (chosen[stood] < 0) {
        fail_lane(lane, chosen[stood] == -1 ? OFFRAMP_NOT_FINITE : OFFRAMP_NOTHING_FITS);
        return;
    }
    keep_deep(l, lane, last - drafts + stood);
    offramp_decision newest = {.id = chosen[stood], .block = depth_of(l), .confidence = NAN};
    for (int64_t n = stood; n < drafts; n++)
        lane->spent.flops = plus(lane->spent.flops, lane->drafts[n].flops),
        lane->spent.blocks += lane->drafts[n].blocks;
    newest.flops = lane->spent.flops, newest.blocks = lane->spent.blocks;
    lane->passes++, lane->rejected += drafts - stood;
    for (int64_t n = 0; n < stood; n++) decide(lane, lane->drafts[n]);
    lane->known = first + stood;
    lane->request->ids[lane->known++] = newest.id;
    decide(lane, newest);
    if (verifies(l)) {
        const double cost = pass_cost(l->plan, l->width) / l->deciding + lane->round.asked;
        learn_from(&lane->session->estimates, &lane->round, stood, chosen, cost);
        if (stood < drafts) forget(l, lane, first + stood);
    }
    lane->rows = lane->climbing = 0;
    settle(l, lane);
}

void conclude(const Lanes *l, Lane *lane) {
    offramp_request *r = lane->request;
    r->run = lane->session->exits.run = lane->run;
    if (lane->rows && !r->failed)
        memcpy(lane->session->exits.waiting, lane->h, lane->rows * l->plan->model->hidden * sizeof(float));
}
