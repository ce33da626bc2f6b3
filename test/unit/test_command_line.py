"""The `nibble` command, its options and where they may come from."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from fake_engine import REPLY, Api
from nibble.cli import main as cli
from nibble.cli.evaluate import Question
from nibble.cli.sse_client import SseClient
from nibble.config.command_line import parse_server_args
from nibble.config.server_args import GROUPS, ServerArgs, non_default_options
from nibble.utils.errors import ConfigError


def help_of(*command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


# Help and completion


def test_every_command_explains_itself(capsys):
    overview = help_of(capsys=capsys)
    for command in ("serve", "bench", "eval", "env"):
        assert command in overview
        assert f"usage: nibble {command}" in help_of(command, capsys=capsys)


def test_the_options_of_serve_come_in_groups(capsys):
    text = help_of("serve", capsys=capsys)
    positions = [text.index(f"\n{title}:\n") for title in GROUPS.values()]
    assert positions == sorted(positions)
    assert text.index("\n  --api-key") > text.index("\nServer:\n")
    assert text.index("\n  --tp-size") < text.index("\nMixture of experts:\n")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_completion_of_a_shell_knows_commands_and_options(shell, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--print-completion", shell])
    assert end.value.code == 0
    script = capsys.readouterr().out
    assert "serve" in script and "--enable-dp-attention" in script and "--moe-kernel" in script


def test_bash_takes_the_completion_as_it_is(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--print-completion", "bash"])
    subprocess.run(["bash", "-n"], input=capsys.readouterr().out, text=True, check=True)


# Where options come from


@pytest.fixture
def served(monkeypatch) -> list[ServerArgs]:
    """What `nibble serve` would serve."""
    calls: list[ServerArgs] = []
    monkeypatch.setattr("nibble.launch_server.serve", calls.append)
    return calls


def serve(served: list[ServerArgs], *argv: str) -> ServerArgs:
    cli.main(["serve", *argv])
    return served.pop()


def test_serve_takes_the_model_by_its_place_or_its_flag(served):
    assert serve(served, "m", "--port", "8000") == ServerArgs(model_path="m", port=8000)
    assert serve(served, "--model-path", "m") == ServerArgs(model_path="m")
    assert serve(served, "--port=8000", "m", "--tp", "2").model_path == "m"


@pytest.mark.parametrize("argv", [[], ["m", "--model-path", "other"], ["m", "--no-such-option"]])
def test_serve_needs_one_model_and_known_options(argv, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", *argv])
    assert end.value.code == 2
    assert "usage: nibble serve" in capsys.readouterr().err


def test_options_come_from_a_file_and_the_command_line_wins(served, tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text(
        "# comment\nmodel-path: m\nport: 8000\ntp_size: 2\nenable-metrics: true\nlog-requests: false\n"
        "served-model-name: '--odd name'\nrandom-seed: null\ndrain-timeout: 1.5\n"
    )
    wanted = ServerArgs(
        model_path="m", port=9000, tp_size=2, enable_metrics=True, served_model_name="--odd name", drain_timeout=1.5
    )
    assert serve(served, "--config", str(file), "--port", "9000") == wanted
    assert parse_server_args(["--config", str(file), "--port", "9000"]) == wanted
    assert serve(served, "other", "--config", str(file)).model_path == "other"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- port", "must hold options by name"),
        ("port: [1]", "port must be a number or a text"),
        ("enable-metrics: 1", "enable-metrics must be true or false"),
        ("port: true", "port must be a number or a text"),
        ("no-such-option: 1", "there is no option 'no-such-option'"),
        ("config: other.yaml", "there is no option 'config'"),
        ("port: 1\n  x: 2", "cannot be read"),
        ("!!python/object/apply:os.getcwd []", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_does_not_hold_options_is_refused_with_the_reason(tmp_path, content, message):
    file = tmp_path / "server.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse_server_args(["--model-path", "m", "--config", str(file)])


def test_a_value_of_a_file_is_checked_like_one_of_the_command_line(tmp_path, capsys):
    file = tmp_path / "server.yaml"
    file.write_text("log-level: loud")
    with pytest.raises(SystemExit):
        parse_server_args(["--model-path", "m", "--config", str(file)])
    assert "--log-level: invalid choice: 'loud'" in capsys.readouterr().err


def test_what_differs_from_the_defaults_is_shown_as_it_would_be_typed():
    args = ServerArgs(model_path="a b", tp_size=2, enable_metrics=True, port=30000, api_key="secret")
    assert non_default_options(args) == "--model-path 'a b' --tp-size 2 --api-key '***' --enable-metrics"
    assert non_default_options(ServerArgs()) == ""


# env


def test_env_says_what_there_is_and_what_is_missing_for_what(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["env"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for word in ("nibble", "torch", "CPU", "C compiler", "missing"):
        assert word in text


def test_what_needs_no_model_does_not_wait_for_torch():
    code = "import sys; from nibble.cli import main; main.make_parser(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# bench and eval, against the app over an engine without a model


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def url(api) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(api.app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    host, port = server.servers[0].sockets[0].getsockname()
    yield f"http://{host}:{port}"
    server.should_exit = True
    thread.join()


def run(*argv: str) -> object:
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    return end.value.code


def test_bench_counts_what_it_was_answered(api, url, capsys):
    api.engine.model_info = lambda: {"vocab_size": 100}
    options = ["--num-prompts", "20", "--concurrency", "4", "--input-len", "5", "--output-len", "7", "--json"]
    assert run("bench", "--base-url", url, *options) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["completed"], figures["failed"]) == (20, 0)
    assert figures["output_tokens_per_second"] == pytest.approx(7 * figures["requests_per_second"], rel=0.001)
    assert 0 < figures["time_to_first_token_ms"]["p50"] <= figures["latency_ms"]["p50"]
    sent = api.engine.requests
    assert len(sent) == 20 and all(len(request.input_ids) == 5 for request in sent)
    assert all(request.sampling.max_new_tokens == 7 and request.sampling.ignore_eos for request in sent)


def test_bench_sends_at_a_rate(api, url, capsys):
    api.engine.model_info = lambda: {"vocab_size": 100}
    options = ["--num-prompts", "10", "--request-rate", "50", "--output-len", "1", "--json"]
    assert run("bench", "--base-url", url, *options) == 0
    assert 0.05 < json.loads(capsys.readouterr().out)["seconds"] < 2


def test_bench_fails_when_a_request_does(api, url, capsys):
    api.engine.model_info = lambda: {"vocab_size": 100}
    api.engine.fail_after = 2
    assert run("bench", "--base-url", url, "--num-prompts", "3", "--output-len", "7") == 1
    output = capsys.readouterr().out
    assert "completed                  0" in output and "failed: the row became NaN" in output


@pytest.mark.parametrize("command", [["bench"], ["eval", "DATA"]])
@pytest.mark.parametrize("base_url", ["http://127.0.0.1:1", "127.0.0.1:30000", "ftp://x"])
def test_a_server_that_is_not_there_is_an_error_in_one_line(tmp_path, command, base_url):
    data = tmp_path / "data"
    data.write_text('{"question": "q", "answer": "a"}')
    message = run(*[str(data) if word == "DATA" else word for word in command], "--base-url", base_url)
    assert str(message).startswith("error: ")


def test_eval_counts_right_answers(url, tmp_path, capsys):
    data = tmp_path / "questions.jsonl"
    answers = [REPLY, f"because #### {1234}", "something else"]
    data.write_text("\n".join(json.dumps({"question": "Hi", "answer": answer}) for answer in answers))
    assert run("eval", str(data), "--base-url", url, "--max-tokens", "100") == 0
    assert "2 of 3 right (66.7 %)" in capsys.readouterr().out
    assert run("eval", str(data), "--base-url", url, "--max-tokens", "100", "--min-accuracy", "0.7") == 1
    assert run("eval", str(data), "--base-url", url, "--max-tokens", "100", "--limit", "2", "--min-accuracy", "1") == 0


@pytest.mark.parametrize(
    ("answer", "reply", "is_right"),
    [
        ("42", " 42\n", True),
        ("42", "It is 42", False),
        ("so #### 1,042", "First 7, then 1042.", True),
        ("so #### 1042", "That makes 1,042.00", True),
        ("so #### -5", "x = -5", True),
        ("so #### 5", "none", False),
        ("so #### 5", "5 and then 6", False),
    ],
)
def test_when_a_reply_counts_as_right(answer, reply, is_right):
    assert Question("q", answer).is_answered_by(reply) == is_right


def test_a_line_without_a_question_is_named(tmp_path):
    data = tmp_path / "questions.jsonl"
    data.write_text('{"question": "q", "answer": "a"}\n{"question": "q"}')
    assert "line 2" in str(run("eval", str(data)))


def test_the_client_gives_each_event_when_it_comes(api, url):
    api.engine.hang_after = 2
    seen: list[bytes] = []

    async def ask() -> None:
        asking = asyncio.create_task(
            SseClient(url).request("POST", "/generate", {"text": "Hi", "stream": True}, seen.append)
        )
        while len(seen) < 2:
            await asyncio.sleep(0.005)
        asking.cancel()

    asyncio.run(ask())
    assert json.loads(seen[1])["meta_info"]["completion_tokens"] == 2


@pytest.mark.parametrize("sent", [b"HTTP/1.1 200 \r\ncontent-length: 9\r\n\r\n{", b"nonsense\r\n\r\n", b""])
def test_the_client_tells_an_answer_that_is_cut_off_from_a_complete_one(sent):
    """A benchmark must not count what it lost."""

    async def ask() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(sent)
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(OSError):
                await SseClient(f"http://127.0.0.1:{port}").request("GET", "/model_info")

    asyncio.run(ask())
