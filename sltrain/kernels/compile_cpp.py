"""Compile a C++ file to a shared library when it is first needed, and cache it.

The compiler is the first that exists of CXX, g++, clang++ and c++. The cache is XDG_CACHE_HOME (or ~/.cache)
/sltrain/kernels. A library is named after everything it depends on (source, compiler, flags, processor) and after its
own content, so that machines can share the folder and damaged files are detected. There are no locks: each process
writes a file of its own and renames it. Without a usable cache the library is loaded from a temporary folder and
compiled again next time.

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
from pathlib import Path
from typing import Any

COMPILE_SECONDS = 120
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared")
NATIVE = ("-march=native", "-mcpu=native", "")  # flags for the instructions of this machine; the first that works


class CannotCompile(Exception):
    """There is no library; the message is one line."""


def load_cpp(source: Path) -> ctypes.CDLL:
    """The library of a C++ file, from the cache or compiled now. Raises CannotCompile, and OSError if not even a
    temporary folder can be created."""
    compiler, version = _find_compiler()
    code = source.read_text(encoding="utf-8")
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
        with contextlib.suppress(OSError):  # a full disk, or a folder mounted noexec
            return ctypes.CDLL(str(_write(folder, file_name, library)))
    with tempfile.TemporaryDirectory(prefix="sltrain-kernel-") as private:
        try:
            return ctypes.CDLL(str(_write(Path(private), file_name, library)))
        except OSError as error:
            raise CannotCompile(f"the compiled kernel cannot be loaded: {one_line(str(error))}") from None


def one_line(text: str) -> str:
    """The first line of a message of the compiler or the system."""
    return (text.strip().splitlines() or ["no message"])[0]


def _find_compiler() -> tuple[list[str], str]:
    """The command, and its answer to --version."""
    for command in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        compiler = shlex.split(command)
        found = shutil.which(compiler[0]) if compiler else None
        if found is not None:
            compiler[0] = os.path.abspath(found)
            ask = [*compiler, "--version"]
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                done = subprocess.run(ask, capture_output=True, stdin=subprocess.DEVNULL, timeout=COMPILE_SECONDS)
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
    """The folder of compiled kernels; None if it cannot be created."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sltrain" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except (OSError, RuntimeError):
        return None


def _compile(compiler: list[str], code: str) -> bytes:
    """The shared library."""
    linker = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    with tempfile.TemporaryDirectory(prefix="sltrain-kernel-") as name:
        folder = Path(name)
        (folder / "kernel.cpp").write_text(code)
        for native in NATIVE:
            command = [*compiler, *FLAGS, *([native] if native else []), *linker, "kernel.cpp", "-o", "kernel.so"]
            status, text = _run(command, folder)
            if status == 0 and (folder / "kernel.so").exists():
                return (folder / "kernel.so").read_bytes()
    wrong = next((line for line in text.splitlines() if "error" in line), text or "it left no kernel")
    raise CannotCompile(f"{compiler[0]} could not compile the kernel: {one_line(wrong)}")


def _run(command: list[str], folder: Path) -> tuple[int, str]:
    """Exit status and error output. On return neither the process nor its children exist."""
    # A file, not a pipe: a pipe would be read until the last child closes it.
    with open(folder / "errors", "w+b") as errors:
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": errors}
        environment = {**os.environ, "LC_ALL": "C"}
        process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **quiet)
        try:
            status = process.wait(COMPILE_SECONDS)
        except subprocess.TimeoutExpired:
            raise CannotCompile(f"{command[0]} took more than {COMPILE_SECONDS} s over the kernel") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        errors.seek(0)
        return status, errors.read().decode(errors="replace")


def _write(folder: Path, name: str, content: bytes) -> Path:
    """Write a file that appears under its name only when complete: processes that build at once replace it."""
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
