// Answers a prompt by a model's GGUF file, from C, as core/offramp.h says: decode MODEL.gguf PROMPT [EXITS.gguf]
// With exits, their mode `exact` gives the same tokens in fewer passes. `make native` builds a whole program.
//   cmake -S core -B build/core -DOFFRAMP_TESTS=ON && cmake --build build/core
//   build/core/example-x86-64-v3 model.gguf "Why is the sky blue?" exits.gguf

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "offramp.h"

enum { MOST = 64, ROUNDS = 8 };  // tokens of an answer; passes of a call

static int fail(const offramp_error *error) { return fprintf(stderr, "%s\n", error->message), 1; }

int main(int count, char **words) {
    if (count < 3) return fputs("decode MODEL.gguf PROMPT [EXITS.gguf]\n", stderr), 2;
    offramp_error error;
    offramp_file *file = offramp_file_new(words[1], NULL, NULL, &error), *exits = NULL;
    if (!file) return fail(&error);
    if (count > 3 && !(exits = offramp_file_new(words[3], NULL, NULL, &error))) return fail(&error);
    offramp_plan *plan = offramp_file_plan(file, exits, exits ? "exact" : "full", &error);
    if (!plan) return fail(&error);

    // The prompt's ids by the chat template, or as it is if the file has none that is known.
    const offramp_message message = {OFFRAMP_USER, words[2]};
    static int64_t ids[(1 << 16) + MOST];
    int64_t known = offramp_chat(file, &message, 1, ids, 1 << 16);
    if (known < 0) known = offramp_tokenise(file, words[2], (int64_t)strlen(words[2]), 1, ids, 1 << 16);
    if (known < 1 || known > 1 << 16) return fputs("The prompt is empty, or too long.\n", stderr), 1;

    // All ids but the last are read; then tokens are decided, some in each step, until one ends the text.
    offramp_session *session = offramp_file_session(file, known + MOST, &error);
    float *deep = calloc(2 * offramp_model_hidden(offramp_file_model(file)), sizeof *deep);
    offramp_decision decisions[MOST];
    offramp_request r = {.session = session,
                         .ids = ids,
                         .known = known,
                         .prompt = known,
                         .deep = deep,
                         .how = {.top_p = 1, .penalty = 1},
                         .decisions = decisions,
                         .reads = known - 1};
    offramp_request *const requests[] = {&r};
    r.ends = offramp_file_ends(file, &r.ends_count);
    if (!session || !deep || (r.reads && offramp_step(plan, requests, 1, 1, NULL, &error)))
        return fail(&error);
    int64_t passes = 0;
    for (int ended = r.reads = 0; !ended && r.known < known + MOST;) {
        r.most = known + MOST - r.known;
        if (offramp_step(plan, requests, 1, ROUNDS, NULL, &error)) return fail(&error);
        for (int64_t i = 0; i < r.decided; i++) {
            int special;
            int64_t length;
            const char *bytes = offramp_token(file, decisions[i].id, &length, &special);
            if (!special) fwrite(bytes, 1, length, stdout);
            for (int64_t e = 0; e < r.ends_count; e++) ended |= decisions[i].id == r.ends[e];
        }
        passes += decisions[r.decided - 1].passes, r.known += r.decided;
    }
    printf("\n%lld tokens in %lld passes\n", (long long)(r.known - known), (long long)passes);
    offramp_session_free(session), offramp_plan_free(plan), free(deep);
    offramp_file_free(exits), offramp_file_free(file);
    return 0;
}
