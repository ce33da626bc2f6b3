"""The server around the routes: health, keys, limits, aborts, and clients that go away."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
import uvicorn
from starlette.types import Send

from fake_engine import REPLY, Api, FakeEngine, error_of, sse_events
from nibble.entrypoints.choices import Choice
from nibble.entrypoints.prompts import PromptEncoder
from nibble.entrypoints.running_requests import RunningRequests
from nibble.generation import GenerationOutput, GenerationRequest
from nibble.sampling_params import SamplingParams
from nibble.tokenizer.tokenizer import Tokenizer
from nibble.utils.errors import EngineDeadError, RequestError
from tiny_tokenizer import byte_level_tokenizer

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hi"},
    CHAT: {"messages": HELLO},
    "/generate": {"text": "Hi"},
}
ROUTES = pytest.mark.parametrize("path", BODIES)


@pytest.fixture
def api() -> Api:
    return Api()


# Health and information


@pytest.mark.parametrize(
    ("state", "health", "ready", "work"),
    [("ready", 200, 200, 200), ("starting", 200, 503, 503), ("draining", 200, 503, 503), ("dead", 503, 503, 503)],
)
def test_each_state_of_the_engine_shows(api, state, health, ready, work):
    api.engine.current_state = state
    assert api.get("/health").status_code == health
    assert api.get("/ready").status_code == ready
    assert api.get("/health_generate").status_code == ready
    for path, body in BODIES.items():
        assert api.post(path, body).status_code == work
        assert api.post(path, {**body, "stream": True}).status_code == work


def test_overload_tells_when_to_retry_and_death_does_not(api):
    api.engine.current_state = "draining"
    response = api.post(COMPLETIONS, {"prompt": "Hi"})
    assert (response.headers["retry-after"], error_of(response)["code"]) == ("1", "overloaded")
    assert api.get("/ready").headers["retry-after"] == "1"
    api.engine.current_state = "dead"
    response = api.post(COMPLETIONS, {"prompt": "Hi"})
    assert "retry-after" not in response.headers
    assert error_of(response)["code"] == "engine_dead"


def test_health_is_cheap_and_health_generate_generates_one_token(api):
    api.get("/health")
    assert not api.engine.requests
    api.get("/health_generate")
    (request,) = api.engine.requests
    assert (request.sampling.max_new_tokens, request.sampling.temperature) == (1, 0)


def test_health_generate_fails_when_the_generation_does(api):
    api.engine.fail_after = 0
    assert api.get("/health_generate").status_code == 503
    api.engine.failure = EngineDeadError("rank 1 died")
    assert api.get("/health_generate").status_code == 503


def test_health_generate_gives_up_after_a_while(api, monkeypatch):
    monkeypatch.setattr("nibble.entrypoints.server_routes.HEALTH_TIMEOUT_S", 0.01)
    api.engine.hang_after = 0
    assert api.get("/health_generate").status_code == 503
    assert len(api.engine.cut_short) == 1


@pytest.mark.parametrize("prefix", ["/", "/get_"])
def test_information_is_found_under_its_old_and_new_names(api, prefix):
    assert api.get(f"{prefix}model_info").json() == api.engine.model_info()
    assert api.get(f"{prefix}server_info").json() == api.engine.server_info()


# Errors of HTTP itself


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/models/", "/v1/completions/", "/docs", "/generate/../x", "/%ff"])
def test_unknown_paths_are_404_in_the_usual_form(api, path):
    response = api.get(path)
    assert response.status_code == 404
    assert error_of(response)["code"] in ("not_found", "model_not_found")


@pytest.mark.parametrize(("method", "path"), [("GET", COMPLETIONS), ("DELETE", CHAT), ("POST", "/health")])
def test_wrong_methods_are_405_in_the_usual_form(api, method, path):
    response = api.request(method, path)
    assert response.status_code == 405
    assert error_of(response)["code"] == "method_not_allowed"
    assert response.headers["allow"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused_while_it_is_read(chunked):
    api = Api(max_request_bytes=1000)
    chunks_read = 0

    async def chunks() -> AsyncGenerator[bytes, None]:
        nonlocal chunks_read
        for _ in range(100):
            chunks_read += 1
            yield b"x" * 100

    content = chunks() if chunked else b"x" * 1001
    response = api.request("POST", COMPLETIONS, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 413
    error = error_of(response)
    assert (error["code"], "1000 bytes" in error["message"]) == ("request_too_large", True)
    assert chunks_read <= 11, "what comes after the limit is not read"


def test_a_body_at_the_limit_is_served():
    body = b'{"prompt": "Hi"}'
    api = Api(max_request_bytes=len(body))
    headers = {"content-type": "application/json"}
    assert api.request("POST", COMPLETIONS, content=body, headers=headers).status_code == 200
    assert api.request("POST", COMPLETIONS, content=body + b" ", headers=headers).status_code == 413


def test_unforeseen_errors_are_500_without_details(api):
    async def ask() -> list[dict[str, Any]]:
        with contextlib.suppress(KeyError):
            await conversation(api, COMPLETIONS, {"prompt": "Hi"}, sent)
        return sent

    sent: list[dict[str, Any]] = []
    api.engine.fail_after, api.engine.failure = 0, KeyError("secret path")
    api.run(ask())
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"])["error"]["message"] == "internal server error"


# Access


def all_routes(api: Api) -> list[tuple[str, str]]:
    paths = api.app.openapi()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


@pytest.mark.parametrize(
    "authorization",
    [None, "Bearer wrong", "Bearer", "Bearer ", "Basic c2VjcmV0", "secret", "Bearer secret2", "Bearer \xff"],
)
def test_with_a_key_every_route_but_the_probes_needs_it(authorization):
    api = Api(api_key="secret")
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    routes = [*all_routes(api), ("GET", "/get_server_info"), ("GET", "/openapi.json"), ("GET", "/unknown")]
    assert len(routes) > 12
    for method, path in routes:
        response = api.request(method, path, headers=headers)
        if path in ("/health", "/ready"):
            assert response.status_code == 200
        else:
            assert response.status_code == 401, path
            assert error_of(response)["code"] == "invalid_api_key"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_the_key_opens_every_route(scheme):
    api = Api(api_key="sécret")
    headers = {"authorization": f"{scheme} sécret".encode()}
    for method, path in all_routes(api):
        assert api.request(method, path, headers=headers).status_code != 401
    assert api.post(COMPLETIONS, {"prompt": "Hi"}, headers=headers).status_code == 200


# Aborts


async def conversation(
    api: Api,
    path: str,
    body: dict[str, Any],
    sent: list[dict[str, Any]],
    leave: asyncio.Event | None = None,
    send: Send | None = None,
) -> None:
    """One request, spoken in ASGI; the client disconnects once `leave` is set."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "server": ("test", 80),
        "client": ("test", 1),
        "scheme": "http",
        "root_path": "",
    }
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await (leave or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def keep(message: Any) -> None:
        sent.append(message)

    await api.app(scope, receive, send or keep)


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@ROUTES
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("tokens_before", [0, 2])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_disconnects_has_its_generations_aborted(api, path, stream, tokens_before, n):
    async def ask_and_leave() -> None:
        leave = asyncio.Event()
        sampling = {"sampling_params": {"n": n}} if path == "/generate" else {"n": n}
        asking = asyncio.create_task(conversation(api, path, {**BODIES[path], "stream": stream, **sampling}, [], leave))
        await until(lambda: len(api.engine.requests) == n)
        await asyncio.sleep(0.005)
        leave.set()
        await asking

    api.engine.hang_after = tokens_before
    api.run(ask_and_leave())
    assert sorted(api.engine.cut_short) == sorted(request.request_id for request in api.engine.requests)
    assert len(api.engine.cut_short) == n


@ROUTES
def test_a_client_that_disconnects_while_it_is_too_slow_to_read_has_its_generation_aborted(api, path):
    async def ask_read_two_events_and_leave() -> list[str]:
        leave = asyncio.Event()
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) > 2:
                leave.set()
                await asyncio.Event().wait()

        await conversation(api, path, {**BODIES[path], "stream": True}, sent, leave, send)
        return list(api.engine.cut_short)

    assert api.run(ask_read_two_events_and_leave()) == [api.engine.requests[0].request_id]


