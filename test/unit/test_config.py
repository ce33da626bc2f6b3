"""What can be asked for, what is refused with which advice, and when the FP4 all-gather is on."""

import json
from pathlib import Path

import msgspec
import pytest
import torch

from nibble.config.command_line import parse_server_args
from nibble.config.model_config import load_model_config
from nibble.config.quantization_config import QuantizationConfig, load_quantization_config
from nibble.config.resolve import EngineConfig, resolve
from nibble.config.server_args import ServerArgs
from nibble.kernels.cpu import library
from nibble.kernels.select import select_kernels
from nibble.utils.c_library import CompileError
from nibble.utils.capability import Capability
from nibble.utils.errors import ConfigError

MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "num_experts": 24,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "eos_token_id": 2,
}
DENSE = {
    **{name: value for name, value in MOE.items() if "expert" not in name and not name.startswith("moe")},
    "architectures": ["Qwen3ForCausalLM"],
}
NVFP4 = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}
EMBEDDED = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 16}}},
}
DP2 = {"tp_size": 2, "dp_size": 2, "ep_size": 2, "enable_dp_attention": True, "enable_flashinfer_cutlass_moe": True}


TWO_RANKS = {"tp_size": 2, "dp_size": 2, "ep_size": 2, "enable_dp_attention": True}


