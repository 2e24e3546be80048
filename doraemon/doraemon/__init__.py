"""A learned range index whose accuracy follows the queries: exact, batched, mutable, persistent."""

from .adaptation import Adaptation
from .errors import CorruptFileError
from .explanation import Explanation
from .index import Index, Snapshot
from .warming import Warming
from .workload import Match, Memory, distance, drift, signature

__all__ = [
    "Adaptation",
    "CorruptFileError",
    "Explanation",
    "Index",
    "Match",
    "Memory",
    "Snapshot",
    "Warming",
    "distance",
    "drift",
    "signature",
]
__version__ = "0.1.0"
