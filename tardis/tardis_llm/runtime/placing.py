"""Put folded FFNs into models, take them out, find them.

In a model, a folded FFN sits in the places of the three parts that it stands for: the up projection keeps its weights
and passes its input on, the activation does nothing, and the down projection, which keeps its weights too, returns the
output. So each family's residuals, dropout and return types stay its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..allocator import contiguous_in_huge_pages
from ..families.linear import is_transposed
from ..families.sites import FFNSite, set_module
from ..ffn.weights import DenseFFN, FoldedWeights
from .backend import REFERENCE, backend_for
from .modules import FoldedFFN
from .stored import Stored, changing_layout


class KeptLinear(Stored):
    """The up projection of a folded FFN: keeps weights under their own names and passes its input on.

    Its parameters are the dense layer's own, and frozen while they are here.

    Args:
        linear: whose weights to keep.
        stacked: whether low-bit weights stand for the weight. It is then empty, but there: a loader that does not know
            TARDIS stops at its shape, where it would draw a missing one at random.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Module, stacked: bool) -> None:
        super().__init__()
        self._transposed = is_transposed(linear)
        self._trained = [name for name, part in linear.named_parameters(recurse=False) if part.requires_grad]
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(linear, name))
        if stacked:
            self.weight = nn.Parameter(self.weight.new_empty(0))
        self.freeze()

    @property
    def matrix(self) -> Tensor:
        """The weight as [out, in]; empty where low-bit weights stand for it."""
        return self.weight.T if self._transposed and self.weight.dim() == 2 else self.weight

    def lay_out(self, neurons: int) -> None:
        """Lay the weight out anew in memory so that each neuron's numbers are consecutive; values and shape stay.

        Args:
            neurons: the dimension of `matrix` that counts them.
        """
        if self._lies_by(neurons):
            return
        with changing_layout():
            if not self._lies_by(neurons):  # no other thread was quicker
                matrix = contiguous_in_huge_pages(self.matrix.transpose(0, neurons)).transpose(0, neurons)
                self.weight.data = matrix.T if self._transposed else matrix

    def _lies_by(self, neurons: int) -> bool:
        return self.matrix.dim() < 2 or self.matrix.transpose(0, neurons).is_contiguous()  # empty where low-bit

    def release(self, linear: nn.Module) -> None:
        """Give the parameters back to the dense layer as they were: set to train or not, and contiguous."""
        for name in self._trained:
            linear.get_parameter(name).requires_grad_()
        weight = linear.get_parameter("weight")
        if not weight.is_contiguous():  # strides choose the kernel, and so bits
            weight.data = contiguous_in_huge_pages(weight.data)

    def forward(self, x: Tensor | None = None) -> Any:
        """x itself; without x, weight [out, in] and bias: see `FoldState.fetched`."""
        return (self.matrix, self.bias) if x is None else x


class FoldedDown(KeptLinear):
    """The down projection of a folded FFN: gets the FFN's input x and returns its output."""

    def __init__(self, linear: nn.Module, up: KeptLinear, ffn: FoldedFFN) -> None:
        super().__init__(linear, stacked=ffn.stacked)
        self._others = (up, ffn)  # in a tuple, so that they are not registered, and saved, twice

    @property
    def ffn(self) -> FoldedFFN:
        """The folded FFN whose output it returns."""
        return self._others[1]

    @property
    def dense(self) -> DenseFFN:
        """The dense weights beside the folded FFN; w1 and w2 are empty where low-bit weights stand for them."""
        up, ffn = self._others
        return DenseFFN(up.matrix, up.bias, self.matrix, self.bias, ffn.activation)

    def lay_out_both(self) -> None:
        """Lay out what fixing reads of the dense weights, unless they are offloaded; see `lay_out`."""
        if not self._lies_well():
            self._others[0].lay_out(neurons=0)
            self.lay_out(neurons=1)

    def _lies_well(self) -> bool:
        """Whether each neuron's dense weights lie together, or are not there to be laid out."""
        up, ffn = self._others
        return ffn.stacked or up.weight.is_meta or (up._lies_by(0) and self._lies_by(1))

    def forward(self, x: Tensor | None = None) -> Any:
        """Output [..., d] of the folded FFN for x [..., d]; without x, weight [out, in] and bias."""
        if x is None:
            return super().forward()
        up, ffn = self._others
        if not torch.compiler.is_compiling() and not self._lies_well() and backend_for(x) is not REFERENCE:
            self.lay_out_both()
        if not up.weight.is_meta:
            return ffn(x, self.dense)
        w1, b1 = up()  # offloaded: a call fetches it
        return ffn(x, DenseFFN(w1, b1, self.matrix, self.bias, ffn.activation))


def install(model: nn.Module, site: FFNSite, ffn: FoldedFFN) -> None:
    """Put a folded FFN into the model at `site`. Dense weights are shared, not copied; stacked, they are left out."""
    up = KeptLinear(site.up, stacked=ffn.stacked)
    set_module(model, site.up_name, up)
    set_module(model, site.activation_name, nn.Identity())
    set_module(model, site.down_name, FoldedDown(site.down, up, ffn))
    site.parent.add_module("tardis", ffn)


def uninstall(model: nn.Module, site: FFNSite) -> None:
    """Put the dense FFN back at `site`."""
    ffn = site.parent.get_submodule("tardis")
    assert isinstance(ffn, FoldedFFN), "installed before"
    ffn.forget()
    for name, part in ((site.up_name, site.up), (site.down_name, site.down)):
        kept = model.get_submodule(name)
        assert isinstance(kept, KeptLinear), "installed before"
        kept.release(part)
    for name, part in site.replaced.items():
        set_module(model, name, part)
    del site.parent.tardis


def lay_out(model: nn.Module) -> None:
    """Lay out folded FFNs for decoding: what fixing reads neuron by neuron, the rest as is fastest."""
    for module in model.modules():
        if isinstance(module, FoldedDown):
            module.lay_out_both()
        if isinstance(module, FoldedFFN):
            module.lay_out(module.fold.bias.dtype)


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
    dense = {id(module.ffn): module.dense for module in model.modules() if isinstance(module, FoldedDown)}
    return {prefix: ffn.weights.beside(dense[id(ffn)]) for prefix, ffn in folded_ffns(model).items()}
