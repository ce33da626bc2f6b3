"""Where the tokens of decoding steps lie, in device memory that CUDA graphs read."""

import torch

from nibble.layers.attention.backend import DecodingPlaces
from nibble.utils.transfer import StagedTensor


class GraphPlacesMemory:
    """All graphs of a backend share it, so each is planned right before it is replayed."""

    def __init__(self, device: torch.device) -> None:
        self._staged = StagedTensor(0, torch.int32, device)

    def places(self, rows: int, max_pages: int) -> "GraphPlaces":
        """For `rows` sequences that have at most `max_pages` pages together. The largest must be asked for first."""
        size = _header_words(rows) + max_pages
        if self._staged.tensor.numel() < size:
            self._staged = StagedTensor(size, torch.int32, self._staged.tensor.device)
        return GraphPlaces(self._staged, rows)


class GraphPlaces:
    """The tensors of `DecodingPlaces` for B sequences, `slots` int64 and the others int32; a step takes one copy."""

    def __init__(self, staged: StagedTensor, rows: int) -> None:
        self._staged, self._rows = staged, rows
        slots, *others, pages = staged.tensor.split(_parts(rows, staged.tensor.numel()))
        self.slots = slots.view(torch.int64)
        self.seq_lens, self.last_lens, self.first_pages = others
        self.pages = pages

    def fill(self, places: DecodingPlaces) -> None:
        header, rows = _header_words(self._rows), self._rows
        values = self._staged.values
        values[: 2 * rows].view(places.slots.dtype)[:] = places.slots
        values[2 * rows : 3 * rows] = places.seq_lens
        values[3 * rows : 4 * rows] = places.last_lens
        values[4 * rows : header] = places.first_pages
        values[header : header + len(places.pages)] = places.pages
        self._staged.send(header + len(places.pages))


def _header_words(rows: int) -> int:
    return 5 * rows + 1


def _parts(rows: int, size: int) -> list[int]:
    """Words of int32: slots first, which are of 8 bytes and must be aligned."""
    return [2 * rows, rows, rows, rows + 1, size - _header_words(rows)]
