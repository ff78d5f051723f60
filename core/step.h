// What a step works on: turns, their rows, and the memory of one call. step.c says how it runs.

#pragma once
#include "blocks.h"
#include "lanes.h"

// Rows that run together. `who`: their lanes; `row_of`: each one's row in its lane; `tokens.sequences`:
// places in `who`.
typedef struct {
    Lane **who;
    int64_t lanes, *row_of;
    Tokens tokens;
} Group;

typedef struct {
    int64_t over, first, top, start, stop, exit;  // the segment, and the exit at its end, or -1
    Group climbing, asked, reading, leaving;
    Group judged;  // rows at the top; those from number `whole` on use the whole head
    int64_t whole;
    int expands;  // whether logits of a short list must be spread over those of all tokens
    Choice *choices;
    Found *found;
} Turn;

// One call. Threads share its memory; `h` are the rows of the pass, `states` those of exits and of the top.
typedef struct {
    offramp_plan *plan;
    offramp_model *model;
    offramp_request *const *requests;
    Lanes lanes;
    int64_t rows, outs, turns_count,
        end;  // most rows of a pass, most that are read out, turns, and positions
    double seconds[4];
    // Laid out:
    Turn *turns;
    float *h, *states, *out, *y, *short_y, *logits, *sures;
    const float **deep;
    int64_t *chosen;
    MemoryAt *memory, *gates;
    Buffers buffers;
    HeadRoom head, exit_head;
    GateRoom *gate_rooms;
    ReadoutRoom *readout_rooms;
    ConfidenceRoom confidence;
    ChooseRoom choose;
} Step;

enum { BLOCKS, EXITS, HEADS, BETWEEN };

// Lays out what a step (`context`) works on. The sizes are set already.
void lay_step(void *context, Arena *arena);
