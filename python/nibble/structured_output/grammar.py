"""What an answer must look like: one grammar, written as an xgrammar structural tag."""

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from nibble.utils.errors import RequestError

MAX_GRAMMAR_BYTES = 64 * 2**10
MAX_WHITESPACE = 32
"""Characters between two tokens of JSON: deep enough an indent, and no model is caught in endless lines."""

Format = dict[str, Any]
"""A part of a structural tag, see https://xgrammar.mlc.ai/docs/structural_tag/structural_tag_api.html."""


class Grammar(msgspec.Struct, frozen=True):
    """`field` is the request's parameter that asked for it, which errors name."""

    structural_tag: str
    field: str

    @property
    def key(self) -> str:
        """The same for grammars that are compiled to the same."""
        return hashlib.sha256(self.structural_tag.encode()).hexdigest()


def make_grammar(content: Format, field: str) -> Grammar:
    """Raises RequestError when it is larger than a grammar may be."""
    try:
        structural_tag = orjson.dumps({"type": "structural_tag", "format": content}).decode()
    except orjson.JSONEncodeError as error:
        raise RequestError(f"{field} is nested too deeply: {error}", field) from None
    if len(structural_tag) > MAX_GRAMMAR_BYTES:
        raise RequestError(
            f"{field} makes a grammar of {len(structural_tag)} bytes, more than the limit of {MAX_GRAMMAR_BYTES}", field
        )
    return Grammar(structural_tag, field)


def json_schema_format(schema: dict[str, Any] | bool) -> Format:
    """JSON that fits the schema. An object has the properties that its schema names, in that order, and others only
    where `additionalProperties` allows them."""
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MAX_WHITESPACE}


def regex_format(pattern: str) -> Format:
    return {"type": "regex", "pattern": pattern}


def ebnf_format(grammar: str) -> Format:
    """GBNF, whose first symbol is `root`."""
    return {"type": "grammar", "grammar": grammar}


def text_format() -> Format:
    return {"type": "any_text"}


def tag_format(begin: str, content: Format, end: str | list[str]) -> Format:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def sequence_format(parts: Sequence[Format]) -> Format:
    return {"type": "sequence", "elements": list(parts)}


def optional_format(content: Format) -> Format:
    return {"type": "optional", "content": content}
