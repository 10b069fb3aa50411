"""What every method does, found by its name: it resumes bit for bit in the step before, at and after each of its
actions and phases, trains the same on two processes, is planned as measured, exports, and is in the page on methods.

`cases/NAME.yaml` holds the overrides with which all of a method happens within eight updates.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from resuming import resumes_bit_for_bit

from sltrain.building.model import build_model
from sltrain.building.phases import actions_of, phases_of
from sltrain.compose import TRAIN, compose_config
from sltrain.layers import ReplacedLinear
from sltrain.methods.base import METHODS

CASES = Path(__file__).with_name("cases")
PAGE = Path(__file__).parents[2] / "sltrain" / "methods" / "README.md"
STEPS = 8
NAMES = METHODS.names()

Train = Callable[..., tuple[int, str, str]]
Metrics = Callable[[Path], list[dict]]


def case(method: str, base: list[str]) -> list[str]:
    """The overrides of a short run of this method."""
    file = CASES / f"{method}.yaml"
    own = yaml.safe_load(file.read_text())["overrides"] if file.exists() else []
    return [*base, f"method={method}", f"max_steps={STEPS}", *own]


@pytest.mark.slow
@pytest.mark.parametrize("method", NAMES)
def test_a_method_resumes_bit_for_bit_and_two_processes_train_what_one_does(
    method: str, tiny: list[str], sltrain_train: Train, fork_train: Callable, metrics_of: Metrics, tmp_path: Path
) -> None:
    """Two processes take the sums over rows in another order."""
    overrides = case(method, tiny)
    config = compose_config(overrides, TRAIN)
    actions = actions_of(config, build_model(config, 512, torch.float32))
    due = {step for step in range(1, STEPS) if any(action.is_due(step) for action in actions)}
    due |= {phase.after for phase in phases_of(config)} or {STEPS // 2}
    around = {step + offset for step in due for offset in (-1, 0, 1)} & set(range(1, STEPS))
    straight = resumes_bit_for_bit(overrides, sltrain_train, tmp_path, sorted(around)[:5])
    assert fork_train(*overrides, f"run_dir={tmp_path}/two", num_ranks=2).wait() == 0
    one, two = (
        [line["loss"] for line in metrics_of(run) if line["event"] in ("train", "final")]
        for run in (straight, tmp_path / "two")
    )
    assert len(one) == STEPS + 1 and two == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", NAMES)
def test_memory_is_as_planned_and_the_export_is_the_trained_model(
    method: str, tiny: list[str], sltrain_train: Train, metrics_of: Metrics, tmp_path: Path
) -> None:
    """The most that is measured in any phase is what was planned, for a model large enough that tensors of a few bytes,
    which no plan counts, do not show."""
    sizes = ["model.hidden_size=128", "model.intermediate_size=352", "rank=16", "seq_len=128"]
    overrides = case(method, [*tiny, *sizes])
    code, out, err = sltrain_train(*overrides, f"run_dir={tmp_path}/run")
    assert code == 0, err
    lines = [line for line in metrics_of(tmp_path / "run") if "peak_tensor_bytes" in line]
    measured = max(line["peak_tensor_bytes"] for line in lines)
    assert measured == pytest.approx(lines[-1]["planned_memory_bytes"], rel=0.05)
    exports(tmp_path / "run", overrides, tmp_path)


def exports(run: Path, overrides: list[str], folder: Path) -> None:
    """Both formats; each export compares itself with the trained model. What is not one matrix has no dense one."""
    from sltrain import Error
    from sltrain import export as export_model

    model = build_model(compose_config(overrides, TRAIN), 512, torch.float32)
    layers = [module for module in model.modules() if isinstance(module, ReplacedLinear)]
    if all(layer.is_mergeable for layer in layers):
        export_model(run, folder / "dense")
    else:
        with pytest.raises(Error, match="compressed"):
            export_model(run, folder / "dense")
    if layers:
        export_model(run, folder / "compressed", format="compressed")


@pytest.mark.parametrize("method", NAMES)
def test_the_page_on_methods_has_its_section(method: str) -> None:
    assert re.search(rf"^## `{method}`", PAGE.read_text(), re.MULTILINE)
