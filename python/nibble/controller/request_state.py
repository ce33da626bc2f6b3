"""What the engine's process keeps of a running request."""

import asyncio

from nibble.controller.load_balancer import Booking
from nibble.generation import FinishReason, GenerationOutput, GenerationRequest, PromptLogprobs, TokenLogprob
from nibble.ipc.messages import TokenUpdate
from nibble.tokenizer.detokenizer import IncrementalDetokenizer
from nibble.tokenizer.tokenizer import Tokenizer
from nibble.utils.errors import RequestError


class RequestState:
    """Collects a request's tokens, turns them into text and finds its stop strings."""

    def __init__(self, request: GenerationRequest, booking: Booking, tokenizer: Tokenizer) -> None:
        self.request = request
        self.booking = booking
        self.rank = booking.rank
        self.is_dispatched = False
        self.rank_has_finished = False
        self.given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once it ends for another reason than what its rank says."""
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, request.sampling.stop, request.sampling.skip_special_tokens, request.sampling.stop_regex
        )
        self._output_ids: list[int] = []
        self._cached_tokens = 0
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._finish_reason: FinishReason | None = None
        self._error: Exception | None = None
        self._news = asyncio.Event()

    @property
    def has_ended(self) -> bool:
        """Whether there is a last snapshot or an error to be read."""
        return self._finish_reason is not None or self._error is not None

    @property
    def occupies_rank(self) -> bool:
        """Whether its rank has it and has still to say how it ends."""
        return self.is_dispatched and not self.rank_has_finished

    def update(self, update: TokenUpdate) -> None:
        """Takes what the rank produced; nothing more after a stop string has matched, or looking for one failed.

        Whoever waits for news learns of it from `announce`.
        """
        self.rank_has_finished = update.finish_reason is not None
        if self.has_ended:
            return
        try:
            self._take(update)
        except RequestError as error:
            self.fail(error)

    def _take(self, update: TokenUpdate) -> None:
        self._output_ids += update.token_ids
        self._cached_tokens = update.cached_tokens
        self._logprobs += update.logprobs
        self._prompt_logprobs += update.prompt_logprobs
        reason = update.finish_reason
        stopped_by_token = reason is not None and reason.type == "stop"
        stop = self._detokenizer.append(update.token_ids[:-1] if stopped_by_token else update.token_ids)
        if reason is not None and stop is None:
            stop = self._detokenizer.finish()
        if stop is not None:
            reason = FinishReason("stop", matched=stop)
            del self._output_ids[self._detokenizer.num_tokens :]
            del self._logprobs[self._detokenizer.num_tokens :]
        self._finish_reason = reason

    def announce(self) -> None:
        """Lets `next_output` return what has been taken since the last time."""
        self._news.set()

    def end_aborted(self, message: str) -> None:
        if self._finish_reason is None:
            self.rank_has_finished = True
            self._detokenizer.finish()
            self._finish_reason = FinishReason("abort", message=message)
            self._give_up()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._give_up()

    def _give_up(self) -> None:
        if not self.given_up.done():
            self.given_up.set_result(None)
        self._news.set()

    async def next_output(self) -> GenerationOutput:
        """The newest snapshot, once there is news. Raises what `fail` was told."""
        await self._news.wait()
        self._news.clear()
        if self._error is not None and self._finish_reason is None:
            raise self._error
        start = self.request.logprob_start_len
        return GenerationOutput(
            request_id=self.request.request_id,
            text=self._detokenizer.text,
            output_ids=self._output_ids.copy(),
            prompt_tokens=len(self.request.input_ids),
            cached_tokens=self._cached_tokens,
            dp_rank=self.rank,
            finish_reason=self._finish_reason,
            logprobs=tuple(self._logprobs) if self.request.return_logprob else None,
            prompt_logprobs=(
                None if start is None else PromptLogprobs(self.request.input_ids[start], self._prompt_logprobs)
            ),
        )
