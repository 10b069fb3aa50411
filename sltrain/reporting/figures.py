"""The figures of a report, as PNG: losses over training, memory beside perplexity, perplexity over rank and sparsity.

They are for paper as for screens, and for eyes that tell few colours apart: colours are those of Okabe and Ito, a
method has a line style and a marker. Up to `FEW` runs each have a colour and a name; of more, the best, and the others
are grey. Names stand below a plot or where nothing else is: text is measured before it is placed. A figure that no run
has numbers for is left out.
"""

import io
import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sltrain.reporting.rows import Curve, Point, Row
from sltrain.reporting.table import elide, gigabytes, perplexity, plain, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

FEW = 7  # runs with a colour and a name
NUM_BEST = 5  # runs that have one if there are more
MAX_POINTS = 100  # of a line; denser ones are averaged
MAX_LABEL = 30  # characters
DPI = 160
WIDTH = 7.2  # inches; on a phone that leaves letters large enough to read

# Okabe and Ito's; their yellow is invisible on white.
BLUE, VERMILLION, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
ORANGE, PURPLE, SKY_BLUE = "#E69F00", "#CC79A7", "#56B4E9"
COLOURS = (BLUE, VERMILLION, GREEN, BLACK, ORANGE, PURPLE, SKY_BLUE)
GREY = "#9a9a9a"
MARKERS = ("o", "s", "^", "D", "v", "<", ">")
METHODS = {"sltrain": ("-", "o"), "low_rank": ("--", "s"), "full": ("-.", "^")}
OTHER_METHOD = (":", "D")

STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,  # a name may hold a $
}


@dataclass
class Picture:
    """One figure: file name, what it says, and the PNG itself."""

    file_name: str
    title: str
    caption: str
    alt: str  # for who cannot see it
    png: bytes


def draw_all(rows: list[Row], curves: dict[str, Curve]) -> list[Picture]:
    """Every figure that these arranged rows have numbers for. `curves` go by the name of the row."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font lacks
        matplotlib.rcdefaults()  # not what the user draws with
        matplotlib.rcParams.update(STYLE)
        drawn = [draw_loss(rows, curves, "tokens"), draw_loss(rows, curves, "time"), draw_memory(rows)]
        return [picture for picture in [*drawn, *draw_heat_maps(rows)] if picture is not None]


def colours_of(rows: list[Row]) -> dict[str, str]:
    """The colours of the named runs, the same in all figures. The others are grey."""
    num_named = len(rows) if len(rows) <= FEW else NUM_BEST
    return {row.name: colour for row, colour in zip(rows[:num_named], COLOURS, strict=False)}


def _method_style(method: str | None) -> tuple[Any, str]:
    """Line style and marker."""
    return METHODS.get(method or "", OTHER_METHOD)


def _tick_labels(write: Callable[[float], str]) -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, position: write(value))


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.add_subplot()


def _legend_below(axes: "Axes", handles: "list[Line2D]", labels: list[str], **style: Any) -> None:
    """A legend below the plot and its labels, where it covers nothing."""
    axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(0, -0.16), borderaxespad=0, **style)


def _picture(figure: "Figure", file_name: str, title: str, caption: str, alt: str) -> Picture:
    out = io.BytesIO()
    figure.savefig(out, format="png", bbox_inches="tight", pad_inches=0.15, metadata={"Software": None})
    return Picture(file_name, title, caption, alt, out.getvalue())


# ---- loss


def smooth(points: Sequence[tuple[float, float]], max_points: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Means over neighbours, so that at most `max_points` are left."""
    size = math.ceil(len(points) / max_points)
    pieces = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [(statistics.fmean(x for x, _ in piece), statistics.fmean(y for _, y in piece)) for piece in pieces]


