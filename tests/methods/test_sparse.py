"""method=sparse: dense training where nothing is zero, an independent rewrite, pruned dense runs, what is counted and
what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from resuming import resumes_bit_for_bit
from rewritten import Weights, doubled, record, rewrite
from safetensors.torch import load_file
from surgeon import pruned
from torch import nn

from sltrain.building.model import build_model
from sltrain.compose import TRAIN, compose_config
from sltrain.layers import masked_linear
from sltrain.layers.masked import unpack
from sltrain.methods.sparse import CHOICES
from sltrain.models.llama import LlamaForCausalLM
from sltrain.planning.accounting import count_parameters, stored_bytes

Train = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("optimizer", ["adamw", "adam8bit"])
def test_without_zeros_it_is_dense_training_bit_for_bit(
    optimizer: str, tiny: list[str], sltrain_train: Train, metrics_of: Callable, tmp_path: Path
) -> None:
    lines = {}
    for method in (["full"], ["sparse", "method.sparsity=0"]):
        overrides = [
            *tiny,
            f"method={method[0]}",
            *method[1:],
            f"optimizer={optimizer}",
            f"run_dir={tmp_path}/{method[0]}",
        ]
        code, _, err = sltrain_train(*overrides)
        assert code == 0, err
        events = metrics_of(tmp_path / method[0])
        lines[method[0]] = [(e["loss"], e.get("grad_norm")) for e in events if e["event"] in ("train", "final")]
    assert lines["full"] == lines["sparse"] and len(lines["full"]) == 7


class Masked(nn.Module):
    """x (W * mask)^T: a dense W whose gradient autograd masks."""

    def __init__(self, own: Weights) -> None:
        super().__init__()
        bits = own["mask"].numpy()
        mask = np.unpackbits(bits, axis=1, bitorder="little")[:, : 2 * own["values"].shape[1]]
        self.mask = torch.from_numpy(mask).double()
        self.weight = nn.Parameter(torch.zeros_like(self.mask))
        self.weight.data[self.mask.bool()] = own["values"].flatten()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.mask).t()


@pytest.mark.parametrize("options", [["method.pattern=2:4"], ["method.sparsity=0.5", "method.gain=2"]])
def test_twenty_updates_are_those_of_a_rewrite_in_float64(
    options: list[str], tiny: list[str], metrics_of: Callable, tmp_path: Path
) -> None:
    """float32 rounding is all that differs."""
    overrides = [*tiny, "method=sparse", *options, "lr=0.01"]
    run = record(overrides, tmp_path / "run", 20, metrics_of)
    theirs = rewrite(overrides, run, lambda name, own: Masked(own))
    assert run.losses == pytest.approx(theirs, rel=3e-5)
    assert run.losses[-1] < run.losses[0] - 0.5


def test_values_and_bits_are_counted() -> None:
    base = ["model=llama_60m", "method=sparse"]
    dense = count_parameters(
        build_model(compose_config(["model=llama_60m", "method=full"], TRAIN), 32_000, torch.float32)
    )
    for options, share in ((["method.pattern=2:4"], 0.5), (["method.sparsity=0.75"], 0.25), ([], 0.5)):
        model = build_model(compose_config([*base, *options], TRAIN), 32_000, torch.float32)
        projections = 8 * (4 * 512 * 512 + 3 * 512 * 1376)
        counts = count_parameters(model)
        assert counts["sparse"] == share * projections
        assert dense["total"] - counts["total"] == (1 - share) * projections
        assert stored_bytes(model)["mask_weights"] == projections / 8


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_dense_run_is_pruned_by_magnitude(
    num_ranks: int, tiny: list[str], sltrain_train: Train, fork_train: Callable, tmp_path: Path
) -> None:
    """On every rank, with the mask that belongs to the values; later updates leave it alone."""
    dense, pruned = tmp_path / "dense", tmp_path / "pruned"
    code, _, err = sltrain_train(*tiny, "method=full", f"run_dir={dense}", "max_steps=1")
    assert code == 0, err
    options = ["method=sparse", "method.pattern=2:4", "method.prune=magnitude", "max_steps=2", "checkpoint_every=1"]
    run = fork_train(*tiny, *options, f"init_from={dense}", f"run_dir={pruned}", "lr=1e-9", num_ranks=num_ranks)
    assert run.wait() == 0, run.communicate()[1]
    whole = load_file(dense / "checkpoints" / "step_00000001" / "model.safetensors")
    for step in (1, 2):
        found = load_file(pruned / "checkpoints" / f"step_{step:08d}" / "model.safetensors")
        names = [name.removesuffix(".mask") for name in found if name.endswith(".mask")]
        assert len(names) == 14
        for name in names:
            weight = whole[f"{name}.weight"]
            groups = weight.abs().unflatten(1, (-1, 4))
            largest = (groups >= groups.sort(descending=True).values[..., 1:2]).flatten(1)
            assert torch.equal(unpack(found[f"{name}.mask"], weight.shape[1]), largest), name
            torch.testing.assert_close(found[f"{name}.values"].flatten(), weight[largest], atol=1e-7, rtol=0)


SURGEON = ["method=sparse", "method.prune=sparsegpt"]
AS_IT_BEGINS = ["max_steps=1", "lr=1e-30", "checkpoint_every=1"]  # no weight moves


@pytest.fixture(scope="module")
def dense(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run whose weights were trained."""
    from sltrain.commands.train import run_command

    folder = tmp_path_factory.mktemp("dense") / "run"
    with pytest.MonkeyPatch.context() as patch:
        arguments = [*tiny, "method=full", "max_steps=250", "lr=0.01", f"run_dir={folder}"]
        patch.setattr("sys.argv", ["sltrain-train", *arguments])
        assert run_command(arguments) == 0
    return folder


