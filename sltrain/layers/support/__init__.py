"""The support of S, the entries that are trained: drawn once, then fixed.

    kind         drawn                                         stored                      rank of B A + S
    uniform      int(sparsity * out * in) positions, every     row starts and uint16       full (the paper's
                 subset equally likely                         column numbers              Proposition 1)
    stratified   one position in each of as many equal         its offset in its stratum,  full
                 strata of the flattened matrix                1 byte up to 256 entries
    block        b x b blocks: the block lines of the shorter  int32 block numbers         full
                 side hold k each, those of the longer side    (block row * number of
                 equally many, give or take one                block columns + column)
    column       round(sparsity * in) whole columns            int32 column numbers        at most rank + columns
    slice        as many columns, side by side                 int32 column numbers        at most rank + columns
    rolled       a diagonal of about 1 / sparsity blocks,      two numbers, int32          full, where the blocks
                 rolled by a number of columns                                             divide the sides

`uniform` is the paper's (arXiv 2406.02214, section 3.2). The published code shuffles all out * in positions and keeps
the first few; here positions are drawn with replacement until enough are distinct, which has exactly the same
distribution and costs time and memory for the kept ones only. The other kinds are not in the paper. `stratified` is
almost as random in half the bytes. The others trade some freedom of the support for small dense products; they train
whole blocks or columns, so their sparsity is the nearest that exists.

`support=topk` is a uniform support whose positions trained weights choose (building/support_from.py).

A kind is one file: how it is drawn and stored, how S is multiplied, without the CPU kernel (base.py) and with it, and
the memory that takes.
"""

from sltrain.layers.support.base import Support
from sltrain.layers.support.block import BlockSupport
from sltrain.layers.support.column import ColumnSupport
from sltrain.layers.support.rolled import RolledSupport
from sltrain.layers.support.slice import SliceSupport
from sltrain.layers.support.stratified import StratifiedSupport
from sltrain.layers.support.uniform import UniformSupport

KINDS: dict[str, type[Support]] = {
    kind.kind: kind
    for kind in (UniformSupport, StratifiedSupport, BlockSupport, ColumnSupport, SliceSupport, RolledSupport)
}

__all__ = ["KINDS", "Support", "make_support"]


def make_support(
    out_features: int, in_features: int, sparsity: float, kind: str = "uniform", block_size: int | None = None
) -> Support:
    """The support of S in an out x in matrix, before the random draw.

    `sparsity` is the paper's delta, the fraction of the entries that are trained. `block_size` is for kind block; None:
    the largest that fits `sparsity` well. Raises ValueError for an unknown kind, a sparsity outside [0, 1) or one that
    the kind cannot have, a block larger than the matrix, and a matrix too large for int32 positions.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown support {kind!r}: choose one of {', '.join(KINDS)}")
    return KINDS[kind](out_features, in_features, sparsity, block_size)
