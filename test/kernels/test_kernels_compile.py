"""Every Triton kernel compiles for the GPUs that Nibble runs on, as the engine launches it, without one of them.

The interpreter, which the other tests use, knows neither the assembler nor how much shared memory there is.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import pytest

import nibble

pytestmark = pytest.mark.timeout(400)  # half a minute on two cores that do nothing else

PACKAGE = Path(nibble.__file__).parent
SCRIPT = Path(__file__).with_name("compile_kernels.py")
TARGETS = {80: "kernels", 90: "choices", 100: "kernels"}

Compiled = dict[str, Any]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """What `compile_kernels.py` says of each kernel: in a process of its own, since this one may interpret them, and
    with an empty cache, so that nothing is known from before.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, str(SCRIPT), "--json", *(f"{arch}:{coverage}" for arch, coverage in TARGETS.items())]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == any(kernel["error"] for kernel in kernels), result.stderr
    return kernels


@pytest.mark.parametrize("arch", TARGETS)
def test_every_kernel_compiles_and_fits_into_shared_memory(arch: int, compiled: list[Compiled]) -> None:
    failed = [kernel for kernel in compiled if kernel["arch"] == arch and kernel["error"]]
    assert not failed, "\n".join(f"{kernel['kernel']} {kernel['error']} ({kernel['constants']})" for kernel in failed)


@pytest.mark.parametrize("arch", TARGETS)
def test_no_kernel_is_forgotten(arch: int, compiled: list[Compiled]) -> None:
    assert {kernel["kernel"] for kernel in compiled if kernel["arch"] == arch} == kernels_of_the_package()


@cache
def kernels_of_the_package() -> set[str]:
    """As `module.name`: the JIT functions that are launched, `name[grid](…)`, and those that no other one calls."""
    modules = [(path.stem, ast.parse(path.read_text())) for path in PACKAGE.rglob("*.py")]
    functions = [(module, node) for module, tree in modules for node in ast.walk(tree) if is_jit_function(node)]
    called = {call.id for _, function in functions for call in calls_in(function) if isinstance(call, ast.Name)}
    launched = {
        call.value.id
        for _, tree in modules
        for call in calls_in(tree)
        if isinstance(call, ast.Subscript) and isinstance(call.value, ast.Name)
    }
    return {
        f"{module}.{function.name}"
        for module, function in functions
        if function.name in launched or function.name not in called
    }


def is_jit_function(node: ast.AST) -> TypeGuard[ast.FunctionDef]:
    return isinstance(node, ast.FunctionDef) and any(
        ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list
    )


def calls_in(tree: ast.AST) -> Iterator[ast.expr]:
    """What stands before the parentheses of each call."""
    return (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
