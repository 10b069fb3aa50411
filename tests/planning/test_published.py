"""What the published code stores and the paper counts, against counts by hand and the numbers in the papers."""

from decimal import Decimal

import pytest
import torch
from torch import nn

from sltrain.config import ModelConfig
from sltrain.layers import LowRankLinear, SLTrainLinear
from sltrain.layers.convert import replace_linears
from sltrain.models.llama import LlamaForCausalLM, is_projection
from sltrain.optim.build import state_bytes
from sltrain.optim.kinds.adamw import AdamWOptions
from sltrain.optim.kinds.base import OptimizerConfig
from sltrain.optim.kinds.galore import GaLore
from sltrain.planning.accounting import count_parameters, stored_bytes
from sltrain.planning.published import paper_groups, paper_millions, published_stored_bytes
from sltrain.planning.roles import parameters_of

# hidden, feed-forward, layers, heads, rank; then GB: SLTrain (exactly, 3 decimals), GaLore and Full-Rank (arXiv
# 2406.02214, table 2, and arXiv 2403.03507, table 2, which rounds otherwise at 350M); millions of SLTrain
PAPER = {
    "60m": (512, 1376, 8, 8, 128, 0.267, 0.28, 0.35, "43.5"),
    "130m": (768, 2048, 12, 12, 256, 0.600, 0.61, 0.81, "96.6"),
    "350m": (1024, 2736, 24, 16, 256, 1.238, None, 2.21, "194.3"),
    "1b": (2048, 5461, 24, 32, 512, 4.163, 4.76, 8.04, "645.6"),
}


def dense_model(
    hidden: int, feed_forward: int, layers: int, heads: int, vocabulary: int = 32_000, kv_heads: int | None = None
) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(ModelConfig("test", hidden, feed_forward, layers, heads, kv_heads, vocabulary))


def state(model: LlamaForCausalLM, optimizer: OptimizerConfig) -> int:
    return state_bytes(optimizer, parameters_of(model).values())


ADAM = AdamWOptions(name="adamw")


def sltrain_model(rank: int, *shape: int, support: str = "uniform") -> LlamaForCausalLM:
    model = dense_model(*shape)
    replace_linears(
        model,
        is_projection,
        lambda name, linear: SLTrainLinear(
            linear.in_features, linear.out_features, rank, 0.03, alpha=8, device="meta", support=support
        ),
    )
    return model


# ---- the published SLTrain code


@pytest.mark.parametrize("support", ["uniform", "stratified", "block"])
def test_published_positions_are_eight_bytes_a_value(support: str) -> None:
    model = sltrain_model(4, 64, 96, 2, 2, 100, support=support)
    values = sum(p.numel() for name, p in model.named_parameters() if name.endswith(".values"))
    published, own = published_stored_bytes(model), stored_bytes(model)
    assert published["indices"] == 8 * values > own["indices"] > 0
    assert {**published, "indices": 0} == {**own, "indices": 0}


def test_published_layout_of_a_model_without_sparse_values() -> None:
    assert published_stored_bytes(nn.Linear(4, 10))["indices"] == 0
    assert published_stored_bytes(LowRankLinear(8, 4, rank=3, alpha=4))["low_rank_weights"] == 4 * 3 * (8 + 4)


# ---- as the paper counts


@pytest.mark.parametrize("size", PAPER)
def test_the_papers_numbers(size: str) -> None:
    *shape, rank, sltrain_gb, galore_gb, dense_gb, millions = PAPER[size]
    model, dense = sltrain_model(rank, *shape).bfloat16(), dense_model(*shape).bfloat16()
    assert round(sum(paper_groups(model, state(model, ADAM)).values()) / 1e9, 3) == sltrain_gb
    assert sum(paper_groups(dense, state(dense, ADAM)).values()) / 1e9 == pytest.approx(dense_gb, abs=0.006)
    if galore_gb is not None:
        galore = state(dense, GaLore(name="galore", rank=rank))
        assert round(sum(paper_groups(dense, galore).values()) / 1e9, 2) == galore_gb
    assert paper_millions(model) == Decimal(millions)


def test_the_papers_count_by_hand() -> None:
    """2 bytes a value whatever the model is in, 8 a position, and the state that is given; nothing else."""
    model = sltrain_model(4, 64, 96, 1, 2, 100).double()
    counts = count_parameters(model)
    expected = {"parameters": 2 * counts["total"], "indices": 8 * counts["sparse"], "optimizer_state": 5}
    assert paper_groups(model, 5) == expected and counts["sparse"] > 0


def test_galores_state_by_hand() -> None:
    """Hidden 8, feed-forward 12, vocabulary 10, rank 3, bfloat16: the state is that of optimizer=galore."""
    dense = dense_model(8, 12, 1, 2, 10).bfloat16()
    galore = paper_groups(dense, state(dense, GaLore(name="galore", rank=3)))
    others = 2 * (10 * 8) + 3 * 8  # embedding and head, norms
    assert galore["parameters"] == 2 * (4 * 64 + 3 * 96 + others) and galore["indices"] == 0
    moments, projections = 4 * (8 * 3) + 3 * (12 * 3), 4 * (8 * 3) + 3 * (8 * 3)
    counts_of_steps = 4 * 5  # of AdamW, for embedding, head and norms
    assert galore["optimizer_state"] == 4 * (moments + others) + 2 * projections + counts_of_steps


def test_millions_are_rounded_by_group_first() -> None:
    """0.046 and 0.046 million: 0.05 + 0.05 = 0.1, where their sum rounds to 0.1 too; 0.024 and 0.024 vanish."""

    class Groups(nn.Module):
        def __init__(self, dense: int, out: int, rank: int) -> None:
            super().__init__()
            self.dense = nn.Parameter(torch.empty(dense, device="meta"))
            self.low_rank = LowRankLinear(out, out, rank, alpha=1, device="meta")

    assert paper_millions(Groups(26_000, 250, 52)) == Decimal("0.1")  # 0.026 + 0.026 = 0.052: 0.03 + 0.03 = 0.06
    assert paper_millions(Groups(24_000, 240, 50)) == Decimal("0.0")  # 0.024 + 0.024 = 0.048: 0.02 + 0.02 = 0.04
    assert paper_millions(Groups(25_000, 250, 50)) == Decimal("0.1")  # halves go up: 0.03 + 0.03
    assert paper_millions(Groups(34_000, 340, 20)) == Decimal("0.0")  # 0.034 + 0.0136 = 0.0476: 0.03 + 0.01 = 0.04
    assert paper_millions(Groups(144_000, 480, 5)) == Decimal("0.1")  # 0.144 + 0.0048 = 0.1488: 0.14 + 0.00 = 0.14
    assert paper_millions(Groups(145_000, 500, 5)) == Decimal("0.2")  # 0.145 + 0.005 = 0.15: 0.15 + 0.01 = 0.16
