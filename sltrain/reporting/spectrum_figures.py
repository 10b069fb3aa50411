"""The figures of a spectrum, as PNG: singular values of W and of its parts, and the share of S in the energy.

Singular values are drawn as small multiples, a panel a layer, all with the same axes: rows are kinds of projection,
columns depths, as long as there are few depths. W is a broad pale line, so that the part which makes it can be seen on
top of it. The last values of a square matrix fall steeply, over many powers of ten; the log axis ends before most of
that fall, or it would show little else.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sltrain.reporting.drawing import COLOURS, DPI, MARKERS, WIDTH, Picture, our_style, to_picture
from sltrain.reporting.spectrum import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Place = tuple[str, int]  # kind of projection, and the number of the decoder layer it is in

MAX_COLUMNS = 4
MAX_PANELS = 28  # in one figure
SHOWN = 0.98  # of the values of each matrix
MAX_DECADES = 5  # of singular values on the axis
LINES: dict[str, dict[str, Any]] = {
    "whole": {"label": "W", "color": "#a6a6a6", "linestyle": "-", "linewidth": 3.4},
    "low_rank": {"label": "(alpha / rank) BA", "color": COLOURS[0], "linestyle": "--", "linewidth": 1.5},
    "sparse": {"label": "S", "color": COLOURS[1], "linestyle": "-.", "linewidth": 1.5},
}
RANK_LINE: dict[str, Any] = {"color": "#000000", "linestyle": ":", "linewidth": 0.9}


def draw_spectra(step: int, spectra: Mapping[Place, Spectrum]) -> list[Picture]:
    """The singular values of these layers, in their order, at `step`: one figure, or more if there are many panels."""
    places = list(spectra)
    pages = [places[first : first + MAX_PANELS] for first in range(0, len(places), MAX_PANELS)]
    pictures = []
    for number, page in enumerate(pages, 1):
        several = f", part {number} of {len(pages)}" if len(pages) > 1 else ""
        name = f"spectrum_{step}.png" if number == 1 else f"spectrum_{step}_{number}.png"
        alt = f"Singular values of {len(page)} layers at step {step}, {_name(page[0])} to {_name(page[-1])}."
        caption = _explain([spectra[place] for place in page])
        with our_style():
            figure = spectrum_figure({place: spectra[place] for place in page})
            pictures.append(to_picture(figure, name, f"Singular values at step {step}{several}", caption, alt))
    return pictures


def _explain(spectra: Sequence[Spectrum]) -> str:
    """What there is to see in these panels, which depends on the parts that W has."""
    if all(spectrum.low_rank is None for spectrum in spectra):
        text = "Singular values of each W against their index."
    elif all(spectrum.sparse is None for spectrum in spectra):
        text = "Singular values of each W, which are those of the low-rank product; behind its rank (dotted) all are 0."
    else:
        text = (
            "Singular values of each W and of its two parts. In a well trained layer W follows the low-rank product up"
            " to the rank (dotted) and S behind it; the drop between is the cliff."
        )
    is_cut = any(0 < value < _limits(spectra)[0] for values in _parts(spectra) for value in values.tolist())
    return f"{text} All panels have the same axes" + ("; the lowest values are below them." if is_cut else ".")


def spectrum_figure(spectra: Mapping[Place, Spectrum]) -> "Figure":
    """Panels of singular values against their index."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    num_depths = len({depth for _, depth in spectra})
    num_columns = min(num_depths if num_depths > 1 else len(spectra), MAX_COLUMNS)
    figure, grid = _panels(len(spectra), num_columns, row_height=1.4 if num_columns > 2 else 1.8)
    for axes, (place, spectrum) in zip(grid, spectra.items(), strict=True):
        axes.set_title(_name(place), fontsize=9.5)
        for part, style in LINES.items():
            values = getattr(spectrum, part)
            if values is not None:
                axes.plot(range(1, len(values) + 1), _positive(values), **style)
        if spectrum.rank:
            axes.axvline(spectrum.rank, **RANK_LINE)

    low, high = _limits(list(spectra.values()))
    grid[0].set_yscale("log")
    grid[0].set_ylim(low, high)
    longest = max(len(spectrum.whole) for spectrum in spectra.values())
    grid[0].set_xlim(-0.03 * longest, 1.03 * longest)
    steps = (1.0,) if high / low > 30 else (1.0, 2.0, 5.0)
    grid[0].yaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
    grid[0].yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    grid[0].yaxis.set_minor_locator(NullLocator())
    grid[0].xaxis.set_major_locator(MaxNLocator(6 - num_columns if num_columns > 2 else 5, integer=True))
    figure.supxlabel("index", fontsize=10)
    figure.supylabel("singular value", fontsize=10)

    used = [part for part in LINES if any(getattr(spectrum, part) is not None for spectrum in spectra.values())]
    handles = [Line2D([], [], **LINES[part]) for part in used]
    ranks = {spectrum.rank for spectrum in spectra.values() if spectrum.rank}
    if ranks:
        label = f"rank {min(ranks)}" if len(ranks) == 1 else "rank"
        handles.append(Line2D([], [], label=label, **RANK_LINE))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), handlelength=3.2)
    return figure


