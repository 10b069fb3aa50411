"""A C++ file compiled to a library when it is first needed, and kept.

The compiler is CXX, g++, clang++ or c++, whichever is there first. The library is kept under XDG_CACHE_HOME (or
~/.cache)/sltrain/kernels, named after everything it depends on (source, compiler, flags, processor) and after its own
content, so that machines can share the folder and damage is noticed. There are no locks: each process writes a file of
its own and renames it. Where nothing can be kept, it is loaded from a temporary folder and compiled again next time.

Not torch.utils.cpp_extension: it needs ninja and Python's headers, and leaves a lock behind when it is killed.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

COMPILE_SECONDS = 120
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared")
# What compilers call the instructions of this machine, the first that works.
NATIVE = ("-march=native", "-mcpu=native", "")


class CannotCompile(Exception):
    """Why there is no library, in one line."""


def load_cpp(source: Path) -> ctypes.CDLL:
    """The library of a C++ file, from the cache or compiled now. Raises CannotCompile, and OSError where not even a
    temporary folder can be had."""
    compiler, version = _find_compiler()
    code = source.read_text()
    name = _digest("\0".join([code, *FLAGS, *NATIVE, *compiler, version, _machine()]).encode())
    folder = _cache_folder()
    if folder is not None:
        for file in sorted(folder.glob(f"{name}-*.so")):
            with contextlib.suppress(OSError):
                if _digest(file.read_bytes()) == file.stem.removeprefix(f"{name}-"):
                    return ctypes.CDLL(str(file))
                file.unlink()  # damaged
    library = _compile(compiler, code)
    file_name = f"{name}-{_digest(library)}.so"
    if folder is not None:
        with contextlib.suppress(OSError):  # a full disk, or a folder nothing can be run from
            return ctypes.CDLL(str(_write(folder, file_name, library)))
    with tempfile.TemporaryDirectory(prefix="sltrain-kernel-") as private:
        try:
            return ctypes.CDLL(str(_write(Path(private), file_name, library)))
        except OSError as error:
            raise CannotCompile(f"the compiled kernel cannot be loaded: {one_line(str(error))}") from None


def one_line(text: str) -> str:
    """What a compiler or the system says, cut to a line."""
    return (text.strip().splitlines() or ["no message"])[0]


def _find_compiler() -> tuple[list[str], str]:
    """The command and what it says about its version."""
    for command in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        compiler = shlex.split(command)
        found = shutil.which(compiler[0]) if compiler else None
        if found is not None:
            compiler[0] = os.path.abspath(found)
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                done = subprocess.run(
                    [*compiler, "--version"], capture_output=True, stdin=subprocess.DEVNULL, timeout=COMPILE_SECONDS
                )
                if done.returncode == 0:
                    return compiler, done.stdout.decode(errors="replace")
    raise CannotCompile("no C++ compiler found (CXX, g++, clang++, c++)")


def _machine() -> str:
    """What -march=native depends on."""
    lines = [platform.system(), platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        names = ("model name", "cpu family", "model", "flags", "features", "cpu part", "isa")
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        lines += [line for line in text.splitlines() if line.split(":")[0].strip().lower() in names]
    return "\n".join(lines)


def _cache_folder() -> Path | None:
    """Where compiled kernels are kept; None if nothing can be written there."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sltrain" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except (OSError, RuntimeError):
        return None


def _compile(compiler: list[str], code: str) -> bytes:
    """The shared library."""
    linker = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    with tempfile.TemporaryDirectory(prefix="sltrain-kernel-") as folder:
        (Path(folder) / "kernel.cpp").write_text(code)
        for native in NATIVE:
            command = [*compiler, *FLAGS, *([native] if native else []), *linker, "kernel.cpp", "-o", "kernel.so"]
            with open(Path(folder) / "errors", "w+b") as errors, _ended(command, folder, errors) as process:
                try:
                    status = process.wait(COMPILE_SECONDS)
                except subprocess.TimeoutExpired:
                    raise CannotCompile(f"{compiler[0]} took more than {COMPILE_SECONDS} s over the kernel") from None
                if status == 0 and (Path(folder) / "kernel.so").exists():
                    return (Path(folder) / "kernel.so").read_bytes()
                errors.seek(0)
                text = errors.read().decode(errors="replace") or "it left no kernel"
    wrong = next((line for line in text.splitlines() if "error" in line), text)
    raise CannotCompile(f"{compiler[0]} could not compile the kernel: {one_line(wrong)}")


@contextlib.contextmanager
def _ended(command: list[str], folder: str, errors: IO[bytes]) -> Iterator["subprocess.Popen[bytes]"]:
    """A process with its own group, of which nothing is left afterwards."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        env={**os.environ, "LC_ALL": "C"},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _write(folder: Path, name: str, content: bytes) -> Path:
    """Under its name only when complete: processes that build at once rename the same file onto each other."""
    handle, temporary = tempfile.mkstemp(dir=folder, prefix="unfinished-")
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, folder / name)
    except BaseException:
        os.unlink(temporary)
        raise
    return folder / name


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]
