"""Spectra as text: a row a kind of projection, a row a chosen layer, and every number as CSV."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sltrain.reporting.page import Table
from sltrain.reporting.spectrum import Energy, Spectrum

LAYER_HEADINGS = ["step", "layer", "rank", "largest", "cliff", "effective rank", "numerical rank", "of", "energy in S"]
KIND_HEADINGS = ["step", "projection", "layers", "rank", "largest", "cliff", "effective rank", "energy in S, all"]
LAYER_LEGEND = (
    "Of each W: its largest singular value; the cliff, the singular value at the rank over the next one; its effective"
    " rank, exp of the entropy of its singular values; its numerical rank, of how many; and the share of S in the"
    " energy, |S|^2 / (|L|^2 + |S|^2) with L = (alpha / rank) BA."
)


@dataclass
class Found:
    """What one checkpoint holds, by layer name."""

    step: int
    spectra: dict[str, Spectrum]  # of the chosen layers
    energies: dict[str, Energy]  # of every layer that has an S

    def spectra_by_place(self) -> dict[tuple[str, int], Spectrum]:
        """(kind of projection, depth) -> spectrum."""
        return {place(name): spectrum for name, spectrum in self.spectra.items()}

    def shares_by_kind(self) -> dict[str, list[tuple[int, float]]]:
        """Kind of projection -> (depth, share of S in the energy)."""
        shares: dict[str, list[tuple[int, float]]] = {}
        for name, energy in self.energies.items():
            kind, depth = place(name)
            shares.setdefault(kind, []).append((depth, energy.sparse_share))
        return shares


def place(name: str) -> tuple[str, int]:
    """model.layers.3.self_attn.q_proj -> (q_proj, 3)."""
    _, _, depth, _, kind = name.split(".")
    return kind, int(depth)


def by_layer(found: Sequence[Found]) -> Table:
    """One row a chosen layer and step."""
    return Table(LAYER_HEADINGS, [_row(at, name) for at in found for name in at.spectra], LAYER_LEGEND, ("layer",))


def _row(found: Found, name: str) -> list[str]:
    spectrum = found.spectra[name]
    return [
        str(found.step),
        name,
        str(spectrum.rank or "-"),
        _number(float(spectrum.whole[0])),
        _number(spectrum.cliff),
        _number(spectrum.effective_rank),
        str(spectrum.numerical_rank),
        str(len(spectrum.whole)),
        _percent(found.energies[name].sparse_share if name in found.energies else math.nan),
    ]


def by_kind(found: Sequence[Found]) -> Table:
    """One row a kind of projection and step."""
    lines = []
    for at in found:
        for kind in dict.fromkeys(place(name)[0] for name in at.spectra):
            spectra = [spectrum for name, spectrum in at.spectra.items() if place(name)[0] == kind]
            shares = [energy.sparse_share for name, energy in at.energies.items() if place(name)[0] == kind]
            ranks = sorted({spectrum.rank for spectrum in spectra if spectrum.rank})
            lines.append(
                [
                    str(at.step),
                    kind,
                    str(len(spectra)),
                    "-".join(str(rank) for rank in dict.fromkeys([*ranks[:1], *ranks[-1:]])) or "-",
                    _number(_median(float(spectrum.whole[0]) for spectrum in spectra)),
                    _number(_median(spectrum.cliff for spectrum in spectra)),
                    _number(_median(spectrum.effective_rank for spectrum in spectra)),
                    _percent(_median(shares)),
                ]
            )
    return Table(
        KIND_HEADINGS,
        lines,
        "Medians over the chosen layers of a kind, and of the energy over all of them.",
        ("projection",),
    )


def aligned(table: Table) -> str:
    """For a terminal."""
    lines = [table.headings, *table.rows]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    padded = [
        [
            cell.ljust(width) if heading in table.texts else cell.rjust(width)
            for heading, cell, width in zip(table.headings, line, widths, strict=True)
        ]
        for line in lines
    ]
    return "\n".join("  ".join(cells) for cells in padded)


def _median(values: Iterable[float]) -> float:
    """Of those that are numbers; nan if none is."""
    numbers = [value for value in values if not math.isnan(value)]
    return statistics.median(numbers) if numbers else math.nan


def _number(value: float) -> str:
    """Three digits, or all before the point; a dash for nan."""
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if 100 <= value < 1e6 else f"{value:.3g}"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def markdown(table: Table) -> str:
    """With its legend below."""
    rule = ["---" if heading in table.texts else "---:" for heading in table.headings]
    lines = [f"| {' | '.join(cells)} |\n" for cells in [table.headings, rule, *table.rows]]
    return f"{''.join(lines)}\n{table.legend}\n"


def spectrum_csv(found: Sequence[Found]) -> str:
    """Every singular value; index 1 is the largest."""
    lines: list[Sequence[object]] = [("step", "layer", "matrix", "index", "singular_value")]
    for at in found:
        for name, spectrum in at.spectra.items():
            for matrix, values in (("W", spectrum.whole), ("BA", spectrum.low_rank), ("S", spectrum.sparse)):
                for index, value in enumerate(values.tolist() if values is not None else [], 1):
                    lines.append((at.step, name, matrix, index, value))
    return _csv(lines)


def energy_csv(found: Sequence[Found]) -> str:
    """The energies of every layer that has an S; empty if none has."""
    lines: list[Sequence[object]] = [
        (at.step, name, *place(name), energy.low_rank, energy.sparse, energy.sparse_share)
        for at in found
        for name, energy in at.energies.items()
    ]
    headings = ("step", "layer", "projection", "depth", "low_rank_energy", "sparse_energy", "sparse_share")
    return _csv([headings, *lines]) if lines else ""


def _csv(lines: Iterable[Sequence[object]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()
