"""Faults on demand, for tests of what the server promises. Without the environment variable there are none.

NIBBLE_TEST_FAULTS is a comma-separated list of
    nan=TOKEN     the embedding of a token is NaN, and so is all that the model makes of it
    hang=TOKEN    the rank never comes back from a step with that token
    exit=TOKEN    the rank's process ends with exit code 0
    stuck=STAGE   the rank never leaves that stage of its start
"""

import logging
import os
import time
from typing import Any

import torch

logger = logging.getLogger(__name__)

_VARIABLE = "NIBBLE_TEST_FAULTS"


class FaultInjection:
    def __init__(self, faults: dict[str, str]) -> None:
        self._faults = faults

    @classmethod
    def from_environment(cls) -> "FaultInjection":
        entries = [entry.partition("=") for entry in os.environ.get(_VARIABLE, "").split(",") if entry]
        if entries:
            logger.warning("%s is set: this rank will fail on purpose", _VARIABLE)
        return cls({kind: value for kind, _, value in entries})

    def at_stage(self, stage: str) -> None:
        if self._faults.get("stuck") == stage:
            _hang()

    def install(self, model: Any) -> None:
        """Makes the model's embedding fail for the tokens that are named."""
        if self._faults.keys() & {"nan", "hang", "exit"}:
            model.embed_tokens = _FaultyEmbedding(model.embed_tokens, self._faults)


class _FaultyEmbedding:
    def __init__(self, embedding: Any, faults: dict[str, str]) -> None:
        self._embedding = embedding
        self._tokens = {kind: int(token) for kind, token in faults.items() if kind != "stuck"}

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        present = set(ids.tolist())
        if self._tokens.get("hang") in present:
            _hang()
        if self._tokens.get("exit") in present:
            os._exit(0)
        hidden: torch.Tensor = self._embedding(ids)
        if self._tokens.get("nan") in present:
            hidden[ids == self._tokens["nan"]] = float("nan")
        return hidden


def _hang() -> None:
    while True:
        time.sleep(1)
