// A plan: where tokens may leave, and the rules that follow.

#pragma once
#include "drafts.h"
#include "exits.h"

// The parts of an exit.
typedef struct {
    Gate gate;
    MambaGate mamba_gate;
    Readout readout;
} Exit;

struct offramp_plan {
    offramp_model *model;
    int64_t number;  // of all plans of the process, from 1 on
    offramp_rules rules;
    offramp_exit *exits;  // the rules' own
    Exit *parts;
    const Mixer **mixers;  // of Mamba gates; NULL for other gates
    offramp_block_costs *costs;
    int64_t first_tail;           // the number of blocks before the longest tail
    int waits, takes_back;        // whether tokens wait; whether tails may have to forget tokens
    offramp_confidence measures;  // the confidence that logits give, or OFFRAMP_GATE for none
    const Weight *exit_head;
    const Sketch *sketch, *exit_sketch;
    const int64_t *tokens;  // of the short list, or NULL
    struct {
        int stream;
        int64_t bytes;
    } files[2];  // that model and exits are mapped from; 0 bytes: none
    Free free;
};

// The cost of a pass with so many rows, in steps of full depth. Beyond the table, each row costs as much as
// the table's last one.
double pass_cost(const offramp_plan *plan, int64_t rows);

// The most rows of a pass that decides for so many requests. Drafts of one request may fill it.
static inline int64_t widest_pass(int64_t deciding) { return larger(64, (MOST_ASKED + 1) * deciding); }

// Whether an exit has a second key; a threshold with the plan's decay, for a token that follows `decided`
// others.
static inline int has_key(const offramp_exit *exit) { return exit->perhaps < 1 && exit->key < 1; }
double decayed(const offramp_plan *plan, double threshold, int64_t decided);

// FLOPs, which a stranger's file may state, are 0 or more; sums and products stay at INT64_MAX.
static inline int64_t plus(int64_t a, int64_t b) { return a > INT64_MAX - b ? INT64_MAX : a + b; }
static inline int64_t times(int64_t a, int64_t b) { return a && b > INT64_MAX / a ? INT64_MAX : a * b; }

// FLOPs of blocks `start` to `stop` - 1 for the tokens at positions `first` to `end` - 1; of the fill for one
// token.
int64_t flops_of(const offramp_plan *plan, int64_t start, int64_t stop, int64_t first, int64_t end);
int64_t fill_flops(const offramp_plan *plan, const offramp_exit *exit);

// The blocks that remember a token that left at an exit: `start` to `stop` - 1, and which of their memories
// do (OFFRAMP_KEYS …); and the block whose keys they copy, or -1.
typedef struct {
    int64_t start, stop, what, source;
} Filled;
Filled filled_at(const offramp_plan *plan, const offramp_exit *exit);
