"""The command line of the server: ServerArgs as options, also from a YAML file."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from nibble.config.server_args import GROUPS, ServerArgs, flag_name
from nibble.utils.errors import ConfigError

_CONFIG_HELP = "YAML file of options by their long names (tp-size: 2); options on the command line win."


def add_server_args(parser: argparse.ArgumentParser) -> None:
    """Adds --config and one option for each field of ServerArgs."""
    group: Any = parser
    group.add_argument("--config", metavar="FILE", help=_CONFIG_HELP)
    for entry in dataclasses.fields(ServerArgs):
        if entry.name in GROUPS:
            group = parser.add_argument_group(GROUPS[entry.name])
        shown = "" if entry.default in (None, "", False) else f" (default: {entry.default})"
        options: dict[str, Any] = {
            "dest": entry.name,
            "default": entry.default,
            "help": entry.metadata["help"].replace("%", "%%") + shown,
        }
        if entry.type is bool:
            options["action"] = "store_true"
        else:
            options["type"] = _value_type(entry.type)
            options["choices"] = entry.metadata["choices"]
            options["metavar"] = None if options["choices"] else _METAVARS[options["type"]]
        group.add_argument(flag_name(entry.name), *entry.metadata["aliases"], **options)


def parse_server_args(argv: Sequence[str]) -> ServerArgs:
    """`python -m nibble.launch_server`. Exits with the usage for unknown options; raises ConfigError for a bad file."""
    parser = argparse.ArgumentParser(
        prog="python -m nibble.launch_server",
        usage="%(prog)s --model-path MODEL [options]",
        description="Serve a model over HTTP.",
        allow_abbrev=False,
    )
    add_server_args(parser)
    return server_args_of(parser, argv)


def server_args_of(parser: argparse.ArgumentParser, argv: Sequence[str]) -> ServerArgs:
    """Parses `argv` by a parser that `add_server_args` has filled, after what its --config file says."""
    given = parser.parse_args(argv)
    model = getattr(given, "model", None)  # of `nibble serve MODEL`
    if model is not None and given.model_path:
        parser.error("give the model once, by its place or as --model-path")
    if given.config is not None:
        given = parser.parse_args([*options_of_file(Path(given.config)), *argv])
    names = {entry.name for entry in dataclasses.fields(ServerArgs)}
    fields = {name: value for name, value in vars(given).items() if name in names}
    if not (model or given.model_path):
        parser.error("a model is required: --model-path, with its folder or its name on the Hugging Face hub")
    return ServerArgs(**{**fields, "model_path": model or given.model_path})


def options_of_file(path: Path) -> list[str]:
    """The options that a YAML file stands for. Raises ConfigError for what is not a mapping of options to values."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold options by name, like 'tp-size: 2', not {type(content).__name__}")
    fields = {entry.name: entry for entry in dataclasses.fields(ServerArgs)}
    options: list[str] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise ConfigError(f"--config {path}: there is no option {key!r}; --help lists them")
        options += _option(path, name, value, is_switch=fields[name].type is bool)
    return options


def _option(path: Path, name: str, value: Any, is_switch: bool) -> list[str]:
    if value is None:
        return []
    if is_switch != isinstance(value, bool) or not isinstance(value, bool | int | float | str):
        wanted = "true or false" if is_switch else "a number or a text"
        raise ConfigError(f"--config {path}: {name.replace('_', '-')} must be {wanted}, got {value!r}")
    if is_switch:
        return [flag_name(name)] if value else []
    return [f"{flag_name(name)}={value}"]


_METAVARS = {int: "N", float: "NUMBER", str: "TEXT"}


def _value_type(annotation: Any) -> Any:
    return {"int": int, "float": float}.get(str(getattr(annotation, "__name__", annotation)).split(" ")[0], str)
