"""A run's checkpoints -> the singular values of its layers, and how much of each W is in S.

    section = look_inside(Path("outputs/run"), layers=["q_proj"], steps=[10000, 11000])
    write_report(report, output, more=section)                # api/report.py: on the page, and files beside it

What is shown and why: reporting/spectrum.py. Of every projection with an S the energies of its parts are read off its
tensors; singular values, which cost a decomposition, are those of the chosen layers: every kind of projection in the
first, the middle and the last decoder layer, or what name patterns fit. One layer is in memory at a time.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from sltrain.building.saved import Saved, open_saved
from sltrain.layers.base import ReplacedLinear, check_known, check_one_matrix, parts_of
from sltrain.layers.parts import LowRankPart, Part, singular_values
from sltrain.log import Pace
from sltrain.methods.base import pattern_fits
from sltrain.models.llama import PROJECTIONS
from sltrain.reporting.page import Section
from sltrain.reporting.spectrum import Found, Spectrum, place, spectrum_section

logger = logging.getLogger(__name__)


def look_inside(
    path: str | Path,
    *,
    layers: list[str] | None = None,
    steps: list[int] | None = None,
) -> Section:
    """Figures and tables of the run at `path`: by kind of projection, by chosen layer, and every number as CSV.

    `layers` are name patterns as in `rank_overrides`, `steps` updates with a checkpoint (default: the newest intact
    one). Raises ValueError or OSError for a run that cannot be opened, a step it does not have, a pattern that fits no
    layer, a layer of whose W nothing is known, and weights that are not finite.
    """
    opened = _open_steps(path, steps)
    names = _projections(opened[0].model)
    for name in names:
        check_known(name, opened[0].model.get_submodule(name))
    chosen = choose_layers(names, layers)
    for name in _needed(opened[0], names, chosen):  # before any is read, which takes time
        check_one_matrix(name, opened[0].model.get_submodule(name))
    found = []
    for saved in opened:
        logger.info(f"step {saved.step}: singular values of {len(chosen)} of {len(names)} layers")
        found.append(_examine(saved, names, chosen))
    return spectrum_section(f"Spectrum of {Path(path).expanduser().resolve().name}", found)


def _open_steps(path: str | Path, steps: list[int] | None) -> list[Saved]:
    """The run at each of these steps, or at the newest. A step that cannot be had is named in a line as long as there
    is another one."""
    if not steps:
        return [open_saved(path)]
    opened, errors = [], []
    for step in sorted(set(steps)):
        try:
            opened.append(open_saved(path, step))
        except (ValueError, OSError) as error:
            errors.append(error)
    if not opened:
        raise errors[0]
    for problem in errors:
        logger.info(f"note: {problem}")
    return opened


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


def _has_sparse(saved: Saved, name: str) -> bool:
    module = saved.model.get_submodule(name)
    return isinstance(module, ReplacedLinear) and "sparse" in module.GROUPS.values()


def _needed(saved: Saved, names: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """The layers to read: the chosen ones, and those with an S, for its energy."""
    return [name for name in names if name in chosen or _has_sparse(saved, name)]


def _examine(saved: Saved, names: Sequence[str], chosen: Sequence[str]) -> Found:
    """Read each layer of `names` that is needed, once."""
    found = Found(saved.step, {}, {})
    needed = _needed(saved, names, chosen)
    pace = Pace("read", "layers", len(needed))
    for number, name in enumerate(needed):
        pace.at(number)
        layer = _read_layer(saved, name)
        if _has_sparse(saved, name):
            found.energies[name] = _energies(parts_of(name, layer))
        if name in chosen:
            found.spectra[name] = _spectrum(name, layer)
        del layer  # before the next is read
    return found


def _read_layer(saved: Saved, name: str) -> nn.Module:
    """The layer called `name` with its weights, in float64."""
    layer: nn.Module = saved.read_layer(name, torch.float64)
    if not all(parameter.isfinite().all() for parameter in layer.parameters()):
        raise ValueError(f"{name} holds weights that are not finite at step {saved.step}; choose an earlier step")
    return layer


def _energies(parts: Mapping[str, Part]) -> dict[str, float]:
    """Squared norms by group of parts."""
    energies = {"low_rank": 0.0, "sparse": 0.0}
    for part in parts.values():
        energies[part.group] = energies.get(part.group, 0.0) + float(part.norm()) ** 2
    return energies


def _spectrum(name: str, layer: nn.Module) -> Spectrum:
    """Singular values of W, and of what the layer makes it of."""
    parts = parts_of(name, layer)
    values = {part: summand.singular_values().tolist() for part, summand in parts.items()}
    if not isinstance(layer, ReplacedLinear):
        return Spectrum(values["W"])
    if len(parts) > 1:
        whole = singular_values(layer.dense_weight()).tolist()
    else:  # W is its only part: no second decomposition
        (known,) = values.values()
        whole = known + [0.0] * (min(layer.in_features, layer.out_features) - len(known))
    ranks = [part.rank for part in parts.values() if isinstance(part, LowRankPart)]
    return Spectrum(whole, values, sum(ranks) if ranks else None)
