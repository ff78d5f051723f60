// Drafts: guesses at the tokens that follow, which full depth then decides in one chunk. They come from an
// exit, and for nothing from the text, where it repeats itself (prompt look-up), and from a table of what
// often follows a few tokens. decode/drafts.py has the same rules in Python.

#pragma once
#include "model.h"

enum { MOST_DRAFTS = OFFRAMP_MOST_DRAFTS };    // of a round
enum { NOTHING, EXIT, TEXT, TABLE, SOURCES };  // what a draft comes from

// What is learned from the drafts of one sequence. It decides how many drafts are made.
typedef struct {
    double right[SOURCES],
        seen[SOURCES];  // share of each source's newest drafts that were right; how many (NOTHING: rounds)
    double promised[SOURCES];  // what was said of their chances, on average
    double tokens, cost;       // of a round; its share in the cost of a pass, in steps of full depth
    int64_t rest, pause;  // rounds until an exit whose drafts do not pay is asked again: now, and next time
} Estimates;

// Estimates for a sequence that nothing has been drafted for, as if half of a few drafts had been right.
Estimates new_estimates(void);

// The drafts of a round. Draft n may be one that was not kept: then it is the last.
typedef struct {
    int64_t source[MOST_DRAFTS + 1], draft[MOST_DRAFTS + 1];
    double promise[MOST_DRAFTS + 1];  // the exit's confidence, or the table's chance
    double chance;                    // that all drafts so far stand
    double asked;                     // what asking exits has cost
    int64_t drafts;
} Round;

// What drafts cost now, in steps of full depth: one more row of the pass, and asking an exit; and how many
// tokens a pass makes for as much.
typedef struct {
    double row, asking, tokens, floor;  // floor: what a draft's chance to stand must exceed anyway
} Prices;

// What drafts come from without an exit, after the `count` ids of a text: prompt look-up of the last `alike`
// (0: none), and a table (or NULL).
typedef struct {
    const Guesses *guesses;
    int64_t alike;
} Free;

// Decides where draft n of a round comes from: from whichever source is likelier to be right, if it is likely
// enough to stand. Sets its source; a free draft is noted, too. `exits`: there are exits that could be asked.
// An exit goes on only from its own drafts, whose states it knows.
void choose_source(const Free *from, Estimates *e, Round *round, int exits, const int64_t *ids, int64_t count,
                   const Prices *prices);

// Whether the draft that was noted last is likely enough to be tried.
int pays(const Estimates *e, const Round *round, const Prices *prices);

// Tries it.
void keep_draft(const Estimates *e, Round *round);

// Learns from a round of which `stood` drafts stood, what full depth chose, and what the round cost.
void learn_from(Estimates *e, const Round *round, int64_t stood, const int64_t *chosen, double cost);