def test_a_finished_request_is_not_aborted(api):
    for path, body in BODIES.items():
        api.post(path, body)
        api.post(path, {**body, "stream": True})
    assert len(api.engine.requests) == 6
    assert not api.engine.cut_short


def abort_while_running(api: Api, path: str, body: dict[str, Any], rid: str | None = None) -> list[dict[str, Any]]:
    """Starts a request, aborts it by `rid` or by the id in its first event, and returns what was sent to its client."""
    sent: list[dict[str, Any]] = []

    async def ask_and_abort() -> None:
        asking = asyncio.create_task(conversation(api, path, body, sent))
        await until(lambda: len(sent) >= 2 or (api.engine.requests and not body.get("stream")))
        await asyncio.sleep(0.005)
        client_id = rid or json.loads(sent[1]["body"].removeprefix(b"data: "))["id"]
        async with api.http_client() as client:
            response = await client.post("/abort_request", json={"rid": client_id})
            assert response.json() == {"aborted": True}
        await asking

    api.engine.hang_after = 2
    api.run(ask_and_abort())
    return sent


def test_an_aborted_request_is_answered_with_what_it_has(api):
    sent = abort_while_running(api, "/generate", {"text": "Hi", "rid": "mine"}, "mine")
    assert sent[0]["status"] == 200
    answer = json.loads(sent[1]["body"])
    assert answer["meta_info"]["finish_reason"] == {"type": "abort", "message": "aborted by the client"}
    assert answer["meta_info"]["completion_tokens"] == 2


