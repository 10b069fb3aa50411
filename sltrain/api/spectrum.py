"""A run's checkpoints -> the singular values of its layers, and how much of each W is in S.

    section = look_inside(Path("outputs/run"), layers=["q_proj"], steps=[10000, 11000])
    write_report(report, output, more=section)                # api/report.py: on the page, and files beside it

What is computed and why: reporting/spectrum.py. Of every projection the energies of its parts are read off its factors;
singular values, which cost a decomposition, are those of the chosen layers: every kind of projection in the first, the
middle and the last decoder layer, or what name patterns fit. One layer is in memory at a time.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sltrain.api.saved import Saved, open_saved
from sltrain.layers.linear import FactoredLinear, SLTrainLinear
from sltrain.methods.base import pattern_fits
from sltrain.models.llama import PROJECTIONS
from sltrain.reporting.page import Section
from sltrain.reporting.spectrum import Energy, Spectrum, product_singular_values, singular_values
from sltrain.reporting.spectrum_figures import draw_energy, draw_spectra
from sltrain.reporting.spectrum_table import Found, by_kind, by_layer, energy_csv, markdown, place, spectrum_csv


def look_inside(
    path: str | Path,
    *,
    layers: list[str] | None = None,
    steps: list[int] | None = None,
    report: Callable[[str], None] = print,
) -> Section:
    """Figures and tables of the run at `path`: by kind of projection, by chosen layer, and every number as CSV.

    `layers` are name patterns as in `rank_overrides`, `steps` updates with a checkpoint (default: the newest intact
    one). Raises ValueError or OSError for a run that cannot be opened, a step it does not have, a pattern that fits no
    layer, and weights that are not finite.
    """
    opened = _open_steps(path, steps, report)
    names = _projections(opened[0].model)
    chosen = choose_layers(names, layers)
    found = []
    for saved in opened:
        report(f"step {saved.step}: singular values of {len(chosen)} of {len(names)} layers")
        found.append(_examine(saved, names, chosen))
    pictures = [picture for at in found for picture in draw_spectra(at.step, at.spectra_by_place())]
    if any(at.energies for at in found):
        pictures.append(draw_energy({at.step: at.shares_by_kind() for at in found}))
    title = f"Spectrum of {Path(path).expanduser().resolve().name}"
    tables = [by_kind(found), by_layer(found)]
    texts = {
        "spectrum.csv": spectrum_csv(found),
        "energy.csv": energy_csv(found),
        "spectrum.md": "\n".join([f"# {title}\n", *map(markdown, tables)]),
    }
    return Section(title, pictures, tables, {name: text for name, text in texts.items() if text})


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
    return sorted(names, key=lambda name: (PROJECTIONS.index(place(name)[0]), place(name)[1]))


def choose_layers(names: Sequence[str], patterns: Sequence[str] | None) -> list[str]:
    """Those of `names` that a pattern fits; without patterns, those in the first, the middle and the last decoder
    layer. Raises ValueError for a pattern that fits none."""
    if not patterns:
        num_layers = 1 + max(place(name)[1] for name in names)
        return [name for name in names if place(name)[1] in (0, num_layers // 2, num_layers - 1)]
    for pattern in patterns:
        if not any(pattern_fits(pattern, name) for name in names):
            kinds = ", ".join(dict.fromkeys(place(name)[0] for name in names))
            raise ValueError(
                f"the pattern {pattern!r} fits no projection; try for example {names[0]}, model.layers.0.*, {kinds}"
            )
    return [name for name in names if any(pattern_fits(pattern, name) for pattern in patterns)]


def _examine(saved: Saved, names: Sequence[str], chosen: Sequence[str]) -> Found:
    """Read each layer of `names` that is needed, once."""
    found = Found(saved.step, {}, {})
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
    layer: nn.Module = saved.read_layer(name, torch.float64)
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
