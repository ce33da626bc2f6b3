/* Where the ranks of one host meet: each rank announces its rounds on a board in shared memory, which its peers read.
 * Linux (futex). Boards are zero at first; rounds begin at 1 and wrap around.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define HEADER_BYTES 16

/* A peer can be one round ahead, so the headers of two rounds are kept. */
typedef struct {
    _Alignas(64) _Atomic uint32_t round;
    _Atomic uint32_t sleepers;
    _Atomic uint32_t has_failed;
    _Alignas(64) uint8_t headers[2][HEADER_BYTES];
} Board;

_Static_assert(sizeof(Board) == 128, "BOARD_BYTES in shared_memory.py");

/* Publishes everything that this rank wrote before. */
void announce(Board *own, uint32_t round, const uint8_t *header) {
    memcpy(own->headers[round & 1], header, HEADER_BYTES);
    atomic_store(&own->round, round);
    if (atomic_load(&own->sleepers)) syscall(SYS_futex, &own->round, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

/* Whoever waits for this rank waits in vain, and what it announced last is void. */
void fail(Board *own) {
    atomic_store(&own->has_failed, 1);
    syscall(SYS_futex, &own->round, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

static int state(Board *peer, uint32_t round) {
    if (atomic_load_explicit(&peer->has_failed, memory_order_acquire)) return -1;
    return (int32_t)(atomic_load_explicit(&peer->round, memory_order_acquire) - round) >= 0;
}

/* 1 if the peer has announced `round`, -1 if it has failed, otherwise 0. Looks `spins` times keeping the core, `yields` times yielding it, then
 * sleeps for at most `milliseconds`. What the peer wrote before is visible after. */
int await_peer(Board *peer, uint32_t round, int spins, int yields, int milliseconds) {
    for (int look = 0; look < spins + yields; look++) {
        if (state(peer, round)) return state(peer, round);
        if (look >= spins) sched_yield();
#ifdef __x86_64__
        else __builtin_ia32_pause();
#endif
    }
    const struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000L};
    atomic_fetch_add(&peer->sleepers, 1);
    uint32_t seen = atomic_load(&peer->round);
    if (milliseconds && !state(peer, round))
        syscall(SYS_futex, &peer->round, FUTEX_WAIT, seen, &time, NULL, 0);
    atomic_fetch_sub(&peer->sleepers, 1);
    return state(peer, round);
}