@pytest.fixture
def checkpoint(tmp_path):
    def write(config: dict | None = None, quantization: dict | None = None, **changes: object) -> Path:
        content = {**(config or MOE), **changes}
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
        if quantization is not None:
            (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
        return tmp_path

    return write


def resolved(folder: Path, **args: object) -> EngineConfig:
    return resolve(ServerArgs(model_path=str(folder), **args))


def refused(folder: Path, **args: object) -> str:
    with pytest.raises(ConfigError) as error:
        resolved(folder, **args)
    return str(error.value)


# Flags


def test_the_longest_prefix_is_not_looked_for_where_none_is_kept(checkpoint):
    assert "leave one of them out" in refused(checkpoint(), schedule_policy="lpm", disable_radix_cache=True)


def test_flags_have_sglangs_names_and_short_forms():
    args = parse_server_args(
        "--model-path m --tp 4 --dp 4 --ep 4 --enable-dp-attention --enable-flashinfer-cutlass-moe "
        "--disable-flashinfer-cutlass-moe-fp4-allgather --quantization modelopt_fp4 --moe-kernel torch".split()
    )
    assert (args.tp_size, args.dp_size, args.ep_size) == (4, 4, 4)
    assert args.enable_dp_attention and args.enable_flashinfer_cutlass_moe
    assert args.disable_flashinfer_cutlass_moe_fp4_allgather


def test_an_unknown_flag_and_an_abbreviation_are_refused(capsys):
    for flag in ("--no-such-flag", "--enable-dp"):
        with pytest.raises(SystemExit):
            parse_server_args(["--model-path", "m", flag])
        assert flag in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tp_size", "page_size", "chunked_prefill_size", "max_running_requests"])
def test_a_size_of_zero_is_refused_with_its_flag(checkpoint, name):
    assert f"--{name.replace('_', '-')} must be greater than 0, got 0" in refused(checkpoint(), **{name: 0})


@pytest.mark.parametrize("name", ["api_key", "admin_api_key"])
def test_a_key_that_everybody_knows_is_refused(checkpoint, name):
    assert "must not be empty" in refused(checkpoint(), **{name: ""})


def test_the_configuration_travels_to_the_ranks_unchanged(checkpoint):
    config = resolved(checkpoint(quantization=NVFP4), **DP2)
    assert msgspec.json.decode(msgspec.json.encode(config), type=EngineConfig) == config


# Parallel sizes: each refusal says what to do instead


@pytest.mark.parametrize(
    ("args", "advice"),
    [
        ({"tp_size": 2, "dp_size": 2, "ep_size": 2}, "--dp-size 2 needs --enable-dp-attention"),
        ({**DP2, "dp_size": 4}, "--dp-size 4 must divide --tp-size 2, the ranks of all its attention groups; possible"),
        ({**DP2, "ep_size": 4}, "--ep-size 4 must divide --tp-size 2, the ranks of all expert groups; possible sizes"),
        ({"tp_size": 3}, "groups of 3 ranks (--tp-size divided by --dp-size) can't share 4 heads and 2 heads of keys"),
        ({"tp_size": 8, "dp_size": 1}, "possible: [1, 2, 4] ranks"),
        (
            {"tp_size": 5, "dp_size": 5, "ep_size": 5, "enable_dp_attention": True},
            "the 24 experts; possible sizes: [1]",
        ),
        ({**DP2, "moe_dense_tp_size": 2}, "--moe-dense-tp-size 2 is not supported"),
        ({"enable_dp_lm_head": True}, "--enable-dp-lm-head needs --enable-dp-attention"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_fix(checkpoint, args, advice):
    assert advice in refused(checkpoint(), **args)


def test_experts_of_fewer_blocks_than_ranks_are_not_split_in_width(checkpoint):
    ranks = {"tp_size": 8, "dp_size": 8, "enable_dp_attention": True}
    message = refused(checkpoint(quantization=NVFP4), **ranks)
    assert "an expert of width 64 over 8 ranks, and it can only be cut at multiples of 16" in message
    assert "possible sizes: [2, 4, 8]" in message
    assert resolved(checkpoint(quantization=NVFP4), **ranks, ep_size=2).parallel.moe_tp_size == 4
    none = {**ranks, "tp_size": 7, "dp_size": 7}
    assert "no size will do; choose another --tp-size" in refused(checkpoint(quantization=NVFP4), **none)
    (checkpoint() / "hf_quant_config.json").unlink()
    assert resolved(checkpoint(), **ranks).parallel.moe_tp_size == 8


def test_dense_layers_of_fewer_blocks_than_ranks_are_not_split(checkpoint):
    narrow = {"intermediate_size": 48, "mlp_only_layers": [0]}
    message = refused(checkpoint(quantization=NVFP4, **narrow), tp_size=4)
    assert "dense layers of width 48, cut at multiples of 16, can't be split over the 4 ranks" in message
    assert "raise --dp-size or set --moe-dense-tp-size 1" in message
    assert resolved(checkpoint(quantization=NVFP4, **narrow), tp_size=4, moe_dense_tp_size=1).parallel.attn_tp_size == 4
    assert resolved(checkpoint(quantization=NVFP4, intermediate_size=48), tp_size=4)  # no layer is dense


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_every_split_whose_sizes_divide_the_ranks_is_valid(checkpoint, tp, dp, ep):
    args = {"tp_size": tp, "dp_size": dp, "ep_size": ep, "enable_dp_attention": True}
    if max(dp, ep) > tp:
        assert f"must divide --tp-size {tp}" in refused(checkpoint(), **args)
        return
    parallel = resolved(checkpoint(), **args).parallel
    assert (parallel.attn_tp_size, parallel.moe_tp_size) == (tp // dp, tp // ep)
    groups = [parallel.attn_tp_ranks(rank) for rank in range(tp)]
    assert [rank for dp_rank in range(dp) for rank in groups[parallel.first_rank(dp_rank)]] == list(range(tp))
    assert all(
        rank in groups[rank] and groups[rank].start == groups[r].start for rank in range(tp) for r in groups[rank]
    )


def test_a_rank_caches_its_own_heads_of_keys_and_values_and_at_least_one(checkpoint, monkeypatch):
    folder = checkpoint()
    model = load_model_config(folder)
    for tp, kv_heads in ((1, 2), (2, 1), (4, 1)):
        share = resolved(folder, tp_size=tp).parallel.share_of(model)
        assert (share.num_heads, share.num_kv_heads) == (4 // tp, kv_heads)
    monkeypatch.setattr("nibble.config.resolve.available_memory_bytes", lambda: 2**28)
    budget = {"max_running_requests": 10**6, "context_length": 512}
    whole, half = (resolved(folder, tp_size=2, dp_size=dp, enable_dp_attention=True, **budget) for dp in (2, 1))
    assert whole.num_pages is not None and half.num_pages is not None
    assert half.num_pages == 2 * whole.num_pages  # the same memory


@pytest.mark.parametrize(
    ("args", "split"),
    [
        ({}, "attention heads: 2, dense layers: 2, lm_head: 4, the width of an expert: 4"),
        ({"enable_dp_lm_head": True}, "attention heads: 2, dense layers: 2, lm_head: 2, the width of an expert: 4"),
        ({"moe_dense_tp_size": 1}, "attention heads: 2, dense layers: 1, lm_head: 4, the width of an expert: 4"),
        ({"dp_size": 1, "ep_size": 4}, "attention heads: 4, dense layers: 4, lm_head: 4, the width of an expert: 1"),
    ],
)
def test_the_log_says_over_how_many_ranks_each_part_is_split(checkpoint, args, split):
    config = resolved(checkpoint(), **{"tp_size": 4, "dp_size": 2, "enable_dp_attention": True, **args})
    assert f"ranks that share {split}" in config.decisions()


def test_a_tied_lm_head_is_split_like_the_embedding(checkpoint):
    config = resolved(checkpoint(tie_word_embeddings=True), tp_size=4, dp_size=2, enable_dp_attention=True)
    assert config.parallel.dp_lm_head


def test_a_dense_model_has_no_experts_to_split(checkpoint):
    folder = checkpoint(DENSE)
    assert "no experts to split" in refused(folder, **DP2)
    assert resolved(folder, **{**DP2, "ep_size": 1}).parallel.dp_size == 2


@pytest.mark.parametrize("kernel", ["triton", "flashinfer_cutlass"])
def test_a_kernel_that_cannot_run_here_is_an_error_with_the_reason(checkpoint, kernel):
    message = refused(checkpoint(), moe_kernel=kernel, device="cpu")
    assert f"--moe-kernel {kernel} needs a GPU" in message and "--moe-kernel torch" in message


def test_no_rank_chooses_its_kernels_for_itself(monkeypatch):
    """Ranks with different kernels would disagree: one that cannot run what was chosen for all of them fails."""

    def cannot_compile(folder: Path) -> Path:
        raise CompileError("no C compiler on this rank")

    monkeypatch.setattr(library, "build_c_library", cannot_compile)
    library.c_kernels.cache_clear()
    for chosen in (select_kernels("c", "c"), select_kernels("c", "torch")):
        with pytest.raises(CompileError, match="on this rank"):
            chosen.rms_norm(torch.ones(1, 16), torch.ones(16), 1e-6)


# The FP4 all-gather


def test_fp4_allgather_is_on_when_every_condition_holds(checkpoint):
    config = resolved(checkpoint(quantization=NVFP4), **DP2)
    assert config.fp4_allgather.enabled
    assert "FP4 all-gather is on: modelopt_fp4 with dp = ep = 2" in config.decisions()


@pytest.mark.parametrize(
    ("quantization", "args", "reason"),
    [
        (NVFP4, {"enable_flashinfer_cutlass_moe": False}, "--enable-flashinfer-cutlass-moe is absent"),
        (
            NVFP4,
            {"disable_flashinfer_cutlass_moe_fp4_allgather": True},
            "--disable-flashinfer-cutlass-moe-fp4-allgather is set",
        ),
        (None, {}, "the checkpoint's quantization is None, not modelopt_fp4"),
        (NVFP4, {"ep_size": 1}, "dp-size 2 differs from ep-size 1"),
        (NVFP4, {"tp_size": 4}, "dp-size and ep-size 2 are smaller than tp-size 4"),
        (
            NVFP4,
            {"tp_size": 1, "dp_size": 1, "ep_size": 1, "enable_dp_attention": False},
            "--enable-dp-attention is absent",
        ),
    ],
)
def test_the_condition_that_keeps_fp4_allgather_off_is_named(checkpoint, quantization, args, reason):
    config = resolved(checkpoint(quantization=quantization), **{**DP2, **args})
    assert not config.fp4_allgather.enabled
    assert config.decisions()[0] == f"FP4 all-gather is off: {reason}"


# Memory


def test_the_cache_is_as_large_as_the_running_requests_need(checkpoint):
    config = resolved(checkpoint(), max_running_requests=3, context_length=100, page_size=10)
    assert config.num_pages == 30 and config.context_length == 100


def test_a_context_longer_than_the_cache_is_refused_or_shortened(checkpoint):
    assert "raise --max-total-tokens" in refused(checkpoint(), context_length=200, max_total_tokens=100)
    assert resolved(checkpoint(), max_total_tokens=100, page_size=16).context_length == 96
    assert "exceeds the checkpoint's 512" in refused(checkpoint(), context_length=513)


# Checkpoints


def test_quantization_is_read_from_either_file(checkpoint):
    from_file = load_quantization_config(checkpoint(quantization=NVFP4))
    (checkpoint() / "hf_quant_config.json").unlink()
    from_config = load_quantization_config(checkpoint(quantization_config=EMBEDDED))
    assert from_file == from_config == QuantizationConfig("NVFP4", 16, None, ("lm_head",))
    assert load_quantization_config(checkpoint()) is None


def test_two_descriptions_of_the_quantization_must_agree(checkpoint):
    folder = checkpoint(quantization=NVFP4, quantization_config=EMBEDDED)
    assert load_quantization_config(folder) is not None
    folder = checkpoint(quantization=NVFP4, quantization_config={**EMBEDDED, "ignore": ["lm_head", "x"]})
    with pytest.raises(ConfigError, match="twice, and differently"):
        load_quantization_config(folder)


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({**NVFP4, "quant_algo": "FP8"}, "quantization 'FP8'"),
        ({**NVFP4, "group_size": 32}, "group size 32"),
        ({**NVFP4, "kv_cache_quant_algo": "INT8"}, "KV cache quantized as 'INT8'"),
    ],
)
def test_formats_that_are_not_run_are_refused(checkpoint, quantization, reason):
    assert reason in refused(checkpoint(quantization=quantization))


def test_other_quantization_methods_are_refused_by_name(checkpoint):
    assert "'awq' is not supported" in refused(checkpoint(quantization_config={"quant_method": "awq"}))


def test_asking_for_modelopt_fp4_on_a_plain_checkpoint_is_refused(checkpoint):
    assert "is not quantized so" in refused(checkpoint(), quantization="modelopt_fp4")
    assert resolved(checkpoint(quantization=NVFP4), quantization="modelopt_fp4").quantization is not None


def test_excluded_modules_may_hold_wildcards():
    config = QuantizationConfig("NVFP4", 16, None, ("lm_head", "model.layers.*.mlp.gate", "model.layers.1*", "a.b"))
    for name in ("lm_head", "model.layers.0.mlp.gate", "model.layers.1.self_attn.q_proj", "a.b", "a.b.q_proj"):
        assert config.is_excluded(name), name
    for name in ("model.layers.0.mlp.gate_proj", "model.layers.2.self_attn.q_proj", "a.bc"):
        assert not config.is_excluded(name), name


def test_parts_of_a_merged_layer_are_quantized_together_or_not_at_all():
    config = QuantizationConfig("NVFP4", 16, None, ("x.q_proj",))
    assert config.is_quantized("y.q_proj", "y.k_proj") and not config.is_quantized("x.q_proj")
    with pytest.raises(ConfigError, match=r"x.q_proj \(excluded\), x.k_proj \(quantized\)"):
        config.is_quantized("x.q_proj", "x.k_proj")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "'linear' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "has no field 'original_max_position_embeddings'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported"),
        ({"vocab_size": None}, "has no field 'vocab_size'"),
    ],
)
def test_what_the_model_code_does_not_do_is_refused_by_name(checkpoint, changes, reason):
    assert reason in refused(checkpoint(**changes))


def test_a_folder_that_is_no_checkpoint_is_an_error_that_says_so(tmp_path):
    assert "config.json does not exist" in refused(tmp_path)
    assert "is not a folder" in refused(tmp_path / "nowhere")


def test_the_end_tokens_of_generation_config_win(checkpoint):
    folder = checkpoint()
    assert load_model_config(folder).eos_token_ids == (2,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert load_model_config(folder).eos_token_ids == (7, 8)


@pytest.mark.parametrize(
    ("cores", "flags", "expected"),
    [
        ((0, 1, 4, 5, 7), {}, ((0, 1), (4, 5))),
        ((3, 5), {}, ((3,), (5,))),
        ((3,), {}, None),
        ((0, 1, 2, 3), {"cpu_threads": 1}, None),
        ((0, 1, 2, 3), {"cpu_binding": "off"}, None),
        ((0, 1, 2, 3), {"tp_size": 1, "dp_size": 1, "ep_size": 1}, None),
    ],
)
def test_ranks_that_use_all_cores_keep_to_equal_shares_of_them(checkpoint, monkeypatch, cores, flags, expected):
    monkeypatch.setattr("nibble.config.resolve.capability", lambda: Capability(cores, 0, None, False, False, False))
    config = resolve(ServerArgs(model_path=str(checkpoint()), **{**TWO_RANKS, **flags}))
    assert config.rank_cores == expected
    assert ("cores of its own" if expected else "any core") in " ".join(config.decisions())


def machine(
    num_gpus: int = 1, arch: tuple[int, int] = (9, 0), has_triton: bool = True, has_flashinfer: bool = False
) -> Capability:
    return Capability((0, 1), num_gpus, arch if num_gpus else None, has_triton, has_flashinfer, has_flashinfer)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (machine(num_gpus=0), "PyTorch sees no GPU"),
        (machine(arch=(7, 5)), "compute capability 7.5, and 8.0 is needed"),
        (machine(has_triton=False), "Triton is not installed"),
    ],
)
def test_a_gpu_that_does_not_serve_is_refused_if_asked_for_and_named_in_the_log_if_not(
    checkpoint, monkeypatch, found, reason
):
    monkeypatch.setattr("nibble.config.resolve.capability", lambda: found)
    assert reason in refused(checkpoint(), device="cuda")
    config = resolved(checkpoint())
    assert config.device == "cpu" and reason in " ".join(config.decisions())


def test_a_gpu_is_used_without_being_asked_for_and_not_when_told_so(checkpoint, monkeypatch):
    monkeypatch.setattr("nibble.config.resolve.capability", machine)
    config = resolved(checkpoint(quantization=NVFP4))
    assert (config.device, config.dtype, config.kernels, config.moe_kernel) == ("cuda", "bfloat16", "triton", "triton")
    assert config.num_pages is None and config.rank_cores is None
    assert resolved(checkpoint(quantization=NVFP4), device="cpu").device == "cpu"


@pytest.mark.parametrize("arch", [(10, 0), (10, 3), (12, 0)])
def test_flashinfers_experts_are_chosen_where_there_are_fp4_tensor_cores(checkpoint, monkeypatch, arch):
    found = machine(arch=arch, has_flashinfer=True)
    monkeypatch.setattr("nibble.config.resolve.capability", lambda: found)
    for asked in ("auto", "flashinfer_cutlass"):
        config = resolved(checkpoint(quantization=NVFP4), moe_kernel=asked)
        assert (config.kernels, config.moe_kernel) == ("flashinfer", "flashinfer_cutlass")
        assert "of the experts: flashinfer_cutlass" in " ".join(config.decisions())
    for asked in ("triton", "torch"):
        assert resolved(checkpoint(quantization=NVFP4), moe_kernel=asked).moe_kernel == asked
    assert "this engine runs on the CPU" in refused(checkpoint(), moe_kernel="flashinfer_cutlass", device="cpu")


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (machine(arch=(9, 0), has_flashinfer=True), "compute capability 10.0 or newer, and this one has 9.0"),
        (machine(arch=(10, 0)), "needs FlashInfer, which is not installed"),
    ],
)
def test_without_flashinfers_experts_auto_takes_triton_and_asking_for_them_is_refused(
    checkpoint, monkeypatch, found, reason
):
    monkeypatch.setattr("nibble.config.resolve.capability", lambda: found)
    assert resolved(checkpoint(quantization=NVFP4)).moe_kernel == "triton"
    message = refused(checkpoint(quantization=NVFP4), moe_kernel="flashinfer_cutlass")
    assert reason in message and "use --moe-kernel torch or auto" in message


