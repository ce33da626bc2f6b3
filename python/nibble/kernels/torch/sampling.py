"""Random numbers and filters for sampling; each row depends on nothing but itself."""

import torch

# Odd 64-bit constants of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014),
# written as signed integers because torch has no unsigned 64-bit arithmetic.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row of `logits [R, V]`, int64 `[R]`; -1 for a row with a NaN or an infinity."""
    lowest, highest = logits.aminmax(dim=-1)  # NaN where a row has one
    return torch.where(lowest.isfinite() & highest.isfinite(), logits.argmax(dim=-1), -1)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(seeds: torch.Tensor, positions: torch.Tensor, columns: int) -> torch.Tensor:
    """Float64 in (0, 1), `[R, columns]`: a function of (seed, position, column) alone.

    `seeds` and `positions` are int64 `[R]`.
    """
    state = _mix(_mix(seeds + _GOLDEN_GAMMA) + positions * _GOLDEN_GAMMA)
    counters = torch.arange(1, columns + 1, device=seeds.device) * _GOLDEN_GAMMA
    bits = _shift_right(_mix(state[:, None] + counters), 11)  # 53 random bits
    return (bits.double() + 0.5) * 2.0**-53


def gumbel_argmax(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One token per row `[R]`, drawn from softmax(`logits [R, V]`) by the Gumbel-max method."""
    noise = -torch.log(-torch.log(uniform(seeds, positions, logits.shape[1])))
    return (logits + noise).argmax(dim=-1)


def filter_logits(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Sets to -inf every token outside top-k, the nucleus top-p (Holtzman et al., arXiv:1904.09751) or min-p.

    `logits [R, V]`; top_k int64, top_p and min_p floating point, `[R]` each. The likeliest token always stays.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of likelier tokens
    rank = torch.arange(logits.shape[1], device=logits.device)
    drop = (rank >= top_k[:, None]) | (before >= top_p[:, None])
    drop |= probabilities < min_p[:, None] * probabilities[:, :1]
    drop[:, 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))
