"""What ends before its time: generations that are aborted, whose client goes away or is too slow; endless bodies."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from fake_engine import BODIES, CHAT, COMPLETIONS, REPLY, Api, FakeEngine, conversation, error_of, sse_events
from nibble.entrypoints.choices import Choice
from nibble.entrypoints.running_requests import RunningRequests
from nibble.generation import GenerationOutput, GenerationRequest
from nibble.sampling_params import SamplingParams
from nibble.utils.errors import EngineDeadError

ROUTES = pytest.mark.parametrize("path", BODIES)


@pytest.fixture
def api() -> Api:
    return Api()


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
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_request_whose_task_is_cancelled_by_the_stopping_server_is_told_so(api, path, stream):
    """The last resort of uvicorn, which used to send a plain-text 500."""
    sent: list[dict[str, Any]] = []

    async def ask_until_the_server_stops() -> None:
        asking = asyncio.create_task(conversation(api, path, {**BODIES[path], "stream": stream}, sent))
        await until(lambda: api.engine.requests)
        await asyncio.sleep(0.005)
        asking.cancel()
        await asking

    api.engine.hang_after = 0
    api.run(ask_until_the_server_stops())
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"])["error"]["code"] == "engine_dead"
    assert len(api.engine.cut_short) == 1


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


def test_everything_that_runs_can_be_aborted_at_once(api):
    async def ask_and_abort() -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        asking = [
            asyncio.create_task(conversation(api, "/generate", {"text": "Hi", "rid": rid}, sent)) for rid in ("a", "b")
        ]
        await until(lambda: len(api.engine.requests) == 2)
        async with api.http_client() as client:
            response = await client.post("/abort_request", json={"abort_all": True})
            assert response.json() == {"aborted": True}
        await asyncio.gather(*asking)
        return [json.loads(message["body"]) for message in sent if message.get("body")]

    api.engine.hang_after = 2
    answers = api.run(ask_and_abort())
    assert [answer["meta_info"]["finish_reason"]["type"] for answer in answers] == ["abort"] * 2
    assert api.result("/abort_request", {"abort_all": True}) == {"aborted": False}


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