def on_a_gpu(monkeypatch, **found) -> None:
    monkeypatch.setattr("nibble.config.resolve.capability", lambda: machine(has_flashinfer=True, **found))


def test_on_a_gpu_attention_is_flashinfers_and_decoding_steps_are_cuda_graphs(checkpoint, monkeypatch):
    on_a_gpu(monkeypatch)
    config = resolved(checkpoint(quantization=NVFP4, head_dim=64), max_running_requests=20)
    assert config.attention_backend == "flashinfer"
    assert config.cuda_graph_rows == (1, 2, 4, 8, 16, 20)
    assert "attention: flashinfer, CUDA graphs of 1, 2, 4, 8, 16, 20 rows" in config.decisions()


@pytest.mark.parametrize(
    ("flags", "largest"),
    [({}, 64), ({"max_running_requests": 1024}, 256), ({"cuda_graph_max_bs": 1}, 1), ({"cuda_graph_max_bs": 300}, 300)],
)
def test_graphs_hold_as_many_rows_as_a_rank_may_run_up_to_a_limit(checkpoint, monkeypatch, flags, largest):
    on_a_gpu(monkeypatch)
    rows = resolved(checkpoint(quantization=NVFP4, head_dim=64), **flags).cuda_graph_rows
    assert rows[0] == 1 and rows[-1] == largest and list(rows) == sorted(set(rows))


