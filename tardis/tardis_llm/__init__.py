"""TARDIS: faster language models by constant folding of their feed-forward networks, with exact correction.

The names here are the public interface; the reference in docs/ lists further functions by their modules.

    load_model, load_tokenizer    load a dense or folded model, and its tokenizer
    read_windows                  read text to calibrate on
    fold                          fold a model as a `FoldConfig` says, and return a `FoldReport`
    Family                        name the modules of a model whose family TARDIS does not know
    save_folded                   write a folded model as a checkpoint
    freeze                        prepare a folded model for the training of adapters

Importing the package teaches transformers to load folded checkpoints.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .checkpoint.folded import save_folded
from .checkpoint.loading import load_model, load_tokenizer
from .config import FoldConfig
from .families.table import Family
from .integrations import transformers as _transformers  # noqa: F401 - registers the quantiser
from .report import FoldReport
from .runtime.stored import freeze

if TYPE_CHECKING:
    from .calibration.text import read_windows
    from .pipeline.fold import fold

__all__ = [
    "Family", "FoldConfig", "FoldReport",
    "fold", "freeze", "load_model", "load_tokenizer", "read_windows", "save_folded",
]  # fmt: skip
__version__ = "0.1.0"

#: modules that are imported when a name from them is asked for: loaders and servers need no folding
_LATER = {"fold": ".pipeline.fold", "read_windows": ".calibration.text"}


def __getattr__(name: str) -> Any:
    """A public name whose module is imported when it is first asked for."""
    if name in _LATER:
        return getattr(import_module(_LATER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
