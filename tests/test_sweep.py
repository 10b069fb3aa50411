"""Names of sweep jobs are deterministic and can be typed back."""

import sys

import pytest

from sltrain.compose import parse_overrides
from sltrain.sweep import Sweep, _run_process, in_words, job_name


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
    assert (sweep.swept_keys, str(sweep.folder)) == (["rank", "sparsity"], "outputs/a")
    assert sweep.names == [f"rank-{rank}_sparsity-{sparsity}" for rank in (64, 128) for sparsity in (0.01, 0.03, 0.1)]
    assert str(Sweep.plan(["rank=1,2"]).folder).startswith("outputs/sweep_")


def test_exit_codes_in_words() -> None:
    words = {0: "finished", -9: "failed (exit code -9)", 5: "diverged (exit code 5)", 2: "refused (exit code 2)"}
    assert {code: in_words(code) for code in words} == words


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", (0, False)),
        ("import sys; sys.exit(2)", (2, False)),
        ("import sys; sys.exit(3)", (3, True)),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", (3, True)),
        ("import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(20)", (3, True)),
    ],
)
def test_a_signal_to_the_sweep_or_to_its_job_ends_the_sweep(code: str, expected: tuple[int, bool]) -> None:
    assert _run_process([sys.executable, "-c", code]) == expected
