"""Request bodies of SGLang's native routes and of the tokenizer's."""

from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from nibble.entrypoints.logprobs import MAX_TOP_LOGPROBS
from nibble.entrypoints.request_model import (
    PerPrompt,
    RequestModel,
    SamplingFields,
    TextPrompts,
    TokenIds,
    TokenPrompts,
    is_prompt_list,
    parsed_object,
    prompt_list,
)
from nibble.sampling_params import MAX_NAMED_TOKENS, SamplingParams
from nibble.structured_output.grammar import Format, json_schema_format
from nibble.utils.errors import RequestError

_MAX_RID_LENGTH = 256


class NativeSampling(SamplingFields):
    """`sampling_params` of `/generate`, with SGLang's names and defaults."""

    neutral_values: ClassVar = {"spaces_between_special_tokens": (True,)}

    max_new_tokens: int | None = Field(default=None, ge=0, description="128 unless given.")
    min_new_tokens: int = 0
    sampling_seed: int | None = None
    json_schema: str | dict[str, Any] | None = Field(
        default=None, description="A JSON schema for the answer, as an object or as its text."
    )

    def answer_formats(self) -> dict[str, Format]:
        formats = super().answer_formats()
        if self.json_schema is not None:
            schema = self.json_schema
            formats["json_schema"] = json_schema_format(
                schema if isinstance(schema, dict) else parsed_object(schema, "json_schema")
            )
        return formats

    def sampling_params(self, max_new_tokens: int) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            sampling_seed=self.sampling_seed,
            grammar=self.grammar(),
            **self.shared_sampling(),
        )


class GenerateRequest(RequestModel):
    """`POST /generate`. Every chunk of a stream has the usage, which is what `stream_options` ask for elsewhere."""

    neutral_values: ClassVar = {"stream_options": ({"include_usage": True},)}

    text: TextPrompts | None = Field(default=None, description="A prompt or a list of them; or else input_ids.")
    input_ids: TokenPrompts | None = None
    sampling_params: NativeSampling | PerPrompt[NativeSampling] = Field(
        default=NativeSampling(), description="For all prompts, or a list with one for each."
    )
    rid: str | PerPrompt[str] | None = Field(
        default=None, description="The request's id, or a list with one for each prompt."
    )
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = Field(
        default=-1, ge=-1, description="The prompt's token from which on it has logprobs, too; -1: none of it has."
    )
    top_logprobs_num: int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS)
    token_ids_logprob: Annotated[TokenIds, Field(max_length=MAX_NAMED_TOKENS)] = Field(
        default=[], description="Tokens whose logprob is given at every position."
    )
    return_text_in_logprobs: bool = False
    data_parallel_rank: int | None = Field(
        default=None, description="The DP rank to run on; null leaves it to the balancer."
    )
    priority: int | None = Field(default=None, description="Higher goes first, with --enable-priority-scheduling.")

    @model_validator(mode="after")
    def _features_fit_together(self) -> "GenerateRequest":
        if (self.text is None) == (self.input_ids is None):
            raise RequestError("send either text or input_ids", "text")
        for field in ("sampling_params", "rid"):
            value = getattr(self, field)
            if isinstance(value, list) and (not self.is_batch or len(value) != len(self.prompts())):
                raise RequestError(f"{field} is a list of {len(value)}, which is not one for each prompt", field)
        for rid in self.rids():
            if not 1 <= len(rid) <= _MAX_RID_LENGTH:
                raise RequestError(f"rid must have between 1 and {_MAX_RID_LENGTH} characters, got {len(rid)}", "rid")
        if isinstance(self.rid, list) and len(set(self.rid)) < len(self.rid):
            raise RequestError("rid must not name two prompts alike", "rid")
        return self

    @property
    def is_batch(self) -> bool:
        """Whether a list of prompts was sent; the answer is a list then."""
        return is_prompt_list(self._prompts)

    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, however they were written."""
        return prompt_list(self._prompts)

    @property
    def _prompts(self) -> Any:
        return self.text if self.input_ids is None else self.input_ids

    def rids(self) -> list[str]:
        """The ids that were sent, if any."""
        if self.rid is None:
            return []
        return [self.rid] if isinstance(self.rid, str) else self.rid

    def sampling_of(self, prompt: int) -> NativeSampling:
        params = self.sampling_params
        return params[prompt] if isinstance(params, list) else params


class AbortRequest(RequestModel):
    """`POST /abort_request`."""

    rid: str = Field(default="", description="The rid of a native request, or the id of an OpenAI response.")
    abort_all: bool = Field(default=False, description="Abort everything that runs or waits.")

    @model_validator(mode="after")
    def _something_is_named(self) -> "AbortRequest":
        if bool(self.rid) == self.abort_all:
            raise RequestError("send either rid or abort_all", "rid")
        return self


class TokenizeRequest(RequestModel):
    """`POST /v1/tokenize`."""

    model: str = ""
    prompt: TextPrompts
    add_special_tokens: bool = True


class DetokenizeRequest(RequestModel):
    """`POST /v1/detokenize`."""

    model: str = ""
    tokens: TokenPrompts
    skip_special_tokens: bool = True
