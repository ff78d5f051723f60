// A step of any number of requests. It is made of turns. In each, one thread decides which lanes climb next:
// those that are furthest behind. Their rows run through the blocks up to the next exit, or to the top, in
// one pass. At an exit, gates and read-outs say who leaves; at the top, full depth decides.
//
// Control flow depends only on values in the turn. They are written once, each in a place of its own, so a
// thread that comes late does as the others did. The lanes change all the time, so only a thread that holds a
// piece may read them.

#include <sys/stat.h>

#include "step.h"
#include "values.h"

enum { MOST_LANES = 1 << 10, MOST_ROUNDS = 1 << 8, MOST_ROWS = 1 << 17 };

// Adds rows `from` to `to` - 1 of a lane to a group.
static void add(Group *g, Lane *lane, int64_t from, int64_t to) {
    Tokens *t = &g->tokens;
    for (int64_t r = from; r < to; r++, t->count++) {
        const int64_t position = lane->run - lane->rows + r;
        ((int64_t *)t->positions)[t->count] = position, ((int64_t *)t->sequences)[t->count] = g->lanes;
        g->row_of[t->count] = r, t->end = larger(t->end, position + 1);
    }
    g->who[g->lanes++] = lane;
}

static Choice choice_of(const Lane *lane, int64_t known) {
    const offramp_request *r = lane->request;
    return (Choice){.how = &r->how, .ids = r->ids, .known = known, .allowed = r->allowed};
}

// At the top, adds the rows of a lane that are read out to a turn.
static void add_judged(Turn *turn, Lane *lane) {
    const int64_t drafts = lane->round.drafts;
    if (lane->request->reads) return;
    for (int64_t n = 0; n <= drafts; n++)
        turn->choices[turn->judged.tokens.count + n] = choice_of(lane, lane->known - drafts + n);
    add(&turn->judged, lane, lane->rows - drafts - 1, lane->rows);
}

// The memories of a group's sequences in blocks `start` to `stop` - 1.
static void find_memories(Step *s, const Group *g, int64_t start, int64_t stop) {
    for (int64_t i = start; i < stop; i++)
        for (int64_t q = 0; q < g->lanes; q++) s->memory[i * g->lanes + q] = memory_at(g->who[q]->session, i);
}

// Whether the exit's gate is asked about a lane.
static int asks_gate(const Step *s, const Lane *lane, const offramp_exit *exit) {
    return s->plan->rules.confidence == OFFRAMP_GATE && threshold_of(&s->lanes, lane, exit->threshold) > 0;
}

// Sets up a turn: the lanes that are furthest behind, and their rows. Begins a round if there are none.
static void set_up(Step *s, Turn *turn) {
    const int64_t count = s->plan->rules.count, N = s->model->count;
    int64_t segment = count + 1;
    for (int began = 0;; began = 1) {
        for (int64_t q = 0; q < s->lanes.count; q++)
            if (s->lanes.lanes[q].climbs) segment = min_(segment, s->lanes.lanes[q].segment);
        if (segment <= count) break;
        if (began || !begin_round(&s->lanes)) {
            turn->over = 1;
            return;
        }
    }
    const offramp_exit *exits = s->plan->exits;
    turn->first = !segment, turn->top = segment == count, turn->exit = turn->top ? -1 : segment;
    turn->start = segment ? exits[segment - 1].after : 0, turn->stop = turn->top ? N : exits[segment].after;
    for (int64_t q = 0; q < s->lanes.count; q++) {
        Lane *lane = s->lanes.lanes + q;
        if (!lane->climbs || lane->segment != segment) continue;
        enter_blocks(&s->lanes, lane, turn->start, turn->stop);
        add(&turn->climbing, lane, lane->rows - lane->climbing, lane->rows);
        if (!turn->top && lane->asks && asks_gate(s, lane, exits + segment))
            add(&turn->asked, lane, lane->rows - 1, lane->rows);
        if (turn->top && !(s->plan->sketch && lane->request->whole)) add_judged(turn, lane);
    }
    turn->whole = turn->judged.tokens.count;
    for (int64_t q = 0; turn->top && s->plan->sketch && q < turn->climbing.lanes; q++)
        if (turn->climbing.who[q]->request->whole) add_judged(turn, turn->climbing.who[q]);
    turn->climbing.tokens.h = s->h;
    find_memories(s, &turn->climbing, turn->start, turn->stop);
}

// Runs a group's rows through blocks `start` to `stop` - 1.
static void run(Step *s, Hand *hand, const Group *g, int64_t start, int64_t stop) {
    Worker w = worker_of(s->model, &g->tokens, &s->buffers, hand);
    run_blocks(&w, start, stop, s->memory, g->lanes);
}

static void climb(Step *s, Hand *hand, Turn *turn) {
    const Group *g = &turn->climbing;
    const int64_t D = s->model->hidden, middle = s->plan->rules.middle;
    EACH_PIECE(r, hand, g->tokens.count) {
        const Lane *lane = g->who[g->tokens.sequences[r]];
        float *h = s->h + r * D;
        if (!turn->first) {
            memcpy(h, lane->h + g->row_of[r] * D, D * sizeof(float));
            continue;
        }
        values_of_row(&s->model->ends.embedding, lane->request->ids[g->tokens.positions[r]], h);
        for (int64_t k = 0; k < D; k++) h[k] *= s->model->ends.scale;
    }
    if (turn->top && middle) {
        run(s, hand, g, turn->start, middle);
        EACH_PIECE(r, hand, g->tokens.count)
        memcpy(g->who[g->tokens.sequences[r]]->middles + g->row_of[r] * D, s->h + r * D, D * sizeof(float));
        run(s, hand, g, middle, turn->stop);
    } else {
        run(s, hand, g, turn->start, turn->stop);
    }
    EACH_PIECE(r, hand, g->tokens.count)
    memcpy(g->who[g->tokens.sequences[r]]->h + g->row_of[r] * D, s->h + r * D, D * sizeof(float));
}

// Copies the states of a group's rows side by side.
static void gather(Hand *hand, const Group *g, int64_t D, float *to) {
    EACH_PIECE(r, hand, g->tokens.count)
    memcpy(to + r * D, g->who[g->tokens.sequences[r]]->h + g->row_of[r] * D, D * sizeof(float));
}

// After gates: which lanes read out.
static void consider(Step *s, Turn *turn) {
    const offramp_exit *exit = s->plan->exits + turn->exit;
    const Group *g = &turn->climbing;
    int64_t asked = 0, row = 0;
    for (int64_t q = 0; q < g->lanes; q++) {
        Lane *lane = g->who[q];
        leave_blocks(&s->lanes, lane, turn->start, turn->stop);
        row += lane->climbing;
        if (s->plan->mixers[turn->exit]) {
            count_mixed(lane->session->exits.gates + turn->exit, lane->climbing);
            if (!lane->request->reads)
                lane->spent.flops = plus(lane->spent.flops, times(exit->gate_flops, lane->climbing));
        }
        if (!lane->asks) continue;
        lane->sure = 1;
        count_asking(&s->lanes, lane);
        if (asks_gate(s, lane, exit)) {
            const double logit = s->logits[s->plan->mixers[turn->exit] ? row - 1 : asked++];
            const double lowest = threshold_of(&s->lanes, lane, exit->threshold);
            lane->sure = 1 / (1 + exp(-logit));
            if (!s->plan->mixers[turn->exit]) lane->spent.flops = plus(lane->spent.flops, exit->gate_flops);
            if (!(lane->sure > (has_key(exit) ? fmin(lowest, exit->perhaps) : lowest))) continue;
        }
        const offramp_sampling *how = &lane->request->how;
        turn->expands |=
            s->plan->tokens && (how->temperature > 0 || how->penalty != 1 || lane->request->allowed);
        turn->choices[turn->reading.lanes] = choice_of(lane, lane->known);
        s->deep[turn->reading.lanes] = lane->request->deep;
        lane->spent.flops =
            plus(lane->spent.flops, plus(exit->readout_flops, s->plan->rules.exit_head_flops));
        lane->request->asked++;
        add(&turn->reading, lane, lane->rows - 1, lane->rows);
    }
    const int64_t N = s->model->count, start = N - exit->tail;
    for (int64_t q = 0; q < turn->reading.lanes; q++) {
        Lane *lane = turn->reading.who[q];
        enter_ahead(&s->lanes, lane, start, N);
        lane->spent.flops = plus(lane->spent.flops, flops_of(s->plan, start, N, lane->run - 1, lane->run));
        lane->spent.blocks += exit->tail;
    }
    find_memories(s, &turn->reading, start, N);
    turn->reading.tokens.h = s->out;
}

