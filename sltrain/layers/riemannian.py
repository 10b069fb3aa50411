"""A step along the manifold of matrices of rank r, for W = B A that is held by its factors (LORO: Mo, Huang, Pan,
"Parameter and Memory Efficient Pretraining via Low-rank Riemannian Optimization", ICLR 2025, equation 10).

With U and V orthonormal bases of B's columns and A's rows, a gradient G of W, as large as W, is projected to what keeps
the rank (the tangent space),

    P(G) = U U^T G (I - V V^T) + (I - U U^T) G V V^T + U U^T G V V^T

and the step ends at the matrix of rank r nearest to W - P(G) (retraction). G is never made: of the gradients of the
factors, G A^T and B^T G, follow G V and U^T G, by solving with (r, r) triangles, and W - P(G) has rank 2 r at most.
"""

import torch
from torch import Tensor


@torch.no_grad()
def riemannian_step(B: Tensor, A: Tensor, step_B: Tensor, step_A: Tensor) -> tuple[Tensor, Tensor]:
    """New factors B (out, r), A (r, in), whose columns and rows share the singular values evenly, in float64.

    `step_B` and `step_A`, of the shapes of the factors, are learning rate times gradient of B and A, or what an
    optimizer made of these. What comes back is not finite if B or A has not full rank.
    """
    rank = len(A)
    B, A, step_B, step_A = (tensor.double() for tensor in (B, A, step_B, step_A))
    U, left = torch.linalg.qr(B)  # B = U left
    V, right = torch.linalg.qr(A.t())  # A^T = V right
    G_V = torch.linalg.solve_triangular(right, step_B, upper=True, left=False)
    U_G = torch.linalg.solve_triangular(left.t(), step_A, upper=False)
    inside = U_G @ V
    Q_left, out_left = torch.linalg.qr(G_V - U @ (U.t() @ G_V))
    Q_right, out_right = torch.linalg.qr((U_G - inside @ V.t()).t())
    core = torch.cat([torch.cat([inside, out_right.t()], 1), torch.cat([out_left, torch.zeros_like(inside)], 1)]).neg_()
    core[:rank, :rank] += left @ right.t()
    if not core.isfinite().all():
        return core.new_full(B.shape, torch.nan), core.new_full(A.shape, torch.nan)
    columns, values, rows = torch.linalg.svd(core)
    roots = values[:rank].sqrt()
    new_B = torch.cat([U, Q_left], 1) @ (columns[:, :rank] * roots)
    return new_B, (roots[:, None] * rows[:rank]) @ torch.cat([V, Q_right], 1).t()


def step_bytes(out_features: int, in_features: int, rank: int, element_size: int) -> int:
    """What `riemannian_step` allocates at most, and the steps it is given, of `element_size` bytes a number.

    In float64: the factors, the steps, U and V, G V and U^T G, Q_left and Q_right; 21 (r, r) matrices at the singular
    value decomposition's end; and three matrices of a factor's shape for new_B, then one for new_B and three for new_A.
    """
    sides = out_features + in_features
    last = max(3 * out_features, out_features + 3 * in_features)
    return 8 * (rank * (5 * sides + last) + 21 * rank**2) + element_size * rank * sides
