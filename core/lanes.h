// The requests of one step, each in a lane of its own: which of its tokens climb, how far they are, and which
// tokens are decided. One thread at a time works here, and it runs no blocks.

#pragma once
#include "choose.h"
#include "plan.h"
#include "session.h"

// The work of a climb: FLOPs, and blocks run for one token each.
typedef struct {
    int64_t flops, blocks;
} Spent;

// A lane. `h` (room, D) are the states of the newest `rows` tokens that have set out and not reached the top;
// the newest `climbing` of them climb, after the blocks before `segment`; the others wait at exits.
// `middles`: at the top, their states after the plan's middle block.
typedef struct {
    offramp_request *request;
    offramp_session *session;
    int64_t known, run;  // ids, drafts among them; those that have set out
    int64_t rows, climbing, segment;
    int climbs, asks,
        over;        // whether it climbs in this round, and asks exits; whether it is done with the call
    int leaves;      // at the exit where it is now
    int64_t chosen;  // there
    double sure;     // the confidence of the exit's gate, then that with which it leaves
    float *h, *middles;
    Spent spent;
    Round round;
    offramp_decision drafts[MOST_DRAFTS];
    int64_t passes, rejected;
} Lane;

// The common data of a round's `count` lanes. `width`: the rows of those that decide, with their drafts;
// `deciding`: how many lanes these are; `reading`: the rows of the lanes that only read.
typedef struct {
    const offramp_plan *plan;
    Lane *lanes;
    int64_t count, width, deciding, reading, rounds;
} Lanes;

// Whether request q of a call can be stepped.
offramp_status check_request(const offramp_plan *plan, offramp_request *const *requests, int64_t q,
                             offramp_error *error);

// The most rows that a request adds in a call.
int64_t rows_of_call(const offramp_plan *plan, const offramp_request *request, int64_t rounds);

// Prepares its session: makes room for the tokens, and for watching mixers.
offramp_status prepare_session(const offramp_plan *plan, const offramp_request *request, int64_t rounds,
                               offramp_error *error);

// The most rows of a lane, and the positions of its climbing rows: `first` to `run` - 1.
int64_t rows_for(const offramp_plan *plan, const offramp_request *request);
static inline int64_t first_of(const Lane *lane) { return lane->run - lane->climbing; }

// Begins a round, with all lanes that are not done. Returns whether any climbs.
int begin_round(Lanes *l);

// Before a lane's climbing rows run through blocks `start` to `stop` - 1: prepares its mixers to forget
// drafts. After it: counts the work.
void enter_blocks(const Lanes *l, Lane *lane, int64_t start, int64_t stop);
void leave_blocks(const Lanes *l, Lane *lane, int64_t start, int64_t stop);

// The same for the newest token in blocks of a tail or a fill, where it comes before its usual turn.
void enter_ahead(const Lanes *l, Lane *lane, int64_t start, int64_t stop);

// Counts the cost of asking an exit in a round of drafts.
void count_asking(const Lanes *l, Lane *lane);

// A threshold of an exit for a lane's next token.
double threshold_of(const Lanes *l, const Lane *lane, double threshold);

// Whether a lane leaves at an exit whose read-out chose `chosen`, with the confidence of its logits. If the
// lane stays, its tail forgets the token.
void consider_leaving(Lanes *l, Lane *lane, int64_t chosen, double confidence);

// Moves on from the exit: to the next segment, or out with the chosen token. `state` (D): the head's input.
void pass_exit(Lanes *l, Lane *lane, const float *state);

// Judges a lane at the top by full depth's choices (drafts + 1): after the newest decided token, and after
// each draft.
void judge(Lanes *l, Lane *lane, const int64_t *chosen);

// At the end of a call: records the tokens that wait.
void conclude(const Lanes *l, Lane *lane);
