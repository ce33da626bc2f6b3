"""Who may import whom, what importing the package costs, and words that must not appear."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nibble

PACKAGE = Path(nibble.__file__).parent
REPOSITORY = PACKAGE.parents[1]

LAYERS = [
    {"cli"},
    {"launch_server", "engine"},
    {"entrypoints"},
    {"controller", "tokenizer"},
    {"scheduler"},
    {"model_executor"},
    {"models"},
    {"layers"},
    {"distributed", "kernels", "kv_cache"},
    {"ipc"},
    {"observability"},
    {"config", "generation", "sampling_params", "structured_output"},
    {"utils"},
]
"""From top to bottom; a module imports only from its own layer and those below."""


def layer_of(package: str) -> int:
    return next(index for index, packages in enumerate(LAYERS) if package in packages)


def imported_packages(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    if path.name == "__init__.py" and path.parent == PACKAGE:
        return set()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nibble."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("nibble.")}
    return names


def test_imports_point_downward_only():
    upward = []
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts == ("__init__",):
            continue
        upward += [
            f"{path.relative_to(PACKAGE)} imports nibble.{name}"
            for name in imported_packages(path)
            if layer_of(name) < layer_of(parts[0])
        ]
    assert upward == []


def test_importing_nibble_needs_no_gpu_library():
    heavy = ["triton", "flashinfer", "sgl_kernel", "torch", "transformers"]
    code = f"import sys, nibble; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


BANNED = {
    "runs code that comes as data": r"\b(pickle|dill|cloudpickle|marshal|shelve|joblib)\b|torch\.load|allow_pickle"
    r"|(?<![.\w])(eval|exec)\(|yaml\.(load|unsafe_load|full_load)\(|\b(send|recv)_pyobj\b",
    "hands text to a shell": r"shell=True|os\.(system|popen)\(",
    "renders templates outside the sandbox": r"\bimport jinja2|from jinja2(?!\.exceptions )|\.Template\(|compile_jinja",
    "listens on every address": r"tcp://\*|0\.0\.0\.0",
    "does not check whom it talks to": r"verify=False|CERT_NONE|_create_unverified_context",
    "buffers streams and loses disconnects": r"BaseHTTPMiddleware|@app\.middleware",
}
"""What the package must not do, and the words that it would take."""


@pytest.mark.parametrize("what", BANNED)
def test_the_code_does_not_hold_the_words_for(what):
    banned = re.compile(BANNED[what])
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"
        for folder in ("python", "benchmark", "tools")
        for path in (REPOSITORY / folder).rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if banned.search(line)
    ]
    assert found == []


def test_the_banned_words_are_found_where_they_are():
    lines = [
        "pickle.loads(x)", "x = eval(text)", "torch.load(path)", "yaml.load(text)", "run(command, shell=True)",
        "import jinja2", 'bind("tcp://*:5")', "httpx.get(url, verify=False)", "class A(BaseHTTPMiddleware):",
    ]  # fmt: skip
    assert all(any(re.search(words, line) for words in BANNED.values()) for line in lines)
    assert not any(re.search(words, "model.eval(); self.evaluate(); yaml.safe_load(x)") for words in BANNED.values())


def test_input_is_not_validated_by_assert():
    """python -O removes them. In the routes an assert may only say what a type checker can't know."""
    of_clients = re.compile(r"\b(body|request|params|value|content)\b")
    asserts = [
        f"{path.name}: {ast.unparse(node)}"
        for path in (PACKAGE / "entrypoints").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert) and of_clients.search(ast.unparse(node.test))
    ]
    assert asserts == []


def test_trust_remote_code_is_read_in_one_function():
    readers = [
        path.name
        for path in PACKAGE.rglob("*.py")
        if re.search(r"trust_remote_code=", path.read_text()) and path.name != "server_args.py"
    ]
    assert readers == ["tokenizer.py"]
