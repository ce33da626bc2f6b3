"""The base of all request bodies: strict types, null for the default, and nothing accepted and ignored."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from nibble.sampling_params import (
    BIAS_RANGE,
    MAX_LOGIT_BIAS,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    RANGES,
    Range,
)
from nibble.structured_output.grammar import Format, Grammar, ebnf_format, make_grammar, regex_format
from nibble.utils.errors import RequestError

MAX_PROMPTS = 1024
_MAX_INT32 = 2**31 - 1

T = TypeVar("T")

# Pydantic writes down every error that it finds, and there may be millions of elements: lists stop at their first
# error, and objects are measured before they are looked into.
FailFastList = Annotated[list[T], Field(fail_fast=True)]
TokenIds = FailFastList[int]
PerPrompt = Annotated[list[T], Field(max_length=MAX_PROMPTS, fail_fast=True)]


def at_most(limit: int, field: str) -> BeforeValidator:
    """Refuses objects with more entries than `limit`; `field` is what they are called."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            raise RequestError(f"{field} takes at most {limit} entries, got {len(value)}")
        return value

    return BeforeValidator(check)


def _prompt_shape(value: Any) -> str | None:
    """Which way of writing prompts a value follows, by its first element."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    if value and isinstance(value[0], str | list):
        return "texts" if isinstance(value[0], str) else "token lists"
    return "tokens"


def _shaped_like(description: str) -> Discriminator:
    return Discriminator(
        _prompt_shape, custom_error_type="prompt_shape", custom_error_message=f"Input should be {description}"
    )


Text = Annotated[str, Tag("text")]
Texts = Annotated[PerPrompt[str], Tag("texts")]
Tokens = Annotated[TokenIds, Tag("tokens")]
TokenLists = Annotated[PerPrompt[TokenIds], Tag("token lists")]
TextPrompts = Annotated[Text | Texts, _shaped_like("a text or a list of texts")]
TokenPrompts = Annotated[Tokens | TokenLists, _shaped_like("token ids or a list of lists of token ids")]
AnyPrompts = Annotated[
    Text | Texts | Tokens | TokenLists,
    _shaped_like("a text, a list of texts, token ids or a list of lists of token ids"),
]


def is_prompt_list(prompts: Any) -> bool:
    """Whether these are several prompts (if only one in a list), as opposed to one text or its token ids."""
    return _prompt_shape(prompts) in ("texts", "token lists")


def prompt_list(prompts: Any) -> list[str | list[int]]:
    """Prompts as a list, however they were written."""
    return list(prompts) if is_prompt_list(prompts) else [prompts]


class RequestModel(BaseModel):
    """A JSON object from a client. `null` means a field's default.

    A field that this server does not know is refused by its name, unless its value asks for nothing: null, false
    or empty, or one of `neutral_values`. `bookkeeping_fields` are accepted with any value, because they are notes
    of the client's that by definition change nothing about the answer.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    bookkeeping_fields: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _keep_what_is_served(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        fields = {field.alias or name for name, field in cls.model_fields.items()}
        served = {}
        for name, value in content.items():
            if name in fields:
                if value is not None:
                    served[name] = value
            elif name not in cls.bookkeeping_fields and not cls._asks_for_nothing(name, value):
                raise RequestError(f"{name[:64]} is not supported by this server; leave it out", name[:64])
        return served

    @classmethod
    def _asks_for_nothing(cls, name: str, value: Any) -> bool:
        empty = value is None or value is False or (isinstance(value, str | list | dict) and not value)
        return empty or value in cls.neutral_values.get(name, ())


def parsed_object(text: str, field: str) -> dict[str, Any]:
    """What is sent as the text of a JSON object. Raises RequestError when it is none."""
    try:
        parsed = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"{field} is not valid JSON: {error}", field) from None
    if not isinstance(parsed, dict):
        raise RequestError(f"{field} must be the text of a JSON object, got {text[:80]}", field)
    return parsed


