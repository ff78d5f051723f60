#include "exits.h"

#include "mixers.h"

enum { MOST_SPREADS = 8 };

void standardise(const float *h, const float *mean, const float *spread, int64_t D, float *x) {
    for (int64_t k = 0; k < D; k++) {
        const float y = (h[k] - mean[k]) / spread[k];
        x[k] = y < -MOST_SPREADS ? -MOST_SPREADS : y > MOST_SPREADS ? MOST_SPREADS : y;
    }
}

// Scales a state h (D) to a root mean square of 1: `unit` of exits/parts.py.
static void to_unit(const float *h, int64_t D, float *x) {
    const float scale = 1 / sqrtf(sum(dots(h, h, D)) / D + 1e-6f);
    for (int64_t k = 0; k < D; k++) x[k] = scale * h[k];
}

// Gates -------------------------------------------------------------------------------------------

GateRoom room_for_gates(const Gate *gate, int64_t R, Arena *arena) {
    const int64_t D = gate->in.columns;
    return (GateRoom){
        .x = take_floats(arena, R * D),
        .act = take_floats(arena, R * gate->in.rows),
        .narrow = take_floats(arena, narrow_room(R, D)),
    };
}

void ask_gates(Hand *hand, const Gate *gate, const float *h, int64_t R, const GateRoom *room, float *logits) {
    const Weight *in = &gate->in;
    const int64_t D = in->columns, A = in->rows, W = A / 2;
    const Rows rows = rows_of(in, room->x, D, R, room->narrow);
    EACH_PIECE(r, hand, R) {
        standardise(h + r * D, floats(gate->mean), floats(gate->spread), D, room->x + r * D);
        make_narrow(&rows, r);
    }
    multiply(hand, in, rows, R, (Out){room->act, A, 0}, 0, A);
    EACH_PIECE(r, hand, R) {
        float *act = room->act + r * A, logit = act[0];
        if (gate->out.values) {
            times_silu(act + W, act, W);
            logit = sum(dots(act + W, floats(gate->out), W));
        }
        logits[r] = logit + gate->bias;
    }
}

GateRoom room_for_mamba_gates(const MambaGate *gate, int64_t R, Arena *arena) {
    const Mixer *m = &gate->mixer;
    const int64_t D = gate->down.columns, W = gate->down.rows, E = m->inner;
    return (GateRoom){
        .x = take_floats(arena, R * D),
        .act = take_floats(arena, R * W),
        .narrow = take_floats(arena, narrow_room(R, D)),
        .mixer = {.x = take_floats(arena, R * E),
                  .in = take_floats(arena, R * m->in.rows),
                  .conv = take_floats(arena, R * m->channels),
                  .room = take_floats(arena, narrow_room(R, W > E ? W : E))},
    };
}

void ask_mamba_gates(Hand *hand, const MambaGate *gate, const float *h, int64_t R, const int64_t *sequences,
                     const MemoryAt *memory, const GateRoom *room, float *logits) {
    const Weight *down = &gate->down;
    const int64_t D = down->columns, W = down->rows;
    const Rows rows = rows_of(down, room->x, D, R, room->narrow);
    EACH_PIECE(r, hand, R) {
        float *x = room->x + r * D;
        standardise(h + r * D, floats(gate->mean), floats(gate->spread), D, x);
        logits[r] = sum(dots(x, floats(gate->direct), D)) + gate->bias;
        make_narrow(&rows, r);
    }
    multiply(hand, down, rows, R, (Out){room->act, W, 0}, 0, W);
    Worker worker = {
        .tokens = {.h = room->act, .count = R, .sequences = sequences}, .buffers = room->mixer, .hand = hand};
    mixer_project(&gate->mixer, &worker);
    worker.tokens.h = logits;
    mixer_run(&gate->mixer, &worker, memory);
}

// Read-outs ---------------------------------------------------------------------------------------

ReadoutRoom room_for_read_outs(const Readout *readout, int64_t R, Arena *arena) {
    const int64_t D = readout->hidden, K = readout->in.columns, W = readout->down.columns;
    return (ReadoutRoom){
        .x = take_floats(arena, R * K),
        .act = take_floats(arena, R * (D + 2 * W)),
        .narrow = take_floats(arena, narrow_room(R, K > W ? K : W)),
    };
}

