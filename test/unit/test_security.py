"""The rules that keep a server safe. Each stands for a hole that somebody's server had."""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvicorn

from fake_engine import COMPLETIONS, HELLO, Api, error_of
from nibble.config.server_args import ServerArgs, non_default_options, shown_args
from nibble.entrypoints import http_protocol
from nibble.entrypoints.api_key import ADMIN_PATHS, OPEN_PATHS
from nibble.entrypoints.http_protocol import MAX_HEAD_BYTES, BoundedHttpProtocol
from nibble.entrypoints.prompts import PromptEncoder
from nibble.entrypoints.tls import tls_context
from nibble.tokenizer.tokenizer import Tokenizer
from nibble.utils.errors import ConfigError, RequestError
from nibble.utils.interruptible import Interrupted, Interruptible
from tiny_tokenizer import byte_level_tokenizer

# Keys

ADMIN, ORDINARY, OPEN = "/flush_cache", "/v1/models", "/health"


@pytest.mark.parametrize(
    ("keys", "bearer", "allowed"),
    [
        ({}, None, {ADMIN, ORDINARY, OPEN}),
        ({"api_key": "a"}, None, {OPEN}),
        ({"api_key": "a"}, "a", {ADMIN, ORDINARY, OPEN}),
        ({"api_key": "a"}, "b", {OPEN}),
        ({"admin_api_key": "b"}, None, {ORDINARY, OPEN}),
        ({"admin_api_key": "b"}, "b", {ADMIN, ORDINARY, OPEN}),
        ({"api_key": "a", "admin_api_key": "b"}, None, {OPEN}),
        ({"api_key": "a", "admin_api_key": "b"}, "a", {ORDINARY, OPEN}),
        ({"api_key": "a", "admin_api_key": "b"}, "b", {ADMIN, ORDINARY, OPEN}),
        ({"api_key": "a", "admin_api_key": "b"}, "c", {OPEN}),
        ({"api_key": "a", "admin_api_key": "b"}, "", {OPEN}),
    ],
)
def test_which_key_opens_which_routes(keys, bearer, allowed):
    api = Api(**keys)
    headers = {} if bearer is None else {"authorization": f"Bearer {bearer}"}
    statuses = {path: api.get(path, headers=headers).status_code for path in (ADMIN, ORDINARY, OPEN)}
    assert statuses == {path: 200 if path in allowed else 401 for path in statuses}


@pytest.mark.parametrize(
    "path", ["/flush_cache/", "//flush_cache", "/FLUSH_CACHE", "/v1/../flush_cache", "/%66lush_cache"]
)
def test_no_other_spelling_of_an_admin_route_reaches_it_without_the_key(path):
    api = Api(admin_api_key="b")
    api.get(path)
    assert api.engine.num_flushes == 0


def test_the_routes_that_are_open_or_for_administrators_exist():
    """All others need the key, those that are added later, too; a misspelt one here would need none."""
    api = Api()
    assert {path for path in OPEN_PATHS | ADMIN_PATHS if api.get(path).status_code == 404} == set()


def test_the_routes_that_need_no_key_are_those_that_the_documentation_names():
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| `--api-key` |")]
    assert set(re.findall(r"`(/\w*)`", row)) == OPEN_PATHS


def test_keys_are_compared_in_constant_time_and_all_of_them(monkeypatch):
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda given, key: compared.append((given, key)) or given == key)
    api = Api(api_key="a", admin_api_key="b")
    api.get(ORDINARY, headers={"authorization": "Bearer a"})
    assert compared == [(b"a", b"a"), (b"a", b"b")]


# Secrets


def test_whatever_looks_like_a_secret_is_marked_as_one():
    suspicious = {
        entry.name
        for entry in dataclasses.fields(ServerArgs)
        if any(word in entry.name for word in ("api_key", "password", "secret", "credential"))
    }
    assert suspicious == {entry.name for entry in dataclasses.fields(ServerArgs) if entry.metadata["is_secret"]}


