"""Figures are PNGs that are there when there are numbers, and whose text does not overlap."""

import io
import itertools
import math
import random
from typing import Any

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from PIL import Image

from sltrain.reporting import figures, memory_figure
from sltrain.reporting.comparison import arrange
from sltrain.reporting.drawing import FEW, MAX_LABEL, NUM_BEST
from sltrain.reporting.figures import draw_all, draw_heat_maps, draw_loss, smooth
from sltrain.reporting.memory_figure import draw_memory
from sltrain.reporting.rows import Curve, Point, Row


def make_rows(number: int, **same: Any) -> list[Row]:
    """Runs of all methods, many of them close to each other."""
    rng = random.Random(number)
    rows = []
    for i in range(number):
        perplexity = 20 + rng.random() * 5
        row = Row(f"rank-{i}_$a_1$", "finished" if i % 4 else "crashed", method=("sltrain", "full", "low_rank")[i % 3])
        row.perplexity, row.bits_per_byte, row.loss = perplexity, perplexity / 20, math.log(perplexity)
        row.peak_memory_bytes, row.peak_memory_measure = int(2e9 + rng.random() * 1e8), "process"
        row.num_parameters, row.tokenizer_hash = rng.randrange(10**6, 10**8), "t"
        vars(row).update(same)
        rows.append(row)
    return rows