void read_outs(Hand *hand, const Readout *readout, const float *h, const float *const *deep, int64_t R,
               const ReadoutRoom *room, float *out) {
    const Weight *in = &readout->in, *down = &readout->down;
    const int64_t D = readout->hidden, K = in->columns, W = down->columns, A = readout->gated ? 2 * W : W;
    const float *scale = floats(readout->scale);
    if (!in->values) {
        EACH_PIECE(r, hand, R) memmove(out + r * D, h + r * D, D * sizeof(float));
        return;
    }
    // A row of `act` begins with the terms of the sum. Then comes the input of `down`, with its gate before
    // it if it has one.
    const int64_t stride = D + A, skipped = readout->skips ? 0 : D;
    const Rows x = rows_of(in, room->x, K, R, room->narrow),
               inner = rows_of(down, room->act + stride - W, stride, R, room->narrow);
    EACH_PIECE(r, hand, R) {
        float *own = room->x + r * K;
        standardise(h + r * D, floats(readout->mean), floats(readout->spread), D, own);
        for (int64_t i = 0; i < readout->reads; i++) to_unit(deep[r] + i * D, D, own + (1 + i) * D);
        if (!readout->skips) to_unit(h + r * D, D, room->act + r * stride);
        make_narrow(&x, r);
    }
    multiply(hand, in, x, R, (Out){room->act + skipped, stride, 0}, 0, in->rows);
    EACH_PIECE(r, hand, R) {
        float *last = room->act + (r + 1) * stride - W;
        if (readout->gated) times_silu(last, last - W, W);
        make_narrow(&inner, r);
    }
    multiply(hand, down, inner, R, (Out){room->act, stride, 1}, 0, D);
    EACH_PIECE(r, hand, R) {
        const float *y = room->act + r * stride;
        for (int64_t k = 0; k < D; k++) out[r * D + k] = scale ? h[r * D + k] + scale[k] * y[k] : y[k];
    }
}

// Confidences -------------------------------------------------------------------------------------

ConfidenceRoom room_for_confidences(int64_t R, int64_t n, Arena *arena) {
    const int64_t pieces = R * chunks_of(n);
    return (ConfidenceRoom){
        .bests = take(arena, pieces * (int64_t)sizeof(Best)),
        .seconds = take_floats(arena, pieces),
        .sums = take_floats(arena, pieces),
        .moments = take_floats(arena, pieces),
    };
}

// The largest of the logits `from` to `to` - 1, without the best one.
static float second_of(const float *y, int64_t from, int64_t to, int32_t best) {
    vf tops = all(-INFINITY);
    for (int64_t i = from; i < to; i += LANES) {
        const vi at = COUNT + (int32_t)i, others = (at != best) & (at < (int32_t)to);
        const vf v = choose(others, load_up_to(y + i, to - i), all(-INFINITY));
        tops = choose(v > tops, v, tops);
    }
    return largest(tops);
}

// Sums of e and of e · x over the logits `from` to `to` - 1, where x is a logit minus `most`, and e = exp(x).
// For a logit of −inf, e is so small that it adds nothing.
static void add_up(const float *y, int64_t from, int64_t to, float most, float *sums, float *moments) {
    vf total = {0}, moment = {0};
    for (int64_t i = from; i < to; i += LANES) {
        const vf x = clamped(load_up_to(y + i, to - i) - most, -87, 0);
        const vf e = choose(COUNT < (int32_t)(to - i), exp_(x), (vf){0});
        total += e, moment = fma_(e, x, moment);
    }
    *sums = sum(total), *moments = sum(moment);
}

// The confidence of a row of n logits, from the numbers of its pieces.
static float confidence_of(offramp_confidence kind, int64_t n, const ConfidenceRoom *of_row) {
    const int64_t pieces = chunks_of(n);
    const Best best = best_among(of_row->bests, pieces);
    double total = 0, moment = 0;
    float second = -INFINITY;
    if (!isfinite(best.logit)) return NAN;
    for (int64_t p = 0; p < pieces; p++) {
        total += of_row->sums[p], moment += of_row->moments[p];
        second = fmaxf(second, p == best.id / CHUNK ? of_row->seconds[p] : of_row->bests[p].logit);
    }
    if (kind == OFFRAMP_MARGIN) return (float)((1 - exp(second - best.logit)) / total);
    if (kind == OFFRAMP_MAX_PROB || n == 1) return (float)(1 / total);
    return (float)(1 + (moment / total - log(total)) / log(n));
}

void confidences(Hand *hand, offramp_confidence kind, const float *y, int64_t R, int64_t n,
                 const ConfidenceRoom *room, float *sure) {
    const int64_t pieces = chunks_of(n);
    EACH_PIECE(i, hand, R * pieces) {
        const float *own = y + i / pieces * n;
        const int64_t from = i % pieces * CHUNK, to = min_(n, from + CHUNK);
        room->bests[i] = best_of(own, from, to);
        room->seconds[i] = kind == OFFRAMP_MARGIN ? second_of(own, from, to, room->bests[i].id) : -INFINITY;
    }
    EACH_PIECE(i, hand, R * pieces) {
        const int64_t r = i / pieces, from = i % pieces * CHUNK;
        const float most = best_among(room->bests + r * pieces, pieces).logit;
        add_up(y + r * n, from, min_(n, from + CHUNK), most, room->sums + i, room->moments + i);
    }
    EACH_PIECE(r, hand, R) {
        const int64_t at = r * pieces;
        const ConfidenceRoom own = {room->bests + at, room->seconds + at, room->sums + at,
                                    room->moments + at};
        sure[r] = confidence_of(kind, n, &own);
    }
}
