"""Request bodies of the OpenAI routes."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from nibble.entrypoints.logprobs import MAX_TOP_LOGPROBS
from nibble.entrypoints.request_model import (
    AnyPrompts,
    FailFastList,
    RequestModel,
    SamplingFields,
    at_most,
    parsed_object,
)
from nibble.sampling_params import MAX_CHOICES, SamplingParams
from nibble.structured_output.grammar import Format, json_schema_format
from nibble.utils.errors import RequestError

MAX_MESSAGES = 4096
MAX_TEMPLATE_VARIABLES = 64
MAX_TOOLS = 128

# The smallest and largest of the 64-bit integers that seeds are.
_MIN_SEED, _MAX_SEED = -(2**63), 2**63 - 1


class StreamOptions(RequestModel):
    include_usage: bool = Field(default=False, description="Send a last chunk with the usage and no choices.")


class JsonSchema(RequestModel):
    """`strict` is as good as set: answers always fit the schema."""

    bookkeeping_fields: ClassVar = frozenset({"name", "description", "strict"})

    content: dict[str, Any] = Field(alias="schema")


class ResponseFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _the_schema_is_there(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise RequestError("json_schema goes with the type 'json_schema', and with no other", "json_schema")
        return self


class OpenAISampling(SamplingFields):
    """What completions and chat completions share."""

    neutral_values: ClassVar = {
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
    }
    bookkeeping_fields: ClassVar = frozenset(
        {
            "metadata",
            "prompt_cache_key",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "user",
        }
    )

    model: str = Field(default="", description="Any name is served by the one model there is.")
    min_tokens: int = Field(default=0, ge=0)
    seed: int | None = Field(default=None, ge=_MIN_SEED, le=_MAX_SEED)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    data_parallel_rank: int | None = Field(
        default=None, description="The DP rank to run on; null leaves it to the balancer."
    )
    priority: int | None = Field(default=None, description="Higher goes first, with --enable-priority-scheduling.")
    response_format: ResponseFormat = Field(
        default=ResponseFormat(type="text"), description="Text, a JSON object, or JSON that fits a schema."
    )

    def answer_formats(self) -> dict[str, Format]:
        formats = super().answer_formats()
        if self.response_format.type == "json_object":
            formats["response_format"] = json_schema_format({"type": "object"})
        if self.response_format.json_schema is not None:
            formats["response_format"] = json_schema_format(self.response_format.json_schema.content)
        return formats

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "OpenAISampling":
        if self.stream_options.include_usage and not self.stream:
            raise RequestError("stream_options.include_usage needs stream to be true", "stream_options")
        return self

    def sampling_params(self, max_new_tokens: int) -> SamplingParams:
        """The request's sampling, but for what the answer must look like.

        Raises RequestError when `min_tokens` exceeds the tokens there may be.
        """
        if self.min_tokens > max_new_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not exceed the tokens to generate ({max_new_tokens})",
                "min_tokens",
            )
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=self.min_tokens,
            sampling_seed=self.seed,
            **self.shared_sampling(),
        )


class CompletionRequest(OpenAISampling):
    """`POST /v1/completions`."""

    prompt: AnyPrompts
    max_tokens: int | None = Field(default=None, ge=0, description="16 unless given.")
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool = Field(default=False, description="Begin the text, and the logprobs, with the prompt.")
    best_of: int | None = Field(
        default=None, ge=1, le=MAX_CHOICES, description="Generate so many, return the n whose tokens are the likeliest."
    )

    @model_validator(mode="after")
    def _features_fit_together(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(f"best_of ({self.best_of}) must be at least n ({self.n})", "best_of")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise RequestError(f"best_of ({self.best_of}) can't be streamed where it is more than n", "best_of")
        return self


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


class CalledFunction(RequestModel):
    name: str
    arguments: str = Field(description="A JSON object, as text; no text is one without entries.")

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> "CalledFunction":
        parsed_object(self.arguments or "{}", "arguments")
        return self


class ToolCall(RequestModel):
    """A call that an earlier answer made. `index` numbers it in the deltas of a stream, and may be left in."""

    bookkeeping_fields: ClassVar = frozenset({"index"})

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(RequestModel):
    neutral_values: ClassVar = {"type": ("text", "message")}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | FailFastList[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = Field(default=None, description="What the assistant thought before this answer.")
    tool_calls: list[ToolCall] = Field(default=[], max_length=MAX_TOOLS, fail_fast=True)
    tool_call_id: str | None = Field(default=None, description="The call that a message of a tool answers.")

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> "ChatMessage":
        for field, role in (("tool_calls", "assistant"), ("reasoning_content", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, field) and self.role != role:
                raise RequestError(f"{field} goes with the role {role!r}, not {self.role!r}", field)
        if self.content is None and not self.tool_calls:
            raise RequestError("content is required", "content")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: text parts joined by newlines, "developer" as "system"."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        for field in ("name", "reasoning_content", "tool_call_id"):
            if (value := getattr(self, field)) is not None:
                message[field] = value
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {"name": call.function.name, "arguments": call.function.arguments or "{}"},
                }
                for call in self.tool_calls
            ]
        return message


class FunctionDefinition(RequestModel):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] = Field(default={"type": "object", "properties": {}}, description="A JSON schema.")
    strict: bool = Field(default=False, description="Hold the arguments to their schema.")


class Tool(RequestModel):
    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "function": {
                "name": self.function.name,
                "description": self.function.description or "",
                "parameters": self.function.parameters,
            },
        }


class NamedFunction(RequestModel):
    name: str


class NamedTool(RequestModel):
    type: Literal["function"]
    function: NamedFunction


TemplateVariables = Annotated[
    dict[str, bool | int | float | str], at_most(MAX_TEMPLATE_VARIABLES, "chat_template_kwargs")
]


class ChatCompletionRequest(OpenAISampling):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: int | None = Field(default=None, ge=1, description="The older name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="The rest of the context unless given.")
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] = Field(default=[], max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: Literal["auto", "none", "required"] | NamedTool = Field(
        default="auto", description="Whether a function may, can't or must be called, or which one must be."
    )
    parallel_tool_calls: bool = Field(default=True, description="Whether one answer may hold several calls.")
    separate_reasoning: bool = Field(
        default=True, description="Give what the model thinks as reasoning_content, not as a part of the content."
    )
    chat_template_kwargs: TemplateVariables = Field(
        default={}, description="Variables for the model's chat template, for example enable_thinking."
    )

    @model_validator(mode="after")
    def _features_fit_together(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise RequestError(
                f"max_tokens ({self.max_tokens}) and max_completion_tokens ({self.max_completion_tokens}) disagree;"
                " send one of them",
                "max_tokens",
            )
        return self

    @model_validator(mode="after")
    def _tools_fit_together(self) -> "ChatCompletionRequest":
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise RequestError("tools must not name two functions alike", "tools")
        if self.forced_tools is not None:
            if not self.tools:
                raise RequestError("tool_choice asks for a call, and there are no tools", "tool_choice")
            if not self.forced_tools:
                raise RequestError(f"tool_choice names a function that is not among the tools {names}", "tool_choice")
            if self.answer_formats():
                field = next(iter(self.answer_formats()))
                raise RequestError(f"{field} and a tool_choice that asks for a call exclude each other", field)
        return self

    @property
    def usable_tools(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else self.tools

    @property
    def forced_tools(self) -> list[Tool] | None:
        """The tools of which one must be called, if one must be."""
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return [tool for tool in self.tools if tool.function.name == name]
        return self.tools if self.tool_choice == "required" else None
