"""Output may vanish at any time; the work and the exit code do not change."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What libraries do with the two streams, a file opened meanwhile, and an exit code of its own.
PROGRAM = """
import contextlib, logging, os, sys, warnings
from sltrain.streams import secure_streams
secure_streams()
file = open(sys.argv[1], "w")
for i in range(100):
    print("naïve 😀", i, flush=i % 2)
    logging.warning("naïve 😀 %d", i)
    warnings.warn(f"naïve {i}")
    with contextlib.suppress(OSError):
        os.write(2, b"from C")
file.write(str(file.fileno()))
sys.stdout.write("a last part")
sys.exit(7)
"""


@pytest.mark.parametrize(
    "how", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>&1", "2>&1 | true", "2>&1 >/dev/null | true"]
)
def test_a_program_goes_on_to_its_end(how: str, tmp_path: Path) -> None:
    redirection, _, reader = how.partition(" | ")
    script = f'{{ "$0" -c "$1" "$2/file" {redirection}; echo $? >"$2/code"; }} {"| " + reader if reader else ""}'
    command = ["bash", "-c", script, sys.executable, PROGRAM, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONWARNINGS": "always"})
    assert (tmp_path / "code").read_text() == "7\n"
    assert int((tmp_path / "file").read_text()) > 2, "a file has the number of an output"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_lacks_is_escaped(encoding: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "file")],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    written = "naïve 😀 99\n".encode(encoding, "backslashreplace") + b"a last part"
    assert done.returncode == 7 and done.stdout.endswith(written), done


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_everything(tmp_path: Path) -> None:
    code = "import os, sys; from sltrain.streams import secure_streams; os.set_blocking(1, False); secure_streams()"
    code += "; [print('x' * 999) for _ in range(500)]"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    time.sleep(0.5)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and out == (b"x" * 999 + b"\n") * 500


@pytest.mark.slow
def test_a_run_behind_head_is_trained_and_saved(
    tiny: list[str], tmp_path: Path, start_process: "Callable[..., subprocess.Popen[str]]"
) -> None:
    process = start_process(*tiny, f"run_dir={tmp_path}/run")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith("model ")
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == 6
