"""Tokens that the device has sampled and the host does not know yet, as input of the next step."""

import torch


def future_token(slot: int) -> int:
    """Stands among the input ids of a step for the newest token of the request in a slot. Negative, as no token is."""
    return -1 - slot


class FutureTokens:
    """The newest token of the request in each slot, on the device."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.no_slot = num_slots
        """For rows whose token is not kept."""
        self._tokens = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)

    def store(self, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
        """`token_ids [R]` are the newest of the requests in `slots` int64 [R]; a failed row's -1 becomes token 0."""
        self._tokens[slots] = token_ids.clamp(min=0)

    def resolve(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`input_ids [T]` int64 with the tokens themselves in the place of what stands for them."""
        known = self._tokens[(-1 - input_ids).clamp(min=0)]
        return torch.where(input_ids < 0, known, input_ids)
