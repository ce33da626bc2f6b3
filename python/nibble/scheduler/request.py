"""A request as its rank sees it."""

from array import array

from nibble.generation import FinishReason, TokenLogprob
from nibble.ipc.messages import NewRequest
from nibble.kv_cache.radix_cache import Node
from nibble.model_executor.logprobs import LogprobsWanted
from nibble.model_executor.sampler import SamplingRow
from nibble.scheduler.prompt_scores import PromptScores
from nibble.structured_output.state import GrammarState


class Request:
    """Grows by one token a step. `token_ids` is the prompt and what was generated after it.

    The KV cache holds the first `num_computed` tokens, in `pages`, whose books `KvPages` keeps. What was generated and
    not reported yet lies in `unsent_ids` and `unsent_logprobs`.
    """

    def __init__(self, message: NewRequest, grammar: GrammarState | None = None) -> None:
        self.request_id = message.request_id
        self.log_fields = {"generation": message.request_id}
        if message.http_request_id is not None:
            self.log_fields["request_id"] = message.http_request_id
        self.sampling = message.sampling
        self.needs_last_token = message.sampling.has_penalties or message.sampling.grammar is not None
        """Whether its next token can't be sampled before the host knows the last one.

        The one place that says which requests step without overlap: penalties count the tokens there are, and a grammar
        allows what fits behind them.
        """
        self.update_interval = message.update_interval
        self.priority = message.priority
        self.arrival = 0
        """How many requests came to this rank before it."""
        self.precedence: float = message.priority
        """Among running requests, of which the last is the first to be retracted; infinite if it ran overdue."""
        self.unsent_ids: list[int] = []
        self.unsent_logprobs: list[TokenLogprob] = []
        self.prompt_length = len(message.input_ids)
        self.token_ids = list(message.input_ids)
        self.most_tokens = self.prompt_length + message.sampling.max_new_tokens
        """Of prompt and answer, if the context holds so many."""
        wanted = LogprobsWanted(message.top_logprobs_num, message.token_ids_logprob)
        self.sampling_row = SamplingRow(
            message.sampling,
            message.seed,
            self.token_ids,
            self.prompt_length,
            wanted if message.return_logprob else None,
            grammar,
        )
        """How the sampler sees this request, at every step."""
        self.slot = -1
        """Its place among the running requests of the rank, where the device keeps its newest token."""
        self.num_in_flight = 0
        """Steps that it takes part in and whose tokens are not known yet. Each that samples has put a placeholder
        behind `token_ids`, and all have been counted in `num_computed`.
        """
        self.has_ended = False
        self.has_told = False
        """Whether its first token has been sent."""
        self.prompt_scores = PromptScores(message.logprob_start_len, self.prompt_length, wanted)
        self.num_computed = 0
        self.pages = array("i")
        self.num_shared = 0
        """The first so many of `pages` belong to the prefix cache."""
        self.prefix: Node | None = None
        """Holds them there; None while the request waits."""
        self.reusable_tokens = b""
        """While it waits: the tokens that it would take from the prefix cache, encoded."""
        self.kv_is_finite = True
        """Whether the logits after the last computed token were finite."""
        self.cached_tokens = 0
        """Tokens of the prompt that were in the prefix cache."""

    @property
    def num_remaining(self) -> int:
        """Tokens that must go through the model before the next one can be sampled; 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_reusable(self) -> int:
        """Tokens at the beginning that need not be computed if their keys and values are cached: those before the
        last one, whose logits are sampled from, and before those whose logits are still to be scored."""
        before_last = len(self.token_ids) - 1
        return before_last if self.prompt_scores.is_complete else min(before_last, self.prompt_scores.next_position)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_length

    def is_at_its_limit(self, context_length: int) -> bool:
        """Whether there is no token after the last one, known or not."""
        return len(self.token_ids) >= min(self.most_tokens, context_length)

    def take(self, place: int, token: int, eos_token_ids: frozenset[int], context_length: int) -> FinishReason | None:
        """Puts a sampled token in the place of its placeholder, and says whether it was the last; then nothing is left
        behind it, nor itself where none is wanted.
        """
        self.token_ids[place] = token
        reason = self._why_last(place, token, eos_token_ids, context_length)
        if reason is not None:
            del self.token_ids[place + (self.sampling.max_new_tokens > 0) :]
        return reason

    def _why_last(
        self, place: int, token: int, eos_token_ids: frozenset[int], context_length: int
    ) -> FinishReason | None:
        length = place + 1
        if self.sampling.max_new_tokens == 0:
            return FinishReason("length", length=0)
        grammar = self.sampling_row.grammar
        if grammar is not None:
            if not grammar.accept(token):
                return FinishReason("abort", message="the model has no token that fits the grammar here")
            if grammar.has_ended:
                return FinishReason("stop", matched=token)
        num_generated = length - self.prompt_length
        if num_generated >= self.sampling.min_new_tokens and (
            token in self.sampling.stop_token_ids or (token in eos_token_ids and not self.sampling.ignore_eos)
        ):
            return FinishReason("stop", matched=token)
        if length >= min(self.most_tokens, context_length):
            return FinishReason("length", length=num_generated)
        return None
