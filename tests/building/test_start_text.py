"""The lines before the first update, as a user reads them."""

from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("typed", "batches"),
    [("", "1 process, 2 micro-batches of 4"), ("global_batch_size=4", "1 process, 1 micro-batch of 4")],
)
def test_it_says_what_an_update_and_the_text_are(
    typed: str, batches: str, tiny: list[str], tmp_path: Path, sltrain_train: Run
) -> None:
    code, out, err = sltrain_train(*tiny, "max_steps=1", "warmup_steps=0", *typed.split(), f"run_dir={tmp_path}/run")
    assert code == 0, err
    found = {line[:10].strip(): line[11:] for line in out.splitlines()}
    assert found["update"].endswith(f" tokens = {4 * 32 if typed else 8 * 32} positions ({batches})")
    assert ", padding=truncate_pad; tokenizer " in found["data"] and found["data"].endswith(", vocabulary 512")
    assert "note" not in found


def test_a_learning_rate_of_no_parameter_is_told(tiny: list[str], tmp_path: Path, sltrain_train: Run) -> None:
    typed = ["method=full", "lr_scale={values: 2, embedding: 3}", "max_steps=1", "warmup_steps=0"]
    code, out, err = sltrain_train(*tiny, *typed, f"run_dir={tmp_path}/run")
    notes = [line for line in out.splitlines() if line.startswith("note")]
    line = "note       lr_scale={values: 2} changes nothing: with method=full no parameter has this role"
    assert code == 0 and notes == [line], err
