"""Every method resumes bit for bit, also in the step before, at and after each of its actions and phases."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from resuming import resumes_bit_for_bit

from sltrain.building.model import build_model
from sltrain.building.phases import actions_of, phases_of
from sltrain.compose import TRAIN, compose_config
from sltrain.methods.base import METHODS

pytestmark = pytest.mark.slow

STEPS = 8


@pytest.mark.parametrize("method", METHODS.names())
def test_a_method_resumes_bit_for_bit(
    method: str, tiny: list[str], sltrain_train: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    overrides = [*tiny, f"method={method}", f"max_steps={STEPS}"]
    config = compose_config(overrides, TRAIN)
    actions = actions_of(config, build_model(config, 512, torch.float32))
    due = {step for step in range(1, STEPS) if any(action.is_due(step) for action in actions)}
    due |= {phase.after for phase in phases_of(config)} or {STEPS // 2}
    around = {step + offset for step in due for offset in (-1, 0, 1)}
    resumes_bit_for_bit(overrides, sltrain_train, tmp_path, around & set(range(1, STEPS)))
