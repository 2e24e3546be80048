"""CATS (Lee et al. 2024, arXiv 2404.08763): neurons whose activation is small are skipped.

Section 3: of a gated FFN, the neurons with `|act(g)|` below a threshold are left out: their rows of up and columns of
down are not read, while the gate is read whole. The threshold is a quantile of the values on calibration text, of the
same share in every FFN. In a plain FFN `act(z)` takes the place of the gate: up is read whole and columns of down are
skipped. Biases count as read whole.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.text import Windows
from ..calibration.tokens import chunks
from ..errors import InfeasibleBudgetError
from ..families.sites import FFNSite
from ..report import Progress, silent
from .ffns import down_weight, matrices_of
from .matrices import Scope
from .report import BaselineReport
from .skipping import Magnitudes, Skip, skip_layerwise, skip_outputs

NAME = "cats"


def neurons_to_skip(reduction: float, skippable: int, total: int) -> float:
    """Share of the neurons to skip, for a share of the weights that is not to be read.

    Args:
        reduction: share of the weights.
        skippable: weights that skipped neurons save.
        total: weights.

    Raises:
        InfeasibleBudgetError: the weights that are always read are too many.
    """
    share = reduction * total / skippable
    if share >= 1:
        raise InfeasibleBudgetError(
            f"a reduction of {reduction:g} is not feasible: {1 - skippable / total:.1%} of the weights are read to "
            f"choose the neurons. Ask for less than {skippable / total:.3f}."
        )
    return share


@torch.no_grad()
def apply_cats(
    model: PreTrainedModel, windows: Windows, reduction: float, scope: Scope = "ffn", progress: Progress = silent
) -> BaselineReport:
    """Let the FFNs of a model skip neurons, each behind those before it that skip already.

    Args:
        model, windows, scope, progress: as for `apply_teal`.
        reduction: share of the weights of each FFN not to read, between 0 and 1. Of the neurons more are skipped,
            because the gate is read whole.

    Raises:
        UnsupportedModelError, InvalidInputError: as `apply_teal`.
        InfeasibleBudgetError: what is always read is more than the reduction leaves.
    """
    return skip_layerwise(model, windows, NAME, reduction, scope, progress, _install)


def _install(site: FFNSite, x: Tensor, reduction: float) -> None:
    """The threshold of one FFN with inputs x."""
    saves = _skippable(site)
    total, element = sum(matrix.weight.numel() for matrix in matrices_of(site)), down_weight(site).element_size()
    share = neurons_to_skip(reduction, sum(saves.values()) // element, total)
    seen = Magnitudes()
    for chunk in chunks(x, site.intermediate_size):
        seen.add(_activations(site, chunk))
    skip_outputs(site.activation, Skip(seen.threshold(share), saves))


def _skippable(site: FFNSite) -> dict[str, int]:
    """Bytes of each matrix that are not read if all neurons are skipped: of up, without the gate, and of down."""
    *ups, down = matrices_of(site)
    if not site.gated:
        return {down.name: down.weight.nbytes}
    up = ups[-1]
    return {up.name: down.weight.nbytes, down.name: down.weight.nbytes}  # merged or not, up is as large as down


def _activations(site: FFNSite, x: Tensor) -> Tensor:
    """[tokens, h] what the activation gives for inputs x [tokens, d]: of the gate, where there is one."""
    z: Tensor = next(iter(site.projections.values()))(x.to(down_weight(site).device))
    found: Tensor = site.activation(z[:, : site.intermediate_size])
    return found