def test_secrets_are_neither_logged_nor_told():
    secrets = {entry.name: "hunter2" for entry in dataclasses.fields(ServerArgs) if entry.metadata["is_secret"]}
    args = ServerArgs(model_path="m", **secrets)
    assert "hunter2" not in json.dumps(shown_args(args)) + non_default_options(args)
    assert dict.fromkeys(secrets, "***").items() <= shown_args(args).items()
    assert shown_args(ServerArgs(model_path="m"))["api_key"] is None


# HTTPS


@pytest.fixture(scope="module")
def pem(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pem")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca")
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert")
    (folder / "damaged").write_text("-----BEGIN CERTIFICATE-----\nx\n")
    return {path.name: str(path) for path in folder.iterdir()} | {"missing": str(folder / "missing")}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ssl_keyfile": "key"}, "--ssl-keyfile needs --ssl-certfile"),
        ({"ssl_ca_certs": "cert"}, "--ssl-ca-certs needs --ssl-certfile"),
        ({"ssl_certfile": "missing", "ssl_keyfile": "key"}, "No such file"),
        ({"ssl_certfile": "damaged", "ssl_keyfile": "key"}, "--ssl-certfile"),
        ({"ssl_certfile": "cert"}, "--ssl-certfile"),
        ({"ssl_certfile": "cert", "ssl_keyfile": "key", "ssl_ca_certs": "missing"}, "--ssl-ca-certs"),
    ],
)
def test_https_that_cannot_be_served_is_refused_and_never_replaced_by_http(pem, flags, message):
    with pytest.raises(ConfigError, match=message):
        tls_context(ServerArgs(model_path="m", **{name: pem[file] for name, file in flags.items()}))


def test_an_encrypted_key_without_its_password_is_refused_instead_of_asked_for(tmp_path, pem):
    from cryptography.hazmat.primitives import serialization as pems

    with open(pem["key"], "rb") as file:
        key = pems.load_pem_private_key(file.read(), None)
    encryption = pems.BestAvailableEncryption(b"right")
    (tmp_path / "key").write_bytes(key.private_bytes(pems.Encoding.PEM, pems.PrivateFormat.PKCS8, encryption))
    files = {"ssl_certfile": pem["cert"], "ssl_keyfile": str(tmp_path / "key")}
    for password in (None, "wrong"):
        with pytest.raises(ConfigError, match="--ssl-keyfile"):
            tls_context(ServerArgs(model_path="m", ssl_keyfile_password=password, **files))
    assert tls_context(ServerArgs(model_path="m", ssl_keyfile_password="right", **files)) is not None


def test_with_an_authority_for_clients_only_those_with_its_certificates_get_in(tmp_path, pem):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca")
    flags = {"ssl_certfile": pem["cert"], "ssl_keyfile": pem["key"], "ssl_ca_certs": str(tmp_path / "ca")}
    serving = tls_context(ServerArgs(model_path="m", **flags))
    known, stranger, anonymous = (ssl.create_default_context(cafile=pem["ca"]) for _ in range(3))
    authority.issue_cert("client").configure_cert(known)
    trustme.CA().issue_cert("client").configure_cert(stranger)
    handshake(serving, known)
    for asking, reason in ((stranger, "VERIFY_FAILED"), (anonymous, "DID_NOT_RETURN_A_CERTIFICATE")):
        with pytest.raises(ssl.SSLError, match=reason):
            handshake(serving, asking)


