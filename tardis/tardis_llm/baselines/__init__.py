"""The methods that folding is compared with, written from the formulas of their papers."""

from .methods import NAMES, apply_baseline, full_name, takes_reduction
from .report import BaselineReport, MatrixReport

__all__ = ["NAMES", "BaselineReport", "MatrixReport", "apply_baseline", "full_name", "takes_reduction"]
