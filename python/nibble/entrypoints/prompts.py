"""Text to token ids and back for requests, without keeping the event loop from serving streams."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from nibble.tokenizer.tokenizer import Tokenizer
from nibble.utils.errors import RequestError
from nibble.utils.interruptible import Interruptible

T = TypeVar("T")

TEMPLATE_TIMEOUT_S = 10.0
_SHORT_TEXT = 4096  # characters or tokens; they take about a millisecond, so that a thread is not worth it
_NUM_THREADS = 2


class PromptEncoder:
    """Tokenizes what is short on the event loop; what is long, and all that runs a template, on threads of its own."""

    def __init__(self, tokenizer: Tokenizer, template_timeout_s: float = TEMPLATE_TIMEOUT_S) -> None:
        self._tokenizer = tokenizer
        self._template_timeout_s = template_timeout_s
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="prompt-encoder")
        self._short_chats = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="chat-template")

    async def encode(
        self, prompts: Sequence[str | list[int]], field: str, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of texts, see `Tokenizer.encode`; prompts that are token ids already stay as they are.

        `field` is what the route calls the prompts.
        """

        def encode_all() -> list[list[int]]:
            return [
                self._tokenizer.encode(prompt, add_special_tokens) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ]

        with _errors_name(field):
            return await self._run(sum(len(prompt) for prompt in prompts if isinstance(prompt, str)), encode_all)

    async def decode(self, token_lists: Sequence[list[int]], skip_special_tokens: bool) -> list[str]:
        """Texts of lists of token ids; see `Tokenizer.decode`."""

        def decode_all() -> list[str]:
            return [self._tokenizer.decode(token_ids, skip_special_tokens) for token_ids in token_lists]

        return await self._run(sum(map(len, token_lists)), decode_all)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Token ids of a conversation; see `Tokenizer.apply_chat_template`.

        Raises RequestError when it takes longer than the time limit, and ends it.
        """
        encoding = Interruptible(lambda: self._tokenizer.apply_chat_template(messages, variables, tools))
        size = sum(map(_size, [*messages, *tools]))
        threads = self._threads if size > _SHORT_TEXT else self._short_chats
        running = asyncio.get_running_loop().run_in_executor(threads, encoding.run)
        try:
            with _errors_name("messages"):
                return await asyncio.wait_for(running, self._template_timeout_s)
        except TimeoutError:
            encoding.interrupt()
            raise RequestError(
                f"rendering the chat template took longer than {self._template_timeout_s:g} s; send shorter messages",
                "messages",
            ) from None

    def close(self) -> None:
        for threads in (self._threads, self._short_chats):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, size: int, work: Callable[[], T]) -> T:
        if size <= _SHORT_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


@contextmanager
def _errors_name(field: str) -> Iterator[None]:
    """Those that name no field of the request; the tokenizer knows nothing of requests."""
    try:
        yield
    except RequestError as error:
        error.field = error.field or field
        raise


def _size(content: Any) -> int:
    """Characters of all texts in a message or a tool."""
    if isinstance(content, str):
        return len(content)
    if isinstance(content, Mapping):
        return sum(map(_size, content.values()))
    return sum(map(_size, content)) if isinstance(content, list) else 0
