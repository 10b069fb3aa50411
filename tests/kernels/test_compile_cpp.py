"""What happens where the CPU kernel cannot be built, and where its library is kept."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sltrain.kernels import compile_cpp, cpu_kernel

pytestmark = pytest.mark.slow

kernel = pytest.mark.skipif("cpu_kernel.status() is not None", reason="no CPU kernel here")
QUICK = ("-O0", *compile_cpp.FLAGS[2:], "-std=c++17")


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | None]:
    """Builds the kernel again, with other environment variables and a cache of its own, and gives `status`."""
    monkeypatch.setattr(cpu_kernel, "_library", cpu_kernel._library)  # and restores it

    def again(**environment: str) -> str | None:
        for name, value in {"XDG_CACHE_HOME": str(tmp_path / "cache"), **environment}.items():
            monkeypatch.setenv(name, value)
        return cpu_kernel._prepare.__wrapped__()

    return again


def multiplies() -> bool:
    """Whether the library that was just built does."""
    S = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    x = torch.tensor([[1.0, 10.0]])
    y = cpu_kernel.forward(x, [S[S != 0]], [torch.tensor([1, 2], dtype=torch.int32)], [2])[0]
    return torch.equal(y, x @ S.t())


def compiler_that(script: str, folder: Path) -> str:
    """A command that answers --version and else runs a line of shell."""
    compiler = folder / "compiler"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{script}\n')
    compiler.chmod(0o755)
    return str(compiler)


def test_can_be_switched_off(prepare: Callable[..., str | None], tmp_path: Path) -> None:
    assert prepare(SLTRAIN_CPU_KERNEL="off") == "switched off by SLTRAIN_CPU_KERNEL=off"
    assert not list(tmp_path.iterdir())


def test_says_that_there_is_no_compiler(
    prepare: Callable[..., str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = prepare(PATH=str(tmp_path), CXX="")
    assert reason == "no C++ compiler found (CXX, g++, clang++, c++)"
    monkeypatch.setattr(cpu_kernel, "_prepare", lambda: reason)
    with pytest.raises(RuntimeError, match=r"the CPU kernel cannot be used: no C\+\+ compiler found"):
        cpu_kernel.forward(torch.ones(1, 1), [], [], [])


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ('echo "kernel.cpp:1: error: no room" >&2; exit 1', "error: no room"),
        ("echo nothing > kernel.so", "cannot be loaded"),
        ("true", "left no kernel"),
    ],
)
def test_says_what_a_broken_compiler_did(
    script: str, says: str, prepare: Callable[..., str | None], tmp_path: Path
) -> None:
    assert says in (prepare(CXX=compiler_that(script, tmp_path)) or "")


def test_a_compiler_that_hangs_is_ended(
    prepare: Callable[..., str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_cpp, "COMPILE_SECONDS", 1)
    script = f"sleep 300 & echo $! > {tmp_path}/pid; wait"
    assert "took more than 1 s" in (prepare(CXX=compiler_that(script, tmp_path)) or "")
    child = Path("/proc") / (tmp_path / "pid").read_text().strip()

    def is_gone() -> bool:
        try:
            return "(sleep) Z" in (child / "stat").read_text()  # waits to be forgotten
        except (FileNotFoundError, ProcessLookupError):
            return True

    deadline = time.monotonic() + 20
    while not is_gone():  # the signal may reach it late
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_wrong_result_is_noticed(
    prepare: Callable[..., str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that answers, and computes nothing."""
    names = [f"sltrain_{kind}_{direction}" for kind in ("sparse", "block") for direction in ("forward", "backward")]
    source = "".join(f'extern "C" int {name}() {{ return 0; }}\n' for name in [*names, "sltrain_has_threads"])
    (tmp_path / "empty.cpp").write_text(source)
    monkeypatch.setattr(cpu_kernel, "SOURCE", tmp_path / "empty.cpp")
    assert prepare() == "the compiled kernel gives wrong results on this machine"


@kernel
def test_does_without_a_cache(
    prepare: Callable[..., str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file, where a folder would have to be made")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(compile_cpp, "FLAGS", QUICK)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert prepare() is None and multiplies()
    assert not list((tmp_path / "temporary").iterdir())


# ---- in processes of their own

CHECK = """
import torch
from sltrain.kernels import cpu_kernel
print("status:", cpu_kernel.status())
if cpu_kernel.status() is None:
    S = torch.tensor([[0., 2.], [3., 0.]])
    x = torch.tensor([[1., 10.]])
    y = cpu_kernel.forward(x, [S[S != 0]], [torch.tensor([1, 2], dtype=torch.int32)], [2])[0]
    assert torch.equal(y, x @ S.t())
"""


def start(cache: Path, code: str = CHECK, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environment},
    )


def finish(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out.strip().removeprefix("status: ")


@kernel
def test_builds_once_repairs_damage_and_shares_torchs_threads(tmp_path) -> None:
    """In one test, since each build takes seconds: two processes build at once; a third finds their file damaged; a
    fourth uses the third's without a compiler run."""
    quick = (
        "from sltrain.kernels import compile_cpp\n"
        "compile_cpp.FLAGS = ('-O0', *compile_cpp.FLAGS[2:], '-std=c++17')\n" + CHECK
    )
    both = [start(tmp_path, quick) for _ in range(2)]
    assert [finish(process) for process in both] == ["None", "None"]
    folder = tmp_path / "sltrain" / "kernels"
    (file,) = folder.iterdir()  # nothing unfinished is left
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert finish(start(tmp_path, quick)) == "None"
    assert [f.read_bytes() for f in folder.iterdir()] == [whole]

    no_compiling = "from sltrain.kernels import compile_cpp\ncompile_cpp._compile = None\n"
    no_second_pool = """
torch.set_num_threads(2)
cpu_kernel.forward(torch.ones(500, 4), [torch.ones(1)], [torch.zeros(1, dtype=torch.int32)], [3])
import re, pathlib
maps = pathlib.Path("/proc/self/maps")
pools = set(re.findall(r"/\\S*lib[gi]?omp\\S*", maps.read_text())) if maps.exists() else {1}
assert len(pools) == 1, pools
"""
    assert finish(start(tmp_path, no_compiling + quick + no_second_pool)) == "None"
