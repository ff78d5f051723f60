// Exits: gates, read-outs and confidences are right, and a row's are the same, bit for bit, whatever stands
// beside it.

#include "exits.h"

#include "models.h"
#include "replay.h"

enum { D = 32, ROWS = 40, WIDTH = 48, HEADS = 3, DIM = 32, STATES = 16, TAPS = 4 };
enum { INNER = HEADS * DIM, CHANNELS = INNER + 2 * STATES };

static offramp_model *model;  // of ends alone: what checks and calls need

static void begin(void) {
    Shape shape = SMALL;
    shape.blocks = "";
    model = tiny(shape).model;
}

static int roughly(float found, double wanted, double tolerance) {
    return fabs(found - wanted) <= tolerance * (1 + fabs(wanted));
}

// One call, with the memory that it lays out.
typedef struct {
    const Gate *gate;
    const MambaGate *mamba_gate;
    const Readout *readout;
    offramp_confidence kind;
    const float *given, *const *deep;
    int64_t rows, n;
    const int64_t *sequences;
    const MemoryAt *memory;
    float *out;
    GateRoom gates;
    ReadoutRoom read;
    ConfidenceRoom sure;
} Job;

static void lay(void *context, Arena *arena) {
    Job *j = context;
    if (j->gate) j->gates = room_for_gates(j->gate, j->rows, arena);
    if (j->mamba_gate) j->gates = room_for_mamba_gates(j->mamba_gate, j->rows, arena);
    if (j->readout) j->read = room_for_read_outs(j->readout, j->rows, arena);
    if (j->n) j->sure = room_for_confidences(j->rows, j->n, arena);
}

static void work(Hand *hand, void *context) {
    const Job *j = context;
    if (j->gate) ask_gates(hand, j->gate, j->given, j->rows, &j->gates, j->out);
    if (j->mamba_gate)
        ask_mamba_gates(hand, j->mamba_gate, j->given, j->rows, j->sequences, j->memory, &j->gates, j->out);
    if (j->readout) read_outs(hand, j->readout, j->given, j->deep, j->rows, &j->read, j->out);
    if (j->n) confidences(hand, j->kind, j->given, j->rows, j->n, &j->sure, j->out);
}

static void do_job(Job job) {
    if (!job.rows) return;
    pool_enter(&model->pool);
    CHECK(lay_out(model, lay, &job), "no memory");
    pool_run(&model->pool, work, &job);
    pool_leave(&model->pool);
}

// Does a job for rows `given` at once, and then in calls of a few, with several numbers of threads: each row
// of `columns` numbers gets the same `results` numbers.
static void cuts_do_not_matter(Job job, int64_t columns, int64_t results) {
    const Job whole = job;
    do_job(whole);
    for (int threads = 1; threads <= 3; threads++) {
        WORKS(offramp_model_threads(model, threads, &said));
        for (int64_t r = 0; r < whole.rows; r += job.rows) {
            job.rows = min_(1 + below(threads == 1 ? 1 : 17), whole.rows - r);
            job.given = whole.given + r * columns, job.deep = whole.deep ? whole.deep + r : NULL;
            job.out = zeros(job.rows * results);
            do_job(job);
            CHECK(same(job.out, whole.out + r * results, job.rows * results),
                  "%d rows from row %d on, with %d threads", (int)job.rows, (int)r, threads);
        }
    }
}

static void standardise_reference(const float *h, const float *mean, const float *spread, double *x) {
    for (int k = 0; k < D; k++) x[k] = fmin(fmax(((double)h[k] - mean[k]) / spread[k], -8), 8);
}

// Gates -------------------------------------------------------------------------------------------

static void gates_are_right(int type, int64_t width) {
    const int mark = kept_count;
    offramp_part *part = new_part("gate");
    const offramp_weight in = weight_of(type, 0, width ? 2 * width : 1, D, 0);
    const float *mean = randoms(D, -0.5f, 0.5f), *spread = randoms(D, 0.02f, 2),
                *out = width ? randoms(width, -1, 1) : NULL, *h = randoms(ROWS * D, -2, 2);
    float *logits = zeros(ROWS);
    give(part, "in", &in), give_floats(part, "mean", mean, D), give_floats(part, "spread", spread, D);
    give_floats(part, "out", out, width), give_number(part, "bias", 0.25);
    WORKS(offramp_model_fits(model, part, &said));
    cuts_do_not_matter((Job){.gate = &part->gate, .given = h, .rows = ROWS, .out = logits}, D, 1);
    for (int r = 0; r < ROWS; r++) {
        double x[D], act[256], wanted = 0;
        standardise_reference(h + r * D, mean, spread, x);
        product_reference(&in, x, act);
        for (int64_t k = 0; k < width; k++) wanted += silu_reference(act[k]) * act[width + k] * out[k];
        wanted = 0.25 + (width ? wanted : act[0]);
        CHECK(roughly(logits[r], wanted, type ? 0.1 * sqrt(1 + width) : 1e-4),
              "a gate of type %d: %g and not %g", type, logits[r], wanted);
    }
    float *again = zeros(ROWS);
    WORKS(offramp_ask(model, part, h, ROWS, again, &said));
    CHECK(same(again, logits, ROWS), "the call of the library differs");
    offramp_part_free(part);
    free_from(mark);
}

// Mamba gates -------------------------------------------------------------------------------------

typedef struct {
    offramp_weight down, in, out;
    float *mean, *spread, *direct, *gated_norm, *conv, *conv_bias, *dt_bias, *decay, *skip;
    offramp_part *part;
    MambaGate gate;
} Recurrent;

static Recurrent recurrent_of(int type) {
    Recurrent g = {.down = weight_of(type, 0, WIDTH, D, 0), .part = new_part("mamba_gate")};
    g.in = weight_of(type >= OFFRAMP_INT8 ? OFFRAMP_BFLOAT16 : type, 0, INNER + CHANNELS + HEADS, WIDTH, 0);
    g.out = weight_of(type, 0, 1, INNER, 0);
    g.mean = randoms(D, -0.5f, 0.5f), g.spread = randoms(D, 0.3f, 2), g.direct = randoms(D, -0.2f, 0.2f);
    g.gated_norm = randoms(INNER, 0.5f, 1.5f), g.conv = randoms(TAPS * CHANNELS, -0.7f, 0.7f);
    g.conv_bias = randoms(CHANNELS, -0.5f, 0.5f), g.dt_bias = randoms(HEADS, -3, 1);
    g.decay = randoms(HEADS, -2, -0.1f), g.skip = randoms(HEADS, -1, 1);
    give(g.part, "down", &g.down), give(g.part, "in", &g.in), give(g.part, "out", &g.out);
    give_floats(g.part, "mean", g.mean, D), give_floats(g.part, "spread", g.spread, D);
    give_floats(g.part, "direct", g.direct, D), give_floats(g.part, "gated_norm", g.gated_norm, INNER);
    give_floats(g.part, "conv", g.conv, TAPS * CHANNELS);
    give_floats(g.part, "conv_bias", g.conv_bias, CHANNELS), give_floats(g.part, "dt_bias", g.dt_bias, HEADS);
    give_floats(g.part, "decay", g.decay, HEADS), give_floats(g.part, "skip", g.skip, HEADS);
    give_number(g.part, "heads", HEADS), give_number(g.part, "states", STATES);
    give_number(g.part, "gated_eps", EPS), give_number(g.part, "bias", 0.5);
    WORKS(offramp_model_fits(model, g.part, &said));
    WORKS(check_mamba_gate(g.part, &g.gate, D, &said));
    return g;
}

// The logits of a text's rows h (ROWS, D).
static void recurrent_reference(const Recurrent *g, const float *h, double *logits) {
    static double inputs[ROWS + TAPS][CHANNELS], state[INNER][STATES];
    memset(inputs, 0, sizeof inputs), memset(state, 0, sizeof state);
    for (int t = 0; t < ROWS; t++) {
        double x[D], low[WIDTH], in[INNER + CHANNELS + HEADS], conv[CHANNELS], y[INNER], out;
        standardise_reference(h + t * D, g->mean, g->spread, x);
        product_reference(&g->down, x, low), product_reference(&g->in, low, in);
        memcpy(inputs[t + TAPS - 1], in + INNER, sizeof *inputs);
        for (int c = 0; c < CHANNELS; c++) {
            conv[c] = g->conv_bias[c];
            for (int tap = 0; tap < TAPS; tap++) conv[c] += g->conv[tap * CHANNELS + c] * inputs[t + tap][c];
            conv[c] = silu_reference(conv[c]);
        }
        for (int i = 0; i < INNER; i++) {
            const int head = i / DIM;
            const double dt = log1p(exp(in[INNER + CHANNELS + head] + g->dt_bias[head]));
            y[i] = g->skip[head] * conv[i];
            for (int n = 0; n < STATES; n++) {
                state[i][n] = state[i][n] * exp(dt * g->decay[head]) + dt * conv[i] * conv[INNER + n];
                y[i] += state[i][n] * conv[INNER + STATES + n];
            }
            y[i] *= silu_reference(in[i]);
        }
        norm_reference(y, g->gated_norm, EPS, y, INNER);
        product_reference(&g->out, y, &out);
        logits[t] = out + 0.5;
        for (int k = 0; k < D; k++) logits[t] += g->direct[k] * x[k];
    }
}

