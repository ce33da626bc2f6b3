"""What it gains on a GPU to prepare the next step while this one runs: tokens per second with overlap and without.

    python benchmark/overlap.py --model-path assets/nibble-demo-6m-nvfp4 --ranks 1 --requests 1 16 128

Requests and rates are those of offline.py; `ms` is the time between two tokens of a request. Prints a table and one
line of JSON. A smaller model gains more: its steps take the GPU less time, the host as much as any other's.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from offline import measure_engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, default=Path("assets/nibble-demo-6m-nvfp4"))
    parser.add_argument("--tokenizer-path", help="for a folder that has none, with --load-format dummy")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16, 128], help="at once, over all ranks")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    flags: dict[str, Any] = {
        "device": "cuda",
        "load_format": args.load_format,
        "tokenizer_path": args.tokenizer_path,
        "context_length": 512,
        "cuda_graph_max_bs": -(-max(args.requests) // args.ranks),
    }
    sizes = args.model_path, args.ranks, args.new_tokens, args.repeats, args.requests
    rates = {off: measure_engine(*sizes, disable_overlap_schedule=off, **flags) for off in (True, False)}
    report(args, rates[True], rates[False])


def report(args: argparse.Namespace, waiting: dict[int, float], overlapping: dict[int, float]) -> None:
    """Tokens per second of each number of requests."""
    print(f"{'requests':>8} {'overlap off':>12} {'ms':>7} {'on':>9} {'ms':>7} {'gain':>7}")
    for count in args.requests:
        off, on = waiting[count], overlapping[count]
        print(
            f"{count:>8} {off:>12.0f} {count / off * 1e3:>7.2f} {on:>9.0f} {count / on * 1e3:>7.2f} {on / off:>6.2f}x"
        )
    described = {"benchmark": "overlap", "machine": torch.cuda.get_device_name(), "model": str(args.model_path)}
    print(json.dumps(described | {"ranks": args.ranks, "off": waiting, "on": overlapping}))


if __name__ == "__main__":
    main()
