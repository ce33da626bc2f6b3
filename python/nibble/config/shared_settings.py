"""What all hosts of an engine have to agree on."""

import dataclasses
import hashlib

import msgspec

from nibble.config.resolve import EngineConfig
from nibble.config.server_args import flag_name

_EACH_HOSTS_OWN = frozenset({
    "node_rank", "model_path", "tokenizer_path", "cpu_threads", "cpu_binding", "mem_fraction_static",
    "log_level", "log_format",
})  # fmt: skip
"""Flags that every host may have values of its own for."""

_FIRST_HOST_ONLY = frozenset({
    "served_model_name", "trust_remote_code", "load_balance_method", "max_queued_requests", "queue_timeout",
    "random_seed", "tool_call_parser", "reasoning_parser", "grammar_backend", "host", "port", "api_key",
    "admin_api_key", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_keyfile_password", "max_request_bytes",
    "drain_timeout", "log_requests", "log_requests_level", "profiler_dir",
})  # fmt: skip
"""Flags of the server, which only the first host is."""

_RESOLVED = (
    "model", "quantization", "device", "dtype", "kv_cache_dtype", "kernels", "moe_kernel", "attention_backend",
    "cuda_graph_rows", "moe_comm_backend", "cpu_collectives",
)  # fmt: skip
"""What was left to each host, and must have come to the same."""

_LONGEST = 60


def shared_settings(config: EngineConfig) -> dict[str, str]:
    """By the name of the flag, or of what was resolved. Contains no secrets."""
    flags = {
        flag_name(entry.name): getattr(config.args, entry.name)
        for entry in dataclasses.fields(config.args)
        if entry.name not in _EACH_HOSTS_OWN | _FIRST_HOST_ONLY
    }
    return {
        name: _shown(value) for name, value in (flags | {name: getattr(config, name) for name in _RESOLVED}).items()
    }


def difference(ours: dict[str, str], theirs: dict[str, str]) -> str | None:
    """The first one in words, `ours` being those of the first host."""
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            here, there = ours.get(name), theirs.get(name)
            return f"{shortened(name)} is {there and shortened(there)} there, and {here} on the first host"
    return None


def shortened(theirs: str) -> str:
    """As it may be logged, whoever said it."""
    return theirs if theirs.isprintable() and len(theirs) <= _LONGEST else f"{theirs[:_LONGEST]!r}…"


def _shown(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return (
        text if len(text) <= _LONGEST else f"something with the hash {hashlib.sha256(text.encode()).hexdigest()[:12]}"
    )
