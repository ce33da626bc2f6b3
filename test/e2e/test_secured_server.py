"""A server with HTTPS and keys, as its operator, its clients and strangers see it."""

import json
import os
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import trustme

from nibble.cli import main as cli
from server_process import Server, launch, processes_of, wait_for_log

KEY, ADMIN_KEY = "the-key-of-clients", "the-key-of-admins"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def server(tmp_path_factory, authority) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("secured")
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    (folder / "server.yaml").write_text(
        f"api-key: {KEY}\nadmin-api-key: {ADMIN_KEY}\nssl-keyfile: {folder}/key.pem\nssl-certfile: {folder}/cert.pem\n"
    )
    with launch(folder / "log", "--config", str(folder / "server.yaml"), tls=str(folder / "ca.pem")) as server:
        yield server


def bearing(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_it_speaks_https_only(server, authority):
    assert server.url.startswith("https://")
    assert server.client.get("/health").status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{server.port}/health")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health", verify=ssl.create_default_context())


def test_clients_generate_with_their_key_and_administrators_manage_with_theirs(server):
    body = {"text": "Hi", "sampling_params": {"max_new_tokens": 2}}
    assert server.client.post("/generate", json=body).status_code == 401
    assert server.client.post("/generate", json=body, headers=bearing(KEY)).status_code == 200
    for path in ("/flush_cache", "/server_info"):
        assert server.client.get(path, headers=bearing(KEY)).status_code == 401
        assert server.client.get(path, headers=bearing(ADMIN_KEY)).status_code == 200


def test_no_secret_is_in_the_log_in_an_answer_or_in_the_list_of_processes(server):
    info = server.client.get("/server_info", headers=bearing(ADMIN_KEY)).text
    model = server.client.get("/model_info", headers=bearing(KEY)).text
    command_lines = [" ".join(process.cmdline()) for process in processes_of(server.process.pid)]
    for text in (info, model, server.log.read_text(), *command_lines):
        assert KEY not in text and ADMIN_KEY not in text
    assert json.loads(info)["api_key"] == "***"


def test_the_log_begins_with_what_was_asked_for_and_says_where_it_is_ready(server):
    wait_for_log(server, f"{server.url} serves")
    log = server.log.read_text()
    assert "options: --model-path" in log and "--api-key '***' --admin-api-key '***'" in log
    assert "tp=1 dp=1 ep=1, FP4 all-gather" in log


def test_the_sockets_between_the_processes_are_nobody_elses(server):
    sockets = [connection.laddr for connection in psutil.Process(server.process.pid).net_connections("unix")]
    (folder,) = {Path(name).parent for name in sockets if name.endswith("/engine")}
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert {path.name for path in folder.iterdir()} >= {"engine", "rank0"}


def test_bench_runs_against_it(server, capsys, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", server.tls)
    options = ["--num-prompts", "8", "--concurrency", "4", "--output-len", "8", "--json"]
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "--base-url", server.url, "--api-key", KEY, *options])
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["completed"] == 8
