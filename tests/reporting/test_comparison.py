"""Rows are compared only where their numbers compare, and what else differs is said."""

import math
from typing import Any

import pytest

from sltrain.reporting.comparison import arrange, batches, best_of, comparison, differing, other_differences, swept
from sltrain.reporting.rows import Row


def rows_of(**perplexities: float | None) -> list[Row]:
    return [
        Row(name, "finished", perplexity=value, loss=value, bits_per_byte=value, tokenizer_hash="t")
        for name, value in perplexities.items()
    ]


def test_one_group_is_sorted_by_perplexity_and_has_no_letters() -> None:
    rows = arrange(rows_of(none=None, b=20.0, nan=math.nan, a=10.0))
    assert [row.name for row in rows] == ["a", "b", "nan", "none"]
    assert {row.group for row in rows} == {""} and comparison(rows) == ""


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("tokenizer_hash", "0123456789", "tokenizer 01234567"),
        ("padding", "truncate_pad", "padding truncate_pad"),
        ("seq_len", 512, "seq_len 512"),
        ("eval_tokens", 40_035, "40,035"),
        ("eval_bytes", 12345, "(but do on the text)"),
    ],
)
def test_what_keeps_perplexities_apart(field: str, value: Any, words: str) -> None:
    rows = rows_of(a=10.0, b=20.0, c=30.0, none=None)
    rows[0].bits_per_byte = 25.0  # its perplexity is the lowest, but of other tokens
    setattr(rows[0], field, value)
    arranged = arrange(rows)
    assert [(row.name, row.group) for row in arranged] == [("b", "a"), ("a", "b"), ("c", "a"), ("none", "")]
    assert words in comparison(arranged)
    others = {"tokenizer ", "padding ", "seq_len "} - {words.partition(" ")[0] + " "}
    assert not any(other in comparison(arranged).partition("(")[2].partition(")")[0] for other in others)


def test_an_unknown_tokenizer_is_like_no_other() -> None:
    rows = rows_of(a=10.0, b=20.0)
    for row in rows:
        row.tokenizer_hash = None
    arranged = arrange(rows)
    assert [row.group for row in arranged] == ["a", "b"] and "unknown" in comparison(arranged)


def test_runs_without_an_evaluation_make_no_group() -> None:
    rows = rows_of(a=10.0, b=20.0, none=None)
    rows[2].padding = "other"
    assert comparison(arrange(rows)) == ""


def test_there_are_letters_for_any_number_of_groups() -> None:
    rows = rows_of(**{f"run{i}": float(i) for i in range(60)})
    for i, row in enumerate(rows):
        row.eval_tokens = i
    letters = [row.group for row in arrange(rows)]
    assert len(comparison(arrange(rows))) < 300
    assert letters[:2] == ["a", "b"] and letters[25:28] == ["z", "aa", "ab"] and len(set(letters)) == 60


def test_the_published_convention_compares_only_between_equal_batches() -> None:
    rows = rows_of(a=10.0, b=20.0, none=None)
    rows[2].micro_batch_size = 3  # not evaluated
    assert batches(arrange(rows)) == ""
    rows[0].micro_batch_size, rows[1].micro_batch_size = None, 4
    assert batches(arrange(rows)) == "", "one is unknown"
    rows[0].micro_batch_size = 8
    assert "micro_batch_size differs" in batches(arrange(rows))
    rows[0].eval_processes, rows[1].eval_processes = 1, 2
    assert "micro_batch_size and the number of processes differ" in batches(arrange(rows))
    rows[0].micro_batch_size = 4
    assert "the number of processes differs" in batches(arrange(rows))
    rows[0].padding = "another"  # another letter, so nobody compares them
    assert batches(arrange(rows)) == ""


def test_a_run_without_numbers_makes_no_group() -> None:
    rows = rows_of(a=10.0, b=20.0, nan=math.nan)
    rows[2].eval_bytes = None  # nothing to reckon it from
    rows[0].eval_bytes = rows[1].eval_bytes = 5
    assert {row.group for row in arrange(rows)} == {""} and comparison(arrange(rows)) == ""


