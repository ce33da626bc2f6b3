"""Compiles a folder of C sources once per machine and content."""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
_TIMEOUT_SECONDS = 120


class CompileError(RuntimeError):
    """There is no C compiler, or it refused the source; the message says which."""


@functools.cache
def build_c_library(folder: Path) -> Path:
    """The shared library of a folder's `*.c`, compiled with cc or gcc into the user's cache unless it is there already.

    Safe to call from several processes at once. Raises CompileError.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise CompileError("no C compiler (cc or gcc) is on the PATH")
    sources = sorted(folder.glob("*.[ch]"))
    library = _cache_folder() / f"{folder.name}-{_fingerprint(sources, compiler)}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch) / library.name
        compiled = [str(source) for source in sources if source.suffix == ".c"]
        command = [compiler, *_FLAGS, *compiled, "-o", str(built), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"{' '.join(command)} failed: {error.stderr.strip()}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CompileError(f"{' '.join(command)} failed: {error}") from error
        os.replace(built, library)
    return library


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nibble"


def _fingerprint(sources: Sequence[Path], compiler: str) -> str:
    """Of everything that the library depends on; homes may be shared by machines with different processors."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    processor = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        processor += "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    content = b"\0".join(source.read_bytes() for source in sources) + "".join([*_FLAGS, version, processor]).encode()
    return hashlib.sha256(content).hexdigest()[:16]
