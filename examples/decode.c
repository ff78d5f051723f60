// A tiny model of random numbers, put together and decoded from C, as core/offramp.h says. It prints the ids
// of tokens.
//   cmake -S core -B build/core -DOFFRAMP_TESTS=ON && cmake --build build/core && build/core/example-x86-64-v3

#include <stdio.h>
#include <stdlib.h>

#include "offramp.h"

enum {
    D = 32,
    V = 100,
    H = 4,
    N = 16,
    E = 32,
    C = E + 2 * N,
    TAPS = 4,
    MOST = 16
};  // the letters of offramp.h

static float memory[1 << 14];  // weights and arrays are not copied, and must outlive the model
static int used;

static const float *numbers(int count, float low) {  // from low to low + 1
    float *x = memory + used;
    for (used += count; x < memory + used; x++) *x = low + (float)rand() / RAND_MAX;
    return x - count;
}

static void give(offramp_part *part, const char *name, int rows, int columns) {
    const offramp_weight weight = {
        .type = OFFRAMP_FLOAT32, .rows = rows, .columns = columns, .values = numbers(rows * columns, -0.5f)};
    offramp_part_weight(part, name, &weight, NULL);
}

static void give_array(offramp_part *part, const char *name, int count, float low) {
    offramp_part_array(part, name, OFFRAMP_FLOAT32, numbers(count, low), count, NULL);
}

int main(void) {
    offramp_part *ends = offramp_part_new("ends", NULL), *mixer = offramp_part_new("mamba2", NULL);
    give(ends, "head", V, D), give_array(ends, "norm", D, 0.5f), give(ends, "embedding", V, D);
    offramp_part_number(ends, "eps", 1e-5, NULL);
    give(mixer, "in", E + C + H, D), give(mixer, "out", D, E);
    give_array(mixer, "norm", D, 0.5f), give_array(mixer, "gated_norm", E, 0.5f),
        give_array(mixer, "conv", TAPS * C, -0.5f);
    give_array(mixer, "dt_bias", H, -1), give_array(mixer, "decay", H, -1.5f),
        give_array(mixer, "skip", H, -0.5f);
    const char *const names[] = {"heads", "groups", "states", "eps", "gated_eps", "dt_low", "dt_high"};
    const double values[] = {H, 1, N, 1e-5, 1e-5, 0, 1};
    for (int i = 0; i < 7; i++) offramp_part_number(mixer, names[i], values[i], NULL);

    // What a part lacks, and what does not fit, is found when a model is made of it.
    offramp_error error;
    const offramp_part *mixers[] = {mixer, mixer};  // two blocks, which here have the same weights
    offramp_model *model = offramp_model_new(ends, NULL, mixers, NULL, 2, &error);
    offramp_session *session = model ? offramp_session_new(model, OFFRAMP_FLOAT32, MOST, &error) : NULL;
    if (!session) return fprintf(stderr, "%s\n", error.message), 1;

    // A plan without exits: full depth decides each token. The others of its rules matter to exits and drafts.
    const offramp_rules rules = {.key = OFFRAMP_MAX_PROB, .pending = 1};
    offramp_plan *plan = offramp_plan_new(model, &rules, &error);
    if (!plan) return fprintf(stderr, "%s\n", error.message), 1;

    int64_t ids[1 + MOST] = {7};  // the token to begin with, and those that are decided
    offramp_decision decisions[MOST];
    offramp_request request = {.session = session,
                               .ids = ids,
                               .known = 1,
                               .most = MOST,
                               .how = {.top_p = 1, .penalty = 1.2},
                               .decisions = decisions};
    offramp_request *const requests[] = {&request};
    if (offramp_step(plan, requests, 1, MOST, NULL, &error)) return fprintf(stderr, "%s\n", error.message), 1;
    for (int i = 0; i <= request.decided; i++)
        printf("%lld%c", (long long)ids[i], i < request.decided ? ' ' : '\n');

    offramp_plan_free(plan);
    offramp_session_free(session), offramp_model_free(model), offramp_part_free(mixer),
        offramp_part_free(ends);
    return 0;
}
