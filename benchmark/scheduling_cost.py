"""What scheduling costs one rank per step: it grows with the running batch, and neither with the queue nor the cache.

    python benchmark/scheduling_cost.py

Everything but the model runs: the plan, KV pages, the forward batch, booking the sampled tokens. Every step decodes all
running requests; while requests wait, one ends and another is admitted in every fourth step. Prints a table in
microseconds (median and 99th percentile), then one JSON line.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass

from nibble.ipc.messages import NewRequest
from nibble.sampling_params import SamplingParams
from nibble.scheduler.event_loop import make_forward_batch
from nibble.scheduler.request import Request
from nibble.scheduler.scheduler import Scheduler, SchedulerLimits

PAGE_SIZE = 16
PROMPT = 100
CACHED_PROMPT = 1000
STEPS_PER_ARRIVAL = 4
NO_EOS: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Case:
    running: int
    waiting: int
    cached_tokens: int
    policy: str = "fcfs"


CASES = [
    *(Case(running, 0, 0) for running in (16, 64, 256, 1024, 4096)),
    *(Case(256, waiting, 0) for waiting in (1000, 100_000)),
    *(Case(256, waiting, 0, "lpm") for waiting in (1000, 100_000)),
    *(Case(256, 1000, cached) for cached in (100_000, 10_000_000)),
    Case(256, 100_000, 10_000_000, "lpm"),
]


def request(number: int, prompt_tokens: int, max_new_tokens: int) -> Request:
    tokens = [number % 50_000, number // 50_000, *range(prompt_tokens - 2)]
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    return Request(NewRequest(number, str(number), tokens, sampling, 0, False, 0, 1, 0))


class Bench:
    def __init__(self, case: Case, steps: int) -> None:
        self.numbers = iter(range(10**9))
        pages = case.cached_tokens // PAGE_SIZE + 2 * (case.running + 1) * (PROMPT + steps) // PAGE_SIZE
        limits = SchedulerLimits(PAGE_SIZE, 8192, case.running, 10**9, NO_EOS, policy=case.policy)
        self.scheduler = Scheduler(limits, pages)
        while self.scheduler.kv.cache.num_pages * PAGE_SIZE < case.cached_tokens:
            self.add(CACHED_PROMPT, 1)
            self.step()
        for _ in range(case.running):
            self.add(PROMPT, 10**6)
        while len(self.scheduler.running) < case.running or any(r.num_remaining > 1 for r in self.scheduler.running):
            self.step()
        for _ in range(case.waiting):
            self.add(PROMPT, 10**6)

    def add(self, prompt_tokens: int, max_new_tokens: int) -> None:
        self.scheduler.add(request(next(self.numbers), prompt_tokens, max_new_tokens))

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        step = self.scheduler.schedule()
        assert step is not None, "every step has been finished"
        make_forward_batch(step, is_scored=False)
        self.scheduler.begin_step(step)
        self.scheduler.finish_step(step, [7] * sum(entry.samples for entry in step))
        return time.perf_counter() - start


def measure(case: Case, steps: int) -> dict[str, float]:
    bench = Bench(case, steps)
    gc.collect()
    gc.freeze()  # as a rank does
    seconds = []
    for number in range(steps):
        if case.waiting and number % STEPS_PER_ARRIVAL == 0:
            bench.scheduler.abort(bench.scheduler.running[0].request_id)
            bench.add(PROMPT, 10**6)
        seconds.append(bench.step())
    gc.unfreeze()
    micros = sorted(second * 1e6 for second in seconds)
    return {"median": statistics.median(micros), "p99": micros[int(len(micros) * 0.99)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="steps measured in each case")
    args = parser.parse_args()
    print(f"{'running':>8} {'waiting':>8} {'cached tokens':>14} {'policy':>7} {'median us':>10} {'p99 us':>8}")
    results = []
    for case in CASES:
        found = measure(case, args.steps)
        results.append({**asdict(case), **found})
        print(
            f"{case.running:>8} {case.waiting:>8} {case.cached_tokens:>14} {case.policy:>7} "
            f"{found['median']:>10.0f} {found['p99']:>8.0f}",
            flush=True,
        )
    print(json.dumps({"benchmark": "scheduling_cost", "machine": platform.processor(), "results": results}))


if __name__ == "__main__":
    main()
