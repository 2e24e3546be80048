"""Windows of speech to calibrate on: features, with the transcripts that the dense model itself writes down."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InvalidInputError
from ..families.table import sound_of
from ..report import Progress, silent
from .inputs import Speech
from .limits import check_kind
from .text import Windows, heldout_of

_AT_ONCE = 8  # windows that are transcribed together
_STAGE = "transcribing"


def hear(model: PreTrainedModel, features: Tensor, heldout: float, progress: Progress = silent) -> Windows:
    """Windows of speech with their transcripts, to calibrate a model of speech on.

    A decoder is calibrated on the tokens that it will see in use: its own. All windows have transcripts of one length,
    padded with their end; padding counts nowhere.

    Args:
        model: dense, in eval mode.
        features: [windows, mels, frames] log-mel features, as the model's feature extractor makes them.
        heldout: share of the windows to keep apart; one window at least.
        progress: told how many windows are transcribed.

    Raises:
        InvalidInputError: features do not fit the model, or there are less than two windows.
    """
    check_features(model, features)
    if len(features) < 2:
        raise InvalidInputError(
            "the calibration speech fills less than two windows; give more of it, about 10 minutes or more."
        )
    features = features.to(model.dtype)
    texts: list[Tensor] = []
    for some in features.split(_AT_ONCE):
        progress(_STAGE, len(texts), len(features))
        texts += transcribe(model, some)
    progress(_STAGE, len(features), len(features))
    speech = Speech(features, _padded(texts), torch.tensor([len(text) for text in texts]))
    kept = heldout_of(len(features), heldout)
    return Windows(speech[~kept], speech[kept])


@torch.no_grad()
def transcribe(model: PreTrainedModel, features: Tensor) -> list[Tensor]:
    """The token ids [length] that a model writes down, greedily, for each of some windows of speech.

    They begin with the tokens that stand for language and task, and end with the one that ends a text, if it came.

    Args:
        model: dense or folded.
        features: [windows, mels, frames].

    Raises:
        InvalidInputError: features do not fit the model.
    """
    check_features(model, features)
    settings = {"do_sample": False, "num_beams": 1, "return_timestamps": False, "return_dict_in_generate": True}
    features = features.to(model.device, model.dtype)
    whole = features.new_ones(len(features), features.shape[2], dtype=torch.long)  # silence counts, too
    written = model.generate(features, attention_mask=whole, **settings).sequences
    return [_until_end(ids, _ends(model)) for ids in written.cpu()]


def check_features(model: PreTrainedModel, features: Tensor) -> None:
    """Raise InvalidInputError where a model does not take such windows of speech."""
    check_kind(model, speech=True)
    sound = sound_of(model.config)
    if features.dim() != 3 or not features.is_floating_point() or features.shape[1] != sound.mels:
        raise InvalidInputError(
            f"features of speech are {features.dtype} {list(features.shape)}, and this model takes log-mel features "
            f"[windows, {sound.mels}, {sound.frames}]. Make them with the model's own feature extractor."
        )
    if features.shape[2] != sound.frames:
        raise InvalidInputError(
            f"windows of speech have {features.shape[2]} frames, and this model takes {sound.frames}: cut longer "
            "speech, and pad shorter speech with silence, as the model's feature extractor does."
        )


def _ends(model: PreTrainedModel) -> Sequence[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _until_end(ids: Tensor, ends: Sequence[int]) -> Tensor:
    """Token ids [length] without what is behind the token that ends the text; the first token is none of these."""
    found = torch.isin(ids[1:], torch.tensor(ends, dtype=ids.dtype)).nonzero()
    return ids[: int(found[0]) + 2] if len(found) else ids


def _padded(texts: Sequence[Tensor]) -> Tensor:
    """[windows, length] token ids of texts, the last token of each repeated behind it."""
    longest = max(map(len, texts))
    return torch.stack([torch.cat([text, text[-1:].expand(longest - len(text))]) for text in texts])
