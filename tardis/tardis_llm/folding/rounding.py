"""Round matrices to few bits: to the nearest, or so that outputs are kept.

The latter starts with GPTQ, which spreads each error over the columns after it, and goes on by coordinate descent: in
turn the scales are fitted to the codes, and every column of codes to all others as they are by then.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidInputError
from ..ffn.packed import ROWS_AT_ONCE, PackedMatrix, expand_scale, midpoint, pack
from .columns import BLOCK, round_columns
from .sweep import dead_inputs, sweep

_SCALE_CANDIDATES = 40  # scales tried per group, between a fifth of the largest weight and all of it
_LEAST_SCALE = 2.0**-24  # the least positive fp16, so that nothing is divided by zero
_ROUNDS, _PASSES = 2, 2  # of fitting scales and codes to each other, and over all columns in each
_DAMPING = 0.2  # of the mean diagonal of the inputs' second moments: other texts have other moments
_SCALE_DAMPING, _MOST_CHANGE = 1e-3, 0.5  # of scales fitted to levels: penalty, and relative change


def quantise(
    w: Tensor, bits: int, group_size: int, covariance: Tensor | None = None, has_zero: bool = False
) -> PackedMatrix:
    """Round w to `bits` per weight.

    Args:
        w: [h, d] fp32.
        bits: 1 to 8.
        group_size: columns per scale; d or more means one scale per row.
        covariance: [d, d] second moments of the inputs, by which the output is kept (GPTQ, arXiv 2210.17323, and
            coordinate descent as in arXiv 2309.01885); None rounds to the nearest.
        has_zero: whether a level is 0; see `PackedMatrix`. Where one weight of a group is far larger than all others,
            these are rounded to 0 rather than to half a step beside it.

    Raises:
        InvalidInputError: w is not finite, or too large for fp16 scales.
    """
    if not bool(torch.isfinite(w).all()):
        raise InvalidInputError("a weight of an FFN has NaN or infinite entries; reload a sound checkpoint.")
    group_size = min(group_size, w.shape[1])
    importance = None if covariance is None else covariance.diagonal()
    scale, zero = best_scale(w, bits, group_size, has_zero, importance), midpoint(bits, has_zero)
    columns = expand_scale(scale.float(), group_size, w.shape[1])
    if covariance is None:
        codes = _nearest(w, columns, bits, zero)
    else:
        damping = _DAMPING * covariance.diagonal().mean()
        covariance = covariance + damping * torch.eye(len(covariance), device=w.device)
        codes = _gptq(w, columns, bits, covariance, zero)
        for _ in range(_ROUNDS):
            scale = refit_scale(w, codes.float() - zero, scale, group_size, covariance)
            columns = expand_scale(scale.float(), group_size, w.shape[1])
            codes = _descend(w, codes, columns, bits, covariance, zero)
    return PackedMatrix(pack(codes, bits), scale.contiguous(), w.shape[1], group_size, has_zero)


def best_scale(
    w: Tensor, bits: int, group_size: int, has_zero: bool = False, importance: Tensor | None = None
) -> Tensor:
    """[h, groups] fp16: per row and group, the scale whose nearest rounding has the least squared error.

    Args:
        w, bits, group_size, has_zero: as for `quantise`.
        importance: [d] mean square of each input, by which the errors of its weights count; None for 1. Where one input
            of a group is far larger than all others, the scale comes to suit its weight.
    """
    best = torch.cat([_best_scale(rows, bits, group_size, has_zero, importance) for rows in w.split(ROWS_AT_ONCE)])
    if bool((best.abs() > torch.finfo(torch.float16).max).any()):
        raise InvalidInputError("a weight of an FFN is too large for fp16 scales; check the checkpoint's weights.")
    return torch.where(best < 0, -1.0, 1.0).half() * best.abs().half().clamp_min(_LEAST_SCALE)


def _best_scale(w: Tensor, bits: int, group_size: int, has_zero: bool, importance: Tensor | None) -> Tensor:
    """[h, groups] fp32: the scales of least squared error for w, a few rows of a matrix.

    With a zero, the largest weight of a group is on the side that has one level more: the scale has its sign for that.
    """
    h, d = w.shape
    groups = F.pad(w, (0, -d % group_size)).view(h, -1, group_size)
    counts = w.new_ones(d) if importance is None else importance.float() + 1e-3 * importance.float().mean()
    counts = F.pad(counts, (0, -d % group_size)).view(-1, group_size)  # 0 for what is filled up
    largest = groups.abs().amax(-1).clamp_min(1e-6)
    if has_zero:
        largest = torch.where(groups.amax(-1) >= largest, -largest, largest)
    best, least = largest, torch.full_like(largest, torch.inf)
    zero, top, rounded = midpoint(bits, has_zero), 2**bits - 1, torch.empty_like(groups)
    for share in torch.linspace(0.2, 1.0, _SCALE_CANDIDATES):
        scale = largest * share / zero
        column = scale[..., None]
        torch.div(groups, column, out=rounded).add_(zero).round_().clamp_(0, top).sub_(zero)
        error = rounded.mul_(column).sub_(groups).square_().mul_(counts).sum(-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _nearest(w: Tensor, scale: Tensor, bits: int, zero: float) -> Tensor:
    """Codes whose levels are nearest to w, for scales that broadcast against it; `zero` is the code of 0."""
    return (w / scale + zero).round().clamp(0, 2**bits - 1).to(torch.uint8)


def _gptq(w: Tensor, scale: Tensor, bits: int, covariance: Tensor, zero: float) -> Tensor:
    """Codes [h, d] uint8, column by column, each error carried to the columns after it.

    Columns of large inputs come first, while all others are left to make up for their errors.
    """
    order = covariance.diagonal().argsort(descending=True, stable=True)
    rows = scale.T[order].contiguous()  # [d, h], as the sweep has its columns

    def replace(start: int, block: Tensor, factor: Tensor) -> Tensor:
        own = factor.diagonal()[:, None]
        at = slice(start, start + len(block))
        levels, change = round_columns(block, None, rows[at], -factor / own, 2**bits - 1, zero)
        block.copy_(levels)
        return change.div_(-own)

    put = torch.empty_like(w)
    put[:, order] = sweep(w[:, order], covariance[order][:, order], BLOCK, replace)
    # what no token of the calibration text had, another text may have
    return _nearest(torch.where(dead_inputs(covariance), w, put), scale, bits, zero)


def _descend(w: Tensor, codes: Tensor, scale: Tensor, bits: int, covariance: Tensor, zero: float) -> Tensor:
    """Codes [h, d] uint8: each column in turn is changed to what is best beside all others as they are by then.

    Args:
        w: [h, d] fp32.
        codes: [h, d] uint8 to start with.
        scale: [h, d] fp32, of each weight.
        bits, covariance, zero: as for `quantise`, and the code of 0.
    """
    columns = scale.T.contiguous()  # transposed, so that a column lies together
    put = (codes.T.contiguous() - zero) * columns  # [d, h]
    slope = covariance @ (w.T - put)
    for start in [*range(0, len(put), BLOCK)] * _PASSES:
        at = slice(start, start + BLOCK)
        within = covariance[at, at]
        curvature = within.diagonal().clamp_min(1e-30)
        best = put[at] + slope[at] / curvature[:, None]  # of each column, if all others stayed
        put[at], change = round_columns(best, put[at], columns[at], within / curvature, 2**bits - 1, zero)
        slope.addmm_(covariance[:, at], change, alpha=-1)
    return _nearest(put, columns, bits, zero).T.contiguous()


def refit_scale(w: Tensor, level: Tensor, scale: Tensor, group_size: int, covariance: Tensor) -> Tensor:
    """[h, groups] fp16: the scales with which levels that are chosen already give the outputs of w best.

    Scales are chosen for nearest rounding, and the sweep has moved the weights since. For each row this is least
    squares with a number a group, drawn a little towards the present scale.

    Args:
        w: [h, d] fp32.
        level: [h, d] fp32, of which each scale is a factor.
        scale: [h, groups] fp16, by which the levels were chosen.
        group_size: columns per scale.
        covariance: [d, d] second moments of the inputs.
    """
    starts = range(0, w.shape[1], group_size)
    gram, left = (w.new_empty(*scale.shape, *more) for more in ((len(starts),), ()))
    error = w - level * expand_scale(scale.float(), group_size, w.shape[1])
    for group, start in enumerate(starts):
        at = slice(start, start + group_size)
        output = level[:, at] @ covariance[at]  # [h, d]
        gram[:, group] = torch.stack([part.sum(1) for part in (output * level).split(group_size, 1)], 1)
        left[:, group] = (output * error).sum(1)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += _SCALE_DAMPING * diagonal.mean(1, keepdim=True) + 1e-30
    change = torch.linalg.solve(gram, left) / scale.float()
    fitted = (scale.float() * (1 + change)).half()
    sound = (change.abs() < _MOST_CHANGE) & fitted.isfinite() & (fitted != 0)  # else few inputs tell of this group
    return torch.where(sound, fitted, scale)
