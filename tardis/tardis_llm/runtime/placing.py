"""Put folded FFNs into models, take them out, find them."""

from __future__ import annotations

from torch import nn

from ..families.linear import is_transposed
from ..families.sites import FFNSite, set_module
from .modules import FoldedDown, FoldedFFN, KeptLinear


def install(model: nn.Module, site: FFNSite, ffn: FoldedFFN) -> None:
    """Put a folded FFN into the model at `site`. Dense weights are shared, not copied; stacked, they are left out."""
    transposed = is_transposed(site.up)
    up = KeptLinear(site.up, transposed, stacked=ffn.fallback is not None)
    set_module(model, site.up_name, up)
    set_module(model, site.activation_name, nn.Identity())
    set_module(model, site.down_name, FoldedDown(site.down, transposed, up, ffn))
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
    """Lay out folded FFNs for decoding: what fixing reads neuron by neuron, and the rest in panels."""
    for module in model.modules():
        if isinstance(module, FoldedDown):
            module.lay_out_both()
        if isinstance(module, FoldedFFN):
            module.pack(module.fold.bias.dtype)


def folded_ffns(model: nn.Module) -> dict[str, FoldedFFN]:
    """Every folded FFN of a model by the prefix of its FFN, in order; the prefix is "" for none but the root."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, FoldedFFN)}
    return {name.removesuffix("tardis").removesuffix("."): module for name, module in found.items()}
