"""The bundled sample: a small GPT-2 with GELU, a text to calibrate it on and a text it has never seen.

Everything that `tardis demo` needs, inside the package, so that the demo runs without a network.
`ATTRIBUTION.md` beside this file says where model and texts come from and under which licences;
`benchmarks/make_sample.py` makes the folder anew.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def model_dir() -> Path:
    """The model: a Hugging Face directory in bf16 with its tokenizer. Positions above 256 are untrained.

    Examples:
        >>> (model_dir() / "config.json").is_file()
        True
    """
    return _HERE / "model"


def calibration_text() -> Path:
    """About 1 MB of English Wikipedia articles, of the source on which the model was trained.

    Examples:
        >>> len(calibration_text().read_text(encoding="utf-8")) // 100_000
        9
    """
    return _HERE / "calibration.txt"


def evaluation_text() -> Path:
    """About 200 kB of other articles; no 13 words in a row of it are in the text the model was trained on.

    Examples:
        >>> len(evaluation_text().read_text(encoding="utf-8")) // 100_000
        1
    """
    return _HERE / "evaluation.txt"
