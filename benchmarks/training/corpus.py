"""Text -> tokenizer -> tokens on disk -> batches, in an order that depends on nothing but seed and step."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from training.checkpoints import replacing
from training.recipe import Recipe, RecipeError

END = "<|endoftext|>"
BLOCK_CHARS = 1 << 18


def text_blocks(paths: Sequence[Path]) -> Iterator[str]:
    """The texts in pieces of whole lines, so that a corpus of any size passes through a few megabytes."""
    for path in paths:
        try:
            with path.open(encoding="utf-8") as file:
                while lines := file.readlines(BLOCK_CHARS):
                    yield "".join(lines)
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path} is not UTF-8 text: {error.reason}") from error


def train_tokenizer(paths: Sequence[Path], vocab: int, context: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of at most `vocab` tokens, the end of text among them; short texts give fewer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # so that no input is ever unknown
        show_progress=False,
    )
    bpe.train_from_iterator(text_blocks(paths), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, model_max_length=context)


def encode(tokenizer: PreTrainedTokenizerBase, path: Path) -> Iterator[list[int]]:
    """Tokens of one text, block by block, then the end-of-text token where the tokenizer has one."""
    blocks = text_blocks([path])
    while group := list(islice(blocks, 8)):  # encoded in parallel
        yield from tokenizer(group, add_special_tokens=False, verbose=False).input_ids
    if tokenizer.eos_token_id is not None:
        yield [tokenizer.eos_token_id]


def write_tokens(tokenizer: PreTrainedTokenizerBase, paths: Sequence[Path], target: Path) -> None:
    """Write the tokens of all texts to `target`, which appears only when it is complete."""
    with replacing(target) as draft, draft.open("wb") as file:
        for path in paths:
            for tokens in encode(tokenizer, path):
                np.asarray(tokens, dtype=token_dtype(tokenizer)).tofile(file)


def read_tokens(tokenizer: PreTrainedTokenizerBase, source: Path) -> np.ndarray:
    """The tokens that `write_tokens` wrote, left on disk until they are used."""
    return np.memmap(source, dtype=token_dtype(tokenizer), mode="r")


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> type[np.unsignedinteger]:
    """The smallest integer that holds every token."""
    return np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32


class Batches:
    """Batch number `step` of a run: `batches[step]`, `[batch, context]` int64.

    Each epoch cuts the tokens into windows anew, from an offset of its own, and visits them in an order of
    its own. Both come from (seed, epoch), so a resumed run goes on with the very next batch without having
    had to save a state.
    """

    def __init__(self, tokens: np.ndarray, recipe: Recipe) -> None:
        self.tokens, self.recipe = tokens, recipe
        self.windows = len(tokens) // recipe.context - 1  # one less, which leaves room for the offset
        self.per_epoch = self.windows // recipe.batch
        if self.per_epoch < 1:
            raise RecipeError(
                f"the text is too short: {len(tokens)} tokens, but a batch needs "
                f"{(recipe.batch + 1) * recipe.context}; lower --batch or --context, or add text"
            )
        self._starts = lru_cache(maxsize=1)(self._epoch_starts)

    def __getitem__(self, step: int) -> torch.Tensor:
        epoch, position = divmod(step, self.per_epoch)
        starts = self._starts(epoch)[position * self.recipe.batch :][: self.recipe.batch]
        index = starts[:, None] + np.arange(self.recipe.context)  # [batch, context]
        return torch.from_numpy(self.tokens[index].astype(np.int64))

    def _epoch_starts(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng((self.recipe.seed, epoch))
        offset = random.integers(self.recipe.context)
        return offset + random.permutation(self.windows) * self.recipe.context


def fingerprint(paths: Sequence[Path]) -> list[str]:
    """A hash per file, to notice on resuming that one has changed."""
    hashes = []
    for path in paths:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes
