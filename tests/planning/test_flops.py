"""The arithmetic of a token is what torch counts, and a peak is that of a whole, known card."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toy_layers import SilentLinear

from sltrain.config import ModelConfig
from sltrain.layers import SLTrainLinear
from sltrain.layers.convert import replace_linears
from sltrain.models.llama import LlamaForCausalLM, is_projection
from sltrain.planning import flops
from sltrain.planning.flops import Utilisation, flops_per_token, peak_tflops

HIDDEN, LAYERS, VOCABULARY, TOKENS = 32, 2, 64, 16


def build(**changes: Any) -> LlamaForCausalLM:
    model = LlamaForCausalLM(ModelConfig("tiny", HIDDEN, 48, LAYERS, 2, vocab_size=VOCABULARY, **changes))
    model.init_weights(0)
    return model


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}])
def test_a_dense_model_counts_what_torch_counts(changes: dict[str, Any]) -> None:
    """Of attention torch counts two products of the whole square forward, and four backward beside scores computed
    again; so it is told apart, and counted here term by term."""
    model, ids = build(**changes), torch.randint(VOCABULARY, (3, TOKENS))
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    by_op = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for op, count in by_op.items() if "attention" not in op)
    forward = sum(2 * 2 * HIDDEN * seen for seen in range(1, TOKENS + 1))  # scores, values; of position seen - 1
    assert 3 * TOKENS * flops_per_token(model, TOKENS) == products + 3 * 3 * LAYERS * forward


@pytest.mark.parametrize("path", ["composed", "factored"])
def test_a_replaced_projection_counts_by_its_mathematics_on_either_path(path: str) -> None:
    model, rank, sparsity = build(), 4, 0.25
    dense = flops_per_token(model, TOKENS)
    shapes = [m.weight.shape for name, m in model.named_modules() if is_projection(name, m)]
    replace_linears(
        model,
        is_projection,
        lambda name, old: SLTrainLinear(old.in_features, old.out_features, rank, sparsity, 8.0, path=path),
    )
    less = sum(out * into - rank * (out + into) - round(sparsity * out * into) for out, into in shapes)
    assert dense - flops_per_token(model, TOKENS) == 6 * less


def test_speed_is_shared_by_the_devices_and_divided_by_the_peak() -> None:
    model = build()
    of_a_token = flops_per_token(model, TOKENS)
    assert Utilisation(model, TOKENS, 4, None).numbers(1e9) == {"tflops": pytest.approx(of_a_token / 4e3)}
    assert Utilisation(model, TOKENS, 4, of_a_token / 2e3).numbers(1e9)["mfu"] == pytest.approx(0.5)


def test_a_layer_that_cannot_count_its_work_leaves_the_figure_out() -> None:
    model = build()
    model.model.layers[1].mlp.up_proj = SilentLinear(HIDDEN, 48)
    assert Utilisation(model, TOKENS, 1, 100.0).numbers(1e9) == {}


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H200 NVL", torch.bfloat16, 836.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, None),  # an eighth of a card
        ("NVIDIA H100", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3", torch.float32, None),
    ],
)
def test_peaks_are_of_whole_names_in_bfloat16(
    name: str, dtype: torch.dtype, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flops.torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda", 0), dtype) == peak
    assert peak_tflops(torch.device("cpu"), dtype) is None


def test_a_peak_that_is_typed_gives_a_share_on_any_device(
    tiny: list[str], tmp_path: Path, sltrain_train: Callable[..., Any], metrics_of: Callable[[Path], list[Any]]
) -> None:
    code, _, err = sltrain_train(*tiny, "peak_tflops=0.05", f"run_dir={tmp_path}/run")
    assert code == 0 and "% MFU" in err
    lines = [line for line in metrics_of(tmp_path / "run") if line["event"] == "train"]
    assert all(line["mfu"] == pytest.approx(line["tflops"] / 0.05) for line in lines)
    of_a_token = {round(line["tflops"] * 1e12 / line["tokens_per_second"]) for line in lines}
    assert len(of_a_token) == 1 and of_a_token.pop() % 6 == 0
