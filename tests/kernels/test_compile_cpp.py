"""What happens where the CPU kernel cannot be built, and where its library is kept. In processes of their own, since a
process builds once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sltrain.kernels import cpu_kernel  # noqa: F401  (the condition below asks it)

pytestmark = pytest.mark.slow

kernel = pytest.mark.skipif("cpu_kernel.status() is not None", reason="no CPU kernel here")

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


def test_can_be_switched_off(tmp_path) -> None:
    assert finish(start(tmp_path, SLTRAIN_CPU_KERNEL="off")) == "switched off by SLTRAIN_CPU_KERNEL=off"
    assert not list(tmp_path.iterdir())


def test_says_that_there_is_no_compiler(tmp_path) -> None:
    code = CHECK + "\ntry: cpu_kernel.forward(torch.ones(1, 1), [], [], [])\nexcept RuntimeError as e: print(e)"
    lines = finish(start(tmp_path, code, PATH=str(tmp_path), CXX="")).splitlines()
    assert lines[0] == "no C++ compiler found (CXX, g++, clang++, c++)"
    assert lines[1] == f"the CPU kernel cannot be used: {lines[0]}"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ('[ "$1" = --version ] || { echo "kernel.cpp:1: error: no room" >&2; exit 1; }', "error: no room"),
        ('[ "$1" = --version ] || echo nothing > kernel.so', "cannot be loaded"),
        ('[ "$1" = --version ] || true', "left no kernel"),
    ],
)
def test_says_what_a_broken_compiler_did(tmp_path, script, says) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    assert says in finish(start(tmp_path / "cache", CXX=str(compiler)))


def test_a_compiler_that_hangs_is_ended(tmp_path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] || {{ sleep 300 & echo $! > {tmp_path}/pid; wait; }}\n')
    compiler.chmod(0o755)
    code = CHECK.replace(
        "\nprint", "\nfrom sltrain.kernels import compile_cpp\ncompile_cpp.COMPILE_SECONDS = 1\nprint", 1
    )
    assert "took more than 1 s" in finish(start(tmp_path / "cache", code, CXX=str(compiler)))
    child = Path("/proc") / (tmp_path / "pid").read_text().strip()
    if Path("/proc/self").exists():
        assert not child.exists() or "(sleep) Z" in (child / "stat").read_text()  # gone, or waiting to be forgotten


def test_a_wrong_result_is_noticed(tmp_path) -> None:
    """A library that answers, and computes nothing."""
    names = [f"sltrain_{kind}_{direction}" for kind in ("sparse", "block") for direction in ("forward", "backward")]
    source = "".join(f'extern "C" int {name}() {{ return 0; }}\n' for name in [*names, "sltrain_has_threads"])
    (tmp_path / "empty.cpp").write_text(source)
    path = repr(str(tmp_path / "empty.cpp"))
    code = CHECK.replace("\nprint", f"\nimport pathlib\ncpu_kernel.SOURCE = pathlib.Path({path})\nprint", 1)
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    assert finish(start(tmp_path, code)) == "the compiled kernel gives wrong results on this machine"


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


@kernel
def test_does_without_a_cache(tmp_path) -> None:
    (tmp_path / "cache").write_text("a file, where a folder would have to be made")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    assert finish(start(tmp_path / "cache", TMPDIR=str(temporary))) == "None"
    assert not list(temporary.iterdir())
