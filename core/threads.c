#include "threads.h"

#include <sched.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    PIECES_BITS = 34,  // bits for the number of a phase's pieces: rows (MOST_ROWS) times heads (MOST_HEADS)
    SPINS = 1000,      // the number of looks at a phase before the processor is offered to others
    ROUNDS = 40,       // the number of such offers before a helper without a call sleeps
};
static const int64_t OPEN = (int64_t)1 << 16,
                     CALL = (int64_t)1 << 17;  // bits of the door; those below count who has joined

static void relax(int spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
    if (spins % SPINS == SPINS - 1) sched_yield();
}

double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int64_t next_piece(Hand *hand, int64_t pieces) {
    Crew *crew = hand->crew;
    if (!pieces) return -1;
    if (hand->holds && atomic_fetch_add(&crew->done, 1) + 1 == pieces) {
        atomic_store(&crew->done, 0);
        atomic_store(&crew->ticket, (hand->phase + 1) << PIECES_BITS);
    }
    hand->holds = 0;
    for (int spins = 0;; spins++) {
        int64_t ticket = atomic_load(&crew->ticket);
        if (ticket >> PIECES_BITS != hand->phase) break;
        const int64_t piece = ticket & (((int64_t)1 << PIECES_BITS) - 1);
        if (piece >= pieces) {
            relax(spins);
        } else if (atomic_compare_exchange_weak(&crew->ticket, &ticket, ticket + 1)) {
            hand->holds = 1;
            return piece;
        }
    }
    hand->phase++;
    return -1;
}

Division divided(const Hand *hand, int64_t total, int64_t unit) {
    const int64_t n = hand->count;
    if (n == 1 || total <= unit) return (Division){total, unit, total, total > 0, 1};
    const int64_t units = (total + unit - 1) / unit, large = units * 3 / (4 * n), rest = units - large * n;
    const int64_t small = rest < 4 * n ? rest : 4 * n;
    return (Division){total, unit, large * unit, n + small, n};
}

void part_of(const Division *d, int64_t i, int64_t *from, int64_t *to) {
    if (d->pieces == 1) {
        *from = 0, *to = d->total;
        return;
    }
    const int64_t first = d->large * d->threads, units = (d->total - first + d->unit - 1) / d->unit;
    const int64_t small = d->pieces - d->threads, j = i - d->threads;
    *from = j < 0 ? i * d->large : first + units * j / small * d->unit;
    *to = j < 0 ? (i + 1) * d->large : first + units * (j + 1) / small * d->unit;
    if (*to > d->total) *to = d->total;
}

// Joins the call whose door stands open, unless that is call `last`. Returns the call's number, or 0.
static int64_t join(Pool *pool, int64_t last) {
    int64_t door = atomic_load(&pool->door);
    while (door & OPEN && door / CALL != last)
        if (atomic_compare_exchange_weak(&pool->door, &door, door + 1)) return door / CALL;
    return 0;
}

// Sleeps until a door opens that is not that of call `last`, or the pool ends.
static void sleep_until_called(Pool *pool, int64_t last) {
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->sleeping, 1);
    for (;;) {
        const int64_t door = atomic_load(&pool->door);
        if (atomic_load(&pool->stops) || (door & OPEN && door / CALL != last)) break;
        pthread_cond_wait(&pool->wake, &pool->lock);
    }
    atomic_fetch_sub(&pool->sleeping, 1);
    pthread_mutex_unlock(&pool->lock);
}

static void *help(void *given) {
    const Helper *helper = given;
    Pool *pool = helper->pool;
    int64_t last = 0;
    while (!atomic_load(&pool->stops)) {
        int64_t call = 0;
        for (int spins = 0; !call && spins < SPINS * ROUNDS && !atomic_load(&pool->stops); spins++) {
            call = join(pool, last);
            if (!call) relax(spins);
        }
        if (!call) {
            sleep_until_called(pool, last);
            continue;
        }
        last = call;
        // A call may want fewer threads than there are.
        Hand hand = {&pool->crew, 0, 0, helper->index, pool->wanted};
        if (hand.index < hand.count) pool->work(&hand, pool->context);
        atomic_fetch_sub(&pool->door, 1);
    }
    return NULL;
}

// A pool without helpers and without a call.
static void make(Pool *pool) {
    pthread_mutex_init(&pool->calls, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    atomic_store(&pool->door, 0);
    atomic_store(&pool->sleeping, 0);
    pool->started = 0;
}

void pool_begin(Pool *pool) {
    memset(pool, 0, sizeof *pool);
    make(pool);
    pool->owner = getpid();
    pool->wanted = 1;
}

void pool_end(Pool *pool) {
    if (pool->owner != getpid()) return;  // the pool's threads belong to the parent process
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->stops, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->started; i++) pthread_join(pool->helpers[i].thread, NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    pthread_mutex_destroy(&pool->calls);
}

void pool_enter(Pool *pool) {
    const int64_t here = getpid();
    int64_t owner = atomic_load(&pool->owner);
    // A fork has copied the memory, but not the threads.
    if (owner != here && owner != -here && atomic_compare_exchange_strong(&pool->owner, &owner, -here)) {
        make(pool);
        atomic_store(&pool->owner, here);
    }
    for (int spins = 0; atomic_load(&pool->owner) != here; spins++) relax(spins);
    pthread_mutex_lock(&pool->calls);
}

void pool_leave(Pool *pool) { pthread_mutex_unlock(&pool->calls); }

// Starts the helpers that are missing.
static void hire(Pool *pool) {
    while (pool->started < pool->wanted - 1) {
        Helper *helper = pool->helpers + pool->started;
        *helper = (Helper){.pool = pool, .index = pool->started + 1};
        if (pthread_create(&helper->thread, NULL, help, helper)) return;
        pool->started++;
    }
}

void pool_run(Pool *pool, Work *work, void *context) {
    pool->crew = (Crew){0};
    Hand hand = {&pool->crew, 0, 0, 0, pool->wanted};
    if (pool->wanted == 1) {
        work(&hand, context);
        return;
    }
    pool->work = work, pool->context = context;
    hire(pool);
    const int64_t call = atomic_load(&pool->door) / CALL + 1;
    atomic_store(&pool->door, call * CALL | OPEN);
    if (atomic_load(&pool->sleeping)) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
    }
    work(&hand, context);
    atomic_fetch_and(&pool->door, ~OPEN);
    for (int spins = 0; atomic_load(&pool->door) != call * CALL; spins++) relax(spins);
}
