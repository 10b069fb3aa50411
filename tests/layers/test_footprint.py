"""The footprint of a layer is what autograd saves and the profiler measures.

In float64, which no operation here casts and the CPU kernel does not take.
"""

import pytest
import torch
from torch import Tensor, nn
from toy_layers import ReLoRALinear, SilentLinear

from sltrain.engine.memory import tensor_peak
from sltrain.layers import CoLALinear, Footprint, LowRankLinear, Rows, SLTrainLinear
from sltrain.layers.aligned import AlignedLinear
from sltrain.layers.base import footprint as footprint_of
from sltrain.layers.kinds.dlr import DLRLinear
from sltrain.layers.kinds.gradnorm_lorp import GradNormLoRPLinear
from sltrain.layers.kinds.lost import LOSTLinear
from sltrain.layers.kinds.slope import SLoPeLinear
from sltrain.layers.kinds.sparse import SparseLinear
from sltrain.layers.kinds.sst import SpectralLinear
from sltrain.layers.kinds.structured_ffn import StructuredLinear
from sltrain.methods.sltrain import SUPPORTS
from sltrain.models.projections import project

RANK, IN, OUT = 16, 256, 384
KINDS = [
    "dense",
    "aligned",
    "low_rank",
    "cola",
    "dlr",
    "gradnorm_lorp",
    "lost",
    "relora",
    "sparse",
    "sst",
    "slope",
    "slope adapters",
    "structured low_rank",
    "structured block_dense",
    "structured block_shuffle",
    "guided block_shuffle",
    *(f"{kind} {path}" for kind in SUPPORTS for path in ("composed", "factored")),
]


def make(kind: str, out_features: int = OUT, dtype: torch.dtype = torch.float64) -> nn.Module:
    if kind in ("dense", "aligned"):
        return (nn.Linear if kind == "dense" else AlignedLinear)(IN, out_features, bias=False, dtype=dtype)
    if kind == "relora":
        return ReLoRALinear(IN, out_features, RANK, alpha=8, dtype=dtype)
    if kind == "cola":
        return CoLALinear(IN, out_features, RANK, dtype=dtype)
    if kind == "dlr":
        return DLRLinear(IN, out_features, RANK, activation="silu", dtype=dtype)
    if kind == "gradnorm_lorp":
        return GradNormLoRPLinear(IN, out_features, RANK, alpha=8, dtype=dtype)
    if kind == "lost":
        return LOSTLinear(IN, out_features, RANK, 0.1, activation="silu", dtype=dtype)
    if kind == "low_rank":
        return LowRankLinear(IN, out_features, RANK, alpha=8, dtype=dtype)
    if kind == "sparse":
        return SparseLinear(IN, out_features, 2, 4, dtype=dtype)
    if kind == "sst":
        return SpectralLinear(IN, out_features, RANK, dtype=dtype)
    if kind.startswith("slope"):
        return SLoPeLinear(IN, out_features, 2, 4, RANK, kind == "slope adapters", dtype=dtype)
    if kind.startswith(("structured", "guided")):
        how, structure = kind.split()
        return StructuredLinear(IN, out_features, structure, RANK, 4, how == "guided", dtype=dtype)
    support, path = kind.split()
    size = 16 if support == "block" else None
    return SLTrainLinear(IN, out_features, RANK, 0.1, alpha=8, dtype=dtype, support=support, block_size=size, path=path)


def footprint(layers: list[nn.Module], num_rows: int, has_kernel: bool) -> Footprint:
    element_size = next(layers[0].parameters()).element_size()
    return footprint_of(layers, Rows(num_rows, element_size, has_kernel))


def num_bytes(*layers: nn.Module) -> list[int]:
    """Bytes of the parameters that get a gradient."""
    return [sum(p.numel() * p.element_size() for p in layer.parameters() if p.requires_grad) for layer in layers]


