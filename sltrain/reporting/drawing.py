"""What all figures share: style, colours of the runs, and the conversion to PNG.

Figures must work on paper and screens and for colour-blind eyes: colours are those of Okabe and Ito, and each method
has its own line style and marker. Up to `FEW` runs each have a colour and a name; of more, only the best do, and the
others are grey.
"""

import io
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sltrain.reporting.rows import Row
from sltrain.reporting.table import elide

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

FEW = 7  # runs with a colour and a name
NUM_BEST = 5  # runs with a colour if there are more
MAX_LABEL = 30  # characters
DPI = 160
WIDTH = 7.2  # inches; text stays readable on a phone

# Okabe and Ito's; their yellow is invisible on white.
BLUE, VERMILLION, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
ORANGE, PURPLE, SKY_BLUE = "#E69F00", "#CC79A7", "#56B4E9"
COLOURS = (BLUE, VERMILLION, GREEN, BLACK, ORANGE, PURPLE, SKY_BLUE)
GREY = "#9a9a9a"
MARKERS = ("^", "s", "o", "D", "v", "<", ">", "P", "X")
LINES: tuple[Any, ...] = ("-.", "--", "-", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
BEST_LINES: tuple[Any, ...] = ("-", "--", ":", "-.")

STYLE: Any = {
    "font.family": "DejaVu Sans",  # part of matplotlib
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,  # a name may contain a $
}


@dataclass
class Picture:
    """One figure as a PNG file with its texts."""

    file_name: str
    title: str
    caption: str
    alt: str  # alternative text
    png: bytes


@contextmanager
def our_style() -> Iterator[None]:
    """Draw in the style of this file instead of the user's."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters missing from the font
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def colours_of(rows: list[Row]) -> dict[str, str]:
    """The colour of each named run, the same in all figures. The other runs are grey. Rows that are each the best of
    something are all named."""
    num_named = len(rows) if len(rows) <= FEW or are_best(rows) else NUM_BEST
    return {row.name: colour for row, colour in zip(rows[:num_named], itertools.cycle(COLOURS), strict=False)}


def are_best(rows: list[Row]) -> bool:
    """Whether the rows were chosen by --best."""
    return any(row.best_of for row in rows)


def method_styles(rows: list[Row]) -> dict[str, tuple[Any, str]]:
    """Line style and marker of each method among the rows, in alphabetical order; of rows that are each the best of
    something, of each row, so that colour and style together tell all apart."""
    methods = [method_of(row) for row in rows] if are_best(rows) else sorted({method_of(row) for row in rows})
    lines, times = (BEST_LINES, len(COLOURS)) if are_best(rows) else (LINES, 1)
    return {m: (lines[i // times % len(lines)], MARKERS[i % len(MARKERS)]) for i, m in enumerate(methods)}


def method_of(row: Row) -> str:
    """What line styles and markers tell apart, in legends: the method, or what the row is the best of."""
    return row.best_of or row.method or "unknown"


def label_of(row: Row) -> str:
    """The name of a run in figures."""
    return elide(row.best_of or row.name, MAX_LABEL)


def tick_labels(write: Callable[[float], str]) -> Any:
    """A formatter of an axis."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, position: write(value))


def new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.add_subplot()


def legend_below(axes: "Axes", handles: "list[Line2D]", labels: list[str], ncols: int) -> None:
    """A legend below the plot, where it covers nothing."""
    style: Any = {"columnspacing": 2, "handlelength": 3.2, "borderaxespad": 0}
    axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=ncols, **style)


def to_picture(figure: "Figure", file_name: str, title: str, caption: str, alt: str) -> Picture:
    out = io.BytesIO()
    figure.savefig(out, format="png", bbox_inches="tight", pad_inches=0.15, metadata={"Software": None})
    return Picture(file_name, title, caption, alt, out.getvalue())
