"""Which part of a trained W its singular values come from: numbers, tables and figures.

    W (out, in) = sum over i of sigma_i u_i v_i^T         sigma_1 >= sigma_2 >= ... >= 0
    W = L + S                                             L = (alpha / rank) B A of rank r, S with few entries

L has r singular values above 0. S usually has min(out, in), small and alike. In W the two hardly mix: sigma_1 to
sigma_r are close to those of L, the others to those of S, and between them is a cliff, sigma_r / sigma_(r+1) (figures
2, 10 and 11 of arXiv 2406.02214). Energies, squared Frobenius norms, measure how much of W a part carries: |L|^2 +
|S|^2 is |W|^2 up to 2 <L, S>, which is small if the entries of S lie at random.

    rank of W              how many sigma_i are not 0: full, says the paper, although L alone would allow r
    effective rank of W    exp(-sum p_i log p_i), p_i = sigma_i / sum sigma: k if k values are equal and the others 0
                           (Roy and Vetterli 2007)

Layers of other methods have other parts; each gets its curve and its energy.

Singular values are drawn as small multiples with shared axes, a panel a layer: rows are kinds of projection, columns
depths if there are few. W is a broad pale line under the lines of its parts. The last values of a square matrix fall
steeply over many powers of ten; the log axis ends before most of that fall, which would take up the whole panel.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sltrain.reporting.drawing import COLOURS, DPI, MARKERS, WIDTH, Picture, our_style, to_picture
from sltrain.reporting.page import Section
from sltrain.reporting.table import Table, csv_text, markdown
from sltrain.reporting.table import aligned as aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Place = tuple[str, int]  # kind of projection, and number of its decoder layer
Shares = dict[str, list[tuple[int, float]]]  # kind of projection -> (depth, share of S in the energy)

LAYER_HEADINGS = ["step", "layer", "rank", "largest", "cliff", "effective rank", "numerical rank", "of", "energy in S"]
KIND_HEADINGS = ["step", "projection", "layers", "rank", "largest", "cliff", "effective rank", "energy in S, all"]
LAYER_LEGEND = (
    "Of each W: the largest singular value; the cliff, the singular value at the rank over the next one; the effective"
    " rank, exp of the entropy of the singular values; the numerical rank, of how many; and the share of S in the"
    " energy, |S|^2 / (|L|^2 + |S|^2) with L = (alpha / rank) BA."
)
KIND_LEGEND = "Medians over the chosen layers of a kind; of the energy, over all its layers."
MAX_COLUMNS = 4
MAX_PANELS = 28  # in one figure
SHOWN = 0.98  # of the values of each matrix lie above the end of the axis
MAX_DECADES = 5  # of singular values on the axis
LINES: dict[str, dict[str, Any]] = {
    "W": {"label": "W", "color": "#a6a6a6", "linestyle": "-", "linewidth": 3.4},
    "BA": {"label": "(alpha / rank) BA", "color": COLOURS[0], "linestyle": "--", "linewidth": 1.5},
    "S": {"label": "S", "color": COLOURS[1], "linestyle": "-.", "linewidth": 1.5},
}
OTHER_LINE: dict[str, Any] = {"color": COLOURS[2], "linestyle": (0, (1, 1)), "linewidth": 1.5}
RANK_LINE: dict[str, Any] = {"color": "#000000", "linestyle": ":", "linewidth": 0.9}


@dataclass
class Spectrum:
    """Singular values of one W and of its parts by name, descending; `rank` is r of a low-rank part, if there is one.
    A part may omit values that are 0 by its shape."""

    whole: list[float]
    parts: dict[str, list[float]] = field(default_factory=dict)
    rank: int | None = None

    @property
    def curves(self) -> dict[str, list[float]]:
        """Singular values by name, those of W under W."""
        return {"W": self.whole, **self.parts}

    @property
    def cliff(self) -> float:
        """sigma_r / sigma_(r+1) of W: infinite if only the latter is 0, nan if both are or there is no such pair."""
        if not self.rank or self.rank >= len(self.whole):
            return math.nan
        before, after = self.whole[self.rank - 1 : self.rank + 1]
        return before / after if after else math.inf if before else math.nan

    @property
    def numerical_rank(self) -> int:
        """How many singular values of W are not 0."""
        return sum(value > 0 for value in self.whole)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values of W; 0 for W = 0."""
        total = math.fsum(self.whole)
        shares = [value / total for value in self.whole if value > 0]
        return math.exp(-math.fsum(share * math.log(share) for share in shares)) if shares else 0.0


