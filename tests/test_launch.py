"""The launch scripts hand everything on to torchrun, and say in words what is missing.

torchrun, srun and scontrol are stand-ins here.
"""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
ARGUMENTS = ["model=llama_60m", "path='a b/*.gz'", "rank_overrides={q_proj: 8}"]


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A PATH on which torchrun prints its arguments, one a line, and little else is found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "basename", "env", "sleep"):
        (folder / name).symlink_to(str(shutil.which(name)))
    add_tool(folder, "torchrun", 'printf "%s\\n" "$@"')
    return folder


def add_tool(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


def run(
    script: str, *arguments: str, tools: Path, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(tools), **variables}
    return subprocess.run(
        [str(tools / "bash"), str(LAUNCH / script), *arguments],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.s*")))
def test_syntax_and_no_hyper_parameters(script: str) -> None:
    assert subprocess.run(["bash", "-n", LAUNCH / script]).returncode == 0
    text = (LAUNCH / script).read_text()
    assert "set -euo pipefail" in text
    commands = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert set(re.findall(r"(?<![\w-])([a-z]\w*)=", commands)) <= {
        "launcher",
        "run_dir",
        "resume",
        "srun_pid",
        "status",
        "time_is_up",
    }
    assert os.access(LAUNCH / script, os.X_OK) or script.endswith(".sbatch")


@pytest.mark.parametrize(("variables", "processes"), [({"GPUS": "3"}, "3"), ({}, "gpu")])
def test_single_node(tools: Path, variables: dict[str, str], processes: str) -> None:
    if not variables:
        add_tool(tools, "nvidia-smi", "exit 0")
    done = run("single_node.sh", *ARGUMENTS, tools=tools, **variables)
    expected = ["--standalone", f"--nproc_per_node={processes}", "-m", "sltrain.train", *ARGUMENTS]
    assert done.returncode == 0 and done.stdout.splitlines() == expected, done.stderr


def test_torchrun_passes_signals_on_but_not_what_nohup_ignores(tools: Path) -> None:
    add_tool(tools, "torchrun", 'echo "$PET_SIGNALS_TO_HANDLE"')
    command = [str(tools / "bash"), str(LAUNCH / "single_node.sh")]
    for ignored in (signal.SIG_DFL, signal.SIG_IGN):
        done = subprocess.run(
            command,
            env={"PATH": str(tools), "GPUS": "2"},
            capture_output=True,
            text=True,
            preexec_fn=lambda how=ignored: signal.signal(signal.SIGHUP, how),
        )
        passed = "SIGTERM,SIGINT,SIGQUIT,SIGUSR1,SIGUSR2" + ",SIGHUP" * (ignored == signal.SIG_DFL)
        assert done.stdout.strip() == passed, done


def test_multi_node(tools: Path) -> None:
    done = run(
        "multi_node.sh",
        *ARGUMENTS,
        tools=tools,
        NNODES="2",
        NODE_RANK="1",
        MASTER_ADDR="node0",
        MASTER_PORT="1",
        GPUS="8",
    )
    assert done.returncode == 0, done.stderr
    rendezvous = ["--nnodes=2", "--node_rank=1", "--nproc_per_node=8", "--master_addr=node0", "--master_port=1"]
    assert done.stdout.splitlines() == [*rendezvous, "-m", "sltrain.train", *ARGUMENTS]


def test_elastic_nodes_meet_without_numbers_and_restarts_are_handed_on(tools: Path) -> None:
    add_tool(tools, "torchrun", 'printf "%s\\n" "$PET_MAX_RESTARTS" "$@"')
    nodes = {"MASTER_ADDR": "node0", "MASTER_PORT": "1", "GPUS": "8"}
    done = run("multi_node.sh", *ARGUMENTS, tools=tools, NNODES="1:4", MAX_RESTARTS="3", **nodes)
    rendezvous = ["--rdzv_backend=c10d", "--rdzv_endpoint=node0:1", "--rdzv_id=sltrain"]
    expected = ["3", "--nnodes=1:4", "--nproc_per_node=8", *rendezvous, "-m", "sltrain.train", *ARGUMENTS]
    assert done.returncode == 0 and done.stdout.splitlines() == expected, done.stderr
    assert run("single_node.sh", tools=tools, GPUS="1").stdout.splitlines()[0] == "0"
    assert_refused(run("multi_node.sh", tools=tools, NNODES="1:4"), "MASTER_ADDR is not set")


def assert_refused(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_what_is_missing_is_named(tools: Path) -> None:
    assert_refused(run("single_node.sh", tools=tools), "no GPU found: set GPUS")
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}
    assert_refused(run("multi_node.sh", tools=tools, **nodes), "no GPU found: set GPUS")
    for name in nodes:
        others = {key: value for key, value in nodes.items() if key != name}
        assert_refused(run("multi_node.sh", tools=tools, **others), f"{name} is not set")
    assert_refused(run("slurm.sbatch", tools=tools), "not a SLURM job")
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tools)}
    assert_refused(run("slurm.sbatch", tools=tools, **job), "submit from the folder that contains launch/")
    (tools / "torchrun").unlink()
    assert_refused(run("single_node.sh", tools=tools), "torchrun is not on PATH")
    assert_refused(run("multi_node.sh", tools=tools), "torchrun is not on PATH")
    assert_refused(
        run("slurm.sbatch", tools=tools, **{**job, "SLURM_SUBMIT_DIR": str(ROOT)}), "torchrun is not on PATH"
    )


