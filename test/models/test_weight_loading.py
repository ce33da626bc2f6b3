"""From safetensors files to a model: what is read, by which rank, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import edit_tensors, quantize_to_nvfp4, save_qwen3, save_qwen3_moe
from nibble.distributed.communicator import SingleRankCommunicator
from nibble.kernels.torch.topk import topk_softmax
from nibble.layers.linear import Linear
from nibble.layers.moe.fused_moe import FusedMoE
from nibble.layers.moe.token_dispatcher import GatheredRows
from nibble.layers.weights import float_target
from nibble.model_executor import weight_loader
from nibble.model_executor.weight_loader import load_weights
from nibble.models.qwen3_moe import Qwen3MoeForCausalLM
from nibble.models.registry import create_model
from nibble.utils.errors import ConfigError
from runners import all_logits, data_parallel_state, engine_config, single_rank_runner

PROMPTS = [list(range(3, 20)), [9]]
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj"
NUM_EXPERTS = 12


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("plain", "nvfp4")}
    for folder in folders.values():
        save_qwen3_moe(folder)
    quantize_to_nvfp4(folders["nvfp4"])
    return folders


@pytest.fixture(params=["plain", "nvfp4"])
def any_format(request, saved, tmp_path) -> Path:
    """A copy of a Qwen3-MoE checkpoint, that a test may damage."""
    return shutil.copytree(saved[request.param], tmp_path / request.param)


@pytest.fixture
def nvfp4(saved, tmp_path) -> Path:
    return shutil.copytree(saved["nvfp4"], tmp_path / "nvfp4")


def shard(folder: Path, count: int = 3) -> list[Path]:
    """Splits the tensors over `count` files with an index, as the Hugging Face hub stores large models."""
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    weight_map = {}
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    for number, file in enumerate(names):
        part = {name: tensors[name] for name in sorted(tensors)[number::count]}
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [folder / file for file in names]


def loaded(folder: Path, rank: int = 0, world_size: int = 1, **args: object) -> Qwen3MoeForCausalLM:
    """The model of one rank of several; its peers are only needed to run it."""
    group = SingleRankCommunicator("dp")
    group.rank, group.world_size = rank, world_size
    config = engine_config(folder, **args)
    model = create_model(config, data_parallel_state(group, rank))
    load_weights(model, folder, config.args.load_format, group.device, show_progress=False)
    assert isinstance(model, Qwen3MoeForCausalLM)
    return model


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        single_rank_runner(folder, log_level="error")
    return str(error.value)


def bits(folder: Path, **args: object) -> list[bytes]:
    logits = all_logits(single_rank_runner(folder, log_level="error", **args), PROMPTS)
    assert all(torch.isfinite(part).all() for part in logits)
    return [part.contiguous().numpy().tobytes() for part in logits]


@pytest.fixture
def uninitialized_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # also fills what torch.empty returns with NaN
    yield
    torch.use_deterministic_algorithms(False)


# What is read


def test_shards_give_the_same_model_as_one_file(any_format):
    whole = bits(any_format)
    shard(any_format)
    assert bits(any_format) == whole
    (any_format / INDEX).unlink()
    assert bits(any_format) == whole


def test_files_that_the_index_does_not_name_are_not_read(any_format):
    whole = bits(any_format)
    shard(any_format)
    save_file({"stale": torch.zeros(1), "model.norm.weight": torch.zeros(64)}, any_format / FILE)
    assert bits(any_format) == whole


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
def test_no_weight_is_left_uninitialized(any_format):
    assert torch.empty(1).isnan()
    bits(any_format)


def test_tied_embeddings_do_not_need_the_output_projection_and_do_not_read_a_copy(any_format, read_names):
    tied = bits(any_format)
    edit_tensors(any_format, lambda tensors: tensors.update(copy_of_head(tensors)))
    assert bits(any_format) == tied
    assert "lm_head.weight" not in read_names


def copy_of_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def test_embeddings_that_are_not_tied_need_the_output_projection(tmp_path):
    save_qwen3(tmp_path, tie_word_embeddings=False)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    assert "1 weights of the model are not in the checkpoint: lm_head.weight" in refused(tmp_path)


def test_scalars_may_have_one_dimension_or_none(nvfp4):
    scalars = bits(nvfp4)

    def add_a_dimension(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.reshape(1) for name, tensor in tensors.items() if tensor.dim() == 0})

    edit_tensors(nvfp4, add_a_dimension)
    assert bits(nvfp4) == scalars


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floating_point_tensors_are_cast_exactly_from_any_type(saved, tmp_path, dtype):
    folder = shutil.copytree(saved["plain"], tmp_path / "half")

    def cast(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    edit_tensors(folder, cast)
    norm = loaded(folder).decoder[1].input_layernorm.weight
    assert norm.dtype == torch.float32
    assert torch.equal(
        norm, load_file(saved["plain"] / FILE)["model.layers.1.input_layernorm.weight"].to(dtype).float()
    )


# Ranks


@pytest.fixture
def read_names(monkeypatch) -> list[str]:
    """The names of all tensors whose values are read from files, in order."""
    names: list[str] = []

    class Recorder:
        def __init__(self, *args: object, **options: object) -> None:
            self.file = original(*args, **options)

        def __enter__(self) -> "Recorder":
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def keys(self) -> list[str]:
            return self.opened.keys()

        def get_tensor(self, name: str) -> Tensor:
            names.append(name)
            return self.opened.get_tensor(name)

    original = weight_loader.safe_open
    monkeypatch.setattr(weight_loader, "safe_open", Recorder)
    return names


def expert_of(name: str) -> int | None:
    found = re.search(r"\.experts\.(\d+)\.", name)
    return int(found[1]) if found else None


def is_shared_scale(name: str) -> bool:
    """Rows are quantized before it is known which rank's experts they meet, so every rank needs these."""
    return name.endswith(("gate_proj.input_scale", "up_proj.input_scale"))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_rank_reads_its_own_experts_and_all_ranks_together_everything(any_format, read_names, world_size):
    names = set(load_file(any_format / FILE))
    shared = {name for name in names if expert_of(name) is None or is_shared_scale(name)}
    everything = set()
    for rank in range(world_size):
        read_names.clear()
        loaded(any_format, rank, world_size)
        assert len(set(read_names)) == len(read_names), "no tensor is read twice"
        mine = range(rank * NUM_EXPERTS // world_size, (rank + 1) * NUM_EXPERTS // world_size)
        assert set(read_names) == shared | {name for name in names if expert_of(name) in mine}
        everything |= set(read_names)
    assert everything == names


def experts_of(model: Qwen3MoeForCausalLM, layer: int) -> FusedMoE:
    experts = model.decoder[layer].mlp.experts
    assert isinstance(experts, FusedMoE)
    return experts


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_partial_sums_add_up_to_those_of_a_single_rank(any_format, load_format, world_size):
    """So every expert is on one rank, with the same weights, and sees the same rows."""
    generator = torch.Generator().manual_seed(0)
    x, router_logits = torch.randn(20, 64, generator=generator), torch.randn(20, NUM_EXPERTS, generator=generator)
    rows = GatheredRows(x, *topk_softmax(router_logits, 3, renormalize=True))
    alone = loaded(any_format, load_format=load_format)
    parts = [loaded(any_format, rank, world_size, load_format=load_format) for rank in range(world_size)]
    for layer in range(len(alone.decoder)):
        expected = experts_of(alone, layer).method.apply(rows)
        partial = [experts_of(part, layer).method.apply(rows) for part in parts]
        assert all(part.norm() > 0 for part in partial)
        torch.testing.assert_close(torch.stack(partial).sum(0), expected, rtol=1e-5, atol=1e-6)


# Dummy weights


@pytest.fixture
def without_files(any_format) -> Path:
    (any_format / FILE).unlink()
    return any_format


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
def test_dummy_weights_need_no_file_and_fill_every_weight(without_files):
    bits(without_files, load_format="dummy")
    assert "holds no .safetensors file" in refused(without_files)


def matrix(linear: Linear) -> torch.Tensor:
    """The weights of a linear layer, or the codes of quantized ones."""
    weight = getattr(linear, "matmul", linear).weight
    return weight if isinstance(weight, torch.Tensor) else weight.codes


def test_dummy_weights_are_the_same_at_every_start_and_on_every_rank(without_files):
    assert bits(without_files, load_format="dummy") == bits(without_files, load_format="dummy")
    first, second = (loaded(without_files, rank, 2, load_format="dummy") for rank in range(2))
    assert torch.equal(first.embed_tokens.shard.weight, second.embed_tokens.shard.weight)
    for ours, theirs in zip(first.decoder, second.decoder, strict=True):
        assert torch.equal(matrix(ours.self_attn.qkv_proj), matrix(theirs.self_attn.qkv_proj))
        assert not torch.equal(matrix(ours.self_attn.qkv_proj), first.decoder[0].mlp.gate.weight)
        assert torch.equal(ours.mlp.gate.weight, theirs.mlp.gate.weight)
    weights = {matrix(layer.self_attn.o_proj.linear).numpy().tobytes() for layer in first.decoder}
    assert len(weights) == len(first.decoder), "layers differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_no_two_rows_of_a_large_dummy_matrix_are_the_same(dtype):
    """Only its first million values are drawn."""
    matrix = torch.zeros(1500, 1600, dtype=dtype)
    values = float_target(matrix).dummy(torch.Generator().manual_seed(0)).to(dtype)
    assert values.shape == matrix.shape
    assert len(values.float().unique(dim=0)) == len(matrix)


def test_dummy_nvfp4_scales_suit_normalized_activations(saved):
    """Scales that let everything saturate, or vanish, would hide errors in tests and speed in benchmarks."""
    model = loaded(saved["nvfp4"], load_format="dummy")
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    scale = experts_of(model, 0).method.input_scale
    largest = 6 * 448 * float(scale)
    assert x.abs().max() < largest < 10 * x.abs().max()
    qkv = model.decoder[0].self_attn.qkv_proj(x)
    plain = loaded_plain_qkv(saved["plain"])(x)
    assert 0.5 < float(qkv.std() / plain.std()) < 2


def loaded_plain_qkv(folder: Path) -> Callable[[Tensor], Tensor]:
    return loaded(folder, load_format="dummy").decoder[0].self_attn.qkv_proj


# Refusals


def test_tensors_that_fit_nothing_are_listed(any_format):
    edit_tensors(any_format, lambda tensors: tensors.update(surplus=torch.zeros(1), another=torch.zeros(2)))
    message = refused(any_format)
    assert "2 tensors of the checkpoint fit nothing in the model: another, surplus" in message
    assert str(any_format) in message
    assert "are not in the checkpoint" not in message


def test_weights_that_nothing_fills_are_listed(any_format):
    absent = ["model.layers.2.mlp.experts.7.up_proj.weight", "model.norm.weight"]
    edit_tensors(any_format, lambda tensors: [tensors.pop(name) for name in absent])
    message = refused(any_format)
    assert f"2 weights of the model are not in the checkpoint: {', '.join(absent)}" in message
    assert "fit nothing" not in message


def test_a_renamed_tensor_is_reported_from_both_sides(any_format):
    edit_tensors(any_format, lambda tensors: tensors.update({"model.norm.gain": tensors.pop("model.norm.weight")}))
    message = refused(any_format)
    assert "1 weights of the model are not in the checkpoint: model.norm.weight" in message
    assert "1 tensors of the checkpoint fit nothing in the model: model.norm.gain" in message


def test_a_missing_input_scale_is_reported_even_for_another_ranks_expert(nvfp4):
    name = "model.layers.0.mlp.experts.11.gate_proj.input_scale"
    edit_tensors(nvfp4, lambda tensors: tensors.pop(name))
    with pytest.raises(ConfigError, match=f"not in the checkpoint: {re.escape(name)}$"):
        loaded(nvfp4, rank=0, world_size=2)


def test_a_long_list_of_names_is_cut_and_says_so(any_format):
    edit_tensors(any_format, lambda tensors: tensors.update({f"x{i:02}": torch.zeros(1) for i in range(23)}))
    message = refused(any_format)
    assert "23 tensors of the checkpoint fit nothing in the model: x00, x01, " in message
    assert message.endswith("x19 and 3 more")


def test_a_tensor_in_two_files_is_refused_with_both_named(any_format):
    save_file({"model.norm.weight": torch.zeros(64)}, any_format / "other.safetensors")
    assert f"1 tensors are in more than one file: model.norm.weight (in {FILE} and other.safetensors)" in refused(
        any_format
    )


def test_a_file_that_the_index_names_and_that_is_not_there_is_refused_by_name(any_format):
    shard(any_format)[1].unlink()
    assert "names model-00002-of-00003.safetensors, not in that folder" in refused(any_format)


@pytest.mark.parametrize(
    ("name", "wrong", "reason"),
    [
        ("model.norm.weight", torch.zeros(65), "has shape [65], expected [64]"),
        ("model.norm.weight", torch.zeros(64, 1), "has shape [64, 1], expected [64]"),
        ("model.norm.weight", torch.zeros(64, dtype=torch.int8), "is torch.int8, expected torch.bfloat16 or"),
        # As if exclude_modules lacked the module, or named it wrongly.
        (f"{Q_PROJ}.weight", torch.zeros(128, 64), "is torch.float32, expected torch.uint8"),
        (f"{Q_PROJ}.weight", torch.zeros(128, 64, dtype=torch.uint8), "has shape [128, 64], expected [128, 32]"),
        (f"{Q_PROJ}.weight_scale", torch.zeros(128, 4), "is torch.float32, expected torch.float8_e4m3fn"),
        (f"{Q_PROJ}.weight_scale", torch.zeros(512).to(torch.float8_e4m3fn), "has shape [512], expected [128, 4]"),
        (f"{Q_PROJ}.weight_scale_2", torch.ones((), dtype=torch.float64), "is torch.float64, expected torch.float32"),
        (f"{Q_PROJ}.input_scale", torch.ones(128), "has shape [128], expected []"),
    ],
)
def test_a_tensor_of_the_wrong_shape_or_type_is_refused_by_name(nvfp4, name, wrong, reason):
    edit_tensors(nvfp4, lambda tensors: tensors.update({name: wrong}))
    assert f"{nvfp4 / FILE}: {name} {reason}" in refused(nvfp4)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut in the middle": lambda content: content[: len(content) // 2],
    "cut in the header": lambda content: content[:100],
    "cut by one byte": lambda content: content[:-1],
    "with bytes after its end": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "a pointer of git-lfs": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_by_name(saved, tmp_path, damage):
    folder = shutil.copytree(saved["plain"], tmp_path / "damaged")
    broken = shard(folder)[2]
    broken.write_bytes(DAMAGES[damage](broken.read_bytes()))
    message = refused(folder)
    assert f"{broken} cannot be read: " in message
    assert "fetch the checkpoint again" in message


def test_a_link_to_nowhere_is_refused_by_name(saved, tmp_path):
    folder = shutil.copytree(saved["plain"], tmp_path / "unlinked")
    (folder / FILE).unlink()
    (folder / FILE).symlink_to(tmp_path / "nowhere")
    assert f"{folder / FILE} cannot be read: " in refused(folder)
