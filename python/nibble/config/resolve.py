"""Turns flags, checkpoint and machine into one frozen EngineConfig. Every "auto" is decided here."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nibble.config.fp4_allgather import Fp4AllGatherDecision, should_use_flashinfer_cutlass_moe_fp4_allgather
from nibble.config.model_config import ModelConfig, load_model_config
from nibble.config.parallel_config import ParallelConfig, resolve_parallel
from nibble.config.quantization_config import QuantizationConfig, load_quantization_config
from nibble.config.server_args import ServerArgs, check_values
from nibble.utils.c_library import CompileError, build_c_library
from nibble.utils.capability import Capability, available_memory_bytes, capability
from nibble.utils.errors import ConfigError

RENDEZVOUS = Path(__file__).parents[1] / "distributed"
CPU_KERNELS = Path(__file__).parents[1] / "kernels" / "cpu"
OLDEST_CUDA_ARCH = (8, 0)
OLDEST_FP4_ARCH = (10, 0)
FLASHINFER_HEAD_DIMS = (64, 128, 256)
FLASHINFER_LATENT_SIZES = (512, 64)
LARGEST_DEFAULT_GRAPH = 256
PEER_ROW_UNIT = 16
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "fp8_e4m3": 1}


@dataclass(frozen=True)
class EngineConfig:
    """What every process of the engine agrees on. Sent to the ranks as JSON.

    With several nodes the shares of a machine are each its own: `num_gpus`, `cpu_threads`, `rank_cores`, `num_pages`.
    """

    args: ServerArgs
    model_folder: str
    tokenizer_folder: str
    model: ModelConfig
    quantization: QuantizationConfig | None
    parallel: ParallelConfig
    fp4_allgather: Fp4AllGatherDecision
    device: str
    no_gpu: str | None
    """Why auto did not choose a GPU, if so."""
    num_gpus: int
    """GPUs that the ranks of a node share out; 0 on a CPU."""
    dtype: str
    kv_cache_dtype: str
    kernels: str
    moe_kernel: str
    attention_backend: str
    no_flashinfer: str | None
    """Why auto did not choose FlashInfer's attention on a GPU, if so."""
    cuda_graph_rows: tuple[int, ...]
    """The numbers of rows of one rank for which decoding steps are CUDA graphs, ascending; empty without graphs."""
    no_cuda_graph: str | None
    """Why there are none on a GPU, if so."""
    no_c_kernels: str | None
    """Why auto did not choose what is written in C (kernels, shared memory), if so."""
    moe_comm_backend: str | None
    """What carries the experts' rows between GPU ranks: "nccl", or "peer" if start-up finds that it works. None where
    none travel between GPU ranks.
    """
    no_peer_memory: str | None
    """Why auto did not choose peer memory for that, if so."""
    cpu_collectives: str
    """Between processes of one host; groups that span several meet over gloo. On GPUs they serve the step's sizes only,
    and NCCL the rows.
    """
    cpu_threads: int
    rank_cores: tuple[tuple[int, ...], ...] | None
    """The cores that each CPU rank of a node keeps to; None leaves that to the system."""
    context_length: int
    num_pages: int | None
    """Of one rank's KV cache; None leaves it to the ranks, which know once their weights are loaded."""
    overlap_schedule: bool
    """Whether a rank prepares a step while its GPU still runs the one before."""
    random_seed: int

    @property
    def ranks_per_gpu(self) -> int:
        return -(-self.parallel.ranks_per_node // self.num_gpus) if self.num_gpus else 0

    def decisions(self) -> list[str]:
        """One line for each choice that was left to the engine."""
        parallel, gather = self.parallel, self.fp4_allgather
        collectives = "nccl" if self.device == "cuda" else self.cpu_collectives
        size = f"{self.num_pages * self.args.page_size} tokens" if self.num_pages else "as many tokens as fit"
        return [
            f"FP4 all-gather is {'on' if gather.enabled else 'off'}: {gather.reason}",
            f"ranks: tp={parallel.tp_size} dp={parallel.dp_size} ep={parallel.ep_size}, "
            f"collectives: {collectives if parallel.world_size > 1 else 'none (one rank)'}",
            *self._nodes_in_words(),
            *self._split_in_words(),
            *self._moe_comm_in_words(),
            *self._moe_combine_in_words(),
            f"device: {self._device_in_words()}, activations: {self.dtype}, "
            f"kernels: {self.kernels}, of the experts: {self.moe_kernel}"
            + (f" ({self.no_c_kernels})" if self.no_c_kernels else ""),
            f"attention: {self._attention_in_words()}",
            f"overlap of scheduling and GPU work: {self._overlap_in_words()}",
            f"KV cache: {size} a rank in {self.kv_cache_dtype}{self._unused_kv_scales()}, "
            f"pages of {self.args.page_size}; "
            f"context length: {self.context_length}",
        ]

    def _nodes_in_words(self) -> list[str]:
        parallel = self.parallel
        if parallel.nnodes == 1:
            return []
        nodes = map(parallel.ranks_of_node, range(parallel.nnodes))
        places = ", ".join(f"node {node}: {ranks[0]} to {ranks[-1]}" for node, ranks in enumerate(nodes))
        between = "nothing, for attention groups do not meet"
        if parallel.groups_meet:
            between = "nccl, and gloo for the step's sizes" if self.device == "cuda" else "gloo"
        return [f"ranks of {places}; between nodes: {between}"]

    def _overlap_in_words(self) -> str:
        if self.overlap_schedule:
            return "on"
        return "off (--disable-overlap-schedule)" if self.device == "cuda" else "off (a CPU does one or the other)"

    def _attention_in_words(self) -> str:
        attention = self.attention_backend + (f" ({self.no_flashinfer})" if self.no_flashinfer else "")
        if self.device == "cpu":
            return attention
        if self.no_cuda_graph is not None:
            return f"{attention}, no CUDA graphs: {self.no_cuda_graph}"
        return f"{attention}, CUDA graphs of {', '.join(map(str, self.cuda_graph_rows))} rows"

    def _split_in_words(self) -> list[str]:
        """What is split over several ranks, beside whole experts and requests."""
        parallel = self.parallel
        if parallel.world_size == 1:
            return []
        dense = 1 if self.args.moe_dense_tp_size == 1 else parallel.attn_tp_size
        lm_head = parallel.attn_tp_size if parallel.dp_lm_head else parallel.tp_size
        parts = {"attention heads": parallel.attn_tp_size, "dense layers": dense, "lm_head": lm_head}
        if self.model.moe is not None:
            parts["the width of an expert"] = parallel.moe_tp_size
        return ["ranks that share " + ", ".join(f"{part}: {size}" for part, size in parts.items())]

    def _unused_kv_scales(self) -> str:
        if self.quantization is None or self.quantization.kv_cache_quant_algo is None:
            return ""
        if self.model.mla:
            return " (the checkpoint's scales are for keys and values of heads, and latent vectors are cached)"
        return "" if self.kv_cache_dtype == "fp8_e4m3" else " (the checkpoint has scales for fp8_e4m3)"

    def _moe_comm_in_words(self) -> list[str]:
        if self.moe_comm_backend is None:
            return []
        if self.moe_comm_backend == "peer":
            words = "rows to the experts and back: through peer memory, if every rank can reach that of all others"
            return [words + (" of its host, and nccl between hosts" if self.parallel.nnodes > 1 else "")]
        return ["rows to the experts and back: nccl" + (f" ({self.no_peer_memory})" if self.no_peer_memory else "")]

    def _moe_combine_in_words(self) -> list[str]:
        if self.model.moe is None or self.parallel.world_size == 1:
            return []
        if self.args.moe_combine_dtype == "fp8":
            return ["the experts' results travel in fp8_e4m3, a scale for 128 columns (--moe-combine-dtype fp8)"]
        return [f"the experts' results travel in {self.dtype}"]

    def _device_in_words(self) -> str:
        if self.device == "cuda":
            return f"cuda ({self.num_gpus} GPUs, up to {self.ranks_per_gpu} ranks on each)"
        cores = "cores of its own" if self.rank_cores else "any core"
        reason = f", {self.no_gpu}" if self.no_gpu else ""
        return f"cpu ({self.cpu_threads} threads a rank, {cores}{reason})"


def resolve(args: ServerArgs) -> EngineConfig:
    """Raises ConfigError, with the reason and the fix, for anything that can't be served as asked."""
    check_values(args)
    _check_schedule_policy(args)
    folder = checkpoint_folder(args.model_path, weights=args.load_format != "dummy")
    model = load_model_config(folder)
    quantization = _resolve_quantization(args, folder)
    parallel = resolve_parallel(args, model, quantization)
    _check_moe_combine_dtype(args, model, parallel)
    machine = capability()
    device, no_gpu = _resolve_device(args, machine)
    on_gpu = device == "cuda"
    dtype = ("bfloat16" if on_gpu else "float32") if args.dtype == "auto" else args.dtype
    kernels, no_c_kernels = _resolve_kernels(args, on_gpu, dtype, machine)
    moe_kernel = _resolve_moe_kernel(args, kernels, on_gpu, machine)
    moe_comm_backend, no_peer_memory = _resolve_moe_comm_backend(args, model, parallel, dtype, on_gpu)
    cpu_collectives, _ = _resolve_c(args.cpu_collectives, "--cpu-collectives", RENDEZVOUS, "shared_memory", "gloo")
    kv_cache_dtype = _resolve_kv_cache_dtype(args, model, quantization)
    shares_gpu = parallel.ranks_per_node > machine.num_gpus
    attention_backend, no_flashinfer = _resolve_attention(args, model, kernels, (dtype, kv_cache_dtype), shares_gpu)
    no_cuda_graph = _why_no_cuda_graph(args, model, quantization, attention_backend, moe_kernel)
    context_length, num_pages = _resolve_memory(args, model, parallel, kv_cache_dtype, on_gpu)
    return EngineConfig(
        args=args,
        model_folder=str(folder),
        tokenizer_folder=str(checkpoint_folder(args.tokenizer_path, weights=False) if args.tokenizer_path else folder),
        model=model,
        quantization=quantization,
        parallel=parallel,
        fp4_allgather=should_use_flashinfer_cutlass_moe_fp4_allgather(args, model, quantization),
        device=device,
        no_gpu=no_gpu,
        num_gpus=min(machine.num_gpus, parallel.ranks_per_node) if on_gpu else 0,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        kernels=kernels,
        moe_kernel=moe_kernel,
        attention_backend=attention_backend,
        no_flashinfer=no_flashinfer,
        cuda_graph_rows=() if no_cuda_graph else _cuda_graph_rows(args),
        no_cuda_graph=no_cuda_graph if on_gpu else None,
        no_c_kernels=no_c_kernels,
        moe_comm_backend=moe_comm_backend,
        no_peer_memory=no_peer_memory,
        cpu_collectives=cpu_collectives,
        cpu_threads=args.cpu_threads or max(1, len(machine.cpu_cores) // parallel.ranks_per_node),
        rank_cores=None if on_gpu else _resolve_rank_cores(args, machine.cpu_cores, parallel.ranks_per_node),
        context_length=context_length,
        num_pages=num_pages,
        overlap_schedule=on_gpu and not args.disable_overlap_schedule,
        random_seed=args.random_seed if args.random_seed is not None else secrets.randbits(62),
    )


def _check_schedule_policy(args: ServerArgs) -> None:
    if args.schedule_policy == "lpm" and args.disable_radix_cache:
        raise ConfigError(
            "--schedule-policy lpm looks for the longest cached prefix, and --disable-radix-cache keeps none; "
            "leave one of them out"
        )


def checkpoint_folder(name: str, weights: bool) -> Path:
    """A local folder as it is; otherwise a repository of the Hugging Face hub, downloaded once."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ConfigError(f"--model-path {name!r} is not a folder")
    patterns = ["*.json", "*.jinja", "*.txt", "*.model"] + (["*.safetensors"] if weights else [])
    try:
        from huggingface_hub import snapshot_download  # a fifth of a second, which few need

        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise ConfigError(
            f"--model-path {name!r} is neither a folder nor a repository that could be downloaded: {error}"
        ) from error


def _resolve_quantization(args: ServerArgs, folder: Path) -> QuantizationConfig | None:
    found = load_quantization_config(folder)
    if args.quantization is not None and (found is None or found.method != args.quantization):
        raise ConfigError(
            f"--quantization {args.quantization}: the checkpoint in {folder} is not quantized so; "
            "leave the flag out, or export the checkpoint with nvidia-modelopt"
        )
    return found


def _resolve_device(args: ServerArgs, machine: Capability) -> tuple[str, str | None]:
    """The device, and why auto had to do without a GPU."""
    if args.device == "cpu":
        return "cpu", None
    reason = None
    if machine.cuda_arch is None:
        reason = "PyTorch sees no GPU"
    elif machine.cuda_arch < OLDEST_CUDA_ARCH:
        major, minor = machine.cuda_arch
        reason = f"the GPU has compute capability {major}.{minor}, and 8.0 is needed"
    elif not machine.has_triton:
        reason = "Triton is not installed"
    if reason is None:
        return "cuda", None
    if args.device == "cuda":
        raise ConfigError(f"--device cuda: {reason}; use --device cpu or auto")
    return "cpu", reason


def _resolve_c(asked: str, flag: str, sources: Path, compiled: str, otherwise: str) -> tuple[str, str | None]:
    """The choice between something written in C and what does without, and why auto had to do without."""
    if asked == otherwise:
        return otherwise, None
    try:
        build_c_library(sources)
    except CompileError as error:
        if asked == compiled:
            raise ConfigError(f"{flag} {compiled}: {error}; use {flag} {otherwise} or auto") from error
        return otherwise, str(error)
    return compiled, None


def _resolve_kernels(args: ServerArgs, on_gpu: bool, dtype: str, machine: Capability) -> tuple[str, str | None]:
    """What the model runs on, and why auto had to do without C on a CPU, if so."""
    if on_gpu:
        serves = machine.has_flashinfer and machine.can_compile_cuda and dtype == "bfloat16"
        return ("flashinfer" if serves else "triton"), None
    return _resolve_c(args.cpu_kernels, "--cpu-kernels", CPU_KERNELS, "c", "torch")


def _resolve_attention(
    args: ServerArgs, model: ModelConfig, kernels: str, dtypes: tuple[str, str], shares_gpu: bool
) -> tuple[str, str | None]:
    """The backend, and why auto did not choose FlashInfer on a GPU. `dtypes`: activations and KV cache."""
    no_kernels = _why_no_gpu_attention(kernels, dtypes)
    no_flashinfer = no_kernels or _why_no_flashinfer(model, kernels, shares_gpu)
    no_triton = no_kernels if model.mla else "it has latent attention only, which this model does not use"
    refusals = {
        "flashinfer": no_flashinfer,
        "triton": no_triton,
        "c": None if kernels == "c" else "it needs --cpu-kernels c on a CPU",
    }
    if args.attention_backend == "auto":
        if kernels in ("c", "torch"):
            return kernels, None
        return next(name for name in ("flashinfer", "triton", "torch") if not refusals.get(name)), no_flashinfer
    if refusal := refusals.get(args.attention_backend):
        raise ConfigError(f"--attention-backend {args.attention_backend}: {refusal}; use torch or auto")
    return args.attention_backend, None


def _why_no_gpu_attention(kernels: str, dtypes: tuple[str, str]) -> str | None:
    if kernels in ("c", "torch"):
        return "it needs a GPU, and this engine runs on the CPU"
    if dtypes != ("bfloat16", "bfloat16"):
        return f"it computes in bfloat16, and activations are {dtypes[0]}, the KV cache {dtypes[1]}"
    return None


def _why_no_flashinfer(model: ModelConfig, kernels: str, shares_gpu: bool) -> str | None:
    if kernels == "triton":
        return "FlashInfer is not installed, or there is no nvcc to compile its kernels"
    if not model.mla:
        if model.head_dim in FLASHINFER_HEAD_DIMS:
            return None
        return f"the model's heads have {model.head_dim} values, and FlashInfer's {FLASHINFER_HEAD_DIMS}"
    sizes = model.mla.kv_lora_rank, model.mla.qk_rope_head_dim
    if sizes != FLASHINFER_LATENT_SIZES:
        return f"latent vectors and rotated keys have {sizes} values, and FlashInfer's {FLASHINFER_LATENT_SIZES}"
    # Its programs wait for each other, and need all multiprocessors at once.
    return "its kernel of latent attention hangs where ranks share a GPU" if shares_gpu else None


def _why_no_cuda_graph(
    args: ServerArgs,
    model: ModelConfig,
    quantization: QuantizationConfig | None,
    attention_backend: str,
    moe_kernel: str,
) -> str | None:
    if args.disable_cuda_graph:
        return "--disable-cuda-graph is set"
    if attention_backend not in ("flashinfer", "triton"):
        return f"attention runs on {attention_backend}"
    if model.moe is not None and (quantization is None or moe_kernel == "torch"):
        return "the experts run on torch, which waits for the device"
    return None


def _cuda_graph_rows(args: ServerArgs) -> tuple[int, ...]:
    """Close together while a step's time is that of its launches, further apart where its rows count."""
    largest = args.cuda_graph_max_bs or min(args.max_running_requests, LARGEST_DEFAULT_GRAPH)
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, largest, 32)]
    return (*(rows for rows in steps if rows < largest), largest)