def test_settings_in_which_runs_of_one_model_differ() -> None:
    rows = rows_of(a=10.0, b=20.0, c=30.0)
    for row, heads in zip(rows, ("4", "2", "4"), strict=True):
        row.size, row.settings = "llama_tiny", {"rank": heads, "model.num_key_value_heads": heads, "path": "wiki.gz"}
    assert differing(rows) == ["model.num_key_value_heads"], "rank has a column"
    del rows[1].settings["model.num_key_value_heads"]
    rows[2].settings["rank_overrides.k_proj"] = "4"
    assert differing(rows) == ["model.num_key_value_heads", "rank_overrides.k_proj"], "only some have it"
    rows[1].settings = {}
    rows[0].settings["rank_overrides.k_proj"] = "4"
    assert differing(rows) == [], "unknown"
    rows[1].settings = {"model.num_key_value_heads": "2"}
    rows[1].size = "llama_60m"  # a model of its own has a shape of its own
    assert differing(rows) == []


def test_settings_with_most_values_come_first_and_those_that_go_together_once() -> None:
    rows = rows_of(a=10.0, b=20.0, c=30.0)
    for row, factor in zip(rows, ("1.0", "0.5", "0.25"), strict=True):
        row.settings = {"lr_scale.factor": factor, "lr_scale.values": factor, "ema": str(factor == "1.0")}
    assert differing(rows) == ["lr_scale.factor", "ema"]


def test_an_option_that_another_optimizer_does_not_have_is_no_difference() -> None:
    rows = rows_of(a=10.0, b=20.0, c=30.0)
    for row, name, scale in zip(rows, ("galore", "adamw", "galore"), ("0.25", "", "0.25"), strict=True):
        row.settings = {"optimizer.name": name, **({"optimizer.scale": scale} if scale else {})}
    assert differing(rows) == []
    rows[2].settings["optimizer.scale"] = "1.0"
    assert differing(rows) == ["optimizer.scale"]


def test_a_few_settings_become_columns_and_the_others_are_named() -> None:
    rows = rows_of(a=10.0, b=20.0)
    for i in range(13):
        rows[0].settings[f"key_{i:02}"], rows[1].settings[f"key_{i:02}"] = str(i), str(2 * i + 1)
    rows[0].settings["key_01"] = "a value that is too long for a column"
    assert swept(rows) == ["key_00", "key_02", "key_03", "key_04"]
    sentence = other_differences(rows)
    assert sentence == "Runs of one model also differ in key_01, key_05, key_06, key_07, key_08, key_09 and 3 more."
    assert other_differences(rows[:1]) == ""


# ---- the best of each


def grid() -> list[Row]:
    """Two methods at three rates: the best run of b is not finished, another diverged."""
    rows = rows_of(a1=30.0, a2=20.0, a3=math.nan, b1=15.0, b2=10.0, b3=40.0)
    for row in rows:
        row.method, row.settings = row.name[0], {"method.name": row.name[0], "lr_scale.factor": row.name[1]}
    rows[4].status = "running"
    return arrange(rows)


def test_the_best_finished_run_of_each() -> None:
    best, sentence = best_of(grid(), ["method"])
    assert [(row.name, row.best_of) for row in best] == [("b1", "b"), ("a2", "a")]
    assert sentence == "Of 6 runs these are the best for each method, by perplexity."
    best, _ = best_of(grid(), ["lr_scale.factor"])
    assert [(row.name, row.best_of) for row in best] == [("b1", "1"), ("a2", "2"), ("b3", "3")]
    best, _ = best_of(grid(), ["method", "lr_scale.factor"])
    assert [row.name for row in best] == ["b2", "b1", "a2", "a1", "b3", "a3"], "even one that diverged, if alone"
    assert best[0].best_of == "b, 2"


def test_the_best_where_perplexities_do_not_compare() -> None:
    rows = grid()
    for row in rows:
        row.seq_len = 64 if row.method == "a" else 128
    rows[0].bits_per_byte = 99.0
    best, sentence = best_of(arrange(rows), ["method"])
    assert "by bits per byte" in sentence and {row.group for row in best} == {"a", "b"}
    best, _ = best_of(arrange([row for row in rows if row.method == "a"]), ["method"])
    assert [row.group for row in best] == [""], "what is left compares"


def test_the_best_of_a_key_that_nobody_has() -> None:
    with pytest.raises(ValueError, match="best of colour: no run has this key.*method.*lr_scale.factor"):
        best_of(grid(), ["method", "colour"])
