// Threads: the same bits with any number of them, calls from several threads at once, and a process that was
// forked.

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "models.h"
#include "threads.h"

enum { TOKENS = 24, ROWS = 40 };

// What a model answers: rows of blocks, logits, and tokens.
typedef struct {
    float h[ROWS * 32], logits[3 * 60];
    int64_t ids[ROWS + 1 + TOKENS];
} Answer;

static Tiny model_of(const char *blocks) {
    Shape shape = SMALL;
    shape.blocks = blocks, shape.vocabulary = 60;
    return tiny(shape);
}

// Calls each function that uses threads once. No random numbers: threads do this at the same time.
static void ask(const Tiny *t, const float *given, Answer *answer) {
    offramp_error error = {""};
    offramp_session *session = offramp_session_new(t->model, OFFRAMP_BFLOAT16, 4, &error), *fork;
    CHECK(session, "%s", error.message);
    memset(answer, 0, sizeof *answer);
    memcpy(answer->h, given, sizeof answer->h);
    const offramp_rows rows = {session, 0, ROWS};
    CHECK(!offramp_run(t->model, 0, t->count, &rows, 1, answer->h, &error), "%s", error.message);
    CHECK(!offramp_logits(t->model, NULL, answer->h, 3, answer->logits, &error), "%s", error.message);
    fork = offramp_session_fork(session, &error);
    CHECK(fork, "%s", error.message);
    offramp_decision decisions[TOKENS];
    answer->ids[ROWS] = 5;
    offramp_request request = {.session = fork,
                               .ids = answer->ids,
                               .known = ROWS + 1,
                               .run = ROWS,
                               .most = TOKENS,
                               .how = {.top_p = 1, .penalty = 1.1},
                               .decisions = decisions},
                    *requests[] = {&request};
    const offramp_rules rules = {.key = OFFRAMP_MAX_PROB, .pending = 1};
    offramp_plan *plan = offramp_plan_new(t->model, &rules, &error);
    CHECK(plan, "%s", error.message);
    CHECK(!offramp_step(plan, requests, 1, TOKENS, NULL, &error), "%s", error.message);
    offramp_plan_free(plan);
    offramp_session_free(session), offramp_session_free(fork);
}

static int alike(const Answer *a, const Answer *b) { return !memcmp(a, b, sizeof *a); }

// More threads than cores, too: each number gives what one thread gives, also when the number falls.
static void numbers_do_not_matter(const Tiny *t, const float *given, const Answer *wanted) {
    static const int64_t counts[] = {2, 3, 7, 2, 1, 4};
    Answer found;
    for (int i = 0; i < 6; i++) {
        WORKS(offramp_model_threads(t->model, counts[i], &said));
        for (int again = 0; again < 3; again++) {
            ask(t, given, &found);
            CHECK(alike(&found, wanted), "%d threads", (int)counts[i]);
        }
    }
}

typedef struct {
    const Tiny *tiny;
    const float *given;
    const Answer *wanted;
    pthread_t thread;
} Caller;

static void *call_often(void *context) {
    const Caller *c = context;
    Answer *found = malloc(sizeof *found);
    for (int i = 0; i < 6; i++) {
        if (i % 3 == 1) CHECK(!offramp_model_threads(c->tiny->model, 1 + i, NULL), "a number of threads");
        ask(c->tiny, c->given, found);
        CHECK(alike(found, c->wanted), "a call beside others");
    }
    free(found);
    return NULL;
}

// Several threads call one model, and others another one.
static void callers_do_not_matter(const Tiny *first, const Tiny *second, const float *given,
                                  const Answer *of_first, const Answer *of_second) {
    enum { CALLERS = 5 };
    Caller callers[CALLERS];
    for (int i = 0; i < CALLERS; i++) {
        callers[i] = (Caller){i % 2 ? second : first, given, i % 2 ? of_second : of_first, 0};
        CHECK(!pthread_create(&callers[i].thread, NULL, call_often, callers + i), "no thread");
    }
    for (int i = 0; i < CALLERS; i++) pthread_join(callers[i].thread, NULL);
}

// A model and its sessions are freed by whichever thread is the last.
static void *free_session(void *session) {
    offramp_session_free(session);
    return NULL;
}

static void the_last_one_frees(void) {
    for (int i = 0; i < 20; i++) {
        const int mark = kept_count;
        const Tiny t = model_of("m");
        offramp_session *session = session_of(&t, OFFRAMP_FLOAT32);
        float h[4 * 32] = {0};
        WORKS(offramp_model_threads(t.model, 2, &said));
        run_rows(&t, session, h, 4);
        pthread_t thread;
        CHECK(!pthread_create(&thread, NULL, free_session, session), "no thread");
        offramp_model_free(t.model);
        pthread_join(thread, NULL);
        free_from(mark);
    }
}

// Waits for a process, but not forever. Returns whether it ended well.
static int ends_well(pid_t child) {
    for (int waited = 0, status; waited < 6000; waited++) {
        if (waitpid(child, &status, WNOHANG) == child) return WIFEXITED(status) && !WEXITSTATUS(status);
        nanosleep(&(struct timespec){0, 10000000}, NULL);
    }
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    return 0;
}

