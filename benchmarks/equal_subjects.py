"""The models that are compared at equal quality, and the names of what they are made into; see `equal_quality.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import real_models
from tardis_llm.checkpoint.loading import load_dense, load_tokenizer
from tardis_llm.config import Select
from tardis_llm.sample import model_dir

DENSE = "dense"
PREDICTED = "int4-head"  #: int4 whose head has a predictor
#: kinds of folds, by what is computed exactly
KINDS: dict[str, Select] = {"tardis-int4": "dynamic", "tardis-mixed-int4": "mixed", "tardis-static-int4": "static"}
OURS = {"int4": 4, PREDICTED: 4, "int3": 3}  #: bits of the linear layers in the blocks
HEAD_BITS = 4  #: of the head of `OURS`; half of them in that of `PREDICTED`


@dataclass(frozen=True)
class Subject:
    """A model that is judged.

    Attributes:
        load: makes it anew, dense in bf16, with its tokenizer.
        length: tokens of a window.
        tokens: of each text that is judged on.
        texts: names of these.
        group: weights of a fold that share a scale.
        reductions: of the folds, if nothing else is asked for.
        file: gives the GGUF file that its weights are from; None where there is none.
        files: types that llama.cpp quantises it to.
    """

    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    length: int
    tokens: int
    texts: tuple[str, ...]
    group: int
    reductions: tuple[float, ...]
    file: Callable[[], Path] | None
    files: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """All that is judged beside folds."""
        return [DENSE, *OURS, *(["q4_k_m"] if self.file else []), *self.files]


def _real(name: str) -> Subject:
    return Subject(
        load=lambda: real_models.load(name),
        length=real_models.LENGTH,
        tokens=real_models.TOKENS,
        texts=("wikitext2", "lambada", "code"),
        group=128,
        reductions=(0.8, 0.834, 0.86),
        file=lambda: real_models.fetch(name),
        files=("q4_0", "q4_0-pure", "q3_k_m", "q2_k"),
    )


def _sample() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = str(model_dir())
    return load_dense(path, "bfloat16"), load_tokenizer(path)


SUBJECTS = {
    "sample": Subject(
        _sample, 256, 131_072, ("wikitext2", "lambada"), 256, (0.8, 0.83, 0.85, 0.875, 0.9), None, ("q4_0-pure",)
    ),
    **{name: _real(name) for name in real_models.MODELS},
}
