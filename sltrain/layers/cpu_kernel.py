"""Products with an unstructured or block S on CPUs, float32, in C++ that is compiled on first use.

    y = x S^T,   dx = dy S,   dvalues = (dy^T x) at the trained positions;   x (N, in), S (out, in) with nnz entries

torch's own sparse products take longer than the dense product at 3 % entries. What makes them slow is that every entry
touches a few floats of x and y in main memory. Here 64 rows of x (tokens) are transposed into cache, so that an entry
meets 64 neighbouring floats: one row of S against the tile stays in registers (forward), one column of S against the
tile of dy gives its column of dx and all its dvalues in one reading (backward). Blocks multiply tiles packed by block
column, as a small dense product. Several S that are applied to the same x share its tile.

The compiler is CXX, g++, clang++ or c++, whichever is there first; the result is kept under XDG_CACHE_HOME (or
~/.cache)/sltrain/kernels, named after everything it depends on, so machines can share the folder. There are no locks:
each process writes its own file and renames it. Before first use the kernel must reproduce a small product computed by
torch. Where any of this fails, `status` says why and callers use plain torch; SLTRAIN_CPU_KERNEL=off asks for that.

The threads are those of torch (torch.set_num_threads): the C++ calls the OpenMP library that torch has loaded. Results
are the same bit for bit as long as their number is. Like torch itself, a forked child must use one thread if its parent
used more.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

COMPILE_SECONDS = 120
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared")
NATIVE = (
    "-march=native",
    "-mcpu=native",
    "",
)  # what compilers call the instructions of this machine, the first that works
INT32_MAX = 2**31 - 1

logger = logging.getLogger(__name__)


def status() -> str | None:
    """None when the kernel can be used, else one line that says why not. The first call builds it (seconds, once a
    machine) or loads it from the cache, and should come before torch.compile traces one."""
    if not _kernel.tried:
        _kernel.prepare()
    return _kernel.problem


def sparse_forward(x: Tensor, values: list[Tensor], positions: list[Tensor], outs: list[int]) -> list[Tensor]:
    """x (N, in), and for each S its values (nnz,), positions (nnz,) flat in row-major order, sorted, and number of rows
    -> x S^T (N, out), new tensors. float32 and int32."""
    return torch.ops.sltrain.sparse_forward.default(x, values, positions, outs)


def sparse_backward(x: Tensor, grads: list[Tensor], values: list[Tensor], positions: list[Tensor]) -> list[Tensor]:
    """As sparse_forward, with a gradient (N, out) for each S -> [sum of grad S (N, in), then the gradient of each S's
    values (nnz,)]."""
    return torch.ops.sltrain.sparse_backward.default(x, grads, values, positions)


def block_forward(
    x: Tensor, values: list[Tensor], blocks: list[Tensor], outs: list[int], block_size: int
) -> list[Tensor]:
    """As sparse_forward for blocks of side b: values (T, b, b), blocks (T,) = block row * ceil(in / b) + block column,
    sorted. What sticks out of the matrix is not read."""
    return torch.ops.sltrain.block_forward.default(x, values, blocks, outs, block_size)


def block_backward(
    x: Tensor, grads: list[Tensor], values: list[Tensor], blocks: list[Tensor], block_size: int
) -> list[Tensor]:
    """As sparse_backward for blocks; gradients of what sticks out of the matrix are 0."""
    return torch.ops.sltrain.block_backward.default(x, grads, values, blocks, block_size)


def scratch_bytes(
    num_rows: int,
    in_features: int,
    outs: Sequence[int],
    nums: Sequence[int],
    threads: int,
    direction: str,
    block_size: int = 0,
) -> int:
    """Bytes that one call needs besides its arguments and results, for N = num_rows, and for each S its rows and its
    number of entries (block_size 0) or blocks. `direction` is forward or backward.

    entries    flat int32 places, decoded for the call; a tile of x, or of the gradients, a thread. Backward also a copy
               of S ordered by column (12 bytes an entry), and the sums of dvalues: one a thread, and one in that order
    blocks     a copy of S padded to the registers; tiles; backward also a sum of dvalues a thread

    Nothing of it outlives the call but the tiles, which each thread keeps for the next one.
    """
    assert direction in ("forward", "backward")
    backward, total = direction == "backward", sum(nums)
    if block_size:
        wide, across = _round_up(block_size, 16), -(-in_features // block_size)
        down = sum(-(-out // block_size) for out in outs)
        parts = _parts(num_rows, 64, threads)
        packed = total * (4 * block_size * wide + 24) + 8 * (across + down)  # and lists of what lies where
        tiles = parts * (down + 1 if backward else across) * 64 * wide * 4
        return packed + tiles + (parts * total * wide * wide * 4 if backward else 0)
    width = sum(outs) if backward else in_features
    tile_rows = 64  # as tile_tokens in the C++
    while tile_rows > 16 and (tile_rows * width * 4 > 800 * 1024 or tile_rows // 2 * threads >= num_rows):
        tile_rows //= 2
    parts = _parts(num_rows, tile_rows, threads)
    tiles = parts * tile_rows * width * 4
    if not backward:
        return 4 * total + 16 * sum(outs) + tiles
    by_column, sums = 12 * total + 8 * in_features, 4 * (parts + 1) * total
    return 4 * total + by_column + sums + tiles


def _parts(num_rows: int, tile_rows: int, threads: int) -> int:
    """Threads that get work."""
    return max(1, min(threads, -(-num_rows // tile_rows)))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# What torch sees: four operations with shapes that torch.compile can ask for without running them.


def _forward_fake(
    x: Tensor, values: list[Tensor], places: list[Tensor], outs: list[int], block_size: int = 0
) -> list[Tensor]:
    return [x.new_empty((x.shape[0], out)) for out in outs]


def _backward_fake(
    x: Tensor, grads: list[Tensor], values: list[Tensor], places: list[Tensor], block_size: int = 0
) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, *values)]


def _forward(
    x: Tensor, values: list[Tensor], places: list[Tensor], outs: list[int], block_size: int = 0
) -> list[Tensor]:
    problem = _Problem(x, values, places, outs, block_size)
    results = [torch.empty((len(x), out), dtype=torch.float32, device="cpu") for out in outs]
    problem.run("forward", _addresses(results))
    return results


def _backward(
    x: Tensor, grads: list[Tensor], values: list[Tensor], places: list[Tensor], block_size: int = 0
) -> list[Tensor]:
    problem = _Problem(x, values, places, [grad.shape[1] for grad in grads], block_size)
    assert all(grad.dtype == torch.float32 and len(grad) == len(x) for grad in grads)
    grads = [grad.contiguous() for grad in grads]
    grad_x, *grad_values = _backward_fake(x, grads, values, places)
    problem.run("backward", _addresses(grads), ctypes.c_void_p(grad_x.data_ptr()), _addresses(grad_values))
    return [grad_x, *grad_values]


class _Problem:
    """The arguments that all four C++ functions begin with, checked, and kept alive while they run."""

    def __init__(self, x: Tensor, values: list[Tensor], places: list[Tensor], outs: Sequence[int], block_size: int):
        assert x.dim() == 2 and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (x, *values))
        assert len(values) == len(places) == len(outs)
        side = max(block_size, 1)
        for v, place, out in zip(values, places, outs, strict=True):
            assert v.shape == ((len(place), side, side) if block_size else (len(place),))
            assert -(-out // side) * -(-x.shape[1] // side) <= INT32_MAX
        self.x, self.block_size, self.outs = x.contiguous(), block_size, outs
        self.values = [v.contiguous() for v in values]
        self.places = [place.to(torch.int32).contiguous() for place in places]

    def run(self, direction: str, *arguments: object) -> None:
        integer = ctypes.c_int64
        integers = integer * len(self.values)
        code = _kernel.function(f"sltrain_{'block' if self.block_size else 'sparse'}_{direction}")(
            integer(self.block_size),
            integer(len(self.x)),
            integer(self.x.shape[1]),
            integer(len(self.values)),
            integer(torch.get_num_threads()),
            ctypes.c_void_p(self.x.data_ptr()),
            _addresses(self.values),
            _addresses(self.places),
            integers(*[len(place) for place in self.places]),
            integers(*self.outs),
            *arguments,
        )
        if code == 1:
            raise MemoryError("no memory left for the tiles of the CPU kernel")
        assert code == 0, "positions must be sorted and inside the matrix"


def _addresses(tensors: Sequence[Tensor]) -> "ctypes.Array[ctypes.c_void_p]":
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def _register() -> None:
    forward, backward = "Tensor x, Tensor[] values, Tensor[] places, int[] outs", "Tensor x, Tensor[] grads"
    for name, arguments, function, fake in (
        ("sparse_forward", forward, _forward, _forward_fake),
        ("block_forward", f"{forward}, int block_size", _forward, _forward_fake),
        ("sparse_backward", f"{backward}, Tensor[] values, Tensor[] places", _backward, _backward_fake),
        ("block_backward", f"{backward}, Tensor[] values, Tensor[] places, int block_size", _backward, _backward_fake),
    ):
        torch.library.define(f"sltrain::{name}", f"({arguments}) -> Tensor[]")
        torch.library.impl(f"sltrain::{name}", "CPU", function)
        torch.library.register_fake(f"sltrain::{name}", fake)


_register()


# Building and loading


class _Unusable(Exception):
    """Why there is no kernel, in one line."""


class _Kernel:
    """The loaded library, or why there is none. Prepared once a process."""

    def __init__(self) -> None:
        self.tried = False
        self.problem: str | None = None
        self._library: ctypes.CDLL | None = None
        self._lock = threading.Lock()

    def prepare(self) -> None:
        with self._lock:
            if self.tried:
                return
            try:
                self._library = _load()
                _check()
            except _Unusable as error:
                self._library, self.problem = None, str(error)
            except (OSError, ValueError, AssertionError, MemoryError) as error:  # no folder for temporary files, say
                self._library, self.problem = None, f"the kernel could not be made: {_first_line(str(error))}"
            self.tried = True

    def function(self, name: str) -> "ctypes._NamedFuncPointer":
        if self._library is None and not self.tried:
            self.prepare()
        if self._library is None:
            raise RuntimeError(f"the CPU kernel cannot be used: {self.problem}")
        return getattr(self._library, name)


_kernel = _Kernel()


def _load() -> ctypes.CDLL:
    if os.environ.get("SLTRAIN_CPU_KERNEL", "").lower() == "off":
        raise _Unusable("switched off by SLTRAIN_CPU_KERNEL=off")
    compiler, version = _find_compiler()
    name = _digest("\0".join([_SOURCE, *FLAGS, *NATIVE, *compiler, version, _machine()]).encode())
    folder = _cache_folder()
    if folder is not None:
        for file in sorted(folder.glob(f"{name}-*.so")):
            with contextlib.suppress(OSError):
                if _digest(file.read_bytes()) == file.stem.removeprefix(f"{name}-"):
                    return _open(file)
                file.unlink()  # damaged
    library = _compile(compiler)
    file_name = f"{name}-{_digest(library)}.so"
    if folder is not None:
        with contextlib.suppress(OSError):  # a full disk, or a folder nothing can be run from
            return _open(_write(folder, file_name, library))
    with tempfile.TemporaryDirectory(prefix="sltrain-kernel-") as private:
        try:
            return _open(_write(Path(private), file_name, library))
        except OSError as error:
            raise _Unusable(f"the compiled kernel cannot be loaded: {_first_line(str(error))}") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


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
    raise _Unusable("no C++ compiler found (CXX, g++, clang++, c++)")


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


def _compile(compiler: list[str]) -> bytes:
    """The shared library."""
    linker = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    with tempfile.TemporaryDirectory(prefix="sltrain-kernel-") as folder:
        (Path(folder) / "kernel.cpp").write_text(_SOURCE)
        for native in NATIVE:
            command = [*compiler, *FLAGS, *([native] if native else []), *linker, "kernel.cpp", "-o", "kernel.so"]
            with open(Path(folder) / "errors", "w+b") as errors, _ended(command, folder, errors) as process:
                try:
                    code = process.wait(COMPILE_SECONDS)
                except subprocess.TimeoutExpired:
                    raise _Unusable(f"{compiler[0]} took more than {COMPILE_SECONDS} s over the kernel") from None
                if code == 0 and (Path(folder) / "kernel.so").exists():
                    return (Path(folder) / "kernel.so").read_bytes()
                errors.seek(0)
                text = errors.read().decode(errors="replace") or "it left no kernel"
    wrong = next((line for line in text.splitlines() if "error" in line), text)
    raise _Unusable(f"{compiler[0]} could not compile the kernel: {_first_line(wrong)}")


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


def _open(file: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file))
    if not library.sltrain_has_threads() and torch.get_num_threads() > 1:
        logger.warning("the CPU kernel runs on one thread: torch's OpenMP library has no GOMP_parallel")
    return library


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0]


def _check() -> None:
    """A miscompiled kernel must not train anything."""
    generator = torch.Generator("cpu").manual_seed(0)
    n, out_features, in_features, block = 75, 23, 41, 5
    x, grad = (torch.randn(n, size, generator=generator, device="cpu") for size in (in_features, out_features))
    grid = (-(-out_features // block), -(-in_features // block))
    chosen = torch.rand(grid, generator=generator, device="cpu") < 0.4
    stretched = chosen.repeat_interleave(block, 0).repeat_interleave(block, 1)[:out_features, :in_features]
    S = torch.randn(out_features, in_features, generator=generator, device="cpu") * stretched
    y, grad_x = (x[:, None, :] * S).sum(2), (grad[:, :, None] * S).sum(1)
    grad_S = (grad[:, :, None] * x[:, None, :]).sum(0) * stretched

    positions, blocks = (mask.flatten().nonzero().flatten().int() for mask in (stretched, chosen))

    def as_blocks(matrix: Tensor) -> Tensor:
        padding = (0, grid[1] * block - in_features, 0, grid[0] * block - out_features)
        padded = torch.nn.functional.pad(matrix, padding).view(grid[0], block, grid[1], block)
        return padded.transpose(1, 2).reshape(-1, block, block)[blocks.long()]

    results = [
        *sparse_forward(x, [S.flatten()[positions.long()]], [positions], [out_features]),
        *sparse_backward(x, [grad], [S.flatten()[positions.long()]], [positions]),
        *block_forward(x, [as_blocks(S)], [blocks], [out_features], block),
        *block_backward(x, [grad], [as_blocks(S)], [blocks], block),
    ]
    expected = [y, grad_x, grad_S.flatten()[positions.long()], y, grad_x, as_blocks(grad_S)]
    for result, right in zip(results, expected, strict=True):
        if not torch.allclose(result, right, rtol=1e-4, atol=1e-4):
            raise _Unusable("the compiled kernel gives wrong results on this machine")


_SOURCE = r"""
// n tokens; `in` columns of x; T tokens in a tile, of which m are in use; W floats in a vector register. Matrices are
// row-major. A panel is a part of a tile, the tokens of some columns: transposed for entries, as they are for blocks.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

