"""Memory against perplexity as in figure 1 of arXiv 2406.02214: a bubble a run, its area the number of parameters."""

import math
from typing import TYPE_CHECKING

from sltrain.reporting.drawing import (
    GREY,
    MAX_LABEL,
    WIDTH,
    Picture,
    colours_of,
    legend_below,
    method_of,
    method_styles,
    new_figure,
    tick_labels,
    to_picture,
)
from sltrain.reporting.rows import Row
from sltrain.reporting.table import elide, gigabytes, perplexity, plain, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_memory(rows: list[Row]) -> Picture | None:
    """Peak memory against perplexity, or against bits per byte if perplexities do not compare. The memory is that of
    tensors if all runs have measured it, because that of a process hides a small model."""
    colours = colours_of(rows)
    key = "bits_per_byte" if any(row.group for row in rows) else "perplexity"
    quality = key.replace("_", " ")
    rows = [row for row in rows if row.peak_memory_bytes and math.isfinite(getattr(row, key) or math.nan)]
    if not rows:
        return None
    styles = method_styles(rows)
    figure, axes = new_figure(WIDTH, 4.6)
    is_of_tensors = all(row.peak_tensor_bytes for row in rows)
    x = [((row.peak_tensor_bytes if is_of_tensors else row.peak_memory_bytes) or 0) / 1e9 for row in rows]
    y = [float(getattr(row, key)) for row in rows]
    largest = max(row.num_parameters or 0 for row in rows)
    area = [_area(row.num_parameters, largest) for row in rows]
    for i in sorted(range(len(rows)), key=lambda i: (rows[i].name in colours, -area[i])):  # named and small ones on top
        colour, marker = colours.get(rows[i].name, GREY), styles[method_of(rows[i])][1]
        face = colour if rows[i].is_complete else "none"
        axes.scatter(x[i], y[i], s=area[i], marker=marker, facecolor=face, edgecolor=colour, alpha=0.55, linewidth=1.2)
        axes.scatter(x[i], y[i], s=6, color=colour, zorder=3)
    _scale_memory_axes(axes, is_log=key == "perplexity" and max(y) > 5 * min(y))
    measures = {"tensors" if is_of_tensors else row.peak_memory_measure for row in rows}
    words = {"process": "of the process (CPU)", "tensors": "of tensors"}
    axes.set_xlabel("peak memory, GB, " + ", ".join(words[name] for name in words if name in measures))
    axes.set_ylabel(quality)
    _bubble_legend(axes, rows, colours)
    sizes = sorted({row.num_parameters for row in rows if row.num_parameters})
    ends = " to ".join(map(short, dict.fromkeys([*sizes[:1], *sizes[-1:]])))
    num_grey = sum(row.name not in colours for row in rows)
    caption = (
        f"Peak memory and {quality}, lower left is better; the area is the number of parameters"
        + (f", {ends}" if ends else "")
        + (", hollow bubbles are unfinished runs" if any(not row.is_complete for row in rows) else "")
        + (f"; grey are {num_grey} more runs of the table" if num_grey else "")
        + (". A process takes more memory than its tensors: compare CPU with CPU" if len(measures) > 1 else "")
        + "."
    )
    alt = (
        f"Peak memory and {quality} of {len(rows)} run{'s' * (len(rows) > 1)}; the best, {rows[0].name}, has"
        f" {perplexity(y[0])} at {gigabytes(x[0] * 1e9)}."
    )
    return to_picture(figure, "memory.png", f"Memory and {quality}", caption, alt)


def _area(num_parameters: int | None, largest: int) -> float:
    """The area of a bubble, square points."""
    return 620 * num_parameters / largest if num_parameters else 30


def _scale_memory_axes(axes: "Axes", is_log: bool) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    if is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(tick_labels(plain))
    axes.xaxis.set_major_formatter(tick_labels(plain))
    axes.margins(0.22, 0.18)  # whole bubbles inside the frame
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))


def _bubble_legend(axes: "Axes", rows: list[Row], colours: dict[str, str]) -> None:
    """Runs by colour, then methods by marker."""
    from matplotlib.lines import Line2D

    styles = method_styles(rows)
    named = [row for row in rows if row.name in colours]
    entries = [(elide(row.name, MAX_LABEL), styles[method_of(row)][1], colours[row.name]) for row in named]
    entries += [(method, marker, "#777777") for method, (_, marker) in styles.items()]
    handles = [Line2D([], [], linestyle="none", marker=m, markersize=8, color=colour) for _, m, colour in entries]
    legend_below(axes, handles, [label for label, *_ in entries], ncols=2, columnspacing=2, handlelength=3.2)
