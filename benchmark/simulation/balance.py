"""What each way of balancing loses to ranks that wait for each other, simulated for 8 to 256 ranks.

    python benchmark/simulation/balance.py [--ranks 8 64 256]

The costs are those of a large mixture-of-experts model on GPUs, roughly: a step reads the experts' weights (15 ms), a
prompt token takes 0.1 ms and a decoded row 0.05 ms. Requests come at random, as many per rank whatever their number;
their prompts (median 600 tokens, one of 32 common beginnings of 400) and answers (median 200) are log-normal. Prints a
table and one JSON line.
"""

import argparse
import json
import time

from simulator import CostModel, Result, Settings, Simulation, percentile, workload

from nibble.scheduler.prefill_delayer import DelayLimits

COST = CostModel(step=15.0, prefill_token=0.1, decode_row=0.05, gather=0.3, gather_row=0.0002)
METHODS = ("round_robin", "total_requests", "total_tokens")


def simulate(ranks: int, method: str, delay: DelayLimits | None, args: argparse.Namespace) -> Result:
    arrivals = workload(
        seed=1,
        count=ranks * args.requests_per_rank,
        arrivals_per_second=ranks * args.rate,
        prompt_tokens=600,
        new_tokens=200,
        num_prefixes=32,
        prefix_tokens=400,
    )
    return Simulation(Settings(ranks, method, delay), COST, arrivals).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--requests-per-rank", type=int, default=40)
    parser.add_argument("--max-delay-ms", type=float, default=200.0, help="of prefill that is held back")
    parser.add_argument("--rate", type=float, default=0.5, help="requests per second and rank")
    args = parser.parse_args()
    print(
        f"{'ranks':>5} {'method':>14} {'hold back':>9} {'waiting':>8} {'tok/s/rank':>10} {'TTFT p50':>9} {'p99':>7} "
        f"{'ITL p50':>8} {'p99':>6}  (ms)"
    )
    results = []
    for ranks in args.ranks:
        for method in args.methods:
            for name, delay in (("off", None), ("on", DelayLimits(30, args.max_delay_ms))):
                began = time.perf_counter()
                result = simulate(ranks, method, delay, args)
                figures = {
                    "waiting_share": result.waiting_share,
                    "tokens_per_second_per_rank": result.tokens_per_second / ranks,
                    "ttft_p50": percentile(result.first_token, 50),
                    "ttft_p99": percentile(result.first_token, 99),
                    "itl_p50": percentile(result.inter_token, 50),
                    "itl_p99": percentile(result.inter_token, 99),
                }
                results.append({"ranks": ranks, "method": method, "hold_back": name, **figures})
                share, rate, *times = figures.values()
                print(
                    f"{ranks:>5} {method:>14} {name:>9} {share:>8.1%} {rate:>10.1f} "
                    f"{times[0]:>9.0f} {times[1]:>7.0f} {times[2]:>8.1f} {times[3]:>6.0f}"
                    f"   ({time.perf_counter() - began:.0f} s)",
                    flush=True,
                )
    print(json.dumps({"benchmark": "simulated_balance", "results": results}))


if __name__ == "__main__":
    main()
