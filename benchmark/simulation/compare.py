"""The simulation's prediction beside the engine itself, on CPU ranks.

    python benchmark/simulation/compare.py [--ranks 2 4]

The costs of a step are measured on each engine first, with equal work on all ranks and with all of it on one: a row
costs its own rank something, and all ranks something, because its experts are everywhere. Then a burst of requests of
very different lengths runs on the engine and in the simulation, with each method of balancing. Other work on the
machine spoils it. Prints a table of seconds until the last one has ended, and one JSON line.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import time
from collections.abc import Sequence

from simulator import Arrival, CostModel, Settings, Simulation

import nibble

METHODS = ("round_robin", "total_requests", "total_tokens")
CHUNK = 256
MAX_RUNNING = 64
REPEATS = 3


def start(model: str, ranks: int, method: str) -> nibble.Engine:
    return nibble.Engine(
        model_path=model,
        tp_size=ranks,
        dp_size=ranks,
        ep_size=ranks,
        enable_dp_attention=True,
        enable_flashinfer_cutlass_moe=True,
        load_balance_method=method,
        chunked_prefill_size=CHUNK,
        max_running_requests=MAX_RUNNING,
        disable_prefill_delayer=True,
        log_level="warning",
    )


def tokens(count: int, vocab_size: int) -> list[int]:
    return [random.randrange(3, vocab_size) for _ in range(count)]


def seconds(engine: nibble.Engine, counts: Sequence[int], prompt_tokens: int, new_tokens: int) -> float:
    """The fastest run of `counts[rank]` equal requests on each rank."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}

    async def run() -> None:
        requests = [
            engine.async_generate(
                input_ids=tokens(prompt_tokens, engine.config.model.vocab_size),
                sampling_params=sampling,
                data_parallel_rank=rank,
            )
            for rank, count in enumerate(counts)
            for _ in range(count)
        ]
        await asyncio.gather(*requests)

    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        asyncio.run(run())
        times.append(time.perf_counter() - began)
    return min(times[1:])


def calibrate(engine: nibble.Engine, ranks: int) -> CostModel:
    """Milliseconds per row, on its own rank and on all; see `CostModel`."""
    share = max(1.0, ranks / (os.cpu_count() or 1))  # how much longer a rank's own part takes when all are busy
    even, alone = [1] * ranks, [ranks] + [0] * (ranks - 1)

    def per_token(counts: Sequence[int]) -> float:
        """Of the prompts of one rank that has some."""
        return (seconds(engine, [8 * c for c in counts], CHUNK, 1)) * 1000 / (8 * max(counts) * CHUNK)

    # even: own * share + ranks * everywhere; alone: own + everywhere
    prefill_even, prefill_alone = per_token(even), per_token(alone)
    everywhere = max(0.0, (prefill_even - share * prefill_alone) / (ranks - share)) if ranks > share else 0.0
    steps = 100

    def per_step(requests: int) -> float:
        long, short = (seconds(engine, [requests] * ranks, 8, n) for n in (steps + 20, 20))
        return (long - short) * 1000 / steps

    few, many = per_step(4), per_step(32)
    row = (many - few) / 28
    return CostModel(
        step=max(0.0, few - 4 * row) / share,
        prefill_token=max(0.0, prefill_alone - everywhere),
        decode_row=max(0.0, row - ranks * everywhere) / share,
        gather_row=everywhere,
        cores=os.cpu_count(),
    )


def burst(count: int, vocab_size: int) -> list[Arrival]:
    generator = random.Random(3)
    return [
        Arrival(
            0.0,
            tokens(min(800, max(1, int(generator.lognormvariate(0, 1.0) * 120))), vocab_size),
            min(600, max(1, int(generator.lognormvariate(0, 1.0) * 60))),
        )
        for _ in range(count)
    ]


def measure(engine: nibble.Engine, arrivals: Sequence[Arrival]) -> float:
    times = []
    for _ in range(REPEATS):
        engine.flush_cache()
        began = time.perf_counter()
        engine.generate(
            input_ids=[arrival.input_ids for arrival in arrivals],
            sampling_params=[
                {"temperature": 0, "max_new_tokens": arrival.new_tokens, "ignore_eos": True} for arrival in arrivals
            ],
        )
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default="assets/nibble-demo-6m-nvfp4")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--requests", type=int, default=96)
    args = parser.parse_args()
    print(f"{'ranks':>5} {'method':>14} {'measured':>9} {'predicted':>9} {'error':>6}   seconds")
    results = []
    for ranks in args.ranks:
        for method in METHODS:
            with start(args.model_path, ranks, method) as engine:
                cost = calibrate(engine, ranks)  # each time: other work on the machine comes and goes
                arrivals = burst(args.requests, engine.config.model.vocab_size)
                measured = measure(engine, arrivals)
            settings = Settings(ranks, method, None, CHUNK, MAX_RUNNING)
            predicted = Simulation(settings, cost, arrivals).run(to_the_end=True).elapsed / 1000
            results.append({"ranks": ranks, "method": method, "measured": measured, "predicted": predicted})
            error = predicted / measured - 1
            print(f"{ranks:>5} {method:>14} {measured:>9.2f} {predicted:>9.2f} {error:>6.0%}", flush=True)
    print(json.dumps({"benchmark": "simulation", "machine": platform.machine(), "results": results}))


if __name__ == "__main__":
    main()
