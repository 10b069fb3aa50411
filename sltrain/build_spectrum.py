"""A run's checkpoints -> the singular values of its layers, and how much of each W is in S.

    report = write_spectrum(Path("outputs/run"), Path("outputs/run/report"), layers=["q_proj"], steps=[1000, 11000])
    print(report.summary)

What is computed and why: reporting/spectrum.py. Of every projection the energies of its parts are read off its factors;
singular values, which cost a decomposition, are those of the chosen layers: every kind of projection in the first, the
middle and the last decoder layer, or what name patterns fit. One layer is in memory at a time.
"""

import csv
import io
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sltrain.build_report import write_files
from sltrain.build_saved import Saved, open_saved
from sltrain.layers.linear import FactoredLinear, SLTrainLinear
from sltrain.methods.settings import pattern_fits
from sltrain.models.llama import PROJECTIONS
from sltrain.reporting.page import Section
from sltrain.reporting.spectrum import Energy, Spectrum, product_singular_values, singular_values
from sltrain.reporting.spectrum_figures import Place, draw_energy, draw_spectra

OUR_FILES = re.compile(r"spectrum_\d+(_\d+)?\.png|energy\.(png|csv)")
HEADINGS = ["step", "layer", "rank", "largest", "cliff", "effective rank", "numerical rank", "of", "energy in S"]
LEGEND = (
    "Of each W: its largest singular value; the cliff, the singular value at the rank over the next one; its effective"
    " rank, exp of the entropy of its singular values; its numerical rank, of how many; and the share of S in the"
    " energy, |S|^2 / (|L|^2 + |S|^2) with L = (alpha / rank) BA."
)


@dataclass
class SpectrumReport(Section):
    """What was written, and what a page or a terminal shows of it: a row is a chosen layer at a step."""

    figures: list[Path]  # the pictures, as files
    files: list[Path]  # tables
    summary: str  # an aligned table, one line a kind of projection


@dataclass
class _Found:
    """What one checkpoint holds, by layer name."""

    step: int
    spectra: dict[str, Spectrum]  # of the chosen layers
    energies: dict[str, Energy]  # of every layer that has an S


def write_spectrum(
    path: str | Path,
    output: Path,
    *,
    layers: list[str] | None = None,
    steps: list[int] | None = None,
    report: Callable[[str], None] = print,
) -> SpectrumReport:
    """Write figures and tables of the run at `path` into the folder `output`.

    `layers` are name patterns as in `rank_overrides`, `steps` updates with a checkpoint (default: the newest intact
    one). Raises ValueError or OSError for a run that cannot be opened, a step it does not have, a pattern that fits no
    layer, weights that are not finite, and a folder that cannot be written.
    """
    opened = _open_steps(path, steps, report)
    names = _projections(opened[0].model)
    chosen = choose_layers(names, layers)
    found = []
    for saved in opened:
        report(f"step {saved.step}: singular values of {len(chosen)} of {len(names)} layers")
        found.append(_examine(saved, names, chosen))
    pictures = [picture for at in found for picture in draw_spectra(at.step, _by_place(at.spectra))]
    if any(at.energies for at in found):
        pictures.append(draw_energy({at.step: _shares(at.energies) for at in found}))
    title = f"Spectrum of {Path(path).expanduser().resolve().name}"
    rows = [_row(at, name) for at in found for name in at.spectra]
    texts = {
        "spectrum.csv": _spectrum_csv(found),
        "energy.csv": _energy_csv(found),
        "spectrum.md": f"# {title}\n\n{_markdown(HEADINGS, rows)}\n{LEGEND}\n",
    }
    texts = {name: text for name, text in texts.items() if text}
    write_files(output, pictures, texts, OUR_FILES)
    figures, files = [output / picture.file_name for picture in pictures], [output / name for name in texts]
    return SpectrumReport(title, pictures, HEADINGS, rows, LEGEND, figures, files, _summary(found))


def _open_steps(path: str | Path, steps: list[int] | None, report: Callable[[str], None]) -> list[Saved]:
    """The run at each of these steps, or at the newest. A step that cannot be had is named to `report` as long as there
    is another one."""
    if not steps:
        return [open_saved(path, None, report)]
    opened, errors = [], []
    for step in sorted(set(steps)):
        try:
            opened.append(open_saved(path, step, report))
        except (ValueError, OSError) as error:
            errors.append(error)
    if not opened:
        raise errors[0]
    for problem in errors:
        report(f"note: {problem}")
    return opened


# ---- layers


def _projections(model: nn.Module) -> list[str]:
    """Names of all projections, kind by kind, each from the first decoder layer to the last."""
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS]
    return sorted(names, key=lambda name: (PROJECTIONS.index(_place(name)[0]), _place(name)[1]))


def _place(name: str) -> Place:
    """model.layers.3.self_attn.q_proj -> (q_proj, 3)."""
    _, _, depth, _, kind = name.split(".")
    return kind, int(depth)


