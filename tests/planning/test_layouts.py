"""What other programs store, against counts made by hand from shapes and the numbers in the papers."""

from decimal import Decimal

import pytest
import torch
from torch import nn

from sltrain.config import ModelConfig
from sltrain.layers import LowRankLinear, SLTrainLinear
from sltrain.layers.convert import replace_linears
from sltrain.models.llama import LlamaForCausalLM, is_projection
from sltrain.parameters import ParamInfo
from sltrain.planning.accounting import count_parameters, stored_bytes
from sltrain.planning.layouts import galore_state_bytes, paper_groups, paper_millions, published_stored_bytes

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


# ---- GaLore


def test_galore_state_by_hand() -> None:
    """Hidden 8, feed-forward 12, vocabulary 10, one key/value head of two: rank 3, then one above every side."""
    model = dense_model(8, 12, 1, 2, vocabulary=10, kv_heads=1)
    # (moments of the projected gradient, projection) of q, o: 8 x 8; k, v: 4 x 8; gate, up: 12 x 8; down: 8 x 12
    moments = 2 * (8 * 3) + 2 * (8 * 3) + 3 * (12 * 3)
    projections = 2 * (8 * 3) + 2 * (4 * 3) + 3 * (8 * 3)
    others = 2 * (10 * 8) + 3 * 8  # embedding, head, norms

    def two_in_float32(info: ParamInfo) -> int:
        assert info.element_size == 4
        return 2 * 4 * info.numel

    assert galore_state_bytes(model, 3, two_in_float32) == 2 * 4 * (moments + others) + 4 * projections
    full_moments = 2 * (8 * 8) + 2 * (8 * 4) + 3 * (12 * 8)  # no rank is above min(out, in)
    full_projections = 2 * (8 * 8) + 2 * (4 * 4) + 3 * (8 * 8)
    expected = 2 * 4 * (full_moments + others) + 4 * full_projections
    assert galore_state_bytes(model, 1000, two_in_float32) == galore_state_bytes(model, 8, two_in_float32) == expected


def test_galore_asks_for_each_tensor_by_itself() -> None:
    """A state whose size is no multiple of the number of values: one byte a tensor, and none for small ones."""
    model = dense_model(8, 12, 2, 2, vocabulary=10).bfloat16()
    asked: list[ParamInfo] = []

    def state(info: ParamInfo) -> int:
        asked.append(info)
        return 1

    assert galore_state_bytes(model, 2, state) == len(asked) + 2 * (2 * 7 * (8 * 2))  # projections in bfloat16
    assert sorted(info.numel for info in asked) == sorted(
        2 * [16, 16, 16, 16, 24, 24, 24] + 2 * [80] + 5 * [8]  # q k v o gate up down; embedding, head; norms
    )
    assert {info.element_size for info in asked} == {2}
    assert {info.shape for info in asked if info.role == "projection"} == {(8, 2), (12, 2)}


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
    model, dense = sltrain_model(rank, *shape), dense_model(*shape).bfloat16()
    assert round(sum(paper_groups(model).values()) / 1e9, 3) == sltrain_gb
    assert sum(paper_groups(dense).values()) / 1e9 == pytest.approx(dense_gb, abs=0.006)
    if galore_gb is not None:
        assert round(sum(paper_groups(dense, rank).values()) / 1e9, 2) == galore_gb
    assert paper_millions(model) == Decimal(millions)


def test_the_papers_count_by_hand() -> None:
    """bfloat16 whatever the model is in; 2 moments a value, 8 bytes a position; nothing else."""
    model = sltrain_model(4, 64, 96, 1, 2, 100).double()
    counts = count_parameters(model)
    expected = {
        "parameters": 2 * counts["total"],
        "indices": 8 * counts["sparse"],
        "optimizer_state": 4 * counts["total"],
    }
    assert paper_groups(model) == expected and counts["sparse"] > 0
    dense = dense_model(8, 12, 1, 2, 10).bfloat16()
    galore = paper_groups(dense, 3)
    others = 2 * (10 * 8) + 3 * 8
    assert galore["parameters"] == 2 * (4 * 64 + 3 * 96 + others)
    moments, projections = 4 * (8 * 3) + 3 * (12 * 3), 4 * (8 * 3) + 3 * (8 * 3)
    assert galore["optimizer_state"] == 4 * (moments + others) + 2 * projections
    assert galore["indices"] == 0


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
