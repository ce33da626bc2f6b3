"""The server around the routes: health, keys, limits, prompts and the schema."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncGenerator
from typing import Any

import jsonschema_rs
import pytest

from fake_engine import BODIES, CHAT, COMPLETIONS, HELLO, Api, conversation, error_of
from nibble.entrypoints.prompts import PromptEncoder
from nibble.observability.metrics import EngineMetrics
from nibble.tokenizer.tokenizer import Tokenizer
from nibble.utils.errors import EngineDeadError, RequestError
from tiny_tokenizer import byte_level_tokenizer


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


# The prefix cache


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_cache_is_flushed(api, method):
    response = api.request(method, "/flush_cache")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    assert "flushed" in response.text
    assert api.engine.num_flushes == 1


def test_the_cache_is_not_flushed_while_requests_run(api):
    async def flush_meanwhile() -> Any:
        leave = asyncio.Event()
        running = asyncio.create_task(conversation(api, COMPLETIONS, {"prompt": "Hi"}, [], leave))
        while not api.engine.requests:
            await asyncio.sleep(0)
        async with api.http_client() as client:
            response = await client.post("/flush_cache")
        leave.set()
        await running
        return response

    api.engine.hang_after = 1
    response = api.run(flush_meanwhile())
    assert response.status_code == 400
    assert error_of(response)["message"] == "1 requests run or wait"
    assert api.engine.num_flushes == 0


@pytest.mark.parametrize("state", ["starting", "draining", "dead"])
def test_the_cache_is_flushed_only_when_the_engine_is_ready(api, state):
    api.engine.current_state = state
    assert api.post("/flush_cache", {}).status_code == 503


# Errors of HTTP itself


@pytest.mark.parametrize("path", ["/v1", "/v1/models/", "/v1/completions/", "/docs", "/generate/../x", "/%ff"])
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
            assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_the_key_opens_every_route(scheme):
    api = Api(api_key="sécret")
    headers = {"authorization": f"{scheme} sécret".encode()}
    for method, path in all_routes(api):
        assert api.request(method, path, headers=headers).status_code != 401
    assert api.post(COMPLETIONS, {"prompt": "Hi"}, headers=headers).status_code == 200


# Prompts


class SlowTokenizer(Tokenizer):
    """Renders long conversations until it is released."""

    def __init__(self) -> None:
        super().__init__(byte_level_tokenizer())
        self.released = threading.Event()

    def render_chat_template(self, messages: Any, variables: Any = None, tools: Any = ()) -> str:
        if len(messages[0]["content"]) > 5000:
            self.released.wait()
        return super().render_chat_template(messages, variables, tools)


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


def test_a_prompt_of_too_many_bytes_is_refused_by_the_name_of_its_field():
    encoder = PromptEncoder(Tokenizer(byte_level_tokenizer(), max_prompt_bytes=20))
    for prompt, field in (
        (encoder.encode(["Hi", "x" * 21], "text"), "text"),
        (encoder.encode_chat(HELLO, {}), "messages"),
    ):
        with pytest.raises(RequestError, match="more than the limit of 20") as error:
            asyncio.run(prompt)
        assert error.value.field == field
    encoder.close()


# The schema


def test_the_openapi_schema_describes_every_body(api):
    schema = api.get("/openapi.json").json()
    bodies = {
        path: route["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
        for path, route in schema["paths"].items()
        if "requestBody" in route.get("post", {}) and path != "/start_profile"  # whose body may be left out
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


EDGES: list[tuple[str, list[Any], list[Any]]] = [
    ("temperature", [0, 100], [-0.1, 100.1]),
    ("top_p", [0.01, 1], [0, 1.1]),
    ("top_k", [-1, 1], [-2, 0]),
    ("min_p", [0, 1], [-0.1, 1.1]),
    ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
    ("presence_penalty", [-2, 2], [-2.1, 2.1]),
    ("repetition_penalty", [0.01, 2], [0, 2.1]),
    ("n", [1, 128], [0, 129]),
    ("max_new_tokens", [0, 1], [-1]),
    ("min_new_tokens", [0, 1], [-1]),
    ("stop", ["x", [], ["x"] * 64], ["", "x" * 1025, ["x"] * 65]),
    ("stop_regex", ["x", [], ["x"] * 64], ["", "x" * 1025, ["x"] * 65]),
    ("stop_token_ids", [[], [1] * 64], [[1] * 65]),
    ("logit_bias", [{}, {"1": 100}, {"2": -100}], [{"x": 1}, {"1": 100.1}, {"1": -101}]),
]


@pytest.mark.parametrize(
    ("field", "inside", "outside"), EDGES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_openapi_schema_has_the_limits_of_sampling(api, field, inside, outside):
    schema = api.app.openapi()["components"]["schemas"]["NativeSampling"]
    for value in inside + outside:
        body = {"text": "Hi", "sampling_params": {field: value}}
        assert api.post("/generate", body).status_code == (200 if value in inside else 400), value
        assert jsonschema_rs.is_valid(schema, {field: value}) == (value in inside), value


def test_the_openapi_schema_names_the_types_of_answers_as_they_come():
    api = Api(metrics=EngineMetrics("tiny/model", 2, fp4_allgather=True))
    bodies = BODIES | {
        "/abort_request": {"rid": "x"},
        "/v1/tokenize": {"prompt": "Hi"},
        "/v1/detokenize": {"tokens": [1]},
    }
    for method, path in all_routes(api):
        answers = [api.request(method, path.format(model_id="tiny/model"), json=bodies.get(path))]
        if path in BODIES:
            answers.append(api.post(path, {**BODIES[path], "stream": True}))
        assert {answer.status_code for answer in answers} == {200}, f"{method} {path}"
        told = api.app.openapi()["paths"][path][method.lower()]["responses"]["200"]["content"]
        assert told.keys() == {answer.headers["content-type"].partition(";")[0] for answer in answers}


def test_the_openapi_schema_names_the_errors_of_every_route_as_they_come(api):
    schema = api.get("/openapi.json").json()
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            responses = operation["responses"]
            assert responses.keys() == {"200", "4XX", "5XX"}, f"{method} {path}"
            for status in ("4XX", "5XX"):
                content = responses[status]["content"]["application/json"]["schema"]
                assert content == {"$ref": "#/components/schemas/ErrorResponse"}
    sent = api.error("/generate", {})
    assert sent.keys() == schema["components"]["schemas"]["ErrorDetail"]["properties"].keys()
