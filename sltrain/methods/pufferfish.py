"""Pufferfish: dense for the first part of a run, then factored by SVD and trained on (Wang, Agarwal, Papailiopoulos,
MLSys 2021, arXiv 2103.03936, algorithm 1); here with an S of what the factors leave over.

    the first updates      W is trained densely, as method=full would
    once, after them       (alpha / rank) B A <- U diag(s) V^T, the largest singular triplets of W, whose values B and A
                           share evenly; S <- the largest entries of W - (alpha / rank) B A, at their places
    then                   (alpha / rank) B A + S, as method=sltrain; the moments of B, A and S begin at zero

The learning rate goes on along its schedule. What this costs is the dense part: until then a run takes the memory of
method=full. sparsity=0 leaves S out, as the paper does. The paper keeps the first layers dense; rank_overrides gives
them a rank of their own here.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from sltrain.methods.base import METHODS, Ranked, check_above_zero, layers_of, resolve

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sltrain.engine.actions import Phase
    from sltrain.layers import SLTrainLinear


@METHODS.register("pufferfish")
@dataclass
class Pufferfish(Ranked):
    """Options of method=pufferfish."""

    alpha: float = MISSING  # the product is scaled by alpha / rank
    sparsity: float = MISSING  # fraction of the entries of S that are trained, the largest ones; 0: no S
    dense_share: float = 0.25  # of the updates, the first ones, that train W densely
    gain: float = 1.0  # standard deviation of the dense start over model.initializer_range
    sparsity_overrides: dict[str, float] = field(default_factory=dict)  # module-name pattern -> sparsity

    def check(self) -> None:
        super().check()
        check_above_zero(alpha=self.alpha, gain=self.gain)
        if not 0 < self.dense_share < 1:
            raise ValueError(
                f"method.dense_share={self.dense_share}: must be above 0 and below 1, a share of the updates;"
                " method=full is dense to the end, method=sltrain never"
            )
        for name, sparsity in {"sparsity": self.sparsity, **self.sparsity_overrides}.items():
            if not 0 <= sparsity < 1:
                raise ValueError(f"{name}={sparsity}: must be at least 0 and below 1, a fraction of the entries of W")

    def layer(self, name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
        from sltrain.layers.aligned import AlignedLinear

        self._factored(name, linear)  # raises for what it cannot have
        return AlignedLinear.of(linear, self.gain)

    def _factored(self, name: str, linear: "nn.Linear") -> "SLTrainLinear":
        """What takes the place of a dense layer, on the meta device."""
        from sltrain.layers import SLTrainLinear

        sparsity = resolve(self.sparsity, self.sparsity_overrides, name)
        sides, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
        like: dict[str, Any] = {"bias": has_bias, "device": "meta", "dtype": linear.weight.dtype}
        return SLTrainLinear(*sides, self.rank_of(name), sparsity, self.alpha, **like)

    def phases(self, max_steps: int) -> "list[Phase]":
        """The dense updates, at least one, are followed by at least one of the factors."""
        from sltrain.engine.actions import Phase
        from sltrain.layers import SLTrainLinear
        from sltrain.layers.aligned import AlignedLinear
        from sltrain.layers.convert import replace_linears

        dense: dict[str, nn.Linear] = {}  # until `start` has taken their values

        def change(model: "nn.Module") -> None:
            def factored(name: str, linear: "nn.Linear") -> "nn.Module":
                dense[name] = linear
                layer = self._factored(name, linear)
                return layer if linear.weight.is_meta else layer.to_empty(device=linear.weight.device)

            replace_linears(model, lambda name, linear: isinstance(linear, AlignedLinear), factored)

        def start(model: "nn.Module", generator: "torch.Generator") -> None:
            for name, layer in layers_of(model, SLTrainLinear).items():
                layer.reset_parameters(generator)
                layer.set_weight_and_support(dense[name].weight)
                if layer.bias is not None:
                    layer.bias.copy_(dense[name].bias)
            dense.clear()

        def temporary_bytes(model: "nn.Module") -> int:
            linears = layers_of(model, AlignedLinear)
            layers = [self._factored(name, linear) for name, linear in linears.items()]
            fresh = sum(tensor.nbytes for layer in layers for tensor in (*layer.parameters(), *layer.buffers()))
            return fresh + 20 * max((linear.weight.numel() for linear in linears.values()), default=0)  # of an SVD

        after = min(max(1, round(self.dense_share * max_steps)), max(1, max_steps - 1))
        return [Phase("factors", after, change, start, True, temporary_bytes)]
