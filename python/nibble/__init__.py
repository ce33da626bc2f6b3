"""Nibble: an LLM serving engine for NVFP4 mixture-of-experts models with data-parallel attention."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nibble.engine import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> Any:
    """`nibble.Engine`, imported when it is first asked for: `import nibble` itself stays light."""
    if name == "Engine":
        from nibble.engine import Engine

        return Engine
    raise AttributeError(f"module 'nibble' has no attribute {name!r}")
