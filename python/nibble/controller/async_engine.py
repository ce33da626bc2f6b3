"""The engine as one asyncio object: requests in, growing answers out, rank processes underneath."""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import msgspec

from nibble.config.resolve import EngineConfig
from nibble.config.server_args import shown_args
from nibble.controller.grammars import Grammars
from nibble.controller.host import Host
from nibble.controller.load_balancer import LoadBalancer
from nibble.controller.nodes import Nodes
from nibble.controller.prefix_record import PrefixRecord
from nibble.controller.request_state import RequestState
from nibble.controller.watchdog import Watchdog
from nibble.generation import GenerationOutput, GenerationRequest
from nibble.ipc.messages import (
    AbortRequest,
    CompileGrammar,
    FlushCache,
    FromRank,
    GrammarCompiled,
    NewRequest,
    ProfileWritten,
    RankFailed,
    RankReady,
    RankStage,
    StartProfile,
    StopProfile,
    TokenBatch,
    TokenUpdate,
    ToRank,
    Wake,
    vocabulary_path,
)
from nibble.observability.rank_stats import RankStats
from nibble.observability.request_context import current_request
from nibble.sampling_params import validate_sampling_params
from nibble.tokenizer.stop_regex import compile_stop_regexes
from nibble.tokenizer.tokenizer import Tokenizer
from nibble.utils.errors import ConfigError, EngineDeadError, OverloadedError, RequestError

logger = logging.getLogger(__name__)

PAGES_PER_BLOCK = 2
MAX_PREFIX_BLOCKS = 1 << 18
"""What the load balancer remembers of the prompts that ranks got: about 30 MB, 8 million tokens with pages of 16."""

State = Literal["starting", "ready", "draining", "dead"]

_CHECKS_PER_TIMEOUT = 10
# A step of a thousand requests must not hold up everybody else.
_TAKEN_AT_ONCE = 64  # updates of requests
_WOKEN_AT_ONCE = 16  # readers, which send what they read: about a tenth of a millisecond each

_LAST_WORDS_SECONDS = 0.2
"""What a message of a rank that has ended, which may say why, gets to arrive in."""


class AsyncEngine:
    """Serves requests on the ranks of one EngineConfig. All methods belong to one event loop.

    `on_dead` is called once, with the reason, when a process of the engine dies.
    """

    def __init__(self, config: EngineConfig, on_dead: Callable[[str], None] = lambda _: None) -> None:
        self.config = config
        self.tokenizer = Tokenizer.from_pretrained(config.tokenizer_folder, config.args.trust_remote_code)
        self.served_model_name = config.args.served_model_name or config.args.model_path
        self.vocab_size = config.model.vocab_size
        self.context_length = config.context_length
        self.dp_size = config.parallel.dp_size
        self.takes_priorities = config.args.enable_priority_scheduling
        self._on_dead = on_dead
        self.on_rank_stats: Callable[[RankStats], None] = lambda _: None
        """Called with what a rank reports of itself, which ranks do with --enable-metrics."""
        self._state: State = "starting"
        self._death: str | None = None
        self._reason_to_stop: str | None = None
        """If it does not even start."""
        self._hangs = False
        """Whether it died of a rank that hangs, whose stack is worth a look."""
        self._ready = asyncio.Event()
        self._stages: dict[int, str] = {}
        self._moe_comm_backend = config.moe_comm_backend
        """Until the ranks are ready, what they will try."""
        self._requests: dict[str, RequestState] = {}
        self._news: dict[RequestState, None] = {}
        """Whose readers are still to be told; what comes for them meanwhile joins it."""
        self._announces_later = False
        self._balancer = _load_balancer(config)
        self._sequence = 0
        self._profiles: asyncio.Queue[ProfileWritten] | None = None
        """Where ranks answer, while a profile is being written."""
        self._seeds = random.Random(config.random_seed)
        self._host: Host | None = None  # until start
        self._nodes: Nodes | None = None  # where there are other hosts
        self._have_vocabulary = False
        """The other hosts, of what their ranks' grammar compilers read."""
        self._watching: asyncio.Task[None] | None = None  # until ready
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(FromRank)

    # Life of the engine

    async def start(self) -> None:
        """Returns when every rank is ready. Raises EngineDeadError with the stage reached, or ConfigError."""
        self._loop = asyncio.get_running_loop()
        timeout = self.config.args.startup_timeout
        deadline = self._loop.time() + timeout
        if self.config.parallel.nnodes > 1:
            await self._meet(timeout)
        self._host = Host(self.config, self.config.parallel.ranks_of_node(0), self._on_exit)
        self._receiver = asyncio.create_task(self._receive())
        self._grammars = Grammars(self.config, self._host.run_dir, self._send_to_all)
        self._host.start()
        try:
            await asyncio.wait_for(self._ready.wait(), deadline - self._loop.time())
        except TimeoutError:
            waiting = {rank: stage for rank, stage in self._stages.items() if stage != "ready"}
            everyone = range(self.config.parallel.world_size)
            waiting |= {rank: "starting its process" for rank in everyone if rank not in self._stages}
            stuck = ", ".join(f"rank {rank} is at {stage!r}" for rank, stage in sorted(waiting.items()))
            self._hangs = True
            raise self._does_not_start(f"not ready within --startup-timeout {timeout:g} s: {stuck}") from None
        if self._death is not None:
            raise EngineDeadError(self._death)
        self._state = "ready"
        self._watching = asyncio.create_task(self._watch())

    async def _meet(self, timeout: float) -> None:
        """The other hosts."""
        self._nodes = Nodes(self.config, self._take, self._on_exit, self._fail)
        try:
            self.config = await asyncio.wait_for(self._nodes.meet(), timeout)
            self.context_length = self.config.context_length
        except TimeoutError:
            nodes = " and ".join(map(str, self._nodes.missing()))
            raise self._does_not_start(f"no word from node {nodes} within --startup-timeout {timeout:g} s") from None
        except ConfigError as error:
            self._reason_to_stop = str(error)  # which the other hosts are told, too
            raise

    def _does_not_start(self, reason: str) -> EngineDeadError:
        self._reason_to_stop = reason
        return EngineDeadError(reason)

    async def stop(self) -> None:
        """Ends all processes and removes what they left. Requests still running end with an error."""
        reason = self._death or self._reason_to_stop
        if self._state != "dead":
            self._fail("the server is shutting down", notify=False)
        if self._host is not None:
            await self._grammars.stop()
        if self._nodes is not None:
            await self._nodes.stop(reason, dump_stacks=self._hangs)
        if self._host is not None:
            self._receiver.cancel()
            if self._watching is not None:
                self._watching.cancel()
            await self._host.stop(dump_stacks=self._hangs)

    async def drain(self, timeout: float) -> None:
        """Refuses new requests and waits for the running ones, at most `timeout` seconds; then they fail."""
        if self._state == "ready":
            self._state = "draining"
        deadline = self._loop.time() + timeout
        while self._requests and self._state == "draining" and self._loop.time() < deadline:
            await asyncio.sleep(0.05)
        self.end_requests(f"the server is shutting down and this took longer than {timeout:g} s")

    def end_requests(self, reason: str) -> None:
        """Fails all that run, and tells their clients why."""
        for state in self._requests.values():
            state.fail(EngineDeadError(reason))

    def state(self) -> State:
        return self._state

    def is_ready(self) -> bool:
        return self._state == "ready"

    def model_info(self) -> dict[str, Any]:
        return {
            "model_path": self.config.args.model_path,
            "tokenizer_path": self.config.tokenizer_folder,
            "served_model_name": self.served_model_name,
            "is_generation": True,
            "architecture": self.config.model.architecture,
            "quantization": self.config.quantization.method if self.config.quantization else None,
            "context_length": self.context_length,
            "vocab_size": self.vocab_size,
        }

    def server_info(self) -> dict[str, Any]:
        resolved: dict[str, Any] = msgspec.to_builtins(self.config)
        del resolved["args"]
        resolved["moe_comm_backend"] = self._moe_comm_backend
        return {
            **shown_args(self.config.args),
            "resolved": resolved,
            "state": self._state,
            "requests_per_rank": self._balancer.requests_per_rank(),
            "outstanding_tokens_per_rank": self._balancer.tokens_per_rank(),
            "rank_process_ids": list(self._host.process_ids.values()) if self._host else [],
        }

    # Life of a request

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationOutput, None]:
        """Cumulative snapshots, the last one with a finish reason. Closing the iterator aborts the request.

        A slow reader skips snapshots and never holds anyone up. Raises RequestError, OverloadedError or
        EngineDeadError.
        """
        state = self._register(request)
        try:
            output = await self._first_output(state)
            yield output
            while output.finish_reason is None:
                output = await state.next_output()
                yield output
        finally:
            self._forget(state)

    async def _first_output(self, state: RequestState) -> GenerationOutput:
        timeout, grammar = self.config.args.queue_timeout, state.request.sampling.grammar
        try:
            async with asyncio.timeout(timeout):
                if grammar is not None:
                    await self._grammars.prepare(grammar, state.given_up)
                if not state.has_ended:
                    self._dispatch(state)
                return await state.next_output()
        except TimeoutError:
            raise OverloadedError(f"no token came within --queue-timeout {timeout:g} s; the server is busy") from None

    def abort(self, request_id: str) -> None:
        """Ends the request with finish reason "abort"; an unknown one has ended already."""
        state = self._requests.get(request_id)
        if state is not None:
            if state.occupies_rank:
                self._send(state.rank, AbortRequest(request_id))
            state.end_aborted("aborted by the client")

    def flush_cache(self) -> None:
        """Forgets all cached prefixes: requests sent later find none. Raises RequestError while any request runs."""
        if self._death is not None:
            raise EngineDeadError(self._death)
        if self._requests:
            raise RequestError(
                f"the cache can't be flushed while requests run or wait, and there are {len(self._requests)}; "
                "try again when they have ended"
            )
        self._balancer.forget_prefixes()
        self._send_to_all(FlushCache())

    def start_profile(self, profile: StartProfile) -> None:
        """Every rank records what it does, into a folder inside --profiler-dir. Raises RequestError for another."""
        self._check_started()
        if "GPU" in profile.activities and self.config.device == "cpu":
            raise RequestError("activities can't have GPU: this engine runs on the CPU", "activities")
        allowed = Path(self.config.args.profiler_dir).resolve()
        folder = (allowed / profile.folder).resolve()
        if not folder.is_relative_to(allowed):
            message = f"output_dir ({profile.folder}) must be inside {allowed}, which --profiler-dir sets"
            raise RequestError(message, "output_dir")
        self._send_to_all(msgspec.structs.replace(profile, folder=str(folder)))

    async def stop_profile(self) -> list[str]:
        """Ends it, on all ranks, and returns where their traces are. Raises RequestError when there are none."""
        self._check_started()
        if self._profiles is not None:
            raise RequestError("the profile is being written already")
        profiles: asyncio.Queue[ProfileWritten] = asyncio.Queue()
        self._profiles = profiles
        self._send_to_all(StopProfile())
        try:
            written = [await profiles.get() for _ in range(self.config.parallel.world_size)]
        finally:
            self._profiles = None
        if self._death is not None:
            raise EngineDeadError(self._death)
        if errors := [profile.error for profile in written if profile.error is not None]:
            raise RequestError(errors[0])
        return sorted(profile.path for profile in written if profile.path is not None)

    def _register(self, request: GenerationRequest) -> RequestState:
        self._check(request)
        self._check_capacity()
        booking = self._balancer.book(request.input_ids, request.sampling.max_new_tokens, request.data_parallel_rank)
        state = RequestState(request, booking, self.tokenizer)
        self._requests[request.request_id] = state
        return state

    def _dispatch(self, state: RequestState) -> None:
        request, rank = state.request, state.rank
        seed = request.sampling.sampling_seed
        context = current_request.get()
        self._sequence += 1
        message = NewRequest(
            sequence=self._sequence,
            request_id=request.request_id,
            input_ids=request.input_ids,
            sampling=request.sampling,
            seed=seed if seed is not None else self._seeds.getrandbits(63),
            return_logprob=request.return_logprob,
            top_logprobs_num=request.top_logprobs_num,
            update_interval=request.update_interval,
            priority=request.priority,
            http_request_id=None if context is None else context.request_id,
            token_ids_logprob=request.token_ids_logprob,
            logprob_start_len=request.logprob_start_len,
        )
        for peer in range(self.dp_size):
            self._send(peer, message if peer == rank else Wake(self._sequence))
        state.is_dispatched = True

    def _check(self, request: GenerationRequest) -> None:
        validate_sampling_params(request.sampling, self.vocab_size)
        compile_stop_regexes(request.sampling.stop_regex)
        if request.sampling.grammar is not None and self.config.args.grammar_backend == "none":
            field = request.sampling.grammar.field
            raise RequestError(f"{field} needs a grammar, and this server runs with --grammar-backend none", field)
        length, wanted = len(request.input_ids), request.sampling.max_new_tokens
        if length == 0:
            raise RequestError("the prompt is empty", "prompt")
        if length + wanted > self.context_length:
            raise RequestError(
                f"the prompt has {length} tokens and max_new_tokens is {wanted}; together they exceed the context "
                f"length of {self.context_length} tokens",
                "max_new_tokens" if length < self.context_length else "prompt",
            )
        if not all(0 <= token < self.vocab_size for token in request.input_ids):
            raise RequestError(
                f"input_ids must be between 0 and {self.vocab_size - 1}, got "
                f"{next(t for t in request.input_ids if not 0 <= t < self.vocab_size)}",
                "input_ids",
            )
        if request.request_id in self._requests:
            raise RequestError(f"a request with the id {request.request_id!r} is running already", "rid")

    def _check_started(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death)
        if self._state == "starting":
            raise OverloadedError("the server is starting and takes no requests")

    def _check_capacity(self) -> None:
        self._check_started()
        if self._state != "ready":
            raise OverloadedError(f"the server is {self._state} and takes no requests")
        args = self.config.args
        limit = args.max_running_requests * self.dp_size + args.max_queued_requests
        if len(self._requests) >= limit:
            raise OverloadedError(
                f"{len(self._requests)} requests run or wait, the limit is {limit} "
                "(--max-running-requests of every attention group and --max-queued-requests)"
            )

    def _forget(self, state: RequestState) -> None:
        if self._requests.pop(state.request.request_id, None) is not None:
            self._balancer.release(state.booking)
            if state.occupies_rank and self._state != "dead":
                self._send(state.rank, AbortRequest(state.request.request_id))

    # Messages

    def _send(self, dp_rank: int, message: ToRank) -> None:
        rank, encoded = self.config.parallel.first_rank(dp_rank), self._encoder.encode(message)
        assert self._host is not None
        if self._host.has(rank):
            self._host.send(rank, encoded)
        else:
            assert self._nodes is not None
            self._nodes.send(rank, encoded)

    def _send_to_all(self, message: ToRank) -> None:
        if isinstance(message, CompileGrammar) and self._nodes is not None and not self._have_vocabulary:
            assert self._host is not None
            self._nodes.share_vocabulary(vocabulary_path(self._host.run_dir).read_bytes())
            self._have_vocabulary = True
        for dp_rank in range(self.dp_size):
            self._send(dp_rank, message)

    async def _receive(self) -> None:
        assert self._host is not None
        while True:
            await self._take(await self._host.receive())

    async def _take(self, encoded: bytes) -> None:
        """A message of a rank."""
        message = self._decoder.decode(encoded)
        if not isinstance(message, TokenBatch):
            self._handle(message)
            return
        for start in range(0, len(message.updates), _TAKEN_AT_ONCE):
            self._update(message.updates[start : start + _TAKEN_AT_ONCE])
            await asyncio.sleep(0)  # others run

    def _update(self, updates: Sequence[TokenUpdate]) -> None:
        for update in updates:
            state = self._requests.get(update.request_id)
            if state is not None:
                self._balancer.progress(state.booking, len(update.token_ids))
                state.update(update)
                self._news[state] = None
        self._announce_some()

    def _announce_some(self) -> None:
        """Wakes the readers of requests with news, but only so many that nobody else is held up; the rest soon."""
        for state in list(islice(self._news, _WOKEN_AT_ONCE)):
            del self._news[state]
            state.announce()
        if self._news and not self._announces_later:
            self._announces_later = True
            self._loop.call_soon(self._announce_later)

    def _announce_later(self) -> None:
        self._announces_later = False
        self._announce_some()

    def _handle(self, message: FromRank) -> None:
        match message:
            case GrammarCompiled():
                self._grammars.on_compiled(message)
            case ProfileWritten():
                if self._profiles is not None:
                    self._profiles.put_nowait(message)
            case RankStats():
                self.on_rank_stats(message)
            case RankStage():
                self._stages[message.rank] = message.stage
                logger.debug("rank %d: %s", message.rank, message.stage)
            case RankReady():
                self._stages[message.rank] = "ready"
                self._moe_comm_backend = message.moe_comm_backend
                if len(self._stages) == self.config.parallel.world_size and set(self._stages.values()) == {"ready"}:
                    self._ready.set()
            case RankFailed():
                self._hangs = message.waited_in_vain
                self._fail(f"rank {message.rank}: {message.message}")

    async def _watch(self) -> None:
        """Ends the engine when a rank has requests and makes no step for --watchdog-timeout."""
        timeout = self.config.args.watchdog_timeout
        interval = timeout / _CHECKS_PER_TIMEOUT
        watchdog = Watchdog(self.config.parallel.world_size, timeout, interval)
        while True:
            await asyncio.sleep(interval)
            ranks_at_work = {state.rank for state in self._requests.values() if state.occupies_rank}
            busy = {self.config.parallel.first_rank(rank) for rank in ranks_at_work}
            if stuck := watchdog.stuck(self._steps(), busy):
                ranks = " and ".join(f"rank {rank}" for rank in stuck)
                states = ", ".join(f"{rank} is {state}" for rank, state in sorted(self._process_states().items()))
                self._hangs = True
                self._fail(f"{ranks} made no step for --watchdog-timeout {timeout:g} s; of the processes, {states}")
                return

    def _steps(self) -> list[int]:
        """How many each rank has made, as far as is known."""
        assert self._host is not None
        steps = self._host.steps()
        for rank, count in (self._nodes.steps() if self._nodes else {}).items():
            steps[rank] = count
        return steps

    def _process_states(self) -> dict[int, str]:
        assert self._host is not None
        return self._host.states() | (self._nodes.states() if self._nodes else {})

    def _on_exit(self, rank: int, code: int) -> None:
        reason = f"rank {rank} ended unexpectedly (exit code {code})"
        self._loop.call_later(_LAST_WORDS_SECONDS, self._fail, reason)

    def _fail(self, reason: str, notify: bool = True) -> None:
        if self._death is not None:
            return
        self._death, self._state = reason, "dead"
        if self._profiles is not None:
            for rank in range(self.config.parallel.world_size):
                self._profiles.put_nowait(ProfileWritten(rank, None, reason))
        self._ready.set()
        self.end_requests(reason)
        if self._host is not None:
            self._grammars.fail(EngineDeadError(reason))
        if notify:
            self._on_dead(reason)


def _load_balancer(config: EngineConfig) -> LoadBalancer:
    args = config.args
    prefixes = None if args.disable_radix_cache else PrefixRecord(args.page_size * PAGES_PER_BLOCK, MAX_PREFIX_BLOCKS)
    return LoadBalancer(config.parallel.dp_size, args.load_balance_method, prefixes)
