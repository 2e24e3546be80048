"""Go through a model block by block, keeping the hidden states of all windows in front of the next block.

Behind the blocks of an encoder of speech a stream keeps what the encoder made of the windows, and goes on with the
first block of the decoder. Of its blocks, the padding behind transcripts is left out of what is observed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InvalidInputError
from ..families.sites import FFNSite, encoder_blocks, named_blocks
from ..families.table import family_of, vocabulary
from ..report import Progress, silent
from .blocks import enter_head, ffn_input, run_block, run_encoder_end, run_head, shape_in, stream_gain, watch_ffn
from .hidden import hidden_buffer
from .inputs import Speech, TextOrSpeech, ids_of, is_text

_STAGE = "measuring the loss"
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
    """Hidden states of windows of text or speech in front of block `position`.

    Attributes:
        model: in eval mode. Blocks in front of `position` have run, and may be changed without effect.
        inputs: the windows: token ids [windows, length], or speech.
        scratch: folder for hidden states that exceed the memory limit.
        memory_limit: bytes that each of two buffers of hidden states may take in memory.
        batch_tokens: how many tokens run through a block at once.
        first: by how much more an error counts in the first token of a window, by the number of the block; 1 without.
        position: number of the block that runs next.
    """

    model: PreTrainedModel
    inputs: TextOrSpeech
    scratch: Path
    memory_limit: float
    batch_tokens: int
    first: Mapping[int, float] = field(default_factory=dict)
    position: int = 0
    _hidden: Tensor | None = field(default=None, repr=False)

    def advance(self) -> None:
        """Run the next block, as it is in the model now, and move on behind it."""
        for at in self._batches():
            out = run_block(self.model, self.position, self.inputs[at], hidden=self._at(at))
            if self._hidden is None:
                self._hidden = self._buffer(out)
            self._hidden[at] = out  # in place: the block's input is no longer needed
        self._move_on(self._hidden)

    def visit(self) -> None:
        """Run the next block so that hooks inside it fire; the stream does not move on."""
        for at in self._batches():
            run_block(self.model, self.position, self.inputs[at], hidden=self._at(at))

    def visit_head(self) -> None:
        """Run what stands behind the last block up to the model's head, so that the head's hooks fire."""
        for at in self._batches():
            hidden = self._at(at)
            assert hidden is not None, "a model has at least one block"
            enter_head(self.model, self.inputs[at], hidden)

    def observe(self, site: FFNSite, advance: bool = False) -> Seen:
        """Run the next block and record its FFN.

        An error in the FFN's output reaches what follows through norms, which divide by the root of the mean square of
        the residual stream. A few tokens, such as the first, have streams hundreds of times larger than all others;
        their errors would rule every least-squares fit, and matter least. Hence the weights: the reciprocal of that
        mean square, and, where a norm follows the FFN itself, of the mean square of its output too. The first token is
        such a one, and all others may lean on it: it counts for more by what was measured.

        Args:
            site: the FFN of that block, not folded.
            advance: move on behind the block.

        Raises:
            InvalidInputError: an input or output is NaN or infinite.
        """
        buffers: dict[str, Tensor] = {}
        weight = torch.empty(shape_in(self.model, self.position, self.inputs))
        real = self._real()
        for at in self._batches():
            x, y, after = watch_ffn(self.model, site, self.inputs[at], self._at(at))
            for name, rows in (("x", x), ("y", y), ("after", after)):
                _check_finite(rows, site)
                self._store(buffers, name, at, rows)
            squares = _mean_square(after) * (_mean_square(y) if site.norm is not None else 1)
            weight[at] = 1 / squares.clamp_min(1e-30)
        weight[:, 0] *= self.first.get(site.index, 1)
        if advance:
            self._move_on(buffers["after"])
        x, y, after, weight = (_rows(part, real) for part in (buffers["x"], buffers["y"], buffers["after"], weight))
        return Seen(x, y, after, weight / weight.mean())

    def gain(self, site: FFNSite) -> float | None:
        """By what the next block multiplies its FFN's output before it adds it to the residual stream: `stream_gain`.

        Args:
            site: the FFN of that block, not folded.
        """
        return stream_gain(self.model, site, self.inputs[:1], self._at(slice(0, 1)))

    def _store(self, buffers: dict[str, Tensor], name: str, at: slice, rows: Tensor) -> None:
        """Put rows [windows, length, d] of some windows into the buffer of a name, which is made with the first."""
        if name not in buffers:
            buffers[name] = self._buffer(rows)
        buffers[name][at] = rows

    def _buffer(self, rows: Tensor) -> Tensor:
        """An empty buffer [windows, length, d] for rows [some windows, length, d]."""
        return hidden_buffer((len(self.inputs), *rows.shape[1:]), rows.dtype, self.scratch, self.memory_limit)

    def _move_on(self, hidden: Tensor | None) -> None:
        """Move behind a block, whose outputs [windows, length, d] are given."""
        self._hidden = hidden
        self.position += 1
        if self._ends_encoder(self.position):
            self._enter_decoder()

    def _ends_encoder(self, position: int) -> bool:
        """Whether the next block is the first one of a decoder behind an encoder."""
        return position == encoder_blocks(self.model) > 0

    def _enter_decoder(self) -> None:
        """Keep the encoder's output for the blocks of the decoder, the first of which gets the embeddings of tokens."""
        speech, hidden = self.inputs, self._hidden
        assert isinstance(speech, Speech) and hidden is not None, "an encoder is one of speech, and has run"
        encoded = self._buffer(hidden)  # of its own: what was observed of the last block is still in the other
        size = max(1, self.batch_tokens // hidden.shape[1])
        for start in range(0, len(hidden), size):
            at = slice(start, start + size)
            encoded[at] = run_encoder_end(self.model, speech[at], hidden[at])
        self.inputs, self._hidden = speech.with_encoded(encoded), None

    def _real(self) -> Tensor | None:
        """[windows, length] bool, which rows of the next block are no padding; None where none is."""
        return None if self.position < encoder_blocks(self.model) else is_text(self.inputs)

    def ffn_inputs(self, site: FFNSite) -> Tensor:
        """[tokens, d], the inputs of the FFN in the next block.

        Args:
            site: the FFN of that block, not folded.

        Raises:
            InvalidInputError: an input is NaN or infinite.
        """
        buffers: dict[str, Tensor] = {}
        for at in self._batches():
            x = ffn_input(self.model, site, self.inputs[at], hidden=self._at(at))
            _check_finite(x, site)
            self._store(buffers, "x", at, x.view(len(self.inputs[at]), -1, x.shape[-1]))
        return _rows(buffers["x"], self._real())

    def loss(self, reference: Tensor | None = None, progress: Progress = silent) -> float:
        """The model's loss on the windows, with the remaining blocks as they are now; the stream does not move on.

        A causal model's loss is the next-token cross-entropy in nats, for a model of speech that of the transcripts. An
        encoder's is the squared error of its output against `reference`, relative to the squared norm of that.

        Args:
            reference: for an encoder, what `reference()` returned before the model was changed.
            progress: told of each block.
        """
        total, weight = 0.0, 0.0
        done = 0
        for output, some in self._outputs(progress):
            if family_of(self.model.config).causal:
                losses = _losses(output, some)
                total += float(losses.sum())
                weight += losses.numel()
            elif reference is not None:
                dense = reference[done : done + len(some)].to(output.device).float()
                total += float((output - dense).square().sum())
                weight += float(dense.square().sum())
            done += len(some)
        return total / max(weight, 1e-30)

    def reference(self) -> Tensor | None:
        """The present outputs of an encoder, [windows, length, d] float16, for `loss`; None for a causal model."""
        if family_of(self.model.config).causal:
            return None
        return torch.cat([output.half().cpu() for output, _ in self._outputs()])

    def _outputs(self, progress: Progress = silent) -> Iterator[tuple[Tensor, TextOrSpeech]]:
        """For a few windows at a time, the model's output in fp32, logits or the last hidden state, and the windows."""
        few = max(1, _LOGITS_AT_ONCE // (ids_of(self.inputs).shape[1] * vocabulary(self.model)))
        batches, count = [(self.inputs[at], self._at(at)) for at in self._batches()], len(named_blocks(self.model))
        for index in range(self.position, count):  # all windows at once: a block may have to come from elsewhere
            progress(_STAGE, index, count)
            batches = [self._through(index, *batch) for batch in batches]
        progress(_STAGE, count, count)
        for some, hidden in batches:
            assert hidden is not None, "a model has at least one block"
            for start in range(0, len(hidden), few):
                part = slice(start, start + few)
                output = run_head(self.model, some[part], hidden[part])
                yield (output.logits if "logits" in output else output.last_hidden_state).float(), some[part]

    def _through(self, index: int, some: TextOrSpeech, hidden: Tensor | None) -> tuple[TextOrSpeech, Tensor | None]:
        """Windows and their hidden states, None in front of a first block, behind block `index`."""
        after = run_block(self.model, index, some, hidden=hidden)
        if isinstance(some, Speech) and self._ends_encoder(index + 1):
            return some.with_encoded(run_encoder_end(self.model, some, after)), None
        return some, after

    def _at(self, at: slice) -> Tensor | None:
        """Hidden states of some windows in front of the next block; None in front of the first."""
        if self._hidden is None or not self.position:
            return None  # the first block gets the embeddings, which the model makes from the inputs
        return self._hidden[at]

    def _batches(self) -> list[slice]:
        """Batches of windows, of `batch_tokens` tokens each."""
        size = max(1, self.batch_tokens // shape_in(self.model, self.position, self.inputs)[1])
        return [slice(start, start + size) for start in range(0, len(self.inputs), size)]


def _rows(part: Tensor, real: Tensor | None) -> Tensor:
    """[tokens, ...] what is known of each token, from part [windows, length, ...]; `real` [windows, length] picks."""
    return part.flatten(0, 1) if real is None else part[real]


def _losses(logits: Tensor, inputs: TextOrSpeech) -> Tensor:
    """[tokens] fp32, cross-entropy of every token but a window's first, from logits [windows, length, vocabulary]."""
    ids, real = ids_of(inputs).to(logits.device), is_text(inputs)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses if real is None else losses[real[:, 1:].flatten().to(losses.device)]


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
