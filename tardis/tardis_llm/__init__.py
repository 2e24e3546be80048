"""TARDIS: faster language models by constant folding of their feed-forward networks, with exact correction."""

from .config import FoldConfig
from .pipeline import fold
from .report import FoldReport

__all__ = ["FoldConfig", "FoldReport", "fold"]
__version__ = "0.1.0"