@pytest.mark.parametrize(
    ("found", "model", "flags", "reason"),
    [
        ({"has_flashinfer": False}, {}, {}, "FlashInfer is not installed, or there is no nvcc"),
        ({}, {"head_dim": 32}, {}, "the model's heads have 32 values"),
        ({}, {}, {"kv_cache_dtype": "float32"}, "activations are bfloat16, the KV cache float32"),
    ],
)
def test_attention_runs_on_torch_where_flashinfer_has_no_kernels_and_asking_for_it_is_refused(
    checkpoint, monkeypatch, found, model, flags, reason
):
    monkeypatch.setattr("nibble.config.resolve.capability", lambda: machine(**{"has_flashinfer": True, **found}))
    folder = checkpoint(quantization=NVFP4, **{"head_dim": 64, **model})
    config = resolved(folder, **flags)
    assert config.attention_backend == "torch" and config.cuda_graph_rows == ()
    assert reason in " ".join(config.decisions()) and "no CUDA graphs" in " ".join(config.decisions())
    assert reason in refused(folder, attention_backend="flashinfer", **flags)


@pytest.mark.parametrize(
    ("quantization", "flags", "reason"),
    [
        (NVFP4, {"disable_cuda_graph": True}, "--disable-cuda-graph is set"),
        (NVFP4, {"attention_backend": "torch"}, "attention runs on torch"),
        (NVFP4, {"moe_kernel": "torch"}, "the experts run on torch"),
        (None, {}, "the experts run on torch"),
    ],
)
def test_what_cannot_be_captured_is_launched_kernel_by_kernel_and_the_log_says_why(
    checkpoint, monkeypatch, quantization, flags, reason
):
    on_a_gpu(monkeypatch)
    config = resolved(checkpoint(head_dim=64, **({"quantization": quantization} if quantization else {})), **flags)
    assert config.cuda_graph_rows == () and reason in " ".join(config.decisions())


