"""Put folded FFNs into models, take them out, find them.

In a model, a folded FFN sits in the places of the three parts that it stands for: the up projection keeps its weights
and passes its input on, the activation does nothing, and the down projection, which keeps its weights too, returns the
output. So each family's residuals, dropout and return types stay its own. The parts of a gated FFN do not follow one
another, so `GatedFFN` takes the place of the module around them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..allocator import contiguous_in_huge_pages, replaced, use_huge_pages
from ..families.linear import follow_one_another, is_transposed, joined, one_below_the_other
from ..families.sites import FFNSite, set_module
from ..ffn.weights import DenseFFN, FoldedWeights
from .backend import REFERENCE, backend_for
from .modules import TRAINED, FoldedFFN
from .stored import Stored, changing_layout, refuse_training


class KeptLinear(Stored):
    """The up projection of a folded FFN: keeps weights under their own names and passes its input on.

    Its parameters are the dense layer's own, and frozen while they are here. Where they are laid out anew they are
    replaced in both, and not written over: a call that another thread runs meanwhile keeps those that it began with.

    Args:
        linear: whose weights to keep.
        stacked: whether low-bit weights stand for the weight. It is then empty, but there: a loader that does not know
            TARDIS stops at its shape, where it would draw a missing one at random.
    """

    weight: Tensor
    bias: Tensor | None
    #: the storage that its weight shares with those of the layers behind it, as one matrix
    together: Tensor | None = None

    def __init__(self, linear: nn.Module, stacked: bool) -> None:
        super().__init__()
        self.transposed = is_transposed(linear)
        self._dense: ref[nn.Module] | None = ref(linear)  # weakly: nothing else may need it, nor what it holds
        self._trained = [name for name, part in linear.named_parameters(recurse=False) if part.requires_grad]
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(linear, name))
        if stacked:
            self.weight = nn.Parameter(self.weight.new_empty(0))
        self.freeze()

    @property
    def matrix(self) -> Tensor:
        """The weight as [out, in]; empty where low-bit weights stand for it."""
        return self.weight.T if self.transposed and self.weight.dim() == 2 else self.weight

    def lay_out(self, neurons: int) -> None:
        """Lay the weight out anew in memory so that each neuron's numbers are consecutive; values and shape stay.

        Args:
            neurons: the dimension of `matrix` that counts them.
        """
        if self.lies_by(neurons):
            return
        with changing_layout():
            if not self.lies_by(neurons):  # no other thread was quicker
                matrix = contiguous_in_huge_pages(self.matrix.transpose(0, neurons)).transpose(0, neurons)
                self.exchange("weight", matrix.T if self.transposed else matrix)

    def exchange(self, name: str, data: Tensor) -> None:
        """Other data for a parameter, here and in the dense layer."""
        new = replaced(self.get_parameter(name), data)
        for layer in filter(None, (self, self.dense)):
            layer.register_parameter(name, new)

    @property
    def dense(self) -> nn.Module | None:
        """The dense layer, while something else holds it."""
        return None if self._dense is None else self._dense()

    def lies_by(self, neurons: int) -> bool:
        """Whether the numbers of each neuron are consecutive; see `lay_out`."""
        return self.matrix.transpose(0, neurons).is_contiguous()

    def release(self, linear: nn.Module) -> None:
        """Give the parameters back to the dense layer as they were: set to train or not, and contiguous."""
        weight = linear.get_parameter("weight")
        if not weight.is_contiguous():  # strides choose the kernel, and so bits
            linear.register_parameter("weight", replaced(weight, contiguous_in_huge_pages(weight.data)))
        for name in self._trained:
            linear.get_parameter(name).requires_grad_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeptLinear:
        self.together = None  # the weight moves away from it
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "together": None, "_dense": None}

    def forward(self, x: Tensor | None = None) -> Any:
        """x itself; without x, weight [out, in] and bias: see `FoldState.fetched`."""
        return (self.matrix, self.bias) if x is None else x


class Parts:
    """A folded FFN with the modules that keep the dense weights beside it, and its forward.

    Args:
        ups: the up-projections, the gate first where it is apart.
        down: the down-projection.
        ffn: the folded FFN.
    """

    def __init__(self, ups: list[KeptLinear], down: KeptLinear, ffn: FoldedFFN) -> None:
        self.ups, self.down, self.ffn = ups, down, ffn

    @property
    def dense(self) -> DenseFFN:
        """The dense weights beside the folded FFN; w1 and w2 are empty where low-bit weights stand for them."""
        ups = [(up.matrix, up.bias) for up in self.ups]
        return self._dense(ups, (self.down.matrix, self.down.bias))

    def _dense(self, ups: list[tuple[Tensor, Tensor | None]], down: tuple[Tensor, Tensor | None]) -> DenseFFN:
        """The dense weights from weight and bias of each layer."""
        matrices = [matrix for matrix, _ in ups]
        w1 = matrices[0] if self.ffn.stacked else self._together(matrices)
        return DenseFFN(w1, joined([bias for _, bias in ups], matrices), *down, self.ffn.activation)

    def _together(self, matrices: list[Tensor]) -> Tensor:
        """The up-projections as one matrix; a graph cannot see where they lie, and takes what was kept of them."""
        kept = self.ups[0].together if torch.compiler.is_compiling() and len(matrices) > 1 else None
        return one_below_the_other(matrices) if kept is None else kept

    def lay_out(self) -> None:
        """Lay out what fixing reads of the dense weights, unless they are offloaded; see `KeptLinear.lay_out`."""
        if not self.lie_well():
            for up in self.ups:
                up.lay_out(neurons=0)
            self.down.lay_out(neurons=1)
            _put_behind_one_another(self.ups)

    def lie_well(self) -> bool:
        """Whether each neuron's dense weights lie together, or are not there to be laid out."""
        if self.ffn.stacked or self.ups[0].weight.is_meta:
            return True
        together = len(self.ups) == 1 or follow_one_another([up.matrix for up in self.ups])
        return together and all(up.lies_by(0) for up in self.ups) and self.down.lies_by(1)

    def run(self, x: Tensor) -> Tensor:
        """Output [..., d] of the folded FFN for x [..., d].

        Raises:
            InvalidInputError: a weight is set to train.
        """
        if torch.is_grad_enabled():  # what is read as one matrix no longer says which of its parts are
            refuse_training([part for kept in (*self.ups, self.down) for part in kept.parameters()], TRAINED)
        if not torch.compiler.is_compiling() and not self.lie_well() and backend_for(x) is not REFERENCE:
            self.lay_out()
        if not self.ups[0].weight.is_meta:
            return self.ffn(x, self.dense)
        down = self.down.matrix, self.down.bias
        ups = [up() for up in self.ups]  # offloaded: a call fetches it
        return self.ffn(x, self._dense(ups, self.down() if down[0].is_meta else down))


