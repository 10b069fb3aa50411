"""What other programs store for the same training, so that a plan can stand beside them.

published SLTrain   the positions of S as int64, 8 bytes an entry
GaLore              dense weights; for an out x in projection the moments of the projected gradient, max(out, in) r
                    numbers each, and the projection itself, min(out, in) r (Zhao et al., arXiv 2403.03507)

the paper's count   (SLTrain, arXiv 2406.02214, table 2 and appendix F) bfloat16 parameters, two bfloat16 moments for
                    each trained value, int64 positions. No gradients, activations or temporaries. It adds numbers
                    of parameters that were rounded to 0.01 million.
"""

from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal

from torch import nn

from sltrain.models.llama import is_projection
from sltrain.planning.accounting import count_parameters, stored_bytes, trained_groups

BFLOAT16, INT64 = 2, 8  # bytes


def published_stored_bytes(model: nn.Module) -> dict[str, int]:
    """`stored_bytes` with the positions of S as the published SLTrain code keeps them."""
    return {**stored_bytes(model), "indices": INT64 * count_parameters(model)["sparse"]}


def galore_state_bytes(dense_model: nn.Module, rank: int, state_bytes: Callable[[int, int], int]) -> int:
    """GaLore's optimizer state for a dense model; `state_bytes(numel, element_size)` is that of one tensor."""
    projected = {module.weight for name, module in dense_model.named_modules() if is_projection(name, module)}
    total = 0
    for parameter in {parameter for parameter in dense_model.parameters() if parameter.requires_grad}:
        size = parameter.element_size()
        if parameter in projected:
            shorter, longer = min(parameter.shape), max(parameter.shape)
            r = min(rank, shorter)
            total += state_bytes(longer * r, size) + shorter * r * size
        else:
            total += state_bytes(parameter.numel(), size)
    return total


def paper_groups(model: nn.Module, galore_rank: int | None = None) -> dict[str, int]:
    """{"parameters", "indices", "optimizer_state"}: bytes of a bfloat16 model as the paper counts them; of GaLore if a
    rank is given."""
    counts = count_parameters(model)

    is_bfloat16 = all(parameter.element_size() == BFLOAT16 for parameter in model.parameters())
    assert galore_rank is None or is_bfloat16, "the projections count in the model's own dtype"

    def moments(numel: int, element_size: int) -> int:
        return 2 * BFLOAT16 * numel

    trained = moments(counts["total"], BFLOAT16)
    return {
        "parameters": BFLOAT16 * (counts["total"] + counts.get("frozen", 0)),
        "indices": INT64 * counts["sparse"],
        "optimizer_state": trained if galore_rank is None else galore_state_bytes(model, galore_rank, moments),
    }


def paper_millions(model: nn.Module) -> Decimal:
    """Parameters in millions as the paper prints them: groups rounded to 0.01, then added and rounded to 0.1."""
    counts = trained_groups(count_parameters(model))
    groups = [Decimal(number) / 1_000_000 for number in counts.values()]
    total = sum((group.quantize(Decimal("0.01"), ROUND_HALF_UP) for group in groups), Decimal(0))
    return total.quantize(Decimal("0.1"), ROUND_HALF_UP)
