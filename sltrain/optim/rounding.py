"""Stochastic rounding of weights. A bfloat16 number keeps 8 significant bits, and an update below half a unit in the
last of them is lost, however often it comes.

Rounded to one of its two neighbours at random, the nearer one more often, a number is right on average:

    P(up) = (x - down) / (up - down),   so   E[round(x)] = x

In bits: a float32 is a bfloat16 and 16 bits more. Adding 16 uniform random bits to the pattern carries into the upper
half with exactly this probability; the lower half is then cut off. (Gupta et al., arXiv 1502.02551; for Adam in
bfloat16, Zamirai et al., arXiv 2010.06192.)

Weights that are held as 8-bit codes (affine.py) are decoded for an update, and rounded to codes in the same way.

The random numbers of an update depend only on (seed, number of the parameter, its updates so far): all ranks draw the
same, and a resumed run needs no generator state. They are drawn for pieces of the whole parameter. A process that holds
some rows of it draws those of the rows before too, and drops them, so the numbers do not depend on how it is cut.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sltrain.affine import CodedTensor
from sltrain.numeric import pieces, random_bits, round_by
from sltrain.optim.named_state import named_parameters
from sltrain.optim.wrapper import WrappedOptimizer, only, with_gradients
from sltrain.parameters import PIECE


class Bits:
    """The random bits of one update of a parameter of `numel` elements, for those from `first` on."""

    def __init__(self, generator: torch.Generator, first: int, numel: int) -> None:
        self.position, self._generator, self._numel = first, generator, numel
        for _ in range(first // PIECE):
            random_bits((PIECE,), generator)

    def take(self, number: int) -> Tensor:
        """Those of the next elements, which must lie in one piece of the whole parameter, up to its end or that of
        what is held here."""
        before = self.position % PIECE
        bits = random_bits((min(PIECE, self._numel - self.position + before),), self._generator)
        self.position += number
        return bits[before : before + number]


@dataclass(frozen=True)
class Draws:
    """Which random numbers a parameter gets: those of the `number`-th of an optimizer with this seed; where rows of it
    are held, for the elements from `first` on of `numel` (None: it is held whole)."""

    seed: int
    number: int
    first: int = 0
    numel: int | None = None

    def generator(self, parameter: Tensor, update: int) -> torch.Generator:
        return generator_of_update(parameter.device, self.seed, self.number, update)

    def bits(self, parameter: Tensor, update: int) -> Bits:
        numel = parameter.numel() if self.numel is None else self.numel
        return Bits(self.generator(parameter, update), self.first, numel)


def draw_as(optimizer: Optimizer, whole: Optimizer, places: Mapping[str, tuple[int, int]]) -> None:
    """Let an optimizer of some parameters, and of rows of some, draw the numbers that `whole` would, which has all of
    them whole. `places` are `first` and `numel` of those of which there are rows, by name."""
    known = {name: each.draws[parameter] for each in _drawing(whole) for name, parameter in _named(each)}
    for each in _drawing(optimizer):
        for name, parameter in _named(each):
            first, numel = places.get(name, (0, None))
            each.draws[parameter] = replace(known[name], first=first, numel=numel)


def _drawing(optimizer: Optimizer) -> Iterator[Any]:
    """Those that an optimizer works through, itself included, which draw random numbers."""
    if getattr(optimizer, "draws", None):
        yield optimizer
    for member in optimizer.members if isinstance(optimizer, WrappedOptimizer) else ():
        yield from _drawing(member)


def _named(optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
    named: dict[str, Any] = named_parameters(optimizer)
    return list(named.items())


def round_into(target: Tensor, values: Tensor, bits: Bits) -> None:
    """Write float32 values, stochastically rounded, into a contiguous bfloat16 tensor of the same shape."""
    for to, piece in pieces(target, values, first=bits.position):
        to.copy_(round_by(piece, bits.take(len(piece))))


def generator_of_update(device: torch.device, seed: int, parameter_number: int, update: int) -> torch.Generator:
    """The random numbers of one update of one parameter."""
    digest = hashlib.blake2b(f"{seed} {parameter_number} {update}".encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest))


class StochasticRounding(WrappedOptimizer):
    """Makes any optimizer here round bfloat16 weights, or those of `in_codes` to their codes, stochastically.

    The inner optimizer updates a float32 copy of one parameter, from a float32 copy of its gradient, and the result is
    rounded back: two float32 copies of the largest parameter more than without. bitsandbytes' 8-bit moments come out
    the same (they are computed in float32 from a gradient of any dtype).
    """

    def __init__(self, inner: Optimizer, seed: int, in_codes: Mapping[nn.Parameter, CodedTensor] | None = None) -> None:
        super().__init__(inner)
        self.in_codes = in_codes or {}
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        self.draws = {parameter: Draws(seed, number) for number, parameter in enumerate(parameters)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "evaluate the loss before the step"
        for group, parameter in with_gradients(self):
            self._update(group, parameter)

    def _update(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        held = self.in_codes.get(parameter)
        # Replaces the parameter, and has its state, for this step.
        exact = nn.Parameter(parameter.detach().float() if held is None else held.read())
        assert parameter.grad is not None
        exact.grad = parameter.grad.float()
        state = self.inner.state
        if parameter in state:
            state[exact] = state.pop(parameter)
        try:
            with only(self.inner, group, exact):
                self.inner.step()
        finally:
            if exact in state:
                state[parameter] = state.pop(exact)
        draws, update = self.draws[parameter], int(state[parameter]["step"])
        if held is None:
            round_into(parameter, exact.detach(), draws.bits(parameter, update))
        else:
            held.write(exact.detach(), draws.generator(parameter, update))
