"""Fold a Llama-like model for a CPU, keep it as a checkpoint, and see what it costs.

    python examples/fold_llama.py MODEL TEXT OUTPUT

MODEL is a directory of a Llama, Mistral, Qwen, Gemma or any other family of the guide, a GGUF file, or a name on the
hub. TEXT is a file of text like that which the model will see: folds fit the text that they are calibrated on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tardis_llm import FoldConfig, fold, save_folded
from tardis_llm.calibration.text import split_windows
from tardis_llm.checkpoint.loading import load_dense, load_tokenizer
from tardis_llm.evaluation.perplexity import token_perplexity, windows_of

LENGTH = 512


def main(source: str, text: str, output: str) -> None:
    """Fold the model and print its perplexity, before and after, on the last tenth of the text."""
    model, tokenizer = load_dense(source, "bfloat16"), load_tokenizer(source)
    windows = windows_of(Path(text).read_text(encoding="utf-8"), tokenizer, LENGTH)
    seen, unseen = windows[: len(windows) * 9 // 10], windows[len(windows) * 9 // 10 :]
    before = token_perplexity(model, unseen)
    # everything that a token reads in few bits: the fold, the predictor, and what corrects the fixed neurons
    config = FoldConfig(reduction=0.8, fold_bits=4, fallback_bits=4, group_size=128)
    report = fold(model, split_windows(seen, LENGTH, config.heldout), config)
    save_folded(model, report, output, tokenizer)
    after = token_perplexity(model, unseen)
    print(f"{report.reduction:.1%} fewer FFN bytes per token, {report.fix_rate:.1%} of the neurons fixed")
    print(f"perplexity {before.value:.2f} dense, {after.value:.2f} folded, on text that the fold has not seen")


if __name__ == "__main__":
    main(*sys.argv[1:])