def test_a_cpu_has_no_cuda_graphs_and_says_nothing_of_them(checkpoint):
    config = resolved(checkpoint(), device="cpu")
    assert config.cuda_graph_rows == () and "CUDA" not in " ".join(config.decisions())
    assert "needs a GPU" in refused(checkpoint(), device="cpu", attention_backend="flashinfer")


@pytest.mark.parametrize(("gpus", "ranks", "shared"), [(1, 4, 4), (2, 4, 2), (3, 4, 2), (8, 4, 1)])
def test_more_ranks_than_gpus_share_them(checkpoint, monkeypatch, gpus, ranks, shared):
    monkeypatch.setattr("nibble.config.resolve.capability", lambda: machine(gpus))
    sizes = dict.fromkeys(("tp_size", "dp_size", "ep_size"), ranks)
    config = resolved(checkpoint(), enable_dp_attention=True, **sizes)
    assert config.num_gpus == min(gpus, ranks) and config.ranks_per_gpu == shared


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
def test_a_fraction_of_the_memory_lies_between_none_and_all(checkpoint, fraction):
    assert "--mem-fraction-static must be between 0 and 1" in refused(checkpoint(), mem_fraction_static=fraction)


# Rows between GPU ranks


def test_rows_go_through_peer_memory_between_gpu_ranks_unless_told_otherwise(checkpoint, monkeypatch):
    on_a_gpu(monkeypatch)
    config = resolved(checkpoint(quantization=NVFP4), **DP2)
    assert config.moe_comm_backend == "peer"
    assert "rows to the experts and back: through peer memory, if every rank" in " ".join(config.decisions())
    config = resolved(checkpoint(quantization=NVFP4), moe_comm_backend="nccl", **DP2)
    assert config.moe_comm_backend == "nccl" and "rows to the experts and back: nccl" in config.decisions()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({**DP2, "ep_size": 1}, "peer memory needs dp-size = ep-size = tp-size, not 2, 1 and 2"),
        ({**DP2, "dp_size": 1}, "peer memory needs dp-size = ep-size = tp-size, not 1, 2 and 2"),
        ({**DP2, "dtype": "float32"}, "peer memory holds results in bfloat16, and activations are float32"),
    ],
)
def test_what_peer_memory_is_not_made_for_takes_nccl_and_asking_for_it_is_refused(
    checkpoint, monkeypatch, flags, reason
):
    on_a_gpu(monkeypatch)
    config = resolved(checkpoint(quantization=NVFP4), **flags)
    assert config.moe_comm_backend == "nccl"
    assert f"rows to the experts and back: nccl ({reason})" in config.decisions()
    message = refused(checkpoint(quantization=NVFP4), moe_comm_backend="peer", **flags)
    assert message == f"--moe-comm-backend peer: {reason}; use nccl or auto"


