"""Text that commands are given: read once, said what was read, and made into windows that the model can take."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.documents import Documents, read_documents
from ..calibration.text import Windows, check_windows, windows_over
from ..config import FoldConfig
from . import output as show


def read(sources: Sequence[str], field: str | None) -> list[Documents]:
    """The documents of files and datasets; says what they are. Errors as `read_documents`."""
    documents = [read_documents(source, field) for source in sources]
    show.say(f"text: {escape('; '.join(each.sentence() for each in documents))}")
    return documents


def calibration_windows(
    documents: Sequence[Documents],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: FoldConfig,
    length: int,
) -> Windows:
    """Windows of `length` tokens to calibrate `model` on.

    Raises:
        InvalidInputError: there is too little text, or the model does not know a token.
    """
    windows = windows_over(documents, tokenizer, config.tokens, length, config.heldout, config.seed)
    for ids in (windows.fit, windows.heldout):
        check_windows(model, ids, tokenizer)
    return windows