def test_aborting_a_request_aborts_all_its_generations(api):
    body = {"text": ["Hi", "Ho"], "rid": "mine", "sampling_params": {"n": 2}}
    sent = abort_while_running(api, "/generate", body, "mine")
    assert [answer["meta_info"]["finish_reason"]["type"] for answer in json.loads(sent[1]["body"])] == ["abort"] * 4


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_openai_stream_is_aborted_by_the_id_of_its_chunks(api, path):
    sent = abort_while_running(api, path, {**BODIES[path], "stream": True})
    *chunks, done = sse_events(b"".join(message.get("body", b"") for message in sent).decode())
    assert done == "[DONE]"
    assert json.loads(chunks[-1])["choices"][0]["finish_reason"] == "abort"


def test_one_of_several_ids_aborts_its_own_prompt_only(api):
    async def ask_and_abort() -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        body = {"text": ["Hi", "Ho"], "rid": ["a", "b"]}
        asking = asyncio.create_task(conversation(api, "/generate", body, sent))
        await until(lambda: len(api.engine.requests) == 2)
        for rid in ("a", "b"):
            await asyncio.sleep(0.005)
            assert not asking.done()
            async with api.http_client() as client:
                await client.post("/abort_request", json={"rid": rid})
        await asking
        return sent

    api.engine.hang_after = 2
    answers = json.loads(api.run(ask_and_abort())[1]["body"])
    assert [answer["meta_info"]["id"] for answer in answers] == ["a", "b"]


def test_aborting_what_does_not_run_is_no_error(api):
    assert api.result("/abort_request", {"rid": "unknown"}) == {"aborted": False}


def test_an_id_may_be_used_again_but_not_twice_at_once(api):
    body = {"text": "Hi", "rid": "mine"}

    async def ask_twice() -> None:
        leave = asyncio.Event()
        asking = asyncio.create_task(conversation(api, "/generate", body, [], leave))
        await until(lambda: api.engine.requests)
        async with api.http_client() as client:
            response = await client.post("/generate", json=body)
        assert (response.status_code, error_of(response)["param"]) == (400, "rid")
        leave.set()
        await asking

    api.engine.hang_after = 2
    api.run(ask_twice())
    api.engine.hang_after = None
    assert api.result("/generate", body)["text"] == REPLY
    assert api.result("/generate", body)["text"] == REPLY


def test_a_slow_client_gets_the_latest_snapshot_instead_of_every_one():
    """So that nothing piles up behind it."""
    engine = FakeEngine()
    requests = [GenerationRequest(name, [1], SamplingParams()) for name in "ab"]

    async def read_slowly() -> dict[int, list[GenerationOutput]]:
        seen: dict[int, list[GenerationOutput]] = {0: [], 1: []}
        async for index, output in RunningRequests(engine).stream([Choice("x", request) for request in requests]):
            seen[index].append(output)
            for _ in range(10):
                await asyncio.sleep(0)
        return seen

    for outputs in asyncio.run(read_slowly()).values():
        assert len(outputs) < outputs[-1].completion_tokens / 4
        assert outputs[-1].text == REPLY
        assert outputs[-1].finish_reason is not None


