"""What quantisers can do about their rounding errors, in every FFN: two tricks that folds use, lent to the rivals.

affine    an affine term of the FFN's input, `x C^T + c` with C in 4 bits, is added to the output. It is fitted by ridge
          regression to what rounding left.
refit     the down matrix is solved anew for the hidden activations that the rounded matrices before it give, drawn
          towards the dense one, and then rounded on these. It costs no byte. With an affine term, it is solved for
          what the best such term leaves, or the two would make up for the same errors.
weigh     the Hessians of GPTQ count tokens by their weights, too.

They are calibrated as folds are: layer by layer behind the layers rounded before, each token weighed by what the norms
behind it divide by (`Stream.observe`), and with outputs as the target that make the residual stream the dense model's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.inputs import TextOrSpeech, token_count
from ..calibration.sensitivity import first_token_importance
from ..calibration.text import Windows
from ..calibration.tokens import Tokens
from ..config import FoldConfig
from ..families.linear import bias_of
from ..families.sites import FFNSite
from ..folding.ridge import affine_error
from ..pipeline.session import Followed
from ..report import Progress, silent
from .affine import FFNMoments, best_affine, linear_of
from .ffns import checked_sites, down_weight, hidden_of, matrices_of, output_of
from .inputs import InputStatistics, Need, stream_of
from .layerwise import MatrixMethod, compress_matrix
from .matrices import Scope
from .report import BaselineReport, MatrixReport, quantised_bytes

BITS, GROUP = 4, 128  # of the affine term
_DAMPINGS = (1e-2, 1e-1, 1.0)  # of the refit, relative to the mean square of the hidden activations


@dataclass(frozen=True)
class Repairs:
    """Which of the tricks are used.

    Attributes:
        affine: add an affine term.
        refit: solve the down matrix anew.
        weigh: weigh tokens in the Hessians.
    """

    affine: bool = False
    refit: bool = False
    weigh: bool = False


def refit_down(w: Tensor, fit: FFNMoments, heldout: FFNMoments, biased: bool) -> Tensor:
    """[d, h] fp32, the down matrix that fits some outputs best, drawn towards w by ridge regression.

    Args:
        w: [d, h], the dense one.
        fit: moments of hidden activations, and of these beside the outputs wanted, without any bias.
        heldout: such moments, to choose the damping on.
        biased: whether a bias makes up for the means.
    """
    prior = w.double()
    gram, cross = (each.centred if biased else each.cross for each in (fit.x, fit.y))
    missing, scale = cross - gram @ prior.T, float(gram.diagonal().mean()) + 1e-30
    found = []
    for damping in _DAMPINGS:
        damped = gram.clone()
        damped.diagonal().add_(damping * scale)
        solved = prior + torch.cholesky_solve(missing, torch.linalg.cholesky(damped)).T
        bias = fit.bias_beside(solved) if biased else torch.zeros_like(solved[:, 0])
        found.append((affine_error(solved, bias, heldout.x, heldout.y), solved))
    return min(found, key=lambda pair: pair[0])[1].float()


class AffineTerm(nn.Module):
    """Adds an affine map of an FFN's input to its output.

    Attributes:
        linear: the map.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self._input: Tensor | None = None

    def beside(self, site: FFNSite) -> None:
        """Add to the output of the FFN at a site from now on."""
        site.down.add_module("affine", self)
        site.up.register_forward_pre_hook(self._enter)
        site.down.register_forward_hook(self._leave)

    def _enter(self, up: nn.Module, args: tuple[Any, ...]) -> None:
        self._input = args[0]

    def _leave(self, down: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        assert self._input is not None, "the up-projection runs before the down-projection"
        x, self._input = self._input, None
        added: Tensor = output + self.linear(x)
        return added


@torch.no_grad()
def quantise_repaired(
    model: PreTrainedModel,
    windows: Windows,
    method: MatrixMethod,
    repairs: Repairs,
    scope: Scope = "ffn",
    progress: Progress = silent,
) -> BaselineReport:
    """Round the FFNs of a model in place, and make up for it.

    Args:
        model: of a supported family, in eval mode.
        windows: calibration tokens, to fit on and to choose dampings with.
        method: a quantiser.
        repairs: what to do about its errors.
        scope: must be "ffn".
        progress: told of each block.

    Raises:
        UnsupportedModelError: the family is not supported.
        InvalidInputError: another scope, weights or inputs that are not finite, or a model in training mode.
    """
    sites, stage = checked_sites(model, method.name, scope), f"compressing with {method.name}"
    rows: list[MatrixReport] = []
    first = first_token_importance(model, sites, windows.fit) if repairs.weigh else {}
    with tempfile.TemporaryDirectory() as scratch:

        def follow(some: TextOrSpeech) -> Followed:
            folded, dense = (stream_of(model, some, scratch, first) for _ in range(2))
            return Followed(folded, dense, FoldConfig(device=str(model.device)))

        texts = follow(windows.fit), follow(windows.heldout)
        for done, site in enumerate(sites):
            progress(stage, done, len(sites))
            fit, heldout = (text.at(site) for text in texts)
            rows += quantise_site(site, fit, heldout, method, repairs)
    progress(stage, len(sites), len(sites))
    return BaselineReport(method.name, "ffn", None, token_count(windows.fit), rows)


def quantise_site(
    site: FFNSite, fit: Tokens, heldout: Tokens, method: MatrixMethod, repairs: Repairs
) -> list[MatrixReport]:
    """Round one FFN in place, and make up for it.

    Args:
        site: the dense FFN.
        fit: its inputs, the outputs wanted and the tokens' weights.
        heldout: the same of other text.
        method, repairs: as for `quantise_repaired`.
    """
    *ups, down = matrices_of(site)
    seen = _statistics(method.need, site.hidden_size, fit.device, [fit], repairs.weigh)
    hidden = None
    if not repairs.refit:  # down is rounded on what the dense matrices before it give, as by `compress_layerwise`
        hidden = _statistics(method.need, site.intermediate_size, fit.device, _hidden(site, fit), repairs.weigh)
    rows = [compress_matrix(up, method, seen) for up in ups]
    if repairs.refit:
        texts = _beside_affine(site, fit, heldout) if repairs.affine else (fit, heldout)
        rows.append(_refit(site, *texts, method))
    else:
        rows.append(compress_matrix(down, method, hidden))
    return [*rows, _add_affine(site, fit, heldout)] if repairs.affine else rows


def _statistics(
    need: Need, width: int, device: torch.device, inputs: Iterable[Tokens], weigh: bool
) -> InputStatistics | None:
    """Statistics of inputs, if they are needed, on a device."""
    if need is Need.NOTHING:
        return None
    statistics = InputStatistics.zeros(width, need, device)
    for some in inputs:
        statistics.add(some.x, some.weight if weigh else None)
    return statistics


def _hidden(site: FFNSite, tokens: Tokens) -> Iterator[Tokens]:
    """The tokens with their hidden activations in place of their inputs, some at once."""
    for some in tokens.chunks(site.intermediate_size):
        yield replace(some, x=hidden_of(site, some.x))


def _missing(site: FFNSite, tokens: Tokens) -> Iterator[Tokens]:
    """The tokens with what the outputs wanted have beyond those that the FFN gives now, some at once."""
    for some in tokens.chunks(site.intermediate_size):
        assert some.target is not None, "the dense model gives a target"
        yield replace(some, target=some.target.float() - output_of(site, some.x).float())


def _moments(width: int, outputs: int, device: torch.device, tokens: Iterable[Tokens]) -> FFNMoments:
    """Moments of what comes in beside what is wanted, on a device."""
    moments = FFNMoments.zeros(width, outputs, device)
    for some in tokens:
        assert some.target is not None, "the dense model gives a target"
        moments.add(some.x, some.target, some.weight)
    return moments


def _refit(site: FFNSite, fit: Tokens, heldout: Tokens, method: MatrixMethod) -> MatrixReport:
    """Solve and round the down matrix, on the Hessian that it was solved with, and give its bias what is best then."""
    down, bias = matrices_of(site)[-1], bias_of(site.down)
    sizes = site.intermediate_size, site.hidden_size, fit.device
    seen, held = (_moments(*sizes, _hidden(site, tokens)) for tokens in (fit, heldout))
    solved = refit_down(down.weight, seen, held, bias is not None)
    statistics = (
        InputStatistics(seen.x.cross.diagonal(), seen.x, len(fit.x)) if method.need is not Need.NOTHING else None
    )
    row = compress_matrix(down, method, statistics, solved)
    if bias is not None:
        bias.copy_(seen.bias_beside(down.weight))
    return row


def _beside_affine(site: FFNSite, fit: Tokens, heldout: Tokens) -> tuple[Tokens, Tokens]:
    """The tokens of both texts with what the affine term that fits the FFN now best leaves of the outputs wanted."""
    weight, bias = (part.to(fit.x.device) for part in _best_affine(site, fit, heldout, torch.float32))

    def left(tokens: Tokens) -> Tokens:
        assert tokens.target is not None, "the dense model gives a target"
        return replace(tokens, target=tokens.target.float() - F.linear(tokens.x.float(), weight, bias))

    return left(fit), left(heldout)


def _best_affine(
    site: FFNSite, fit: Tokens, heldout: Tokens, dtype: torch.dtype, bits: int | None = None
) -> tuple[Tensor, Tensor]:
    """The affine map of an FFN's inputs that fits best what its outputs lack; in few bits, if so asked."""
    d = site.hidden_size
    seen, held = (_moments(d, d, fit.device, _missing(site, tokens)) for tokens in (fit, heldout))
    return best_affine(seen, held, dtype, bits, GROUP)


def _add_affine(site: FFNSite, fit: Tokens, heldout: Tokens) -> MatrixReport:
    """Add an affine term to an FFN; its row has no weights, as none were there."""
    weight, bias = _best_affine(site, fit, heldout, down_weight(site).dtype, BITS)
    AffineTerm(linear_of(weight, bias)).beside(site)
    stored = quantised_bytes(weight, BITS, GROUP) + bias.nbytes
    return MatrixReport(f"{site.prefix}.affine", 0, 0, 0, stored, stored)