// Weak: the library that torch has loaded, whatever it is called; null where there is none.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
extern "C" __attribute__((weak)) int omp_get_thread_num();
extern "C" __attribute__((weak)) int omp_get_num_threads();

namespace {
#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef int64_t I;
typedef float V __attribute__((vector_size(4 * W)));
typedef float Unaligned __attribute__((vector_size(4 * W), aligned(4)));
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE V load(const float* p) { return *(const Unaligned*)p; }
INLINE void store(float* p, V v) { *(Unaligned*)p = v; }
INLINE V spread(float f) { return f - V{}; }
INLINE void keep(V& v) {  // in a register: what is used twice would otherwise be loaded twice
#if defined(__x86_64__)
  asm("" : "+v"(v));
#else
  (void)v;
#endif
}
constexpr I round_up(I n, I to) { return (n + to - 1) / to * to; }

// ---- Shuffles. P::at(l) is the lane of (a, b) that becomes lane l. Four lanes are one 128-bit piece of a register.

template <class P, size_t... L> INLINE V pick(V a, V b, std::index_sequence<L...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, P::at(L)...);
#else
  typedef int32_t Lanes __attribute__((vector_size(4 * W)));
  return __builtin_shuffle(a, b, Lanes{P::at(L)...});
#endif
}
template <class P> INLINE V pick(V a, V b) { return pick<P>(a, b, std::make_index_sequence<W>()); }
template <int K> struct Unpack {  // within pieces: a0 b0 a1 b1 (K = 0), a2 b2 a3 b3 (K = 2)
  static constexpr int at(int l) { return (l & ~3) + ((l & 3) >> 1) + (l & 1) * W + K; }
};
template <int K> struct Pair {  // within pieces: a0 a1 b0 b1 (K = 0), a2 a3 b2 b3 (K = 2)
  static constexpr int at(int l) { return (l & ~3) + (l & 1) + ((l >> 1) & 1) * W + K; }
};
template <int K> struct Half {  // the lower (K = 0) or upper (K = W / 2) halves of a and b
  static constexpr int at(int l) { return l < W / 2 ? l + K : l + W / 2 + K; }
};
template <int K> struct Every {  // the even (K = 0) or odd (K = 4) pieces of a and b
  static constexpr int at(int l) { return (l & 3) + (l >> 2) * 8 + K; }
};

