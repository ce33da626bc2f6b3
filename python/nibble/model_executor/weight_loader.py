"""Fills a model from safetensors files, or with random numbers of the same formats."""

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from nibble.config.model_config import read_json
from nibble.layers.weights import WeightTarget
from nibble.models.registry import CausalLM
from nibble.utils.errors import ConfigError

Targets = Mapping[str, WeightTarget | None]
_LISTED = 20


def load_weights(model: CausalLM, folder: Path, load_format: str, device: torch.device, show_progress: bool) -> None:
    """Every weight of the model, on `device`, must be filled, and every tensor of the checkpoint known to the model or
    under one of its `unused_prefixes`.

    Files are memory-mapped and only what this rank needs is read. Raises ConfigError listing the names.
    """
    targets = collect_targets(model)
    if load_format == "dummy":
        _fill_with_random(targets)
    else:
        _load_safetensors(targets, model.unused_prefixes, folder, show_progress)
    with device:
        for _, layer in model.layers():
            process = getattr(layer, "process_weights_after_loading", None)
            if process is not None:
                process()


def collect_targets(model: CausalLM) -> Targets:
    targets: dict[str, WeightTarget | None] = {}
    for prefix, layer in model.layers():
        targets.update(layer.weight_targets(prefix))
    return targets


def _fill_with_random(targets: Targets) -> None:
    # Seeded by name: the ranks agree on what they share, whichever experts they hold.
    for name, target in targets.items():
        if target is not None:
            target.load(target.dummy(torch.Generator().manual_seed(zlib.crc32(name.encode()))))


def _load_safetensors(targets: Targets, unused_prefixes: tuple[str, ...], folder: Path, show_progress: bool) -> None:
    found: dict[str, list[str]] = {}  # the files that hold each tensor
    for path in tqdm(_weight_files(folder), desc="Loading weights", unit="file", disable=not show_progress):
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    found.setdefault(name, []).append(path.name)
                    if (target := targets.get(name)) is not None:
                        target.load(_checked(tensors.get_tensor(name), name, target, path))
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} cannot be read: {error}; fetch the checkpoint again") from error
    problems = {
        "weights of the model are not in the checkpoint": [
            name for name, target in targets.items() if target and not target.is_optional and name not in found
        ],
        "tensors of the checkpoint fit nothing in the model": [
            name for name in found if name not in targets and not name.startswith(unused_prefixes)
        ],
        "tensors are in more than one file": [
            f"{name} (in {' and '.join(files)})" for name, files in found.items() if len(files) > 1
        ],
    }
    if any(problems.values()):
        listed = (f"{len(names)} {problem}: {_listed(names)}" for problem, names in problems.items() if names)
        raise ConfigError(f"{folder} does not fit the model; " + "; ".join(listed))


def _weight_files(folder: Path) -> list[Path]:
    """The files that model.safetensors.index.json names; without an index, all .safetensors files."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ConfigError(f"{folder} holds no .safetensors file")
        return files
    files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    absent = [path.name for path in files if not path.exists()]
    if absent:
        raise ConfigError(f"{index} names {_listed(absent)}, not in that folder; fetch the checkpoint again")
    return files


def _checked(tensor: torch.Tensor, name: str, target: WeightTarget, path: Path) -> torch.Tensor:
    if tensor.dtype not in target.dtypes:
        wanted = " or ".join(str(dtype) for dtype in target.dtypes)
        raise ConfigError(f"{path}: {name} is {tensor.dtype}, expected {wanted}")
    if tensor.numel() == 1 and target.shape == ():
        return tensor.reshape(())  # scalars are written as [] or [1]
    if tuple(tensor.shape) != target.shape:
        raise ConfigError(f"{path}: {name} has shape {list(tensor.shape)}, expected {list(target.shape)}")
    return tensor


def _listed(names: list[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else ""
    return ", ".join(ordered[:_LISTED]) + more
