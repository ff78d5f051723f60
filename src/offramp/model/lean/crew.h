// The threads of one call share out its work: all go through the same phases, and in each they claim pieces until none is left. A
// thread waits for pieces that others hold, and not for the others themselves. So a thread that the system has put aside holds the
// call up only if it holds a piece.

#pragma once
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#else  // a compiler without OpenMP, such as Apple's: one thread does everything
#include <time.h>
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_num_threads(void) { return 1; }
static inline double omp_get_wtime(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}
#endif

enum { PIECES_BITS = 24, SPINS = 1000 };  // of a phase's pieces; looks at a phase before the processor is offered to others

typedef struct {
    _Alignas(64) _Atomic int64_t ticket;  // the phase, and below it the next piece
    _Alignas(64) _Atomic int64_t done;    // pieces of the phase
} Crew;

// One thread of a crew. `t` of `n` is its number.
typedef struct {
    Crew *crew;
    int64_t phase;
    int holds, t, n;
} Hand;

static inline Hand hand_of(Crew *crew) { return (Hand){crew, 0, 0, omp_get_thread_num(), omp_get_num_threads()}; }

static inline void relax(int spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (spins % SPINS == SPINS - 1) sched_yield();
}

// The next piece of a phase of so many: `for (int64_t i; (i = next_piece(hand, pieces)) >= 0;)`. -1 when all pieces are done.
static int64_t next_piece(Hand *h, int64_t pieces) {
    Crew *c = h->crew;
    if (!pieces) return -1;
    if (h->holds && atomic_fetch_add(&c->done, 1) + 1 == pieces) {
        atomic_store(&c->done, 0);
        atomic_store(&c->ticket, (h->phase + 1) << PIECES_BITS);
    }
    h->holds = 0;
    for (int spins = 0;; spins++) {
        int64_t ticket = atomic_load(&c->ticket);
        if (ticket >> PIECES_BITS != h->phase) break;
        const int64_t piece = ticket & ((1 << PIECES_BITS) - 1);
        if (piece >= pieces) {
            relax(spins);
        } else if (atomic_compare_exchange_weak(&c->ticket, &ticket, ticket + 1)) {
            h->holds = 1;
            return piece;
        }
    }
    h->phase++;
    return -1;
}

#define EACH_PIECE(i, hand, pieces) for (int64_t i; (i = next_piece(hand, pieces)) >= 0;)

// How `total` things are divided: a large part for each thread first, then small ones, so that all end at about the same time.
// All parts but the last are multiples of `unit`.
typedef struct {
    int64_t total, unit, large, pieces, threads;
} Division;

static Division divided(const Hand *h, int64_t total, int64_t unit) {
    if (h->n == 1 || total <= unit) return (Division){total, unit, total, total > 0, 1};
    const int64_t units = (total + unit - 1) / unit, large = units * 3 / (4 * h->n), rest = units - large * h->n;
    const int64_t small = rest < 4 * h->n ? rest : 4 * h->n;
    return (Division){total, unit, large * unit, h->n + small, h->n};
}

static void part_of(const Division *d, int64_t i, int64_t *from, int64_t *to) {
    if (d->pieces == 1) {
        *from = 0, *to = d->total;
        return;
    }
    const int64_t first = d->large * d->threads, units = (d->total - first + d->unit - 1) / d->unit, small = d->pieces - d->threads;
    const int64_t j = i - d->threads;
    *from = j < 0 ? i * d->large : first + units * j / small * d->unit;
    *to = j < 0 ? (i + 1) * d->large : first + units * (j + 1) / small * d->unit;
    if (*to > d->total) *to = d->total;
}