static void ask(Step *s, Hand *hand, Turn *turn) {
    const Exit *exit = s->plan->parts + turn->exit;
    const GateRoom *room = s->gate_rooms + turn->exit;
    const Group *g = &turn->climbing;
    if (s->plan->mixers[turn->exit]) {
        EACH_PIECE(q, hand, g->lanes) {
            Mixed *m = g->who[q]->session->exits.gates + turn->exit;
            if (s->plan->rules.fill == OFFRAMP_VERIFY && !g->who[q]->request->reads)
                begin_watch(s->plan->mixers[turn->exit], m);
            s->gates[q] = (MemoryAt){.state = state_at(s->plan->mixers[turn->exit], m)};
        }
        ask_mamba_gates(hand, &exit->mamba_gate, s->h, g->tokens.count, g->tokens.sequences, s->gates, room,
                        s->logits);
    } else if (turn->asked.lanes) {
        gather(hand, &turn->asked, s->model->hidden, s->states);
        ask_gates(hand, &exit->gate, s->states, turn->asked.lanes, room, s->logits);
    }
    EACH_PIECE(i, hand, 1) consider(s, turn);
}

// Runs the exit's head, and chooses tokens.
static void read_out(Step *s, Hand *hand, Turn *turn) {
    const offramp_plan *plan = s->plan;
    const offramp_exit *exit = plan->exits + turn->exit;
    const Group *g = &turn->reading;
    const Ends *ends = &s->model->ends;
    const int64_t R = g->lanes, N = s->model->count, n = plan->exit_head->rows, V = s->model->vocabulary;
    float *y = plan->tokens ? s->short_y : s->y;
    gather(hand, g, s->model->hidden, s->states);
    read_outs(hand, &plan->parts[turn->exit].readout, s->states, s->deep, R, s->readout_rooms + turn->exit,
              s->out);
    if (exit->tail) run(s, hand, g, N - exit->tail, N);
    read_logits(hand, ends, plan->exit_head, plan->exit_sketch, s->out, R, &s->exit_head, turn->found, y);
    if (plan->measures) confidences(hand, plan->measures, y, R, n, &s->confidence, s->sures);
    if (turn->expands) EACH_PIECE(r, hand, R) {
            for (int64_t v = 0; v < V; v++) s->y[r * V + v] = -INFINITY;
            for (int64_t v = 0; v < n; v++) s->y[r * V + plan->tokens[v]] = y[r * n + v];
        }
    const int whole = turn->expands || !plan->tokens;
    choose_rows(hand, turn->choices, R, whole ? s->y : y, whole ? V : n, &s->choose, s->chosen);
}

// Decides which lanes leave, and fills their skipped blocks.
static void leave(Step *s, Turn *turn) {
    const offramp_plan *plan = s->plan;
    const offramp_exit *exit = plan->exits + turn->exit;
    const Filled filled = filled_at(plan, exit);
    const Group *g = &turn->reading;
    for (int64_t q = 0; q < g->lanes; q++) {
        Lane *lane = g->who[q];
        for (int64_t i = s->model->count - exit->tail; i < s->model->count; i++)
            count_tokens(lane->session, i, lane->run, 1, OFFRAMP_BOTH);
        const int64_t id = s->chosen[q], listed = plan->tokens && !turn->expands && id >= 0;
        consider_leaving(&s->lanes, lane, listed ? plan->tokens[id] : id, plan->measures ? s->sures[q] : 0);
        if (!lane->leaves) continue;
        enter_ahead(&s->lanes, lane, filled.start, filled.stop);
        add(&turn->leaving, lane, lane->rows - 1, lane->rows);
        for (int64_t i = filled.start; filled.source >= 0 && i < filled.stop; i++)
            if (s->model->blocks[i].attends) offramp_session_copy(lane->session, filled.source, i, 1, NULL);
    }
    find_memories(s, &turn->leaving, filled.start, filled.stop);
    turn->leaving.tokens.h = s->h;
}

