"""The figures of a report: loss over training, memory and perplexity, perplexity over rank and sparsity.

Figures without numbers are omitted.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sltrain.reporting.drawing import (
    GREY,
    MARKERS,
    WIDTH,
    Picture,
    are_best,
    colours_of,
    label_of,
    legend_below,
    method_of,
    method_styles,
    new_figure,
    our_style,
    tick_labels,
    to_picture,
)
from sltrain.reporting.memory_figure import draw_memory
from sltrain.reporting.rows import Curve, Point, Row
from sltrain.reporting.table import perplexity, plain, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 100  # of a line; denser ones are averaged


def draw_all(rows: list[Row], curves: dict[str, Curve]) -> list[Picture]:
    """Every figure that arranged rows have numbers for; `curves` by name of the row."""
    with our_style():
        drawn = [draw_loss(rows, curves, "tokens"), draw_loss(rows, curves, "time"), draw_memory(rows)]
        return [picture for picture in [*drawn, *draw_heat_maps(rows)] if picture is not None]


# ---- loss


def smooth(points: Sequence[tuple[float, float]], max_points: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `max_points` points, each the mean of neighbours."""
    size = math.ceil(len(points) / max_points)
    pieces = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [(statistics.fmean(x for x, _ in piece), statistics.fmean(y for _, y in piece)) for piece in pieces]


def draw_loss(rows: list[Row], curves: dict[str, Curve], against: str) -> Picture | None:
    """Training loss as lines and validation losses as markers, against `tokens` or `time`."""
    from matplotlib.lines import Line2D

    place, what, label, write = _axis(curves, against)
    lines = [(row, place(curves[row.name].train), place(curves[row.name].evals)) for row in rows if row.name in curves]
    lines = [line for line in lines if sum(math.isfinite(y) for _, y in line[1]) > 1]
    if not lines:
        return None
    figure, axes = new_figure(WIDTH, 4.3)
    colours, styles = colours_of(rows), method_styles(rows)
    named: list[tuple[Line2D, str]] = []
    for number, (row, train, evals) in reversed(list(enumerate(lines))):  # the best on top
        colour = colours.get(row.name)
        line = {"color": colour or GREY, "linestyle": styles[method_of(row)][0], "linewidth": 1.4 if colour else 0.6}
        points: dict[str, Any] = {"color": colour, "linestyle": "none", "zorder": 3, "markeredgecolor": "white"}
        points |= {"marker": MARKERS[number % len(MARKERS)], "markersize": 6}
        axes.plot(*zip(*smooth(train), strict=True), **line)
        if row.name in colours:
            if evals:
                axes.plot(*zip(*evals, strict=True), **points)
            named.insert(0, (Line2D([], [], **{**points, **line}), label_of(row)))
    others = [method_of(row) for row, _, _ in lines if row.name not in colours]
    for method in sorted(set(others)):
        handle = Line2D([], [], color=GREY, linestyle=styles[method][0], linewidth=1)
        named.append((handle, f"{others.count(method)} more of {method}"))
    handles, labels = zip(*named, strict=True)
    legend_below(axes, list(handles), list(labels), ncols=4 if are_best(rows) else 2)
    beyond = _cut_loss_axis(axes, [smooth(train) for _, train, _ in lines])
    axes.set_ylabel("loss, nats per token")
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(tick_labels(write))
    axes.set_xlim(left=0)
    dense = max(len(train) for _, train, _ in lines)
    caption = (
        "Lines are the training loss"
        + (f" (means over up to {math.ceil(dense / MAX_POINTS)} log lines)" if dense > MAX_POINTS else "")
        + ", markers the validation loss"
        + (" of the best runs" if others else "")
        + f".{beyond}"
        + (" Losses per token compare only within a set." if any(row.group for row in rows) else "")
    )
    alt = f"Training loss of {len(lines)} run{'s' * (len(lines) > 1)} against {what}, the first {lines[0][0].name}."
    return to_picture(figure, f"loss_{against}.png", f"Loss against {what}", caption, alt)


def _axis(
    curves: dict[str, Curve], against: str
) -> tuple[Callable[[list[Point]], list[tuple[float, float]]], str, str, Callable[[float], str]]:
    """How points become coordinates, the name of the x axis, its label, and the format of its numbers."""
    if against == "tokens":
        return lambda points: [(p.tokens, p.loss) for p in points], "tokens", "tokens trained on", short
    longest = max((p.wall_seconds or 0 for curve in curves.values() for p in curve.train + curve.evals), default=0)
    units = ((3600, "hours"), (60, "minutes"))
    unit, name = next(((unit, name) for unit, name in units if longest >= 2 * unit), (1, "seconds"))

    def place(points: list[Point]) -> list[tuple[float, float]]:
        return [(p.wall_seconds / unit, p.loss) for p in points if p.wall_seconds is not None]

    return place, "wall time", f"wall time, {name}", plain


