"""An optimizer is one file:

    @OPTIMIZERS.register("adamw")
    @dataclass
    class AdamWOptions(OptimizerConfig):
        betas: list[float] = ...                 # the keys under `optimizer.`; defaults in conf/optimizer/adamw.yaml
        def make(self, groups, lr, device): ...  # an ordinary torch optimizer
        def state_bytes(self, parameter): ...    # its state for a parameter, for the plan

`optimizer=NAME` chooses it, and `config.optimizer` is the object. What it declares here is enough for per-layer update,
stochastic rounding, checkpoints and memory plans (build.py). The torch optimizer must follow torch's protocol: state by
parameter in `state`, tensors and plain numbers, among them a "step" that counts a parameter's updates; settings in
`param_groups`, read in every step. It must resume bit for bit and occupy exactly the bytes it declares; the tests check
both for every optimizer.

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
    """What an optimizer is configured with and declares. A subclass's fields are its options; it must define `make` and
    `state_bytes`.

    Class attributes:
        locality: "element", if each element's update depends only on the gradients of that element (or of a block of
            256 around it): it can then be given any piece of a parameter. "matrix": it gets whole parameters.
        copies_on_cpu, copies_on_cuda: float32 copies of a parameter that `step` makes; on a CPU one more if the
            parameter is narrower than float32.
        shared_bytes: state that all parameters share.
        package, install: the package that `make` imports, and the command that installs it.
        whole_moments: whether its state are moments of the parameter's shape, whose rows can be changed one by one.
        rounds: whether `make_rounding` rounds bfloat16 weights stochastically itself.
        whole_update: whether it needs several parameters' gradients at once.
        smaller: the name of an optimizer with a smaller state, recommended if memory is short.
    """

    name: str = MISSING

    locality: ClassVar[str] = "matrix"
    copies_on_cpu: ClassVar[int] = 0
    copies_on_cuda: ClassVar[int] = 0
    shared_bytes: ClassVar[int] = 0
    package: ClassVar[str | None] = None
    install: ClassVar[str] = ""
    rounds: ClassVar[bool] = False
    whole_update: ClassVar[bool] = False
    whole_moments: ClassVar[bool] = True
    smaller: ClassVar[str | None] = None

    def keeps_whole_moments(self, rounded: bool) -> bool:
        """`whole_moments` of these options. `rounded`: with stochastic rounding, where an element-wise optimizer that
        does not round itself gets flat pieces."""
        return self.whole_moments and not (rounded and not self.rounds and self.locality == "element")

    def works_on_shards(self, rounded: bool) -> bool:
        """Whether it gives the same numbers on any rows of a parameter as on all: an element-wise optimizer whose state
        has the parameter's shape. Blocks of 256 belong to whole tensors, and so do `rounded` weights, unless it rounds
        them itself."""
        return self.locality == "element" and self.whole_moments and (self.rounds or not rounded)

    def check(self) -> None:
        """Raise ValueError, naming key, value and remedy, for impossible options."""

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
        """Whether it updates this parameter; `rest()` updates the others."""
        return True

    def rest(self) -> "OptimizerConfig":
        """The optimizer for the parameters that this one does not take. It may leave some to its own `rest()`; the last
        one takes all."""
        from sltrain.optim.kinds.adamw import AdamWOptions

        return AdamWOptions(name="adamw")

    def make(self, groups: list[dict[str, Any]], lr: float, device: "torch.device") -> "torch.optim.Optimizer":
        """The torch optimizer of these parameter groups on `device`, each with "params" and "weight_decay"."""
        raise TypeError(f"{type(self).__name__} does not define make")

    def make_rounding(
        self, groups: list[dict[str, Any]], lr: float, device: "torch.device", seed: int
    ) -> "torch.optim.Optimizer":
        """If `rounds`: the same, with stochastic rounding of weights. Others are wrapped in StochasticRounding."""
        raise TypeError(f"{type(self).__name__} does not define make_rounding")

    def state_bytes(self, parameter: ParamInfo) -> int:
        """Bytes of its state for one parameter."""
        raise TypeError(f"{type(self).__name__} does not define state_bytes")

    def step_bytes(self, parameter: ParamInfo, device_type: str, rounding: bool) -> int:
        """Temporary bytes of an update of one parameter; `rounding`: with stochastic rounding."""
        narrower = device_type == "cpu" and self.copies_on_cpu > 0 and parameter.element_size < 4
        copies = self.copies_on_cuda if device_type == "cuda" else self.copies_on_cpu + narrower
        return 4 * parameter.numel * copies

    def warnings(self, weight: "torch.Tensor") -> list[str]:
        """What a user should know before training weights of the dtype of `weight`."""
        return []

    def notes(self, device_type: str) -> list[str]:
        """Remarks on it for a memory plan."""
        return []


OPTIMIZERS: Registry[OptimizerConfig] = Registry(
    "optimizer", "sltrain.optim.kinds", "sltrain.optimizers", helpers=("base", "rule", "projected")
)
