"""Splits over ranks of GPUs give the logits of one CPU rank: PyNCCL's groups, in fp32 without graphs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_ranks import gpu_ranks
from rank_processes import RankProcesses
from split_cases import SPLITS, alone, cases_of, relative_errors, save_irregular_moe
from split_ranks import run_cases

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_irregular_moe(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module", params=[2, 4], ids="{}-ranks".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankProcesses]:
    with gpu_ranks(request.param, tmp_path_factory, timeout_s=170) as processes:
        yield processes


@pytest.mark.parametrize(("dp", "ep"), [(dp, ep) for dp in (1, 2, 4) for ep in (1, 2, 4)])
def test_every_split_over_gpu_ranks_gives_the_logits_of_one_rank(
    ranks: RankProcesses, moe: Path, dp: int, ep: int
) -> None:
    tp = ranks.world_size
    if (tp, dp, ep) not in SPLITS:
        pytest.skip("more groups than ranks")
    on_gpu = {"device": "cuda", "dtype": "float32", "kv_cache_dtype": "float32", "attention_backend": "torch"}
    cases = cases_of(dp)
    args = {"tp_size": tp, "dp_size": dp, "ep_size": ep, **on_gpu}
    results = ranks.run(run_cases, folder=str(moe), args=args, cases=cases)
    assert max(relative_errors(results, alone(moe), cases, dp)) < 1e-4
