"""What methods for whole FFNs share: hidden activations, rows in a report, and a module in place of an FFN."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InvalidInputError
from ..families.linear import weight_of
from ..families.sites import FFNSite, find_ffns, set_module
from ..ffn.neuron import value
from .matrices import ModelMatrix, Scope, find_matrices
from .report import MatrixReport


def checked_sites(model: PreTrainedModel, name: str, scope: Scope) -> list[FFNSite]:
    """The FFNs of a model, for a method that is for FFNs alone.

    Raises:
        UnsupportedModelError: the family is not supported.
        InvalidInputError: another scope is asked for, or weights are not finite.
    """
    if scope != "ffn":
        raise InvalidInputError(f"{name} is for FFNs and nothing else, but scope is {scope!r}; give 'ffn'.")
    find_matrices(model, scope)  # checks the weights of all before any is changed
    return find_ffns(model)


def matrices_of(site: FFNSite) -> list[ModelMatrix]:
    """The matrices of an FFN: the gate first, down last."""
    return [ModelMatrix(name, layer) for name, layer in site.linears.items()]


def hidden_of(site: FFNSite, x: Tensor) -> Tensor:
    """[tokens, h] what the down-projection gets for inputs x [tokens, d], few at once, as the FFN's modules are now.

    Inputs may be on another device than the FFN, where its activations are.
    """
    here = x.to(down_weight(site).device)
    v = torch.cat([layer(here) for layer in site.projections.values()], -1)
    return value(v, site.activation, 2 if site.gated else 1)


def output_of(site: FFNSite, x: Tensor) -> Tensor:
    """[tokens, d] outputs of the FFN for inputs x [tokens, d], as its modules are now."""
    y: Tensor = site.down(hidden_of(site, x))
    return y


def unchanged(matrix: ModelMatrix) -> MatrixReport:
    """The row of a matrix that is as it was."""
    weight, dense = matrix.weight, matrix.dense_bytes
    return MatrixReport(matrix.name, weight.numel(), int(weight.count_nonzero()), dense, dense, dense)


def replace_ffn(model: nn.Module, site: FFNSite, module: nn.Module) -> MatrixReport:
    """Put a module, from inputs to outputs, into a model in place of an FFN; its row counts the module's tensors."""
    rows = [unchanged(matrix) for matrix in matrices_of(site)]
    *before, last = site.replaced
    for name in before:
        set_module(model, name, nn.Identity())
    set_module(model, last, module.eval())
    parts = list(module.parameters())
    stored, nonzero = sum(part.nbytes for part in parts), sum(int(p.count_nonzero()) for p in parts if p.ndim == 2)
    return MatrixReport(
        site.prefix, sum(row.weights for row in rows), nonzero, sum(row.dense for row in rows), stored, stored
    )


def down_weight(site: FFNSite) -> Tensor:
    """[d, h] the weight of the down-projection, a view."""
    return weight_of(site.down)
