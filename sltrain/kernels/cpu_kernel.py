"""Products with an unstructured or block S on CPUs, float32, in C++ that is compiled on first use.

    y = x S^T,   dx = dy S,   dvalues = (dy^T x) at the trained positions;   x (N, in), S (out, in) with nnz entries

torch's own sparse products take longer than the dense product at 3 % entries. What makes them slow is that every entry
touches a few floats of x and y in main memory. Here 64 rows of x (tokens) are transposed into cache, so that an entry
meets 64 neighbouring floats: one row of S against the tile stays in registers (forward), one column of S against the
tile of dy gives its column of dx and all its dvalues in one reading (backward). Blocks multiply tiles packed by block
column, as a small dense product. Several S that are applied to the same x share its tile.

The C++ is cpu_kernel.cpp; compile_cpp.py compiles it and keeps the result. Before first use it must reproduce a small
product computed by torch. Where any of this fails, `status` says why and callers use plain torch;
SLTRAIN_CPU_KERNEL=off asks for that.

The threads are those of torch (torch.set_num_threads): the C++ calls the OpenMP library that torch has loaded. Results
are the same bit for bit as long as their number is. Like torch itself, a forked child must use one thread if its parent
used more.
"""

import ctypes
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sltrain.kernels.compile_cpp import CannotCompile, load_cpp, one_line

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
INT32_MAX = 2**31 - 1

logger = logging.getLogger(__name__)


def status() -> str | None:
    """None when the kernel can be used, else one line that says why not. The first call builds it (seconds, once a
    machine) or loads it from the cache, and should come before torch.compile traces one."""
    if not _kernel.tried:
        _kernel.prepare()
    return _kernel.problem


def forward(
    x: Tensor, values: list[Tensor], places: list[Tensor], outs: list[int], block_size: int = 0
) -> list[Tensor]:
    """x S^T (N, out), new tensors, for each S: its number of rows in `outs`, and

    block_size 0    values (nnz,) and places (nnz,): positions flat in row-major order, sorted
    block_size b    values (T, b, b) and places (T,): block row * ceil(in / b) + block column, sorted; what sticks out
                    of the matrix is not read

    x (N, in) and values are float32, places int32.
    """
    return torch.ops.sltrain.forward.default(x, values, places, outs, block_size)


def backward(
    x: Tensor, grads: list[Tensor], values: list[Tensor], places: list[Tensor], block_size: int = 0
) -> list[Tensor]:
    """As `forward`, with a gradient (N, out) for each S -> [sum of grad S (N, in), then the gradient of each S's
    values]; 0 for what sticks out of the matrix."""
    return torch.ops.sltrain.backward.default(x, grads, values, places, block_size)


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


# What torch sees: two operations with shapes that torch.compile can ask for without running them.


def _forward_fake(
    x: Tensor, values: list[Tensor], places: list[Tensor], outs: list[int], block_size: int
) -> list[Tensor]:
    return [x.new_empty((x.shape[0], out)) for out in outs]


def _backward_fake(
    x: Tensor, grads: list[Tensor], values: list[Tensor], places: list[Tensor], block_size: int
) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, *values)]


def _forward(x: Tensor, values: list[Tensor], places: list[Tensor], outs: list[int], block_size: int) -> list[Tensor]:
    problem = _Problem(x, values, places, outs, block_size)
    results = [torch.empty((len(x), out), dtype=torch.float32, device="cpu") for out in outs]
    problem.run("forward", _addresses(results))
    return results


def _backward(
    x: Tensor, grads: list[Tensor], values: list[Tensor], places: list[Tensor], block_size: int
) -> list[Tensor]:
    problem = _Problem(x, values, places, [grad.shape[1] for grad in grads], block_size)
    assert all(grad.dtype == torch.float32 and len(grad) == len(x) for grad in grads)
    grads = [grad.contiguous() for grad in grads]
    grad_x, *grad_values = _backward_fake(x, grads, values, places, block_size)
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
    for name, arguments, function, fake in (
        ("forward", "Tensor x, Tensor[] values, Tensor[] places, int[] outs", _forward, _forward_fake),
        ("backward", "Tensor x, Tensor[] grads, Tensor[] values, Tensor[] places", _backward, _backward_fake),
    ):
        torch.library.define(f"sltrain::{name}", f"({arguments}, int block_size) -> Tensor[]")
        torch.library.impl(f"sltrain::{name}", "CPU", function)
        torch.library.register_fake(f"sltrain::{name}", fake)


_register()


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
            except CannotCompile as error:
                self._library, self.problem = None, str(error)
            except (OSError, ValueError, AssertionError, MemoryError) as error:  # no folder for temporary files, say
                self._library, self.problem = None, f"the kernel could not be made: {one_line(str(error))}"
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
        raise CannotCompile("switched off by SLTRAIN_CPU_KERNEL=off")
    library = load_cpp(SOURCE)
    if not library.sltrain_has_threads() and torch.get_num_threads() > 1:
        logger.warning("the CPU kernel runs on one thread: torch's OpenMP library has no GOMP_parallel")
    return library


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

    at_positions, in_blocks = S.flatten()[positions.long()], as_blocks(S)
    results = [
        *forward(x, [at_positions], [positions], [out_features]),
        *backward(x, [grad], [at_positions], [positions]),
        *forward(x, [in_blocks], [blocks], [out_features], block),
        *backward(x, [grad], [in_blocks], [blocks], block),
    ]
    expected = [y, grad_x, grad_S.flatten()[positions.long()], y, grad_x, as_blocks(grad_S)]
    for result, right in zip(results, expected, strict=True):
        if not torch.allclose(result, right, rtol=1e-4, atol=1e-4):
            raise CannotCompile("the compiled kernel gives wrong results on this machine")
