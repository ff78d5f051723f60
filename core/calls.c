// Calls with a model that need no session: a product, the head, and one gate.

#include "gates.h"
#include "head.h"

typedef struct {
    offramp_model *model;
    const Weight *weight;
    const Sketch *sketch;
    const offramp_part *gate;
    const float *x;
    int64_t rows;
    float *y;
    float *room;  // laid out, and what follows
    HeadRoom head;
    Found *found;
    Desk desk;
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
    read_logits(hand, &ends->head, floats(ends->norm), ends->eps, c->sketch, c->x, c->rows, &c->head,
                c->found, c->y);
}

static void lay_gate(void *context, Arena *arena) {
    Call *c = context;
    c->desk = desk_for_gates(&(offramp_gates){.count = 1, .gates = &c->gate}, c->model->hidden, arena);
}

static void work_on_gate(Hand *hand, void *context) {
    const Call *c = context;
    ask_gate(hand, &c->gate->gate, c->x, &c->desk, c->y);
}

// Runs a call for all of its rows x (R, columns) → y (R, results), some at a time.
static offramp_status run_rows(Call call, int64_t columns, int64_t results, void (*lay)(void *, Arena *),
                               Work *work, offramp_error *error) {
    const int64_t total = call.rows;
    offramp_status status = OFFRAMP_OK;
    if (total < 0) return fail(error, OFFRAMP_INVALID, "%lld rows are no rows.", (long long)total);
    pool_enter(&call.model->pool);
    for (int64_t first = 0; first < total && !status; first += ROWS_AT_ONCE) {
        Call piece = call;
        piece.rows = min_(ROWS_AT_ONCE, total - first);
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

offramp_status offramp_ask(offramp_model *model, const offramp_part *gate, const float *h, float *logit,
                           offramp_error *error) {
    if (check_gate(gate, model->hidden, error)) return OFFRAMP_INVALID;
    const Call call = {.model = model, .gate = gate, .x = h, .rows = 1, .y = logit};
    return run_rows(call, model->hidden, 1, lay_gate, work_on_gate, error);
}