def final_loss(events: list[dict]) -> float:
    return next(event["loss"] for event in events if event["event"] == "final")


def newest(run: Path) -> Weights:
    return doubled(load_file(max((run / "checkpoints").glob("step_*")) / "model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("padding", [["padding=truncate_pad"], ["padding=pack", "attention=document"]])
def test_each_decoder_layer_is_pruned_for_what_the_pruned_ones_before_it_give(
    padding: list[str], dense: Path, tiny: list[str], metrics_of: Callable, tmp_path: Path
) -> None:
    """Its inputs are found anew, in float64, on the rows of the first update: those the run is to be pruned on."""
    options = [*SURGEON, "method.pattern=2:4", "method.calibration_rows=4", f"init_from={dense}", *padding, "lr=1e-30"]
    run = record([*tiny, *options], tmp_path / "run", 1, metrics_of)
    config = compose_config([*tiny, *options], TRAIN)
    config.model.vocab_size = 512
    model = LlamaForCausalLM(config.model).double()
    model.load_state_dict(newest(dense))
    for number, decoder in enumerate(model.model.layers):
        seen: dict[str, torch.Tensor] = {}
        projections = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
        hooks = [
            module.register_forward_pre_hook(lambda module, args, name=name, seen=seen: seen.update({name: args[0]}))
            for name, module in projections.items()
        ]
        with torch.no_grad():
            model(*run.batches[0])
        for hook in hooks:
            hook.remove()
        for name, module in projections.items():
            x = seen[name].flatten(0, -2)
            wanted, kept = pruned(module.weight.detach().numpy(), (x.t() @ x / len(x)).numpy(), 2, 4, 128)
            own = {key: run.start[f"model.layers.{number}.{name}.{key}"] for key in ("values", "mask")}
            found = Masked(own)
            differing = found.mask.bool().numpy() != kept
            assert differing.mean() < 0.01, name  # a tie may be decided by float32
            same = ~differing.any(1)
            np.testing.assert_allclose(found.weight.detach().numpy()[same], wanted[same], rtol=2e-3, atol=2e-4)
            module.weight.data = found.weight.data * found.mask


@pytest.mark.slow
def test_by_its_inputs_a_dense_run_loses_less_than_by_magnitude(
    dense: Path, tiny: list[str], sltrain_train: Train, metrics_of: Callable, tmp_path: Path
) -> None:
    """Evaluated as it begins. Both runs read the same rows."""
    found, states = {}, {}
    for prune in ("magnitude", "sparsegpt"):
        folder = tmp_path / prune
        options = ["method=sparse", f"method.prune={prune}", "method.sparsity=0.7", f"init_from={dense}", *AS_IT_BEGINS]
        code, out, err = sltrain_train(*tiny, *options, f"run_dir={folder}")
        assert code == 0, err
        assert ("calibrate  on the first 128 rows" in out) == (prune == "sparsegpt")
        found[prune] = final_loss(metrics_of(folder))
        states[prune] = json.loads((folder / "checkpoints" / "step_00000001" / "state.json").read_text())["stream"]
    assert found["sparsegpt"] < found["magnitude"]
    assert states["sparsegpt"] == states["magnitude"]


@pytest.mark.slow
def test_two_processes_prune_what_one_does(dense: Path, tiny: list[str], fork_train: Callable, tmp_path: Path) -> None:
    """Bit for bit."""
    options = [*SURGEON, "method.sparsity=0.6", "method.calibration_rows=11", f"init_from={dense}", *AS_IT_BEGINS]
    runs = [fork_train(*tiny, *options, f"run_dir={tmp_path}/{num_ranks}", num_ranks=num_ranks) for num_ranks in (1, 2)]
    assert [run.wait() for run in runs] == [0, 0]
    one, two = (newest(tmp_path / name) for name in "12")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_run_pruned_by_its_inputs_resumes_bit_for_bit(
    dense: Path, tiny: list[str], sltrain_train: Train, tmp_path: Path
) -> None:
    options = [*SURGEON, "method.calibration_rows=8", f"init_from={dense}", "max_steps=4"]
    resumes_bit_for_bit([*tiny, *options], sltrain_train, tmp_path, [1, 3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "method.prune=sparsegpt",
            "method.prune=sparsegpt prunes trained weights: add init_from=RUN, or choose random or magnitude",
        ),
        ("method.prune=sparsegpt method.calibration_rows=0", "method.calibration_rows=0: must be at least 1"),
        (
            "method.prune=magnitude method.calibration_rows=64",
            "method.calibration_rows=64 is for method.prune=sparsegpt, and prune is magnitude; drop one of the two",
        ),
        ("method.sparsity=1", "method.sparsity=1.0: must be at least 0 and below 1; it is the share of zeros"),
        ("method.sparsity=0.5 method.pattern=2:4", "method.sparsity=0.5 and method.pattern=2:4: drop one of the two"),
        ("method.pattern=4:2", "method.pattern=4:2: write N:M with 1 <= N <= M, such as 2:4"),
        ("method.pattern=half", "method.pattern=half: write N:M"),
        ("method.prune=size", "method.prune=size: choose one of random, magnitude, sparsegpt"),
        ("method.gain=0", "method.gain=0.0: must be a number above 0"),
    ],
)
def test_wrong_options_cost_one_line(options: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        compose_config(["model=llama_60m", "method=sparse", *options.split()], TRAIN)
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_pattern_wider_than_a_row_names_the_layer(tiny: list[str]) -> None:
    config = compose_config([*tiny, "method=sparse", "method.pattern=2:64"], TRAIN)
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj: cannot keep 2 of every 64 entries of a row of 32"):
        build_model(config, 512, torch.float32)


def test_the_method_knows_the_choices_of_the_layer() -> None:
    assert CHOICES == masked_linear.CHOICES