def draw_loss(rows: list[Row], curves: dict[str, Curve], against: str) -> Picture | None:
    """Training loss and validation points against `tokens` or `time`."""
    from matplotlib.lines import Line2D

    place, what, label, write = _axis(curves, against)
    lines = [(row, place(curves[row.name].train), place(curves[row.name].evals)) for row in rows if row.name in curves]
    lines = [line for line in lines if sum(math.isfinite(y) for _, y in line[1]) > 1]
    if not lines:
        return None
    figure, axes = _figure(WIDTH, 4.3)
    colours = colours_of(rows)
    named: list[tuple[Line2D, str]] = []
    for number, (row, train, evals) in reversed(list(enumerate(lines))):  # the best on top
        line, points = _curve_styles(number, row, colours.get(row.name))
        axes.plot(*zip(*smooth(train), strict=True), **line)
        if row.name in colours:
            if evals:
                axes.plot(*zip(*evals, strict=True), **points)
            named.insert(0, (Line2D([], [], **{**points, **line}), elide(row.name, MAX_LABEL)))
    others = [row.method or "unknown" for row, _, _ in lines if row.name not in colours]
    for method in sorted(set(others)):
        handle = Line2D([], [], color=GREY, linestyle=_method_style(method)[0], linewidth=1)
        named.append((handle, f"{others.count(method)} more of {method}"))
    _legend_below(axes, *map(list, zip(*named, strict=True)), ncols=2, columnspacing=2, handlelength=3.2)
    beyond = _cut_loss_axis(axes, [smooth(train) for _, train, _ in lines])
    axes.set_ylabel("loss, nats a token")
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(_tick_labels(write))
    axes.set_xlim(left=0)
    dense = max(len(train) for _, train, _ in lines)
    caption = (
        "Lines are the training loss"
        + (f" (means over up to {math.ceil(dense / MAX_POINTS)} log lines)" if dense > MAX_POINTS else "")
        + ", markers the validation loss"
        + (" of the best runs" if others else "")
        + f".{beyond}"
    )
    alt = f"Training loss of {len(lines)} run{'s' * (len(lines) > 1)} against {what}, from {lines[0][0].name} on."
    return _picture(figure, f"loss_{against}.png", f"Loss against {what}", caption, alt)


def _axis(
    curves: dict[str, Curve], against: str
) -> tuple[Callable[[list[Point]], list[tuple[float, float]]], str, str, Callable[[float], str]]:
    """Where a loss is drawn, what it is drawn against, the label of that axis, and how its numbers are written."""
    if against == "tokens":
        return lambda points: [(p.tokens, p.loss) for p in points], "tokens", "tokens trained on", short
    longest = max((p.wall_seconds or 0 for curve in curves.values() for p in curve.train + curve.evals), default=0)
    units = ((3600, "hours"), (60, "minutes"))
    unit, name = next(((unit, name) for unit, name in units if longest >= 2 * unit), (1, "seconds"))

    def place(points: list[Point]) -> list[tuple[float, float]]:
        return [(p.wall_seconds / unit, p.loss) for p in points if p.wall_seconds is not None]

    return place, "wall time", f"wall time, {name}", plain


def _curve_styles(number: int, row: Row, colour: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the training loss of a run is drawn, and its validation points."""
    line = {"color": colour or GREY, "linestyle": _method_style(row.method)[0], "linewidth": 1.4 if colour else 0.6}
    marker = {"marker": MARKERS[number % len(MARKERS)], "markersize": 6, "markeredgecolor": "white"}
    return line, {"color": colour, "linestyle": "none", "zorder": 3, **marker}


def _cut_loss_axis(axes: "Axes", lines: list[list[tuple[float, float]]]) -> str:
    """End the axis where the first twentieth of training is over, so that the rest can be told apart, and at one and a
    half times what that is for most runs, so that one that diverges does not press them flat. What the caption says
    about it."""
    later = [[y for _, y in line[len(line) // 20 + 1 :] if math.isfinite(y)] for line in lines]
    starts = [max(losses) for losses in later if losses]
    if not starts:
        return ""
    top = 1.02 * min(max(starts), 1.5 * statistics.median(starts))
    if top >= max(y for line in lines for _, y in line if math.isfinite(y)):
        return ""
    axes.set_ylim(top=top)
    return f" Losses above {top:.1f}, as at the beginning, are outside the picture."


# ---- memory and perplexity


def draw_memory(rows: list[Row]) -> Picture | None:
    """Peak memory beside perplexity, or bits per byte where perplexities do not compare; area = parameters. The memory
    is that of tensors if all runs have measured it: a small model's is lost in that of a process."""
    colours = colours_of(rows)
    key = "bits_per_byte" if any(row.group for row in rows) else "perplexity"
    quality = key.replace("_", " ")
    rows = [row for row in rows if row.peak_memory_bytes and math.isfinite(getattr(row, key) or math.nan)]
    if not rows:
        return None
    figure, axes = _figure(WIDTH, 4.6)
    is_of_tensors = all(row.peak_tensor_bytes for row in rows)
    x = [((row.peak_tensor_bytes if is_of_tensors else row.peak_memory_bytes) or 0) / 1e9 for row in rows]
    y = [float(getattr(row, key)) for row in rows]
    largest = max(row.num_parameters or 0 for row in rows)
    area = [_area(row.num_parameters, largest) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (rows[i].name in colours, -area[i]))  # named and small ones on top
    for i, row in ((i, rows[i]) for i in order):
        colour, marker = colours.get(row.name, GREY), _method_style(row.method)[1]
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
        + (f"; {num_unnamed} runs are not named here, see the table" if num_unnamed else "")
        + (". A process is larger than its tensors: compare CPU with CPU" if len(measures) > 1 else "")
        + "."
    )
    alt = (
        f"Peak memory and {quality} of {len(rows)} run{'s' * (len(rows) > 1)}; the best, {rows[0].name}, has"
        f" {perplexity(y[0])} at {gigabytes(x[0] * 1e9)}."
    )
    return _picture(figure, "memory.png", f"Memory and {quality}", caption, alt)


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
    axes.yaxis.set_major_formatter(_tick_labels(plain))
    axes.xaxis.set_major_formatter(_tick_labels(plain))
    axes.margins(0.22, 0.18)  # room for names
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))