// r[i] lane j <-> r[j] lane i: first inside pieces, then the pieces themselves.
INLINE void transpose(V* r) {
  UNROLL for (int i = 0; i < W; i += 4) {
    V a = pick<Unpack<0>>(r[i], r[i + 1]), b = pick<Unpack<2>>(r[i], r[i + 1]);
    V c = pick<Unpack<0>>(r[i + 2], r[i + 3]), d = pick<Unpack<2>>(r[i + 2], r[i + 3]);
    r[i] = pick<Pair<0>>(a, c), r[i + 1] = pick<Pair<2>>(a, c);
    r[i + 2] = pick<Pair<0>>(b, d), r[i + 3] = pick<Pair<2>>(b, d);
  }
  if constexpr (W == 8) UNROLL for (int i = 0; i < 4; ++i) {
    V a = r[i], b = r[i + 4];
    r[i] = pick<Half<0>>(a, b), r[i + 4] = pick<Half<W / 2>>(a, b);
  }
  if constexpr (W == 16) UNROLL for (int i = 0; i < 4; ++i) {
    V a = pick<Half<0>>(r[i], r[i + 4]), b = pick<Half<W / 2>>(r[i], r[i + 4]);
    V c = pick<Half<0>>(r[i + 8], r[i + 12]), d = pick<Half<W / 2>>(r[i + 8], r[i + 12]);
    r[i] = pick<Every<0>>(a, c), r[i + 4] = pick<Every<4>>(a, c);
    r[i + 8] = pick<Every<0>>(b, d), r[i + 12] = pick<Every<4>>(b, d);
  }
}

