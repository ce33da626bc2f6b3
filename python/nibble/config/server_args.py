"""The flags of the engine: one frozen dataclass, from which the command line is made."""

import dataclasses
import ipaddress
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nibble.utils.errors import ConfigError


def flag(default: Any, help: str, *aliases: str, choices: Sequence[Any] | None = None, is_secret: bool = False) -> Any:
    """`is_secret` keeps the value out of logs and answers."""
    metadata = {"help": help, "aliases": aliases, "choices": choices, "is_secret": is_secret}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """What was asked for. `config.resolve` turns it into what is done."""

    # Model
    model_path: str = flag("", "Folder of the checkpoint, or its name on the Hugging Face hub.", "--model")
    tokenizer_path: str | None = flag(None, "Folder of the tokenizer, if it is not the checkpoint's.")
    served_model_name: str | None = flag(None, "Name that /v1/models gives. Default: --model-path.")
    context_length: int | None = flag(None, "Longest prompt plus answer, in tokens. Default: the checkpoint's.")
    trust_remote_code: bool = flag(False, "Let the tokenizer run code that comes with the checkpoint.")
    load_format: str = flag(
        "auto",
        "auto reads safetensors; dummy fills random weights of the checkpoint's formats.",
        choices=("auto", "dummy"),
    )
    dtype: str = flag(
        "auto",
        "Type of activations. auto: bfloat16 on a GPU, float32 on a CPU.",
        choices=("auto", "float32", "bfloat16"),
    )
    kv_cache_dtype: str = flag(
        "auto",
        "Type of the KV cache. auto: the checkpoint's, bfloat16, float32, or fp8_e4m3 where it brings scales for that.",
        choices=("auto", "float32", "bfloat16", "fp8_e4m3"),
    )
    quantization: str | None = flag(
        None, "Format the checkpoint must have. Default: what it says itself.", choices=("modelopt_fp4",)
    )

    # Parallelism
    tp_size: int = flag(
        1, "Ranks of one replica; attention is split over tp-size / dp-size of them.", "--tp", "--tensor-parallel-size"
    )
    dp_size: int = flag(1, "Data-parallel attention groups.", "--dp", "--data-parallel-size")
    ep_size: int = flag(
        1,
        "Groups over which experts are split; tp-size / ep-size ranks share the width of each.",
        "--ep",
        "--expert-parallel-size",
    )
    load_balance_method: str = flag(
        "total_tokens",
        "Which DP rank gets a request. total_tokens, total_requests: the one with the fewest outstanding, where a"
        " cached prefix counts as done or decides between equals; round_robin: in turns.",
        choices=("round_robin", "total_requests", "total_tokens"),
    )
    enable_dp_attention: bool = flag(
        False, "Attention data-parallel: each of --dp-size groups of ranks serves its own requests."
    )
    enable_dp_lm_head: bool = flag(
        False,
        "With data-parallel attention: split lm_head over the ranks of an attention group, so that logits need no "
        "rows of other groups. Default: over all ranks, which takes less memory.",
    )
    moe_dense_tp_size: int | None = flag(
        None,
        "1: every rank has all of the dense feed-forward layers of a model with experts. Default: they are split over "
        "the ranks of an attention group.",
    )
    nnodes: int = flag(1, "Hosts (nodes) over which the ranks are spread evenly; every one gets the same command.")
    node_rank: int = flag(0, "The number of this host, from 0 to nnodes - 1; node 0 serves HTTP.")
    dist_init_addr: str | None = flag(
        None,
        "HOST:PORT or [IPv6]:PORT of node 0, where the nodes meet; their ranks meet at PORT + 1. Needed with --nnodes "
        "above 1.",
    )

    # Mixture of experts
    enable_flashinfer_cutlass_moe: bool = flag(
        False,
        "Gather NVFP4 rows between ranks (quantize before the gather) when dp-size equals ep-size; "
        "the kernels follow the machine, see --moe-kernel.",
    )
    disable_flashinfer_cutlass_moe_fp4_allgather: bool = flag(
        False, "Gather unquantized rows and quantize after the gather."
    )
    moe_kernel: str = flag(
        "auto",
        "Kernels of the experts. Only auto chooses, and it logs what it chose.",
        choices=("auto", "flashinfer_cutlass", "triton", "torch", "c"),
    )
    moe_comm_backend: str = flag(
        "auto",
        "What brings rows to experts on other GPU ranks, and sums back. peer: memory that all ranks of a host map, one "
        "kernel each way, and nccl between hosts; auto: peer where it works, nccl elsewhere.",
        choices=("auto", "nccl", "peer"),
    )
    moe_combine_dtype: str = flag(
        "bf16",
        "Type in which the experts' partial results travel back, before they are summed. bf16: that of activations, "
        "see --dtype; fp8: e4m3 with a scale for every 128 columns, about half the bytes and less exact.",
        choices=("bf16", "fp8"),
    )

    attention_backend: str = flag(
        "auto",
        "Kernels of attention. auto: on a GPU flashinfer where it is installed and has them, else triton for latent "
        "attention (MLA), else torch; on a CPU c or torch.",
        choices=("auto", "flashinfer", "triton", "torch", "c"),
    )
    disable_cuda_graph: bool = flag(False, "Launch every kernel of every step instead of replaying CUDA graphs.")
    cuda_graph_max_bs: int | None = flag(
        None,
        "Requests of one rank up to which decoding steps are CUDA graphs. Default: max-running-requests, up to 256.",
    )

    # Machine
    device: str = flag("auto", "Device that runs the model. auto: cuda where it can.", choices=("auto", "cpu", "cuda"))
    mem_fraction_static: float = flag(
        0.85, "Part of a GPU's memory for weights and KV cache, of all ranks on it; the rest is for activations."
    )
    cpu_collectives: str = flag(
        "auto",
        "Collectives between CPU ranks. auto: shared_memory where there is a C compiler.",
        choices=("auto", "shared_memory", "gloo"),
    )
    cpu_kernels: str = flag(
        "auto",
        "Kernels on a CPU. auto: c, compiled once with the machine's own compiler, or torch without one.",
        choices=("auto", "c", "torch"),
    )
    cpu_threads: int | None = flag(
        None, "Threads of each CPU rank. Default: the cores divided by the ranks, at least one."
    )
    cpu_binding: str = flag(
        "auto",
        "auto: where --cpu-threads is not given, each of several CPU ranks keeps to its share of the cores; "
        "off: every rank may run on any core.",
        choices=("auto", "off"),
    )

    # Memory and batching (of a rank, or of an attention group that shares its requests)
    page_size: int = flag(16, "Tokens of one KV cache page.")
    max_total_tokens: int | None = flag(
        None,
        "Tokens the KV cache of one rank holds. Default: what max-running-requests full contexts need, "
        "within --mem-fraction-static, or a quarter of a CPU's free memory.",
    )
    max_running_requests: int = flag(64, "Requests that run at once on one rank.")
    max_queued_requests: int = flag(1024, "Requests that wait at once, over all ranks; more get a 503.")
    queue_timeout: float | None = flag(
        None, "Seconds that a request may wait for its first token; then it gets a 503. Default: no limit."
    )
    chunked_prefill_size: int = flag(512, "Prompt tokens that one step of one rank processes at most.")
    disable_radix_cache: bool = flag(
        False, "Compute every prompt from its first token, even if another request had the same beginning."
    )
    schedule_policy: str = flag(
        "fcfs",
        "Which waiting request is next. fcfs: the one that came first; lpm: the one with the longest cached prefix.",
        choices=("fcfs", "lpm"),
    )
    enable_priority_scheduling: bool = flag(
        False, "Requests may bring a priority; higher ones are admitted first and retracted last."
    )
    max_overtakes: int = flag(
        128, "How many later requests may go before a waiting one, for their priority or prefix; then it is its turn."
    )
    disable_overlap_schedule: bool = flag(
        False, "Wait for each step of a GPU before the next one is prepared. CPU ranks always do."
    )
    disable_prefill_delayer: bool = flag(
        False, "Admit waiting requests at once, even where all ranks that only decode wait for their prompts."
    )
    prefill_delayer_max_delay_passes: int = flag(
        30, "Steps for which waiting requests are held back at most, until more ranks have some to admit."
    )
    prefill_delayer_max_delay_ms: float = flag(200.0, "The same in milliseconds; whatever is over first.")
    random_seed: int | None = flag(None, "Seed for requests that bring none. Default: drawn at start.")

    # Answers
    tool_call_parser: str | None = flag(
        None,
        "How the model writes function calls. Default: requests with tools are refused.",
        choices=("qwen25", "qwen", "hermes", "deepseekv3", "deepseekv31"),
    )
    reasoning_parser: str | None = flag(
        None,
        "How the model tells its thoughts from its answer. Default: they are a part of it.",
        choices=("deepseek-r1", "deepseek-v3", "qwen3", "qwen3-thinking"),
    )
    grammar_backend: str = flag(
        "xgrammar",
        "What holds answers to a JSON schema, regex or grammar; none refuses them.",
        choices=("xgrammar", "none"),
    )

    # Server
    host: str = flag("127.0.0.1", "Address to listen on.")
    port: int = flag(30000, "Port to listen on.")
    api_key: str | None = flag(None, "Key that requests must bring as a bearer token.", is_secret=True)
    admin_api_key: str | None = flag(
        None, "Key that the routes of administrators need instead; see docs/operations.md.", is_secret=True
    )
    ssl_keyfile: str | None = flag(None, "Private key (PEM) to serve HTTPS with.")
    ssl_certfile: str | None = flag(None, "Certificate chain (PEM) to serve HTTPS with.")
    ssl_ca_certs: str | None = flag(
        None, "Authorities (PEM) of clients' certificates; with it, every client must show one."
    )
    ssl_keyfile_password: str | None = flag(None, "Password of --ssl-keyfile.", is_secret=True)
    max_request_bytes: int = flag(16 * 2**20, "Largest request body, in bytes; a larger one gets a 413.")
    stream_period: float = flag(
        0.01, "Seconds between two events of a stream at least; tokens that come faster share an event."
    )
    drain_timeout: float = flag(30.0, "Seconds that running requests get to finish after SIGTERM or Ctrl-C.")
    startup_timeout: float = flag(600.0, "Seconds until the server must be ready.")
    dist_timeout: float = flag(60.0, "Seconds that a rank waits for its peers in a collective.")
    watchdog_timeout: float = flag(
        300.0, "Seconds after which a rank that has requests and makes no step ends the server, its stack in the log."
    )

    # Logs and metrics
    log_level: str = flag("info", "Least severe log line shown.", choices=("debug", "info", "warning", "error"))
    log_format: str = flag("text", "Log lines as text, or as one JSON object each.", choices=("text", "json"))
    log_requests: bool = flag(False, "Log each request and how it ended; --log-requests-level says how much of it.")
    log_requests_level: int = flag(
        2,
        "What --log-requests shows. 0: ids, sizes, times; 1: and sampling parameters; "
        "2: and the beginning of prompt and answer; 3: and all of them.",
        choices=(0, 1, 2, 3),
    )
    enable_metrics: bool = flag(False, "Serve metrics for Prometheus at /metrics.")
    profiler_dir: str = flag("profiles", "Folder in which /start_profile may write traces.")


