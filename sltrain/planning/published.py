"""What the published SLTrain code stores and its paper counts, to compare a plan with.

the code            the positions of S as int64, 8 bytes an entry
the paper's count   (SLTrain, arXiv 2406.02214, table 2 and appendix F) bfloat16 parameters, the optimizer's state (of
                    Adam two bfloat16 moments for each trained value), int64 positions. No gradients, activations or
                    temporaries. Parameter counts are rounded to 0.01 million, then added.
"""

from decimal import ROUND_HALF_UP, Decimal

from torch import nn

from sltrain.planning.accounting import count_parameters, stored_bytes, trained_groups

BFLOAT16, INT64 = 2, 8  # bytes


def published_stored_bytes(model: nn.Module) -> dict[str, int]:
    """`stored_bytes` with the positions of S as the published SLTrain code stores them."""
    return {**stored_bytes(model), "indices": INT64 * count_parameters(model)["sparse"]}


def paper_groups(model: nn.Module, optimizer_state: int) -> dict[str, int]:
    """{"parameters", "indices", "optimizer_state"}: bytes of a model as the paper counts them, given those of the
    optimizer for bfloat16 weights."""
    counts = count_parameters(model)
    parameters = BFLOAT16 * (counts["total"] + counts.get("frozen", 0))
    return {"parameters": parameters, "indices": INT64 * counts["sparse"], "optimizer_state": optimizer_state}


def paper_millions(model: nn.Module) -> Decimal:
    """Parameters in millions as the paper prints them: groups rounded to 0.01, then added and rounded to 0.1."""
    counts = trained_groups(count_parameters(model))
    groups = [Decimal(number) / 1_000_000 for number in counts.values()]
    total = sum((group.quantize(Decimal("0.01"), ROUND_HALF_UP) for group in groups), Decimal(0))
    return total.quantize(Decimal("0.1"), ROUND_HALF_UP)
