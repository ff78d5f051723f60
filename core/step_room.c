// The memory of a step: how much of it the rows, the turns and the parts of a plan need.

#include "step.h"

static Group lay_group(Arena *arena, int64_t lanes, int64_t rows) {
    return (Group){.who = take(arena, lanes * (int64_t)sizeof(Lane *)),
                   .row_of = take(arena, rows * (int64_t)sizeof(int64_t)),
                   .tokens = {.positions = take(arena, rows * (int64_t)sizeof(int64_t)),
                              .sequences = take(arena, rows * (int64_t)sizeof(int64_t))}};
}

static void lay_turns(Step *s, Arena *arena) {
    const int64_t L = s->lanes.count, R = s->rows, J = s->outs;
    s->turns = take(arena, s->turns_count * (int64_t)sizeof(Turn));
    for (int64_t t = 0; t < s->turns_count; t++) {
        Turn turn = {.climbing = lay_group(arena, L, R),
                     .asked = lay_group(arena, L, L),
                     .reading = lay_group(arena, L, L),
                     .leaving = lay_group(arena, L, L),
                     .judged = lay_group(arena, L, J),
                     .choices = take(arena, J * (int64_t)sizeof(Choice)),
                     .found = take(arena, J * (int64_t)sizeof(Found))};
        if (!arena->base) continue;
        memset(turn.found, 0, J * sizeof(Found));
        s->turns[t] = turn;
    }
}

void lay_step(void *context, Arena *arena) {
    Step *s = context;
    const offramp_model *model = s->model;
    const offramp_plan *plan = s->plan;
    const int64_t L = s->lanes.count, D = model->hidden, V = model->vocabulary, R = s->rows, J = s->outs;
    s->lanes.lanes = take(arena, L * (int64_t)sizeof(Lane));
    for (int64_t q = 0; q < L; q++) {
        const int64_t room = rows_for(plan, s->requests[q]);
        float *h = take_floats(arena, room * D),
              *middles = take_floats(arena, plan->rules.middle ? room * D : 0);
        if (arena->base) s->lanes.lanes[q] = (Lane){.h = h, .middles = middles};
    }
    lay_turns(s, arena);
    s->h = take_floats(arena, R * D), s->states = take_floats(arena, J * D),
    s->out = take_floats(arena, L * D);
    s->y = take_floats(arena, J * V),
    s->short_y = take_floats(arena, plan->tokens ? L * plan->exit_head->rows : 0);
    s->logits = take_floats(arena, R), s->sures = take_floats(arena, L);
    s->deep = take(arena, L * (int64_t)sizeof(float *));
    s->chosen = take(arena, J * (int64_t)sizeof(int64_t));
    s->memory = take(arena, model->count * L * (int64_t)sizeof(MemoryAt));
    s->gates = take(arena, L * (int64_t)sizeof(MemoryAt));
    s->buffers = buffers_for(model, R, s->end, arena);
    s->head = room_for_head(&model->ends.head, plan->sketch, J, arena);
    s->exit_head = room_for_head(plan->exit_head, plan->exit_sketch, L, arena);
    s->gate_rooms = take(arena, plan->rules.count * (int64_t)sizeof(GateRoom));
    s->readout_rooms = take(arena, plan->rules.count * (int64_t)sizeof(ReadoutRoom));
    for (int64_t e = 0; e < plan->rules.count; e++) {
        const Exit *exit = plan->parts + e;
        const GateRoom gate = plan->mixers[e] ? room_for_mamba_gates(&exit->mamba_gate, R, arena)
                                              : room_for_gates(&exit->gate, L, arena);
        const ReadoutRoom readout = room_for_read_outs(&exit->readout, L, arena);
        if (arena->base) s->gate_rooms[e] = gate, s->readout_rooms[e] = readout;
    }
    s->confidence = room_for_confidences(L, plan->exit_head->rows, arena);
    s->choose = room_for_choices(J, V, arena);
}
