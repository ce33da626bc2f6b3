"""What is logged of requests, and the id by which a request is found again."""

import asyncio
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest

from fake_engine import BODIES, CHAT, COMPLETIONS, Api, FakeEngine, conversation
from nibble.observability.logging import JsonFormatter, TextFormatter
from nibble.utils.errors import EngineDeadError

HEADER = "x-request-id"
ROUTES = pytest.mark.parametrize("path", BODIES)
FORMATS = pytest.mark.parametrize("formatter", [TextFormatter, JsonFormatter])
HOSTILE = 'x"\n12:00:00 server INFO nibble: ready \x1b[31m\x00\u2028\x9b ü \U0001f600 request_id=forged'

Capture = Callable[[type[logging.Formatter]], io.StringIO]


@pytest.fixture
def capture() -> Iterator[Capture]:
    """Logs, formatted, in a buffer."""
    logger = logging.getLogger("nibble")
    handlers: list[logging.Handler] = []

    def start(formatter: type[logging.Formatter]) -> io.StringIO:
        buffer = io.StringIO()
        handlers.append(logging.StreamHandler(buffer))
        handlers[-1].setFormatter(formatter("server"))  # type: ignore[arg-type]
        logger.addHandler(handlers[-1])
        logger.setLevel("DEBUG")
        return buffer

    yield start
    for handler in handlers:
        logger.removeHandler(handler)
    logger.setLevel("NOTSET")


@pytest.fixture
def logged(capture) -> Callable[[], list[dict[str, Any]]]:
    buffer = capture(JsonFormatter)
    return lambda: [json.loads(line) for line in buffer.getvalue().splitlines()]


def of(lines: list[dict[str, Any]], message: str) -> dict[str, Any]:
    (line,) = [line for line in lines if line["message"] == message]
    return line


# The id


@ROUTES
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_the_id_that_its_client_sent(path, stream):
    api = Api()
    response = api.post(path, {**BODIES[path], "stream": stream}, headers={HEADER: "trace-1"})
    assert response.headers[HEADER] == "trace-1"
    assert all("trace-1" in request.request_id for request in api.engine.requests)


@ROUTES
def test_or_else_one_of_its_own_which_the_ranks_see_too(path):
    api = Api()
    ids = [api.post(path, BODIES[path]).headers[HEADER] for _ in range(2)]
    assert ids[0] != ids[1]
    assert all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in ids)
    assert [request_id in request.request_id for request_id, request in zip(ids, api.engine.requests, strict=True)]


def test_the_rid_is_the_id_where_no_header_brings_one():
    api = Api()
    assert api.post("/generate", {"text": "Hi", "rid": "mine"}).headers[HEADER] == "mine"
    assert api.post("/generate", {"text": "Hi", "rid": "mine"}, headers={HEADER: "its"}).headers[HEADER] == "its"
    assert [request.request_id for request in api.engine.requests] == ["mine", "mine"]


@pytest.mark.parametrize("field", ["header", "rid"])
def test_an_id_is_bounded_and_holds_nothing_unusual(field):
    sent = "a b\tü<script>" + "x" * 200
    if field == "header":
        response = Api().post("/generate", {"text": "Hi"}, headers={HEADER: sent.encode("latin-1")})
    else:
        response = Api().post("/generate", {"text": "Hi", "rid": sent})
    assert response.headers[HEADER] == ("a_b__" + "_script_" + "x" * 200)[:128]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/health", 200), ("GET", "/nowhere", 404), ("POST", "/generate", 400)]
)
def test_every_answer_has_an_id(method, path, status):
    response = Api().request(method, path, headers={HEADER: "trace-1"})
    assert (response.status_code, response.headers[HEADER]) == (status, "trace-1")
    refused = Api(api_key="secret").post("/generate", {"text": "Hi"}, headers={HEADER: "trace-1"})
    assert (refused.status_code, refused.headers[HEADER]) == (401, "trace-1")


def test_what_nobody_foresaw_is_a_500_that_the_log_knows_by_its_id(logged):
    engine = FakeEngine()
    engine.fail_after, engine.failure = 1, ZeroDivisionError("a bug")
    response = Api(engine).post("/generate", {"text": "Hi"}, headers={HEADER: "trace-1"})
    assert (response.status_code, response.headers[HEADER]) == (500, "trace-1")
    assert "a bug" not in response.text
    (line,) = logged()
    assert (line["level"], line["request_id"]) == ("error", "trace-1")
    assert "ZeroDivisionError: a bug" in line["exception"]


@ROUTES
def test_requests_with_the_same_header_do_not_stand_in_each_others_way(path):
    api = Api()

    async def ask_together() -> list[list[dict[str, Any]]]:
        answers: list[list[dict[str, Any]]] = [[], []]
        async with api.http_client() as client:
            asking = [client.post(path, json=BODIES[path], headers={HEADER: "trace-1"}) for _ in answers]
            return [response.status_code for response in await asyncio.gather(*asking)]

    assert api.run(ask_together()) == [200, 200]


# The log


