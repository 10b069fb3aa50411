"""The memory-perplexity plane, as figure 1 of arXiv 2406.02214: a run is a bubble, its area the number of parameters.

Names stand beside their bubbles, where nothing else is: text is measured before it is placed.
"""

import itertools
import math
from typing import TYPE_CHECKING, Any

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
    from matplotlib.figure import Figure

ANGLES = (0, 330, 30, 300, 60, 270, 90, 180, 210, 150, 240, 120)  # where a name is looked for first, in degrees
Box = tuple[float, float, float, float]  # left, low, right, high, in pixels


def draw_memory(rows: list[Row]) -> Picture | None:
    """Peak memory beside perplexity, or bits per byte where perplexities do not compare; area = parameters. The memory
    is that of tensors if all runs have measured it: a small model's is lost in that of a process."""
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
    order = sorted(range(len(rows)), key=lambda i: (rows[i].name in colours, -area[i]))  # named and small ones on top
    for i, row in ((i, rows[i]) for i in order):
        colour, marker = colours.get(row.name, GREY), styles[method_of(row)][1]
        face = colour if row.is_complete else "none"
        axes.scatter(x[i], y[i], s=area[i], marker=marker, facecolor=face, edgecolor=colour, alpha=0.55, linewidth=1.2)
        axes.scatter(x[i], y[i], s=6, color=colour, zorder=3)
    _scale_memory_axes(axes, is_log=key == "perplexity" and max(y) > 5 * min(y))
    measures = {"tensors" if is_of_tensors else row.peak_memory_measure for row in rows}
    words = {"process": "of the process (CPU)", "tensors": "of tensors"}
    axes.set_xlabel("peak memory, GB, " + ", ".join(words[name] for name in words if name in measures))
    axes.set_ylabel(quality)
    _bubble_legend(axes, rows, largest)
    named = [i for i, row in enumerate(rows) if row.name in colours]
    num_unnamed = len(rows) - _label_points(figure, axes, rows, x, y, area, named)
    caption = (
        f"Peak memory beside {quality}, lower left is better; the area is the number of parameters"
        + (", hollow bubbles are of unfinished runs" if any(not row.is_complete for row in rows) else "")
        + (f"; runs not named here: {num_unnamed}, see the table" if num_unnamed else "")
        + (". A process is larger than its tensors: compare CPU with CPU" if len(measures) > 1 else "")
        + "."
    )
    alt = (
        f"Peak memory and {quality} of {len(rows)} run{'s' * (len(rows) > 1)}; the best, {rows[0].name}, has"
        f" {perplexity(y[0])} at {gigabytes(x[0] * 1e9)}."
    )
    return to_picture(figure, "memory.png", f"Memory and {quality}", caption, alt)


def _area(num_parameters: int | None, largest: int) -> float:
    """In square points."""
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
    axes.margins(0.22, 0.18)  # room for names
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))


def _bubble_legend(axes: "Axes", rows: list[Row], largest: int) -> None:
    """Below the plot: methods by marker, then the smallest and the largest size."""
    from matplotlib.lines import Line2D

    handles, labels = [], []
    for method, (_, marker) in method_styles(rows).items():
        handles.append(Line2D([], [], linestyle="none", marker=marker, markersize=8, color="#777777"))
        labels.append(method)
    sizes = sorted({row.num_parameters for row in rows if row.num_parameters})
    for size in sizes[:: max(len(sizes) - 1, 1)]:
        diameter = math.sqrt(_area(size, largest))
        handles.append(Line2D([], [], linestyle="none", marker="o", markersize=diameter, color="#cccccc"))
        labels.append(f"{short(size)} parameters")
    legend_below(axes, handles, labels, ncols=min(len(handles), 5), columnspacing=1.6, handlelength=2)


# ---- names


def _label_points(
    figure: "Figure", axes: "Axes", rows: list[Row], x: list[float], y: list[float], area: list[float], named: list[int]
) -> int:
    """Write the names of some rows beside their bubbles, the best first, each where no other name, no line to one and
    no bubble is, or at least no middle of a bubble; farther ones get a line. How many found room."""
    figure.draw_without_rendering()  # the layout must stand before anything is measured
    figure.set_layout_engine("none")
    frame = axes.get_window_extent().extents
    scale = figure.dpi / 72
    centres = axes.transData.transform(list(zip(x, y, strict=True)))
    radii = [math.sqrt(size) / 2 * scale for size in area]
    bubbles = [_around(centre, radius, radius) for centre, radius in zip(centres, radii, strict=True)]
    middles = [_around(centre, 5 * scale, 5 * scale) for centre in centres]
    places = list(itertools.product((bubbles, middles), (4, 14, 28, 46, 70, 100), ANGLES))
    names: list[Box] = []
    lines: list[Box] = []  # as small boxes along them
    for i in named:
        width, height = _text_size(axes, elide(rows[i].name, MAX_LABEL))
        for avoided, gap, angle in places:
            reach, across, up = radii[i] + gap * scale, math.cos(math.radians(angle)), math.sin(math.radians(angle))
            way = [across * (reach + width / 2), up * (reach + height / 2)]
            box = _around(centres[i] + way, width / 2 + 2, height / 2 + 2)
            line = [_around(centres[i] + [k / 12 * w for w in way], 1, 1) for k in range(13)] if gap > 4 else []
            taken = [*(other for j, other in enumerate(avoided) if j != i), *names, *lines]
            in_the_way = [*names, *(middle for j, middle in enumerate(middles) if j != i)]
            if _is_free([box], taken) and _is_free(line, in_the_way) and _is_inside(box, frame):
                corner = axes.transData.inverted().transform((box[0] + 2, box[1] + 2))
                _write(axes, rows[i], (x[i], y[i]), corner, far=gap > 4)
                names.append(box)
                lines += line
                break
    return len(names)


def _text_size(axes: "Axes", text: str) -> Any:
    drawn = axes.text(0, 0, text, fontsize=8.5)
    size = drawn.get_window_extent().size
    drawn.remove()
    return size


def _write(axes: "Axes", row: Row, point: tuple[float, float], corner: Any, far: bool) -> None:
    line = {"arrowstyle": "-", "color": "#777777", "linewidth": 0.7, "relpos": (0.5, 0.5), "shrinkB": 4}
    axes.annotate(
        elide(row.name, MAX_LABEL),
        point,
        xytext=tuple(corner),
        textcoords="data",
        fontsize=8.5,
        zorder=4,
        arrowprops=line if far else None,
    )


def _around(centre: Any, half_width: float, half_height: float) -> Box:
    x, y = centre
    return x - half_width, y - half_height, x + half_width, y + half_height


def _is_free(boxes: list[Box], taken: list[Box]) -> bool:
    return not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a in boxes for b in taken)


def _is_inside(box: Box, frame: Any) -> bool:
    return bool(box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3])
