"""Which positions a micro-batch computes, counted by hand and by a loop."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sltrain.engine.micro_batch import make_micro_batch, rows_to_compute


def labels_of(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (labels_of([1, 2, 3], [4, -100, -100], [5, 6, -100]), [0, 1, 6]),  # a row of one token predicts nothing
        (labels_of([4, -100, -100], [-100, -100, -100]), []),
        (labels_of([-100, -100, 7], [1, 2, -100]), [0, 1, 3]),  # no target of its own, but read by one that has
        (labels_of([1, 2, 3], [4, 5, 6]), None),
        (labels_of([1, -100, 3], [4, 5, 6]), None),
    ],
)
def test_by_hand(labels: torch.Tensor, expected: list[int] | None) -> None:
    rows = rows_to_compute(labels)
    assert rows is None if expected is None else rows is not None and rows.tolist() == expected
    assert rows is None or rows.dtype == torch.int64


def test_every_row_has_a_target_when_rows_are_padded_on_the_right() -> None:
    lengths = torch.randint(1, 20, (50,), generator=torch.Generator().manual_seed(0))
    labels = torch.ones(50, 19, dtype=torch.int64).masked_fill(torch.arange(19) >= lengths[:, None], -100)
    rows = rows_to_compute(labels)
    assert rows is not None
    by_loop = [19 * b + t for b in range(50) for t in range(18) if labels[b, t + 1] != -100]
    assert rows.tolist() == by_loop and len(rows) == lengths.sum() - 50


def test_all_parts_are_on_the_device() -> None:
    ids = torch.ones(2, 3, dtype=torch.int64)
    for labels, num_rows in ((labels_of([1, 2, 3], [4, -100, -100]), 2), (ids, None)):
        input_ids, sent, rows = make_micro_batch(ids, labels, torch.device("meta"))
        assert input_ids.is_meta and sent.is_meta
        assert rows is None if num_rows is None else rows is not None and rows.is_meta and len(rows) == num_rows


@pytest.mark.parametrize("padding", ["truncate_pad", "pack"])
def test_a_run_computes_no_pads(
    padding: str,
    tiny: list[str],
    tmp_path: Path,
    sltrain_train: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The labels of all rows whose loss is computed, in training and in evaluation."""
    from sltrain.models import llama

    texts = [" ".join(f"word{i}" for i in range(length)) for length in range(1, 9)] * 30
    (tmp_path / "short.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    seen: list[Tensor] = []
    real = llama.chunked_cross_entropy_sum

    def spy(hidden: Tensor, weight: Tensor, labels: Tensor, *rest: Any, **options: Any) -> Tensor:
        assert len(hidden) == len(labels)
        seen.append(labels)
        return real(hidden, weight, labels, *rest, **options)

    monkeypatch.setattr(llama, "chunked_cross_entropy_sum", spy)
    text = [f"path={tmp_path}/short.jsonl", f"validation_path={tmp_path}/short.jsonl"]
    code, _, err = sltrain_train(*tiny, *text, f"padding={padding}", f"run_dir={tmp_path}/run")
    assert code == 0, err
    assert len(seen) > 12  # six updates of two micro-batches, and the evaluation
    num_computed, num_positions = sum(map(len, seen)), sum(map(len, seen[:12]))
    num_targets = sum(int((labels != -100).sum()) for labels in seen)
    if padding == "truncate_pad":
        assert num_computed == num_targets and num_positions < 0.9 * 12 * 4 * 32
    else:
        assert num_positions == 12 * 4 * 32  # one in 32 has no target, and leaving it out would cost more