// In a process that was forked, and in one that was forked from it, a model that the first one used goes on.
static void forks_go_on(const Tiny *t, const float *given, const Answer *wanted) {
    for (int64_t threads = 1; threads <= 3; threads++) {
        WORKS(offramp_model_threads(t->model, threads, &said));
        Answer found;
        ask(t, given, &found);
        offramp_session *session = session_of(t, OFFRAMP_FLOAT32);
        const pid_t child = fork();
        if (!child) {
            ask(t, given, &found);
            const pid_t grandchild = fork();
            if (grandchild && !ends_well(grandchild)) _exit(2);
            if (!alike(&found, wanted)) _exit(1);
            if (offramp_model_threads(t->model, 4 - threads, NULL)) _exit(3);
            ask(t, given, &found);
            offramp_session_free(session), offramp_model_free(t->model);
            _exit(!alike(&found, wanted));
        }
        CHECK(ends_well(child), "a call of a process that was forked hung or went wrong, with %d threads",
              (int)threads);
        ask(t, given, &found);
        CHECK(alike(&found, wanted), "a call after a fork");
        offramp_session_free(session);
    }
    // Freed by a process that has not used it.
    const pid_t child = fork();
    if (!child) {
        offramp_model_free(t->model);
        _exit(0);
    }
    CHECK(ends_well(child), "a model was freed where its threads are not");
}

// Things are divided into parts that follow each other, and the pieces of each phase are claimed once.
static void parts_follow_each_other(void) {
    for (int threads = 1; threads < 9; threads++)
        for (int64_t unit = 1; unit <= 16; unit *= 4)
            for (int64_t total = 0; total < 300; total += 1 + total / 8) {
                const Hand hand = {NULL, 0, 0, 0, threads};
                const Division d = divided(&hand, total, unit);
                int64_t from, to;
                int64_t *begins = calloc(total + 1, sizeof *begins),
                        *stops = calloc(total + 1, sizeof *stops);
                for (int64_t i = 0; i < d.pieces; i++) {
                    part_of(&d, i, &from, &to);
                    CHECK(0 <= from && from <= to && to <= total && (to == total || to % unit == 0),
                          "part %d", (int)i);
                    if (from < to) begins[from]++, stops[to]++;
                }
                for (int64_t i = 0; i < total; i++)
                    CHECK(begins[i] <= 1 && begins[i] == (i ? stops[i] : 1),
                          "%d of %d are left out, or done twice", (int)i, (int)total);
                CHECK(!total || stops[total] == 1, "the last of %d", (int)total);
                free(begins), free(stops);
            }
}

typedef struct {
    _Atomic int claims[64];
} Claims;

static void claim(Hand *hand, void *context) {
    Claims *c = context;
    for (int phase = 0; phase < 200; phase++)
        EACH_PIECE(i, hand, phase % 5 ? 64 : 0) atomic_fetch_add(c->claims + i, 1);
}

static void pieces_are_claimed_once(void) {
    for (int threads = 1; threads <= 6; threads++) {
        Pool *pool = aligned_alloc(64, (sizeof *pool + 63) / 64 * 64);
        pool_begin(pool);
        for (int call = 0; call < 30; call++) {
            Claims claims = {{0}};
            pool_enter(pool);
            pool->wanted = call % 7 == 6 ? 1 : threads;
            pool_run(pool, claim, &claims);
            pool_leave(pool);
            for (int i = 0; i < 64; i++)
                CHECK(claims.claims[i] == 160, "piece %d was done %d times", i, claims.claims[i]);
        }
        pool_end(pool);
        free(pool);
    }
}

// The number of a piece does not run into that of its phase, however many there are.
static void pieces_may_be_many(void) {
    static const int64_t many[] = {(int64_t)1 << 24, (int64_t)1 << 32};
    for (int i = 0; i < 2; i++) {
        const int64_t done = many[i] - 2, pieces = many[i] + 3;
        Crew crew = {.ticket = done, .done = done};
        Hand hand = {&crew, 0, 0, 0, 1};
        int64_t wanted = done;
        EACH_PIECE(piece, &hand, pieces) { CHECK(piece == wanted++, "a piece was left out"); }
        CHECK(wanted == pieces && hand.phase == 1 && !crew.done, "a phase has not ended");
    }
}

int main(void) {
    alarm(100);  // a hang is a failure
    const Tiny first = model_of("am"), second = model_of("nb");
    const float *given = randoms(ROWS * 32, -1, 1);
    Answer of_first, of_second;
    ask(&first, given, &of_first), ask(&second, given, &of_second);
    parts_follow_each_other();
    pieces_are_claimed_once(), pieces_may_be_many();
    numbers_do_not_matter(&first, given, &of_first);
    numbers_do_not_matter(&second, given, &of_second);
    callers_do_not_matter(&first, &second, given, &of_first, &of_second);
    the_last_one_frees();
    forks_go_on(&first, given, &of_first);
    offramp_model_free(first.model), offramp_model_free(second.model);
    return 0;
}
