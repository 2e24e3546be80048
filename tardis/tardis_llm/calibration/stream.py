"""Go through a model block by block, keeping the hidden states of all windows in front of the next block."""

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
from .blocks import ffn_input, run_block, run_head, watch_ffn
from .hidden import hidden_buffer

_LOGITS_AT_ONCE = 2**25  # the most elements of logits that are in memory at once


@dataclass(frozen=True)
class Seen:
    """What happened in an FFN and to the residual stream around it.

    Attributes:
        x: [tokens, d] inputs of the FFN.
        y: [tokens, d] its outputs.
        after: [tokens, d] the residual stream behind its block.
        weight: [tokens] fp32, by which a squared error of y counts: over what the norms behind it divide by. Their mean
            is 1.
    """

    x: Tensor
    y: Tensor
    after: Tensor
    weight: Tensor


@dataclass
class Stream:
    """Hidden states of windows of tokens in front of block `position`.

    Attributes:
        model: in eval mode. Blocks in front of `position` have run, and may be changed without effect.
        ids: [windows, length], the token ids.
        scratch: folder for hidden states that exceed the memory limit.
        memory_limit: bytes that each of two buffers of hidden states may take in memory.
        batch_tokens: how many tokens run through a block at once.
        position: number of the block that runs next.
    """

    model: PreTrainedModel
    ids: Tensor
    scratch: Path
    memory_limit: float
    batch_tokens: int
    position: int = 0
    _hidden: Tensor | None = field(default=None, repr=False)

    def advance(self) -> None:
        """Run the next block, as it is in the model now, and move on behind it."""
        for at in self._batches():
            out = run_block(self.model, self.position, self.ids[at], hidden=self._at(at))
            if self._hidden is None:
                shape = (*self.ids.shape, out.shape[-1])
                self._hidden = hidden_buffer(shape, out.dtype, self.scratch, self.memory_limit)
            self._hidden[at] = out  # in place: the block's input is no longer needed
        self.position += 1

    def visit(self) -> None:
        """Run the next block so that hooks inside it fire; the stream does not move on."""
        for at in self._batches():
            run_block(self.model, self.position, self.ids[at], hidden=self._at(at))

    def observe(self, site: FFNSite, advance: bool = False) -> Seen:
        """Run the next block and record its FFN.

        An error in the FFN's output reaches what follows through norms, which divide by the root of the mean square of
        the residual stream. A few tokens, such as the first, have streams hundreds of times larger than all others;
        their errors would rule every least-squares fit, and matter least. Hence the weights: the reciprocal of that
        mean square, and, where a norm follows the FFN itself, of the mean square of its output too.

        Args:
            site: the FFN of that block, not folded.
            advance: move on behind the block.

        Raises:
            InvalidInputError: an input or output is NaN or infinite.
        """
        buffers: dict[str, Tensor] = {}
        weight = torch.empty(self.ids.shape)
        for at in self._batches():
            x, y, after = watch_ffn(self.model, site, self.ids[at], self._at(at))
            for name, rows in (("x", x), ("y", y), ("after", after)):
                _check_finite(rows, site)
                self._store(buffers, name, at, rows)
            squares = _mean_square(after) * (_mean_square(y) if site.norm is not None else 1)
            weight[at] = 1 / squares.clamp_min(1e-30)
        if advance:
            self._hidden = buffers["after"]
            self.position += 1
        weight = (weight / weight.mean()).flatten()
        x, y, after = (buffers[name].flatten(0, 1) for name in ("x", "y", "after"))
        return Seen(x, y, after, weight)

    def _store(self, buffers: dict[str, Tensor], name: str, at: slice, rows: Tensor) -> None:
        """Put rows [windows, length, d] of some windows into the buffer of a name, which is made with the first."""
        if name not in buffers:
            shape = (*self.ids.shape, rows.shape[-1])
            buffers[name] = hidden_buffer(shape, rows.dtype, self.scratch, self.memory_limit)
        buffers[name][at] = rows

    def ffn_inputs(self, site: FFNSite) -> Tensor:
        """[windows * length, d], the inputs of the FFN in the next block.

        Args:
            site: the FFN of that block, not folded.

        Raises:
            InvalidInputError: an input is NaN or infinite.
        """
        buffers: dict[str, Tensor] = {}
        for at in self._batches():
            x = ffn_input(self.model, site, self.ids[at], hidden=self._at(at))
            _check_finite(x, site)
            self._store(buffers, "x", at, x.view(-1, self.ids.shape[1], x.shape[-1]))
        return buffers["x"].flatten(0, 1)

    def loss(self, reference: Tensor | None = None) -> float:
        """The model's loss on the windows, with the remaining blocks as they are now; the stream does not move on.

        A causal model's loss is the next-token cross-entropy in nats. An encoder's is the squared error of its output
        against `reference`, relative to the squared norm of that.

        Args:
            reference: for an encoder, what `reference()` returned before the model was changed.
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
        """The present outputs of an encoder, [windows, length, d] float16, for `loss`; None for a causal model."""
        if family_of(self.model.config).causal:
            return None
        return torch.cat([output.half() for output, _ in self._outputs()])

    def _outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For each batch, the model's output in fp32, which is logits or the last hidden state, and its token ids."""
        windows = max(1, _LOGITS_AT_ONCE // (self.ids.shape[1] * vocabulary(self.model)))
        for at in self._batches(windows):
            hidden = self._at(at)
            for index in range(self.position, len(layer_list(self.model))):
                hidden = run_block(self.model, index, self.ids[at], hidden=hidden)
            assert hidden is not None, "a model has at least one block"
            output = run_head(self.model, self.ids[at], hidden)
            yield (output.logits if "logits" in output else output.last_hidden_state).float(), self.ids[at]

    def _at(self, at: slice) -> Tensor | None:
        """Hidden states of some windows in front of the next block; None in front of the first."""
        if self._hidden is None or not self.position:
            return None  # block 0 gets the embeddings, which the model makes from the ids
        return self._hidden[at]

    def _batches(self, most: int | None = None) -> list[slice]:
        """Batches of windows, of `batch_tokens` tokens and at most `most` windows each."""
        size = max(1, self.batch_tokens // self.ids.shape[1])
        size = min(size, most) if most else size
        return [slice(start, start + size) for start in range(0, len(self.ids), size)]


def _check_finite(x: Tensor, site: FFNSite) -> None:
    """Raise InvalidInputError where what goes into or comes out of an FFN is not finite."""
    if not bool(torch.isfinite(x).all()):
        raise InvalidInputError(
            f"the inputs or outputs of {site.prefix} are NaN or infinite on the calibration text. Check the weights of "
            "the blocks up to it, and load the model in bfloat16 or float32 if it overflows float16."
        )


def _mean_square(x: Tensor) -> Tensor:
    """[...] fp32, the mean of the squares of x [..., d]."""
    return x.float().square().mean(-1)
