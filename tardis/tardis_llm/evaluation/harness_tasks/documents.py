"""Prompts and choices. Documents are rows of the local files, as dicts.

The stock tasks have templates for most of this, which take lm-eval longer than a small model takes to run.
"""

from __future__ import annotations

import re
from typing import Any

_SENTENCE_END = re.compile(r"(?<=[.!?]) ")


def question(document: dict[str, Any]) -> str:
    """The prompt of ARC and PIQA."""
    return f"Question: {document['ctx']}\nAnswer:"


def hellaswag_context(document: dict[str, Any]) -> str:
    """The context with a capital at the start of its unfinished sentence, if it ends with one.

    The stock task joins the two parts of the original, `ctx_a` and `ctx_b.capitalize()`; here they are joined already.
    """
    context: str = document["ctx"]
    if context.endswith("."):
        return context
    *finished, rest = _SENTENCE_END.split(context)
    return " ".join([*finished, rest.capitalize()]) if finished else context


def pair(document: dict[str, Any]) -> list[str]:
    """The sentences of a BLiMP pair, the right one first."""
    return [document["good"], document["bad"]]


def no_context(document: dict[str, Any]) -> str:
    """Nothing: what is scored follows the prefix token."""
    return ""


def all_but_last_word(document: dict[str, Any]) -> str:
    """A LAMBADA passage up to its last space."""
    return str(document["text"].rpartition(" ")[0])


def last_word(document: dict[str, Any]) -> str:
    """What follows the last space of a LAMBADA passage, with the space."""
    return " " + str(document["text"].rpartition(" ")[2])


def filled_up_to_blank(document: dict[str, Any]) -> list[str]:
    """The beginning of a WinoGrande sentence with each choice in the blank."""
    before = document["ctx"].partition("_")[0]
    return [before + choice for choice in document["choices"]]


def after_blank(document: dict[str, Any]) -> str:
    """What follows the blank of a WinoGrande sentence."""
    return str(document["ctx"].partition("_")[2].strip())


def pages(files: Any) -> Any:
    """One row per document: what is scored (`text`), and the words and bytes to divide by."""
    from datasets import Dataset

    from tardis_llm.evaluation.rolling import documents_of

    return Dataset.from_list([vars(document) for row in files for document in documents_of(row["text"])])


def perplexities(document: dict[str, Any], results: tuple[float]) -> dict[str, tuple[float, int]]:
    """Log-likelihood and what to divide it by, for each metric."""
    (loglikelihood,) = results
    return {
        "word_perplexity": (loglikelihood, document["words"]),
        "byte_perplexity": (loglikelihood, document["bytes"]),
    }
