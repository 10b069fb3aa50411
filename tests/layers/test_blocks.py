"""Products of block-diagonal factors against torch.block_diag, explicit permutations, and SVDs of the whole."""

import pytest
import torch

from sltrain.layers.blocks import STRUCTURES, Structure, StructuredPart, block_product

SIDES = [(24, 36), (36, 24), (24, 24)]  # (in, out)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(structure: Structure) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = structure.shapes
    return drawn(*a, seed=1), drawn(*b, seed=2)


def written_out(structure: Structure, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """W by matrices of zeros and ones."""
    num = structure.num_blocks
    left = torch.block_diag(*A.chunk(num))
    if structure.kind != "block_shuffle":
        return B @ left

    def deal(size: int) -> torch.Tensor:
        """Sends entry i to block i mod num, place i // num."""
        P = torch.zeros(size, size, dtype=torch.float64)
        for i in range(size):
            P[(i % num) * (size // num) + i // num, i] = 1
        return P

    return deal(structure.out_features).t() @ torch.block_diag(*B.chunk(num)) @ deal(structure.hidden) @ left


@pytest.mark.parametrize(("inner", "outer"), SIDES)
@pytest.mark.parametrize("kind", STRUCTURES)
@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_the_product_is_the_matrix_written_out(kind: str, blocks: int, inner: int, outer: int) -> None:
    structure = Structure(kind, inner, outer, 12, blocks)
    A, B = factors(structure)
    expected, x = written_out(structure, A, B), drawn(2, 5, inner, seed=3)
    torch.testing.assert_close(structure.apply(x, A, B), x @ expected.t())
    torch.testing.assert_close(structure.dense(A, B), expected)
    part = StructuredPart(structure, A, B, 0.5)
    torch.testing.assert_close(part.norm(), 0.5 * expected.float().norm())
    torch.testing.assert_close(part.dense(), 0.5 * expected)


def test_gradients_of_a_block_product_are_those_of_the_dense_matrix() -> None:
    x, blocks = drawn(2, 5, 12).requires_grad_(), drawn(9, 4, seed=1).requires_grad_()  # 3 blocks (3, 4)
    dense = torch.block_diag(*blocks.chunk(3))
    grad = drawn(2, 5, 9, seed=2)
    ours = torch.autograd.grad(block_product(x, blocks, 3), (x, blocks), grad)
    theirs = torch.autograd.grad(x @ dense.t(), (x, blocks), grad)
    torch.testing.assert_close(ours, theirs)


def test_under_autocast_gradients_have_the_dtype_of_their_tensors() -> None:
    x, blocks = (drawn(*shape).float().requires_grad_() for shape in ((5, 12), (9, 4)))
    with torch.autocast("cpu", torch.bfloat16):
        y = block_product(x, blocks, 3)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None and blocks.grad is not None
    assert x.grad.dtype == blocks.grad.dtype == torch.float32


@pytest.mark.parametrize(("inner", "outer"), SIDES)
def test_sizes_are_those_of_the_paper(inner: int, outer: int) -> None:
    """Numbers of parameters."""
    short = min(inner, outer)
    expected = {
        "low_rank": 12 * (inner + outer),
        "block_dense": 12 * inner // 4 + 12 * outer,
        "block_shuffle": short * inner // 4 + short * outer // 4,
    }
    for kind, number in expected.items():
        A, B = factors(Structure(kind, inner, outer, 12, 4))
        assert A.numel() + B.numel() == number, kind


@pytest.mark.parametrize(
    ("kind", "sides", "rank", "blocks", "message"),
    [
        ("dense", (24, 36), 12, 4, "structure is 'dense'; choose one of low_rank, block_dense, block_shuffle"),
        ("block_dense", (24, 36), 10, 4, "blocks=4 does not divide rank 10"),
        ("block_dense", (26, 36), 12, 4, "blocks=4 does not divide in_features 26"),
        ("block_shuffle", (24, 30), 12, 4, "blocks=4 does not divide out_features 30"),
        ("block_shuffle", (24, 36), 12, 0, "blocks=0 does not divide in_features 24"),
        ("low_rank", (24, 36), 25, 4, "rank must be between 1 and 24 for a 36 x 24 matrix, got 25"),
        ("low_rank", (24, 36), 0, 4, "rank must be between 1 and 24"),
    ],
)
def test_what_is_refused(kind: str, sides: tuple[int, int], rank: int, blocks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Structure(kind, *sides, rank, blocks)
