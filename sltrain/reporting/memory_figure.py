"""Memory against perplexity as in figure 1 of arXiv 2406.02214: a bubble a run, its area the number of parameters."""

import itertools
import math
from typing import TYPE_CHECKING, Any

from sltrain.reporting.drawing import (
    GREY,
    WIDTH,
    Picture,
    are_best,
    colours_of,
    label_of,
    legend_below,
    method_of,
    method_styles,
    new_figure,
    tick_labels,
    to_picture,
)
from sltrain.reporting.rows import Row
from sltrain.reporting.table import gigabytes, perplexity, plain, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AREA = 620  # of the largest bubble, square points
DOT = 14  # pixels around a point that no name may cover
LINE = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6}  # from a point to a name that is not beside it


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
    whole = AREA / 4 if are_best(rows) else AREA  # names stand beside the points
    area = [whole * row.num_parameters / largest if row.num_parameters else 30 for row in rows]
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
    if are_best(rows):
        _name_points(axes, [(x[i], y[i], label_of(row), colours[row.name]) for i, row in enumerate(rows)])
    else:
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


def _name_points(axes: "Axes", points: list[tuple[float, float, str, str]]) -> None:
    """The name of each point (x, y, name, colour) beside it, at the nearest place inside the frame that covers no other
    name or point, with a line to the point; at the farthest if there is none."""
    from matplotlib.transforms import Bbox

    figure: Any = axes.get_figure()
    figure.draw_without_rendering()  # fixes where points are
    frame = axes.get_window_extent()
    dots = [axes.transData.transform(point[:2]) for point in points]
    taken = [Bbox.from_extents(px - DOT, py - DOT, px + DOT, py + DOT) for px, py in dots]
    for x, y, name, colour in points:
        style: Any = {"textcoords": "offset points", "va": "center", "fontsize": 9, "color": colour}
        text: Any = axes.annotate(name, (x, y), (0, 0), **style)
        text.set_in_layout(False)
        for distance, angle in itertools.product((10, 18, 30, 45, 60), range(0, 360, 30)):
            dx, dy = distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
            text.xyann = (dx, dy)
            text.set_ha("left" if dx > 1 else "right" if dx < -1 else "center")
            box = text.get_window_extent()
            is_inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if is_inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        if distance > 18:
            axes.annotate("", (x, y), (dx, dy), textcoords="offset points", arrowprops=LINE).set_in_layout(False)


def _bubble_legend(axes: "Axes", rows: list[Row], colours: dict[str, str]) -> None:
    """Runs by colour, then methods by marker."""
    from matplotlib.lines import Line2D

    styles = method_styles(rows)
    named = [row for row in rows if row.name in colours]
    entries = [(label_of(row), styles[method_of(row)][1], colours[row.name]) for row in named]
    entries += [(method, marker, "#777777") for method, (_, marker) in styles.items()]
    handles = [Line2D([], [], linestyle="none", marker=m, markersize=8, color=colour) for _, m, colour in entries]
    legend_below(axes, handles, [label for label, *_ in entries], ncols=2)
