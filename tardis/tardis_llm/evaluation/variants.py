"""What `tardis bench` compares: one model in several forms, and other models, each put together within a context.

dense      the model as it is in transformers, every product by torch
kernels    every linear layer through our own CPU kernel in the model's dtype, FFNs included
int8, int4 every linear layer in few bits, FFNs and head included
folded     folded FFNs; the other layers through our kernel, or in few bits
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InvalidInputError
from ..families.sites import FFNSite
from ..families.table import vocabulary
from ..runtime.linears.placing import low_bit_copies, put_linears, through_kernels
from ..runtime.modules import FoldedFFN
from ..runtime.placing import folded_ffns
from .speed import folded

#: bits of the linear layers of a kind of rival
LOW_BIT = {"int8": 8, "int4": 4}
#: rivals that a dense model is made into
KINDS = ("dense", "kernels", *LOW_BIT)


@dataclass(frozen=True)
class Variant:
    """A form of a model.

    Attributes:
        name: as printed.
        model: that it is a form of.
        within: the context in which the model has this form.
    """

    name: str
    model: PreTrainedModel
    within: Callable[[], AbstractContextManager[None]]

    def prompt(self, batch: int, tokens: int) -> Tensor:
        """Random token ids [batch, tokens]."""
        return torch.randint(vocabulary(self.model), (batch, tokens), generator=torch.Generator().manual_seed(3))


def rival(kind: str, model: PreTrainedModel) -> Variant:
    """A dense model in one of the forms `KINDS`.

    Raises:
        InvalidInputError: no such kind, or the machine lacks what multiplies it.
    """
    if kind not in KINDS:
        raise InvalidInputError(f"there is no variant {kind!r}; choose from {', '.join(KINDS)}.")
    if kind == "dense":
        return Variant(kind, model, nullcontext)
    layers: Mapping[str, nn.Module]
    layers = through_kernels(model, ffn=True) if kind == "kernels" else low_bit_copies(model, LOW_BIT[kind], ffn=True)
    return Variant(kind, model, lambda: swapped(model, layers))


def folded_variant(
    model: PreTrainedModel, folds: Sequence[tuple[FFNSite, FoldedFFN]], others: Mapping[str, nn.Module] | None = None
) -> Variant:
    """A dense model with these folds.

    Args:
        model: dense.
        folds: of its FFNs.
        others: what stands for its linear layers outside them; None takes them through our kernel.
    """
    layers = through_kernels(model, ffn=False) if others is None else others

    @contextmanager
    def within() -> Iterator[None]:
        with swapped(model, layers), folded(model, folds):
            yield

    return Variant("folded", model, within)


def loaded_variants(model: PreTrainedModel) -> tuple[Variant, Variant | None]:
    """A folded model as it was loaded, and the same with its dense FFNs where it has them."""
    layers = through_kernels(model, ffn=False)
    ffns = list(folded_ffns(model).values())

    @contextmanager
    def dense() -> Iterator[None]:
        for ffn in ffns:
            ffn.exact = True
        try:
            yield
        finally:
            for ffn in ffns:
                ffn.exact = False

    there = not any(ffn.stacked for ffn in ffns)
    return Variant("folded", model, lambda: swapped(model, layers)), Variant("dense", model, dense) if there else None


@contextmanager
def swapped(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the context, other layers stand in the places that they are named by."""
    before = put_linears(model, layers)
    try:
        yield
    finally:
        put_linears(model, before)
