"""Pruning by the optimal brain surgeon's formula as it stands in papers, in NumPy and float64: an inverse of what is
left of the Hessian for every column. SparseGPT (arXiv 2301.00774) computes the same by one decomposition."""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def pruned(weight: Matrix, moment: Matrix, keep: int, of: int, block: int) -> tuple[Matrix, NDArray[np.bool_]]:
    """The pruned matrix (out, in) and its mask, for inputs whose x^T x has the mean `moment`. Choices are made where a
    group of `of` columns begins; if it is the whole row, anew every `block` columns from the columns that are left."""
    weight, size = weight.copy(), len(moment)
    hessian = moment + 0.01 * moment.diagonal().mean() * np.eye(size)
    mask = np.ones(weight.shape, dtype=bool)
    for j in range(size):
        inverses = [np.linalg.inv(hessian[k:, k:])[0] for k in range(j, size)]
        is_row = of == size
        if j % (block if is_row else of) == 0:
            last = size if is_row else min(j + of, size)
            for o, row in enumerate(weight):
                losses = [row[k] ** 2 / inverses[k - j][0] for k in range(j, last)]
                count = keep - mask[o, :j].sum() if is_row else min(keep, last - j)
                best = sorted(range(len(losses)), key=lambda i: -losses[i])[:count]
                mask[o, j:last] = np.isin(np.arange(last - j), best)
        for o in np.flatnonzero(~mask[:, j]):
            weight[o, j:] -= weight[o, j] / inverses[0][0] * inverses[0]
    return weight * mask, mask
