"""The memory of the paged KV cache."""

from collections.abc import Iterable

import torch

from nibble.config.model_config import ModelConfig
from nibble.utils.transfer import to_device


class KvCachePool:
    """Keys and values of all layers, `[num_pages + 1, page_size, kv_heads, head_dim]` each.

    Latent attention (MLA) has one key head, whose row is a token's latent vector and behind it the rotated key; the
    values are the latent vectors, so `values` are views of `keys` and a token takes one row a layer.

    A token's slot is `page * page_size + offset`. Pages start as zeros and always hold finite numbers: attention
    multiplies masked slots by zero, and zero times NaN would reach whoever uses the page next.

    Behind them lies one more, `padding_page`, which no request gets: there the padding rows of CUDA graphs write.
    """

    def __init__(
        self, model: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        heads, size = (1, model.mla.cached_size) if model.mla else (model.num_kv_heads, model.head_dim)
        shape = (num_pages + 1, page_size, heads, size)
        self.num_pages, self.page_size, self.device = num_pages, page_size, device
        self.padding_page = num_pages
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(model.num_layers)]
        self.values_are_in_keys = model.mla is not None
        if model.mla:
            self.values = [keys[..., : model.mla.kv_lora_rank] for keys in self.keys]
        else:
            self.values = [torch.zeros_like(keys) for keys in self.keys]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the cache consists of."""
        return self.keys if self.values_are_in_keys else [*self.keys, *self.values]

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores `[T, kv_heads, head_dim]` at `slots [T]`, rounded to the cache's type and saturated where it has no
        infinity. Of MLA `values` are not looked at.
        """
        _store(self.keys[layer], slots, keys)
        if not self.values_are_in_keys:
            _store(self.values[layer], slots, values)

    def clear(self, pages: Iterable[int]) -> None:
        """Zeroes pages that may hold NaN."""
        index = to_device(list(pages), self.device)
        for tensor in self.tensors:
            _plain(tensor).index_fill_(0, index, 0)


def gather_pages(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """The pages `[P]` of one layer's keys or values, `[P, page_size, kv_heads, head_dim]`."""
    return _plain(cache).index_select(0, pages).view(cache.dtype)


def _store(cache: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    if cache.dtype == torch.float8_e4m3fn:
        largest = torch.finfo(cache.dtype).max
        rows = rows.clamp(-largest, largest)
    _plain(cache).flatten(0, 1).index_copy_(0, slots, _plain(rows.to(cache.dtype)))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """FP8 as bytes: torch does not index FP8 everywhere."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