// Lane i of the result is the sum of the lanes of r[i].
INLINE V sums(const V* given) {
  V r[W];
  UNROLL for (int i = 0; i < W; i += 2)
    r[i] = pick<Unpack<0>>(given[i], given[i + 1]) + pick<Unpack<2>>(given[i], given[i + 1]);
  UNROLL for (int i = 0; i < W; i += 4) r[i] = pick<Pair<0>>(r[i], r[i + 2]) + pick<Pair<2>>(r[i], r[i + 2]);
  if constexpr (W >= 8) UNROLL for (int i = 0; i < W; i += 8)
    r[i] = pick<Half<0>>(r[i], r[i + 4]) + pick<Half<W / 2>>(r[i], r[i + 4]);
  if constexpr (W == 16) return pick<Every<0>>(r[0], r[8]) + pick<Every<4>>(r[0], r[8]);
  return r[0];
}

// ---- Tiles. Panel (w, T) <-> columns c0 .. c0 + w - 1 of m rows of a matrix with `cols` columns. Rows are far apart,
// often by a power of two, so several cache lines of one are worked on before the next: P columns at a time.

constexpr I P = 64;

template <int T> INLINE void read_panel(const float* matrix, I m, I cols, I c0, float* panel) {
  I end = std::min(c0 + P, cols), c = c0;
  for (I t = 0; t < T; t += W)
    for (c = c0; c + W <= end; c += W) {
      V r[W];
      const float* from = matrix + t * cols + c;
      if (t + W <= m) UNROLL for (int i = 0; i < W; ++i) r[i] = load(from + i * cols);
      else for (int i = 0; i < W; ++i) r[i] = t + i < m ? load(from + i * cols) : V{};
      transpose(r);
      UNROLL for (int i = 0; i < W; ++i) *(V*)(panel + (c - c0 + i) * T + t) = r[i];
    }
  for (; c < end; ++c)
    for (I t = 0; t < T; ++t) panel[(c - c0) * T + t] = t < m ? matrix[t * cols + c] : 0.f;
}
template <int T> INLINE void write_panel(const float* panel, I m, I cols, I c0, float* matrix) {
  I end = std::min(c0 + P, cols), c = c0;
  for (I t = 0; t < m; t += W)
    for (c = c0; c + W <= end; c += W) {
      V r[W];
      float* to = matrix + t * cols + c;
      UNROLL for (int i = 0; i < W; ++i) r[i] = *(const V*)(panel + (c - c0 + i) * T + t);
      transpose(r);
      if (t + W <= m) UNROLL for (int i = 0; i < W; ++i) store(to + i * cols, r[i]);
      else for (int i = 0; t + i < m; ++i) store(to + i * cols, r[i]);
    }
  for (; c < end; ++c)
    for (I t = 0; t < m; ++t) matrix[t * cols + c] = panel[(c - c0) * T + t];
}

