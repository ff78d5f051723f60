#include "plan.h"

#include <math.h>
#include <stdlib.h>

enum {
    MOST_PENDING = 64,       // tokens that wait; windows keep as many spare positions
    MOST_COST = 1000000000,  // of a pass, in passes of one row
};

double pass_cost(const offramp_plan *plan, int64_t rows) {
    const double *more = plan->rules.row_costs, last = more[MOST_DRAFTS] - more[MOST_DRAFTS - 1];
    return 1 + more[min_(rows - 1, MOST_DRAFTS)] + last * larger(0, rows - 1 - MOST_DRAFTS);
}

double decayed(const offramp_plan *plan, double threshold, int64_t decided) {
    const double decay = plan->rules.decay;
    return decay > 0 && threshold < 1 ? 0.9 * threshold + 0.1 * exp(-decided / decay) : threshold;
}

int64_t flops_of(const offramp_plan *plan, int64_t start, int64_t stop, int64_t first, int64_t end) {
    int64_t flops = 0;
    for (int64_t i = start; i < stop; i++) {
        const offramp_block_costs *costs = plan->costs + i;
        const Block *b = plan->model->blocks + i;
        const int64_t window = b->attends ? b->attention.window : 0;
        int64_t seen = 0;
        for (int64_t p = first; costs->seen_flops && p < end; p++)
            seen = plus(seen, window ? min_(p + 1, window) : p + 1);
        flops = plus(flops, plus(times(costs->flops, end - first), times(costs->seen_flops, seen)));
    }
    return flops;
}

Filled filled_at(const offramp_plan *plan, const offramp_exit *exit) {
    const int64_t fill = plan->rules.fill;
    Filled filled = {exit->after, plan->model->count - exit->tail,
                     fill == OFFRAMP_FREEZE || fill == OFFRAMP_COPY ? OFFRAMP_KEYS : OFFRAMP_BOTH, -1};
    if (plan->waits) filled.start = larger(filled.start, plan->first_tail);
    for (int64_t i = 0; fill == OFFRAMP_COPY && i < exit->after; i++)
        if (plan->model->blocks[i].attends) filled.source = i;
    return filled;
}

int64_t fill_flops(const offramp_plan *plan, const offramp_exit *exit) {
    const Filled filled = filled_at(plan, exit);
    int64_t flops = 0;
    for (int64_t i = filled.start; filled.source < 0 && i < filled.stop; i++)
        flops = plus(flops, plus(plan->costs[i].key_flops,
                                 filled.what & OFFRAMP_STATES ? plan->costs[i].state_flops : 0));
    return flops;
}

static int is_share(double value) { return value >= 0 && value <= 1; }  // NaN is none

static offramp_status check_exit(offramp_plan *plan, int64_t e, offramp_error *error) {
    const offramp_model *model = plan->model;
    const offramp_exit *exit = plan->exits + e;
    NEED(exit->after >= 0 && exit->tail >= 0 && exit->after <= model->count &&
             exit->tail <= model->count - exit->after,
         "An exit after %lld blocks with a tail of %lld does not fit %lld blocks.", (long long)exit->after,
         (long long)exit->tail, (long long)model->count);
    NEED(!e || exit[-1].after < exit->after, "Exits must stand in the order of their blocks.");
    NEED(is_share(exit->threshold) && is_share(exit->perhaps) && is_share(exit->key),
         "A threshold is 0 to 1.");
    NEED(exit->gate_flops >= 0 && exit->readout_flops >= 0, "FLOPs are 0 or more.");
    NEED(exit->asking >= 0 && isfinite(exit->asking), "What asking an exit costs is 0 or more.");
    Exit *parts = plan->parts + e;
    NEED(exit->gate || plan->rules.confidence != OFFRAMP_GATE, "An exit has no gate.");
    if (exit->gate && !check_kind(exit->gate, "mamba_gate", NULL)) {
        if (check_mamba_gate(exit->gate, &parts->mamba_gate, model->hidden, error)) return OFFRAMP_INVALID;
        plan->mixers[e] = &parts->mamba_gate.mixer;
    } else if (exit->gate) {
        if (check_gate(exit->gate, model->hidden, error)) return OFFRAMP_INVALID;
        parts->gate = exit->gate->gate;
    }
    if (check_readout(exit->readout, &parts->readout, model->hidden, error)) return OFFRAMP_INVALID;
    NEED(parts->readout.reads < 2 || plan->rules.middle,
         "A read-out reads a middle state, but the plan has none.");
    return OFFRAMP_OK;
}

