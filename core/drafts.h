// Drafts: guesses at the tokens that follow, which full depth then decides in one chunk. They come from an
// exit, and for nothing from the text, where it repeats itself (prompt look-up), and from a table of what
// often follows a few tokens.

#pragma once
#include "head.h"

enum { MOST_DRAFTS = OFFRAMP_MOST_DRAFTS };    // of a round
enum { NOTHING, EXIT, TEXT, TABLE, SOURCES };  // what a draft comes from

// What is learned from the drafts of one sequence. It decides how many drafts are made.
typedef struct {
    double right[SOURCES],
        seen[SOURCES];    // share of each source's newest drafts that were right; how many (NOTHING: rounds)
    double promised;      // mean chance of the table's newest drafts
    double tokens, cost;  // of a round; the cost in steps of full depth
    int64_t rest, pause;  // rounds until an exit whose drafts do not pay is asked again: now, and next time
} Estimates;

// Estimates for a sequence that nothing has been drafted for, as if half of a few drafts had been right.
Estimates new_estimates(void);

// A round: drafts, and full depth's decisions about them. What a thread decides by stands here, and is
// written once, so that a thread that comes late decides the same.
typedef struct {
    int64_t source[MOST_DRAFTS + 1], draft[MOST_DRAFTS + 1], kept[MOST_DRAFTS + 1];
    double sure[MOST_DRAFTS + 1];     // the exit's probability, or how often such drafts were right
    double promise[MOST_DRAFTS + 1];  // the table's chance
    double chance;                    // that all drafts so far stand
    int64_t drafts, stood, ends;      // drafts; those that full depth chose too; whether the text ends
} Round;

// What an exit works with: x (columns of `in`), act (D + 2W), out (D), and narrow rows; its logits y (n), and
// for each CHUNK of them the best and the sum of exponentials.
typedef struct {
    float *x, *act, *out, *narrow, *y, *sums;
    Best *bests;
    HeadRoom head;
} DraftRoom;

DraftRoom room_for_drafts(const Drafter *d, Arena *arena);

// The exit's state for a hidden state h (D), given the top and a middle one of the token before, shared out:
// `room->out`, before its tail.
void adapt(Hand *hand, const Drafter *d, const float *h, const float *top, const float *middle,
           const DraftRoom *room);

// Reads out `room->out`, and notes the most probable token and its probability as draft n.
void read_draft(Hand *hand, const Drafter *d, const float *norm, float eps, const DraftRoom *room,
                Round *round, int64_t n);

// Decides where draft n of a round comes from: from whichever source is likelier to be right, if it is likely
// enough to stand. `ids` are all ids so far, drafts among them, of V tokens. An exit goes on only from its
// own drafts, whose states it knows.
void choose_source(const Drafter *d, Estimates *e, Round *round, int64_t n, const int64_t *ids, int64_t count,
                   int64_t V);

// Decides whether draft n is tried.
void choose_whether(const Drafter *d, const Estimates *e, Round *round, int64_t n);

// Learns from a round what full depth chose.
void learn_from(const Drafter *d, Estimates *e, const Round *round, const int64_t *chosen);