// ---- Memory and threads

struct Space {
  float* data = nullptr;
  I size = 0;
  float* get(I n) {
    if (n > size) {
      free(data), data = nullptr, size = 0;
      void* p = nullptr;
      if (posix_memalign(&p, 4096, n * sizeof(float))) throw std::bad_alloc();
      data = (float*)p, size = n;
    }
    return data;
  }
  float* zeros(I n) { return (float*)memset(get(std::max<I>(n, 1)), 0, n * sizeof(float)); }
  ~Space() { free(data); }
};
thread_local Space tile_space;  // kept between calls: fresh pages would cost as much as the products

template <class F> struct Job { const F* work; I parts; bool failed; };
template <class F> void run_job(void* p) {
  auto* job = (Job<F>*)p;
  I step = omp_get_num_threads();
  try {
    for (I part = omp_get_thread_num(); part < job->parts; part += step) (*job->work)(part);
  } catch (...) { job->failed = true; }
}
bool has_threads() { return GOMP_parallel && omp_get_thread_num && omp_get_num_threads; }
template <class F> void parallel(I parts, I threads, const F& work) {
  Job<F> job{&work, parts, false};
  if (parts > 1 && has_threads()) GOMP_parallel(run_job<F>, &job, (unsigned)threads, 0);
  else for (I part = 0; part < parts; ++part) work(part);
  if (job.failed) throw std::bad_alloc();
}

struct Problem {
  I block, n, in, count, threads;  // `count` matrices S
  const float* x;
  const float* const* values;
  const int32_t* const* places;  // flat positions, or block numbers
  const I *num, *outs;           // how many of them, rows of S
  I parts(I T) const { return std::max<I>(1, std::min(threads, (n + T - 1) / T)); }
  void check() const {
    for (I g = 0; g < count; ++g) {
      I b = std::max<I>(block, 1), end = ((outs[g] + b - 1) / b) * ((in + b - 1) / b), last = 0;
      bool wrong = false;
      for (I k = 0; k < num[g]; ++k) wrong |= places[g][k] < last, last = places[g][k];
      if (wrong || last >= std::max<I>(end, 1)) throw 2;
    }
  }
};
// Calls work(n0, m) for the tiles of one part; which tiles depends on n, T and the number of parts alone.
template <class F> INLINE void each_tile(const Problem& p, I T, I part, I parts, const F& work) {
  I tiles = (p.n + T - 1) / T;
  for (I i = tiles * part / parts; i < tiles * (part + 1) / parts; ++i) work(i * T, std::min(T, p.n - i * T));
}
// Tokens in a tile of `width` columns: few enough for the cache and to give each thread one.
I tile_tokens(const Problem& p, I width) {
  I T = 64;
  while (T > 16 && (T * width * 4 > 800 * 1024 || T / 2 * p.threads >= p.n)) T /= 2;
  return T;
}

// ---- Entries

template <int T> void sparse_forward(const Problem& p, float* const* ys) {
  std::vector<std::vector<I>> starts(p.count);  // of each row of each S
  for (I g = 0; g < p.count; ++g)
    for (I r = 0, k = 0; r <= p.outs[g]; ++r) {
      while (k < p.num[g] && p.places[g][k] < r * p.in) ++k;
      starts[g].push_back(k);
    }
  I parts = p.parts(T);
  parallel(parts, p.threads, [&](I part) {
    float* tile = tile_space.get(p.in * T);
    alignas(64) float panel[P * T];
    each_tile(p, T, part, parts, [&](I n0, I m) {
      for (I c = 0; c < p.in; c += P) read_panel<T>(p.x + n0 * p.in, m, p.in, c, tile + c * T);
      for (I g = 0; g < p.count; ++g)
        for (I r0 = 0; r0 < p.outs[g]; r0 += P) {
          for (I r = r0; r < std::min(r0 + P, p.outs[g]); ++r) {
            V acc[T / W] = {};
            for (I k = starts[g][r]; k < starts[g][r + 1]; ++k) {
              const float* x = tile + (p.places[g][k] - r * p.in) * T;
              V v = spread(p.values[g][k]);
              UNROLL for (int u = 0; u < T / W; ++u) acc[u] += v * *(const V*)(x + u * W);
            }
            UNROLL for (int u = 0; u < T / W; ++u) *(V*)(panel + (r - r0) * T + u * W) = acc[u];
          }
          write_panel<T>(panel, m, p.outs[g], r0, ys[g] + n0 * p.outs[g]);
        }
    });
  });
}

