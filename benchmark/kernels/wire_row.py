"""Times packing and unpacking of wire rows on a GPU.

    python benchmark/kernels/wire_row.py [--hidden-size 7168] [--top-k 8] [--rows 1 8 64 512 4096 16384 65536]

Prints a table, then one JSON line. Each figure is the median over replays of a CUDA graph with calls over inputs and
outputs that together exceed the L2 cache. "share" is bytes read and written per second, in percent of what a large
device-to-device copy reaches; "torch" is an elementwise kernel of torch that reads and writes as many bytes.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nibble.kernels.torch.wire_row import WireRowLayout
from nibble.kernels.triton.wire_row import quantize_pack, unpack

MEASUREMENTS = 15
ROTATED_BYTES = 2**29
LARGE_COPY_BYTES = 2**31

Call = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=7168)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 512, 4096, 16384, 65536])
    args = parser.parse_args()
    layout = WireRowLayout(args.hidden_size, args.top_k)
    copy_bandwidth = measure_copy_bandwidth()
    device = torch.cuda.get_device_name()
    print(f"{device}, H {args.hidden_size}, K {args.top_k}; a large copy moves {copy_bandwidth / 1e9:.0f} GB/s")
    print(f"{'':24}{'rows':>8}{'us':>10}{'GB/s':>10}{'share %':>10}{'torch us':>10}")
    results = []
    for rows in args.rows:
        for name, num_bytes, calls in cases(rows, layout):
            seconds = time_calls(calls)
            torch_seconds = time_calls([elementwise_call(num_bytes // 2) for _ in calls])
            share = num_bytes / seconds / copy_bandwidth
            result = {"kernel": name, "rows": rows, "us": seconds * 1e6, "gb_per_s": num_bytes / seconds / 1e9}
            results.append(result | {"share_of_copy": share, "torch_us": torch_seconds * 1e6})
            print(
                f"{name:24}{rows:8}{seconds * 1e6:10.2f}{num_bytes / seconds / 1e9:10.0f}"
                f"{100 * share:10.1f}{torch_seconds * 1e6:10.2f}"
            )
    shape = {"hidden_size": args.hidden_size, "top_k": args.top_k, "row_bytes": layout.row_bytes}
    record = {"benchmark": "wire_row", "device": device, **shape, "copy_gb_per_s": copy_bandwidth / 1e9}
    print(json.dumps(record | {"results": results}))


def cases(rows: int, layout: WireRowLayout) -> list[tuple[str, int, list[Call]]]:
    """Name, bytes read and written, and calls on different inputs of each kernel."""
    packed_bytes = rows * layout.row_bytes
    input_bytes = rows * (2 * layout.hidden_size + 8 * layout.top_k)
    copies = max(1, min(64, ROTATED_BYTES // (packed_bytes + input_bytes)))
    inputs = [random_inputs(rows, layout) for _ in range(copies)]
    packed = [quantize_pack(*arguments) for arguments in inputs]
    return [
        ("quantize_pack", input_bytes + packed_bytes, [partial(quantize_pack, *arguments) for arguments in inputs]),
        ("unpack", 2 * packed_bytes, [partial(unpack, buffer, layout) for buffer in packed]),
        ("unpack swizzled", 2 * packed_bytes, [partial(unpack, buffer, layout, swizzled=True) for buffer in packed]),
    ]


def random_inputs(rows: int, layout: WireRowLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(rows, layout.hidden_size, dtype=torch.bfloat16, device="cuda")
    topk_ids = torch.randint(0, 256, (rows, layout.top_k), dtype=torch.int32, device="cuda")
    return x, topk_ids, torch.rand(rows, layout.top_k, device="cuda"), torch.tensor(6 / 2688, device="cuda")


def elementwise_call(num_bytes: int) -> Call:
    source, target = (torch.ones(num_bytes // 4, dtype=torch.int32, device="cuda") for _ in range(2))
    return partial(torch.bitwise_not, source, out=target)


def measure_copy_bandwidth() -> float:
    """Bytes read and written per second, outside of graphs: in a graph, copies go through slower copy engines."""
    source, target = (torch.ones(LARGE_COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * LARGE_COPY_BYTES / median_seconds(partial(target.copy_, source))


def time_calls(calls: list[Call]) -> float:
    """Median seconds of one call, in a CUDA graph that makes every call once and keeps all results apart."""
    calls[0]()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    seconds = median_seconds(graph.replay) / len(calls)
    del results
    return seconds


def median_seconds(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    for _ in range(3 + MEASUREMENTS):
        start.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds[3:])


if __name__ == "__main__":
    main()
