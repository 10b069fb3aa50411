"""Names of sweep jobs are deterministic and can be typed back."""

import pytest

from sltrain.compose import parse_overrides
from sltrain.sweep import Sweep, job_name


@pytest.mark.parametrize(
    ("overrides", "swept", "name"),
    [
        (["model=llama_60m", "rank=64", "sparsity=0.01"], ["rank", "sparsity"], "rank-64_sparsity-0.01"),
        (["sparsity=0.01", "rank=64"], ["sparsity", "rank"], "sparsity-0.01_rank-64"),
        (["method=full"], ["method"], "method-full"),
        (["lr=3e-3"], ["lr"], "lr-0.003"),
        (["path=/data/*.gz"], ["path"], "path--data-.gz-fc7dc5"),
        (["model=llama_60m"], ["model"], "model-llama_60m"),
        (["rank=64"], [], "job"),
    ],
)
def test_job_name(overrides: list[str], swept: list[str], name: str) -> None:
    assert job_name(parse_overrides(overrides), swept) == name


def test_plan() -> None:
    sweep = Sweep.plan(["model=llama_60m", "rank=64,128", "sparsity=choice(0.01,0.03,0.1)", "run_dir=outputs/a"])
    assert (sweep.num_jobs, sweep.swept_keys, str(sweep.folder)) == (6, ["rank", "sparsity"], "outputs/a")
    assert str(Sweep.plan(["rank=1,2"]).folder).startswith("outputs/sweep_")