def _bubble_legend(axes: "Axes", rows: list[Row], largest: int) -> None:
    """Below the plot: methods by marker, then the smallest and the largest size."""
    from matplotlib.lines import Line2D

    handles, labels = [], []
    for method in sorted({row.method or "unknown" for row in rows}):
        handles.append(Line2D([], [], linestyle="none", marker=_method_style(method)[1], markersize=8, color="#777777"))
        labels.append(method)
    sizes = sorted({row.num_parameters for row in rows if row.num_parameters})
    for size in sizes[:: max(len(sizes) - 1, 1)]:
        diameter = math.sqrt(_area(size, largest))
        handles.append(Line2D([], [], linestyle="none", marker="o", markersize=diameter, color="#cccccc"))
        labels.append(f"{short(size)} parameters")
    _legend_below(axes, handles, labels, ncols=min(len(handles), 5), columnspacing=1.6, handlelength=2)


ANGLES = (0, 330, 30, 300, 60, 270, 90, 180, 210, 150, 240, 120)  # where a name is looked for first, in degrees
Box = tuple[float, float, float, float]  # left, low, right, high, in pixels


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


# ---- rank and sparsity


def draw_heat_maps(rows: list[Row]) -> list[Picture]:
    """Perplexity over rank and sparsity, one figure for each set of finished runs that are equal in all else."""
    families: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.method == "sltrain" and row.recipe and row.rank is not None and row.sparsity is not None:
            if row.is_complete and math.isfinite(row.perplexity or math.nan):
                families.setdefault((row.recipe, row.group), []).append(row)
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
    figure, axes = _figure(2.4 + 0.95 * len(sparsities), 1.6 + 0.6 * len(ranks))
    image = axes.imshow(grid, cmap="cividis", aspect="auto", origin="lower")
    axes.grid(False)
    low, high = min(cells.values()), max(cells.values())
    for i, j in itertools.product(range(len(ranks)), range(len(sparsities))):
        if math.isnan(grid[i][j]):
            empty: Any = {"facecolor": "white", "edgecolor": GREY, "hatch": "//", "linewidth": 0}
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, **empty))
        else:
            colour = "white" if grid[i][j] < low + 0.42 * (high - low) else "black"  # cividis begins dark
            axes.text(j, i, perplexity(grid[i][j]), ha="center", va="center", color=colour)
    axes.set_xticks(range(len(sparsities)), [plain(sparsity) for sparsity in sparsities])
    axes.set_yticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set_xlabel("sparsity")
    axes.set_ylabel("rank")
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.colorbar(image, ax=axes, label="perplexity", format=_tick_labels(plain))
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
    return _picture(figure, f"heat_map_{number}.png", "Perplexity over rank and sparsity", caption, alt)
