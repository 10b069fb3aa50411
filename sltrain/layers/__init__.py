"""Layers that hold the matrix of an nn.Linear in another form, and functions that put them into any model."""

from sltrain.layers.base import LAYERS, Footprint, ReplacedLinear, Rows
from sltrain.layers.convert import merge_to_dense, replace_linears
from sltrain.layers.cost import set_paths
from sltrain.layers.kinds.cola import CoLALinear
from sltrain.layers.kinds.low_rank import LowRankLinear
from sltrain.layers.kinds.sltrain import SLTrainLinear
from sltrain.layers.parts import DensePart, LowRankPart, Part, SparsePart

__all__ = [
    "LAYERS",
    "CoLALinear",
    "DensePart",
    "Footprint",
    "LowRankLinear",
    "LowRankPart",
    "Part",
    "ReplacedLinear",
    "Rows",
    "SLTrainLinear",
    "SparsePart",
    "merge_to_dense",
    "replace_linears",
    "set_paths",
]