def _resolve_moe_kernel(args: ServerArgs, kernels: str, on_gpu: bool, machine: Capability) -> str:
    """`kernels` is what the rest of the model runs on."""
    no_gpu = None if on_gpu else "needs a GPU, and this engine runs on the CPU"
    refusals = {
        "c": None if kernels == "c" else "runs on a CPU, with a C compiler and without --cpu-kernels torch",
        "triton": no_gpu,
        "flashinfer_cutlass": no_gpu or _why_not_cutlass(machine),
    }
    if args.moe_kernel == "auto":
        if not on_gpu:
            return kernels
        return "triton" if refusals["flashinfer_cutlass"] else "flashinfer_cutlass"
    if refusal := refusals.get(args.moe_kernel):
        raise ConfigError(f"--moe-kernel {args.moe_kernel} {refusal}; use --moe-kernel torch or auto")
    return args.moe_kernel


def _why_not_cutlass(machine: Capability) -> str | None:
    """Why FlashInfer's FP4 kernels do not run on this machine's GPU, if so."""
    major, minor = machine.cuda_arch or (0, 0)
    if (major, minor) < OLDEST_FP4_ARCH:
        return f"needs a GPU of compute capability 10.0 or newer, and this one has {major}.{minor}"
    if not machine.has_flashinfer:
        return "needs FlashInfer, which is not installed (pip install 'nibble[cuda13]' or 'nibble[cuda12]')"
    return None


def _resolve_moe_comm_backend(
    args: ServerArgs, model: ModelConfig, parallel: ParallelConfig, dtype: str, on_gpu: bool
) -> tuple[str | None, str | None]:
    """The backend, and why auto does without peer memory."""
    asked = args.moe_comm_backend
    if nothing_travels := _why_no_rows_between_gpu_ranks(model, parallel, on_gpu):
        if asked != "auto":
            raise ConfigError(f"--moe-comm-backend {asked}: {nothing_travels}; leave it out")
        return None, None
    no_peer_memory = None
    if parallel.ranks_per_node == 1:
        no_peer_memory = "peer memory reaches the ranks of one host, and every node has one rank"
    elif parallel.attn_tp_size > 1 or parallel.moe_tp_size > 1:
        no_peer_memory = (
            f"peer memory needs dp-size = ep-size = tp-size, not {parallel.dp_size}, {parallel.ep_size} and "
            f"{parallel.tp_size}"
        )
    elif dtype != "bfloat16":
        no_peer_memory = f"peer memory holds results in bfloat16, and activations are {dtype}"
    elif model.hidden_size % PEER_ROW_UNIT:
        no_peer_memory = f"peer memory needs rows of a multiple of {PEER_ROW_UNIT} values, not {model.hidden_size}"
    if asked == "peer" and no_peer_memory:
        raise ConfigError(f"--moe-comm-backend peer: {no_peer_memory}; use nccl or auto")
    if asked == "nccl":
        return "nccl", None
    return ("nccl", no_peer_memory) if no_peer_memory else ("peer", None)


