"""Does folding pay for a model? Compare folds with quantisation and with what skips, at the bytes that each reads.

    python examples/compare.py MODEL TEXT

MODEL and TEXT are those of fold_llama.py. Every method gets the same calibration text, and is judged on the last tenth,
which none has seen. `tardis compare` does the same with a table, curves and resuming.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path

from tardis_llm import FoldConfig
from tardis_llm.calibration.text import split_windows
from tardis_llm.checkpoint.loading import load_dense, load_tokenizer
from tardis_llm.evaluation.methods import apply_method, parse
from tardis_llm.evaluation.perplexity import token_perplexity, windows_of

LENGTH = 512
METHODS = "gptq4,gptq3,gptq3+affine,teal@0.5,tardis-int4"


def main(source: str, text: str) -> None:
    """Print bytes read and perplexity of each method."""
    tokenizer = load_tokenizer(source)
    windows = windows_of(Path(text).read_text(encoding="utf-8"), tokenizer, LENGTH)
    seen, unseen = windows[: len(windows) * 9 // 10], windows[len(windows) * 9 // 10 :]
    dense = token_perplexity(load_dense(source, "bfloat16"), unseen).value
    print(f"{'dense':16} 100.0 % of the FFN bytes  perplexity {dense:.2f}")
    for method in parse(METHODS, [0.85, 0.8]):
        model, config = load_dense(source, "bfloat16"), FoldConfig(group_size=128)
        with tempfile.TemporaryDirectory() as work:
            calibrated = split_windows(seen, LENGTH, config.heldout)
            report = apply_method(method, model, calibrated, config, "ffn", Path(work), lambda *_: None)
        found = token_perplexity(model, unseen).value
        share, more = 100 * report.touched / report.dense, math.log(found / dense)
        print(f"{method.label:16} {share:5.1f} % of the FFN bytes  perplexity {found:.2f} ({more:+.3f} nats)")


if __name__ == "__main__":
    main(*sys.argv[1:])
