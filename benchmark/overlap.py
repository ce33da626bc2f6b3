"""What it gains on a GPU to prepare the next step while this one runs: tokens per second with overlap and without.

    python benchmark/overlap.py --model-path assets/nibble-demo-6m-nvfp4 --ranks 1 --requests 1 16 128

Requests are those of offline.py; `ms` is the time between two tokens of a request. Both engines run, in turn, and each
figure is the best of --repeats. Prints a table and one line of JSON. A smaller model gains more: its steps take the GPU
less time, the host as much as any other's.
"""

import argparse
import json
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from offline import prompts

import nibble

CONTEXT_LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, default=Path("assets/nibble-demo-6m-nvfp4"))
    parser.add_argument("--tokenizer-path", help="for a folder that has none, with --load-format dummy")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16, 128], help="at once, over all ranks")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with ExitStack() as stack:
        waiting, overlapping = (stack.enter_context(start(args, is_off)) for is_off in (True, False))
        rates = {count: best_rates([waiting, overlapping], count, args) for count in args.requests}
    report(args, rates)


def start(args: argparse.Namespace, disable_overlap_schedule: bool) -> nibble.Engine:
    requests_each = -(-max(args.requests) // args.ranks)
    return nibble.Engine(
        model_path=str(args.model_path),
        tokenizer_path=args.tokenizer_path,
        load_format=args.load_format,
        device="cuda",
        tp_size=args.ranks,
        dp_size=args.ranks,
        ep_size=args.ranks,
        enable_dp_attention=True,
        enable_flashinfer_cutlass_moe=True,
        disable_radix_cache=True,
        disable_overlap_schedule=disable_overlap_schedule,
        context_length=CONTEXT_LENGTH,
        max_total_tokens=requests_each * CONTEXT_LENGTH,
        max_running_requests=requests_each,
        cuda_graph_max_bs=requests_each,
        log_level="warning",
    )


def best_rates(engines: list[nibble.Engine], count: int, args: argparse.Namespace) -> list[float]:
    """Tokens per second of each engine, after a run that warms up."""
    batch = prompts(count, engines[0].config.model.vocab_size)
    sampling = {"temperature": 0, "max_new_tokens": args.new_tokens, "ignore_eos": True}
    seconds: list[list[float]] = [[] for _ in engines]
    for _ in range(1 + args.repeats):
        for engine, taken in zip(engines, seconds, strict=True):
            start = time.perf_counter()
            outputs = engine.generate(input_ids=batch, sampling_params=sampling)
            taken.append(time.perf_counter() - start)
            assert all(output["meta_info"]["completion_tokens"] == args.new_tokens for output in outputs)
    return [count * args.new_tokens / min(taken[1:]) for taken in seconds]


def report(args: argparse.Namespace, rates: dict[int, list[float]]) -> None:
    """Tokens per second without and with overlap, of each number of requests."""
    print(f"{'requests':>8} {'overlap off':>12} {'ms':>7} {'on':>9} {'ms':>7} {'gain':>7}")
    for count, (off, on) in rates.items():
        print(
            f"{count:>8} {off:>12.0f} {count / off * 1e3:>7.2f} {on:>9.0f} {count / on * 1e3:>7.2f} {on / off:>6.2f}x"
        )
    described = {"benchmark": "overlap", "machine": torch.cuda.get_device_name(), "model": str(args.model_path)}
    print(json.dumps(described | {"ranks": args.ranks, "tokens_per_second_off_and_on": rates}))


if __name__ == "__main__":
    main()
