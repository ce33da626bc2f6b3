"""What can be asked for, what is refused with which advice, and when the FP4 all-gather is on."""

import json
from pathlib import Path

import msgspec
import pytest
import torch

from config_cases import DENSE, DP2, EMBEDDED, NVFP4, TWO_RANKS, refused, resolved
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
