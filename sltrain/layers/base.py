"""The interface of a layer that holds the matrix of an nn.Linear in another form.

    class ReLoRALinear(ReplacedLinear, kind="relora"):       # in layers/kinds/relora.py, or in another package
        GROUPS = {"A": "low_rank", "B": "low_rank"}
        def __init__(self, in_features, out_features, rank, alpha, bias=False, device=None, dtype=None): ...
        def forward(self, x): ...
        def reset_parameters(self, generator): ...
        def parts(self): return {"W0": DensePart(self.W0), "BA": LowRankPart(self.B, self.A, self.alpha / self.rank)}
        def settings(self): return {"rank": self.rank, "alpha": self.alpha}
        def footprint(self, rows): ...
        def multiply_adds(self): ...
        def set_weight(self, weight): ...                    # only to start from weights that were trained before
        CODE = "_relora_code.py"                             # only for transformers to open compressed exports

Counts, plans, exports, spectra, norms and benchmarks ask the layer and know no kind. The subclass is registered in
LAYERS under its kind, the name that a compressed export stores; `LAYERS.load(kind)` finds it.

A Footprint counts the bytes that layers need besides their parameters, for N rows of x, from shapes alone (so also on
the meta device). Temporaries are bounds of the largest terms: in a whole model they are a few per cent of the sum.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sltrain.layers.parts import DensePart, Part
from sltrain.registry import Registry

DRAWN_AT_ONCE = 2**22  # random numbers


@dataclass(frozen=True)
class Rows:
    """The x that a footprint is counted for."""

    num_rows: int
    element_size: int  # bytes; below that of the weights, each call casts them (mixed precision)
    has_kernel: bool  # whether products with S run through the CPU kernel


@dataclass(frozen=True)
class Footprint:
    """Bytes of the layers that are applied to one x."""

    kept: int  # from forward to backward, besides x itself, which layers of the same x keep once
    temporary: int  # at most at once inside forward or backward, besides x, y and their gradients
    gradients: int  # of the trained parameters, which one backward call returns together


class ReplacedLinear(nn.Module):
    """y = x W^T + bias for x (..., in_features) -> (..., out_features), for a W that is held in another form.

    A subclass calls `super().__init__` and sets `bias` to a parameter or None. It is ready after construction; on the
    meta device only shapes exist, and `reset_parameters` fills it after `to_empty(device=...)`.
    """

    kind: ClassVar[str]
    GROUPS: ClassVar[dict[str, str]] = {}  # tensor -> low_rank, sparse, indices, frozen, mask, ...; others are dense
    PATHS: ClassVar[tuple[str, ...]] = ()  # ways to compute x W^T that give the same function, if there are several
    CODE: ClassVar[str | None] = None  # a file beside this one that compressed exports bring, see formats/README.md

    # forward(x, previous) also gets what the same projection one decoder layer before gave (models/projections.py)
    takes_previous: ClassVar[bool] = False

    is_mergeable: bool = True  # False where W is not one matrix; then there are no parts and no dense weight
    starts: Mapping[str, float] = {}  # tensor -> standard deviation of a normal start instead of the kind's own
    path: str  # one of PATHS, or auto until the first forward chooses
    bias: nn.Parameter | None

    def __init_subclass__(cls, kind: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if kind is not None:
            assert cls.CODE is None or kind.isidentifier(), f"{kind}: its code could not be imported under this name"
            cls.kind = kind
            LAYERS.register(kind)(cls)

    def __init__(self, in_features: int, out_features: int, path: str = "auto") -> None:
        super().__init__()
        if path not in ("auto", *self.PATHS):
            raise ValueError(f"unknown path {path!r}: choose one of {', '.join(('auto', *self.PATHS))}")
        self.in_features, self.out_features, self.path = in_features, out_features, path

    # ---- what a kind defines; where it does not, asking raises ValueError

    def parts(self) -> dict[str, Part]:
        """The summands of W by name, such as W0, BA, S."""
        raise self._undefined("parts")

    def settings(self) -> dict[str, Any]:
        """Plain data that rebuilds the layer: LAYERS.load(kind)(in_features, out_features, bias=..., device=...,
        dtype=..., **settings)."""
        raise self._undefined("settings")

    def footprint(self, rows: Rows) -> Footprint:
        """The bytes of one call."""
        raise self._undefined("footprint")

    def multiply_adds(self) -> int:
        """Multiply-adds of x W^T for one row of x, by the method's mathematics, however it is computed."""
        raise self._undefined("multiply_adds")

    def _undefined(self, method: str) -> ValueError:
        return ValueError(f"{type(self).__name__} does not define {method}(), see sltrain/layers/base.py")

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter and buffer, from a CPU generator (None: torch's)."""
        raise self._undefined("reset_parameters")

    def choose_path(self, num_rows: int, device: torch.device) -> str:
        """The cheapest of PATHS, by shape, number of rows of x, dtype and device alone."""
        return self.PATHS[0] if self.PATHS else ""

    def set_weight(self, weight: Tensor) -> None:
        """Give the trained tensors values that bring W near a dense matrix (out, in). The positions of S stay as they
        were drawn; a mask may be chosen by the matrix. Raises ValueError for a kind that cannot."""
        raise ValueError(f"layers of kind {self.kind} cannot start from a dense matrix")

    def fit(self, weight: Tensor, moment: Tensor) -> None:
        """As `set_weight`, knowing the inputs x of the layer: `moment`, (in, in) float32 on the weight's device, is the
        mean of x^T x. Called in place of it where a method has `num_calibration_rows`."""
        self.set_weight(weight)

    @torch.no_grad()
    def copy_trained(self, read: Callable[[str], Tensor]) -> None:
        """Take the tensors, by name, of a layer of this kind with the same settings, which `init_from` continues from.
        An override leaves out what belongs to the run of that layer."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(read(name))

    def held_in_codes(self) -> dict[nn.Parameter, Any]:
        """Parameters that stand for values held as codes, with the CodedTensor (affine.py) that an update reads and
        writes. Such a parameter has no memory of its own (`is_stand_in`)."""
        return {}

    def warnings(self) -> dict[str, str]:
        """What a user should know before training: topic -> line. Of each topic a model shows the first layer's."""
        return {}

    @classmethod
    def forward_together(cls, x: Tensor, layers: "Sequence[Any]") -> list[Tensor]:
        """The output of each of these layers of this class for the same x. An override that computes them in one call
        skips their forward hooks."""
        return [layer(x) for layer in layers]

    @classmethod
    def footprint_together(cls, layers: "Sequence[Any]", rows: Rows) -> Footprint:
        """The bytes of `forward_together`."""
        return one_by_one([layer.footprint(rows) for layer in layers])

    # ---- what follows from it

    @classmethod
    def from_dense(
        cls, weight: Tensor, generator: torch.Generator | None = None, bias: Tensor | None = None, **settings: Any
    ) -> "ReplacedLinear":
        """A layer with these settings whose W is near a dense matrix (out, in), on its device and in its dtype; what it
        draws comes from `generator`. Raises ValueError for a kind that cannot."""
        if not cls.starts_from_dense():
            raise ValueError(f"layers of kind {cls.kind} cannot start from a dense matrix")
        out_features, in_features = weight.shape
        build: Any = cls  # whose settings differ from kind to kind
        with_bias = bias is not None
        layer = build(in_features, out_features, bias=with_bias, device="meta", dtype=weight.dtype, **settings)
        assert isinstance(layer, ReplacedLinear)
        layer.to_empty(device=weight.device)
        layer.reset_parameters(generator)
        layer.set_weight(weight)
        if bias is not None and layer.bias is not None:
            layer.bias.data.copy_(bias)
        return layer

    @classmethod
    def code_file(cls) -> Path | None:
        """The file called CODE, in the folder of the class that says so."""
        if cls.CODE is None:
            return None
        owner = next(base for base in cls.__mro__ if "CODE" in vars(base))
        return Path(inspect.getfile(owner)).with_name(cls.CODE)

    @classmethod
    def starts_from_dense(cls) -> bool:
        """Whether the kind defines `set_weight`."""
        return cls.set_weight is not ReplacedLinear.set_weight

    def dense_weight(self) -> Tensor:
        """W, (out, in), detached: the weight of an nn.Linear that computes the same. Raises ValueError if there is
        no such W."""
        self.check_mergeable()
        summands = [part.dense() for part in self.parts().values()]
        return sum(summands[1:], summands[0])

    def check_mergeable(self, where: str = "") -> None:
        """Raise ValueError for a layer that is not one matrix; the line begins with `where`."""
        if not self.is_mergeable:
            raise ValueError(f"{where}a layer of kind {self.kind} is not one matrix, so there is no one W")

    @property
    def num_trained(self) -> int:
        """The number of trained values that make up W: all but the bias."""
        return sum(p.numel() for name, p in self.named_parameters() if p.requires_grad and name != "bias")

    def chosen_path(self, x: Tensor) -> str:
        """The path for x. The first x fixes it, unless it is on the meta device."""
        if self.path != "auto":
            return self.path
        path = self.choose_path(x.numel() // self.in_features, x.device)
        if not x.is_meta:
            self.path = path
        return path

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {"in_features": self.in_features, "out_features": self.out_features}
        if type(self).settings is not ReplacedLinear.settings:
            shown |= {name: value for name, value in self.settings().items() if value is not None}
        shown |= {"bias": self.bias is not None, **({"path": self.path} if self.PATHS else {})}
        return ", ".join(f"{name}={value}" for name, value in shown.items())


LAYERS: Registry[ReplacedLinear] = Registry("layer", "sltrain.layers.kinds", "sltrain.layers")


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear with no other tensors than weight and bias."""
    return isinstance(module, nn.Linear) and module.state_dict().keys() <= {"weight", "bias"}


def check_known(name: str, module: nn.Module) -> None:
    """Raise ValueError for a module whose W is unknown: no plain nn.Linear, and no ReplacedLinear that defines it."""
    if is_plain_linear(module):
        return
    if not isinstance(module, ReplacedLinear):
        raise ValueError(
            f"{name} is a {type(module).__name__}: neither an nn.Linear nor a ReplacedLinear (sltrain/layers/base.py),"
            " so nothing is known of its W"
        )
    if module.is_mergeable and type(module).parts is ReplacedLinear.parts:
        raise ValueError(f"{name}: {module._undefined('parts')}")


def check_one_matrix(name: str, module: nn.Module) -> None:
    """Raise ValueError as `check_known`, and for a module that is not one matrix."""
    check_known(name, module)
    if isinstance(module, ReplacedLinear):
        module.check_mergeable(f"{name}: ")


def parts_of(name: str, module: nn.Module) -> dict[str, Part]:
    """The summands of a module's W; an nn.Linear has one, W. Raises ValueError as `check_one_matrix`."""
    check_one_matrix(name, module)
    if isinstance(module, ReplacedLinear):
        return module.parts()
    assert isinstance(module, nn.Linear)
    return {"W": DensePart(module.weight)}


def footprint(layers: Sequence[nn.Module], rows: Rows) -> Footprint:
    """The bytes of layers applied to the same x (num_rows, in). Raises ValueError for a module that is neither an
    nn.Linear nor a ReplacedLinear, and for a kind that defines no footprint."""
    kind = type(layers[0])
    if issubclass(kind, ReplacedLinear) and all(type(layer) is kind for layer in layers):
        return kind.footprint_together(layers, rows)
    alone = []
    for layer in layers:
        if isinstance(layer, ReplacedLinear):
            alone.append(layer.footprint(rows))
        elif is_plain_linear(layer):
            casts = cast_bytes([layer], rows)  # of W, and of its gradient
            kept = casts if type(layer) is nn.Linear else 0  # by F.linear's backward; not by aligned.py's
            alone.append(Footprint(kept, 2 * casts - kept, gradients=gradient_bytes(layer)))
        else:
            raise ValueError(f"cannot count the memory of a {type(layer).__name__}: make it a ReplacedLinear")
    return one_by_one(alone)


def one_by_one(footprints: Sequence[Footprint]) -> Footprint:
    """The bytes of layers that share nothing but x."""
    return Footprint(
        kept=sum(part.kept for part in footprints),
        temporary=max(part.temporary for part in footprints),
        gradients=max(part.gradients for part in footprints),
    )


def gradient_bytes(module: nn.Module) -> int:
    """Bytes of the gradients of its trained parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


def cast_bytes(layers: Sequence[nn.Module], rows: Rows) -> int:
    """Bytes of the copies of their trained values, or of the gradients of these, in the dtype of x; 0 if it is that of
    the values."""
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    return sum(p.numel() * rows.element_size for p in trained if p.element_size() > rows.element_size)


def fill_uniform(parameter: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Fill with numbers uniform in +-bound, drawn on the CPU in float32 and copied, so that a seed gives the same layer
    on every device and in every dtype. Drawn piece by piece: no second copy of the tensor exists."""
    for piece in parameter.detach().view(-1).split(DRAWN_AT_ONCE):
        drawn = torch.empty(len(piece), dtype=torch.float32, device="cpu")
        piece.copy_(drawn.uniform_(-bound, bound, generator=generator))


def fill_normal(parameter: Tensor, std: float, generator: torch.Generator | None) -> None:
    """As `fill_uniform`, with normal numbers of this standard deviation."""
    for piece in parameter.detach().view(-1).split(DRAWN_AT_ONCE):
        drawn = torch.empty(len(piece), dtype=torch.float32, device="cpu")
        piece.copy_(drawn.normal_(0, std, generator=generator))