def choose_layers(names: Sequence[str], patterns: Sequence[str] | None) -> list[str]:
    """Those of `names` that a pattern fits; without patterns, those in the first, the middle and the last decoder
    layer. Raises ValueError for a pattern that fits none."""
    if not patterns:
        num_layers = 1 + max(_place(name)[1] for name in names)
        return [name for name in names if _place(name)[1] in (0, num_layers // 2, num_layers - 1)]
    for pattern in patterns:
        if not any(pattern_fits(pattern, name) for name in names):
            kinds = ", ".join(dict.fromkeys(_place(name)[0] for name in names))
            raise ValueError(
                f"the pattern {pattern!r} fits no projection; try for example {names[0]}, model.layers.0.*, {kinds}"
            )
    return [name for name in names if any(pattern_fits(pattern, name) for pattern in patterns)]


def _examine(saved: Saved, names: Sequence[str], chosen: Sequence[str]) -> _Found:
    """Read each layer of `names` that is needed, once."""
    found = _Found(saved.step, {}, {})
    for name in names:
        if name not in chosen and not isinstance(saved.model.get_submodule(name), SLTrainLinear):
            continue
        layer = _read_layer(saved, name)
        if isinstance(layer, SLTrainLinear):
            found.energies[name] = Energy(float(layer.low_rank_norm()) ** 2, float(layer.sparse_norm()) ** 2)
        if name in chosen:
            found.spectra[name] = _spectrum(layer)
        del layer  # before the next is read
    return found


def _read_layer(saved: Saved, name: str) -> nn.Module:
    """The layer called `name` with its weights, in float64."""
    layer = deepcopy(saved.model.get_submodule(name))  # the model's own stays without memory
    saved.files.fill(layer, f"{name}.", dtype=torch.float64)
    if not all(parameter.isfinite().all() for parameter in layer.parameters()):
        raise ValueError(f"{name} holds weights that are not finite at step {saved.step}; choose an earlier step")
    return layer


def _spectrum(layer: nn.Module) -> Spectrum:
    """Singular values of W, and of what the layer makes it of."""
    if not isinstance(layer, FactoredLinear):
        assert isinstance(layer, nn.Linear)
        return Spectrum(singular_values(layer.weight))
    low_rank = layer.scale * product_singular_values(layer.B, layer.A) if layer.rank else None
    if isinstance(layer, SLTrainLinear) and layer.num_sparse:
        return Spectrum(singular_values(layer.dense_weight()), low_rank, singular_values(_sparse_matrix(layer)))
    assert low_rank is not None  # a layer has one or the other
    return Spectrum(F.pad(low_rank, (0, min(layer.in_features, layer.out_features) - layer.rank)), low_rank)


@torch.no_grad()
def _sparse_matrix(layer: SLTrainLinear) -> Tensor:
    """S, (out, in)."""
    flat = layer.values.new_zeros(layer.out_features * layer.in_features)
    for entries, positions in layer.support.pieces(layer.indices):
        flat[positions] = layer.values[entries]
    return flat.view(layer.out_features, layer.in_features)


# ---- what is shown


def _by_place(spectra: dict[str, Spectrum]) -> dict[Place, Spectrum]:
    return {_place(name): spectrum for name, spectrum in spectra.items()}


def _shares(energies: dict[str, Energy]) -> dict[str, list[tuple[int, float]]]:
    """Kind of projection -> (depth, share of S)."""
    shares: dict[str, list[tuple[int, float]]] = {}
    for name, energy in energies.items():
        kind, depth = _place(name)
        shares.setdefault(kind, []).append((depth, energy.sparse_share))
    return shares


def _row(found: _Found, name: str) -> list[str]:
    """The cells under HEADINGS."""
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


def _summary(found: Sequence[_Found]) -> str:
    """One line a kind of projection and step: medians over its chosen layers, and of the energy over all."""
    lines = [["step", "projection", "layers", "rank", "largest", "cliff", "effective rank", "energy in S, all layers"]]
    for at in found:
        for kind in dict.fromkeys(_place(name)[0] for name in at.spectra):
            spectra = [spectrum for name, spectrum in at.spectra.items() if _place(name)[0] == kind]
            shares = [energy.sparse_share for name, energy in at.energies.items() if _place(name)[0] == kind]
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
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    padded = [
        [cell.ljust(width) if i == 1 else cell.rjust(width) for i, (cell, width) in enumerate(pairs)]
        for pairs in (zip(line, widths, strict=True) for line in lines)
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


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---" if heading == "layer" else "---:" for heading in headings]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [headings, rule, *rows])


def _spectrum_csv(found: Sequence[_Found]) -> str:
    """Every singular value; index 1 is the largest."""
    lines: list[Sequence[object]] = [("step", "layer", "matrix", "index", "singular_value")]
    for at in found:
        for name, spectrum in at.spectra.items():
            for matrix, values in (("W", spectrum.whole), ("BA", spectrum.low_rank), ("S", spectrum.sparse)):
                for index, value in enumerate(values.tolist() if values is not None else [], 1):
                    lines.append((at.step, name, matrix, index, value))
    return _csv(lines)


def _energy_csv(found: Sequence[_Found]) -> str:
    """The energies of every layer that has an S; empty if none has."""
    lines: list[Sequence[object]] = [
        (at.step, name, *_place(name), energy.low_rank, energy.sparse, energy.sparse_share)
        for at in found
        for name, energy in at.energies.items()
    ]
    headings = ("step", "layer", "projection", "depth", "low_rank_energy", "sparse_energy", "sparse_share")
    return _csv([headings, *lines]) if lines else ""


def _csv(lines: Iterable[Sequence[object]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()
