"""How a decoder layer calls its projections: those of one x together, and what goes from layer to layer beside x.

A projection whose class says `takes_previous` (layers/base.py) is called with x and with the output of the same
projection one decoder layer before. That travels as an argument: the model hands each decoder layer what its
projections take, and gets back what those of the next one will take. So a call of a layer depends on its arguments
alone, and recomputing it in backward is calling it again. With a key/value cache these outputs are those of the new
positions, as x is. Models without such projections pass empty dictionaries.

A projection that has `recompute` set (CoLA-M, methods/cola.py) is y = output(h) of a narrow h = hidden(x), and wants h
kept for backward, and y computed again there.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Outputs = dict[str, Tensor]  # of a decoder layer's projections, (N, out) each, by name: q_proj, ...


def project(x: Tensor, *projections: nn.Module) -> list[Tensor]:
    """The output of each projection of the same x, by `forward_together` (layers/base.py) where their class has it."""
    kind = type(projections[0])
    if hasattr(kind, "forward_together") and all(type(projection) is kind for projection in projections):
        return kind.forward_together(x, projections)
    return [projection(x) for projection in projections]


def are_recomputed(*projections: nn.Module) -> bool:
    """Whether each of them wants its output computed again in backward."""
    return all(getattr(projection, "recompute", False) for projection in projections)


def hidden_of(projection: Any, x: Tensor) -> Tensor:
    """The narrow h of a projection that is recomputed."""
    hidden: Tensor = projection.hidden(x)
    return hidden


def output_of(projection: Any, hidden: Tensor) -> Tensor:
    """Its output, from h."""
    y: Tensor = projection.output(hidden)
    return y


@dataclass
class Passing:
    """The outputs that one call of a decoder layer takes and leaves."""

    previous: Outputs = field(default_factory=dict)  # what its projections take
    wanted: tuple[str, ...] = ()  # the projections whose outputs the next layer takes
    outputs: Outputs = field(default_factory=dict)  # of these

    def project(self, x: Tensor, owner: nn.Module, *names: str) -> list[Tensor]:
        """The output of each of the owner's projections of the same x."""
        projections = [getattr(owner, name) for name in names]
        if not self.previous and not self.wanted:
            return project(x, *projections)
        found = {}
        for name, projection in zip(names, projections, strict=True):
            taken = [self.previous[name]] if name in self.previous else []
            found[name] = projection(x, *taken)
        self.outputs.update({name: y for name, y in found.items() if name in self.wanted})
        return list(found.values())


def taking_previous(*owners: nn.Module) -> tuple[str, ...]:
    """The names of the owners' projections that take the output of the layer before."""
    children = (child for owner in owners for child in owner.named_children())
    return tuple(name for name, module in children if getattr(type(module), "takes_previous", False))
