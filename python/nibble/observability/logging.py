"""One line a record, as text or JSON, with the process it comes from and the request it belongs to.

A record's `extra={"fields": {...}}` become members of the JSON object, and `name=value` at the end of a line of text.
"""

import json
import logging
import re
import sys
from typing import Any

from nibble.observability.request_context import current_request

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def configure_logging(level: str, process: str, log_format: str) -> None:
    """Logs of this process go to standard error, marked with `process` ("server", "rank 0", …).

    `log_format` is "text" or "json".
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter((JsonFormatter if log_format == "json" else TextFormatter)(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class TextFormatter(logging.Formatter):
    """`12:00:00 server INFO nibble: message name=value`. What a client sent can't begin a new line."""

    default_time_format = "%H:%M:%S"
    default_msec_format = ""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        message = _CONTROL.sub(_escaped, record.getMessage())
        fields = "".join(f" {name}={_plain(value)}" for name, value in _fields(record).items())
        line = f"{self.formatTime(record)} {self._process} {record.levelname} {record.name}: {message}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (ISO 8601), level, process, logger, message, request_id, and the fields."""

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03d"

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    context = current_request.get()
    request = {} if context is None else {"request_id": context.request_id}
    return {**request, **getattr(record, "fields", {})}


def _plain(value: Any) -> str:
    """A word as it is, anything else as JSON in ASCII, so that no value can pass for two."""
    if isinstance(value, str) and re.fullmatch(r"[\w.:/+@-]+", value, re.ASCII):
        return value
    return json.dumps(value)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