@dataclass
class Found:
    """Spectra and energies of one checkpoint, by layer name."""

    step: int
    spectra: dict[str, Spectrum]  # of the chosen layers
    energies: dict[str, dict[str, float]]  # of every layer that may have an S: squared norms by group of parts

    def share(self, name: str) -> float:
        """The share of S in a layer's energy, 0 to 1; nan if the energy is 0 or unknown."""
        energies = self.energies.get(name, {})
        total = sum(energies.values())
        return energies["sparse"] / total if total else math.nan

    def shares_by_kind(self) -> Shares:
        """The share of S in every layer with an energy."""
        shares: Shares = {}
        for name in self.energies:
            kind, depth = place(name)
            shares.setdefault(kind, []).append((depth, self.share(name)))
        return shares


def place(name: str) -> Place:
    """model.layers.3.self_attn.q_proj -> (q_proj, 3)."""
    _, _, depth, _, kind = name.split(".")
    return kind, int(depth)


def spectrum_section(title: str, found: Sequence[Found]) -> Section:
    """Figures and tables, by kind of projection and by chosen layer, and every number as CSV."""
    by_place = [(at.step, {place(name): spectrum for name, spectrum in at.spectra.items()}) for at in found]
    pictures = [picture for step, spectra in by_place for picture in draw_spectra(step, spectra)]
    if any(at.energies for at in found):
        pictures.append(draw_energy({at.step: at.shares_by_kind() for at in found}))
    tables = [by_kind(found), by_layer(found)]
    texts = {
        "spectrum.csv": spectrum_csv(found),
        "energy.csv": energy_csv(found),
        "spectrum.md": "\n\n".join([f"# {title}", *(f"{markdown(t)}\n\n{t.legend}" for t in tables)]) + "\n",
    }
    return Section(title, pictures, tables, {name: text for name, text in texts.items() if text})


# ---- tables


def by_layer(found: Sequence[Found]) -> Table:
    """One row for each chosen layer and step."""
    rows = []
    for at in found:
        for name, one in at.spectra.items():
            numbers = [_number(value) for value in (one.whole[0], one.cliff, one.effective_rank)]
            ranks = [str(one.numerical_rank), str(len(one.whole))]
            rows.append([str(at.step), name, str(one.rank or "-"), *numbers, *ranks, _percent(at.share(name))])
    return Table(LAYER_HEADINGS, rows, ["layer"], LAYER_LEGEND)


def by_kind(found: Sequence[Found]) -> Table:
    """One row for each kind of projection and step."""
    rows = []
    for at in found:
        shares = at.shares_by_kind()
        for kind in dict.fromkeys(place(name)[0] for name in at.spectra):
            spectra = [spectrum for name, spectrum in at.spectra.items() if place(name)[0] == kind]
            ranks = sorted({spectrum.rank for spectrum in spectra if spectrum.rank})
            rank = "-".join(map(str, dict.fromkeys([*ranks[:1], *ranks[-1:]]))) or "-"
            values = zip(*((one.whole[0], one.cliff, one.effective_rank) for one in spectra), strict=True)
            share = _percent(_median(share for _, share in shares.get(kind, [])))
            rows.append([str(at.step), kind, str(len(spectra)), rank, *map(_number, map(_median, values)), share])
    return Table(KIND_HEADINGS, rows, ["projection"], KIND_LEGEND)


def spectrum_csv(found: Sequence[Found]) -> str:
    """Every singular value; that of index 1 is the largest."""
    lines = [
        (at.step, name, matrix, index, value)
        for at in found
        for name, spectrum in at.spectra.items()
        for matrix, values in spectrum.curves.items()
        for index, value in enumerate(values, 1)
    ]
    return csv_text([("step", "layer", "matrix", "index", "singular_value"), *lines])


def energy_csv(found: Sequence[Found]) -> str:
    """The energies of every layer that may have an S; empty if none may."""
    groups = dict.fromkeys(group for at in found for energies in at.energies.values() for group in energies)
    lines = [
        (at.step, name, *place(name), *(energies.get(group, 0.0) for group in groups), at.share(name))
        for at in found
        for name, energies in at.energies.items()
    ]
    headings = ("step", "layer", "projection", "depth", *(f"{group}_energy" for group in groups), "sparse_share")
    return csv_text([headings, *lines]) if lines else ""


def _median(values: Iterable[float]) -> float:
    """The median without nan; nan if nothing is left."""
    numbers = [value for value in values if not math.isnan(value)]
    return statistics.median(numbers) if numbers else math.nan


def _number(value: float) -> str:
    """Three digits, or all digits before the point; a dash for nan."""
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if 100 <= value < 1e6 else f"{value:.3g}"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


# ---- figures


