"""Ranks that start together need the same kernels at the same moment: one of them compiles, the others wait for it.

Without this, eight ranks of a host compile everything eight times, on cores that they share.
"""

import fcntl
import hashlib
import os
import time
from pathlib import Path
from typing import Any

from triton import knobs

_PATIENCE_S = 60.0
"""Longer than a kernel takes; who waited so long compiles, too."""
_POLL_S = 0.01

_held: list[int] = []


def compile_once() -> None:
    """For this process, from now on: a kernel that another process compiles is awaited, then found in Triton's cache.

    For processes that share that cache; where its folder can't be written to or locked, each compiles for itself.
    Kernels are compiled by one thread of a process.
    """
    knobs.runtime.jit_cache_hook = _before
    knobs.runtime.jit_post_compile_hook = _after


def _before(*, key: Any, fn: Any, **_: Any) -> None:
    _after()  # what failed to compile
    name = hashlib.sha256(f"{fn.module}.{fn.name} {key}".encode()).hexdigest()
    folder = Path(knobs.cache.dir) / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return
    _held.append(descriptor)
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_POLL_S)
        except OSError:
            return
        else:
            return


def _after(**_: Any) -> None:
    while _held:
        os.close(_held.pop())