enum { TEXTS = 3, WINDOW = (TAPS - 1) * CHANNELS, STATE = INNER * STATES, NOTE = 2 * CHANNELS + HEADS };

// What a gate remembers of a text, and how many of its rows it has seen.
typedef struct {
    float window[WINDOW], h[STATE], notes[ROWS * NOTE];
    int64_t seen;
} Text;

// Asks about the next `count` rows of each of several texts h (ROWS, D), all in one call, and puts logits
// where they belong. Texts stand in the call in the order `order`.
static void ask_next(const Recurrent *g, Text *texts, const float *const *h, const int64_t *order,
                     const int64_t *count, float *const *logits) {
    MemoryAt memory[TEXTS];
    int64_t sequences[TEXTS * ROWS], rows = 0;
    float given[TEXTS * ROWS * D], out[TEXTS * ROWS], *at = out;
    for (int i = 0; i < TEXTS; i++) {
        const int64_t q = order[i];
        Text *text = texts + q;
        memory[q].state = (StateAt){
            .window = text->window, .fresh = text->h, .notes = text->notes + text->seen * NOTE, .h = text->h};
        for (int64_t t = 0; t < count[q]; t++, rows++) {
            memcpy(given + rows * D, h[q] + (text->seen + t) * D, D * sizeof(float));
            sequences[rows] = q;
        }
    }
    do_job((Job){.mamba_gate = &g->gate,
                 .given = given,
                 .rows = rows,
                 .sequences = sequences,
                 .memory = memory,
                 .out = out});
    for (int i = 0; i < TEXTS; at += count[order[i++]]) {
        Text *text = texts + order[i];
        memcpy(logits[order[i]] + text->seen, at, count[order[i]] * sizeof(float));
        text->seen += count[order[i]];
    }
}

// Texts of which a call has some rows each: every text's logits and memory are those that it has alone.
static void texts_do_not_matter(const Recurrent *g, const float *const *h, float *const *wanted,
                                const Text *alone) {
    static const int64_t orders[][TEXTS] = {{0, 1, 2}, {2, 0, 1}, {1, 2, 0}};
    for (int threads = 1; threads <= 3; threads++) {
        Text *texts = memory(TEXTS * sizeof *texts);
        float *logits[] = {zeros(ROWS), zeros(ROWS), zeros(ROWS)};
        WORKS(offramp_model_threads(model, threads, &said));
        for (int64_t left = 1, i = 0; left; i++) {
            int64_t count[TEXTS];
            left = 0;
            for (int q = 0; q < TEXTS; q++) {
                count[q] = min_(below(i % 2 ? 2 : 20), ROWS - texts[q].seen);
                left += ROWS - texts[q].seen - count[q];
            }
            ask_next(g, texts, h, orders[i % 3], count, logits);
        }
        for (int q = 0; q < TEXTS; q++) {
            CHECK(same(logits[q], wanted[q], ROWS), "text %d, with %d threads", q, threads);
            CHECK(!memcmp(texts + q, alone + q, sizeof *texts), "what is remembered of text %d", q);
        }
    }
}

// A memory that begins again, and repeats some rows of the journal, is what it was after these.
static void a_journal_brings_back(const Recurrent *g, const float *const *h, const Text *alone) {
    for (int64_t stay = 0; stay <= ROWS; stay += 7) {
        Text *texts = memory(TEXTS * sizeof *texts), *back = memory(sizeof *back);
        float *logits[] = {zeros(ROWS), zeros(ROWS), zeros(ROWS)};
        ask_next(g, texts, h, (int64_t[]){0, 1, 2}, (int64_t[]){stay, 0, 0}, logits);
        mixer_replay(&g->gate.mixer, back->h, alone->notes, stay);
        mixer_window(&g->gate.mixer, back->window, texts[1].window, alone->notes, stay);
        CHECK(same(back->h, texts->h, STATE) && same(back->window, texts->window, WINDOW), "%d rows",
              (int)stay);
    }
}

static void mamba_gates_are_right(int type) {
    const int mark = kept_count;
    const Recurrent g = recurrent_of(type);
    const float *h[TEXTS];
    float *logits[TEXTS], *again = zeros(ROWS);
    Text *texts = memory(TEXTS * sizeof *texts);
    CHECK(note_floats(&g.gate.mixer) == NOTE, "a note");
    WORKS(offramp_model_threads(model, 1, &said));
    for (int q = 0; q < TEXTS; q++) h[q] = randoms(ROWS * D, -2, 2), logits[q] = zeros(ROWS);
    for (int64_t q = 0; q < TEXTS; q++) {
        double wanted[ROWS];
        ask_next(&g, texts, h, (int64_t[]){0, 1, 2},
                 (int64_t[]){q == 0 ? ROWS : 0, q == 1 ? ROWS : 0, q == 2 ? ROWS : 0}, logits);
        recurrent_reference(&g, h[q], wanted);
        for (int t = 0; t < ROWS; t++)
            CHECK(roughly(logits[q][t], wanted[t], type ? 0.1 : 1e-4),
                  "row %d of a gate of type %d: %g and not %g", t, type, logits[q][t], wanted[t]);
    }
    texts_do_not_matter(&g, h, logits, texts);
    a_journal_brings_back(&g, h, texts);
    WORKS(offramp_ask(model, g.part, h[0], ROWS, again, &said));
    CHECK(same(again, logits[0], ROWS), "the call of the library differs");
    offramp_part_free(g.part);
    free_from(mark);
}

// A text of more rows than pass together.
static void long_texts_are_cut(void) {
    const Recurrent g = recurrent_of(OFFRAMP_FLOAT32);
    const float *h = randoms(600 * D, -2, 2);
    float *logits = zeros(600), *alone = zeros(600), window[WINDOW] = {0}, state[STATE] = {0};
    const MemoryAt memory = {.state = {window, state, NULL, state}};
    WORKS(offramp_ask(model, g.part, h, 600, logits, &said));
    for (int64_t r = 0, sequence = 0; r < 600; r++)
        do_job((Job){.mamba_gate = &g.gate,
                     .given = h + r * D,
                     .rows = 1,
                     .sequences = &sequence,
                     .memory = &memory,
                     .out = alone + r});
    CHECK(same(logits, alone, 600), "600 rows in one call");
    offramp_part_free(g.part);
}

// Read-outs ---------------------------------------------------------------------------------------

typedef struct {
    offramp_weight in, down;
    float *mean, *spread, *scale;
    int gated, skips, reads;
    int64_t width;
    offramp_part *part;
    Readout readout;
} Reader;

static Reader reader_of(int type, int gated, int skips, int jumps, int reads, int64_t width) {
    Reader r = {.gated = gated, .skips = skips, .reads = reads, .width = width, .part = new_part("readout")};
    r.in = weight_of(type, 0, (skips ? D : 0) + (gated ? 2 : 1) * width, (1 + reads) * D, jumps);
    r.down = weight_of(type, 0, D, width, 0);
    r.mean = randoms(D, -0.5f, 0.5f), r.spread = randoms(D, 0.3f, 2);
    r.scale = jumps ? randoms(D, 0.1f, 2) : NULL;
    give(r.part, "in", &r.in), give(r.part, "down", &r.down), give_number(r.part, "gated", gated);
    give_floats(r.part, "mean", r.mean, D), give_floats(r.part, "spread", r.spread, D),
        give_floats(r.part, "scale", r.scale, D);
    WORKS(offramp_model_fits(model, r.part, &said));
    WORKS(check_readout(r.part, &r.readout, D, &said));
    return r;
}

static void unit_reference(const float *h, double *x) {
    double squares = 0;
    for (int k = 0; k < D; k++) squares += (double)h[k] * h[k];
    for (int k = 0; k < D; k++) x[k] = h[k] / sqrt(squares / D + 1e-6);
}

static void read_reference(const Reader *r, const float *h, const float *deep, double *out) {
    double x[3 * D], all[D + 2 * 96], y[D], *act = all + (r->skips ? D : 0);
    standardise_reference(h, r->mean, r->spread, x);
    for (int i = 0; i < r->reads; i++) unit_reference(deep + i * D, x + (1 + i) * D);
    product_reference(&r->in, x, all);
    for (int64_t k = 0; r->gated && k < r->width; k++) act[k] = silu_reference(act[k]) * act[r->width + k];
    product_reference(&r->down, act, y);
    unit_reference(h, out);
    for (int k = 0; k < D; k++) {
        y[k] += r->skips ? all[k] : out[k];
        out[k] = r->scale ? h[k] + r->scale[k] * y[k] : y[k];
    }
}

