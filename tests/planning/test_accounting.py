"""Parameter counts: the paper's, exactly on small models, and without allocating anything."""

import pytest
import torch
from torch import nn
from toy_layers import Adapted, ReLoRALinear, SilentLinear

from sltrain.config import ModelConfig
from sltrain.layers import LowRankLinear, SLTrainLinear
from sltrain.layers.convert import replace_linears
from sltrain.models.llama import LlamaForCausalLM, is_projection
from sltrain.planning.accounting import count_parameters, stored_bytes, sum_of_groups

# arXiv 2406.02214, table 2 and appendix F: hidden, feed-forward, layers, heads, rank, sparsity; then the published
# millions (rounded before they were added, so a total may be 0.06 off): total, base, low-rank, sparse
PAPER = {
    "60m": (512, 1376, 8, 8, 128, 0.03, 43.5, 32.78, 9.99, 0.76),
    "130m": (768, 2048, 12, 12, 256, 0.03, 96.6, 49.17, 44.83, 2.55),
    "350m": (1024, 2736, 24, 16, 256, 0.03, 194.3, 65.59, 119.64, 9.07),
    "1b": (2048, 5461, 24, 32, 512, 0.03, 645.6, 131.17, 478.14, 36.24),
    "7b": (4096, 11008, 32, 32, 1024, 0.05, 3144.7, 262.4, 2558.5, 323.8),
}


@pytest.mark.parametrize("size", PAPER)
def test_counts_are_the_papers(size):
    hidden, feed_forward, layers, heads, rank, sparsity, *millions = PAPER[size]
    with torch.device("meta"):
        model = LlamaForCausalLM(ModelConfig(size, hidden, feed_forward, layers, heads, vocab_size=32_000))
    replaced = replace_linears(
        model,
        is_projection,
        lambda name, linear: SLTrainLinear(
            linear.in_features, linear.out_features, rank, sparsity, alpha=8, device=linear.weight.device
        ),
    )
    counts = count_parameters(model)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]), "filling 7B would take minutes"
    assert len(replaced) == 7 * layers
    found = [counts[group] / 1e6 for group in ("total", "dense", "low_rank", "sparse")]
    assert found[0] == pytest.approx(millions[0], abs=0.06)
    assert found == pytest.approx(millions, rel=2e-3)
    # 2 bytes a trained value, and a row start of 4 bytes for each row and one more
    rows = layers * (3 * hidden + 2 * feed_forward + 2 * hidden + 7)
    assert stored_bytes(model)["indices"] == 2 * counts["sparse"] + 4 * rows


def test_groups_are_counted_exactly():
    model = nn.Sequential(
        nn.Embedding(10, 6),
        SLTrainLinear(6, 8, rank=2, sparsity=0.5, alpha=4, bias=True),
        LowRankLinear(8, 4, rank=3, alpha=4),
        nn.Linear(4, 10),
    )
    low_rank, sparse, dense = 2 * (6 + 8) + 3 * (8 + 4), 24, 60 + 8 + 50
    expected = {"total": low_rank + sparse + dense, "dense": dense, "low_rank": low_rank, "sparse": sparse}
    assert count_parameters(model) == expected
    stored = {"dense_weights": 4 * dense, "low_rank_weights": 4 * low_rank, "sparse_values": 4 * sparse}
    assert stored_bytes(model) == {**stored, "indices": 2 * sparse + 4 * (8 + 1)}


def test_shared_modules_count_once():
    layer = SLTrainLinear(6, 6, rank=2, sparsity=0.5, alpha=4)
    tied = nn.Linear(6, 10, bias=False)
    embedding = nn.Embedding(10, 6)
    tied.weight = embedding.weight
    counts = count_parameters(nn.Sequential(embedding, layer, layer, tied))
    assert counts == {"total": 60 + 24 + 18, "dense": 60, "low_rank": 24, "sparse": 18}


def test_a_dense_model_has_only_dense_parameters():
    model = nn.Linear(4, 10)
    assert count_parameters(model) == {"total": 50, "dense": 50, "low_rank": 0, "sparse": 0}
    assert stored_bytes(model)["indices"] == 0


def test_frozen_parameters_are_stored_but_not_trained() -> None:
    model = nn.Sequential(nn.Embedding(10, 6), ReLoRALinear(6, 8, rank=2, alpha=4, bias=True), nn.Linear(8, 10))
    model[2].weight.requires_grad_(False)
    counts = count_parameters(model)
    assert counts == {"total": 60 + 28 + 8 + 10, "dense": 60 + 8 + 10, "low_rank": 28, "sparse": 0, "frozen": 48 + 80}
    assert sum_of_groups(counts, str) == "78 dense + 28 low-rank, and 128 frozen"
    stored = stored_bytes(model)
    assert stored.pop("frozen_weights") == 4 * 128
    assert stored == {"dense_weights": 4 * 78, "low_rank_weights": 4 * 28, "sparse_values": 0, "indices": 0}
    model[1].weight.requires_grad_(True)  # then it is trained, whatever its layer calls it
    assert count_parameters(model)["dense"] == 78 + 48 and count_parameters(model)["frozen"] == 80


def test_a_buffer_has_the_group_that_its_layer_names() -> None:
    class Masked(ReLoRALinear, kind="toy_masked"):
        GROUPS = ReLoRALinear.GROUPS | {"mask": "mask"}

        def __init__(self) -> None:
            super().__init__(6, 8, rank=2, alpha=4)
            self.register_buffer("mask", torch.ones(48, dtype=torch.uint8))

    stored = stored_bytes(Masked())
    assert (stored["mask_weights"], stored["frozen_weights"]) == (48, 4 * 48)
    assert sum(stored.values()) == 48 + 4 * (48 + 28)


@pytest.mark.parametrize(
    "module", [nn.Bilinear(4, 4, 4), SilentLinear(4, 4), Adapted(4, 4)], ids=lambda m: type(m).__name__
)
def test_an_unknown_layer_in_a_projections_place_is_not_counted(module: nn.Module) -> None:
    model = nn.ModuleDict({"attention": nn.ModuleDict({"q_proj": module})})
    for count in (count_parameters, stored_bytes):
        with pytest.raises(ValueError, match=f"attention.q_proj.*{type(module).__name__}"):
            count(model)
