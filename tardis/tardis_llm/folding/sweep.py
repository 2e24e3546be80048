"""The column sweep of GPTQ (arXiv 2210.17323) and SparseGPT (arXiv 2301.00774).

The columns of W are replaced from left to right, and what each replacement changes in the output is made up for, as
well as it can be, by the columns not yet replaced:

    H = (2 / N) X^T X, damped        U = upper Cholesky factor of H^-1
    err = (w_j - q_j) / U_jj         W[:, j:] -= err U[j, j:]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_DAMPING = 0.01  # of the mean diagonal

#: what stands for column `j` of a block, given the column [out] as updated by then
Replace = Callable[[int, Tensor], Tensor]
#: looks at the block that starts at a column: W^T [width, out] as updated by then, and its part [width] of U's diagonal
Rule = Callable[[int, Tensor, Tensor], Replace]
#: replaces the block that starts at a column, W^T [width, out], in place; given its part [width, width] of U, returns
#: the errors `err` [width, out]
Block = Callable[[int, Tensor, Tensor], Tensor]


def dead_inputs(hessian: Tensor) -> Tensor:
    """[in] bool: inputs that were zero for every token."""
    return hessian.diagonal() == 0


def inverse_factor(hessian: Tensor) -> Tensor:
    """U [in, in] fp32, the upper Cholesky factor of the inverse of the damped H [in, in].

    Dead inputs count as if `H_jj = 1`. The factor is made in fp64, because H may be close to singular.
    """
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    diagonal[dead_inputs(damped)] = 1
    diagonal += _DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def sweep(w: Tensor, hessian: Tensor, width: int, replace: Block) -> Tensor:
    """Replace the columns of w from left to right, each error carried to the columns after it.

    Args:
        w: [out, in] fp32; it stays as it is.
        hessian: [in, in], H before damping.
        width: columns of a block; the rest of the matrix is updated when the sweep leaves it.
        replace: what replaces a block; see `by_columns`.

    Returns:
        [out, in] fp32, what was put.
    """
    factor = inverse_factor(hessian)
    # transposed, so that a column lies together
    rest = w.T.masked_fill(dead_inputs(hessian)[:, None], 0).contiguous()  # [in, out]
    for start in range(0, len(rest), width):
        end = min(start + width, len(rest))
        block, within = rest[start:end], factor[start:end, start:end]
        errors = replace(start, block, within)
        rest[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return rest.T.contiguous()


def by_columns(rule: Rule) -> Block:
    """Replaces the columns of a block one after the other, by a rule that is asked when the sweep reaches the block."""

    def swept(start: int, block: Tensor, factor: Tensor) -> Tensor:
        replace, errors = rule(start, block, factor.diagonal()), torch.empty_like(block)
        for j, column in enumerate(block):
            put = replace(j, column)
            errors[j] = (column - put) / factor[j, j]
            column.copy_(put)
            block[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        return errors

    return swept
