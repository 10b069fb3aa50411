"""Stochastic rounding of weights. A bfloat16 number keeps 8 significant bits, and an update below half a unit in the
last of them is lost, however often it comes.

Rounded to one of its two neighbours at random, the nearer one more often, a number is right on average:

    P(up) = (x - down) / (up - down),   so   E[round(x)] = x

In bits: a float32 is a bfloat16 and 16 bits more. Adding 16 uniform random bits to the pattern carries into the upper
half with exactly this probability; the lower half is then cut off. (Gupta et al., arXiv 1502.02551; for Adam in
bfloat16, Zamirai et al., arXiv 2010.06192.)

Weights that are held as 8-bit codes (affine.py) are decoded for an update, and rounded to codes in the same way.

The random numbers of an update depend only on (seed, number of the parameter, its updates so far): all ranks draw the
same, and a resumed run needs no generator state.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sltrain.affine import CodedTensor
from sltrain.numeric import pieces, stochastic_round
from sltrain.optim.wrapper import WrappedOptimizer, only, with_gradients


def round_into(target: Tensor, values: Tensor, generator: torch.Generator) -> None:
    """Write float32 values, stochastically rounded, into a contiguous bfloat16 tensor of the same shape."""
    for to, piece in pieces(target, values):
        to.copy_(stochastic_round(piece, generator))


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
        self.seed, self.in_codes = seed, in_codes or {}
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        self._numbers = {parameter: number for number, parameter in enumerate(parameters)}

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
        number, update = self._numbers[parameter], int(state[parameter]["step"])
        generator = generator_of_update(parameter.device, self.seed, number, update)
        if held is None:
            round_into(parameter, exact.detach(), generator)
        else:
            held.write(exact.detach(), generator)
