"""The memory of the paged KV cache."""

from collections.abc import Iterable

import torch

from nibble.config.model_config import ModelConfig


class KvCachePool:
    """Keys and values of all layers, `[num_pages + 1, page_size, kv_heads, head_dim]` each.

    A token's slot is `page * page_size + offset`. Pages start as zeros and always hold finite numbers: attention
    multiplies masked slots by zero, and zero times NaN would reach whoever uses the page next.

    Behind them lies one more, `padding_page`, which no request gets: there the padding rows of CUDA graphs write.
    """

    def __init__(
        self, model: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_pages + 1, page_size, model.num_kv_heads, model.head_dim)
        self.num_pages, self.page_size, self.device = num_pages, page_size, device
        self.padding_page = num_pages
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(model.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(model.num_layers)]

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores `[T, kv_heads, head_dim]` at `slots [T]`, rounded to the cache's type."""
        for cache, new in ((self.keys[layer], keys), (self.values[layer], values)):
            cache.flatten(0, 1).index_copy_(0, slots, new.to(cache.dtype))

    def clear(self, pages: Iterable[int]) -> None:
        """Zeroes pages that may hold NaN."""
        index = torch.tensor(list(pages), dtype=torch.int64, device=self.device)
        for tensor in (*self.keys, *self.values):
            tensor.index_fill_(0, index, 0)
