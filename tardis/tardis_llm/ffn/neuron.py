"""The mathematics of one FFN's neurons, plain and gated alike.

A neuron has k up-projections: one in a plain FFN, gate and up in a gated one. With `v = x W1^T + b1`, [tokens, k h],
whose columns are those of all gates and then those of all ups, as models merge them, and a line per neuron:

    value     act(v), or act(g) * u with v = (g, u) of the neuron
    line      slope . v + offset
    residual  value - line
    score     |residual| * |W2[:, i]|, what leaving it out costs the output
    outside   whether a *predicted* v has left the neuron's hot range: an interval of v in a plain FFN, of the
              residual at v in a gated one

All else, from calibration to kernels, is said in these terms. The published method (arXiv 2501.10054) is k = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from .activations import activation


def value(v: Tensor, act: Callable[[Tensor], Tensor], k: int) -> Tensor:
    """What neurons put out: [tokens, h] for v [tokens, k h].

    Args:
        v: up-projections; of two, the gates of all neurons come first.
        act: elementwise activation.
        k: up-projections per neuron, 1 or 2; of two the first is the gate.
    """
    if k == 1:
        return act(v)
    gate, up = v.unflatten(-1, (k, -1)).unbind(-2)
    return act(gate) * up


@dataclass(frozen=True)
class Neurons:
    """The lines and hot ranges of an FFN's neurons.

    Attributes:
        activation: a name that `activation` takes.
        low, high: [h] hot range: bounds of the predicted pre-activation, or of a gated neuron's predicted residual;
            infinite where a side is open.
        slope: [k h] of the lines, in the order of v.
        offset: [h] of the lines.
    """

    activation: str
    low: Tensor
    high: Tensor
    slope: Tensor
    offset: Tensor

    @property
    def count(self) -> int:
        """h, the number of neurons."""
        return len(self.offset)

    @property
    def k(self) -> int:
        """Up-projections per neuron; 1 of no neurons."""
        return len(self.slope) // len(self.offset) if len(self.offset) else 1

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """low, high, slope, offset."""
        return self.low, self.high, self.slope, self.offset

    @property
    def nbytes(self) -> int:
        """Bytes of ranges and lines as stored."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def map(self, change: Callable[[Tensor], Tensor]) -> Neurons:
        """The neurons with each of the four tensors changed, such as `Tensor.float`."""
        return Neurons(self.activation, *map(change, self.tensors))

    def at(self, neurons: Tensor | slice) -> Neurons:
        """Some of the neurons, chosen by their numbers."""
        slope = self.slope.view(self.k, -1)[:, neurons].flatten()
        return replace(self, low=self.low[neurons], high=self.high[neurons], slope=slope, offset=self.offset[neurons])

    def value(self, v: Tensor) -> Tensor:
        """[tokens, h] outputs of the neurons for v [tokens, k h]."""
        return value(v, activation(self.activation), self.k)

    def line(self, v: Tensor) -> Tensor:
        """[tokens, h] what stands for the outputs in the hot range, for v [tokens, k h]; fp32."""
        return self._sloped(v) + self.offset.float()

    def residual(self, v: Tensor, value: Tensor | None = None) -> Tensor:
        """[tokens, h] what the lines leave of the outputs, in fp32.

        Args:
            v: [tokens, k h] fp32.
            value: [tokens, h] the outputs, where they are known.
        """
        return (self.value(v) if value is None else value) - self._sloped(v) - self.offset.float()

    def score(self, v: Tensor, norm: Tensor) -> Tensor:
        """[tokens, h] size of each neuron's error in the FFN's output, for v [tokens, k h].

        Args:
            v: fp32.
            norm: [h], |W2[:, i]|.
        """
        return self.residual(v).abs() * norm

    def tested(self, v: Tensor) -> Tensor:
        """[tokens, h] what hot ranges are of, for predicted v [tokens, k h]."""
        return v if self.k == 1 else self.residual(v)

    def outside(self, v: Tensor) -> Tensor:
        """[tokens, h] bool: neurons out of their hot range by predicted v [tokens, k h]; NaN counts as out of it."""
        return self.excludes(self.tested(v))

    def excludes(self, tested: Tensor) -> Tensor:
        """[tokens, h] bool: what of `tested`, [tokens, h], is out of the hot range; NaN counts as out of it."""
        return ~((tested >= self.low.float()) & (tested <= self.high.float()))

    def _sloped(self, v: Tensor) -> Tensor:
        product = self.slope.float() * v
        return product if self.k == 1 else product.unflatten(-1, (self.k, -1)).sum(-2)