def _put_behind_one_another(layers: list[KeptLinear]) -> None:
    """Move the weights of layers into one storage, where they are read as one matrix; values and shapes stay."""
    if len(layers) == 1 or follow_one_another([layer.matrix for layer in layers]):
        return
    with changing_layout():
        sizes = [len(layer.matrix) for layer in layers]
        whole = contiguous_in_huge_pages(torch.cat([layer.matrix for layer in layers]))
        for layer, rows in zip(layers, whole.split(sizes), strict=True):
            layer.exchange("weight", rows.T if layer.transposed else rows)
        layers[0].together = whole
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if len(biases) == len(layers):
            for layer, some in zip(layers, torch.cat(biases).split(sizes), strict=True):
                layer.exchange("bias", some)


class FoldedDown(KeptLinear):
    """The down projection of a folded FFN: gets the FFN's input x and returns its output."""

    def __init__(self, linear: nn.Module, up: KeptLinear, ffn: FoldedFFN) -> None:
        super().__init__(linear, stacked=ffn.stacked)
        self._others = (up, ffn)  # in a tuple, so that they are not registered, and saved, twice

    @property
    def parts(self) -> Parts:
        """All that belongs to the folded FFN."""
        up, ffn = self._others
        return Parts([up], self, ffn)

    def forward(self, x: Tensor | None = None) -> Any:
        """Output [..., d] of the folded FFN for x [..., d]; without x, weight [out, in] and bias."""
        return super().forward() if x is None else self.parts.run(x)


