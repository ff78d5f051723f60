// A range of a model's blocks on a CPU: all rows, in one call and one pass over the weights. A block has an attention or a Mamba-2
// mixer, and then an MLP or none.

#include "llama.c"
#include "mamba2.c"
#include "steps.h"

typedef struct {
    const Block *blocks;       // attention and MLP; NULL in a model of mixers alone
    const MambaBlock *mixers;  // NULL in a model without mixers
    Shape shape;
    MambaShape mamba_shape;
} Model;

static int is_mixer(const Model *m, int64_t i) { return m->mixers && m->mixers[i].in.w; }

// What blocks remember of S sequences: of the i-th block and sequence q, kv[i · S + q] points to keys and values, (capacity, 2H, P)
// in float32 or bfloat16, and mixed[i · S + q] to a mixer's window and state. The one that a block does not have is not read.
typedef struct {
    char *const *kv;
    MambaMemory *mixed;
    int64_t S;
} Memory;

static Memory memory_from(Memory m, int64_t block) {
    return (Memory){m.kv ? m.kv + block * m.S : NULL, m.mixed ? m.mixed + block * m.S : NULL, m.S};
}

// What one thread of a call works with. Both parts use the same scratch, one after the other.
typedef struct {
    const Model *model;
    Worker w;
    MambaWorker m;
    Hand *hand;
} Thread;

static Thread thread(const Model *model, const Tokens *tokens, const Scratch *scratch, Hand *hand) {
    Thread t = {.model = model, .hand = hand};
    if (model->blocks) t.w = worker(&model->shape, tokens, scratch, hand);
    if (model->mixers) t.m = mamba_worker(&model->mamba_shape, tokens, scratch, hand);
    return t;
}

// Runs the rows through blocks `start` to `stop` - 1; the memory is that of these blocks. A gate may stop a single row. Returns the
// number of blocks run.
static int64_t run_blocks(Thread *t, int64_t start, int64_t stop, Memory memory, const Gates *gates) {
    const Model *model = t->model;
    const Asker asker = model->blocks ? (Asker){t->w.x, t->w.mlp, t->w.room} : (Asker){t->m.x, t->m.in, t->m.room};
    float *h = model->blocks ? t->w.tokens->h : t->m.tokens->h;
    int64_t gate = 0;
    for (int64_t i = 0; i < stop - start; i++) {
        const Memory own = memory_from(memory, i);
        if (is_mixer(model, start + i)) {
            const MambaBlock *b = model->mixers + start + i;
            project_in(b, &t->m, 0);
            advance_memories(b, &t->m, own.mixed, i, 1);
            project_out(b, &t->m);
        } else {
            project(model->blocks + start + i, &t->w, own.kv, t->w.s->queries);
            attention(model->blocks + start + i, &t->w, own.kv);
        }
        if (model->blocks) gated_mlp(model->blocks + start + i, &t->w);
        if (stops(t->hand, gates, &gate, i + 1, h, &asker)) return i + 1;
    }
    return stop - start;
}

// Runs the rows through blocks `start` to `stop` - 1, h in place; the memory is that of these blocks. A single row may have gates
// (else NULL). Returns the number of blocks run.
int64_t offramp_run(const Model *model, int64_t start, int64_t stop, const Memory *memory, const Tokens *tokens, const Gates *gates,
                    const Scratch *scratch) {
    int64_t run = stop - start;
    Crew crew = {0};
#pragma omp parallel num_threads(scratch->threads)
    {
        Hand hand = hand_of(&crew);
        Thread t = thread(model, tokens, scratch, &hand);
        const int64_t own = run_blocks(&t, start, stop, *memory, gates);
        if (!hand.t) run = own;
    }
    return run;
}

// Only updates the memories, as if the rows were the input of each of the blocks.
void offramp_remember(const Model *model, int64_t start, int64_t stop, const Memory *memory, const Tokens *tokens,
                      const Scratch *scratch) {
    Crew crew = {0};
#pragma omp parallel num_threads(scratch->threads)
    {
        Hand hand = hand_of(&crew);
        Thread t = thread(model, tokens, scratch, &hand);
        for (int64_t i = 0; i < stop - start; i++) {
            const Memory own = memory_from(*memory, i);
            if (is_mixer(model, start + i)) {
                project_in(model->mixers + start + i, &t.m, t.m.E);
                advance_memories(model->mixers + start + i, &t.m, own.mixed, i, 0);
            } else {
                project(model->blocks + start + i, &t.w, own.kv, 0);
            }
        }
    }
}

// What runs the tokens of `offramp_steps`. For drafts, spare[i] is room for another state of a mixer, `windows` (W - 1, C) has for
// each block the windows before drafts entered it, and `journal` MOST_DRAFTS + 1 rows for each block.
typedef struct {
    Memory memory;
    int64_t position, at[MOST_DRAFTS + 1];
    const float *turn;
    float **spare, *windows, *journal;
    Tokens tokens;
    Thread thread;
} Stepper;

// The floats of a mixer's window, of its state, and of a journal's row.
static int64_t window_size(const MambaShape *s) { return (s->width - 1) * (s->heads * s->dim + 2 * s->groups * s->states); }
static int64_t state_size(const MambaShape *s) { return s->heads * s->dim * s->states; }
static int64_t note_size(const MambaShape *s) { return 2 * (s->heads * s->dim + 2 * s->groups * s->states) + s->heads; }

