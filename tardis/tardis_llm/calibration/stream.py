"""Walk a model layer by layer: the hidden states of the windows at one boundary, moved on block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InvalidInputError
from ..families.sites import FFNSite, layer_list
from ..families.table import family_of, vocabulary
from .blocks import ffn_input, run_block, run_head
from .hidden import hidden_buffer

_LOGITS_AT_ONCE = 2**25  # elements of the largest tensor while the loss is taken


@dataclass
class Stream:
    """Hidden states of windows of tokens in front of block `position`.

    Attributes:
        model: in eval mode; what it computes in blocks already passed does not matter any more.
        ids: [windows, length].
        scratch: folder for what exceeds the memory limit.
        memory_limit: bytes per buffer.
        batch_tokens: tokens that run through a block at once.
        position: the block that comes next.
    """

    model: PreTrainedModel
    ids: Tensor
    scratch: Path
    memory_limit: float
    batch_tokens: int
    position: int = 0
    _hidden: Tensor | None = field(default=None, repr=False)

    def advance(self) -> None:
        """Move on behind the next block, as it is in the model now."""
        for at in self._batches():
            out = run_block(self.model, self.position, self.ids[at], hidden=self._at(at))
            if self._hidden is None:
                shape = (*self.ids.shape, out.shape[-1])
                self._hidden = hidden_buffer(shape, out.dtype, self.scratch, self.memory_limit)
            self._hidden[at] = out  # nothing reads this part of the boundary behind it any more
        self.position += 1

    def visit(self) -> None:
        """Run the next block for the hooks inside it; the stream stays where it is."""
        for at in self._batches():
            run_block(self.model, self.position, self.ids[at], hidden=self._at(at))

    def ffn_inputs(self, site: FFNSite) -> Tensor:
        """[windows * length, d] inputs of the FFN in the next block.

        Raises:
            InvalidInputError: they are not finite.
        """
        buffer: Tensor | None = None
        for at in self._batches():
            x = ffn_input(self.model, site, self.ids[at], hidden=self._at(at))
            if not bool(torch.isfinite(x).all()):
                raise InvalidInputError(
                    f"the inputs of {site.prefix} are NaN or infinite on the calibration text. Check the weights of "
                    "the blocks up to it, and load the model in bfloat16 or float32 if it overflows float16."
                )
            if buffer is None:
                shape = (*self.ids.shape, x.shape[-1])
                buffer = hidden_buffer(shape, x.dtype, self.scratch, self.memory_limit)
            buffer[at] = x.view(-1, self.ids.shape[1], x.shape[-1])
        assert buffer is not None, "a stream has at least one window"
        return buffer.flatten(0, 1)

    def loss(self, reference: Tensor | None = None) -> float:
        """The model's loss on the windows from here on; the stream stays where it is.

        Next-token cross-entropy in nats for a causal model. An encoder has no such loss here: for it, the squared
        change of its output against `reference`, relative to the reference.
        """
        total, weight = 0.0, 0.0
        done = 0
        for output, ids in self._outputs():
            if family_of(self.model.config).causal:
                total += float(F.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
                weight += ids[:, 1:].numel()
            elif reference is not None:
                dense = reference[done : done + len(ids)].float()
                total += float((output - dense).square().sum())
                weight += float(dense.square().sum())
            done += len(ids)
        return total / max(weight, 1e-30)

    def reference(self) -> Tensor | None:
        """What `loss` compares an encoder with: its outputs now. None for a causal model."""
        if family_of(self.model.config).causal:
            return None
        return torch.cat([output.half() for output, _ in self._outputs()])

    def _outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Per batch, the model's output (logits or last hidden state) in fp32, and its tokens."""
        windows = max(1, _LOGITS_AT_ONCE // (self.ids.shape[1] * vocabulary(self.model)))
        for at in self._batches(windows):
            hidden = self._at(at)
            for index in range(self.position, len(layer_list(self.model))):
                hidden = run_block(self.model, index, self.ids[at], hidden=hidden)
            assert hidden is not None, "a model has at least one block"
            output = run_head(self.model, self.ids[at], hidden)
            yield (output.logits if "logits" in output else output.last_hidden_state).float(), self.ids[at]

    def _at(self, at: slice) -> Tensor | None:
        if self._hidden is None or not self.position:
            return None  # block 0 gets the embeddings as the model makes them
        return self._hidden[at]

    def _batches(self, most: int | None = None) -> list[slice]:
        size = max(1, self.batch_tokens // self.ids.shape[1])
        size = min(size, most) if most else size
        return [slice(start, start + size) for start in range(0, len(self.ids), size)]
