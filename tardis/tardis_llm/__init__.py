"""TARDIS: faster language models by constant folding of their feed-forward networks, with exact correction.

Importing the package teaches transformers to load folded checkpoints.
"""

from .checkpoint.folded import save_folded
from .config import FoldConfig
from .families.table import Family
from .integrations import transformers as _transformers  # noqa: F401 - registers the quantiser
from .pipeline.fold import fold
from .report import FoldReport
from .runtime.stored import freeze

__all__ = ["Family", "FoldConfig", "FoldReport", "fold", "freeze", "save_folded"]
__version__ = "0.1.0"
