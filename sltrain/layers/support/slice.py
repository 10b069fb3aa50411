"""round(sparsity * in) adjacent columns, wrapping round the last one; every layer draws its own first column.

Stored and multiplied as whole columns are (column.py). A slice that is cut out of x in place of gathered columns was
tried: on a CPU it is no faster, and on a GPU the host would have to wait for the drawn column.
"""

import torch
from torch import Tensor

from sltrain.layers.support.column import ColumnSupport


class SliceSupport(ColumnSupport):
    """One run of columns, all starts equally likely."""

    kind = "slice"

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        start = torch.randint(self.in_features, (1,), generator=generator, device="cpu")
        columns = (torch.arange(self.num_columns, device="cpu") + start) % self.in_features
        return columns.sort().values.to(torch.int32)
