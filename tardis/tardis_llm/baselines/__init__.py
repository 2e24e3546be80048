"""The methods that folding is compared with, written from the formulas of their papers."""

from .matrices import Scope, find_matrices
from .methods import NAMES, REPAIRS, apply_baseline, full_name, needs_reduction
from .report import BaselineReport, MatrixReport
from .skipping import count_skips

__all__ = [
    "NAMES",
    "REPAIRS",
    "BaselineReport",
    "MatrixReport",
    "Scope",
    "apply_baseline",
    "count_skips",
    "find_matrices",
    "full_name",
    "needs_reduction",
]
