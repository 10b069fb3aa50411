"""support=topk support_from=RUN: S trains the positions at which a trained W differs most from a low-rank matrix.

    RUN's layer                         what is compared
    method=sltrain                      its S, which is W less its B A
    any other whose W is one matrix     W less the nearest matrix of the rank that the layer here has

Of the absolute entries of that difference the num_nonzero largest are taken (Han et al., arXiv 2406.02214, section 3.2,
compare such a support with a random one). Only positions come from RUN: values, A and B start as with any other
support, or from `init_from`. They are stored as those of support=uniform are, in checkpoints and exports too, so that
nothing but the start of a run reads RUN.
"""

import logging
import statistics
from dataclasses import dataclass

from torch import Tensor, nn

from sltrain.building.saved import Weights
from sltrain.building.start_from import Start, is_same, open_weights, share_out
from sltrain.config import TrainConfig
from sltrain.engine.distributed import Ranks
from sltrain.layers.base import ReplacedLinear
from sltrain.layers.factors import beyond_rank
from sltrain.layers.kinds.sltrain import SLTrainLinear
from sltrain.layers.parts import LowRankPart

logger = logging.getLogger(__name__)


@dataclass
class SupportSource:
    """A model whose weights say where S lies; they are still in their files."""

    name: str  # as typed
    saved: Weights

    def check(self, model: nn.Module, start: Start | None) -> None:
        """Raise ValueError unless each S of `model`, on the meta device, finds enough entries to choose from, and keeps
        what is chosen when the run begins with the weights of `start`."""
        if not (layers := _with_S(model)):
            raise ValueError("support=topk with sparsity=0 has no S to place; set sparsity above 0")
        for name, layer in layers.items():
            theirs = self.saved.model.get_submodule(name)
            if start is not None and is_same(layer, start.saved.model.get_submodule(name)):
                raise ValueError(
                    f"init_from={start.name} brings S with the positions that it has, so support_from={self.name} would"
                    " choose none; type support=uniform support_from=null to keep these, or drop init_from"
                )
            if reason := _against(theirs, layer):
                raise ValueError(f"support_from={self.name}: {name} {reason}")

    def choose(self, model: nn.Module, ranks: Ranks) -> None:
        """Give each S of a model with memory its positions, and log how much of the differences lies there."""

        def choose_one(name: str, layer: SLTrainLinear) -> float:
            return layer.choose_support(self._left(name, layer))

        shares = share_out(_with_S(model), ranks, choose_one)
        logger.info(
            f"support    topk of {self.name}: S lies on {100 * statistics.median(shares.values()):.1f} % of what the"
            " low-rank part leaves of its W (squares, median of the layers)"
        )

    def _left(self, name: str, layer: SLTrainLinear) -> Tensor:
        """What a low-rank matrix leaves of the trained W of a layer, (out, in)."""
        if isinstance(self.saved.model.get_submodule(name), SLTrainLinear):
            trained: Tensor = self.saved.read_layer(name, layer.values.dtype).parts()["S"].dense()
            return trained
        return beyond_rank(self.saved.dense_weight(name).to(layer.values.device), layer.rank)


def open_support_source(config: TrainConfig) -> SupportSource | None:
    """What `support_from` names; None if it is not set. Raises ValueError as `open_weights`."""
    name: str | None = getattr(config.method, "support_from", None)
    return None if name is None else SupportSource(name, open_weights(config, "support_from", name)[0])


def _with_S(model: nn.Module) -> dict[str, SLTrainLinear]:
    """The layers that have an S, by name."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SLTrainLinear)}
    return {name: layer for name, layer in layers.items() if layer.support.num_nonzero}


def _against(theirs: nn.Module, layer: SLTrainLinear) -> str | None:
    """Why positions for this layer cannot be chosen by that one, in words that follow its name; None: they can."""
    count = layer.support.num_nonzero
    if isinstance(theirs, SLTrainLinear) and theirs.support.num_nonzero < count:
        return f"trains {theirs.support.num_nonzero:,} entries of S there, {count:,} are wanted here; lower sparsity"
    if not isinstance(theirs, ReplacedLinear):
        return None
    if not theirs.is_mergeable:
        return f"is of kind {theirs.kind} there, which is not one matrix; name another run"
    parts = theirs.parts().values()
    if all(isinstance(part, LowRankPart) and part.rank <= layer.rank for part in parts) and len(parts) == 1:
        return f"has no more than rank {layer.rank} there, so nothing is left of it; name another run, or lower rank"
    return None
