"""How kernels of different ranks wait for each other in peer memory; docs/peer_memory.md has the argument.

Every rank has a segment that all ranks map. It begins with a header: one flag for each rank, which that rank raises,
then words of the owner and a table of the addresses of all segments, in rank order, as the owner maps them.

Flags hold the number of the newest round that a rank has entered and only grow, so nothing is ever reset. A round is
one meeting of all ranks. What a rank stored before it entered is seen by whoever waited for its flag.

A peer that does not come in time is reported, a bit a rank, in memory that the host reads at any time. The rank that
waited in vain tells all others, by a flag beyond all rounds that names the missing, and from then on meets nobody: its
kernels run to their end in its own segment.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

MAX_RANKS = 32

# Words of the header, int64. Peers write flags and marks, so the owner's words keep away from their cache lines.
FLAGS = 0
ROUND = 128  # that was met last
PATIENCE_NS = 129  # how long to wait for a peer
FAILURE_ADDRESS = 130  # of the word that reports
PEERS = 144
MARKS = 192
HEADER_BYTES = 4096

FAILED = 1 << 62  # a flag from here on: no round, but the ranks that did not come, a bit each

_LANES = tl.constexpr(MAX_RANKS)  # one a peer
_ROUND, _PATIENCE_NS, _FAILURE_ADDRESS = tl.constexpr(ROUND), tl.constexpr(PATIENCE_NS), tl.constexpr(FAILURE_ADDRESS)
_FAILED = tl.constexpr(FAILED)
_GRACE = tl.constexpr(10)  # a part of the patience
_ARRIVED = tl.constexpr(131)  # programs of the running kernel
_PEERS, _MARKS = tl.constexpr(PEERS), tl.constexpr(MARKS)


@triton.jit
def next_round(segment_ptr):
    """The number of the round that this kernel takes part in."""
    return tl.load(_words(segment_ptr) + _ROUND) + 1


@triton.jit
def enter_round(number, segment_ptr, rank, WORLD_SIZE: tl.constexpr):
    """Raises this rank's flag at every peer. Releases what this program has stored or has seen others store."""
    lane = tl.arange(0, _LANES)
    flag_ptr = _words(segment_of(lane, segment_ptr, WORLD_SIZE)) + rank
    numbers = tl.zeros([_LANES], tl.int64) + number
    tl.atomic_xchg(flag_ptr, numbers, mask=lane < WORLD_SIZE, sem="release", scope="sys")


@triton.jit
def wait_for_round(number, segment_ptr, rank, WORLD_SIZE: tl.constexpr):
    """Returns once every rank has entered the round, or one has failed; acquires what they released."""
    lane = tl.arange(0, _LANES)
    words_ptr = _words(segment_ptr)
    flag_ptr = words_ptr + tl.where(lane < WORLD_SIZE, lane, rank)
    patience_ns = tl.load(words_ptr + _PATIENCE_NS)
    begin = clock_ns(lane)
    flags = load_acquire(flag_ptr)
    # Warps may leave the loop apart, so nothing in it or in `_fail` crosses warps; what is stored is the first one's.
    waits = (flags < number).to(tl.int32)
    while tl.max(tl.where(flags >= _FAILED, 2, waits), axis=0) == 1:
        flags = load_acquire(flag_ptr)
        waits = ((flags < number) & (clock_ns(lane) - begin < patience_ns)).to(tl.int32)
    if tl.max(((flags < number) | (flags >= _FAILED)).to(tl.int32), axis=0) > 0 and patience_ns > 0:
        _fail(flags, number, segment_ptr, rank, patience_ns, WORLD_SIZE)
    tl.debug_barrier()  # each thread has looked at one flag, and may read what any rank wrote


