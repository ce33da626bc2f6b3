/* Where the ranks of one host meet: each rank announces its rounds on a board in shared memory, which its peers read,
 * and beside it lies what the rank brings. Linux (futex). Boards are zero at first; rounds begin at 1 and wrap around.
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
static void announce(Board *own, uint32_t round, const uint8_t *header) {
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

/* A group as one rank sees it: the segments of all ranks, each beginning with a board. */
typedef struct {
    char *const *segments;
    int64_t rank, num_ranks, spins, yields;
} Group;

/* Bytes of one rank's rows of one tensor: where they lie in its own tensor, in the gathered one and in the segment. */
typedef struct {
    int64_t tensor, in_rows, in_output, at, num_bytes;
} Copy;

/* Announces the round. Whether all peers have within the time that is spent looking, with the same header. */
int meet(const Group *group, uint32_t round, const uint8_t *header) {
    announce((Board *)group->segments[group->rank], round, header);
    for (int64_t peer = 0; peer < group->num_ranks; peer++) {
        Board *board = (Board *)group->segments[peer];
        if (peer == group->rank) continue;
        if (await_peer(board, round, (int)group->spins, (int)group->yields, 0) != 1) return 0;
        if (memcmp(board->headers[round & 1], header, HEADER_BYTES)) return 0;
    }
    return 1;
}

/* Takes the peers' parts of a gather from their segments. `copies` of rank r are those from first[r] to first[r + 1],
 * `half` is where the round's half begins. */
void take_rows(const Group *group, int64_t half, const Copy *copies, const int64_t *first, char *const *targets) {
    for (int64_t peer = 0; peer < group->num_ranks; peer++)
        for (int64_t i = first[peer]; peer != group->rank && i < first[peer + 1]; i++)
            memcpy(targets[copies[i].tensor] + copies[i].in_output, group->segments[peer] + half + copies[i].at,
                   copies[i].num_bytes);
}

/* One round of a gather; if it returns 0, the caller sees to it that all peers have come, and takes the rows then. */
int gather(const Group *group, uint32_t round, const uint8_t *header, int64_t half, const Copy *copies,
           const int64_t *first, char *const *sources, char *const *targets) {
    for (int64_t i = first[group->rank]; i < first[group->rank + 1]; i++) {
        const char *rows = sources[copies[i].tensor] + copies[i].in_rows;
        memcpy(group->segments[group->rank] + half + copies[i].at, rows, copies[i].num_bytes);
        memcpy(targets[copies[i].tensor] + copies[i].in_output, rows, copies[i].num_bytes);
    }
    if (!meet(group, round, header)) return 0;
    take_rows(group, half, copies, first, targets);
    return 1;
}