def slurm_job(tools: Path) -> dict[str, str]:
    """Stand-ins and variables of a two-node job; this process is its second node."""
    add_tool(tools, "srun", 'export SLURM_NODEID=1; exec "$@"')
    add_tool(tools, "scontrol", 'if [[ $1 == show ]]; then printf "node0\\nnode1\\n"; else echo "scontrol $*"; fi')
    return {
        "SLURM_JOB_ID": "30007", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_SUBMIT_DIR": str(ROOT), "GPUS": "8",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"NNODES": "two"}, "NNODES=two: give the number of machines, such as 2, or 1:4"),
        ({"NNODES": "2:"}, "NNODES=2:: give"),
        ({"NNODES": "0"}, "NNODES=0"),
        ({"NODE_RANK": "2"}, "NODE_RANK=2: of 2 machines, each has a number of its own from 0 to 1"),
        ({"NODE_RANK": "-1"}, "NODE_RANK=-1"),
        ({"MASTER_ADDR": "no such machine"}, "MASTER_ADDR=no such machine is no name that this machine knows"),
    ],
)
def test_machines_that_cannot_be(tools: Path, wrong: dict[str, str], words: str) -> None:
    (tools / "getent").symlink_to(str(shutil.which("getent")))
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "GPUS": "1"}
    assert run("multi_node.sh", tools=tools, **nodes).returncode == 0
    assert_refused(run("multi_node.sh", tools=tools, **{**nodes, **wrong}), words)


def test_slurm(tools: Path) -> None:
    done = run("slurm.sbatch", *ARGUMENTS, tools=tools, **slurm_job(tools))
    assert done.returncode == 0, done.stderr
    rendezvous = ["--nnodes=2", "--node_rank=1", "--nproc_per_node=8", "--master_addr=node0", "--master_port=30007"]
    where = ["run_dir=outputs/slurm-30007", "resume=auto"]
    assert done.stdout.splitlines() == [*rendezvous, "-m", "sltrain.train", *where, *ARGUMENTS]


def test_slurm_passes_on_a_failure(tools: Path) -> None:
    add_tool(tools, "torchrun", "exit 5")
    assert run("slurm.sbatch", tools=tools, **slurm_job(tools)).returncode == 5


def test_slurm_saves_and_requeues_at_the_time_limit(tools: Path) -> None:
    add_tool(
        tools,
        "torchrun",
        "trap 'sleep 0.3; echo \"saved after SIGTERM, ${TORCH_ELASTIC_SHUTDOWN_TIMEOUT}s\"; exit 1' TERM\n"
        "echo training\nfor _ in {1..100}; do sleep 0.05; done",
    )
    environment = {"PATH": str(tools), **slurm_job(tools)}
    command = [str(tools / "bash"), str(LAUNCH / "slurm.sbatch")]
    job = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None and job.stdout.readline() == "training\n"
    subprocess.run(["kill", "-USR1", str(job.pid)], check=True)
    rest = job.stdout.read().splitlines()
    job.stdout.close()
    assert job.wait() == 0
    assert "requeueing job 30007" in rest[0]
    assert rest[1:] == ["saved after SIGTERM, 150s", "scontrol requeue 30007"]