def _token_keys(value: Any) -> Any:
    """JSON's keys are strings; these must be token ids."""
    if not isinstance(value, dict):
        return value
    for key in value:
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise RequestError(f"logit_bias takes token ids as keys, got {key[:64]!r}")
    return {int(key): bias for key, bias in value.items()}


LogitBias = Annotated[dict[int, float], BeforeValidator(_token_keys), at_most(MAX_LOGIT_BIAS, "logit_bias")]


def _schema_of(limits: Range) -> dict[str, Any]:
    schema: dict[str, Any] = {"minimum" if limits.least else "exclusiveMinimum": limits.low}
    return schema if limits.high is None else schema | {"maximum": limits.high}


_STOPS = {"minLength": 1, "maxLength": MAX_STOP_LENGTH, "maxItems": MAX_STOPS}  # of a text, or of a list of them
_LIMITS: dict[str, dict[str, Any]] = {name: _schema_of(limits) for name, limits in RANGES.items()} | {
    "top_k": {"minimum": -1, "not": {"const": 0}},
    "stop": _STOPS,
    "stop_regex": _STOPS,
    "stop_token_ids": {"maxItems": MAX_STOPS},
    "logit_bias": {
        "maxProperties": MAX_LOGIT_BIAS,
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": {"type": "number"} | _schema_of(BIAS_RANGE),
    },
}


def _tell_limits(schema: dict[str, Any]) -> None:
    """Adds to the schema of a body what `validate_sampling_params` will check."""
    for name in _LIMITS.keys() & schema["properties"].keys():
        schema["properties"][name] |= _LIMITS[name]


class SamplingFields(RequestModel):
    """The sampling fields that the native and the OpenAI routes spell the same way."""

    model_config = ConfigDict(json_schema_extra=_tell_limits)

    temperature: float = Field(default=1.0, description="0 takes the likeliest token each time.")
    top_p: float = 1.0
    top_k: int = Field(default=-1, le=_MAX_INT32, description="-1 keeps every token.")
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: LogitBias = Field(default={}, description="Added to the logits, by token id.")
    stop: str | FailFastList[str] = Field(default=[], description="Strings that end the text; they are not part of it.")
    stop_regex: str | FailFastList[str] = Field(
        default=[], description="Regular expressions that end the text likewise."
    )
    stop_token_ids: TokenIds = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    n: int = Field(default=1, description="Choices for each prompt. Choice i is sampled with the seed plus i.")
    regex: str | None = Field(default=None, description="What the whole answer must match.")
    ebnf: str | None = Field(default=None, description="A grammar in GBNF for the answer, with the rule root.")

    def answer_formats(self) -> dict[str, Format]:
        """What the answer is asked to look like, by the field that asks."""
        formats = {}
        if self.regex is not None:
            formats["regex"] = regex_format(self.regex)
        if self.ebnf is not None:
            formats["ebnf"] = ebnf_format(self.ebnf)
        return formats

    def grammar(self) -> Grammar | None:
        """What the whole answer is held to."""
        return next((make_grammar(content, field) for field, content in self.answer_formats().items()), None)

    @model_validator(mode="after")
    def _one_format_at_most(self) -> "SamplingFields":
        fields = list(self.answer_formats())
        if len(fields) > 1:
            raise RequestError(f"{fields[0]} and {fields[1]} both say what the answer looks like; send one", fields[1])
        return self

    def shared_sampling(self) -> dict[str, Any]:
        """These fields as arguments of `SamplingParams`."""
        fields = {name: getattr(self, name) for name in SamplingFields.model_fields.keys() - {"regex", "ebnf"}}
        for name in ("stop", "stop_regex"):
            fields[name] = (fields[name],) if isinstance(fields[name], str) else tuple(fields[name])
        fields["stop_token_ids"] = tuple(self.stop_token_ids)
        return fields
