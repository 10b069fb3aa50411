"""A run of the command beside the same training written anew in float64, with plain autograd and Adam by its formula.

The rewrite shares the decoder around the projections and the text with the run. The projections are modules of the
test's own, which know nothing of the package's layers; their first values are the run's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sltrain.building.run import build_run
from sltrain.compose import TRAIN, compose_config
from sltrain.engine.loop import Cadence, run_loop
from sltrain.models.llama import LlamaForCausalLM

Weights = dict[str, Tensor]
SINGLE = ["grad_clip=null", "global_batch_size=4", "micro_batch_size=4", "eval_every=0", "log_every=1"]


@dataclass
class Recorded:
    """What a run began with, saw, and found."""

    folder: Path
    start: Weights  # before the first update, float64
    batches: list[tuple[Any, ...]]  # the model's arguments, an update each
    rates: list[float]
    losses: list[float]

    def saved(self, step: int) -> Weights:
        """The weights after update `step`, phases and actions included, float64."""
        return doubled(load_file(self.folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors"))


def doubled(weights: Weights) -> Weights:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def record(overrides: list[str], folder: Path, num_updates: int, lines_of: Callable[[Path], list[dict]]) -> Recorded:
    """Train by the command's own loop, one micro-batch an update, with a checkpoint of every step."""
    steps = [f"max_steps={num_updates}", f"run_dir={folder}", "checkpoint_every=1", "keep_last=99"]
    config = compose_config([*overrides, *SINGLE, *steps], TRAIN)
    batches: list[tuple[Any, ...]] = []
    run = build_run(config)
    with run.resources:
        assert run.trainer is not None
        model = run.trainer.model
        start = doubled({name: tensor.clone() for name, tensor in model.state_dict().items()})
        model.register_forward_pre_hook(lambda module, args: batches.append(args) if torch.is_grad_enabled() else None)
        run_loop(run.trainer, Cadence(num_updates, 1, 0, 1))
    lines = [line for line in lines_of(folder) if line["event"] == "train"]
    assert len(lines) == len(batches) == num_updates
    return Recorded(folder, start, batches, [line["lr"] for line in lines], [line["loss"] for line in lines])


def rewrite(
    overrides: list[str],
    recorded: Recorded,
    make: Callable[[str, Weights], nn.Module | None],
    after: Callable[[int, nn.Module], None] = lambda step, model: None,
) -> list[float]:
    """The loss of each update. `make(name, weights)` gives the module in a projection's place, from its tensors at the
    start; None leaves it dense. `after(step, model)` changes the model after an update."""
    config = compose_config(overrides, TRAIN)
    config.model.vocab_size = len(recorded.start["lm_head.weight"])
    model = LlamaForCausalLM(config.model).double()
    for name in [name for name, _ in model.named_modules()]:
        own = {key.removeprefix(f"{name}."): t for key, t in recorded.start.items() if key.startswith(f"{name}.")}
        if name.endswith("_proj") and (made := make(name, own)) is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, made)
    mine = model.state_dict()
    model.load_state_dict({name: tensor for name, tensor in recorded.start.items() if name in mine}, strict=False)
    adam, losses = Adam(), []
    for step, (batch, rate) in enumerate(zip(recorded.batches, recorded.rates, strict=True), start=1):
        labels = batch[1]
        loss = model(*batch) / (labels[:, 1:] != -100).sum()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        adam.update(parameters, torch.autograd.grad(loss, parameters), rate)
        losses.append(loss.item())
        after(step, model)
    return losses


class Adam:
    """Kingma and Ba, arXiv 1412.6980, algorithm 1, with the betas and epsilon of the package's defaults."""

    def __init__(self) -> None:
        self.state: dict[Tensor, tuple[int, Tensor, Tensor]] = {}

    @torch.no_grad()
    def update(self, parameters: list[nn.Parameter], gradients: tuple[Tensor, ...], rate: float) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            zero = torch.zeros_like(parameter)
            t, m, v = self.state.get(parameter, (0, zero, zero))
            t, m, v = t + 1, 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            parameter -= rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            self.state[parameter] = t, m, v
