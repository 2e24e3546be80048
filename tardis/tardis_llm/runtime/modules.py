"""The folded FFN of a transformers model: whether a call goes through the fold or the dense weights, traced or not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ffn.weights import DenseFFN, FoldedWeights
from .backend import REFERENCE, backend_for, dense_ffn
from .kept import prepare
from .operators import Numbered, library, numbered
from .slow import warn_of_order, warn_of_reference
from .state import FoldState
from .stored import refuse_training

#: what the error says of weights that are set to train
TRAINED = "weights of a folded FFN are"


class FoldedFFN(Numbered, FoldState):
    """A folded FFN of a transformers model; the child `tardis` of an FFN.

    Args:
        weights: what to store.

    Attributes:
        exact: compute every neuron, whatever the inputs: by the dense weights, or by those in few bits for them.
        goes_dense: whether inputs [..., d] are computed so, too; None folds all. `prefill.set_prefill` sees to it.
        if_quick: where `goes_dense` says so, fold all the same unless that is slower.
    """

    def __init__(self, weights: FoldedWeights) -> None:
        super().__init__(weights)
        self.exact = False
        self.goes_dense: Callable[[Tensor], bool] | None = None
        self.if_quick = False

    def forward(self, x: Tensor, dense: DenseFFN) -> Tensor:
        """Outputs [..., d] for inputs x [..., d], in the dtype of x.

        Args:
            x: inputs.
            dense: its w1 and w2 are not read where low-bit weights stand for them.

        Raises:
            InvalidInputError: a weight is set to train.
        """
        if torch.is_grad_enabled():
            refuse_training([*self._own(), *dense.tensors], TRAINED)
        exact = self.exact or (self.goes_dense is not None and self.goes_dense(x))
        if exact and not self.stacked:
            return dense_ffn(x, dense)
        tokens = x.reshape(-1, x.shape[-1])
        if torch.compiler.is_compiling() or type(tokens) is not Tensor:
            return self._traced(tokens, dense, exact).view(x.shape)
        return self.run(tokens, dense, exact).view(x.shape)

    def run(self, x: Tensor, dense: DenseFFN, exact: bool) -> Tensor:
        """Outputs [tokens, d] for inputs x [tokens, d], with every neuron computed if `exact`, and else by the fold."""
        y = self.exactly(x, dense, self.if_quick and not self.exact) if exact else None
        return self.prepared(x, dense)(x.contiguous()) if y is None else y

    def fixed(self, x: Tensor, dense: DenseFFN) -> Tensor:
        """[tokens, h] bool: the neurons that it fixes for inputs x [tokens, d]; arguments as `forward`."""
        return self.prepared(x, dense).fixed(x)

    def _traced(self, x: Tensor, dense: DenseFFN, exact: bool) -> Tensor:
        """One operator of a graph where a backend has kernels for x, else the reference with constant shapes."""
        if backend_for(x) is not REFERENCE:
            y: Tensor = torch.ops.tardis.numbered_ffn(x, self.number, dense.w1, dense.b1, dense.w2, dense.b2, exact)
            return y
        warn_of_reference(x, self.fold.bias.dtype)
        ffn = prepare(self.weights.beside(dense), x)
        return ffn.exact(x, dense.b2) if exact and not self.if_quick else ffn(x)


@torch.no_grad()
def _numbered_ffn(
    x: Tensor, number: int, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, exact: bool
) -> Tensor:
    """[tokens, d] for x [tokens, d], by the `FoldedFFN` of that number; dense weights and `exact` as in its `run`."""
    ffn: FoldedFFN = numbered(number)
    y = ffn.run(x, DenseFFN(w1, b1, w2, b2, ffn.activation), exact)
    if not ffn.stacked and not w2.T.is_contiguous():
        warn_of_order()
    return y


library.define("numbered_ffn(Tensor x, int number, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, bool exact) -> Tensor")
library.impl("numbered_ffn", _numbered_ffn, "CompositeExplicitAutograd")


@torch.library.register_fake("tardis::numbered_ffn")
def _(x: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x)