def test_a_failure_is_reported_even_when_all_else_has_finished():
    engine = FakeEngine()
    engine.fail_after, engine.failing_suffix, engine.failure = 1, "bad", EngineDeadError("rank 1 died")
    lengths = {"good": 1, "bad": 2}
    requests = [GenerationRequest(name, [1], SamplingParams(max_new_tokens=length)) for name, length in lengths.items()]

    async def read_slowly() -> None:
        async for _ in RunningRequests(engine).stream([Choice("x", request) for request in requests]):
            await asyncio.sleep(0.01)

    with pytest.raises(EngineDeadError):
        asyncio.run(read_slowly())


# Prompts


class SlowTokenizer(Tokenizer):
    """Renders long conversations until it is released."""

    def __init__(self) -> None:
        super().__init__(byte_level_tokenizer())
        self.released = threading.Event()

    def render_chat_template(self, messages: Any, variables: Any = None) -> str:
        if len(messages[0]["content"]) > 5000:
            self.released.wait()
        return super().render_chat_template(messages, variables)


def test_a_long_prompt_does_not_keep_others_waiting():
    tokenizer = SlowTokenizer()
    encoder = PromptEncoder(tokenizer)

    async def encode_both() -> None:
        long = asyncio.create_task(encoder.encode_chat([{"role": "user", "content": "x" * 10_000}], {}))
        await asyncio.sleep(0.005)
        await encoder.encode_chat(HELLO, {})
        assert not long.done()
        tokenizer.released.set()
        assert len(await long) > 1000

    asyncio.run(encode_both())
    encoder.close()


def test_rendering_a_template_has_a_time_limit():
    tokenizer = SlowTokenizer()
    encoder = PromptEncoder(tokenizer, template_timeout_s=0.01)
    with pytest.raises(RequestError, match=r"took longer than 0.01 s"):
        asyncio.run(encoder.encode_chat([{"role": "user", "content": "x" * 10_000}], {}))
    tokenizer.released.set()
    encoder.close()


# The schema


def test_the_openapi_schema_describes_every_body(api):
    schema = api.get("/openapi.json").json()
    bodies = {
        path: route["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
        for path, route in schema["paths"].items()
        if "post" in route
    }
    assert bodies == {
        COMPLETIONS: "CompletionRequest",
        CHAT: "ChatCompletionRequest",
        "/generate": "GenerateRequest",
        "/abort_request": "AbortRequest",
        "/v1/tokenize": "TokenizeRequest",
        "/v1/detokenize": "DetokenizeRequest",
    }
    chat = schema["components"]["schemas"]["ChatCompletionRequest"]
    assert chat["required"] == ["messages"]
    assert chat["properties"]["temperature"]["default"] == 1.0
    responses = [route["responses"] for methods in schema["paths"].values() for route in methods.values()]
    assert all("default" in response and "422" not in response for response in responses)


# Over a real socket


@pytest.fixture
def address(api: Api) -> Iterator[tuple[str, int]]:
    server = uvicorn.Server(uvicorn.Config(api.app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join()


def raw_request(path: str, body: bytes, *headers: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "host: test", "content-type: application/json", *headers, "", ""]
    return "\r\n".join(head).encode() + body


@pytest.mark.parametrize("stream", [False, True])
def test_closing_the_connection_aborts_the_generation(api, address, stream):
    api.engine.hang_after = 3
    body = json.dumps({"prompt": "Hi", "stream": stream}).encode()
    with socket.create_connection(address) as connection:
        connection.sendall(raw_request(COMPLETIONS, body, f"content-length: {len(body)}"))
        if stream:
            assert b"text/event-stream" in connection.recv(4096)
        while not api.engine.requests:
            time.sleep(0.001)
    while not api.engine.cut_short:
        time.sleep(0.001)
    assert api.engine.cut_short == [api.engine.requests[0].request_id]


def test_an_endless_body_is_cut_off_at_the_limit(api, address):
    api.app.state.max_request_bytes = 10_000
    with socket.create_connection(address) as connection:
        connection.sendall(raw_request(COMPLETIONS, b"", "transfer-encoding: chunked"))
        with contextlib.suppress(ConnectionError):
            for _ in range(20):
                connection.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        assert b"413" in connection.recv(4096)
