"""OWL (Yin et al. 2023, arXiv 2310.05175): blocks with many outliers among their scores keep more weights.

With D_i the share of a block's Wanda scores above five times their mean, taken on the dense model, block i keeps
`2 lambda (D_i - min D) / (max D - min D)` of its weights more than another one, shifted to the mean density asked for.
As published, the *spread* of the sparsities is 2 lambda; where the outliers are skewed, a block may be further than
lambda from the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

OUTLIER = 5.0  # times the mean score of the block
SPREAD = 0.08  # lambda


def outlier_share(scores: Sequence[Tensor], times: float = OUTLIER) -> float:
    """Share of all the scores of one block, any shapes, that are above `times` their mean."""
    flat = torch.cat([part.flatten() for part in scores])
    return float((flat > times * flat.mean(dtype=torch.float64)).double().mean())


def block_sparsities(shares: Sequence[float], target: float, spread: float = SPREAD) -> list[float]:
    """Sparsities of the blocks, the lower the larger their share of outliers; their mean is the target.

    They span `2 * spread`, or less where one would leave [0, 1]; blocks that do not differ all get the target.

    Args:
        shares: share of outliers of each block.
        target: mean sparsity, between 0 and 1.
        spread: lambda.
    """
    share = torch.tensor(shares, dtype=torch.float64)
    width = share.max() - share.min()
    if not width:
        return [target] * len(shares)
    more = 2 * spread / width * (share.mean() - share)  # mean zero
    room = min(1.0, float((1 - target) / more.max()), float(target / -more.min()))
    return [float(sparsity) for sparsity in (target + room * more).clamp(0, 1)]