// All S stacked on each other, entries ordered by column; row: in the stack.
struct Columns {
  std::vector<I> start;
  std::vector<int32_t> row, from;  // from: the entry's number in the given order
  std::vector<float> value;
  explicit Columns(const Problem& p) : start(p.in + 1) {
    I total = 0;
    for (I g = 0; g < p.count; ++g) total += p.num[g];
    std::vector<int32_t> rows(total), columns(total);
    row.resize(total), from.resize(total), value.resize(total);
    for (I g = 0, k = 0, offset = 0; g < p.count; offset += p.outs[g++])
      for (I j = 0, r = 0; j < p.num[g]; ++j, ++k) {
        if (p.places[g][j] >= (r + 1) * p.in) r = p.places[g][j] / p.in;
        rows[k] = offset + r, columns[k] = p.places[g][j] - r * p.in;
        ++start[columns[k] + 1];
      }
    for (I c = 0; c < p.in; ++c) start[c + 1] += start[c];
    std::vector<I> next(start);
    for (I g = 0, k = 0; g < p.count; ++g)
      for (I j = 0; j < p.num[g]; ++j, ++k) {
        I to = next[columns[k]]++;
        row[to] = rows[k], from[to] = k, value[to] = p.values[g][j];
      }
  }
};

template <int T> void sparse_backward(const Problem& p, const float* const* grads, float* dx, float* const* dvalues) {
  Columns s(p);
  I total = s.row.size(), padded = round_up(total, W), rows = 0, parts = p.parts(T);
  for (I g = 0; g < p.count; ++g) rows += p.outs[g];
  Space sum_space;
  float* all = sum_space.zeros(parts * padded);
  parallel(parts, p.threads, [&](I part) {
    float *tile = tile_space.get(rows * T), *sum = all + part * padded;
    alignas(64) float x[P * T], panel[P * T];
    V open[W] = {};  // the last W products grad * x, whose lanes are still to be summed
    each_tile(p, T, part, parts, [&](I n0, I m) {
      for (I g = 0, first = 0; g < p.count; first += p.outs[g++])
        for (I r = 0; r < p.outs[g]; r += P)
          read_panel<T>(grads[g] + n0 * p.outs[g], m, p.outs[g], r, tile + (first + r) * T);
      for (I c0 = 0; c0 < p.in; c0 += P) {
        read_panel<T>(p.x + n0 * p.in, m, p.in, c0, x);
        for (I c = c0; c < std::min(c0 + P, p.in); ++c) {
          V acc[T / W] = {}, xs[T / W];
          UNROLL for (int u = 0; u < T / W; ++u) xs[u] = *(const V*)(x + (c - c0) * T + u * W);
          for (I k = s.start[c]; k < s.start[c + 1]; ++k) {
            const float* grad = tile + (I)s.row[k] * T;
            V v = spread(s.value[k]), product = {};
            UNROLL for (int u = 0; u < T / W; ++u) {
              V g = *(const V*)(grad + u * W); keep(g);
              acc[u] += v * g, product += g * xs[u];
            }
            open[k & (W - 1)] = product;
            if ((k & (W - 1)) == W - 1) store(sum + k + 1 - W, load(sum + k + 1 - W) + sums(open));
          }
          UNROLL for (int u = 0; u < T / W; ++u) *(V*)(panel + (c - c0) * T + u * W) = acc[u];
        }
        write_panel<T>(panel, m, p.in, c0, dx + n0 * p.in);
      }
      if (total % W) {
        for (I k = total; k < padded; ++k) open[k % W] = V{};
        store(sum + padded - W, load(sum + padded - W) + sums(open));
      }
    });
  });
  std::vector<float> given(total);
  for (I k = 0; k < total; ++k) {
    float value = 0;
    for (I part = 0; part < parts; ++part) value += all[part * padded + k];
    given[s.from[k]] = value;
  }
  for (I g = 0, k = 0; g < p.count; k += p.num[g++]) std::copy_n(given.begin() + k, p.num[g], dvalues[g]);
}

// ---- Blocks. A panel is the columns of a block, in strips of S columns: (strips, BLOCK_T, S), zeros behind.

constexpr I S = 16, BLOCK_T = 64;
constexpr int Q = S / W, R = W == 16 ? 16 : 4;  // R x Q registers of sums

struct Blocks {  // the products that make up a matrix y, panel by panel
  I b, wide;                    // side, and rounded up to S
  std::vector<I> start;         // panel l of y takes blocks start[l] .. start[l + 1] - 1
  std::vector<I> source, from;  // the panel a block multiplies, its number in the given order
  const float* values;          // (blocks, strips, b, S)
};

