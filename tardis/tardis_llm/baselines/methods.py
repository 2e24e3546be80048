"""The baselines by name, and the one function that runs any of them."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.text import Windows
from ..errors import InvalidInputError
from ..precision import quick_products
from ..report import Progress, silent
from . import affine, cats, flap, layer_skipping, teal
from .gptq import quantise_gptq
from .inputs import InputStatistics, Need
from .layerwise import MatrixMethod, compress_layerwise, outlier_shares
from .matrices import Scope
from .owl import block_sparsities
from .pruning import prune_magnitude, prune_ria, prune_sparsegpt, prune_wanda
from .repair import Repairs, quantise_repaired
from .report import BaselineReport, masked_bytes, quantised_bytes
from .rtn import round_to_nearest

_BITS, _GROUPS = (2, 3, 4, 8), (128, 64)
#: what may follow the name of a quantiser, each behind a plus
REPAIRS = ("affine", "refit", "weigh")
_QUANTISED = re.compile(
    rf"(rtn|gptq)([{''.join(map(str, _BITS))}])(?:-g({'|'.join(map(str, _GROUPS))}))?((?:\+(?:{'|'.join(REPAIRS)}))*)"
)
_OWL = "owl-"

#: from w, statistics and sparsity to the pruned w
_Prune = Callable[[Tensor, InputStatistics, float], Tensor]

_PRUNERS: dict[str, tuple[Need, _Prune]] = {
    "magnitude": (Need.NOTHING, lambda w, x, s: prune_magnitude(w, s)),
    "wanda": (Need.NORMS, lambda w, x, s: prune_wanda(w, x.norms, s)),
    "ria": (Need.NORMS, lambda w, x, s: prune_ria(w, x.norms, s)),
    "sparsegpt": (Need.GRAM, lambda w, x, s: prune_sparsegpt(w, x.hessian, s)),
}
#: methods for whole FFNs, with a reduction
_FFN_METHODS: dict[str, Callable[[PreTrainedModel, Windows, float, Scope, Progress], BaselineReport]] = {
    teal.NAME: teal.apply_teal,
    cats.NAME: cats.apply_cats,
    flap.NAME: flap.prune_flap,
    layer_skipping.NAME: layer_skipping.skip_layers,
}
_SPARSE = (*_PRUNERS, "owl-wanda", "owl-sparsegpt", *_FFN_METHODS)

#: every baseline by its full name; `rtn4` and the like are short for `rtn4-g128`, and may be followed by `REPAIRS`
NAMES = (
    *_SPARSE,
    *(f"{kind}{bits}-g{group}" for kind in ("rtn", "gptq") for bits in _BITS for group in _GROUPS),
    affine.NAME,
)


def full_name(name: str) -> str:
    """The full name of a baseline: `gptq4` is `gptq4-g128`, and `gptq4+refit+affine` is `gptq4-g128+affine+refit`.

    Raises:
        InvalidInputError: there is no such baseline; says which there are.
    """
    quantised = _QUANTISED.fullmatch(name)
    if quantised:
        kind, bits, group, repairs = quantised.groups()
        if kind == "rtn" and "weigh" in repairs:
            raise InvalidInputError(f"{name}: round to nearest has no Hessian to weigh tokens in; leave out +weigh.")
        return "+".join([f"{kind}{bits}-g{group or _GROUPS[0]}", *(each for each in REPAIRS if each in repairs)])
    if name not in NAMES:
        raise InvalidInputError(
            f"there is no baseline {name!r}; choose from {', '.join(NAMES)}; the names of quantisers may be "
            f"followed by {', '.join(f'+{each}' for each in REPAIRS)}."
        )
    return name


def needs_reduction(name: str) -> bool:
    """Whether a baseline needs to be told how much to remove.

    Raises:
        InvalidInputError: there is no such baseline.
    """
    return full_name(name) in _SPARSE


@quick_products()
def apply_baseline(
    name: str,
    model: PreTrainedModel,
    windows: Windows,
    reduction: float | None = None,
    scope: Scope = "ffn",
    progress: Progress = silent,
) -> BaselineReport:
    """Compress a model in place by the baseline `name`.

    Args:
        name: one of `NAMES`, or short for one.
        model: of a supported family, in eval mode.
        windows: calibration tokens.
        reduction: for methods that remove or skip weights, the share of weights to remove or skip; None for those of
            fixed size. What it saves in bytes, once the index is counted, is less, and in the report.
        scope: "ffn" for the matrices of every FFN, "all" for every linear layer in the blocks, where the method is one
            for matrices.
        progress: told of each step.

    Raises:
        UnsupportedModelError: the model's family is not supported.
        InvalidInputError: no such baseline, a reduction or scope that does not suit it, or weights or inputs that are
            not finite.
        InfeasibleBudgetError: CATS reads more than the reduction leaves to choose its neurons.
    """
    name = full_name(name)
    sparsity = _checked_reduction(name, reduction)
    if name == affine.NAME:
        return affine.replace_by_affine(model, windows, scope, progress)
    if sparsity is None:
        return _quantise(name, model, windows, scope, progress)
    if name in _FFN_METHODS:
        return _FFN_METHODS[name](model, windows, sparsity, scope, progress)
    if not name.startswith(_OWL):
        return compress_layerwise(model, windows, _pruner(name, sparsity, sparsity), scope, progress)
    sparsities = block_sparsities(outlier_shares(model, windows, scope, progress), sparsity)
    return compress_layerwise(model, windows, [_pruner(name, each, sparsity) for each in sparsities], scope, progress)


def _pruner(name: str, sparsity: float, asked: float) -> MatrixMethod:
    """Pruning to `sparsity`, which with OWL differs from what was asked for on average."""
    need, prune = _PRUNERS[name.removeprefix(_OWL)]
    return MatrixMethod(name, need, lambda w, x: prune(w, x, sparsity), masked_bytes, asked)  # type: ignore[arg-type]


def _quantise(name: str, model: PreTrainedModel, windows: Windows, scope: Scope, progress: Progress) -> BaselineReport:
    """Round a model, and make up for it where the name says so."""
    method, (_, *repairs) = _quantiser(name), name.split("+")
    if not repairs:
        return compress_layerwise(model, windows, method, scope, progress)
    chosen = Repairs(**dict.fromkeys(repairs, True))
    return quantise_repaired(model, windows, method, chosen, scope, progress)


def _quantiser(name: str) -> MatrixMethod:
    match = _QUANTISED.fullmatch(name)
    assert match, "a full name that is neither sparse nor affine is a quantiser's"
    kind, bits, group = match[1], int(match[2]), int(match[3])

    def apply(w: Tensor, x: InputStatistics | None) -> Tensor:
        return round_to_nearest(w, bits, group) if x is None else quantise_gptq(w, x.hessian, bits, group)

    need = Need.NOTHING if kind == "rtn" else Need.GRAM
    return MatrixMethod(name, need, apply, lambda weight: quantised_bytes(weight, bits, group))


def _checked_reduction(name: str, reduction: float | None) -> float | None:
    if not needs_reduction(name):
        if reduction is not None:
            raise InvalidInputError(f"{name} has a fixed size, but reduction is {reduction!r}; leave it out.")
        return None
    if reduction is None or not 0 < reduction < 1:
        raise InvalidInputError(
            f"reduction is {reduction!r}; for {name} give the share of weights to remove, between 0 and 1, such as 0.7."
        )
    return float(reduction)