GROUPS = {
    "model_path": "Model",
    "tp_size": "Parallelism",
    "enable_flashinfer_cutlass_moe": "Mixture of experts",
    "device": "Machine",
    "page_size": "Memory and batching (per rank)",
    "host": "Server",
    "log_level": "Logs and metrics",
}
"""The groups of --help, each with the field that it begins with."""


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def shown_args(args: ServerArgs) -> dict[str, Any]:
    """The flags by field name, secrets as `***`."""
    shown = dataclasses.asdict(args)
    for entry in dataclasses.fields(args):
        if entry.metadata["is_secret"] and shown[entry.name] is not None:
            shown[entry.name] = "***"
    return shown


def non_default_options(args: ServerArgs) -> str:
    """The options that differ from their defaults, as they would be typed, secrets as `***`."""
    shown = shown_args(args)
    changed = [entry.name for entry in dataclasses.fields(args) if getattr(args, entry.name) != entry.default]
    return " ".join(
        flag_name(name) if shown[name] is True else f"{flag_name(name)} {shlex.quote(str(shown[name]))}"
        for name in changed
    )


def parse_dist_init_addr(address: str) -> tuple[str, int]:
    """Host, without brackets, and port of --dist-init-addr. Raises ConfigError unless it is an address to meet at."""
    parts = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\[\]:/@\s]+)):([0-9]{1,5})", address)
    if parts is None:
        raise ConfigError(f"--dist-init-addr must be HOST:PORT or [IPv6]:PORT, got {address!r}")
    host, port = parts[1] or parts[2], int(parts[3])
    if not 0 < port < 65535:
        raise ConfigError(
            f"--dist-init-addr {address}: the port must be between 1 and 65534; the next one is used, too"
        )
    try:
        is_unspecified = ipaddress.ip_address(host).is_unspecified
    except ValueError as error:
        if parts[1]:
            raise ConfigError(f"--dist-init-addr {address}: {error}") from error
        is_unspecified = False  # a name
    if is_unspecified:
        raise ConfigError(f"--dist-init-addr {address}: no node is reached at {host}; give the address of node 0")
    return host, port