void pack(const float* matrix, I m, I cols, I c0, I b, float* panel) {
  for (I strip = 0; strip < b; strip += S, c0 += S, panel += BLOCK_T * S) {
    I w = std::max<I>(0, std::min({S, b - strip, cols - c0}));
    for (I t = 0; t < m; ++t) {
      const float* from = matrix + t * cols + c0;
      float* to = panel + t * S;
      if (w == S) UNROLL for (int u = 0; u < S; u += W) store(to + u, load(from + u));
      else std::fill(std::copy_n(from, w, to), to + S, 0.f);
    }
    std::fill(panel + m * S, panel + round_up(m, S) * S, 0.f);
  }
}

// Panel l of y (m, cols): the sum of panels[source] (m, b) times values (b, b) over its blocks.
void multiply(const Blocks& k, I l, const float* panels, I m, float* y, I cols) {
  for (I strip = 0; strip < std::min(k.b, cols - l * k.b); strip += S) {
    I column = l * k.b + strip, w = std::min({S, k.b - strip, cols - column});
    for (I t = 0; t < m; t += R) {
      V acc[R][Q] = {};
      for (I i = k.start[l]; i < k.start[l + 1]; ++i)
        for (I c0 = 0; c0 < k.b; c0 += S) {
          const float *a = panels + (k.source[i] * k.wide + c0) * BLOCK_T + t * S;
          const float *v = k.values + (i * k.wide + strip) * k.b + c0 * S;
          for (I c = 0, end = std::min(S, k.b - c0); c < end; ++c) UNROLL for (int j = 0; j < R; ++j) {
            V f = spread(a[j * S + c]);
            UNROLL for (int q = 0; q < Q; ++q) acc[j][q] += f * load(v + c * S + q * W);
          }
        }
      float* to = y + t * cols + column;
      if (w == S && t + R <= m) {
        UNROLL for (int j = 0; j < R; ++j) UNROLL for (int q = 0; q < Q; ++q) store(to + j * cols + q * W, acc[j][q]);
      } else {
        float rest[R][S];
        memcpy(rest, acc, sizeof rest);
        for (I j = 0; j < std::min<I>(R, m - t); ++j) std::copy_n(rest[j], w, to + j * cols);
      }
    }
  }
}

// sum (wide, wide) += grad^T x for two panels of m rows
void multiply_transposed(const float* grad, const float* x, I m, I wide, float* sum) {
  for (I r = 0; r < wide; r += R)
    for (I strip = 0; strip < wide; strip += S) {
      const float *g = grad + r / S * S * BLOCK_T + r % S, *xs = x + strip * BLOCK_T;
      float* to = sum + r * wide + strip;
      V acc[R][Q];
      UNROLL for (int j = 0; j < R; ++j) UNROLL for (int q = 0; q < Q; ++q) acc[j][q] = load(to + j * wide + q * W);
      for (I t = 0; t < m; ++t) UNROLL for (int j = 0; j < R; ++j) {
        V f = spread(g[t * S + j]);
        UNROLL for (int q = 0; q < Q; ++q) acc[j][q] += f * load(xs + t * S + q * W);
      }
      UNROLL for (int j = 0; j < R; ++j) UNROLL for (int q = 0; q < Q; ++q) store(to + j * wide + q * W, acc[j][q]);
    }
}

// The part of block i of S_g inside the matrix to (strips, b, S), transposed or not.
void copy_block(const Problem& p, I g, I i, bool transposed, float* to) {
  I b = p.block, across = (p.in + b - 1) / b, place = p.places[g][i];
  I rows = std::min(b, p.outs[g] - place / across * b), columns = std::min(b, p.in - place % across * b);
  const float* from = p.values[g] + i * b * b;
  for (I r = 0; r < rows; ++r)
    for (I c = 0; c < columns; ++c) {
      I row = transposed ? c : r, column = transposed ? r : c;
      to[(column / S * b + row) * S + column % S] = from[r * b + c];
    }
}

void block_forward(const Problem& p, float* const* ys) {
  I b = p.block, wide = round_up(b, S), across = (p.in + b - 1) / b, size = BLOCK_T * wide, parts = p.parts(BLOCK_T);
  std::vector<Blocks> layers(p.count);
  std::vector<Space> spaces(p.count);
  for (I g = 0; g < p.count; ++g) {
    float* values = spaces[g].zeros(p.num[g] * b * wide);
    std::vector<I> start((p.outs[g] + b - 1) / b + 1), source(p.num[g]);
    for (I i = 0; i < p.num[g]; ++i) {
      ++start[p.places[g][i] / across + 1], source[i] = p.places[g][i] % across;
      copy_block(p, g, i, true, values + i * b * wide);
    }
    for (size_t l = 1; l < start.size(); ++l) start[l] += start[l - 1];
    layers[g] = {b, wide, start, source, {}, values};
  }
  parallel(parts, p.threads, [&](I part) {
    float* panels = tile_space.get(across * size);
    each_tile(p, BLOCK_T, part, parts, [&](I n0, I m) {
      for (I l = 0; l < across; ++l) pack(p.x + n0 * p.in, m, p.in, l * b, b, panels + l * size);
      for (I g = 0; g < p.count; ++g)
        for (I l = 0; l * b < p.outs[g]; ++l)
          multiply(layers[g], l, panels, m, ys[g] + n0 * p.outs[g], p.outs[g]);
    });
  });
}

