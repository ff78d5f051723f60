// Drafts: guesses at the tokens that follow, which full depth then decides in one chunk. They come from an
// exit, or at no cost from the text, where it repeats itself (prompt look-up), or from a table of the tokens
// that often follow a few others. decode/drafts.py has the same rules in Python.

#pragma once
#include "model.h"

enum { MOST_DRAFTS = OFFRAMP_MOST_DRAFTS };  // of a round
enum { MOST_ASKED = 7 };                     // of them, those for which exits are asked
// How many times its cost a draft must be worth: the chances that look best are too high most often.
static const double WORTH = 1.3;
// What a draft comes from.
enum {
    NOTHING = OFFRAMP_FROM_FULL,
    EXIT = OFFRAMP_FROM_EXIT,
    TEXT = OFFRAMP_FROM_TEXT,
    TABLE = OFFRAMP_FROM_TABLE,
    SOURCES
};

// Estimates from the drafts of one sequence. They decide how many drafts are made.
typedef struct {
    double right[SOURCES],
        seen[SOURCES];  // share of each source's newest drafts that were right; how many (NOTHING: rounds)
    double promised[SOURCES];  // the mean chance that was promised for them
    double tokens, cost;       // of a round; its share in the cost of a pass, in steps of full depth
    int64_t rest, pause;  // rounds until an exit whose drafts do not pay is asked again: now, and next time
} Estimates;

// Estimates for a sequence that nothing has been drafted for: as if half of a few drafts of the exit had been
// right, and of another source the share that its first draft promises.
Estimates new_estimates(void);

// Begins the estimates of a sequence that nothing has been drafted for with what an exit's training says.
void expect(Estimates *e, const double *accepted);

// The drafts of a round. The last entry may be a draft that was not kept.
typedef struct {
    int64_t source[MOST_DRAFTS + 1], draft[MOST_DRAFTS + 1];
    double promise[MOST_DRAFTS + 1];  // the exit's confidence, or the chance by the text or the table
    double chance;                    // the chance that all drafts so far stand
    double asked;                     // the cost of asking exits
    int64_t drafts;
} Round;

// The costs of drafts now, in steps of full depth. `rows`[n]: the lowest mean cost of a row if 1 to n + 1
// rows are added (infinite: there is no room); `asking`: of asking an exit; `tokens`: those of a pass for
// each step of full depth.
typedef struct {
    double rows[MOST_DRAFTS], asking, tokens, floor;  // floor: what a draft's chance must exceed anyway
} Prices;

// The sources of drafts without an exit, after the `count` ids of a text: prompt look-up of at least the last
// `alike` ids (0: none), and a table (or NULL).
typedef struct {
    const Guesses *guesses;
    int64_t alike;
    const double *accepted;  // of the rules
} Free;

// Decides where draft n of a round comes from: the source that is likelier to be right; an exit only if its
// draft is likely enough to stand. Sets its source, and for a free draft also its id. `exits`: there are
// exits that can be asked. An exit goes on only from its own drafts, whose states it knows.
void choose_source(const Free *from, Estimates *e, Round *round, int exits, const int64_t *ids, int64_t count,
                   const Prices *prices);

// Whether the draft that was noted last is likely enough to be tried.
int pays(const Estimates *e, const Round *round, const Prices *prices);

// Tries it.
void keep_draft(const Estimates *e, Round *round);

// Learns from a round: `stood` of its drafts stood. Also given are full depth's choices and the cost.
void learn_from(Estimates *e, const Round *round, int64_t stood, const int64_t *chosen, double cost);
