"""How a checkpoint is quantized: ModelOpt's two files, read together."""

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nibble.config.model_config import read_json
from nibble.utils.errors import ConfigError

NVFP4_GROUP_SIZE = 16


@dataclass(frozen=True)
class QuantizationConfig:
    """A ModelOpt NVFP4 checkpoint. `exclude_modules` are names, or patterns with `*`, left unquantized."""

    quant_algo: str
    group_size: int
    kv_cache_quant_algo: str | None
    exclude_modules: tuple[str, ...]

    @property
    def method(self) -> str:
        """The name that --quantization takes."""
        return "modelopt_fp4"

    def is_excluded(self, prefix: str) -> bool:
        """True when the module `prefix`, or one that holds it, is named by `exclude_modules`."""
        return self._excluded.match(prefix) is not None

    @cached_property
    def _excluded(self) -> re.Pattern[str]:
        # One expression for all patterns: a model has tens of thousands of names, and a pattern or more a layer.
        patterns = [p for pattern in self.exclude_modules for p in (pattern, pattern.rstrip(".") + ".*")]
        return re.compile("|".join(map(fnmatch.translate, patterns)) or "(?!)")

    def is_quantized(self, *prefixes: str) -> bool:
        """Whether a layer is quantized; `prefixes` are the checkpoint's names of the parts it merges."""
        excluded = {prefix: self.is_excluded(prefix) for prefix in prefixes}
        if len(set(excluded.values())) > 1:
            raise ConfigError(
                "these modules are computed as one and must all be quantized or all be excluded: "
                + ", ".join(f"{name} ({'excluded' if out else 'quantized'})" for name, out in excluded.items())
            )
        return not all(excluded.values())


def load_quantization_config(folder: Path) -> QuantizationConfig | None:
    """Reads hf_quant_config.json and config.json's quantization_config; None for an unquantized checkpoint.

    Raises ConfigError when the two disagree or name a format that this engine does not run.
    """
    found: dict[str, QuantizationConfig] = {}
    path = folder / "hf_quant_config.json"
    if path.exists():
        found[str(path)] = _parse(path, read_json(path).get("quantization", {}))
    path = folder / "config.json"
    embedded = read_json(path).get("quantization_config")
    if embedded is not None:
        found[str(path)] = _parse_embedded(path, embedded)
    configs = list(found.values())
    if len(configs) == 2 and _comparable(configs[0]) != _comparable(configs[1]):
        raise ConfigError(
            "the checkpoint describes its quantization twice, and differently: "
            + "; ".join(f"{name} says {config}" for name, config in found.items())
        )
    return configs[0] if configs else None


def _comparable(config: QuantizationConfig) -> tuple[object, ...]:
    return (
        config.quant_algo,
        config.group_size,
        config.kv_cache_quant_algo,
        frozenset(config.exclude_modules),
    )


def _parse(path: Path, quantization: Mapping[str, Any]) -> QuantizationConfig:
    algorithm = str(quantization.get("quant_algo"))
    group_size = int(quantization.get("group_size") or NVFP4_GROUP_SIZE)
    kv_cache = quantization.get("kv_cache_quant_algo")
    if algorithm != "NVFP4" or group_size != NVFP4_GROUP_SIZE:
        raise ConfigError(
            f"{path}: quantization {algorithm!r} with group size {group_size} is not supported, "
            f"only 'NVFP4' with group size {NVFP4_GROUP_SIZE}"
        )
    if kv_cache not in (None, "FP8"):
        raise ConfigError(f"{path}: a KV cache quantized as {kv_cache!r} is not supported; export with FP8 or without")
    return QuantizationConfig(algorithm, group_size, kv_cache, tuple(quantization.get("exclude_modules") or ()))


def _parse_embedded(path: Path, embedded: Mapping[str, Any]) -> QuantizationConfig:
    if embedded.get("quant_method") != "modelopt":
        raise ConfigError(
            f"{path}: quant_method {embedded.get('quant_method')!r} is not supported, only 'modelopt' (NVFP4)"
        )
    groups = (embedded.get("config_groups") or {}).values()
    sizes = {int((group.get("weights") or {}).get("group_size") or NVFP4_GROUP_SIZE) for group in groups}
    if len(sizes) > 1:
        raise ConfigError(f"{path}: config_groups of different group sizes {sorted(sizes)} are not supported")
    return _parse(
        path,
        {
            "quant_algo": embedded.get("quant_algo"),
            "group_size": embedded.get("group_size") or next(iter(sizes), NVFP4_GROUP_SIZE),
            "kv_cache_quant_algo": _kv_cache_algorithm(embedded.get("kv_cache_scheme")),
            "exclude_modules": embedded.get("ignore") or embedded.get("exclude_modules"),
        },
    )


def _kv_cache_algorithm(scheme: object) -> object:
    """`kv_cache_scheme` in the words of `kv_cache_quant_algo`."""
    if not isinstance(scheme, dict):
        return scheme
    return f"{'FP' if scheme.get('type', 'float') == 'float' else 'INT'}{scheme.get('num_bits')}"
