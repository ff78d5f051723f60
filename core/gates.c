#include "gates.h"

enum { MOST_SPREADS = 8 };

Desk desk_for_gates(const offramp_gates *gates, int64_t D, Arena *arena) {
    int64_t rows = 1;
    for (int64_t i = 0; gates && i < gates->count; i++) {
        const int64_t own = gates->gates[i]->gate.in.rows;
        rows = own > rows ? own : rows;
    }
    return (Desk){take_floats(arena, D), take_floats(arena, rows), take_floats(arena, narrow_room(1, D))};
}

GatesAsked gates_for(const offramp_gates *gates, int64_t t, const Desk *desk) {
    if (!gates) return (GatesAsked){0};
    return (GatesAsked){gates, gates->seen, gates->logits + t * gates->count, 0, desk};
}

void standardise(const float *h, const float *mean, const float *spread, int64_t D, float *x) {
    for (int64_t k = 0; k < D; k++) {
        const float y = (h[k] - mean[k]) / spread[k];
        x[k] = y < -MOST_SPREADS ? -MOST_SPREADS : y > MOST_SPREADS ? MOST_SPREADS : y;
    }
}

void ask_gate(Hand *hand, const Gate *gate, const float *h, const Desk *desk, float *logit) {
    const int64_t D = gate->in.columns, W = gate->in.rows / 2;
    const Rows row = rows_of(&gate->in, desk->x, D, 1, desk->room);
    EACH_PIECE(i, hand, 1) {
        standardise(h, floats(gate->mean), floats(gate->spread), D, desk->x);
        if (narrows(kind_of(&gate->in))) make_narrow(&gate->in, &row, 0);
    }
    multiply(hand, &gate->in, row, 1, (Out){desk->act, gate->in.rows, 0}, 0, gate->in.rows);
    EACH_PIECE(i, hand, 1) {
        float sums = desk->act[0];
        if (gate->out.values) {
            times_silu(desk->act + W, desk->act, W);
            sums = sum(dots(desk->act + W, floats(gate->out), W));
        }
        *logit = sums + gate->bias;
    }
}

int gates_stop(Hand *hand, GatesAsked *asked, int64_t blocks, const float *h) {
    const offramp_gates *given = asked ? asked->gates : NULL;
    while (given && asked->next < given->count && given->after[asked->next] <= blocks) {
        const int64_t i = asked->next++;
        if (given->after[i] < blocks) continue;  // before the row set out
        const Gate *gate = &given->gates[i]->gate;
        const int64_t D = gate->in.columns;
        float *logit = asked->logits + i, *seen = asked->seen + i * D;
        EACH_PIECE(k, hand, 1) memcpy(seen, h, D * sizeof(float));
        if (given->thresholds[i] == -INFINITY) {  // every row stops
            EACH_PIECE(k, hand, 1) *logit = 0;
            return 1;
        }
        ask_gate(hand, gate, seen, asked->desk, logit);
        if (*logit > given->thresholds[i]) return 1;
    }
    return 0;
}
