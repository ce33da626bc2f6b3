"""Triton's interpreter looks through its language at each call of a JIT function. Here it remembers what it finds."""

import inspect
from functools import cache
from importlib.util import find_spec
from typing import Any

if find_spec("triton"):
    from triton.language import core
    from triton.runtime import interpreter

    @cache
    def builtin_names(namespace: Any) -> list[str]:
        """What the interpreter replaces in a module or class of the language."""
        return [name for name, member in inspect.getmembers(namespace) if core.is_builtin(member)]

    def patch_builtins(namespace: Any, builder: Any, scope: Any) -> None:
        """As in Triton. What has been replaced is no builtin any more."""
        for name in builtin_names(namespace):
            if core.is_builtin(member := getattr(namespace, name)):
                interpreter._patch_attr(namespace, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtins
