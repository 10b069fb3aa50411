"""The CPU kernel against the dense formula in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sltrain.kernels import cpu_kernel

kernel = pytest.mark.skipif("cpu_kernel.status() is not None", reason="no CPU kernel here")

SHAPES = [  # tokens, in, outs of a group, share of entries; one to three registers, tiles and threads, and odd rests
    (64, 32, [16], 0.1),
    (129, 37, [21], 0.2),
    (1, 1, [1], 1.0),
    (3, 3, [1, 3], 0.5),
    (200, 100, [70, 33, 5], 0.05),
    (77, 1376, [40], 0.03),
    (40, 16, [2736, 11], 0.03),
    (18, 130, [17], 1.0),
    (31, 12800, [3], 0.01),
    (0, 9, [4, 2], 0.3),
    (50, 20, [30, 7], 0.0),
]


class Problem:
    """x, gradients and several S, dense (float64) and as the kernel takes them. block=0: single entries."""

    def __init__(self, n: int, in_features: int, outs: list[int], density: float, block: int = 0, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        side = max(block, 1)
        self.block, self.outs = block, outs
        self.x = torch.randn(n, in_features, generator=generator)
        self.grads = [torch.randn(n, out, generator=generator) for out in outs]
        self.dense, self.masks, self.places = [], [], []
        for out in outs:
            chosen = torch.rand(-(-out // side), -(-in_features // side), generator=generator) < density
            mask = chosen.repeat_interleave(side, 0).repeat_interleave(side, 1)[:out, :in_features]
            self.dense.append(torch.randn(out, in_features, generator=generator) * mask)
            self.masks.append(mask)
            self.places.append(chosen.flatten().nonzero().flatten().int())
        self.values = [self.sparse(d, i) for i, d in enumerate(self.dense)]

    def sparse(self, dense: torch.Tensor, i: int) -> torch.Tensor:
        """The values of S_i: (nnz,), or (T, b, b) with zeros outside the matrix."""
        if not self.block:
            return dense[self.masks[i]]
        b, (out, in_features) = self.block, dense.shape
        padded = torch.nn.functional.pad(dense, (0, -in_features % b, 0, -out % b))
        grid = padded.view(padded.shape[0] // b, b, padded.shape[1] // b, b).transpose(1, 2)
        return grid.reshape(-1, b, b)[self.places[i].long()]

    def forward(self) -> list[torch.Tensor]:
        return cpu_kernel.forward(self.x, self.values, self.places, self.outs, self.block)

    def backward(self) -> list[torch.Tensor]:
        return cpu_kernel.backward(self.x, self.grads, self.values, self.places, self.block)

    def expected(self) -> list[torch.Tensor]:
        x = self.x.double()
        grads, dense = [g.double() for g in self.grads], [d.double() for d in self.dense]
        grad_x = sum((g @ d for g, d in zip(grads, dense, strict=True)), torch.zeros_like(x))
        grad_values = [self.sparse(g.t() @ x * self.masks[i], i) for i, g in enumerate(grads)]
        return [*(x @ d.t() for d in dense), grad_x, *grad_values]


@kernel
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("block", [0, 5, 16, 24])
@pytest.mark.parametrize(("n", "in_features", "outs", "density"), SHAPES)
def test_equals_the_dense_formula(n, in_features, outs, density, block, threads) -> None:
    problem = Problem(n, in_features, outs, density, block)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = problem.forward() + problem.backward()
    finally:
        torch.set_num_threads(before)
    for result, right in zip(results, problem.expected(), strict=True):
        torch.testing.assert_close(result.double(), right, rtol=1e-4, atol=1e-4)


@kernel
@pytest.mark.parametrize("block", [0, 16])
def test_writes_every_element_and_nothing_else(block, monkeypatch) -> None:
    """Results start as NaN between two rows of NaN: all of the inside is overwritten, nothing of the outside."""
    problem = Problem(67, 45, [39, 18], 0.0 if block else 0.02, block)
    guarded = []

    def poisoned(shape, **_: object) -> torch.Tensor:
        guarded.append(torch.full((shape[0] + 2, *shape[1:]), torch.nan))
        return guarded[-1][1:-1]

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda t, **_: poisoned(t.shape))
    results = problem.forward() + problem.backward()
    monkeypatch.undo()
    assert len(guarded) == len(results) == 5
    for around, result, right in zip(guarded, results, problem.expected(), strict=True):
        torch.testing.assert_close(result.double(), right, rtol=1e-4, atol=1e-4)
        assert around[0].isnan().all() and around[-1].isnan().all()


@kernel
@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_every_time(block, threads) -> None:
    problem = Problem(300, 80, [64, 33], 0.1, block)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, again = (problem.forward() + problem.backward() for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@kernel
@pytest.mark.parametrize("block", [0, 8])
def test_takes_views_and_short_integers(block) -> None:
    problem = Problem(20, 24, [16], 0.3, block)
    right = problem.forward() + problem.backward()
    problem.x = problem.x.t().contiguous().t()
    problem.grads = [g.repeat(1, 2)[:, :16] for g in problem.grads]
    problem.places = [place.short() for place in problem.places]
    assert all(torch.equal(a, b) for a, b in zip(problem.forward() + problem.backward(), right, strict=True))
    problem.grads = [torch.tensor(2.0).expand(20, 16)]  # the gradient of a sum
    torch.testing.assert_close(problem.backward()[0].double(), problem.expected()[1], rtol=1e-4, atol=1e-4)


@kernel
@pytest.mark.parametrize("block", [0, 4])
@pytest.mark.parametrize("wrong", [[3, 2], [-1, 2], [0, 400]])
def test_refuses_positions_that_would_reach_outside(block, wrong) -> None:
    problem = Problem(5, 20, [20], 0.0, block)
    problem.places = [torch.tensor(wrong, dtype=torch.int32)]
    problem.values = [torch.zeros(2, block, block) if block else torch.zeros(2)]
    with pytest.raises(AssertionError, match="sorted and inside"):
        problem.forward()
    with pytest.raises(AssertionError, match="sorted and inside"):
        problem.backward()


@kernel
def test_operations_are_registered_as_torch_asks() -> None:
    entries, blocks = Problem(6, 20, [9, 4], 0.3), Problem(6, 20, [9, 4], 0.3, 4)
    checks = ("test_schema", "test_faketensor")
    for p in (entries, blocks):
        ops = torch.ops.sltrain
        torch.library.opcheck(ops.forward, (p.x, p.values, p.places, p.outs, p.block), test_utils=checks)
        torch.library.opcheck(ops.backward, (p.x, p.grads, p.values, p.places, p.block), test_utils=checks)


@kernel
@pytest.mark.parametrize(("block", "backend"), [(0, "aot_eager"), (4, "inductor")])
def test_compiles_without_a_break(block, backend) -> None:
    problem = Problem(6, 20, [9, 4], 0.3, block)
    right = [2 * y for y in problem.forward()] + problem.backward()
    assert cpu_kernel.status() is None

    def products(x: torch.Tensor) -> list[torch.Tensor]:
        if cpu_kernel.status() is not None:
            return []
        problem.x = x
        return [2 * y for y in problem.forward()] + problem.backward()

    with torch.no_grad():
        results = torch.compile(products, backend=backend, fullgraph=True)(problem.x)
    torch.testing.assert_close(results, right)


CASES = [
    ("forward", 0, 64, 2**18, [16], 2_000_000, 2),
    ("backward", 0, 64, 4096, [4096], 5_000_000, 1),
    ("backward", 0, 130, 4096, [2048, 2048], 3_000_000, 2),
    ("forward", 16, 256, 4096, [4096], 20_000, 2),
    ("backward", 16, 256, 4096, [2048, 2048], 20_000, 2),
    ("backward", 24, 256, 4096, [4096], 20_000, 1),
]
MEASURE = """
import os, sys
import torch
from sltrain.kernels import cpu_kernel

def bytes_of(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

def measure(direction, block, n, in_features, outs, num, threads):
    torch.set_num_threads(threads)
    side = max(block, 1)
    x, grads = torch.ones(n, in_features), [torch.ones(n, out) for out in outs]
    cells = [-(-out // side) * -(-in_features // side) for out in outs]
    places = [torch.arange(num) * c // num for c in cells]  # int64, so that the call decodes them
    values = [torch.ones(num, block, block) if block else torch.ones(num) for _ in outs]
    function = getattr(cpu_kernel, direction)
    arguments = (x, values, places, outs) if direction == "forward" else (x, grads, values, places)
    before = bytes_of("VmRSS")
    results = function(*arguments, block)
    print(bytes_of("VmHWM") - before - sum(t.nbytes for t in results), flush=True)

torch.set_num_threads(1)  # no pool of threads exists before the children
assert cpu_kernel.status() is None
for case in eval(sys.argv[1]):
    if os.fork() == 0:
        measure(*case)
        os._exit(0)
    os.wait()
"""


@kernel
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured through /proc")
def test_a_call_takes_the_memory_that_is_announced() -> None:
    """Peak of a process of its own, where the scratch memory outweighs everything else."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, repr(CASES)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    for case, taken in zip(CASES, done.stdout.splitlines(), strict=True):
        direction, block, n, in_features, outs, num, threads = case
        announced = cpu_kernel.scratch_bytes(n, in_features, outs, [num] * len(outs), threads, direction, block)
        assert announced > 20e6
        assert int(taken) == pytest.approx(announced, rel=0.2), case


def test_scratch_memory_grows_with_what_needs_it() -> None:
    sizes = (2048, 4096, [4096, 4096], [500_000, 500_000])
    for block in (0, 16):
        forward, backward, threads = (
            cpu_kernel.scratch_bytes(*sizes, threads, direction, block)
            for threads, direction in ((1, "forward"), (1, "backward"), (2, "backward"))
        )
        assert forward < backward < threads
    assert cpu_kernel.scratch_bytes(2048, 4096, [4096], [0], 1, "forward") < 2**20


@kernel
def test_works_in_a_forked_child(in_child) -> None:
    """After the parent has used it, with one thread."""
    problem = Problem(70, 20, [9], 0.3)
    right = problem.forward()[0]

    def same() -> None:
        assert torch.equal(problem.forward()[0], right)

    assert os.waitpid(in_child(same), 0)[1] == 0