// All S stacked on each other, blocks ordered by block column.
Blocks by_block_column(const Problem& p, Space& space) {
  I b = p.block, wide = round_up(b, S), across = (p.in + b - 1) / b, total = 0;
  for (I g = 0; g < p.count; ++g) total += p.num[g];
  float* values = space.zeros(total * b * wide);
  Blocks k{b, wide, std::vector<I>(across + 1), std::vector<I>(total), std::vector<I>(total), values};
  for (I g = 0; g < p.count; ++g)
    for (I i = 0; i < p.num[g]; ++i) ++k.start[p.places[g][i] % across + 1];
  for (I l = 0; l < across; ++l) k.start[l + 1] += k.start[l];
  std::vector<I> next(k.start);
  for (I g = 0, rows = 0, before = 0; g < p.count; ++g) {
    for (I i = 0; i < p.num[g]; ++i) {
      I to = next[p.places[g][i] % across]++;
      k.source[to] = rows + p.places[g][i] / across, k.from[to] = before + i;
      copy_block(p, g, i, false, values + to * b * wide);
    }
    rows += (p.outs[g] + b - 1) / b, before += p.num[g];
  }
  return k;
}

void block_backward(const Problem& p, const float* const* grads, float* dx, float* const* dvalues) {
  Space value_space, sum_space;
  Blocks k = by_block_column(p, value_space);
  I b = p.block, wide = k.wide, size = BLOCK_T * wide, area = wide * wide, total = k.source.size(), rows = 0;
  I parts = p.parts(BLOCK_T);
  for (I g = 0; g < p.count; ++g) rows += (p.outs[g] + b - 1) / b;
  float* all = sum_space.zeros(parts * total * area);
  parallel(parts, p.threads, [&](I part) {
    float *panels = tile_space.get((rows + 1) * size), *x = panels + rows * size, *sum = all + part * total * area;
    each_tile(p, BLOCK_T, part, parts, [&](I n0, I m) {
      float* to = panels;
      for (I g = 0; g < p.count; ++g)
        for (I r = 0; r < p.outs[g]; r += b, to += size) pack(grads[g] + n0 * p.outs[g], m, p.outs[g], r, b, to);
      for (I l = 0; l * b < p.in; ++l) {
        multiply(k, l, panels, m, dx + n0 * p.in, p.in);
        pack(p.x + n0 * p.in, m, p.in, l * b, b, x);
        for (I i = k.start[l]; i < k.start[l + 1]; ++i)
          multiply_transposed(panels + k.source[i] * size, x, m, wide, sum + i * area);
      }
    });
  });
  std::vector<float*> home;
  for (I g = 0; g < p.count; ++g)
    for (I i = 0; i < p.num[g]; ++i) home.push_back(dvalues[g] + i * b * b);
  for (I i = 0; i < total; ++i)
    for (I r = 0; r < b; ++r)
      for (I c = 0; c < b; ++c) {
        float value = 0;
        for (I part = 0; part < parts; ++part) value += all[(part * total + i) * area + r * wide + c];
        home[k.from[i]][r * b + c] = value;
      }
}

// 0, or 1 without memory, 2 if places are not sorted or not inside the matrix.
template <class F> int answer(const Problem& p, const F& work) {
  try {
    p.check();
    work();
    return 0;
  } catch (int code) { return code; } catch (...) { return 1; }
}
}  // namespace

#define PROBLEM \
  I block, I n, I in, I count, I threads, const float *x, const float *const *values, const int32_t *const *places, \
      const I *num, const I *outs
#define GIVEN Problem p{block, n, in, count, threads, x, values, places, num, outs}

extern "C" {
int sltrain_has_threads() { return has_threads(); }
int sltrain_sparse_forward(PROBLEM, float* const* ys) {
  GIVEN;
  return answer(p, [&] {
    I T = tile_tokens(p, in);
    (T == 64 ? sparse_forward<64> : T == 32 ? sparse_forward<32> : sparse_forward<16>)(p, ys);
  });
}
int sltrain_sparse_backward(PROBLEM, const float* const* grads, float* dx, float* const* dvalues) {
  GIVEN;
  return answer(p, [&] {
    I rows = 0;
    for (I g = 0; g < count; ++g) rows += outs[g];
    I T = tile_tokens(p, rows);
    (T == 64 ? sparse_backward<64> : T == 32 ? sparse_backward<32> : sparse_backward<16>)(p, grads, dx, dvalues);
  });
}
int sltrain_block_forward(PROBLEM, float* const* ys) {
  GIVEN;
  return answer(p, [&] { block_forward(p, ys); });
}
int sltrain_block_backward(PROBLEM, const float* const* grads, float* dx, float* const* dvalues) {
  GIVEN;
  return answer(p, [&] { block_backward(p, grads, dx, dvalues); });
}
}
"""