def _name(place: Place) -> str:
    return f"{place[0]}, layer {place[1]}"


def _positive(values: Tensor) -> list[float]:
    """Without the zeros, which a log axis does not have."""
    return [value if value > 0 else math.nan for value in values.tolist()]


def _parts(spectra: Sequence[Spectrum]) -> list[Tensor]:
    """All their curves."""
    return [values for spectrum in spectra for part in LINES if (values := getattr(spectrum, part)) is not None]


def _limits(spectra: Sequence[Spectrum]) -> tuple[float, float]:
    """The ends of the axis: a little beyond the largest value, and beyond SHOWN of each curve."""
    curves = [[value for value in values.tolist() if value > 0] for values in _parts(spectra)]
    curves = [values for values in curves if values] or [[1.0]]
    high = max(values[0] for values in curves)
    low = min(values[int(SHOWN * (len(values) - 1))] for values in curves)
    return max(low, high / 10**MAX_DECADES) / 1.5, high * 1.5


def draw_energy(shares: Mapping[int, Mapping[str, Sequence[tuple[int, float]]]]) -> Picture:
    """The share of S in the energy: step -> kind of projection -> (depth, share)."""
    steps = [str(step) for step in shares]
    when = f"step {steps[0]}" if len(steps) == 1 else f"steps {', '.join(steps)}"
    caption = (
        "How much of each W is in S: its squared Frobenius norm over that of S and of the low-rank product together, by"
        " kind of projection and depth."
    )
    alt = f"Share of S in the energy of every projection against depth, at {when}."
    with our_style():
        return to_picture(energy_figure(shares), "energy.png", "Share of S in the energy", caption, alt)


def energy_figure(shares: Mapping[int, Mapping[str, Sequence[tuple[int, float]]]]) -> "Figure":
    """A panel a step, a line a kind of projection."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, grid = _panels(len(shares), min(len(shares), 2), row_height=2.2)
    for axes, (step, by_kind) in zip(grid, shares.items(), strict=True):
        axes.set_title(f"step {step}", fontsize=9.5)
        for (kind, points), colour, marker in zip(by_kind.items(), COLOURS, MARKERS, strict=False):
            style: dict[str, Any] = {
                "color": colour,
                "marker": marker,
                "markersize": 5,
                "markeredgecolor": "white",
                "label": kind,
            }
            axes.plot(*zip(*points, strict=True), linewidth=1.2, **style)
    known = [share for by_kind in shares.values() for points in by_kind.values() for _, share in points if share > 0]
    grid[0].set_ylim(0, min(1.06 * max(known, default=1), 1.04))
    grid[0].yaxis.set_major_formatter(PercentFormatter(1))
    grid[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel("decoder layer", fontsize=10)
    figure.supylabel("share of S in the energy", fontsize=10)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _panels(num_panels: int, num_columns: int, row_height: float) -> "tuple[Figure, list[Axes]]":
    """A figure with this many panels, row by row, all with the same axes; a single row is higher."""
    from matplotlib.figure import Figure

    num_rows = math.ceil(num_panels / num_columns)
    height = 0.9 + max(num_rows * row_height, 2.8)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.09, h_pad=0.07)
    grid = list(figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).flatten())
    for axes in grid[num_panels:]:
        axes.remove()
    for axes in grid[max(0, num_panels - num_columns) : num_panels]:
        axes.tick_params(labelbottom=True)  # also above a place that stays empty
    return figure, grid[:num_panels]
