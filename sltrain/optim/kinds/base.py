"""An optimizer is one file:

    @OPTIMIZERS.register("adamw")
    @dataclass
    class AdamWOptions(OptimizerConfig):
        betas: list[float] = ...                 # the keys under `optimizer.`; defaults in conf/optimizer/adamw.yaml
        def make(self, groups, lr, device): ...  # an ordinary torch optimizer
        def state_bytes(self, parameter): ...    # what it keeps of a parameter, for the plan

`optimizer=NAME` chooses it, and `config.optimizer` is the object. From what it says here per-layer updates, stochastic
rounding, checkpoints and memory plans work with it; build.py puts them together. The torch optimizer must keep torch's
protocol: state by parameter in `state`, tensors and plain numbers, among them a "step" that counts a parameter's
updates; settings in `param_groups`, read in every step.

The files of optimizers import torch only inside functions: a mistyped key is refused before torch is loaded.
"""

import importlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from omegaconf import MISSING

from sltrain.parameters import ParamInfo
from sltrain.registry import Registry

if TYPE_CHECKING:
    import torch


@dataclass
class OptimizerConfig:
    """The face of an optimizer. Fields of a subclass are its options; `make` and `state_bytes` must be defined.

    What it says of itself:
        locality: "element", if each element's update depends on that element's gradients alone (or on a block of 256
            around it): it may then be given any piece of a parameter. "matrix" otherwise: it gets whole parameters.
        in_pieces: whether it should be given large parameters in pieces, because it works on several copies of one.
        copies_on_cpu, copies_on_cuda: float32 copies of a parameter that `step` makes; on a CPU one more if the
            parameter is narrower than float32.
        shared_bytes: state that all parameters share.
        package, install: what `make` imports, and the command that brings it.
        compiles: whether its step is compiled on first use, which needs a compiler.
        rounds: whether `make_rounding` rounds bfloat16 weights stochastically by itself.
        smaller: the name of one with a smaller state, to be advised where memory is short.
    """

    name: str = MISSING

    locality: ClassVar[str] = "matrix"
    in_pieces: ClassVar[bool] = False
    copies_on_cpu: ClassVar[int] = 0
    copies_on_cuda: ClassVar[int] = 0
    shared_bytes: ClassVar[int] = 0
    package: ClassVar[str | None] = None
    install: ClassVar[str] = ""
    compiles: ClassVar[bool] = False
    rounds: ClassVar[bool] = False
    smaller: ClassVar[str | None] = None

    def check(self) -> None:
        """Raise ValueError, naming key, value and remedy, for options that cannot be."""

    def check_package(self) -> None:
        """Raise ValueError if the package it needs cannot be imported."""
        if self.package is None:
            return
        try:
            logging.disable(logging.WARNING)  # about kernels that no optimizer here uses
            importlib.import_module(self.package)  # seconds
        except ImportError as error:
            raise ValueError(
                f"optimizer={self.name} needs {self.package}, which cannot be imported ({error}): "
                f"run `{self.install}`, or take optimizer=adamw."
            ) from error
        finally:
            logging.disable(logging.NOTSET)

    def takes(self, parameter: ParamInfo) -> bool:
        """Whether it updates this parameter. What it does not take is updated by `rest()`."""
        return True

    def rest(self) -> "OptimizerConfig":
        """The optimizer of the parameters that this one does not take."""
        from sltrain.optim.kinds.adamw import AdamWOptions

        return AdamWOptions(name="adamw")

    def make(self, groups: list[dict[str, Any]], lr: float, device: "torch.device") -> "torch.optim.Optimizer":
        """The torch optimizer of these parameter groups, each with "params" and "weight_decay"; `device` is theirs."""
        raise TypeError(f"{type(self).__name__} does not say how it is made")

    def make_rounding(
        self, groups: list[dict[str, Any]], lr: float, device: "torch.device", seed: int
    ) -> "torch.optim.Optimizer":
        """Where `rounds`: the same, with weights rounded stochastically. For others rounding.StochasticRounding does
        that, by updating a float32 copy of one parameter at a time."""
        raise TypeError(f"{type(self).__name__} does not round by itself")

    def state_bytes(self, parameter: ParamInfo) -> int:
        """Bytes that it keeps of one parameter between updates."""
        raise TypeError(f"{type(self).__name__} does not say what it keeps of a parameter")

    def step_bytes(self, parameter: ParamInfo, device_type: str, rounding: bool) -> int:
        """Bytes that it takes while it updates one parameter; `rounding`: made by `make_rounding`."""
        narrower = device_type == "cpu" and self.copies_on_cpu > 0 and parameter.element_size < 4
        copies = self.copies_on_cuda if device_type == "cuda" else self.copies_on_cpu + narrower
        return 4 * parameter.numel * copies

    def notes(self, device_type: str) -> list[str]:
        """What a reader of a memory plan should know about it."""
        return []


OPTIMIZERS: Registry[OptimizerConfig] = Registry("optimizer", "sltrain.optim.kinds", "sltrain.optimizers")
