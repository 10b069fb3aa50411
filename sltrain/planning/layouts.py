"""Bytes that other programs store for the same training, to compare a plan with.

published SLTrain   the positions of S as int64, 8 bytes an entry
GaLore              dense weights; for an out x in projection the moments of the projected gradient, max(out, in) r
                    numbers each, and the projection itself, min(out, in) r (Zhao et al., arXiv 2403.03507)

the paper's count   (SLTrain, arXiv 2406.02214, table 2 and appendix F) bfloat16 parameters, two bfloat16 moments for
                    each trained value, int64 positions. No gradients, activations or temporaries. Parameter counts
                    are rounded to 0.01 million, then added.
"""

from collections.abc import Callable
from dataclasses import replace
from decimal import ROUND_HALF_UP, Decimal

from torch import nn

from sltrain.models.llama import is_projection
from sltrain.parameters import ParamInfo
from sltrain.planning.accounting import count_parameters, stored_bytes, trained_groups
from sltrain.planning.roles import parameters_of

BFLOAT16, INT64 = 2, 8  # bytes


def published_stored_bytes(model: nn.Module) -> dict[str, int]:
    """`stored_bytes` with the positions of S as the published SLTrain code stores them."""
    return {**stored_bytes(model), "indices": INT64 * count_parameters(model)["sparse"]}


def galore_state_bytes(dense_model: nn.Module, rank: int, state_bytes: Callable[[ParamInfo], int]) -> int:
    """Bytes of GaLore's optimizer state for a dense model; `state_bytes` is that of one tensor, such as a projected
    gradient."""
    projected = {f"{name}.weight" for name, module in dense_model.named_modules() if is_projection(name, module)}
    total = 0
    for name, info in parameters_of(dense_model).items():
        if name in projected:
            shorter, longer = sorted(info.shape)
            r = min(rank, shorter)
            info = replace(info, shape=(longer, r))
            total += shorter * r * info.element_size
        total += state_bytes(info)
    return total


def paper_groups(model: nn.Module, galore_rank: int | None = None) -> dict[str, int]:
    """{"parameters", "indices", "optimizer_state"}: bytes of a bfloat16 model as the paper counts them; of GaLore if a
    rank is given."""
    counts = count_parameters(model)
    state = 2 * BFLOAT16 * counts["total"]
    if galore_rank is not None:
        is_bfloat16 = all(parameter.element_size() == BFLOAT16 for parameter in model.parameters())
        assert is_bfloat16, "the projections count in the model's own dtype"
        state = galore_state_bytes(model, galore_rank, lambda info: 2 * BFLOAT16 * info.numel)
    parameters = BFLOAT16 * (counts["total"] + counts.get("frozen", 0))
    return {"parameters": parameters, "indices": INT64 * counts["sparse"], "optimizer_state": state}


def paper_millions(model: nn.Module) -> Decimal:
    """Parameters in millions as the paper prints them: groups rounded to 0.01, then added and rounded to 0.1."""
    counts = trained_groups(count_parameters(model))
    groups = [Decimal(number) / 1_000_000 for number in counts.values()]
    total = sum((group.quantize(Decimal("0.01"), ROUND_HALF_UP) for group in groups), Decimal(0))
    return total.quantize(Decimal("0.1"), ROUND_HALF_UP)