def _why_no_rows_between_gpu_ranks(model: ModelConfig, parallel: ParallelConfig, on_gpu: bool) -> str | None:
    if not on_gpu:
        return "this engine runs on the CPU, where --cpu-collectives chooses"
    return _why_no_rows_between_ranks(model, parallel)


def _why_no_rows_between_ranks(model: ModelConfig, parallel: ParallelConfig) -> str | None:
    if model.moe is None:
        return f"{model.architecture} has no experts"
    return "there is one rank" if parallel.world_size == 1 else None


def _check_moe_combine_dtype(args: ServerArgs, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Rows go back to one rank each, which sums them, only where ranks are an attention group each."""
    if args.moe_combine_dtype != "fp8":
        return
    reason = _why_no_rows_between_ranks(model, parallel)
    if reason is None and parallel.attn_tp_size > 1:
        reason = (
            f"with dp-size {parallel.dp_size} below tp-size {parallel.tp_size} results come back in sums over "
            "attention groups, which are not taken in fp8"
        )
    if reason:
        raise ConfigError(f"--moe-combine-dtype fp8: {reason}; leave it out")


def _resolve_rank_cores(args: ServerArgs, cores: Sequence[int], ranks: int) -> tuple[tuple[int, ...], ...] | None:
    """Equal shares, where the ranks are meant to use all cores: a rank that moves waits for its cache to follow."""
    share = len(cores) // ranks
    if args.cpu_binding == "off" or args.cpu_threads is not None or ranks == 1 or share == 0:
        return None
    return tuple(tuple(cores[rank * share : (rank + 1) * share]) for rank in range(ranks))


def _resolve_kv_cache_dtype(args: ServerArgs, model: ModelConfig, quantization: QuantizationConfig | None) -> str:
    if args.kv_cache_dtype == "fp8_e4m3" and model.mla:
        raise ConfigError(
            f"--kv-cache-dtype fp8_e4m3: {model.architecture} caches latent vectors, for which checkpoints have no "
            "scales; use bfloat16 or auto"
        )
    if args.kv_cache_dtype != "auto":
        return args.kv_cache_dtype
    if quantization is not None and quantization.kv_cache_quant_algo == "FP8" and not model.mla:
        return "fp8_e4m3"
    return model.dtype if model.dtype in DTYPE_BYTES else "bfloat16"


def _resolve_memory(
    args: ServerArgs, model: ModelConfig, parallel: ParallelConfig, dtype: str, on_gpu: bool
) -> tuple[int, int | None]:
    """The context length, and the pages of one rank's KV cache. One whole context always fits."""
    longest = model.max_position_embeddings
    if args.context_length is not None and args.context_length > longest:
        raise ConfigError(f"--context-length {args.context_length} exceeds the checkpoint's {longest}")
    token_bytes = parallel.share_of(model).kv_elements_per_token * DTYPE_BYTES[dtype]
    tokens = args.max_total_tokens
    if tokens is None and on_gpu:
        return args.context_length or longest, None
    if tokens is None:
        affordable = available_memory_bytes() // 4 // parallel.ranks_per_node // token_bytes
        tokens = min(args.max_running_requests * (args.context_length or longest), affordable)
    pages = tokens // args.page_size
    context_length = args.context_length or min(longest, pages * args.page_size)
    if pages * args.page_size < max(context_length, 1):
        raise ConfigError(
            f"the KV cache of a rank holds {pages} pages of {args.page_size} tokens "
            f"({tokens * token_bytes / 2**20:.0f} MiB), fewer than one request of --context-length "
            f"{context_length} needs; lower --context-length or raise --max-total-tokens"
        )
    return context_length, pages
