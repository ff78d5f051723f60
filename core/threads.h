// A pool of threads, and how the threads of one call share out its work: all go through the same phases, and
// in each they claim pieces until none is left. A thread waits for pieces that others hold, and not for the
// others themselves. So a thread that the system has put aside delays the call only if it holds a piece.

#pragma once
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "offramp.h"

enum { MOST_THREADS = OFFRAMP_MOST_THREADS };

typedef struct {
    _Alignas(64) _Atomic int64_t ticket;  // the phase, and below it the next piece
    _Alignas(64) _Atomic int64_t done;    // pieces of the phase
} Crew;

// One thread of a call. `index` of `count` is its number.
typedef struct {
    Crew *crew;
    int64_t phase;
    int holds, index, count;
} Hand;

typedef void Work(Hand *hand, void *context);

typedef struct Pool Pool;

typedef struct {
    Pool *pool;
    pthread_t thread;
    int index;
} Helper;

// `door`: the number of the call, a bit that says whether threads may still join it, and how many have joined
// and not left.
struct Pool {
    pthread_mutex_t calls, lock;
    pthread_cond_t wake;
    _Alignas(64) _Atomic int64_t door;
    _Atomic int sleeping, stops;
    Crew crew;
    Work *work;
    void *context;
    _Atomic int64_t owner;  // the process; below 0 while it makes the pool anew
    int wanted, started;
    Helper helpers[MOST_THREADS];
};

void pool_begin(Pool *pool);
void pool_end(Pool *pool);

// Between these two calls, the pool and all its data belong to this thread alone.
void pool_enter(Pool *pool);
void pool_leave(Pool *pool);

// Runs `work` on `wanted` threads, this one among them, within `pool_enter`. There are fewer if the system
// gives no more.
void pool_run(Pool *pool, Work *work, void *context);

// The next piece of a phase of so many. -1 when all pieces are done.
int64_t next_piece(Hand *hand, int64_t pieces);
#define EACH_PIECE(i, hand, pieces) for (int64_t i; (i = next_piece(hand, pieces)) >= 0;)

// Divides `total` things: a large part for each thread first, then small ones, so that all end at about the
// same time. All parts but the last are multiples of `unit`.
typedef struct {
    int64_t total, unit, large, pieces, threads;
} Division;

Division divided(const Hand *hand, int64_t total, int64_t unit);
void part_of(const Division *division, int64_t i, int64_t *from, int64_t *to);

double seconds_now(void);