def test_requests_are_not_logged_unless_asked_for(logged):
    Api().result("/generate", {"text": "Hi"})
    assert logged() == []


@ROUTES
def test_a_generation_is_logged_when_it_comes_and_when_it_ends(logged, path):
    api = Api(log_requests_level=0)
    api.post(path, BODIES[path], headers={HEADER: "trace-1"})
    lines = logged()
    assert {line["request_id"] for line in lines} == {"trace-1"}
    (request,) = api.engine.requests
    assert (
        of(lines, "generation received").items()
        >= {
            "generation": request.request_id,
            "prompt_tokens": len(request.input_ids),
        }.items()
    )
    end = of(lines, "generation finished")
    reason = "length" if path == COMPLETIONS else "stop"
    assert end.items() >= {"generation": request.request_id, "finish_reason": reason, "cached_tokens": 3}.items()
    assert end["completion_tokens"] > 0
    assert 0 < end["time_to_first_token"] <= end["e2e_latency"]
    assert of(lines, "answered").items() >= {"method": "POST", "path": path, "status": 200}.items()


@pytest.mark.parametrize("level", range(4))
def test_each_level_shows_what_the_one_before_shows_and_more(logged, level):
    long = "Hello world, " * 1000
    engine = FakeEngine(reply=long)
    engine.context_length = 100_000
    sampling = {"max_new_tokens": 30_000, "top_k": 5}
    text = Api(engine, log_requests_level=level).result("/generate", {"text": long, "sampling_params": sampling})[
        "text"
    ]
    received, finished = (of(logged(), f"generation {what}") for what in ("received", "finished"))
    assert ("sampling" in received) == (level >= 1)
    assert level < 1 or received["sampling"]["top_k"] == 5
    assert ("prompt" in received) == ("text" in finished) == (level >= 2)
    if level == 2:
        assert long.startswith(received["prompt"].rstrip("…")) and len(received["prompt"]) < len(long)
        assert finished["text"] == text[:2048] + "…"
    if level == 3:
        assert (received["prompt"], finished["text"]) == (long, text)


def test_ends_that_are_no_finish_are_logged_with_their_reason(logged):
    api = Api(log_requests_level=0)
    api.engine.fail_after, api.engine.failure = 1, EngineDeadError("a rank died")
    api.error("/generate", {"text": "Hi"}, 503)
    api.engine.current_state = "draining"
    api.error("/generate", {"text": "Hi"}, 503)
    api.engine.current_state, api.engine.fail_after, api.engine.hang_after = "ready", None, 1

    async def ask_and_leave() -> None:
        leave = asyncio.Event()
        asking = asyncio.create_task(conversation(api, CHAT, {**BODIES[CHAT], "stream": True}, [], leave))
        for _ in range(20):
            await asyncio.sleep(0.001)
        leave.set()
        await asking

    api.run(ask_and_leave())
    ends = [line["finish_reason"] for line in logged() if line["message"] == "generation finished"]
    assert ends == ["error", "refused", "abort"]


def test_probes_are_not_logged(logged):
    api = Api(log_requests_level=0)
    for path in ("/health", "/ready", "/metrics"):
        api.get(path)
    assert logged() == []


# The lines


@FORMATS
def test_nothing_that_a_client_sends_can_begin_a_line_or_reach_a_terminal(capture, formatter):
    buffer = capture(formatter)
    api = Api(log_requests_level=3)
    api.post("/generate", {"text": HOSTILE, "rid": HOSTILE}, headers={HEADER: b"a\xff b"})
    api.get("/" + quote(HOSTILE))
    logging.getLogger("nibble").warning("refused: %s", HOSTILE)
    lines = buffer.getvalue().split("\n")
    assert lines.pop() == "" and len(lines) == 5
    assert all(line.isprintable() for line in lines)
    if formatter is JsonFormatter:
        assert all(json.loads(line)["process"] == "server" for line in lines)
        assert json.loads(lines[0])["prompt"] == HOSTILE
        assert json.loads(lines[-1])["message"] == f"refused: {HOSTILE}"
    else:
        assert all(re.match(r"\d\d:\d\d:\d\d server [A-Z]+ nibble\S*: ", line) for line in lines)
        assert lines[0].count(" request_id=") - lines[0].count(" request_id=forged") == 1


def test_a_line_of_text_has_its_fields_behind_the_message(capture):
    buffer = capture(TextFormatter)
    fields = {"a": 1, "b": "two", "c": "three four", "d": [5, None]}
    logging.getLogger("nibble.x").info("hello %s", "you", extra={"fields": fields})
    line = buffer.getvalue()
    assert line.endswith(' server INFO nibble.x: hello you a=1 b=two c="three four" d=[5, null]\n')


@FORMATS
def test_exceptions_are_part_of_their_record(capture, formatter):
    buffer = capture(formatter)
    try:
        raise ValueError("because")
    except ValueError:
        logging.getLogger("nibble").exception("it failed")
    text = buffer.getvalue()
    assert "it failed" in text and "Traceback" in text and "ValueError: because" in text
    assert formatter is TextFormatter or len(text.splitlines()) == 1
