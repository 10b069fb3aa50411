"""Products with an unstructured or block S on CPUs, float32, in C++ that is compiled on first use.

    y = x S^T,   dx = dy S,   dvalues = (dy^T x) at the trained positions;   x (N, in), S (out, in) with nnz entries

torch's own sparse products take longer than the dense product at 3 % entries, because every entry touches a few floats
of x and y in main memory. Here 64 rows of x (tokens) are transposed into cache, so that an entry reads 64 neighbouring
floats: one row of S times the tile stays in registers (forward), one column of S times the tile of dy gives its column
of dx and all its dvalues in one pass (backward). Blocks multiply tiles packed by block column, as a small dense
product. Several S that are applied to the same x share its tile.

The C++ is cpu_kernel.cpp, compiled and cached by compile_cpp.py. Before first use it must reproduce a small product
computed by torch. If any of this fails, `status` returns the reason and callers use plain torch;
SLTRAIN_CPU_KERNEL=off requests that.

The threads are torch's (torch.set_num_threads): the C++ calls the OpenMP library that torch has loaded. Results are the
same bit for bit for the same number of threads. As with torch itself, a forked child must use one thread if its parent
used more.
"""

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sltrain.kernels.compile_cpp import CannotCompile, load_cpp, one_line

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
INT32_MAX = 2**31 - 1

logger = logging.getLogger(__name__)
_library: ctypes.CDLL | None = None  # while it is checked, and from then on


def status() -> str | None:
    """None when the kernel can be used, else the reason in one line. The first call builds it (seconds, once a machine)
    or loads it from the cache."""
    return _prepare()


# torch.compile treats the answer as a constant instead of tracing how the kernel is built. This is
# torch.compiler.assume_constant_result, without importing the compiler, which takes a second.
status._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forward(
    x: Tensor, values: list[Tensor], places: list[Tensor], outs: list[int], block_size: int = 0
) -> list[Tensor]:
    """x S^T (N, out), new tensors, for each S: its number of rows in `outs`, and

    block_size 0    values (nnz,) and places (nnz,): positions flat in row-major order, sorted
    block_size b    values (T, b, b) and places (T,): block row * ceil(in / b) + block column, sorted; what overhangs
                    the matrix is not read

    x (N, in) and values are float32, places int32.
    """
    return torch.ops.sltrain.forward.default(x, values, places, outs, block_size)


def backward(
    x: Tensor, grads: list[Tensor], values: list[Tensor], places: list[Tensor], block_size: int = 0
) -> list[Tensor]:
    """As `forward`, with a gradient (N, out) for each S -> [sum of grad S (N, in), then the gradient of each S's
    values]; 0 for what overhangs the matrix."""
    return torch.ops.sltrain.backward.default(x, grads, values, places, block_size)


def scratch_bytes(
    num_rows: int, in_features: int, outs: list[int], nums: list[int], threads: int, direction: str, block_size: int = 0
) -> int:
    """Bytes that one call needs besides its arguments and results. `outs` are the rows of each S, `nums` its entries
    (block_size 0) or blocks; `direction` is forward or backward.

    entries    flat int32 places, decoded for the call; a tile of x, or of the gradients, a thread. Backward also a copy
               of S ordered by column (12 bytes an entry), and the sums of dvalues: one a thread, and one in that order
    blocks     a copy of S padded to the registers; tiles; backward also a sum of dvalues a thread

    All is freed after the call but the tiles, which each thread keeps for the next one.
    """
    assert direction in ("forward", "backward")
    backward, total = direction == "backward", sum(nums)
    if block_size:
        wide, across = -(-block_size // 16) * 16, -(-in_features // block_size)
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
    """The number of threads that get work."""
    return max(1, min(threads, -(-num_rows // tile_rows)))


# The operations as torch sees them, with fakes for torch.compile, which needs the shapes of results only.


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
    """The arguments that all four C++ functions start with, checked, and kept alive while they run."""

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
        if _library is None and status() is not None:
            raise RuntimeError(f"the CPU kernel cannot be used: {status()}")
        code = getattr(_library, f"sltrain_{'block' if self.block_size else 'sparse'}_{direction}")(
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


for _name, _arguments, _function, _fake in (
    ("forward", "Tensor x, Tensor[] values, Tensor[] places, int[] outs", _forward, _forward_fake),
    ("backward", "Tensor x, Tensor[] grads, Tensor[] values, Tensor[] places", _backward, _backward_fake),
):
    torch.library.define(f"sltrain::{_name}", f"({_arguments}, int block_size) -> Tensor[]")
    torch.library.impl(f"sltrain::{_name}", "CPU", _function)
    torch.library.register_fake(f"sltrain::{_name}", _fake)


@functools.cache
def _prepare() -> str | None:
    """Load the library; return why there is none."""
    global _library
    if os.environ.get("SLTRAIN_CPU_KERNEL", "").lower() == "off":
        return "switched off by SLTRAIN_CPU_KERNEL=off"
    try:
        _library = load_cpp(SOURCE)
        if not _library.sltrain_has_threads() and torch.get_num_threads() > 1:
            logger.warning("the CPU kernel runs on one thread: torch's OpenMP library has no GOMP_parallel")
        _check()
        return None
    except CannotCompile as error:
        problem = str(error)
    except (OSError, ValueError, AssertionError, MemoryError) as error:  # such as no folder for temporary files
        problem = f"the kernel could not be built: {one_line(str(error))}"
    _library = None
    return problem


def _check() -> None:
    """Raise CannotCompile for a miscompiled kernel, before it trains anything."""
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
