"""The bundled sample: a small GPT-2 with GELU, a text to calibrate it on, and a text that it was not trained on.

The package contains everything that `tardis demo` needs, so the demo runs without a network. `ATTRIBUTION.md` beside
this file says where model and texts come from and under which licences; `benchmarks/make_sample.py` makes them anew.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def model_dir() -> Path:
    """The directory of the model, in bf16, and its tokenizer. Its positions above 256 are untrained.

    Examples:
        >>> (model_dir() / "config.json").is_file()
        True
    """
    return _HERE / "model"


def calibration_text() -> Path:
    """The file with about 1 MB of English Wikipedia articles, from the source that the model was trained on.

    Examples:
        >>> len(calibration_text().read_text(encoding="utf-8")) // 100_000
        9
    """
    return _HERE / "calibration.txt"


def evaluation_text() -> Path:
    """The file with about 200 kB of other articles. It shares no 13 successive words with the training text.

    Examples:
        >>> len(evaluation_text().read_text(encoding="utf-8")) // 100_000
        1
    """
    return _HERE / "evaluation.txt"
