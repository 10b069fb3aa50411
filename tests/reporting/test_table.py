"""The table for people is rounded and fits; CSV is raw and reads back to the rows."""

import csv
import io
import math
from dataclasses import fields

import pytest

from sltrain.reporting.comparison import arrange, comparison
from sltrain.reporting.rows import Row
from sltrain.reporting.table import COLUMNS, csv_table, duration, elide, markdown_table, short, shown, text_table

ROWS = [
    Row(
        'rank-16, "quoted" | and <b>bold</b>',
        "finished",
        method="sltrain",
        size="llama_tiny",
        rank=16,
        sparsity=0.05,
        lr=0.006,
        num_parameters=1_248_000,
        perplexity=492.9123456789,
        loss=6.2,
        evaluated_step=150,
        peak_memory_bytes=860_000_000,
        peak_memory_measure="process",
        step=150,
        max_steps=150,
        wall_seconds=84.2,
    ),
    Row("died", "crashed", method="full", size="llama_tiny", lr=0.006, perplexity=1e9, loss=9.0, evaluated_step=100),
    Row("blew_up", "diverged", method="full", size="llama_tiny", lr=0.006, perplexity=math.nan, loss=math.nan),
]


def test_csv_reads_back_to_the_rows() -> None:
    read = list(csv.DictReader(io.StringIO(csv_table(ROWS))))
    assert len(read) == len(ROWS)
    for line, row in zip(read, ROWS, strict=True):
        assert "settings" not in line
        for item in (item for item in fields(Row) if item.name not in ("settings", "options", "tasks")):
            value = getattr(row, item.name)
            if isinstance(value, float):
                number = float(line[item.name])
                assert number == value or math.isnan(number) and math.isnan(value)
            else:
                assert line[item.name] == ("" if value is None else str(value))


def test_numbers_of_tasks_have_columns_in_the_table_and_in_csv() -> None:
    tasks = {"piqa acc": 0.5204, **{f"t{i} acc": 0.25 for i in range(9)}}
    rows = [Row("a", "finished", tasks=tasks), Row("b", "finished", tasks={"wiki word_perplexity": 123456.7})]
    head, *lines = text_table(rows, 300).splitlines()
    assert "piqa acc" in head and "t4 acc" in head and "t5 acc" not in head
    assert lines[0].split()[2] == "0.5204" and lines[1].split()[2] == "-"
    read = list(csv.DictReader(io.StringIO(csv_table(rows))))
    assert (read[0]["tasks.piqa acc"], read[0]["tasks.t8 acc"]) == ("0.5204", "0.25")
    assert (read[1]["tasks.piqa acc"], read[1]["tasks.wiki word_perplexity"]) == ("", "123456.7")


def test_another_option_of_a_method_has_a_column_where_it_differs() -> None:
    rows = [Row(name, "finished", "relora", options={"merge_every": every}) for name, every in (("a", 200), ("b", 500))]
    head, *lines = text_table(rows, 200).splitlines()
    assert head.split()[-2:] == ["merge", "every"] and [line.split()[-1] for line in lines[:2]] == ["200", "500"]
    assert [line["method.merge_every"] for line in csv.DictReader(io.StringIO(csv_table(rows)))] == ["200", "500"]
    assert "merge" not in text_table(rows[:1], 200) + text_table([rows[0], rows[0]], 200)


def test_swept_settings_have_columns_in_the_table_and_in_csv() -> None:
    rows = [
        Row(name, "finished", method=name, settings={"lr_scale.factor": factor, "grad_clip": "1.0"})
        for name, factor in (("a", "1.0"), ("b", "0.5"))
    ]
    head, *lines = text_table(rows, 80).splitlines()
    assert head.split() == ["run", "status", "method", "lr_scale.factor"]
    assert [line.split()[-1] for line in lines] == ["1.0", "0.5"]
    read = list(csv.DictReader(io.StringIO(csv_table(rows))))
    assert [line["lr_scale.factor"] for line in read] == ["1.0", "0.5"] and "grad_clip" not in read[0]