def check_values(args: ServerArgs) -> None:
    """Refuses values that no configuration can mean. Raises ConfigError."""
    names = (
        "tp_size", "dp_size", "ep_size", "nnodes", "page_size", "max_running_requests", "max_queued_requests",
        "chunked_prefill_size", "max_request_bytes", "startup_timeout", "dist_timeout",
        "queue_timeout", "watchdog_timeout",
        "context_length", "max_total_tokens", "cpu_threads", "cuda_graph_max_bs", "moe_dense_tp_size", "max_overtakes",
        "prefill_delayer_max_delay_passes", "prefill_delayer_max_delay_ms",
    )  # fmt: skip
    for name in names:
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{flag_name(name)} must be greater than 0, got {value}")
    if not 0 < args.mem_fraction_static < 1:
        raise ConfigError(f"--mem-fraction-static must be between 0 and 1, got {args.mem_fraction_static}")
    for name in ("drain_timeout", "stream_period"):
        if getattr(args, name) < 0:
            raise ConfigError(f"{flag_name(name)} must be at least 0, got {getattr(args, name)}")
    for name in ("api_key", "admin_api_key"):
        if getattr(args, name) == "":
            raise ConfigError(f"{flag_name(name)} must not be empty; leave it out to need no key")
    if not 0 <= args.port < 65536:
        raise ConfigError(f"--port must be between 0 and 65535, got {args.port}")
    _check_nodes(args)


def _check_nodes(args: ServerArgs) -> None:
    if not 0 <= args.node_rank < args.nnodes:
        raise ConfigError(f"--node-rank must be at least 0 and below --nnodes {args.nnodes}, got {args.node_rank}")
    if args.dist_init_addr is not None:
        parse_dist_init_addr(args.dist_init_addr)
        if args.nnodes == 1:
            raise ConfigError(f"--dist-init-addr {args.dist_init_addr}: one node meets no other; leave it out")
    elif args.nnodes > 1:
        raise ConfigError(f"--nnodes {args.nnodes} needs --dist-init-addr, where the nodes meet: HOST:PORT of node 0")
