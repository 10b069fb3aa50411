"""The page of a study from hand-written entries: choice, pairs, equal time, remarks."""

import math
from dataclasses import replace
from typing import Any

import pytest

from sltrain.reporting.paired import paired_difference
from sltrain.reporting.study import Entry, Protocol, Results, chosen_trial, loss_at, ratio_text, remarks_on, render
from sltrain.reporting.study_figure import draw_ratios

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
    page = render(Results(PROTOCOL, entries()), ["line 9 is damaged."], "sltrain-report --study x")
    # d = -0.1, -0.04: mean -0.07, half a width 12.706 x 0.03; exp of the ends
    assert "0.932 (0.637 to 1.365)" in page and "-0.0700 ± 0.3812" in page
    assert "60.34" in page and "| slow | lr=3 | 70.11 | chosen |" in page  # exp(4.1); exp(4.1 + 0.15)
    assert "- line 9 is damaged." in page


def test_the_picture_has_who_has_an_interval() -> None:
    """And lies beside the page, which shows it."""
    results = Results(PROTOCOL, entries())
    picture = draw_ratios(results)
    assert picture is not None and picture.png.startswith(b"\x89PNG") and "over that of dense" in picture.alt
    assert f"![{picture.alt}](study.png)" in render(results, [], "", picture)
    gone = [replace(e, loss=math.inf) if (e.candidate, e.seed) == ("slow", 12) else e for e in entries()]
    assert draw_ratios(Results(PROTOCOL, gone)) is None
    assert draw_ratios(Results(PROTOCOL, entries()[:-4])) is None  # the reference is not reported


def test_remarks() -> None:
    assert remarks_on(Results(PROTOCOL, entries())) == [
        "slow: lr=3 is the highest of the values tried; a better one may lie beyond."
    ]
    two = {name: {**own, "tune": {"lr": [2, 3]}} for name, own in CANDIDATES.items()}
    assert remarks_on(Results(replace(PROTOCOL, candidates=two), entries())) == []  # of two values one is always last
    changes: list[dict[str, Any]] = [{"num_parameters": 1100}, {"tokens": 700}, {"eval_bytes": 3}, {"machine": "other"}]
    words = [
        "has 1.100 times that",
        "on different numbers of tokens",
        "judged on different text",
        "one machine: ; other",
    ]
    for change, word in zip(changes, words, strict=True):
        made = [replace(e, **change) if e.candidate == "slow" and e.role == "reporting" else e for e in entries()]
        assert any(word in remark for remark in remarks_on(Results(PROTOCOL, made))), word


def test_a_candidate_that_diverged_is_infinite_and_stays() -> None:
    made = [replace(e, loss=math.inf) if (e.candidate, e.seed) == ("slow", 12) else e for e in entries()]
    page = render(Results(PROTOCOL, made), [], "")
    assert "| slow | lr=3 | inf | inf | +inf |" in page and "slow: 1 of 2 runs diverged and count as infinite." in page


def test_equal_time_is_that_of_runs_that_finished() -> None:
    """A reference that diverged early took no less time for it."""
    made = entries()
    lost = [replace(e, loss=math.inf, updates=2) if (e.role, e.seed) == ("reporting", 12) else e for e in made]
    for of in ("dense", "slow"):
        results = Results(PROTOCOL, [new if e.candidate == of else e for e, new in zip(made, lost, strict=True)])
        assert results.share_of_time("slow") == pytest.approx(0.5)
    gone = [
        replace(e, loss=math.inf, updates=2) if e.candidate == "dense" and e.role == "reporting" else e for e in made
    ]
    assert Results(PROTOCOL, gone).share_of_time("slow") is None
    assert "both diverged" not in render(Results(PROTOCOL, gone), [], "")


def test_at_one_anothers_setting() -> None:
    """With dense's lr=2 slow is at exp(4.2 + 0.15), its own best exp(4.1 + 0.15): e**0.1 times as much."""
    row = "| slow | lr=2 | lr=3 | 77.48 | 70.11 | +10.5 % |"
    page = render(Results(PROTOCOL, entries()), [], "")
    assert "### At the setting of dense" in page and row in page
    assert row in render(
        Results(PROTOCOL, [e for e in entries() if e.role == "tuning"]), [], ""
    )  # needs no reporting run
    made = [replace(e, setting={"lr": 2, "gain": 9}) if e.candidate == "dense" else e for e in entries()]
    assert row in render(Results(PROTOCOL, made), [], "")
    made = [replace(e, setting={"lr": e.trial + 10}) if e.candidate == "slow" else e for e in entries()]
    assert "| slow | lr=2 | lr=13 | not tried | 70.11 | - |" in render(Results(PROTOCOL, made), [], "")
    made = [replace(e, setting={"gain": e.trial}) if e.candidate == "slow" else e for e in entries()]
    assert "At the setting of" not in render(Results(PROTOCOL, made), [], "")
    unknown = [e for e in entries() if (e.candidate, e.trial) != ("dense", 1)]
    assert "At the setting of" not in render(Results(PROTOCOL, unknown), [], "")


def test_first_weights_that_were_trained_are_remarked_on_and_their_tokens_count() -> None:
    slow = {**CANDIDATES["slow"], "equal": {"tokens": "dense"}, "seen": 400}
    protocol = replace(PROTOCOL, candidates={**CANDIDATES, "slow": slow})
    made = [replace(e, config={"init_from": "/a/run"}) if e.candidate == "slow" else e for e in entries()]
    results = Results(protocol, made)
    assert results.tokens("slow") == 1200 and results.tokens("dense") == 800
    said = remarks_on(results)
    assert "slow has init_from=/a/run: its tokens count 400 positions behind it, its FLOPs and time none." in said
    assert "slow was to have the tokens of dense and has 1.500 times that." in said
    made = [replace(e, config={"init_from": "/a/run"}) for e in made]
    assert not any("init_from" in remark for remark in remarks_on(Results(protocol, made)))
    made = [replace(e, config={"support_from": "/a/run"} if e.candidate == "slow" else {}) for e in made]
    results = Results(protocol, made)
    assert results.tokens("slow") == 800  # seen counts for first weights
    assert any(
        remark.startswith("slow has support_from=/a/run: its tokens count none of") for remark in remarks_on(results)
    )


def test_time_that_was_to_be_equal() -> None:
    slow = {**CANDIDATES["slow"], "equal": {"time": "dense"}}
    protocol = replace(PROTOCOL, candidates={**CANDIDATES, "slow": slow})
    said = "slow was to have the time of dense and has 2.000 times that."
    assert said in remarks_on(Results(protocol, entries()))
    near = [replace(e, seconds_per_update=0.104) if e.candidate == "slow" else e for e in entries()]
    assert not any("the time of" in remark for remark in remarks_on(Results(protocol, near)))


def test_a_study_that_is_not_done() -> None:
    page = render(Results(PROTOCOL, entries()[:5]), [], "")
    assert "The reporting runs of dense, the reference, are not done yet." in page and "| dense | lr=1 |" not in page


def test_a_ratio_with_runs_that_diverged_says_whose() -> None:
    assert ratio_text(paired_difference([4.0, 4.0], [math.inf, 4.0])) == "the other diverged"
    assert ratio_text(paired_difference([math.inf, 4.0], [4.0, math.inf])) == "both diverged"
    assert ratio_text(paired_difference([math.inf, 4.0], [4.0, 4.0])) == "inf"
