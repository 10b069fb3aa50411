"""One-shot pruning of a matrix by the inputs that it reads: SparseGPT (Frantar and Alistarh, arXiv 2301.00774,
algorithm 1).

    H = X^T X / n + lambda I     of n rows of inputs X, lambda a hundredth of the mean of the diagonal
    H^-1 = U^T U                 U upper triangular: with H' = H without the first j rows and columns, row j of U is the
                                 first row of H'^-1 over the root of its first entry

Columns are visited from left to right. Where a row loses its entry w of column j, its later entries take over what the
row has lost on these inputs, as far as they can (the step of an optimal brain surgeon, Hassibi and Stork, 1992):

    e = w / U_jj,   w_k <- w_k - e U_jk for k > j,   which leaves a squared error of e^2

so e^2 is the score by which entries are kept: the largest of each group of columns, chosen when the sweep reaches the
group. A group that is a whole row is chosen anew every BLOCK columns, or sixteenth of the row if that is less, from
what the row may still keep of the columns to come. Columns behind a block get its updates in one product. Every row
keeps the same number of entries, where the authors' code lets a block's rows differ.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sltrain.layers.masked import keep_largest

BLOCK = 128  # columns updated one by one, as in the paper
CHOICES_A_ROW = 16  # at least
DAMPING = 0.01  # lambda over the mean of the diagonal of X^T X / n, as in the authors' code


def inverse_root(moment: Tensor) -> Tensor:
    """U, upper triangular with U^T U = H^-1, from X^T X / n (in, in), in its dtype. Inputs that are all zero count as
    uncorrelated. Raises ValueError for a moment with numbers that are not finite."""
    damping = DAMPING * float(moment.diagonal().mean()) or 1.0
    damped = moment + damping * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))  # of the last column first: H = M M^T, M upper
    if failed or not lower.isfinite().all():
        raise ValueError("the inputs of the calibration text are not finite numbers")
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)


def prune(weight: Tensor, moment: Tensor, keep: int, of: int, block: int | None = None) -> tuple[Tensor, Tensor]:
    """A matrix (out, in), of which `keep` of every `of` columns of a row are kept as in masked.py, for inputs with the
    moment X^T X / n (in, in): its entries, in the moment's dtype, which count where they are kept, and the mask (out,
    in) bool. Raises ValueError as `inverse_root`."""
    left, U, size = weight.to(moment.dtype, copy=True), inverse_root(moment), weight.shape[1]
    roots, mask = U.diagonal(), torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    is_row = of == size
    if is_row:
        width = block or max(1, min(BLOCK, size // CHOICES_A_ROW))
    else:
        width = of * max(1, (block or BLOCK) // of)  # no group is in two blocks
    for first in range(0, size, width):
        last = min(first + width, size)
        errors = left.new_zeros(len(left), last - first)
        for j in range(first, last):
            if is_row and j == first:
                mask[:, j:] = _largest_of_rest((left[:, j:] / roots[j:]).abs(), keep - mask[:, :j].sum(1))
            elif not is_row and (j - first) % of == 0:
                group = slice(j, min(j + of, last))
                scores = F.pad((left[:, group] / roots[group]).abs(), (0, of - (group.stop - j)), value=-1.0)
                mask[:, group] = keep_largest(scores, keep, of)[:, : group.stop - j]
            error = torch.where(mask[:, j], 0.0, left[:, j] / roots[j])
            left[:, j:last].addr_(error, U[j, j:last], alpha=-1)
            errors[:, j - first] = error
        left[:, last:].addmm_(errors, U[first:last, last:], alpha=-1)
    return left, mask


def _largest_of_rest(scores: Tensor, counts: Tensor) -> Tensor:
    """The mask of the largest scores (out, columns) of each row, as many as its count (out,)."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return torch.zeros_like(places).scatter_(1, order, places)
