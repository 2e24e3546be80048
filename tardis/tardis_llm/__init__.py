"""TARDIS: faster language models by constant folding of their feed-forward networks, with exact correction.

`fold` folds a model, set by a `FoldConfig`, and gives a `FoldReport`; `save_folded` writes the result. A `Family` names
the modules of a model that TARDIS does not know; `freeze` readies a folded model for the training of adapters.
Importing the package teaches transformers to load folded checkpoints.
"""

from typing import TYPE_CHECKING, Any

from .checkpoint.folded import save_folded
from .config import FoldConfig
from .families.table import Family
from .integrations import transformers as _transformers  # noqa: F401 - registers the quantiser
from .report import FoldReport
from .runtime.stored import freeze

if TYPE_CHECKING:
    from .pipeline.fold import fold

__all__ = ["Family", "FoldConfig", "FoldReport", "fold", "freeze", "save_folded"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Folding is imported when it is asked for: loaders and servers do without."""
    if name == "fold":
        from .pipeline.fold import fold

        return fold
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