def handshake(serving: ssl.SSLContext, asking: ssl.SSLContext) -> None:
    """In memory, as often as either side has something to say. Raises what the server makes of it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = serving.wrap_bio(to_server, to_client, server_side=True)
    client = asking.wrap_bio(to_client, to_server, server_hostname="127.0.0.1")
    for _ in range(3):
        for side in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()


# Chat templates

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_never_ends_is_ended_and_its_thread_serves_others():
    others = set(threading.enumerate())
    encoder = PromptEncoder(Tokenizer(byte_level_tokenizer(ENDLESS)), template_timeout_s=0.05)

    async def render() -> None:
        for _ in range(4):  # more often than there are threads
            with pytest.raises(RequestError, match=r"took longer than 0.05 s"):
                await encoder.encode_chat(HELLO, {})

    started = time.monotonic()
    asyncio.run(render())
    encoder.close()
    for thread in set(threading.enumerate()) - others:
        if thread.name.startswith(("chat-template", "prompt-encoder")):
            thread.join(10)
            assert not thread.is_alive()
    assert time.monotonic() - started < 20


def test_no_template_runs_on_the_event_loop():
    threads = []

    class Recording(Tokenizer):
        def render_chat_template(self, messages: Any, variables: Any = None, tools: Any = ()) -> str:
            threads.append(threading.current_thread())
            return super().render_chat_template(messages, variables, tools)

    encoder = PromptEncoder(Recording(byte_level_tokenizer()))
    asyncio.run(encoder.encode_chat(HELLO, {}))
    encoder.close()
    assert threads and threads[0] is not threading.main_thread()


def test_an_interruption_that_comes_too_late_hits_nobody():
    work = Interruptible(lambda: 5)
    assert work.run() == 5
    work.interrupt()
    assert sum(range(10_000)) == 49_995_000


def test_work_that_catches_every_exception_is_interrupted_all_the_same():
    entered = threading.Event()

    def stubborn() -> None:
        while True:
            with contextlib.suppress(Exception):
                entered.set()

    work = Interruptible(stubborn)
    outcome: list[str] = []

    def run() -> None:
        try:
            work.run()
        except Interrupted:
            outcome.append("interrupted")

    thread = threading.Thread(target=run)
    thread.start()
    entered.wait()
    work.interrupt()
    thread.join(10)
    assert outcome == ["interrupted"]


# Heads and bodies


def test_a_head_over_the_limit_is_refused():
    response = Api().get("/health", headers={"x": "y" * MAX_HEAD_BYTES})
    assert response.status_code == 431
    assert str(MAX_HEAD_BYTES) in error_of(response)["message"]
    assert Api().get("/health", headers={"x": "y" * (MAX_HEAD_BYTES - 1000)}).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for_forever(monkeypatch):
    monkeypatch.setattr("nibble.entrypoints.json_route.BODY_TIMEOUT_S", 0.05)

    async def body() -> AsyncGenerator[bytes, None]:
        yield b"{"
        await asyncio.sleep(30)

    response = Api().request("POST", COMPLETIONS, content=body(), headers={"content-type": "application/json"})
    assert response.status_code == 408
    assert "0.05 s" in error_of(response)["message"]


@pytest.fixture
def address(monkeypatch) -> Iterator[tuple[str, int]]:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.3)
    server = uvicorn.Server(uvicorn.Config(Api().app, port=0, log_level="critical", http=BoundedHttpProtocol))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join()


def answer_to(address: tuple[str, int], *pieces: bytes) -> bytes:
    """All that the server sends until it closes the connection, which it must do by itself."""
    answer = b""
    with socket.create_connection(address, timeout=10) as connection, contextlib.suppress(ConnectionError):
        for piece in pieces:
            connection.sendall(piece)
        while data := connection.recv(65536):
            answer += data
    return answer


def test_a_head_without_an_end_is_cut_off_at_the_limit(address):
    answer = answer_to(address, b"GET /health HTTP/1.1\r\nx: ", *[b"y" * 10_000] * 7)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")


def test_a_head_that_comes_too_slowly_is_answered_with_a_timeout(address):
    assert answer_to(address, b"GET /health HTTP/1.1\r\nx: y\r\n").startswith(b"HTTP/1.1 408 ")


def test_a_connection_that_says_nothing_is_closed(address):
    assert answer_to(address) == b""


def test_what_is_no_http_gets_an_error_in_the_usual_form(address):
    answer = answer_to(address, b"hello\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_connection_is_used_for_several_requests_and_closed_only_when_it_rests(address):
    request = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    with socket.create_connection(address, timeout=10) as connection:
        for _ in range(3):
            connection.sendall(request)
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
            time.sleep(0.2)  # together longer than a head may take
