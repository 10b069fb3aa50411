"""Pretraining of LLaMA models with sparse plus low-rank weights (SLTrain, arXiv 2406.02214)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from sltrain.models.llama import LlamaForCausalLM

__version__ = "0.1.0"


def load(
    path: "str | Path",
    *,
    step: int | None = None,
    device: "str | torch.device" = "cpu",
    dtype: "torch.dtype | None" = None,
) -> "LlamaForCausalLM":
    """A trained model with its weights: from what `sltrain-export` wrote, dense or compressed, or from a run folder (at
    its newest intact checkpoint, or at `step`).

    It is an ordinary torch module, in the dtype it was saved in unless `dtype` says otherwise: input_ids (B, T) ->
    logits (B, T, V). `sltrain.layers.merge_to_dense` makes its layers ordinary linears. Raises ValueError or
    OSError for what cannot be opened.
    """
    import torch  # seconds, which importing the package must not cost

    from sltrain.api.saved import open_saved

    return open_saved(path, step).load(torch.device(device), dtype)
