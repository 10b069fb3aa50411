"""Tables for people."""

from sltrain.benchmarks.table import Column, format_table, milliseconds, percent, size, two_digits


def test_columns_align_and_empty_ones_are_left_out() -> None:
    rows = [{"name": "a", "x": 1.5, "none": None}, {"name": "longer", "x": None}]
    columns = [Column("name", "name"), Column("x", "x", two_digits), Column("none", "none")]
    assert format_table(rows, columns).splitlines() == [
        "| name   |    x |",
        "| ------ | ---: |",
        "| a      | 1.50 |",
        "| longer |    - |",
    ]


def test_units() -> None:
    assert (milliseconds(0.0123), milliseconds(12.345)) == ("12.3 ms", "12.35 s")
    assert (size(2.5e9), size(3e6), percent(0.256)) == ("2.50 GB", "3.0 MB", "26 %")