static offramp_status check_rules(offramp_plan *plan, offramp_error *error) {
    const offramp_model *model = plan->model;
    const offramp_rules *rules = &plan->rules;
    const int64_t D = model->hidden, V = model->vocabulary,
                  last = rules->count ? plan->exits[rules->count - 1].after : 0;
    NEED((int)rules->fill >= OFFRAMP_PROJECT && rules->fill <= OFFRAMP_VERIFY, "There is no such fill.");
    NEED((int)rules->confidence >= OFFRAMP_GATE && rules->confidence <= OFFRAMP_ENTROPY &&
             rules->key > OFFRAMP_GATE && rules->key <= OFFRAMP_ENTROPY,
         "There is no such confidence.");
    NEED(rules->pending > 0 && rules->pending <= MOST_PENDING, "1 to %d tokens may wait, and not %lld.",
         MOST_PENDING, (long long)rules->pending);
    NEED(rules->middle >= 0 && rules->middle <= model->count && (!rules->middle || rules->middle >= last),
         "A middle state cannot be after %lld blocks.", (long long)rules->middle);
    NEED(rules->alike >= 0 && rules->decay >= 0, "A number of tokens is 0 or more.");
    NEED(rules->head_flops >= 0 && rules->exit_head_flops >= 0, "FLOPs are 0 or more.");
    for (int64_t i = 0; i < model->count; i++) {
        const offramp_block_costs *costs = plan->costs + i;
        NEED(costs->flops >= 0 && costs->seen_flops >= 0 && costs->key_flops >= 0 && costs->state_flops >= 0,
             "FLOPs are 0 or more.");
    }
    for (int64_t n = 0; n < OFFRAMP_DEPTHS; n++)
        NEED(is_share(rules->accepted[n]), "A share of drafts is 0 to 1.");
    for (int64_t n = 0; n <= OFFRAMP_MOST_DRAFTS; n++)
        NEED(rules->row_costs[n] >= (n ? rules->row_costs[n - 1] : 0) && rules->row_costs[n] < MOST_COST,
             "The costs of rows are 0 to %d, and none is less than the one before.", MOST_COST);
    NEED(!rules->count || !(rules->exit_sketch && rules->shortlist),
         "Exits have a sketch or a short list, not both.");
    for (int64_t e = 0; e < rules->count; e++)
        if (check_exit(plan, e, error)) return OFFRAMP_INVALID;
    if (rules->sketch && check_sketch(rules->sketch, D, V, error)) return OFFRAMP_INVALID;
    if (rules->exit_sketch && check_sketch(rules->exit_sketch, D, V, error)) return OFFRAMP_INVALID;
    if (rules->shortlist && check_shortlist(rules->shortlist, D, V, error)) return OFFRAMP_INVALID;
    if (rules->guesses && check_guesses(rules->guesses, V, error)) return OFFRAMP_INVALID;
    if (rules->fill != OFFRAMP_COPY) return OFFRAMP_OK;
    const Attention *first = NULL;
    for (int64_t i = 0; i < model->count; i++) {
        const Attention *a = &model->blocks[i].attention;
        if (!model->blocks[i].attends) continue;
        first = first ? first : a;
        NEED(a->heads == first->heads && a->dim == first->dim, "Keys of different shapes cannot be copied.");
    }
    return OFFRAMP_OK;
}

// Computes the fields that follow from the rules.
static void derive(offramp_plan *plan) {
    const offramp_rules *rules = &plan->rules;
    const int64_t N = plan->model->count;
    int keys = 0;
    plan->first_tail = N;
    for (int64_t e = 0; e < rules->count; e++) {
        plan->first_tail = min_(plan->first_tail, N - plan->exits[e].tail);
        keys |= has_key(plan->exits + e);
    }
    plan->waits = rules->fill >= OFFRAMP_DEFER;
    plan->takes_back = plan->waits || keys || rules->confidence != OFFRAMP_GATE;
    plan->measures = rules->confidence != OFFRAMP_GATE ? rules->confidence : keys ? rules->key : OFFRAMP_GATE;
    plan->sketch = rules->sketch ? &rules->sketch->sketch : NULL;
    plan->exit_sketch = rules->exit_sketch ? &rules->exit_sketch->sketch : NULL;
    plan->exit_head = rules->shortlist ? &rules->shortlist->shortlist.head : &plan->model->ends.head;
    plan->tokens = rules->shortlist ? rules->shortlist->shortlist.tokens.values : NULL;
    plan->free = (Free){rules->guesses ? &rules->guesses->guesses : NULL, rules->alike, rules->accepted};
}

offramp_plan *offramp_plan_new(offramp_model *model, const offramp_rules *rules, offramp_error *error) {
    static _Atomic int64_t plans;
    const int64_t N = model->count, count = rules->count;
    if (count < 0 || count > N + 1) {
        fail(error, OFFRAMP_INVALID, "A plan cannot have %lld exits.", (long long)count);
        return NULL;
    }
    offramp_plan *plan = calloc(1, sizeof *plan);
    if (plan) {
        *plan = (offramp_plan){.model = model, .number = ++plans, .rules = *rules};
        atomic_fetch_add(&model->users, 1);
        plan->exits = calloc(count + 1, sizeof *plan->exits);
        plan->mixers = calloc(count + 1, sizeof *plan->mixers);
        plan->parts = calloc(count + 1, sizeof *plan->parts);
        plan->costs = calloc(N + 1, sizeof *plan->costs);
    }
    if (!plan || !plan->exits || !plan->mixers || !plan->parts || !plan->costs) {
        offramp_plan_free(plan);
        fail(error, OFFRAMP_NO_MEMORY, "There is no memory for a plan.");
        return NULL;
    }
    if (count) memcpy(plan->exits, rules->exits, count * sizeof *plan->exits);
    if (rules->costs && N) memcpy(plan->costs, rules->costs, N * sizeof *plan->costs);
    plan->rules.exits = plan->exits, plan->rules.costs = plan->costs;
    if (!check_rules(plan, error)) {
        derive(plan);
        return plan;
    }
    offramp_plan_free(plan);
    return NULL;
}

void offramp_plan_free(offramp_plan *plan) {
    if (!plan) return;
    offramp_model_free(plan->model);
    free(plan->exits), free(plan->parts), free(plan->mixers), free(plan->costs);
    free(plan);
}
