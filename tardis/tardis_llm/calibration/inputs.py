"""What a model is run on for calibration: windows of text as token ids, or windows of speech beside what was said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Speech:
    """Windows of speech, each with its transcript.

    Attributes:
        features: [windows, mels, frames] log-mel features, in the model's dtype.
        ids: [windows, length] int64 token ids of the transcripts, padded behind their ends.
        lengths: [windows] int64, tokens of each transcript.
        encoded: [windows, positions, d] what the model's encoder makes of the features, if it is known: then the
            encoder does not run. None otherwise.
    """

    features: Tensor
    ids: Tensor
    lengths: Tensor
    encoded: Tensor | None = None

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.ids)

    def __getitem__(self, at: slice | Sequence[int] | Tensor) -> Speech:
        """Some of the windows."""
        encoded = None if self.encoded is None else self.encoded[at]
        return Speech(self.features[at], self.ids[at], self.lengths[at], encoded)

    @property
    def spoken(self) -> Tensor:
        """[windows, length] bool, which tokens are of a transcript and not padding."""
        return torch.arange(self.ids.shape[1]) < self.lengths[:, None]

    def with_encoded(self, encoded: Tensor) -> Speech:
        """The same windows with the output of the encoder."""
        return replace(self, encoded=encoded)


#: windows of token ids [windows, length], or of speech
TextOrSpeech = Tensor | Speech


def model_arguments(inputs: TextOrSpeech, device: torch.device) -> dict[str, Any]:
    """The arguments by which a model on a device gets windows."""
    ids = ids_of(inputs).to(device)
    if isinstance(inputs, Tensor):
        return {"input_ids": ids}
    if inputs.encoded is None:
        return {"input_features": inputs.features.to(device), "decoder_input_ids": ids}
    return {"encoder_outputs": (inputs.encoded.to(device),), "decoder_input_ids": ids}


def ids_of(inputs: TextOrSpeech) -> Tensor:
    """[windows, length] the token ids of windows: those of the transcripts of speech."""
    return inputs if isinstance(inputs, Tensor) else inputs.ids


def is_text(inputs: TextOrSpeech) -> Tensor | None:
    """[windows, length] bool, which token ids are not padding; None where all are not."""
    return None if isinstance(inputs, Tensor) or bool(inputs.spoken.all()) else inputs.spoken


def token_count(inputs: TextOrSpeech) -> int:
    """How many tokens the text in windows has, or the transcripts of speech."""
    return inputs.numel() if isinstance(inputs, Tensor) else int(inputs.lengths.sum())


def tensors_of(inputs: TextOrSpeech) -> list[Tensor]:
    """All that windows consist of, for a digest."""
    return [inputs] if isinstance(inputs, Tensor) else [inputs.features, inputs.ids, inputs.lengths]
