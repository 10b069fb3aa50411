"""Is an export the model it came from? Read back from its files, asked in two ways, one layer in memory at a time.

tensors   What was only copied or cast is equal, bit for bit. A merged W gives random rows x the same products as
          the trained layer computes them through A, B and S, up to the rounding of W. That sees a lost S or a wrong
          scale in any layer, also in bfloat16.
logits    In float32 arithmetic, of random ids. Where W was not rounded they are the trained model's, up to the
          order of summation. Rounded weights move them, how far depends on the model: it is said.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sltrain.api.saved import Saved, open_export
from sltrain.formats.weights import cast
from sltrain.layers.cost import set_paths
from sltrain.layers.linear import FactoredLinear

IDS_SHAPE = (2, 64)  # sequences and positions whose logits are compared
NUM_ROWS = 16  # of x
MAX_LOGIT_ERROR = 1e-5  # of float32 weights, over the largest logit, or over 1
# Norm of the difference of products over the norm of the products: two orders of summation; the most that rounding to
# the nearest of 8-bit mantissas changes a number.
MAX_PRODUCT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


def verify(saved: Saved, folder: Path, dtype: torch.dtype) -> str:
    """What was found about the export of `saved` in `folder`, whose weights are of `dtype`, in words. Raises
    AssertionError if it is another model, ValueError if the trained model gives no numbers."""
    exported = open_export(folder, lambda line: None)
    ids_shape = (IDS_SHAPE[0], min(IDS_SHAPE[1], saved.context))
    ids = torch.randint(saved.model.lm_head.out_features, ids_shape, generator=torch.Generator().manual_seed(0))
    trained = logits(saved, ids)
    if not trained.isfinite().all():
        raise ValueError(f"{saved.path}: the logits of step {saved.step} are not finite; export an earlier step")
    error = compare_tensors(saved, exported, dtype)
    found = logits(exported, ids)
    difference, largest = float((trained - found).abs().max()), float(trained.abs().max())
    num_same = int((trained.argmax(-1) == found.argmax(-1)).sum())
    said = (
        f"logits differ by {difference:.1e} (up to {largest:.1f}; {num_same} of {ids.numel()} next tokens are the same)"
    )
    if dtype != torch.float32 and (error is not None or saved.dtype != dtype):
        merged = "" if error is None else f"; W x by {error:.1e} of its norm, {MAX_PRODUCT_ERROR[dtype]:.1e} is allowed"
        return f"{said} as W is rounded{merged}"
    limit = MAX_LOGIT_ERROR * max(1.0, largest)
    if not difference <= limit:  # also where it is no number
        raise AssertionError(f"the exported model is another one: {said}; {limit:.1e} is allowed")
    return f"{said}; {limit:.1e} is allowed"


@torch.no_grad()
def compare_tensors(saved: Saved, exported: Saved, dtype: torch.dtype) -> float | None:
    """The largest error of a product with a merged W; None if there is none. Raises AssertionError for a tensor that is
    not the trained one."""
    names, errors = set(saved.files.names()), []
    for name in exported.files.names():
        found = exported.files.read(name)
        if name in names:
            if not torch.equal(found, cast(saved.files.read(name), dtype)):
                raise AssertionError(f"the exported {name} is another one")
            continue
        errors.append(product_error(saved.read_layer(name.removesuffix(".weight"), torch.float32), found))
        if not errors[-1] <= MAX_PRODUCT_ERROR[dtype]:
            raise AssertionError(f"the exported {name} is another one: W x differs by {errors[-1]:.1e} of its norm")
    return max(errors, default=None)


def product_error(layer: nn.Module, weight: Tensor) -> float:
    """|x W^T - layer(x)| / |layer(x)| for random rows x, in float32, layer(x) through A, B and S."""
    assert isinstance(layer, FactoredLinear)
    set_paths(layer, "factored", NUM_ROWS, torch.device("cpu"))
    x = torch.randn(NUM_ROWS, layer.in_features, generator=torch.Generator().manual_seed(1))
    y = layer(x)
    return float((x @ weight.float().t() - y).norm() / y.norm().clamp(min=1e-30))


@torch.no_grad()
def logits(saved: Saved, ids: Tensor) -> Tensor:
    """Logits (B, T, V) in float32, through A, B and S where there are any."""
    set_paths(saved.model, "factored", ids.numel(), torch.device("cpu"))
    with _one_part_at_a_time(saved):
        return saved.model(ids)


@contextmanager
def _one_part_at_a_time(saved: Saved) -> Iterator[None]:
    """While this lasts, each part of the model has its weights, in float32, only while it computes."""
    model = saved.model.model
    parts = [model.embed_tokens, *model.layers, model.norm, saved.model.lm_head]
    names = {module: name for name, module in saved.model.named_modules()}

    def load(part: nn.Module, inputs: Any) -> None:
        saved.files.fill(part, f"{names[part]}.", dtype=torch.float32)

    def drop(part: nn.Module, inputs: Any, output: Any) -> None:
        part.to("meta")

    hooks = [
        hook for part in parts for hook in (part.register_forward_pre_hook(load), part.register_forward_hook(drop))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
