"""What is chosen on GPUs: kernels, CUDA graphs, shared GPUs, and how rows travel between ranks."""

import pytest

from config_cases import DENSE, DP2, MOE, NVFP4, machine, on_a_gpu, refused, resolved


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
