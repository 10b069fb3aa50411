"""SparseGPT's sweep against the surgeon's formula, one column at a time, and what it keeps."""

import numpy as np
import pytest
import torch
from surgeon import pruned

from sltrain.layers.kinds.sparse import SparseLinear
from sltrain.layers.masked import keep_largest, unpack
from sltrain.layers.sparsegpt import prune

CASES = [(2, 4, 24), (2, 4, 22), (3, 7, 24), (1, 1, 24), (9, 24, 24), (1, 24, 24), (24, 24, 24)]  # keep, of, in


def example(size: int, out: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and the moment of correlated inputs of different size, float64."""
    source = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=source)  # noqa: E731
    inputs = (normal(200, 8) @ normal(8, size) + 0.3 * normal(200, size)) * normal(size).exp()
    return normal(out, size), inputs.t() @ inputs / len(inputs)


@pytest.mark.parametrize("block", [5, 8, 128])
@pytest.mark.parametrize(("keep", "of", "size"), CASES)
def test_it_is_the_surgeon_one_column_at_a_time(keep: int, of: int, size: int, block: int) -> None:
    weight, moment = example(size)
    found, mask = prune(weight, moment, keep, of, block)
    wanted, kept = pruned(weight.numpy(), moment.numpy(), keep, of, block)
    assert np.array_equal(mask.numpy(), kept)
    np.testing.assert_allclose((found * mask).numpy(), wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("keep", "of", "size"), CASES)
def test_the_layer_keeps_exactly_so_many(keep: int, of: int, size: int) -> None:
    weight, moment = example(size)
    layer = SparseLinear(size, len(weight), keep, of, prune="sparsegpt")
    layer.fit(weight.float(), moment.float())
    mask = unpack(layer.mask, size)
    for group in mask.split(of, dim=1):
        assert group.sum(1).unique().tolist() == [min(keep, group.shape[1])]
    wanted, kept = pruned(weight.numpy(), moment.numpy(), keep, of, size // 16)
    assert (mask.numpy() != kept).mean() < 0.01
    if np.array_equal(mask.numpy(), kept):
        np.testing.assert_allclose(layer.dense_weight().numpy(), wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("keep", "of"), [(12, 24), (7, 24), (2, 4)])
def test_products_change_far_less_than_by_magnitude(keep: int, of: int) -> None:
    weight, moment = example(24)

    def error(near: torch.Tensor) -> float:
        """E |(W - W') x|^2 over E |W x|^2, whose x have this moment."""
        left = weight - near
        return float((left @ moment @ left.t()).trace() / (weight @ moment @ weight.t()).trace())

    found, mask = prune(weight, moment, keep, of)
    assert error(found * mask) < 0.3 * error(weight * keep_largest(weight.abs(), keep, of))


@pytest.mark.parametrize("moment", [torch.eye(24), 5.0 * torch.eye(24), torch.zeros(24, 24)], ids=["1", "5", "0"])
def test_for_inputs_of_one_size_without_correlations_it_is_magnitude(moment: torch.Tensor) -> None:
    weight, _ = example(24)
    layers = [SparseLinear(24, 10, 2, 4, prune=prune, dtype=torch.float64) for prune in ("sparsegpt", "magnitude")]
    layers[0].fit(weight, moment.double())
    layers[1].fit(weight, example(24)[1])
    assert all(torch.equal(*pair) for pair in zip(layers[0].buffers(), layers[1].buffers(), strict=True))
    torch.testing.assert_close(layers[0].dense_weight(), layers[1].dense_weight())


def test_a_moment_that_is_no_number_is_refused() -> None:
    weight, moment = example(24)
    moment[3, 3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        prune(weight, moment, 2, 4)