def saved_besides(x: Tensor, layers: list[nn.Module]) -> int:
    """Bytes that the layers' outputs keep for backward, besides x and the layers' own tensors."""
    own = [t for layer in layers for t in [*layer.parameters(), *layer.buffers()]]
    known = {t.untyped_storage().data_ptr() for t in [x, *own]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = project(x, *layers)
    assert len(outputs) == len(layers)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def backward_temporaries(x: Tensor, layer: nn.Module) -> int:
    """Peak memory of backward, less the gradients of x and of the parameters."""
    y = layer(x)
    grad_y = torch.randn_like(y)
    device = torch.device("cpu")
    _, peak = tensor_peak(lambda: torch.autograd.backward(y, grad_y, retain_graph=True), 0, device)
    return peak - x.numel() * x.element_size() - sum(num_bytes(layer))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outs", [[OUT], [OUT, 128], [OUT, 128, 128]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kept_is_what_autograd_saves(kind: str, outs: list[int], dtype: torch.dtype) -> None:
    layers = [make(kind, out, dtype) for out in outs]
    x = torch.randn(64, IN, dtype=dtype, requires_grad=True)
    found = footprint(layers, 64, has_kernel=dtype == torch.float32)
    assert found.kept == saved_besides(x, layers)
    has_hidden = kind in ("low_rank", "cola", "relora", "sst", "slope adapters") or kind.endswith("factored")
    has_hidden |= kind.startswith(("structured", "guided"))
    has_hidden |= kind in ("dlr", "lost")
    assert (found.kept > 0) == has_hidden  # otherwise 0 == 0 would say nothing


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_one_call(kind: str) -> None:
    layers = [make(kind), make(kind, 128)]
    one, other = num_bytes(*layers)
    together = kind.endswith("factored")
    assert footprint(layers, 64, has_kernel=False).gradients == (one + other if together else one)
    assert footprint(layers[1:], 64, has_kernel=False).gradients == other


@pytest.mark.parametrize("num_rows", [64, 512])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("column factored", "slice factored")])
def test_temporaries_bound_what_backward_takes(kind: str, num_rows: int) -> None:
    """The measured peak is between two fifths of the footprint and a sixth above it."""
    layer = make(kind)
    x = torch.randn(num_rows, IN, dtype=torch.float64, requires_grad=True)
    said = footprint([layer], num_rows, has_kernel=False).temporary
    found = backward_temporaries(x, layer)
    assert said * 0.4 <= found <= said * 1.17 + 1000, (said, found)
    assert (said > 0) == (kind not in ("dense", "aligned"))


def test_column_temporaries_are_a_bound() -> None:
    """With few rows, other terms outweigh the columns that are gathered."""
    layer = make("column factored")
    for num_rows, share in ((64, 0.05), (2048, 0.5)):
        x = torch.randn(num_rows, IN, dtype=torch.float64, requires_grad=True)
        said = footprint([layer], num_rows, has_kernel=False).temporary
        assert said * share <= backward_temporaries(x, layer) <= said, num_rows


@pytest.mark.parametrize("kind", ["uniform factored", "low_rank", "cola", "dlr", "lost", "block factored"])
def test_rows_count_once_each(kind: str) -> None:
    """kept is N r e of each layer, from shapes alone."""
    with torch.device("meta"):
        layers = [make(kind, dtype=torch.bfloat16), make(kind, 128, torch.bfloat16)]
    for num_rows in (1, 7, 4096):
        assert footprint(layers, num_rows, has_kernel=False).kept == 2 * num_rows * RANK * 2


def test_mixed_layers_of_one_input() -> None:
    layers = [make("uniform factored"), make("low_rank"), make("dense"), make("stratified composed")]
    x = torch.randn(64, IN, dtype=torch.float64, requires_grad=True)
    found = footprint(layers, 64, has_kernel=False)
    assert found.kept == saved_besides(x, layers) == 2 * 64 * RANK * 8
    alone = [footprint([layer], 64, has_kernel=False) for layer in layers]
    assert found == Footprint(found.kept, max(part.temporary for part in alone), max(part.gradients for part in alone))


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="Bilinear: make it a ReplacedLinear"):
        footprint([nn.Bilinear(4, 4, 4)], 8, has_kernel=False)
    with pytest.raises(ValueError, match="Bilinear"):
        footprint([make("dense"), nn.Bilinear(4, 4, 4)], 8, has_kernel=True)
    with pytest.raises(ValueError, match="SilentLinear"):
        footprint([SilentLinear(4, 4)], 8, has_kernel=True)


def test_frozen_parameters_have_no_gradient() -> None:
    layer = make("uniform factored")
    (every,) = num_bytes(layer)
    layer.A.requires_grad_(False)
    assert footprint([layer], 8, has_kernel=False).gradients == every - layer.A.numel() * 8
    linear = make("dense").requires_grad_(False)
    assert footprint([linear], 8, has_kernel=False).gradients == 0
    (trained,) = num_bytes(make("relora"))
    assert trained == RANK * (IN + OUT) * 8 == footprint([make("relora")], 8, has_kernel=False).gradients


def test_a_path_that_is_not_chosen_counts_as_the_one_that_will_be() -> None:
    for rank, path in ((16, "factored"), (256, "composed")):
        layers = [SLTrainLinear(IN, OUT, rank, 0.03, 8, path=how) for how in ("auto", path)]
        ours, typed = (footprint([layer], 2048, has_kernel=True) for layer in layers)
        assert ours == typed and layers[0].path == "auto"
