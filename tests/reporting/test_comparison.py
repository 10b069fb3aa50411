"""Rows are compared only where their numbers compare, and what else differs is said."""

import math
from typing import Any

import pytest

from sltrain.reporting.comparison import arrange, batches, comparison, other_differences
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


def test_settings_that_no_column_shows_are_named_where_they_differ() -> None:
    rows = rows_of(a=10.0, b=20.0, c=30.0)
    for row, heads in zip(rows, ("4", "2", "4"), strict=True):
        row.size, row.settings = "llama_tiny", {"rank": heads, "model.num_key_value_heads": heads, "path": "wiki.gz"}
    assert other_differences(rows) == "Runs of one model also differ in model.num_key_value_heads."
    del rows[1].settings["model.num_key_value_heads"]
    rows[1].settings["rank_overrides.k_proj"] = "4"
    assert "model.num_key_value_heads, rank_overrides.k_proj." in other_differences(rows), "only one run has it"
    rows[1].settings = {}
    assert other_differences(rows) == "", "unknown"
    rows[1].settings = {"model.num_key_value_heads": "2"}
    rows[1].size = "llama_60m"  # a model of its own has a shape of its own
    assert other_differences(rows) == ""
    for i in range(9):
        rows[2].settings[f"key_{i}"] = "1"
        rows[0].settings[f"key_{i}"] = "2"
    assert "key_0, key_1, key_2, key_3, key_4, key_5 and 3 more" in other_differences(rows)
