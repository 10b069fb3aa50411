"""A dense W in 8-bit codes, a step and a zero point for each 256 of them (Q-GaLore, Zhang et al., arXiv 2407.08296).

    W = s (code - z)              decoded for each product, in forward and again in backward, and not kept
    dx = dy W,  dW = dy^T x       dW is the gradient of `weight`, dense, in the dtype of the run

`weight` stands for W towards autograd and the optimizer: a parameter of W's shape, all of whose entries are one number
in memory. What an update makes of W is written back to the codes, rounded at random (optim/rounding.py).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sltrain.affine import CodedTensor
from sltrain.layers.aligned import aligned, aligned_linear, autocast_dtype, cast_to
from sltrain.layers.base import Footprint, Rows, gradient_bytes
from sltrain.layers.parts import Part
from sltrain.layers.started import StartedLinear
from sltrain.parameters import PIECE

DECODING = 4  # bytes that reading takes for each entry of a piece


class Int8Linear(StartedLinear, kind="int8"):
    """y = x W^T + bias; x (..., in_features) -> (..., out_features).

    Buffers codes (out, in), uint8, and for each 256 entries of W in row-major order a step (int32: the bits of a
    float32) and a zero, uint8; parameters weight (out, in), without memory of its own, and bias (out,) or None. W
    starts normal with standard deviation `init_std`, rounded to the nearest codes. Construction as in StartedLinear.
    """

    GROUPS = {"weight": "int8", "codes": "int8", "steps": "int8", "zeros": "int8"}

    def prepare(self, like: dict[str, Any]) -> None:
        self._stand_for_weight(torch.zeros((), **like))
        held = CodedTensor.zero(self.weight)
        self.codes: Tensor
        self.steps: Tensor
        self.zeros: Tensor
        for name in ("codes", "steps", "zeros"):
            self.register_buffer(name, getattr(held, name))

    @property
    def held(self) -> CodedTensor:
        """W, for reading and writing."""
        return CodedTensor(self.codes, self.steps, self.zeros)

    def held_in_codes(self) -> dict[nn.Parameter, CodedTensor]:
        return {self.weight: self.held}

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.set_weight(self.drawn_weight(generator).to(self.codes.device))
        self.reset_bias(generator)

    def set_weight(self, weight: Tensor) -> None:
        """The nearest codes."""
        self.held.write(weight)

    def forward(self, x: Tensor) -> Tensor:
        cast = autocast_dtype(x)
        y: Tensor = _Coded.apply(x, cast, self.weight, self.codes, self.steps, self.zeros)
        return y if self.bias is None else y + cast_to(self.bias, cast)

    def parts(self) -> dict[str, Part]:
        return {"W": CodedPart(self.held)}

    def dense_weight(self) -> Tensor:
        return super().dense_weight().to(self.weight.dtype)

    def settings(self) -> dict[str, Any]:
        return {}

    def multiply_adds(self) -> int:
        return self.in_features * self.out_features

    def footprint(self, rows: Rows) -> Footprint:
        """W, while a piece of it is decoded. It is freed before its gradient is made."""
        numel = self.codes.numel()
        dense, gradients = numel * rows.element_size, gradient_bytes(self)
        cast = dense if rows.element_size < self.weight.element_size() else 0  # of the gradient
        return Footprint(0, max(dense + DECODING * min(numel, PIECE) - gradients, cast), gradients)

    # ---- `weight` is one number: memory is given, moved and saved for that alone

    def _stand_for_weight(self, number: Tensor) -> None:
        self.weight = nn.Parameter(number.detach().expand(self.out_features, self.in_features))

    def _apply(self, fn: Any, recurse: bool = True) -> "Int8Linear":
        weight, self._parameters["weight"] = self.weight, None
        super()._apply(fn, recurse)
        number = torch.zeros_like(fn(weight.detach()[0, 0]))  # to_empty leaves it to chance, and checkpoints have it
        self._parameters["weight"] = weight
        if (number.dtype, number.device) != (weight.dtype, weight.device):
            self._stand_for_weight(number)
            self.weight.requires_grad_(weight.requires_grad)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight.detach()[0, 0]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *lists: Any) -> None:
        strict, missing, *_ = lists
        number = state_dict.pop(f"{prefix}weight", None)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *lists)
        if number is not None:
            missing[:] = [key for key in missing if key != f"{prefix}weight"]
            if local_metadata.get("assign_to_params_buffers", False):
                self._stand_for_weight(number)


@dataclass(frozen=True)
class CodedPart(Part):
    """W, decoded when it is asked for."""

    held: CodedTensor
    group = "dense"

    @torch.no_grad()
    def dense(self) -> Tensor:
        return self.held.read()

    @torch.no_grad()
    def norm(self) -> Tensor:
        return self.held.read().norm()


class _Coded(torch.autograd.Function):
    """x (..., in), weight (out, in), and the codes, steps and zeros that it stands for -> x W^T (..., out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cast: torch.dtype | None, weight: Tensor, *held: Any) -> Tensor:
        ctx.save_for_backward(x, *held)
        ctx.weight_dtype, rows = weight.dtype, cast_to(x, cast)
        return aligned_linear(rows, CodedTensor(*held).read(rows.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, *held = ctx.saved_tensors
        out_features, in_features = held[0].shape
        rows = aligned(grad_y.reshape(-1, out_features), pad_rows=False)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            W = aligned(CodedTensor(*held).read(grad_y.dtype))
            grad_x = (rows @ W)[:, :in_features].reshape(x.shape).to(x.dtype)
            del W  # before its gradient is allocated
        if ctx.needs_input_grad[2]:
            columns = aligned(x.to(grad_y.dtype).reshape(-1, in_features), pad_rows=False)
            grad_weight = (rows.t() @ columns)[:out_features, :in_features].contiguous().to(ctx.weight_dtype)
        return grad_x, None, grad_weight, None, None, None
