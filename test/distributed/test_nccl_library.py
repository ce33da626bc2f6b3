"""Which NCCL is loaded, which versions are refused, and the environment it needs where ranks share a GPU."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nccl_stand_in import NcclStandIn
from nibble.distributed import pynccl_wrapper
from nibble.distributed.pynccl import multi_rank_gpu_environment
from nibble.distributed.pynccl_wrapper import NcclLibrary, find_nccl, load_nccl
from nibble.utils.errors import ConfigError


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in [name for name in os.environ if name.startswith("NCCL_")] + ["NIBBLE_NCCL_SO_PATH"]:
        monkeypatch.delenv(name, raising=False)
    load_nccl.cache_clear()
    yield monkeypatch
    load_nccl.cache_clear()


def test_the_library_is_the_one_that_the_environment_names_or_the_packages_or_that_of_pytorch(
    clean: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "nvidia" / "nccl" / "lib" / "libnccl.so.2"
    with clean.context() as nothing_installed:
        nothing_installed.setattr(pynccl_wrapper.importlib.util, "find_spec", lambda name: None)
        assert find_nccl() == "libnccl.so.2"
    clean.syspath_prepend(tmp_path)
    library.parent.mkdir(parents=True)
    library.touch()
    assert find_nccl() == str(library)
    clean.setenv("NIBBLE_NCCL_SO_PATH", "/opt/libnccl.so")
    assert find_nccl() == "/opt/libnccl.so"


def test_a_missing_library_and_one_that_is_not_nccl_are_refused_with_the_way_out(
    clean: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clean.setenv("NIBBLE_NCCL_SO_PATH", str(tmp_path / "none.so"))
    with pytest.raises(ConfigError, match=r"none.so.*install nvidia-nccl-cu12.*or set NIBBLE_NCCL_SO_PATH"):
        load_nccl()
    clean.setenv("NIBBLE_NCCL_SO_PATH", "libc.so.6")
    with pytest.raises(ConfigError, match=r"libc.so.6 is not an NCCL library: it has no ncclGetVersion"):
        load_nccl()


@pytest.mark.parametrize(("code", "version"), [(2804, "2.8.4"), (21701, "2.17.1")])
def test_an_old_library_is_refused_by_version_and_path(code: int, version: str) -> None:
    with pytest.raises(
        ConfigError, match=f"must be 2.18.0 or newer, found {version} at /old/libnccl.so: .*NIBBLE_NCCL_SO_PATH"
    ):
        NcclLibrary(NcclStandIn(code), "/old/libnccl.so")


def test_the_version_in_use_is_logged_once(clean: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clean.setenv("NIBBLE_NCCL_SO_PATH", "/opt/libnccl.so")
    clean.setattr(pynccl_wrapper.ctypes, "CDLL", lambda path: NcclStandIn(23007))
    with caplog.at_level(logging.INFO):
        assert load_nccl() is load_nccl()
    assert caplog.messages == ["NCCL 2.30.7 from /opt/libnccl.so"]


# --- Several ranks on one GPU


def use_version(monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    monkeypatch.setenv("NIBBLE_NCCL_SO_PATH", "/opt/libnccl.so")
    monkeypatch.setattr(pynccl_wrapper.ctypes, "CDLL", lambda path: NcclStandIn(version))


@pytest.mark.parametrize(("ranks", "channels"), [(2, "32"), (4, "16"), (8, "8"), (100, "1")])
def test_ranks_that_share_a_gpu_have_no_more_channels_together_than_fit_on_it(
    clean: pytest.MonkeyPatch, ranks: int, channels: str
) -> None:
    use_version(clean, 23000)
    environment = multi_rank_gpu_environment(ranks)
    assert environment["NCCL_MAX_NCHANNELS"] == channels
    assert environment["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"
    assert environment["NCCL_NVLS_ENABLE"] == "0"


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_nccl_does_not_register_the_buffers_of_graphs(clean: pytest.MonkeyPatch, ranks: int) -> None:
    use_version(clean, 23007)
    assert multi_rank_gpu_environment(ranks)["NCCL_GRAPH_REGISTER"] == "0"


def test_what_the_user_has_set_stays(clean: pytest.MonkeyPatch) -> None:
    use_version(clean, 23007)
    clean.setenv("NCCL_MAX_NCHANNELS", "4")
    clean.setenv("NCCL_GRAPH_REGISTER", "1")
    assert multi_rank_gpu_environment(2) == {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}


def test_a_library_too_old_to_share_a_gpu_is_refused_only_where_gpus_are_shared(clean: pytest.MonkeyPatch) -> None:
    use_version(clean, 22907)
    assert multi_rank_gpu_environment(1) == {"NCCL_GRAPH_REGISTER": "0"}
    with pytest.raises(
        ConfigError, match=r"2 ranks on one GPU need NCCL 2.30 or newer, found 2.29.7 at /opt/libnccl.so"
    ):
        multi_rank_gpu_environment(2)