// The rows of a chunk go through a mixer together, and leave its old state where it is.
static int64_t run_rows(void *worker, float *h, int64_t t, int64_t n, int64_t rows, int64_t start, int64_t stop, const Gates *gates) {
    Stepper *s = worker;
    const MambaShape *shape = &s->thread.model->mamba_shape;
    for (int64_t r = 0; r < rows; r++) s->at[r] = s->position + t + n + r;
    s->tokens.h = h, s->tokens.count = rows, s->tokens.turn = s->turn + s->at[0] * s->thread.model->shape.dim;
    s->tokens.journal = s->journal && n + rows > 1 ? s->journal + (start * s->tokens.stride + n) * note_size(shape) : NULL;
    s->thread.m.fresh = rows > 1 ? s->spare + start : NULL;
    return start + run_blocks(&s->thread, start, stop, memory_from(s->memory, start), gates);
}

// Notes the windows; and the states of mixers that drafts enter one by one.
static void save_mixers(void *worker, int64_t start, int64_t stop, int chunk) {
    Stepper *s = worker;
    const Model *model = s->thread.model;
    const int64_t window = window_size(&model->mamba_shape), state = state_size(&model->mamba_shape);
    EACH_PIECE(i, s->thread.hand, stop - start) {
        const MambaMemory *memory = s->memory.mixed + start + i;
        if (!is_mixer(model, start + i)) continue;
        memcpy(s->windows + (start + i) * window, memory->window, window * sizeof(float));
        if (!chunk) memcpy(s->spare[start + i], memory->h, state * sizeof(float));
    }
}

// Keeps `kept` of the `made` rows of a round. Of all rows, each mixer has the state already; else it goes back to the old one, and
// repeats those that are kept. Blocks before `after` were saved after the first of them.
static void keep_mixers(void *worker, int64_t after, int64_t kept, int64_t made, int64_t blocks) {
    Stepper *s = worker;
    const Model *model = s->thread.model;
    const MambaShape *shape = &model->mamba_shape;
    const int64_t C = window_size(shape) / (shape->width - 1), W = shape->width, note = note_size(shape);
    EACH_PIECE(i, s->thread.hand, blocks) {
        if (!is_mixer(model, i)) continue;
        MambaMemory *memory = s->memory.mixed + i;
        const int shallow = i < after;
        if (shallow == (kept < made)) {  // the state to go on from is the spare one
            float *h = memory->h;
            memory->h = s->spare[i], s->spare[i] = h;
        }
        if (kept == made) continue;
        const float *old = s->windows + i * window_size(shape);
        const float *journal = s->journal + (i * s->tokens.stride + shallow) * note;
        const int64_t rows = kept - shallow;
        // Input t of the rows; those before the first, t < 0, are in the old window.
#define KEPT(t) ((t) < 0 ? old + (W - 1 + (t)) * C : journal + (t) * note)
        for (int64_t tap = 0; tap < W - 1; tap++) memcpy(memory->window + tap * C, KEPT(rows + tap - W + 1), C * sizeof(float));
#undef KEPT
        offramp_mamba_replay(model->mixers + i, shape, memory->h, journal, rows);
    }
}

// Decodes as `steps` says, from `position` on, through all `count` blocks. The memory has room for all tokens; row p of `turn` are the
// rotary pairs of position p. `gates` (or NULL) has logits for every token.
void offramp_steps(const Model *model, int64_t count, const Memory *memory, const float *turn, int64_t position, Steps *steps,
                   const Gates *gates, const Scratch *scratch) {
    Crew crew = {0};
    Found found[steps->most];
    const int mixers = model->mixers && steps->drafter;  // that drafts may have to be taken back from
    const int64_t sequences[MOST_DRAFTS + 1] = {0}, rows = steps->drafter ? MOST_DRAFTS + 1 : 1;
    const int64_t state = state_size(&model->mamba_shape), window = window_size(&model->mamba_shape);
    MambaMemory own_memory[model->mixers ? count : 1];
    float *spare[mixers ? count : 1];
    memset(found, 0, sizeof found);
    if (model->mixers) memcpy(own_memory, memory->mixed, sizeof own_memory);
    for (int64_t i = 0; mixers && i < count; i++) spare[i] = scratch->saved + i * state;
#pragma omp parallel num_threads(scratch->threads)
    {
        Hand hand = hand_of(&crew);
        Stepper own = {{memory->kv, model->mixers ? own_memory : NULL, 1}, position, {0}, turn};
        if (mixers) own.spare = spare, own.windows = scratch->saved + count * state, own.journal = own.windows + count * window;
        own.tokens = (Tokens){steps->h, rows, own.at, sequences, sequences, turn, position + steps->most, NULL, MOST_DRAFTS + 1};
        own.thread = thread(model, &own.tokens, scratch, &hand);
        take_steps(&hand, steps, gates, scratch->head, scratch->desk, found,
                   &(Runner){&own, count, run_rows, mixers ? save_mixers : NULL, mixers ? keep_mixers : NULL});
        EACH_PIECE(i, &hand, model->mixers ? count : 0)
            if (own_memory[i].h != memory->mixed[i].h) memcpy(memory->mixed[i].h, own_memory[i].h, state * sizeof(float));
    }
}
