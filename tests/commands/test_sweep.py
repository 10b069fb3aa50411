"""Names of sweep jobs are deterministic and can be typed back; what became of jobs is known wherever they ran."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from sltrain.commands.sweep import Sweep, job_name, with_options_in_jobs, with_swept_before
from sltrain.compose import conf_dir, parse_overrides, register_schema

pytestmark = pytest.mark.slow


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


def test_options_that_only_swept_plug_ins_have() -> None:
    """Hydra's own composition, of everything but sweeps, would look for them in the default plug-in."""
    typed = [
        "model=llama_tiny",
        "optimizer=galore,fira",
        "optimizer.rank=8",
        "method.alpha=3",
        "path='optimizer.rank=8'",
    ]
    in_jobs = with_options_in_jobs(["-m", *typed], typed)
    assert in_jobs == ["-m", *typed[:2], "optimizer.rank=choice(8)", *typed[3:]]
    assert with_options_in_jobs(in_jobs, in_jobs[1:]) == in_jobs
    plan = Sweep.plan(in_jobs[1:])
    assert (plan.swept_keys, plan.names) == (["optimizer"], ["optimizer-galore", "optimizer-fira"])
    assert Sweep.plan(["optimizer=galore,fira", "optimizer.rank=4,8"]).swept_keys == ["optimizer", "optimizer.rank"]


def test_a_sweep_from_weights_says_which_keys_to_add(tmp_path: Path) -> None:
    typed = ["init_from=outputs/dense", "method=low_rank,sltrain", f"run_dir={tmp_path}"]
    with pytest.raises(ValueError, match="add model=NAME and the keys of that run: with -m, init_from brings"):
        with_swept_before(["-m", *typed], typed)
    assert with_swept_before(["-m", "model=x", *typed], ["model=x", *typed])[1] == ["model=x", *typed]


def test_a_run_that_finished_just_before_the_sweep_was_stopped_is_not_to_go(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rank-4").mkdir()
    names = ["rank-4", "rank-8"]
    config = {"model": {}, "method": {}, "rank": 4, "sparsity": 0.1}
    (tmp_path / "rank-4" / "config.yaml").write_text(json.dumps(config))
    (tmp_path / "rank-4" / "summary.json").write_text('{"event": "final", "step": 2}')
    assert Sweep(tmp_path, ["rank"], names[:1], {"rank-4": 0}).finish() == 0
    assert Sweep(tmp_path, ["rank"], names[:1], {"rank-4": 2}).finish() == 1, "what is finished is another run"
    assert "rank-4: refused" in capfd.readouterr().out
    code = Sweep(tmp_path, ["rank"], names, {"rank-4": 3}).finish()
    out = capfd.readouterr().out
    assert code == 3 and "rank-4: interrupted" not in out and "rank-8: not started" in out and "with 1 job to go" in out


def test_sweep_by_a_cluster_launcher(
    tiny: list[str], tmp_path: Path, start_process: Callable[..., "subprocess.Popen[str]"]
) -> None:
    """Jobs run in processes that another program starts: the table knows of them by their folders alone."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = ["-m", "hydra/launcher=submitit_local", *tiny, "max_steps=2", "warmup_steps=0"]
    process = start_process(*command, "rank=4,33", f"run_dir={tmp_path}/sweep")
    out, err = process.communicate(timeout=240)
    table = out.partition(f"sweep {tmp_path}/sweep")[2]
    assert process.returncode == 1 and "perplexity" in table and "rank-33: not started, or refused" in table, out + err
    assert "what the jobs printed is in" in table
    printed = [file.read_text() for file in (tmp_path / "sweep" / ".submitit").rglob("*.err")]
    assert any("error: " in text and "rank" in text for text in printed)


def test_the_slurm_launcher_composes() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    register_schema()
    overrides = ["model=llama_60m", "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.sweep.dir=/a"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        launcher = compose("train", overrides, return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.partition, launcher.gpus_per_node, launcher.tasks_per_node) == ("gpu", 1, 1)
    assert str(launcher.submitit_folder).startswith("/a/.submitit")


def test_slurm_needs_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="hydra/launcher=slurm, but there is no srun"):
        Sweep.plan(["hydra/launcher=slurm", "rank=4,8"])
    Sweep.plan(["hydra/launcher=submitit_local", "rank=4,8"])
