"""Check that an export equals the trained model, from its files, by two tests that hold one layer in memory at a time.

tensors   What was only copied or cast is equal, bit for bit. A merged W gives random rows x the same products as
          the trained layer computes them from its own tensors, up to the rounding of W. That sees a lost part or a
          wrong scale in any layer, also in bfloat16.
logits    In float32 arithmetic, of random ids. They are the trained model's, up to the order of summation. Where the
          export rounds, they are those of the trained model whose tensors, merged as the export has them, are rounded
          in the same way: how far rounding moves the logits depends on the model, and is reported.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sltrain.building.saved import Saved, open_export
from sltrain.formats.weights import stored
from sltrain.layers import ReplacedLinear, merge_to_dense, set_paths
from sltrain.models.llama import TiedHead

IDS_SHAPE = (2, 64)  # sequences and positions whose logits are compared
NUM_ROWS = 16  # of x
MAX_LOGIT_ERROR = 1e-5  # of float32 weights, over the largest logit, or over 1
# Norm of the difference of products over the norm of the products: two orders of summation; the most that rounding to
# the nearest of 8-bit mantissas changes a number.
MAX_PRODUCT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


def verify(saved: Saved, folder: Path, dtype: torch.dtype) -> str:
    """What was found about the export of `saved` in `folder`, whose weights are of `dtype`, in words. Raises
    AssertionError if it is another model, ValueError if the trained model gives no numbers."""
    exported = open_export(folder)
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
        f"logits differ by {difference:.1e}, the largest is {largest:.1f}; {num_same} of {ids.numel()} next tokens are"
        " the same"
    )
    limit = MAX_LOGIT_ERROR * max(1.0, largest)
    if dtype != torch.float32 and (error is not None or saved.dtype != dtype):
        merged = "" if error is None else f"; W x by {error:.1e} of its norm, {MAX_PRODUCT_ERROR[dtype]:.1e} is allowed"
        is_merged = not any(isinstance(module, ReplacedLinear) for module in exported.model.modules())
        difference = float((rounded_logits(saved, ids, dtype, is_merged) - found).abs().max())
        said = f"{said}, as W is rounded{merged}; from the rounded trained model's by {difference:.1e}"
    if not difference <= limit:  # also where it is no number
        raise AssertionError(f"the exported model is another one: {said}; {limit:.1e} is allowed")
    return f"{said}; a difference of {limit:.1e} is allowed"


@torch.no_grad()
def compare_tensors(saved: Saved, exported: Saved, dtype: torch.dtype) -> float | None:
    """The largest error of a product with a merged W; None if there is none. Raises AssertionError for a tensor that is
    not the trained one."""
    names, errors = set(saved.files.names()), []
    for name in exported.files.names():
        found = exported.files.read(name)
        module, _, leaf = name.rpartition(".")
        is_layer = [isinstance(model.get_submodule(module), ReplacedLinear) for model in (saved.model, exported.model)]
        if leaf == "weight" and is_layer == [True, False]:
            errors.append(product_error(saved.read_layer(module, torch.float32), found))
            if not errors[-1] <= MAX_PRODUCT_ERROR[dtype]:
                raise AssertionError(f"the exported {name} is another one: W x differs by {errors[-1]:.1e} of its norm")
        elif name not in names or not torch.equal(found, stored(saved.files.read(name), dtype, saved.dtype)):
            raise AssertionError(f"the exported {name} is another one")
    return max(errors, default=None)


def product_error(layer: ReplacedLinear, weight: Tensor) -> float:
    """|x W^T - layer(x)| / |layer(x)| for random rows x, in float32, layer(x) without the bias and from the tensors
    that were trained."""
    set_paths(layer, "factored", NUM_ROWS, torch.device("cpu"))
    layer.bias = None
    x = torch.randn(NUM_ROWS, layer.in_features, generator=torch.Generator().manual_seed(1))
    y = layer(x)
    return float((x @ weight.float().t() - y).norm() / y.norm().clamp(min=1e-30))


def logits(saved: Saved, ids: Tensor) -> Tensor:
    """Logits (B, T, V) in float32, from the tensors that were trained."""
    return _logits(saved, deepcopy(saved.model), ids, lambda part: None)


def rounded_logits(saved: Saved, ids: Tensor, dtype: torch.dtype, merges: bool) -> Tensor:
    """As `logits`, with the tensors of an export in `dtype`: merged first if `merges`, in float32, then rounded."""

    def change(part: nn.Module) -> None:
        if merges:
            merge_to_dense(part)
        part.to(dtype).to(torch.float32)

    return _logits(saved, deepcopy(saved.model), ids, change)


@torch.no_grad()
def _logits(saved: Saved, model: Any, ids: Tensor, change: Callable[[nn.Module], None]) -> Tensor:
    model.model.compute_dtype = None
    set_paths(model, "factored", ids.numel(), torch.device("cpu"))
    with _one_part_at_a_time(saved, model, change):
        return model(ids)


@contextmanager
def _one_part_at_a_time(saved: Saved, model: Any, change: Callable[[nn.Module], None]) -> Iterator[None]:
    """Inside this context each part of `model`, a copy of the saved one, loads its float32 weights before its forward,
    applies `change` to them, and frees them afterwards."""
    parts = [model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head]
    names = {module: name for name, module in model.named_modules()}

    def load(part: nn.Module, inputs: Any) -> None:
        part = _owner(part)
        saved.files.fill(part, f"{names[part]}.", dtype=torch.float32)
        change(part)

    def drop(part: nn.Module, inputs: Any, output: Any) -> None:
        _owner(part).to("meta")

    hooks = [
        hook for part in parts for hook in (part.register_forward_pre_hook(load), part.register_forward_hook(drop))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _owner(part: nn.Module) -> nn.Module:
    """The module that has the tensors of a part: of a tied head, the embedding."""
    return part.embedding if isinstance(part, TiedHead) else part