def _cut_loss_axis(axes: "Axes", lines: list[list[tuple[float, float]]]) -> str:
    """Limit the axis, and return the sentence about it for the caption. The limit is the highest loss after the first
    twentieth of training, which would hide the differences later, but at most 1.5 times the median over the runs, so
    that a diverging run does not flatten the others."""
    later = [[y for _, y in line[len(line) // 20 + 1 :] if math.isfinite(y)] for line in lines]
    starts = [max(losses) for losses in later if losses]
    if not starts:
        return ""
    top = 1.02 * min(max(starts), 1.5 * statistics.median(starts))
    if top >= max(y for line in lines for _, y in line if math.isfinite(y)):
        return ""
    axes.set_ylim(top=top)
    return f" Losses above {top:.1f}, such as those at the start, are outside the picture."


# ---- rank and sparsity


def draw_heat_maps(rows: list[Row]) -> list[Picture]:
    """Perplexity over rank and sparsity, one figure for each set of finished runs that differ in nothing else."""
    families: dict[tuple[str, str, str | None], list[Row]] = {}
    for row in rows:
        has_place = row.recipe and row.rank is not None and row.sparsity is not None
        if has_place and row.is_complete and row.is_evaluated:
            families.setdefault((row.recipe, row.group, row.dtype), []).append(row)
    pictures: list[Picture] = []
    for members in families.values():
        cells: dict[tuple[int, float], list[float]] = {}
        for row in members:
            cells.setdefault((row.rank or 0, row.sparsity or 0.0), []).append(row.perplexity or math.nan)
        if len({rank for rank, _ in cells}) > 1 and len({sparsity for _, sparsity in cells}) > 1:
            means = {cell: statistics.fmean(values) for cell, values in cells.items()}
            pictures.append(_heat_map(members, means, len(pictures) + 1))
    return pictures


def _heat_map(members: list[Row], cells: dict[tuple[int, float], float], number: int) -> Picture:
    from matplotlib.patches import Rectangle

    ranks, sparsities = sorted({rank for rank, _ in cells}), sorted({sparsity for _, sparsity in cells})
    grid = [[cells.get((rank, sparsity), math.nan) for sparsity in sparsities] for rank in ranks]
    figure, axes = new_figure(2.4 + 0.95 * len(sparsities), 1.6 + 0.6 * len(ranks))
    image = axes.imshow(grid, cmap="cividis", aspect="auto", origin="lower")
    axes.grid(False)
    low, high = min(cells.values()), max(cells.values())
    for i, j in itertools.product(range(len(ranks)), range(len(sparsities))):
        if math.isnan(grid[i][j]):
            empty: Any = {"facecolor": "white", "edgecolor": GREY, "hatch": "//", "linewidth": 0}
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, **empty))
        else:
            colour = "white" if grid[i][j] < low + 0.42 * (high - low) else "black"  # cividis starts dark
            axes.text(j, i, perplexity(grid[i][j]), ha="center", va="center", color=colour)
    axes.set_xticks(range(len(sparsities)), [plain(sparsity) for sparsity in sparsities])
    axes.set_yticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set_xlabel("sparsity")
    axes.set_ylabel("rank")
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.colorbar(image, ax=axes, label="perplexity", format=tick_labels(plain))
    (rank, sparsity), best = min(cells.items(), key=lambda item: item[1])
    first = members[0]
    what = f"{first.size or 'the model'}, alpha {plain(first.alpha or math.nan)}, lr {plain(first.lr or math.nan)}"
    caption = (
        f"Perplexity of finished runs over rank and sparsity, all else equal ({what}); darker is better"
        + (", hatched cells have no finished run" if len(cells) < len(ranks) * len(sparsities) else "")
        + (", cells with several runs show their mean" if len(cells) < len(members) else "")
        + "."
    )
    alt = f"Heat map of perplexity; the best is {perplexity(best)} at rank {rank} and sparsity {plain(sparsity)}."
    return to_picture(figure, f"heat_map_{number}.png", "Perplexity over rank and sparsity", caption, alt)
