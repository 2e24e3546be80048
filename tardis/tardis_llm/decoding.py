"""Everything that makes a loaded model decode fast on this machine and changes none of its numbers but by rounding."""

from __future__ import annotations

from transformers import PreTrainedModel

from .allocator import use_huge_pages
from .linears import put_linears, through_kernels
from .runtime.ffn import lay_out
from .runtime.linear import put_in_panels


def prepare_decoding(model: PreTrainedModel) -> None:
    """Ready a dense or folded model on the CPU for decoding, in place; for inference only.

    Its linear layers go through our kernel, what fixing reads is laid out neuron by neuron and all else in panels, and
    large weights move into huge pages. Takes some times as long as copying the weights.
    """
    put_linears(model, through_kernels(model, ffn=True))
    put_in_panels(model)
    lay_out(model)
    use_huge_pages(model)
