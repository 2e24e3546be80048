"""Store the linear layers of a model in few bits, and those of its dense FFNs where a caller says so."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..calibration.moments import SecondMoments
from ..calibration.stream import Stream
from ..families.linear import bias_of, weight_of
from ..families.sites import named_blocks
from ..ffn.packed import PackedMatrix
from ..folding.rounding import quantise
from ..report import LinearsReport
from ..runtime.linears.head import REMAINDER_BITS, PredictedHead, top_of
from ..runtime.linears.lowbit import GROUP_SIZE, LowBitLinear, check_bits
from ..runtime.linears.placing import linear_layers, put_linears, untie_head
from .session import Session, advance_to

_ROWS = 16_384  # of a weight that are rounded at once, which bounds the working memory


def quantise_linears(
    model: PreTrainedModel, bits: int, group_size: int = GROUP_SIZE, *, ffn: bool = False
) -> LinearsReport:
    """Store the linear layers of a model in few bits, in place: all outside the FFNs, lm_head included.

    A head that shares its weight with the embedding gets a copy of its own; the embedding stays as it is.

    Args:
        model: dense or folded.
        bits: 4 or 8.
        group_size: inputs that share a scale.
        ffn: also store dense FFNs in few bits.

    Returns:
        Layers, and bytes before and after.

    Raises:
        InvalidInputError: see `low_bit_copies`.

    Examples:
        >>> report = quantise_linears(model, 8)
        >>> report.layers, report.stored < report.dense
        (5, True)
    """
    layers = low_bit_copies(model, bits, group_size, ffn=ffn)
    before = put_linears(model, layers)
    untie_head(model)
    return _report(model, bits, before.values(), layers.values())


def _report(
    model: PreTrainedModel, bits: int, before: Collection[nn.Module], after: Collection[LowBitLinear | PredictedHead]
) -> LinearsReport:
    """The figures of layers before and after they were stored in few bits."""
    embeddings = {module.weight.data_ptr() for module in model.modules() if isinstance(module, nn.Embedding)}
    parts = [part for layer in before for part in layer.parameters()]
    shared = sum(part.nbytes for part in parts if part.data_ptr() in embeddings)
    dense, stored = (sum(part.nbytes for part in each) for each in (parts, after))
    return LinearsReport(bits, len(after), dense, stored, shared)


def low_bit_copies(
    model: PreTrainedModel, bits: int, group_size: int = GROUP_SIZE, *, ffn: bool = False
) -> dict[str, LowBitLinear]:
    """Low-bit copies of a model's linear layers by name, rounded to the nearest; `put_linears` puts them in.

    Args:
        model: dense or folded.
        bits: 4 or 8.
        group_size: inputs that share a scale.
        ffn: also copy the layers of dense FFNs.

    Raises:
        InvalidInputError: other bits, or a weight that is not finite.
    """
    check_bits(bits)
    layers = linear_layers(model, ffn=ffn)
    return {name: low_bit_copy(layer, bits, group_size) for name, layer in layers.items()}


def low_bit_copy(layer: nn.Module, bits: int, group_size: int, covariance: Tensor | None = None) -> LowBitLinear:
    """A linear layer in few bits.

    Args:
        layer: dense.
        bits: 4 or 8.
        group_size: inputs that share a scale; as many as there are, or more, mean one scale per output.
        covariance: [in, in] second moments of the inputs, by which rounding errors are spread (GPTQ, arXiv 2210.17323);
            None rounds to the nearest.

    Raises:
        InvalidInputError: the weight is not finite.
    """
    weight = weight_of(layer).detach()
    parts = [quantise(rows.float(), bits, group_size, covariance) for rows in weight.split(_ROWS)]
    return LowBitLinear(_joined(parts), _bias(layer), weight.dtype)


def predicted_head(layer: nn.Module, bits: int, group_size: int, covariance: Tensor | None = None) -> PredictedHead:
    """A head whose predictor has half of `bits`, at the places of the errors that its inputs can best bear.

    Args:
        layer: dense.
        bits: of the other linear layers.
        group_size: as for `low_bit_copy`.
        covariance: as for `low_bit_copy`; without, two bits predict little.

    Raises:
        InvalidInputError: the weight is not finite.
    """
    weight = weight_of(layer).detach()
    predictors, remainders = list[PackedMatrix](), list[PackedMatrix]()
    for rows in weight.split(_ROWS):
        predictors.append(quantise(rows.float(), bits // 2, group_size, covariance))
        remainders.append(quantise(rows.float() - predictors[-1].dequantise(), REMAINDER_BITS, group_size))
    return PredictedHead(_joined(predictors), _joined(remainders), _bias(layer), top_of(len(weight)), weight.dtype)


def _joined(parts: list[PackedMatrix]) -> PackedMatrix:
    """One matrix of the rows of all."""
    planes, scale = (torch.cat([getattr(part, name) for part in parts]) for name in ("planes", "scale"))
    return PackedMatrix(planes, scale, parts[0].columns, parts[0].group_size)


def _bias(layer: nn.Module) -> Tensor | None:
    bias = bias_of(layer)
    return None if bias is None else bias.detach().clone()


class LinearRounding:
    """Rounds the linear layers outside the FFNs while a fold goes through the model, by the inputs that they get then.

    Args:
        model: to fold.
        bits: 4 or 8.
        group_size: inputs that share a scale.
        spread: whether rounding errors are spread by the inputs' covariance; otherwise inputs are not looked at.
        predicted: whether the head gets a predictor, if errors are spread.
    """

    def __init__(self, model: PreTrainedModel, bits: int, group_size: int, spread: bool, predicted: bool) -> None:
        self._model, self._bits, self._group_size, self._spread = model, bits, group_size, spread
        self._predicted = predicted
        self._left, self._before = dict(linear_layers(model)), list[nn.Module]()
        self._after: list[LowBitLinear | PredictedHead] = []

    @classmethod
    def of(cls, session: Session) -> LinearRounding:
        """What the settings of a fold ask for."""
        config = session.config
        assert config.linear_bits is not None, "it is asked for"
        spread = config.rounding == "gptq" and config.sequential
        return cls(session.model, config.linear_bits, config.linear_group_size, spread, config.head == "predicted")

    def round_block(self, index: int, stream: Stream) -> None:
        """Store the layers of a block in few bits, before whose stream of calibration tokens stands."""
        inside = f"{list(named_blocks(self._model))[index]}."
        layers = {name: layer for name, layer in self._left.items() if name.startswith(inside)}
        with Covariances(layers) as seen:
            if layers and self._spread:
                stream.visit()
        for name, layer in layers.items():
            self._exchange(name, low_bit_copy(layer, self._bits, self._group_size, seen.of(name)))

    def finish(self, stream: Stream) -> LinearsReport:
        """Store all other layers in few bits, the head by its inputs: `stream` goes behind the last block for them."""
        head = self._model.get_output_embeddings()
        for name, layer in list(self._left.items()):
            covariance = None
            if layer is head and self._spread:
                advance_to(len(named_blocks(self._model)), stream)
                with Covariances({name: layer}) as seen:
                    stream.visit_head()
                covariance = seen.of(name)
            if self._predicted and covariance is not None:
                self._exchange(name, predicted_head(layer, self._bits, self._group_size, covariance))
            else:
                self._exchange(name, low_bit_copy(layer, self._bits, self._group_size, covariance))
        untie_head(self._model)
        return _report(self._model, self._bits, self._before, self._after)

    def _exchange(self, name: str, made: LowBitLinear | PredictedHead) -> None:
        put_linears(self._model, {name: made})
        self._before.append(self._left.pop(name))
        self._after.append(made)


class Covariances:
    """Within the context, gathers the second moments of what linear layers get.

    Args:
        layers: by name; those that get the same tensor, as query, key and value do, share their moments.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._moments: dict[str, SecondMoments] = {}
        self._shared: dict[str, str] = {}
        self._last: tuple[Tensor, str] | None = None
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_pre_hook(partial(self._see, name)))
        return self

    def __exit__(self, *error: object) -> None:
        self._last = None
        for hook in self._hooks:
            hook.remove()

    def of(self, name: str) -> Tensor | None:
        """[in, in] fp32, mean of x x^T over the inputs of a layer; None if it got none."""
        moments = self._moments.get(self._shared.get(name, name))
        return None if moments is None else moments.mean_product

    def _see(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        if self._last is not None and self._last[0] is x and name not in self._moments:
            self._shared[name] = self._last[1]
            return
        self._last = x, name
        width = x.shape[-1]
        moments = self._moments.setdefault(name, SecondMoments.zeros(width, width, x.device))
        moments.add(x.reshape(-1, width), x.reshape(-1, width))