static void at_exit(Step *s, Hand *hand, Turn *turn) {
    const Filled filled = filled_at(s->plan, s->plan->exits + turn->exit);
    const Group *left = &turn->leaving;
    ask(s, hand, turn);
    if (turn->reading.lanes) {
        read_out(s, hand, turn);
        EACH_PIECE(i, hand, 1) leave(s, turn);
    }
    const int fills = left->lanes && filled.source < 0 && filled.start < filled.stop;
    if (fills) {
        gather(hand, left, s->model->hidden, s->h);
        Worker w = worker_of(s->model, &left->tokens, &s->buffers, hand);
        remember_blocks(&w, filled.start, filled.stop, s->memory, left->lanes, filled.what);
    }
    EACH_PIECE(i, hand, 1) {
        for (int64_t q = 0; fills && q < left->lanes; q++)
            for (int64_t b = filled.start; b < filled.stop; b++)
                count_tokens(left->who[q]->session, b, left->who[q]->run, 1, filled.what);
        for (int64_t q = 0, out = 0; q < turn->climbing.lanes; q++) {
            Lane *lane = turn->climbing.who[q];
            const int read = out < turn->reading.lanes && turn->reading.who[out] == lane;
            pass_exit(&s->lanes, lane, s->out + out * s->model->hidden);
            out += read;
        }
    }
}

static void at_top(Step *s, Hand *hand, Turn *turn) {
    const Ends *ends = &s->model->ends;
    const int64_t D = s->model->hidden, V = s->model->vocabulary, R = turn->judged.tokens.count,
                  whole = turn->whole;
    if (R) {
        gather(hand, &turn->judged, D, s->states);
        if (whole)
            read_logits(hand, ends, &ends->head, s->plan->sketch, s->states, whole, &s->head, turn->found,
                        s->y);
        if (R > whole)
            read_logits(hand, ends, &ends->head, NULL, s->states + whole * D, R - whole, &s->head, NULL,
                        s->y + whole * V);
        choose_rows(hand, turn->choices, R, s->y, V, &s->choose, s->chosen);
    }
    EACH_PIECE(i, hand, 1) {
        for (int64_t q = 0; q < turn->climbing.lanes; q++)
            leave_blocks(&s->lanes, turn->climbing.who[q], turn->start, turn->stop);
        int64_t row = 0;
        for (int64_t q = 0; q < turn->judged.lanes; q++) {
            Lane *lane = turn->judged.who[q];
            const int64_t rows = lane->round.drafts + 1;
            lane->spent.flops = plus(lane->spent.flops, times(s->plan->rules.head_flops, rows));
            judge(&s->lanes, lane, s->chosen + row);
            row += rows;
        }
        for (int64_t q = 0; q < turn->climbing.lanes; q++)
            if (turn->climbing.who[q]->request->reads) judge(&s->lanes, turn->climbing.who[q], NULL);
    }
}

static void take_step(Hand *hand, void *context) {
    Step *s = context;
    double times[3];
    for (Turn *turn = s->turns;; turn++) {
        times[0] = seconds_now();
        EACH_PIECE(i, hand, 1) set_up(s, turn);
        if (turn->over) return;
        times[1] = seconds_now();
        climb(s, hand, turn);
        times[2] = seconds_now();
        (turn->top ? at_top : at_exit)(s, hand, turn);
        if (hand->index) continue;
        s->seconds[BETWEEN] += times[1] - times[0], s->seconds[BLOCKS] += times[2] - times[1];
        s->seconds[turn->top ? HEADS : EXITS] += seconds_now() - times[2];
    }
}

