// Calls with a model that need no session: a product, the head, gates and read-outs.

#include <stdlib.h>

#include "exits.h"

typedef struct {
    offramp_model *model;
    const Weight *weight;
    const Sketch *sketch;
    const Gate *gate;
    const MambaGate *mamba_gate;  // NULL for other calls
    MemoryAt memory;              // of a Mamba gate
    const Readout *readout;
    const float *x, *deep;
    int64_t first, rows;  // the number of the first row, in a call whose rows pass some at a time
    float *y;
    float *room;  // laid out, and what follows
    HeadRoom head;
    Found *found;
    GateRoom gates;
    int64_t *sequences;
    ReadoutRoom read;
    const float **deep_of;
} Call;

static void lay_product(void *context, Arena *arena) {
    Call *c = context;
    c->room = take_floats(arena, narrow_room(c->rows, c->weight->columns));
}

static void work_on_product(Hand *hand, void *context) {
    const Call *c = context;
    const Rows rows = prepare(hand, c->weight, c->x, c->weight->columns, c->rows, c->room);
    multiply(hand, c->weight, rows, c->rows, (Out){c->y, c->weight->rows, 0}, 0, c->weight->rows);
}

static void lay_logits(void *context, Arena *arena) {
    Call *c = context;
    c->head = room_for_head(&c->model->ends.head, c->sketch, c->rows, arena);
    c->found = take(arena, c->rows * (int64_t)sizeof(Found));
    if (arena->base) memset(c->found, 0, c->rows * sizeof(Found));
}

static void work_on_logits(Hand *hand, void *context) {
    const Call *c = context;
    const Ends *ends = &c->model->ends;
    read_logits(hand, ends, &ends->head, c->sketch, c->x, c->rows, &c->head, c->found, c->y);
}

static void lay_gates(void *context, Arena *arena) {
    Call *c = context;
    const int64_t bytes = c->rows * (int64_t)sizeof *c->sequences;
    c->gates = c->gate ? room_for_gates(c->gate, c->rows, arena)
                       : room_for_mamba_gates(c->mamba_gate, c->rows, arena);
    c->sequences = take(arena, bytes);
    if (arena->base) memset(c->sequences, 0, bytes);
}

static void work_on_gates(Hand *hand, void *context) {
    const Call *c = context;
    if (c->gate)
        ask_gates(hand, c->gate, c->x, c->rows, &c->gates, c->y);
    else
        ask_mamba_gates(hand, c->mamba_gate, c->x, c->rows, c->sequences, &c->memory, &c->gates, c->y);
}

static void lay_readout(void *context, Arena *arena) {
    Call *c = context;
    c->read = room_for_read_outs(c->readout, c->rows, arena);
    c->deep_of = take(arena, c->rows * (int64_t)sizeof *c->deep_of);
    for (int64_t r = 0; arena->base && c->deep && r < c->rows; r++)
        c->deep_of[r] = c->deep + (c->first + r) * c->readout->reads * c->model->hidden;
}

static void work_on_readout(Hand *hand, void *context) {
    const Call *c = context;
    read_outs(hand, c->readout, c->x, c->deep_of, c->rows, &c->read, c->y);
}

// Runs a call for all of its rows x (R, columns) → y (R, results), some at a time.
static offramp_status run_rows(Call call, int64_t columns, int64_t results, void (*lay)(void *, Arena *),
                               Work *work, offramp_error *error) {
    const int64_t total = call.rows;
    offramp_status status = OFFRAMP_OK;
    if (total < 0) return fail(error, OFFRAMP_INVALID, "A call cannot have %lld rows.", (long long)total);
    pool_enter(&call.model->pool);
    for (int64_t first = 0; first < total && !status; first += ROWS_AT_ONCE) {
        Call piece = call;
        piece.first = first, piece.rows = min_(ROWS_AT_ONCE, total - first);
        piece.x += first * columns, piece.y += first * results;
        if (lay_out(call.model, lay, &piece))
            pool_run(&call.model->pool, work, &piece);
        else
            status = fail(error, OFFRAMP_NO_MEMORY, "There is no memory for a pass.");
    }
    pool_leave(&call.model->pool);
    return status;
}

offramp_status offramp_product(offramp_model *model, const offramp_weight *weight, const float *x,
                               int64_t rows, float *y, offramp_error *error) {
    if (check_weight(weight, "of a product", error)) return OFFRAMP_INVALID;
    const Call call = {.model = model, .weight = weight, .x = x, .rows = rows, .y = y};
    return run_rows(call, weight->columns, weight->rows, lay_product, work_on_product, error);
}

offramp_status offramp_logits(offramp_model *model, const offramp_part *sketch, const float *h, int64_t rows,
                              float *y, offramp_error *error) {
    if (sketch && check_sketch(sketch, model->hidden, model->vocabulary, error)) return OFFRAMP_INVALID;
    const Call call = {
        .model = model, .sketch = sketch ? &sketch->sketch : NULL, .x = h, .rows = rows, .y = y};
    return run_rows(call, model->hidden, model->vocabulary, lay_logits, work_on_logits, error);
}

// Asks a Mamba gate about the rows of a new text.
static offramp_status ask_about_text(Call call, const MambaGate *gate, offramp_error *error) {
    const int64_t window = window_floats(&gate->mixer);
    float *memory = calloc(window + state_floats(&gate->mixer), sizeof *memory);
    if (!memory) return fail(error, OFFRAMP_NO_MEMORY, "There is no memory for a gate.");
    call.mamba_gate = gate,
    call.memory.state = (StateAt){.window = memory, .fresh = memory + window, .h = memory + window};
    const offramp_status status = run_rows(call, call.model->hidden, 1, lay_gates, work_on_gates, error);
    free(memory);
    return status;
}

offramp_status offramp_ask(offramp_model *model, const offramp_part *gate, const float *h, int64_t rows,
                           float *logits, offramp_error *error) {
    Call call = {.model = model, .x = h, .rows = rows, .y = logits};
    MambaGate found;
    if (gate && !strcmp(gate->kind->name, "mamba_gate")) {
        const offramp_status status = check_mamba_gate(gate, &found, model->hidden, error);
        return status ? status : ask_about_text(call, &found, error);
    }
    if (check_gate(gate, model->hidden, error)) return OFFRAMP_INVALID;
    call.gate = &gate->gate;
    return run_rows(call, model->hidden, 1, lay_gates, work_on_gates, error);
}

offramp_status offramp_read_out(offramp_model *model, const offramp_part *readout, const float *h,
                                const float *deep, int64_t rows, float *out, offramp_error *error) {
    Readout found;
    if (check_readout(readout, &found, model->hidden, error)) return OFFRAMP_INVALID;
    NEED(deep || !found.reads, "This read-out reads deep states.");
    const Call call = {.model = model, .readout = &found, .x = h, .deep = deep, .rows = rows, .y = out};
    return run_rows(call, model->hidden, model->hidden, lay_readout, work_on_readout, error);
}