static void read_outs_are_right(const Reader *r, double tolerance) {
    const float *h = randoms(ROWS * D, -2, 2), *deep = randoms(ROWS * r->reads * D, -30, 30), *places[ROWS];
    float *out = zeros(ROWS * D), *again = copied(h, ROWS * D);
    for (int i = 0; i < ROWS; i++) places[i] = deep + i * r->reads * D;
    cuts_do_not_matter((Job){.readout = &r->readout, .given = h, .deep = places, .rows = ROWS, .out = out}, D,
                       D);
    for (int i = 0; i < ROWS; i++) {
        double wanted[D];
        read_reference(r, h + i * D, places[i], wanted);
        const double apart = distance(out + i * D, wanted, D);
        CHECK(apart < tolerance, "row %d: %g", i, apart);
    }
    WORKS(offramp_read_out(model, r->part, again, r->reads ? deep : NULL, ROWS, again, &said));
    CHECK(same(again, out, ROWS * D), "in place, the call of the library differs");
    if (r->reads) REFUSED(offramp_read_out(model, r->part, h, NULL, ROWS, again, &said));
}

static void all_read_outs_are_right(void) {
    for (int type = OFFRAMP_FLOAT32; type <= OFFRAMP_Q4_1; type++)
        for (int kind = 0; kind < 8; kind++) {
            const int mark = kept_count, reads = kind / 2 > 1 ? kind / 2 - 1 : 0, jumps = kind % 2;
            // Linear and gated ones; deep ones, which always have a linear map. One is as wide as the state.
            const Reader r = reader_of(type, kind / 2 > 0, jumps || reads, jumps, reads, kind < 4 ? D : 96);
            read_outs_are_right(&r, type ? 0.1 : 1e-5);
            offramp_part_free(r.part);
            free_from(mark);
        }
    offramp_part *none = new_part("readout");
    const float *h = randoms(3 * D, -1, 1);
    float out[3 * D], wanted = NAN;
    WORKS(offramp_read_out(model, none, h, NULL, 3, out, &said));
    CHECK(same(out, h, 3 * D), "a read-out without an adapter changed something");
    give_number(none, "gated", wanted = 1);
    REFUSED(offramp_read_out(model, none, h, NULL, 3, out, &said));
    offramp_part_free(none);
}

// Confidences -------------------------------------------------------------------------------------

static void confidences_are_right(int64_t n) {
    const int mark = kept_count;
    float *y = randoms(ROWS * n, -4, 4), *sure = zeros(ROWS);
    for (int64_t r = 0; r < ROWS; r++) {
        float *row = y + r * n;
        for (int64_t i = 0; i < n; i++) row[i] *= r % 7;  // from uniform ones to sure ones
        if (r % 4 == 1)
            for (int64_t i = 0; i < n; i++) row[i] = i % 3 && i < n - 1 ? -INFINITY : row[i];  // candidates
        if (r % 4 == 2) row[below(n)] = row[below(n)] = 30;                                    // a tie
        if (r % 4 == 3) row[below(n)] = 200;
    }
    for (int kind = OFFRAMP_MAX_PROB; kind <= OFFRAMP_ENTROPY; kind++) {
        const Job job = {.kind = kind, .given = y, .rows = ROWS, .n = n, .out = sure};
        cuts_do_not_matter(job, n, 1);
        for (int r = 0; r < ROWS; r++) {
            const double wanted = confidence_reference(kind, y + r * n, n, n);
            CHECK(fabs(sure[r] - wanted) < 3e-6, "measure %d of row %d of %d tokens: %g and not %g", kind, r,
                  (int)n, sure[r], wanted);
        }
        for (int bad = 0; bad < 3; bad++) {  // rows that are not finite do not disturb others
            float *other = copied(y, ROWS * n), *found = zeros(ROWS);
            other[5 * n + below(n)] = bad ? INFINITY : NAN;
            for (int64_t i = 0; bad == 2 && i < n; i++) other[5 * n + i] = -INFINITY;
            do_job((Job){.kind = kind, .given = other, .rows = ROWS, .n = n, .out = found});
            CHECK(isnan(found[5]), "%g for a row that is not finite", found[5]);
            found[5] = sure[5];
            CHECK(same(found, sure, ROWS), "rows beside one that is not finite");
        }
    }
    free_from(mark);
}

int main(void) {
    begin();
    for (int type = OFFRAMP_FLOAT32; type <= OFFRAMP_Q4_1; type++) {
        gates_are_right(type, 0), gates_are_right(type, 7), gates_are_right(type, 96);
        mamba_gates_are_right(type);
    }
    long_texts_are_cut();
    all_read_outs_are_right();
    static const int64_t tokens[] = {1, 2, 5, 50, 1023, 1024, 1025, 3000};
    for (int i = 0; i < 8; i++) confidences_are_right(tokens[i]);
    offramp_model_free(model);
    return 0;
}
