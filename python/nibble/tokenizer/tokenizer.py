"""Text to token ids and back, and the chat template."""

import inspect
import json
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateSyntaxError

from nibble.utils.errors import ConfigError, RequestError

MAX_PROMPT_BYTES = 8 * 2**20
"""UTF-8 bytes of one prompt that are tokenized at most; four million tokens of English hold about that much."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_PROBE = "probe"
"""The function that is called when it is tried what a template makes of calls."""
_CALL_ID = "call00001"  # Mistral's templates insist on nine letters and digits


class Tokenizer:
    """A checkpoint's tokenizer. Every method may be called from several threads at once."""

    def __init__(self, hf_tokenizer: Any, max_prompt_bytes: int = MAX_PROMPT_BYTES) -> None:
        """`hf_tokenizer` is a `transformers.PreTrainedTokenizerBase`; it must not be used elsewhere."""
        self._hf = hf_tokenizer
        self._max_prompt_bytes = max_prompt_bytes
        # The Rust tokenizer releases the interpreter lock while it encodes, and may be shared between threads as
        # long as nobody changes its settings, which transformers' own methods do. Tokenizers in Python have no
        # such backend and take turns.
        self._backend = hf_tokenizer.backend_tokenizer if hf_tokenizer.is_fast else None
        self._lock = threading.Lock()
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = False
        added = hf_tokenizer.added_tokens_decoder.items()
        self.special_token_ids: frozenset[int] = frozenset(hf_tokenizer.all_special_ids) | {
            token_id for token_id, token in added if token.special
        }
        self.eos_token_ids: frozenset[int] = (
            frozenset() if hf_tokenizer.eos_token_id is None else frozenset({hf_tokenizer.eos_token_id})
        )
        """The tokenizer's own end of sequence; a checkpoint's generation_config.json may name more."""
        self.vocab_size: int = 1 + max(hf_tokenizer.get_vocab().values())
        """One more than the largest token id. A model's embedding table may be padded to more."""

    @classmethod
    def from_pretrained(cls, folder: str, trust_remote_code: bool = False) -> "Tokenizer":
        """Loads a tokenizer from a checkpoint's folder. Raises ConfigError when there is none that can be loaded."""
        from transformers import AutoTokenizer

        try:
            tokenizer = cls(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))
        except Exception as error:  # tokenizers' own is a plain Exception, and a damaged file may raise any other
            hint = "" if trust_remote_code else " (code that comes with it runs only with --trust-remote-code)"
            files = f"{folder} (tokenizer.json, tokenizer_config.json)"
            reason = " ".join(str(error).split())  # some have paragraphs
            raise ConfigError(f"the tokenizer in {files} can't be loaded{hint}: {reason}") from error
        tokenizer._check_chat_template(folder)
        return tokenizer

    def _check_chat_template(self, folder: str) -> None:
        """Raises ConfigError for a template that is cut off, say, and would refuse all messages alike."""
        try:
            self._render_as_it_is([{"role": "user", "content": ""}])
        except TemplateSyntaxError as error:
            where = f"the chat template in {folder} (chat_template.jinja, or in tokenizer_config.json)"
            raise ConfigError(f"{where} can't be read: line {error.lineno}: {error.message}") from error
        except Exception:
            return  # there is none, or it does not like this conversation

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` adds what the model expects around it (often a first token).

        Raises RequestError for text over the limit of `max_prompt_bytes` or that UTF-8 can't represent.
        """
        self._check_text(text)
        if self._backend is None:
            with self._lock:
                return list(self._hf.encode(text, add_special_tokens=add_special_tokens))
        # The batch call is the one that releases the interpreter lock.
        return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`, each at least 0; bytes that are not UTF-8 become U+FFFD."""
        if self._backend is None:
            with self._lock:
                return str(
                    self._hf.decode(
                        token_ids,
                        skip_special_tokens=skip_special_tokens,
                        clean_up_tokenization_spaces=False,
                        spaces_between_special_tokens=False,
                    )
                )
        return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for, which may be a part of a character."""
        text = self.decode([token_id], skip_special_tokens=False)
        piece = self._hf.convert_ids_to_tokens(token_id) or ""
        if _REPLACEMENT not in text:
            # Decoders drop the leading space of a sequence; here it belongs to the token.
            lost_space = piece.startswith(_WORD_START) and not text.startswith(" ")
            return (" " * lost_space + text).encode()
        if match := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(match[1], 16)])
        if all(character in _BYTE_OF_CHARACTER for character in piece):
            return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
        return text.encode()

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Token ids of a conversation that the model is to continue as the assistant, with `tools` that it may call.

        The arguments of earlier function calls are the texts of JSON objects. `variables` are handed to the template
        (Qwen3's `enable_thinking`, for one). The template is always the checkpoint's own and runs in Jinja's immutable
        sandbox. Raises RequestError when the model has no chat
        template, or the template refuses the messages.
        """
        return self.encode(self.render_chat_template(messages, variables, tools), add_special_tokens=False)

    def render_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The text that `apply_chat_template` encodes."""
        if not self._hf.chat_template:
            raise RequestError("this model has no chat template; use /v1/completions with a plain prompt", "messages")
        for name in variables or ():
            if name in self._reserved_variables:
                raise RequestError(f"chat_template_kwargs can't set {name!r}", "chat_template_kwargs")
        try:
            return self._render(messages, tools, variables or {})
        # A template is code of the checkpoint run on what the client sent, so any exception may come out of it.
        except Exception as error:
            raise RequestError(
                f"the model's chat template does not accept these messages: {error}", "messages"
            ) from error

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> str:
        return self._render_as_it_is(
            [self._with_calls_as_wanted(message) if message.get("tool_calls") else message for message in messages],
            tools,
            variables,
        )

    def _render_as_it_is(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        # Not by `apply_chat_template`, which may leave out what is None: templates ask whether a content `is none`.
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, _ = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            tools=[dict(tool) for tool in tools] or None,
            chat_template=self._hf.get_chat_template(tools=tools or None),
            add_generation_prompt=True,
            **{**self._hf.special_tokens_map, **(variables or {})},
        )
        return str(rendered[0])

    def _with_calls_as_wanted(self, message: Mapping[str, Any]) -> dict[str, Any]:
        calls = message["tool_calls"]
        if not self._template_wants_arguments_as_text:
            calls = [
                {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
                for call in calls
            ]
        return {**message, "tool_calls": calls, "content": message.get("content") or self._content_beside_calls}

    def template_shows_tools(self) -> bool:
        """Whether the model learns which functions it may call; DeepSeek-V3's template leaves them out. It is tried."""
        tool = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {"type": "object"}}}
        try:
            return _PROBE in self._render_as_it_is([{"role": "user", "content": "?"}], [tool])
        except Exception:  # a template may raise any; that this one refuses says nothing of others
            return True

    @cached_property
    def _reserved_variables(self) -> set[str]:
        """What no request may pass to the template by name."""
        from transformers.utils.chat_template_utils import render_jinja_template

        renderers = (self._hf.apply_chat_template, render_jinja_template)
        return {"self", "messages"}.union(*(inspect.signature(renderer).parameters for renderer in renderers))

    @cached_property
    def _content_beside_calls(self) -> str | None:
        """Of a message that only calls functions: an empty text, but None where the template shows the calls only then,
        as DeepSeek-V3's does. It is tried."""

        def shows_call(content: str | None) -> bool:
            return _PROBE in self._render_call(content, "{}") + self._render_call(content, {})

        return None if shows_call(None) and not shows_call("") else ""

    @cached_property
    def _template_wants_arguments_as_text(self) -> bool:
        """Of function calls. Other templates want objects, which they write as JSON themselves: it is tried."""
        rendered = self._render_call(self._content_beside_calls, {"argument": 1})
        return not rendered or "{'argument': 1}" in rendered

    def _render_call(self, content: str | None, arguments: str | dict[str, Any]) -> str:
        """A conversation in which a function is called; empty if the template does not accept it."""
        call = {"id": _CALL_ID, "type": "function", "function": {"name": _PROBE, "arguments": arguments}}
        called: list[dict[str, Any]] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": content, "tool_calls": [call]},
        ]
        for messages in ([*called, {"role": "tool", "tool_call_id": _CALL_ID, "content": "?"}], called):
            with suppress(Exception):  # a template may raise any
                return self._render_as_it_is(messages)
        return ""

    def _check_text(self, text: str) -> None:
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the prompt holds a lone surrogate at character {error.start}, which is not text"
            ) from None
        if size > self._max_prompt_bytes:
            raise RequestError(f"the prompt has {size} bytes, more than the limit of {self._max_prompt_bytes}")


def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level BPE vocabulary stands for (GPT-2's `bytes_to_unicode`).

    Printable bytes stand for themselves; the others are numbered from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
