"""The small kernels of a layer against torch in fp64, for the interpreter and for the GPU."""

import torch

from nibble.kernels.torch import latent as latent_reference
from nibble.kernels.torch import norm as reference
from nibble.kernels.torch import topk as topk_reference
from nibble.kernels.triton.kv_cache import store_kv
from nibble.kernels.triton.latent import rope_latent
from nibble.kernels.triton.norm import qk_norm_rope
from nibble.kernels.triton.topk import grouped_topk, topk_softmax

BF16_ROUNDING = {"cuda": 2.0**-8, "cpu": 2.0**-7}
"""The interpreter cuts off what does not fit."""


def check_qk_norm_rope(rows: int, heads: int, kv_heads: int, size: int, device: str = "cpu") -> None:
    """Of parts of one tensor, as the qkv projection gives them."""
    generator = torch.Generator().manual_seed(rows + size)
    qkv = torch.randn(rows, heads + 2 * kv_heads, size, generator=generator).bfloat16().to(device)
    q, k, _ = qkv.split([heads, kv_heads, kv_heads], dim=1)
    q_weight, k_weight = (torch.rand(2, size, generator=generator) + 0.5).bfloat16().to(device)
    angles = torch.rand(100, size // 2, generator=generator) * 6
    cos = torch.cat([angles.cos(), angles.cos()], dim=-1).bfloat16().to(device)
    signed_sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).bfloat16().to(device)
    positions = torch.randint(0, 100, (rows,), generator=generator).to(device)
    before = qkv.clone()
    found = qk_norm_rope(q, k, q_weight, k_weight, 1e-6, positions, cos, signed_sin)
    expected = reference.qk_norm_rope(
        q.double(), k.double(), q_weight.double(), k_weight.double(), 1e-6, positions, cos.double(), signed_sin.double()
    )
    assert torch.equal(qkv, before)
    for result, exact in zip(found, expected, strict=True):
        assert result.dtype == torch.bfloat16 and result.is_contiguous()
        torch.testing.assert_close(result.double(), exact, rtol=BF16_ROUNDING[device], atol=1e-6)


def check_topk_softmax(rows: int, experts: int, top_k: int, renormalize: bool, device: str = "cpu") -> None:
    generator = torch.Generator().manual_seed(experts)
    # Every logit of a row differs, so that there is one right choice.
    order = torch.rand(rows, experts, generator=generator).argsort(dim=1)
    logits = (order * (8.0 / experts) - 4).to(device)
    ids, weights = topk_softmax(logits, top_k, renormalize)
    expected_ids, expected = topk_reference.topk_softmax(logits, top_k, renormalize)
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=2e-6, atol=1e-7)


def check_topk_softmax_of_equal_logits(device: str = "cpu") -> None:
    ids, weights = topk_softmax(torch.zeros(3, 24, device=device), 4, True)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    torch.testing.assert_close(weights, torch.full_like(weights, 0.25))


def check_grouped_topk(
    rows: int, shape: tuple[int, int, int, int], is_biased: bool, renormalize: bool, device: str = "cpu"
) -> None:
    """`shape` is experts, groups, chosen groups, chosen experts."""
    experts, n_group, topk_group, top_k = shape
    generator = torch.Generator().manual_seed(experts + rows)
    logits = torch.randn(rows, experts, generator=generator).to(device)
    bias = torch.randn(experts, generator=generator).to(device) if is_biased else None
    choice = (bias, top_k, n_group, topk_group, renormalize, 2.5)
    ids, weights = grouped_topk(logits, *choice)
    expected_ids, expected = topk_reference.grouped_topk(logits, *choice)
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=4e-6, atol=1e-7)


def check_grouped_topk_of_equal_logits(device: str = "cpu") -> None:
    bias = torch.zeros(16, device=device)
    ids, weights = grouped_topk(torch.zeros(2, 16, device=device), bias, 4, 8, 2, True, 1.0)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2
    torch.testing.assert_close(weights, torch.full_like(weights, 0.25))


def check_rope_latent(rows: int, heads: int, rank: int, size: int, interleaved: bool, device: str = "cpu") -> None:
    """Of strided parts, as the projections give them."""
    generator = torch.Generator().manual_seed(rows + size)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(device)

    q_latent = random(heads, rows, rank).transpose(0, 1)
    q_rope = random(rows, heads, 24 + size)[..., 24:]
    latent, k_rope = random(rows, 8 + rank + size)[:, 8:].split([rank, size], dim=1)
    angles = torch.rand(100, size // 2, generator=generator) * 6
    cos = torch.cat([angles.cos(), angles.cos()], dim=-1).bfloat16().to(device)
    signed_sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).bfloat16().to(device)
    positions = torch.randint(0, 100, (rows,), generator=generator).to(device)
    parts = (q_latent, q_rope, latent, k_rope)
    found = rope_latent(*parts, positions, cos, signed_sin, interleaved)
    exact = latent_reference.rope_latent(
        *(part.double() for part in parts), positions, cos.double(), signed_sin.double(), interleaved
    )
    for result, expected in zip(found, exact, strict=True):
        assert result.dtype == torch.bfloat16 and result.is_contiguous()
        assert torch.equal(result[..., :rank].double(), expected[..., :rank])
        torch.testing.assert_close(result.double(), expected, rtol=BF16_ROUNDING[device], atol=1e-6)


def check_store_kv(rows: int, heads: int, size: int, cache_dtype: torch.dtype, device: str = "cpu") -> None:
    """Slots that are not written keep what they held."""
    generator = torch.Generator().manual_seed(rows)
    qkv = torch.randn(rows, 3 * heads, size, generator=generator).bfloat16().to(device)
    _, k, v = qkv.split(heads, dim=1)
    keys, values = torch.randn(2, 5, 16, heads, size, generator=generator).to(cache_dtype).to(device)
    slots = torch.randperm(80, generator=generator)[:rows].to(device)
    expected = [cache.clone() for cache in (keys, values)]
    for cache, new in zip(expected, (k, v), strict=True):
        cache.flatten(0, 1)[slots] = new.to(cache_dtype)
    store_kv(k.contiguous(), v, slots, keys, values)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