class GatedFFN(nn.Module):
    """A folded FFN in the place of the module around a gated one; its projections keep their names in it.

    Args:
        site: where it goes.
        ffn: the folded FFN.
    """

    def __init__(self, site: FFNSite, ffn: FoldedFFN) -> None:
        super().__init__()
        names = {name: name.removeprefix(f"{site.prefix}.") for name in site.linears}
        for name, layer in site.linears.items():
            self.add_module(names[name], KeptLinear(layer, stacked=ffn.stacked))
        self._ups, self._down = [names[name] for name in site.projections], names[site.down_name]
        self.tardis = ffn

    @property
    def parts(self) -> Parts:
        """All that belongs to the folded FFN."""
        kept: Any = self._modules
        return Parts([kept[name] for name in self._ups], kept[self._down], kept["tardis"])

    def forward(self, x: Tensor) -> Tensor:
        """Output [..., d] of the folded FFN for x [..., d]."""
        return self.parts.run(x)


def install(model: nn.Module, site: FFNSite, ffn: FoldedFFN) -> None:
    """Put a folded FFN into the model at `site`. Dense weights are shared, not copied; stacked, they are left out."""
    if site.gated:
        set_module(model, site.prefix, GatedFFN(site, ffn))
        return
    up = KeptLinear(site.up, stacked=ffn.stacked)
    set_module(model, site.up_name, up)
    set_module(model, site.activation_name, nn.Identity())
    set_module(model, site.down_name, FoldedDown(site.down, up, ffn))
    site.parent.add_module("tardis", ffn)


def uninstall(model: nn.Module, site: FFNSite) -> None:
    """Put the dense FFN back at `site`."""
    ffn = model.get_submodule(f"{site.prefix}.tardis".removeprefix("."))
    assert isinstance(ffn, FoldedFFN), "installed before"
    ffn.forget()
    for name, part in site.linears.items():
        kept = model.get_submodule(name)
        assert isinstance(kept, KeptLinear), "installed before"
        kept.release(part)
    for name, part in site.replaced.items():
        set_module(model, name, part)
    if not site.gated:
        del site.parent.tardis


def lay_out(model: nn.Module) -> None:
    """Lay out folded FFNs for decoding: what fixing reads neuron by neuron, the rest as is fastest."""
    for module in model.modules():
        if isinstance(module, FoldedDown | GatedFFN):
            module.parts.lay_out()
        if isinstance(module, FoldedFFN):
            module.lay_out(module.fold.bias.dtype)


def move_into_huge_pages(model: nn.Module) -> None:
    """Move a model's weights as `use_huge_pages` does, and those that dense layers share with folded FFNs along."""
    modules = list(model.modules())
    dense = [module.dense for module in modules if isinstance(module, KeptLinear)]
    with changing_layout():
        use_huge_pages([*modules, *filter(None, dense)])


def folded_ffns(model: nn.Module) -> dict[str, FoldedFFN]:
    """Every folded FFN of a model by the full name of the FFN that it stands for, in the model's order.

    Example:
        >>> from tardis_llm.checkpoint.loading import load_model
        >>> list(folded_ffns(load_model("folded")))
        ['transformer.h.0.mlp', 'transformer.h.1.mlp']
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, FoldedFFN)}
    return {name.removesuffix("tardis").removesuffix("."): module for name, module in found.items()}


def folded_weights(model: nn.Module) -> dict[str, FoldedWeights]:
    """What every folded FFN of a model reads, as stored and with the dense weights beside, by the prefix of its FFN."""
    parts = [module.parts for module in model.modules() if isinstance(module, FoldedDown | GatedFFN)]
    dense = {id(each.ffn): each.dense for each in parts}
    return {prefix: ffn.weights.beside(dense[id(ffn)]) for prefix, ffn in folded_ffns(model).items()}
