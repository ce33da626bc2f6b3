"""How far sums of the experts' results are from those in fp64, by the type in which the results travel. No GPU needed.

    python benchmark/comm/combine_accuracy.py [--ranks 8] [--hosts 2] [--rows 512]

Random results with DeepSeek-R1's dimensions: of each token 8 of 256 experts, an equal share of them on each rank, give
normally distributed values times a weight, and columns differ in size by a log-normal factor. Errors are relative, of
whole rows: |sum - truth| / |truth|, the mean over rows. "chain" adds bf16 numbers one after the other, as a ring of
collectives may; the others add in fp32 and round once, to bf16. "by host": each of several hosts rounds its sum before.
"""

import argparse

import torch
from torch import Tensor

from nibble.kernels.torch.fp8_row import dequantize_fp8_rows, quantize_fp8_rows, sum_fp8_rows

HIDDEN_SIZE, TOP_K, NUM_EXPERTS = 7168, 8, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--rows", type=int, default=512)
    args = parser.parse_args()
    partials = random_partials(args.ranks, args.rows)
    truth = partials.double().sum(0)
    chain = partials[0].bfloat16()
    for partial in partials[1:].bfloat16():
        chain = chain + partial
    fp8_rows = quantize_fp8_rows(partials.bfloat16().flatten(0, 1))
    sums = {
        "bf16, chain": chain,
        "bf16": partials.bfloat16().float().sum(0).bfloat16(),
        "bf16, by host": sum_by_host(partials.bfloat16().float(), args.hosts),
        "fp8": sum_fp8_rows(fp8_rows, args.ranks, HIDDEN_SIZE, torch.bfloat16),
        "fp8, by host": sum_by_host(dequantize_fp8_rows(fp8_rows, HIDDEN_SIZE).view_as(partials), args.hosts),
    }
    for name, result in sums.items():
        error = ((result.double() - truth).norm(dim=1) / truth.norm(dim=1)).mean()
        print(f"{name:13} {float(error):.2e}")


def sum_by_host(partials: Tensor, num_hosts: int) -> Tensor:
    """fp32 [W, T, H] to bf16 [T, H], of which each host rounds its ranks' sum."""
    of_hosts = [of_host.sum(0).bfloat16().float() for of_host in partials.chunk(num_hosts)]
    return torch.stack(of_hosts).sum(0).bfloat16()


def random_partials(num_ranks: int, num_rows: int) -> Tensor:
    """fp32 [W, T, H]; zeros where a rank has none of a row's experts."""
    torch.manual_seed(0)
    column_sizes = torch.randn(HIDDEN_SIZE).exp()
    experts = torch.rand(num_rows, NUM_EXPERTS).topk(TOP_K).indices  # [T, K]
    weights = torch.rand(num_rows, TOP_K).softmax(1)
    partials = torch.zeros(num_ranks, num_rows, HIDDEN_SIZE)
    for slot in range(TOP_K):
        results = torch.randn(num_rows, HIDDEN_SIZE) * column_sizes * weights[:, slot, None]
        partials[experts[:, slot] * num_ranks // NUM_EXPERTS, torch.arange(num_rows)] += results
    return partials


if __name__ == "__main__":
    main()
