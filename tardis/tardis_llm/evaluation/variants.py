"""What `tardis bench` compares: forms of one model, each of which is put together within a context.

dense       the model as it is in transformers, every product by torch
kernels     every linear layer through our own CPU kernel in the model's dtype, FFNs included
int8, int4  every linear layer in few bits, FFNs and head included
folded      folded FFNs; the other layers through our kernel, or in few bits
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint.loading import dtype_name, load_dense, load_model
from ..errors import InvalidInputError
from ..families.sites import FFNSite
from ..pipeline.linears import low_bit_copies
from ..runtime.linears.placing import put_linears, through_kernels
from ..runtime.modules import FoldedFFN
from ..runtime.placing import folded_ffns, install, lay_out, move_into_huge_pages, uninstall
from .shapes import RandomFold, random_folds, random_head, random_ids, random_linears

FOLDED = "folded"
#: bits per weight of the rivals that have few
_BITS = {"int8": 8, "int4": 4}
#: forms of a dense model that a folded one is compared with
RIVALS = ("dense", "kernels", *_BITS)


@dataclass(frozen=True)
class Variant:
    """A form of a model.

    Attributes:
        name: name in tables and reports.
        model: the model that this is a form of.
        within: the context in which the model has this form.
        ids: [n] token ids of a text that prompts are taken from; None for random tokens.
    """

    name: str
    model: PreTrainedModel
    within: Callable[[], AbstractContextManager[None]]
    ids: Tensor | None = None

    def prompt(self, batch: int, tokens: int) -> Tensor:
        """Token ids [batch, tokens]: stretches of the text, evenly spread, or random ones.

        Raises:
            InvalidInputError: the text is shorter than that.
        """
        if self.ids is None:
            return random_ids(self.model, batch, tokens, seed=3)
        apart = len(self.ids) // batch
        if apart < tokens:
            raise InvalidInputError(
                f"the text has {len(self.ids)} tokens, and prompts take {batch} times {tokens}; give more text."
            )
        return self.ids[: batch * apart].view(batch, apart)[:, :tokens].contiguous()


def rival(name: str, model: PreTrainedModel) -> Variant:
    """A dense model in one of the forms `RIVALS`.

    Raises:
        InvalidInputError: there is no such form, or the machine lacks what multiplies it.
    """
    if name not in RIVALS:
        raise InvalidInputError(f"there is no variant {name!r}; choose from {', '.join(RIVALS)}.")
    if name == "dense":
        return Variant(name, model, nullcontext)
    layers: Mapping[str, nn.Module]
    layers = through_kernels(model, ffn=True) if name == "kernels" else low_bit_copies(model, _BITS[name], ffn=True)
    return Variant(name, model, lambda: swapped(model, layers))


def variants_of_dense(model: PreTrainedModel, rivals: Sequence[str], fold: RandomFold) -> list[Variant]:
    """The rivals named of a model with random weights, and a random fold behind them; errors as `rival`."""
    return [*(random_rival(name, model) for name in rivals), random_variant(model, fold)]


def random_rival(name: str, model: PreTrainedModel) -> Variant:
    """As `rival`; weights in few bits are random, as those of the model are, which takes less time than rounding."""
    if name not in _BITS:
        return rival(name, model)
    layers = random_linears(model, _BITS[name], ffn=True)
    return Variant(name, model, lambda: swapped(model, layers))


def random_variant(model: PreTrainedModel, fold: RandomFold) -> Variant:
    """A random fold of a model with random weights."""
    folds = list(random_folds(model, fold))
    bits = fold.linear_bits
    return folded_variant(model, folds, {**random_linears(model, bits), **random_head(model, bits)} if bits else None)


def variants_of_checkpoint(folded_model: str, against: Sequence[str], dtype: str | None) -> list[Variant]:
    """The rivals of a folded model, and the model itself behind them.

    Args:
        folded_model: directory or hub name.
        against: names in `RIVALS`, and at most one of a dense model, of which the rivals are then made.
        dtype: name of the dtype to load in; None for that of the checkpoint.

    Raises:
        InvalidInputError: there are two dense models, or none that a rival could be made of.
    """
    folded, own_dense = loaded_variants(load_model(folded_model, dtype))
    models = [name for name in against if name not in RIVALS]
    if len(models) > 1:
        raise InvalidInputError(f"--against names {' and '.join(models)}; give one dense model, and kinds of it.")
    if models:
        dense = load_dense(models[0], dtype_name(folded.model))
        names = dict.fromkeys(["dense", *(name for name in against if name in RIVALS)])
        return [*(rival(name, dense) for name in names), folded]
    if list(against) != ["dense"] or own_dense is None:
        raise InvalidInputError(
            f"{folded_model} has no dense weights for {', '.join(against)}; name the model that it was folded from, as "
            f"in --against MODEL,{','.join(against)}."
        )
    return [own_dense, folded]


def folded_variant(
    model: PreTrainedModel, folds: Sequence[tuple[FFNSite, FoldedFFN]], others: Mapping[str, nn.Module] | None = None
) -> Variant:
    """A dense model with folds in place of its FFNs.

    Args:
        model: dense.
        folds: FFNs and what replaces them.
        others: what replaces linear layers outside the FFNs, by their names; None takes them through our kernel.
    """
    layers = through_kernels(model, ffn=False) if others is None else others

    @contextmanager
    def within() -> Iterator[None]:
        with swapped(model, layers), folded(model, folds):
            yield

    return Variant(FOLDED, model, within)


def loaded_variants(model: PreTrainedModel) -> tuple[Variant, Variant | None]:
    """A folded model as it was loaded, and the model with its dense FFNs, if it has their weights."""
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
    return Variant(FOLDED, model, lambda: swapped(model, layers)), Variant("dense", model, dense) if there else None


def lay_out_all(variants: Sequence[Variant]) -> None:
    """Put the weights of every variant in the order in which they are read, and in huge pages."""
    for variant in variants:
        with variant.within():
            lay_out(variant.model)
            move_into_huge_pages(variant.model)


@contextmanager
def folded(model: PreTrainedModel, folds: Sequence[tuple[FFNSite, FoldedFFN]]) -> Iterator[None]:
    """Within the context, the model's FFNs are folded and laid out; dense weights are shared, which moves them."""
    for site, ffn in folds:
        install(model, site, ffn)
    lay_out(model)
    try:
        yield
    finally:
        for site, _ in folds:
            uninstall(model, site)


@contextmanager
def swapped(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the context, other layers stand in the places that they are named by."""
    before = put_linears(model, layers)
    try:
        yield
    finally:
        put_linears(model, before)
