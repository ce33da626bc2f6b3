"""Structured output, function calls, cached prefixes and profiles of the served demo model, as clients see them."""

import gzip
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import openai
import psutil
import pytest
from pydantic import BaseModel, Field

from server_process import Server, launch, parallel_flags, wait_until_gone

QUESTION = [{"role": "user", "content": "What is 17 plus 25?"}]


class Sum(BaseModel):
    """Bounded, since the demo model has not learned to end strings."""

    first: Literal[17, 25]
    second: Annotated[str, Field(pattern="^[a-z]{3}$")]
    correct: bool


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    flags = [*parallel_flags(2), "--tool-call-parser", "hermes", "--profiler-dir", str(folder / "profiles")]
    with launch(folder / "log", *flags) as server:
        yield server


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **options: object) -> str:
    answer = client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=600, **options)
    assert answer.choices[0].finish_reason == "stop"
    return answer.choices[0].message.content


def test_the_official_client_parses_its_own_models(client):
    answer = client.chat.completions.parse(model="demo", messages=QUESTION, response_format=Sum, max_tokens=600)
    assert isinstance(answer.choices[0].message.parsed, Sum)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_holds_its_requests_to_their_grammar(client, rank):
    pattern = r"The answer is [0-9]{2}(, surely)?\."
    for temperature in (0, 1):
        text = ask(client, temperature=temperature, extra_body={"regex": pattern, "data_parallel_rank": rank})
        assert re.fullmatch(pattern, text)


def test_grammars_and_free_text_run_side_by_side(client):
    options = [
        {"extra_body": {"regex": "[a-c]{7}"}},
        {},
        {"extra_body": {"ebnf": 'root ::= "yes" | "no"'}},
    ] * 3
    with ThreadPoolExecutor(len(options)) as pool:
        texts = list(pool.map(lambda option: ask(client, temperature=0, **option), options))
    for letters, free, choice in zip(*[iter(texts)] * 3, strict=True):
        assert re.fullmatch("[a-c]{7}", letters)
        assert free == "17 plus 25 is 42."
        assert choice in ("yes", "no")


def test_a_native_request_takes_a_schema_as_an_object_or_as_text(server):
    schema = Sum.model_json_schema()
    for written in (schema, json.dumps(schema)):
        sampling = {"json_schema": written, "max_new_tokens": 600, "temperature": 0}
        Sum.model_validate_json(server.generate(text="17 plus 25", sampling_params=sampling)["text"])


def test_a_grammar_that_can_not_be_compiled_is_a_400_that_names_the_field(client, server):
    with pytest.raises(openai.BadRequestError, match="parenthesis") as caught:
        ask(client, extra_body={"regex": "(a"})
    assert caught.value.body["param"] == "regex"
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError, match="nothing") as caught:
        ask(client, response_format=schema, stream=True)
    assert caught.value.body["param"] == "response_format"


def test_a_function_that_must_be_called_is_called_with_arguments_that_fit(client):
    function = {"name": "add", "parameters": Sum.model_json_schema()}
    answer = client.chat.completions.create(
        model="demo",
        messages=QUESTION,
        tools=[{"type": "function", "function": function}],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=600,
        temperature=0,
    )
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, call.function.name) == ("tool_calls", None, "add")
    Sum.model_validate_json(call.function.arguments)


def test_clients_see_what_was_cached_and_can_flush_it(client, server):
    def ask_again() -> int:
        answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
        return answer.usage.prompt_tokens_details.cached_tokens

    for method in ("GET", "POST"):
        response = server.client.request(method, "/flush_cache")
        assert (response.status_code, "flushed" in response.text) == (200, True)
        assert [ask_again(), ask_again()] == [0, 16]
    sampling = {"max_new_tokens": 1500, "ignore_eos": True}
    with server.client.stream("POST", "/generate", json={"text": "Hi", "sampling_params": sampling, "stream": True}):
        refused = server.client.post("/flush_cache")
        assert refused.status_code == 400
        assert "there are 1" in refused.json()["error"]["message"]


def test_without_the_flag_there_are_no_metrics(server):
    assert server.client.get("/metrics").status_code == 404


@pytest.mark.parametrize("num_steps", [None, 2])
def test_a_profile_has_a_trace_for_each_rank(server, num_steps):
    body = {"output_dir": "mine", "profile_id": f"p{num_steps}", "num_steps": num_steps, "record_shapes": True}
    assert server.client.post("/start_profile", json=body).status_code == 200
    server.generate(text="What is", sampling_params={"max_new_tokens": 4, "ignore_eos": True})
    traces = server.client.post("/stop_profile").json()["traces"]
    assert [Path(trace).name for trace in traces] == [f"p{num_steps}-rank-{rank}.trace.json.gz" for rank in (0, 1)]
    for trace in traces:
        with gzip.open(trace) as file:
            events = json.load(file)["traceEvents"]
        assert any(event["name"].startswith("aten::") for event in events)
    again = server.client.post("/stop_profile")
    assert (again.status_code, again.json()["error"]["message"]) == (400, "no profile was started")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("output_dir", "../elsewhere", "must be inside"),
        ("output_dir", "/tmp", "must be inside"),
        ("activities", ["GPU"], "CPU"),
    ],
)
def test_a_profile_that_can_not_be_is_refused(server, field, value, message):
    answer = server.client.post("/start_profile", json={field: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    assert message in answer.json()["error"]["message"]


def test_one_process_has_compiled_on_trial_and_it_ends_with_the_server(server, client):
    ask(client, extra_body={"regex": "ok"})
    (trial,) = (p for p in psutil.Process(server.process.pid).children() if "grammar trial" in p.name())
    server.process.kill()
    server.process.wait()
    wait_until_gone([trial])