def curve(num_lines: int, clock: bool = True, diverges: bool = False) -> Curve:
    losses = [3 + 5 / (1 + i) + (1e6 if diverges and i > 5 else 0) for i in range(num_lines)]
    train = [Point(1000.0 * i, 2.0 * i if clock else None, loss) for i, loss in enumerate(losses)]
    return Curve(train, train[::10])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures of which the pictures are made."""
    kept: list[Any] = []
    make = figures.new_figure

    def keep(*size: float) -> Any:
        kept.append(make(*size))
        return kept[-1]

    monkeypatch.setattr(figures, "new_figure", keep)
    monkeypatch.setattr(memory_figure, "new_figure", keep)
    return kept


@pytest.fixture
def seen_texts(monkeypatch: pytest.MonkeyPatch) -> dict[Any, dict[Any, tuple[str, Any]]]:
    """Figure -> piece of text -> its words and bounding box, of everything that was drawn last."""
    seen: dict[Any, dict[Any, tuple[str, Any]]] = {}
    draw = matplotlib.text.Text.draw

    def note(self: Any, renderer: Any) -> None:
        if self.get_visible() and self.get_text().strip():
            box = matplotlib.text.Text.get_window_extent(self, renderer)  # without an arrow
            seen.setdefault(self.get_figure(), {})[self] = (self.get_text(), box)
        draw(self, renderer)

    monkeypatch.setattr(matplotlib.text.Text, "draw", note)
    return seen


def legend_of(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


# ---- all of them


def test_all_figures_are_pngs_with_alternative_text() -> None:
    rows = arrange(make_rows(3))
    pictures = draw_all(rows, {row.name: curve(40) for row in rows})
    assert [picture.file_name for picture in pictures] == ["loss_tokens.png", "loss_time.png", "memory.png"]
    for picture in pictures:
        image = Image.open(io.BytesIO(picture.png))
        image.load()
        assert image.format == "PNG" and image.width > 600
        assert len(set(image.convert("L").tobytes())) > 10
        assert picture.alt and picture.caption.endswith(".") and picture.title


def test_without_numbers_there_is_no_figure() -> None:
    rows = [Row("a", "not started"), Row("b", "diverged", loss=math.nan, perplexity=math.nan, peak_memory_bytes=5)]
    nan = Curve([Point(1.0, 1.0, math.nan), Point(2.0, 2.0, math.nan)])
    assert draw_all(rows, {"a": Curve(), "b": nan}) == []


def test_what_the_user_draws_with_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = arrange(make_rows(2))
    before = [picture.png for picture in draw_all(rows, {})]
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "red")
    assert [picture.png for picture in draw_all(rows, {})] == before
    assert matplotlib.rcParams["axes.facecolor"] == "red"


def assert_no_overlap(texts: dict[Any, tuple[str, Any]]) -> None:
    for (one, a), (other, b) in itertools.combinations(texts.values(), 2):
        overlap = a.x0 < b.x1 - 1 and b.x0 < a.x1 - 1 and a.y0 < b.y1 - 1 and b.y0 < a.y1 - 1
        assert not overlap, (one, other)


@pytest.mark.parametrize("number", [1, 3, FEW, 30])
def test_no_text_overlaps_another(seen_texts: dict[Any, dict[Any, tuple[str, Any]]], number: int) -> None:
    rows = arrange(make_rows(number))
    rows += make_heat_map_rows((8, 16, 32), (0.01, 0.05, 0.1))
    draw_all(rows, {row.name: curve(300) for row in rows})
    assert len(seen_texts) == 4
    for texts in seen_texts.values():
        assert_no_overlap(texts)


# ---- loss


@given(st.lists(st.floats(-1e3, 1e3), max_size=500), st.integers(1, 300))
def test_smoothing_keeps_order_and_mean(values: list[float], max_points: int) -> None:
    smoothed = smooth([(float(i), value) for i, value in enumerate(values)], max_points)
    assert len(smoothed) <= max_points
    assert [x for x, _ in smoothed] == sorted(x for x, _ in smoothed)
    if len(values) <= max_points:
        assert [y for _, y in smoothed] == values
    size = math.ceil(len(values) / max_points)
    if values and len(values) % size == 0:  # pieces of one size: the mean stays
        assert math.isclose(sum(y for _, y in smoothed) / len(smoothed), sum(values) / len(values), abs_tol=1e-6)


def test_a_folder_without_a_clock_is_drawn_against_tokens_alone() -> None:
    rows = make_rows(1)
    curves = {rows[0].name: curve(20, clock=False)}
    assert draw_loss(rows, curves, "tokens") is not None and draw_loss(rows, curves, "time") is None


def test_the_lines_are_the_numbers(drawn: list[Any]) -> None:
    rows = make_rows(2)
    curves = {row.name: curve(20) for row in rows}
    draw_loss(rows, curves, "time")
    lines = [line for line in drawn[0][1].get_lines() if line.get_linestyle() != "None"]
    assert len(lines) == 2
    assert list(lines[0].get_ydata()) == [point.loss for point in curves[rows[1].name].train]
    assert list(lines[0].get_xdata()) == [point.wall_seconds for point in curves[rows[1].name].train]


def test_a_run_that_diverges_does_not_press_the_others_flat(drawn: list[Any]) -> None:
    rows = make_rows(3)
    curves = {row.name: curve(50, diverges=i == 2) for i, row in enumerate(rows)}
    picture = draw_loss(rows, curves, "tokens")
    assert drawn[0][1].get_ylim()[1] < 12
    assert picture is not None and "outside the picture" in picture.caption


def test_of_many_runs_the_best_are_named_and_the_others_counted(drawn: list[Any]) -> None:
    rows = arrange(make_rows(30))
    draw_loss(rows, {row.name: curve(20) for row in rows}, "tokens")
    labels = legend_of(drawn[0][1])
    assert labels[:NUM_BEST] == [row.name for row in rows[:NUM_BEST]]
    assert sum(int(label.split()[0]) for label in labels[NUM_BEST:]) == 30 - NUM_BEST


# ---- memory


def test_bubbles_stand_where_the_numbers_are_and_are_as_large(drawn: list[Any]) -> None:
    rows = arrange(make_rows(4))
    picture = draw_memory(rows)
    bubbles = [collection for collection in drawn[0][1].collections if collection.get_sizes()[0] != 6]
    seen = {(*bubble.get_offsets()[0].tolist(), float(bubble.get_sizes()[0])) for bubble in bubbles}
    unit = max(area for _, _, area in seen) / max(row.num_parameters or 0 for row in rows)
    expected = {((row.peak_memory_bytes or 0) / 1e9, row.perplexity, (row.num_parameters or 0) * unit) for row in rows}
    assert sorted(seen) == [pytest.approx(one) for one in sorted(expected)]
    assert picture is not None and "the area is the number of parameters, 3.66M to 54.16M" in picture.caption
    assert legend_of(drawn[0][1]) == [*(row.name for row in rows), "full", "low_rank", "sltrain"]


def test_where_perplexities_do_not_compare_bits_per_byte_are_drawn(drawn: list[Any]) -> None:
    rows = make_rows(4)
    for i, row in enumerate(rows):
        row.tokenizer_hash = str(i % 2)
    picture = draw_memory(arrange(rows))
    assert picture is not None and "bits per byte" in picture.caption
    assert drawn[0][1].get_ylabel() == "bits per byte"


def test_a_large_range_is_drawn_on_a_log_axis(drawn: list[Any]) -> None:
    rows = make_rows(3)
    draw_memory(rows)
    rows[0].perplexity = 1e4
    draw_memory(rows)
    assert [axes.get_yscale() for _, axes in drawn] == ["linear", "log"]


def test_a_bubble_has_the_colour_and_marker_of_its_name_in_the_legend(drawn: list[Any]) -> None:
    rows = arrange(make_rows(30))
    picture = draw_memory(rows)
    assert picture is not None and f"grey are {30 - NUM_BEST} more runs" in picture.caption
    axes = drawn[0][1]
    handles = axes.get_legend().legend_handles[:NUM_BEST]
    assert legend_of(axes)[:NUM_BEST] == [row.name for row in rows[:NUM_BEST]]
    points = {
        (*dot.get_offsets()[0].tolist(), to_hex(dot.get_facecolor()[0]).upper())
        for dot in axes.collections
        if dot.get_sizes()[0] == 6
    }
    for row, handle in zip(rows, handles, strict=False):
        assert ((row.peak_memory_bytes or 0) / 1e9, row.perplexity, handle.get_color()) in points
    methods = {row.method: handle.get_marker() for row, handle in zip(rows, handles, strict=False)}
    assert len(set(methods.values())) == len(methods) > 1


def test_long_names_are_shortened(drawn: list[Any], seen_texts: dict[Any, dict[Any, tuple[str, Any]]]) -> None:
    crowd = make_rows(FEW, perplexity=20.0, peak_memory_bytes=2 * 10**9, num_parameters=10**8)
    for i, row in enumerate(crowd):
        row.name = f"{i}{'x' * 200}"
    draw_memory(crowd)
    assert max(map(len, legend_of(drawn[0][1]))) == MAX_LABEL
    assert_no_overlap(seen_texts[drawn[0][0]])


# ---- the best of each


def test_the_best_of_each_are_all_named_and_told_apart(
    drawn: list[Any], seen_texts: dict[Any, dict[Any, tuple[str, Any]]]
) -> None:
    rows = arrange(make_rows(15, status="finished"))
    for i, row in enumerate(rows):
        row.best_of = f"method_{i}"
    draw_loss(rows, {row.name: curve(20) for row in rows}, "tokens")
    axes = drawn[0][1]
    assert legend_of(axes) == [row.best_of for row in rows]
    handles = axes.get_legend().legend_handles
    assert len({(handle.get_color(), handle.get_linestyle()) for handle in handles}) == len(rows)
    assert draw_memory(rows) is not None
    axes = drawn[1][1]
    said = {text.get_text(): text.xy for text in axes.texts if text.get_text()}
    assert said == {row.best_of: ((row.peak_memory_bytes or 0) / 1e9, row.perplexity) for row in rows}
    assert axes.get_legend() is None
    for figure, _ in drawn:
        assert_no_overlap(seen_texts[figure])


# ---- heat map


def make_heat_map_rows(ranks: tuple[int, ...], sparsities: tuple[float, ...], **same: Any) -> list[Row]:
    return [
        Row(
            **{
                "name": f"r{rank}s{sparsity}",
                "status": "finished",
                "method": "sltrain",
                "rank": rank,
                "sparsity": sparsity,
                "alpha": 8.0,
                "lr": 0.003,
                "perplexity": 100 / rank + sparsity,
                "recipe": "r",
                **same,
            }
        )
        for rank in ranks
        for sparsity in sparsities
    ]


def test_each_cell_says_its_perplexity(drawn: list[Any]) -> None:
    rows = make_heat_map_rows((8, 16), (0.01, 0.05, 0.1))
    del rows[3]
    (picture,) = draw_heat_maps(rows)
    axes = drawn[0][1]
    said = {
        (int(axes.get_yticklabels()[round(y)].get_text()), float(axes.get_xticklabels()[round(x)].get_text())): text
        for text in axes.texts
        for x, y in [text.get_position()]
    }
    assert {cell: text.get_text() for cell, text in said.items()} == {
        (row.rank, row.sparsity): f"{row.perplexity:.2f}" for row in rows
    }
    assert len(axes.patches) == 1 and axes.patches[0].get_hatch() and "hatched" in picture.caption
    assert picture.file_name == "heat_map_1.png" and "rank 16 and sparsity 0.05" in picture.alt


def test_one_map_for_each_set_that_is_equal_in_all_else() -> None:
    one, two = make_heat_map_rows((8, 16), (0.01, 0.05)), make_heat_map_rows((8, 16), (0.01, 0.05), recipe="other")
    three = make_heat_map_rows((8, 16), (0.01, 0.05), dtype="other")
    assert [picture.file_name[-5] for picture in draw_heat_maps(one + two + three)] == ["1", "2", "3"]
    (picture,) = draw_heat_maps(one + one)
    assert "mean" in picture.caption


@pytest.mark.parametrize(
    "same", [{"sparsity": None}, {"status": "crashed"}, {"perplexity": math.nan}, {"recipe": ""}, {"rank": 8}]
)
def test_no_map_of_what_is_not_a_grid_of_finished_runs(same: dict[str, Any]) -> None:
    assert draw_heat_maps(make_heat_map_rows((8, 16), (0.01, 0.05), **same)) == []