// Sets up the lanes.
static void enter(Step *s) {
    const int64_t D = s->model->hidden;
    for (int64_t q = 0; q < s->lanes.count; q++) {
        Lane *lane = s->lanes.lanes + q;
        offramp_request *r = s->requests[q];
        lane->request = r, lane->session = r->session, lane->known = r->known, lane->run = r->run;
        expect(&lane->session->estimates, s->plan->rules.accepted);
        r->decided = r->asked = r->failed = 0;
        lane->rows = waiting(r->session);
        if (lane->rows) memcpy(lane->h, r->session->exits.waiting, lane->rows * D * sizeof(float));
    }
}

// The most turns of a round, in which each lane sets out up to `times`. All lanes wait for those behind them.
// So at most `times` turns end at an exit before each turn further up.
static int64_t turns_of_round(const offramp_plan *plan, int64_t lanes, int64_t times) {
    const int64_t exits = plan->rules.count;
    if (times == 1) return exits + 1;
    int64_t turns = 1;
    for (int64_t e = 0; e < exits; e++) turns = min_(turns * (times + 1), lanes * times * (exits + 1));
    return turns;
}

static offramp_status step(Step *s, int64_t rounds, offramp_error *error) {
    const offramp_plan *plan = s->plan;
    const int64_t count = s->lanes.count, most = min_(plan->rules.pending, MOST_DRAFTS);
    const int verifies = plan->rules.fill == OFFRAMP_VERIFY;
    int64_t deciding = 0, reads = 0;
    for (int64_t q = 0; q < count; q++) {
        const offramp_request *r = s->requests[q];
        if (check_request(plan, s->requests, q, error)) return OFFRAMP_INVALID;
        s->rows += rows_for(plan, r), deciding += !r->reads, reads += r->reads;
        s->end = larger(s->end, r->run + rows_of_call(plan, r, rounds));
    }
    s->outs = verifies ? deciding * (most + 1) : deciding;
    if (verifies) s->outs = min_(s->outs, widest_pass(deciding));
    if (verifies) s->rows = reads + s->outs;
    NEED(s->rows <= MOST_ROWS, "%lld rows are too many for a pass: read a long text in parts.",
         (long long)s->rows);
    offramp_status status = reach(s->model, s->end, error);
    for (int64_t q = 0; q < count && !status; q++)
        status = prepare_session(plan, s->requests[q], rounds, error);
    if (status) return status;
    s->turns_count = rounds * turns_of_round(plan, count, verifies ? min_(most, MOST_ASKED) + 1 : 1) + 1;
    s->lanes.rounds = rounds;
    if (!lay_out(s->model, lay_step, s))
        return fail(error, OFFRAMP_NO_MEMORY, "There is no memory for a pass.");
    enter(s);
    pool_run(&s->model->pool, take_step, s);
    for (int64_t q = 0; q < count; q++) conclude(&s->lanes, s->lanes.lanes + q);
    return OFFRAMP_OK;
}

// Whether the files that weights are mapped from are as long as they were. To read what a file has lost would end
// the process (SIGBUS); what it loses within a pass still does.
static int files_are_whole(const offramp_plan *plan) {
    struct stat facts;
    int whole = 1;
    for (int i = 0; i < 2; i++)
        if (plan->files[i].bytes)
            whole &= !fstat(plan->files[i].stream, &facts) && facts.st_size >= plan->files[i].bytes;
    return whole;
}

offramp_status offramp_step(offramp_plan *plan, offramp_request *const *requests, int64_t count,
                            int64_t rounds, double *seconds, offramp_error *error) {
    NEED(count >= 0 && count <= MOST_LANES && rounds > 0 && rounds <= MOST_ROUNDS,
         "%lld requests and %lld rounds cannot be stepped.", (long long)count, (long long)rounds);
    Step s = {
        .plan = plan, .model = plan->model, .requests = requests, .lanes = {.plan = plan, .count = count}};
    if (!count) return OFFRAMP_OK;
    NEED(files_are_whole(plan), "A file of the model became shorter while it was used. Load it again.");
    pool_enter(&s.model->pool);
    const offramp_status status = step(&s, rounds, error);
    pool_leave(&s.model->pool);
    if (seconds) memcpy(seconds, s.seconds, sizeof s.seconds);
    return status;
}