@pytest.mark.parametrize("asked", ["nccl", "peer"])
def test_a_backend_is_refused_where_no_rows_travel_between_gpus(checkpoint, monkeypatch, asked):
    assert "runs on the CPU, where --cpu-collectives chooses; leave it out" in refused(
        checkpoint(), moe_comm_backend=asked, device="cpu", **DP2
    )
    on_a_gpu(monkeypatch)
    assert "there is one rank" in refused(checkpoint(), moe_comm_backend=asked)
    assert resolved(checkpoint()).moe_comm_backend is None


# The type in which results travel


def test_results_travel_in_the_type_of_activations_unless_fp8_is_asked_for(checkpoint, monkeypatch):
    assert "the experts' results travel in float32" in resolved(checkpoint(), **DP2).decisions()
    in_fp8 = "the experts' results travel in fp8_e4m3, a scale for 128 columns (--moe-combine-dtype fp8)"
    assert in_fp8 in resolved(checkpoint(), moe_combine_dtype="fp8", **DP2).decisions()
    assert in_fp8 in resolved(checkpoint(), moe_combine_dtype="fp8", **{**DP2, "ep_size": 1}).decisions()
    assert "results travel" not in " ".join(resolved(checkpoint()).decisions())
    on_a_gpu(monkeypatch)
    assert "the experts' results travel in bfloat16" in resolved(checkpoint(), **DP2).decisions()
    assert in_fp8 in resolved(checkpoint(), moe_combine_dtype="fp8", **DP2).decisions()


@pytest.mark.parametrize(
    ("model", "flags", "reason"),
    [
        (MOE, {}, "there is one rank"),
        (DENSE, {**DP2, "ep_size": 1}, "Qwen3ForCausalLM has no experts"),
        (MOE, {**DP2, "dp_size": 1}, "with dp-size 1 below tp-size 2 results come back in sums over attention groups"),
    ],
)
def test_fp8_is_refused_where_no_results_travel_or_not_to_one_rank_each(checkpoint, model, flags, reason):
    message = refused(checkpoint(model), moe_combine_dtype="fp8", **flags)
    assert message.startswith("--moe-combine-dtype fp8: ") and reason in message and message.endswith("; leave it out")
