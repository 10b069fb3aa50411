"""The page of a study from hand-written entries: choice, pairs, equal time, remarks."""

import math
from dataclasses import replace
from typing import Any

import pytest

from sltrain.reporting.paired import paired_difference
from sltrain.reporting.study import Entry, Protocol, Results, chosen_trial, loss_at, ratio_text, remarks_on, render

CANDIDATES: dict[str, dict[str, Any]] = {
    "dense": {"overrides": [], "tune": {"lr": [1, 2, 3]}, "equal": {}},
    "slow": {"overrides": [], "tune": {"lr": [1, 2, 3]}, "equal": {"parameters": "dense"}},
}
PROTOCOL = Protocol("x", "dense", 3, [1, 2], [11, 12], ["a=b"], CANDIDATES)


def entry(role: str, candidate: str, trial: int, seed: int, loss: float, **changes: Any) -> Entry:
    known = {"tokens": 800, "num_parameters": 1000, "seconds_per_update": 0.1, "evals": [[4, 6.0]], "eval_tokens": 9}
    return Entry(role, candidate, trial, {"lr": trial}, seed, loss, 8, **{**known, **changes})


def entries() -> list[Entry]:
    """dense: trial 2 is best; slow: trial 3, and takes twice as long an update."""
    losses = {"dense": [5.0, 4.0, 4.5], "slow": [5.0, 4.2, 4.1]}
    made = [
        entry("tuning", name, t, s, losses[name][t - 1] + 0.1 * s) for s in (1, 2) for name in losses for t in (1, 2, 3)
    ]
    made += [entry("reporting", "dense", 2, seed, loss) for seed, loss in ((11, 4.0), (12, 4.2))]
    return made + [
        entry("reporting", "slow", 3, seed, loss, seconds_per_update=0.2, evals=[[2, 6.5], [6, 5.0]])
        for seed, loss in ((11, 3.9), (12, 4.16))
    ]


def test_the_lowest_mean_chooses_and_a_diverged_seed_does_not_win() -> None:
    made = entries()
    assert (chosen_trial(PROTOCOL, made, "dense"), chosen_trial(PROTOCOL, made, "slow")) == (2, 3)
    made = [replace(e, loss=math.inf) if (e.candidate, e.trial, e.seed) == ("dense", 2, 1) else e for e in made]
    assert chosen_trial(PROTOCOL, made, "dense") == 3
    assert chosen_trial(PROTOCOL, made[1:], "dense") is None  # a trial is not done yet


def test_at_equal_time() -> None:
    """dense takes 0.8 s; slow has then done 4 of its 8 updates, half way between its evaluations at 2 and 6."""
    results = Results(PROTOCOL, entries())
    assert results.share_of_time("slow") == pytest.approx(0.5)
    found = results.at_equal_time("slow")
    assert found is not None and found.mean == pytest.approx(5.75 - 4.1)
    one = entry("reporting", "slow", 1, 1, 4.0)
    assert [loss_at(one, update) for update in (3, 4, 6, 8, 99)] == [None, 6.0, 5.0, 4.0, 4.0]
    assert loss_at(replace(one, loss=math.inf), 4) == math.inf


def test_the_page() -> None:
    page = render(PROTOCOL, entries(), ["line 9 is damaged."], "sltrain-report --study x")
    # d = -0.1, -0.04: mean -0.07, half a width 12.706 x 0.03; exp of the ends
    assert "0.932 (0.637 to 1.365)" in page and "-0.0700 ± 0.3812" in page
    assert "60.34" in page and "| slow | lr=3 | 70.11 | chosen |" in page  # exp(4.1); exp(4.1 + 0.15)
    assert "- line 9 is damaged." in page


def test_remarks() -> None:
    assert remarks_on(Results(PROTOCOL, entries())) == [
        "slow: lr=3 is the highest of the values tried; a better one may lie beyond."
    ]
    changes: list[dict[str, Any]] = [{"num_parameters": 1100}, {"tokens": 700}, {"eval_bytes": 3}, {"machine": "other"}]
    words = [
        "has 1.100 times as many",
        "on different numbers of tokens",
        "judged on different text",
        "one machine: ; other",
    ]
    for change, word in zip(changes, words, strict=True):
        made = [replace(e, **change) if e.candidate == "slow" and e.role == "reporting" else e for e in entries()]
        assert any(word in remark for remark in remarks_on(Results(PROTOCOL, made))), word


def test_a_candidate_that_diverged_is_infinite_and_stays() -> None:
    made = [replace(e, loss=math.inf) if (e.candidate, e.seed) == ("slow", 12) else e for e in entries()]
    page = render(PROTOCOL, made, [], "")
    assert "| slow | lr=3 | inf | inf | +inf |" in page and "slow: 1 of 2 runs diverged and count as infinite." in page


def test_a_study_that_is_not_done() -> None:
    page = render(PROTOCOL, entries()[:5], [], "")
    assert "The reporting runs of dense, the reference, are not done yet." in page and "| dense | lr=1 |" not in page


def test_a_ratio_with_runs_that_diverged_says_whose() -> None:
    assert ratio_text(paired_difference([4.0, 4.0], [math.inf, 4.0])) == "the other diverged"
    assert ratio_text(paired_difference([math.inf, 4.0], [4.0, math.inf])) == "both diverged"
    assert ratio_text(paired_difference([math.inf, 4.0], [4.0, 4.0])) == "inf"