def draw_spectra(step: int, spectra: Mapping[Place, Spectrum]) -> list[Picture]:
    """Figures of the singular values at `step`, of up to MAX_PANELS layers each."""
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
    """The caption, which depends on the parts that W has."""
    parts = {name for spectrum in spectra for name in spectrum.parts}
    if all(spectrum.rank is None for spectrum in spectra):
        text = "Singular values of each W against their index."
    elif parts == {"BA"}:
        text = "Singular values of each W, which are those of the low-rank product; after its rank (dotted) all are 0."
    elif parts == {"BA", "S"}:
        text = (
            "Singular values of each W and of its two parts. In a well trained layer W follows the low-rank product up"
            " to the rank (dotted) and S after it; the drop in between is the cliff."
        )
    else:
        text = "Singular values of each W and of its parts. The rank of the low-rank product is dotted."
    is_cut = any(0 < value < _limits(spectra)[0] for values in _curves(spectra) for value in values)
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
        for name, values in spectrum.curves.items():
            shown = [value if value > 0 else math.nan for value in values]  # a log axis has no zero
            axes.plot(range(1, len(values) + 1), shown, **_line(name))
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

    used = dict.fromkeys([*LINES, *(name for spectrum in spectra.values() for name in spectrum.parts)])
    there = {name for spectrum in spectra.values() for name in spectrum.curves}
    handles = [Line2D([], [], **_line(name)) for name in used if name in there]
    ranks = {spectrum.rank for spectrum in spectra.values() if spectrum.rank}
    if ranks:
        label = f"rank {min(ranks)}" if len(ranks) == 1 else "rank"
        handles.append(Line2D([], [], label=label, **RANK_LINE))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), handlelength=3.2)
    return figure


def _name(place: Place) -> str:
    return f"{place[0]}, layer {place[1]}"


def _line(name: str) -> dict[str, Any]:
    return LINES.get(name, {"label": name, **OTHER_LINE})


def _curves(spectra: Sequence[Spectrum]) -> list[list[float]]:
    return [values for spectrum in spectra for values in spectrum.curves.values()]


def _limits(spectra: Sequence[Spectrum]) -> tuple[float, float]:
    """The ends of the axis, a factor of 1.5 beyond the largest value and beyond SHOWN of each curve."""
    curves = [[value for value in values if value > 0] for values in _curves(spectra)]
    curves = [values for values in curves if values] or [[1.0]]
    high = max(values[0] for values in curves)
    low = min(values[int(SHOWN * (len(values) - 1))] for values in curves)
    return max(low, high / 10**MAX_DECADES) / 1.5, high * 1.5


def draw_energy(shares: Mapping[int, Shares]) -> Picture:
    """The figure of the share of S in the energy at each step."""
    steps = [str(step) for step in shares]
    when = f"step {steps[0]}" if len(steps) == 1 else f"steps {', '.join(steps)}"
    caption = (
        "How much of each W is in S: the squared Frobenius norm of S over that of S plus that of the low-rank product,"
        " by kind of projection and depth."
    )
    alt = f"Share of S in the energy of every projection against depth, at {when}."
    with our_style():
        return to_picture(energy_figure(shares), "energy.png", "Share of S in the energy", caption, alt)


def energy_figure(shares: Mapping[int, Shares]) -> "Figure":
    """A panel for each step with a line for each kind of projection."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, grid = _panels(len(shares), min(len(shares), 2), row_height=2.2)
    for axes, (step, by_kind) in zip(grid, shares.items(), strict=True):
        axes.set_title(f"step {step}", fontsize=9.5)
        for (kind, points), colour, marker in zip(by_kind.items(), COLOURS, MARKERS, strict=False):
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "markeredgecolor": "white"}
            axes.plot(*zip(*points, strict=True), linewidth=1.2, label=kind, **style)
    known = [share for by_kind in shares.values() for points in by_kind.values() for _, share in points if share > 0]
    grid[0].set_ylim(0, min(1.06 * max(known, default=1), 1.04))
    grid[0].yaxis.set_major_formatter(PercentFormatter(1))
    grid[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel("decoder layer", fontsize=10)
    figure.supylabel("share of S in the energy", fontsize=10)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _panels(num_panels: int, num_columns: int, row_height: float) -> "tuple[Figure, list[Axes]]":
    """A figure and its panels, row by row, which share their axes; a single row is higher."""
    from matplotlib.figure import Figure

    num_rows = math.ceil(num_panels / num_columns)
    height = 0.9 + max(num_rows * row_height, 2.8)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.09, h_pad=0.07)
    grid = list(figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).flatten())
    for axes in grid[num_panels:]:
        axes.remove()
    for axes in grid[max(0, num_panels - num_columns) : num_panels]:
        axes.tick_params(labelbottom=True)  # also above an empty place
    return figure, grid[:num_panels]
