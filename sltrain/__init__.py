"""Pretraining of LLaMA models with sparse plus low-rank weights (SLTrain, arXiv 2406.02214).

Every command is a function here; layers, and the bases of plug-ins, are classes. Each is imported when it is first
used: importing the package costs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sltrain.errors import Error as Error

if TYPE_CHECKING:  # the same names as below, for editors and type checkers
    from sltrain.api.public import Run as Run
    from sltrain.api.public import bench as bench
    from sltrain.api.public import evaluate as evaluate
    from sltrain.api.public import export as export
    from sltrain.api.public import generate as generate
    from sltrain.api.public import load as load
    from sltrain.api.public import plan as plan
    from sltrain.api.public import report as report
    from sltrain.api.public import tokenize as tokenize
    from sltrain.api.public import train as train
    from sltrain.data.sources.base import SOURCES as SOURCES
    from sltrain.data.sources.base import SourceConfig as SourceConfig
    from sltrain.layers import LAYERS as LAYERS
    from sltrain.layers import LowRankLinear as LowRankLinear
    from sltrain.layers import ReplacedLinear as ReplacedLinear
    from sltrain.layers import SLTrainLinear as SLTrainLinear
    from sltrain.layers import merge_to_dense as merge_to_dense
    from sltrain.layers import replace_linears as replace_linears
    from sltrain.layers import set_paths as set_paths
    from sltrain.methods.base import METHODS as METHODS
    from sltrain.methods.base import Method as Method
    from sltrain.optim.kinds.base import OPTIMIZERS as OPTIMIZERS
    from sltrain.optim.kinds.base import OptimizerConfig as OptimizerConfig

__version__ = "0.1.0"

PUBLIC = {
    "sltrain.api.public": "Run bench evaluate export generate load plan report tokenize train",
    "sltrain.data.sources.base": "SOURCES SourceConfig",
    "sltrain.layers": "LAYERS LowRankLinear ReplacedLinear SLTrainLinear merge_to_dense replace_linears set_paths",
    "sltrain.methods.base": "METHODS Method",
    "sltrain.optim.kinds.base": "OPTIMIZERS OptimizerConfig",
}  # module -> what is taken from it
_MODULE_OF = {name: module for module, names in PUBLIC.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sltrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(["Error", "__version__", *_MODULE_OF])