def test_tensors_of_small_models_are_told_apart() -> None:
    rows = [Row(name, "finished", peak_tensor_bytes=size) for name, size in (("a", 86_140_000), ("b", 87_900_000))]
    text = text_table([*rows, Row("c", "finished", peak_tensor_bytes=2_340_000_000)], 80)
    assert all(cell in text for cell in ("86.1 MB", "87.9 MB", "2.34 GB"))


def test_every_column_shows_a_field() -> None:
    assert {column.key for column in COLUMNS} <= {item.name for item in fields(Row)}


def test_people_see_units_and_when_a_number_is_not_the_last() -> None:
    text = text_table(ROWS, width=400)
    for cell in ("492.91", "1.248M", "0.86 GB", "process", "84 s", "150/150", "1e+09 @100", "nan"):
        assert cell in text, cell
    assert "492.91 @" not in text


def test_columns_without_a_value_are_left_out_and_shared_settings_said_once() -> None:
    headings = [column.heading for column in shown(ROWS)]
    assert "tokens/s" not in headings and "set" not in headings and "method" in headings
    assert "model" not in headings and "In all runs: model llama_tiny, lr 0.006." in text_table(ROWS, width=400)
    assert "model" in [column.heading for column in shown(ROWS[:1])]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_text_fits_and_is_aligned(width: int) -> None:
    rows = [Row(f"rank-{n}", "finished", rank=n) for n in (8, 128)]
    for row, perplexity in zip(rows, (10.0, 200.0), strict=True):
        row.perplexity = row.loss = row.bits_per_byte = perplexity
        row.method, row.tokens_per_second, row.peak_memory_bytes = "sltrain", 100.0, 10**9
        row.eval_tokens = row.rank
    rows = arrange(rows)
    lines = text_table(rows, width).splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].split()[:2] == ["run", "status"]  # equal in all rows, but no setting
    end = lines[0].index("perplexity") + len("perplexity")
    assert lines[1][:end].endswith(" 10.00") and lines[2][:end].endswith(" 200.00")
    assert " ".join(lines[3:]).endswith(comparison(rows)) and comparison(rows)


def test_a_narrow_terminal_keeps_run_status_and_perplexity() -> None:
    head = text_table(ROWS, width=10).splitlines()[0].split()
    assert head == ["run", "status", "perplexity"]


def test_markdown_has_as_many_cells_in_each_line_and_escapes_names() -> None:
    lines = [line for line in markdown_table(ROWS).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(ROWS)
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    assert r"\| and \<b\>bold" in lines[2]


def test_the_sentence_on_what_compares_is_in_every_table_for_people() -> None:
    rows = arrange([Row(str(n), "finished", perplexity=n, loss=n, seq_len=int(n)) for n in (1.0, 2.0)])
    assert comparison(rows) in " ".join(text_table(rows, 400).split()) and comparison(rows) in markdown_table(rows)


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (8059, "8,059"), (43_500, "43.5K"), (1_248_000, "1.248M"), (6_738_400_000, "6.738B")]
)
def test_short_numbers(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(84, "84 s"), (180, "3.0 min"), (7200, "2.0 h"), (200_000, "2.3 days")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_long_name_keeps_both_ends() -> None:
    assert elide("x" * 44, 44) == "x" * 44
    short_name = elide("begin" + "-" * 100 + "end", 20)
    assert len(short_name) == 20 and short_name.startswith("begin") and short_name.endswith("end")


def test_details_are_shown_where_they_differ() -> None:
    rows = [Row("a", "finished", support="uniform", seed=1), Row("b", "finished", support=None, seed=2)]
    headings = [column.heading for column in shown(rows)]
    assert "seed" in headings and "support" not in headings
    rows[1].support, rows[1].seed = "block", 1
    headings = [column.heading for column in shown(rows)]
    assert "support" in headings and "seed" not in headings and "seed" not in text_table(rows, 400)