@triton.jit
def _fail(flags, number, segment_ptr, rank, patience_ns, WORLD_SIZE: tl.constexpr):
    """Reports who is missing, to the host and to all ranks, and takes this rank out of the protocol.

    A rank that hears of it from another reports what that one does.
    """
    lane = tl.arange(0, _LANES)
    words_ptr = _words(segment_ptr)
    report = tl.max(flags, axis=0)
    if report < _FAILED:
        report = _FAILED + tl.sum(tl.where(flags < number, tl.full([_LANES], 1, tl.int64) << lane, 0), axis=0)
    tl.store(tl.load(words_ptr + _FAILURE_ADDRESS).to(tl.pointer_type(tl.int64)), report - _FAILED)
    tl.store(words_ptr + _PATIENCE_NS, 0)
    enter_round(report, segment_ptr, rank, WORLD_SIZE)
    # Whoever looked just before may still read this rank's results, which what follows on the stream overwrites.
    begin = clock_ns(lane)
    now = begin
    while tl.max((now - begin < patience_ns // _GRACE).to(tl.int32), axis=0) > 0:
        now = clock_ns(lane)
    own_address = tl.zeros([_LANES], tl.int64) + segment_ptr.to(tl.int64)
    tl.store(words_ptr + _PEERS + lane, own_address, mask=lane < WORLD_SIZE)


@triton.jit
def has_failed(segment_ptr):
    """Whether this rank meets nobody any more; then what it reads in the segments is worth nothing."""
    return tl.load(_words(segment_ptr) + _PATIENCE_NS) == 0


@triton.jit
def is_last_program(segment_ptr):
    """Whether all programs of the kernel have come here, this one last; then it has seen what they stored."""
    arrived_ptr = _words(segment_ptr) + _ARRIVED
    tl.debug_barrier()  # all threads of the program are done
    is_last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="sys") == tl.num_programs(0) - 1
    if is_last:
        tl.store(arrived_ptr, 0)
    return is_last


@triton.jit
def finish_round(number, segment_ptr):
    tl.store(_words(segment_ptr) + _ROUND, number)


@triton.jit
def meet(segment_ptr, rank, WORLD_SIZE: tl.constexpr):
    """A whole round by one program."""
    number = next_round(segment_ptr)
    enter_round(number, segment_ptr, rank, WORLD_SIZE)
    wait_for_round(number, segment_ptr, rank, WORLD_SIZE)
    finish_round(number, segment_ptr)


@triton.jit(do_not_specialize=["rank"])
def meet_kernel(segment_ptr, rank, WORLD_SIZE: tl.constexpr):
    """A round as a kernel of its own, of one program: what precedes it on the stream is released to all ranks."""
    meet(segment_ptr, rank, WORLD_SIZE)


@triton.jit(do_not_specialize=["rank"])
def mark_kernel(segment_ptr, rank, WORLD_SIZE: tl.constexpr):
    """Leaves a mark of this rank in every segment. One program, as the next one."""
    lane = tl.arange(0, _LANES)
    mark_ptr = _words(segment_of(lane, segment_ptr, WORLD_SIZE)) + (_MARKS + rank)
    tl.store(mark_ptr, tl.zeros([_LANES], tl.int64) + rank + 1, mask=lane < WORLD_SIZE)


@triton.jit
def read_marks_kernel(segment_ptr, found_ptr, WORLD_SIZE: tl.constexpr):
    """int64 [W, 2]: for each rank its mark in this rank's segment, and its mark in its own."""
    lane = tl.arange(0, _LANES)
    is_rank = lane < WORLD_SIZE
    here = tl.load(_words(segment_ptr) + _MARKS + lane, mask=is_rank)
    there = tl.load(_words(segment_of(lane, segment_ptr, WORLD_SIZE)) + _MARKS + lane, mask=is_rank)
    tl.store(found_ptr + lane * 2, here, mask=is_rank)
    tl.store(found_ptr + lane * 2 + 1, there, mask=is_rank)


@triton.jit
def segment_of(peer, segment_ptr, WORLD_SIZE: tl.constexpr):
    """The addresses of the segments of `peer`, one rank or several, int64; 0 for those that are none."""
    return tl.load(_words(segment_ptr) + _PEERS + peer, mask=peer < WORLD_SIZE, other=0)


@triton.jit
def load_acquire(ptr):
    """Loads int64 words, ordered before everything that follows, at the scope of the system."""
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.b64 $0, [$1];", "=l,l,~{memory}", [ptr], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def clock_ns(lane):
    """The time, once a lane: equal for a warp after a reduction, which a scalar would not be."""
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l,r", [lane], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def _words(segment):
    """A segment, by pointer or address, as words of its header."""
    return segment.to(tl.pointer_type(tl.int64))
