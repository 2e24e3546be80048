"""What everything here is made of: types of arrays, and the records in them that the C extension reads as well."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bits = NDArray[np.uint8]  #: log2 of buckets' numbers of leaves
Codes = NDArray[np.uint64]  #: what keys are mapped to, see `keys`
Mask = NDArray[np.bool_]
Values = NDArray[Any]  #: of a map
Arrays = dict[str, NDArray[Any]]

#: of a bucket: its first code, leaves per unit of code, the position of its first key, and where its leaves are
BUCKET = np.dtype([("low", np.uint64), ("scale", np.float64), ("start", np.int64), ("place", np.uint64)])
#: of a leaf, a row of three float32: a line from a fraction of its width to a rank in the bucket, and its error bound
LEAF = np.dtype([("base", np.float32), ("slope", np.float32), ("radius", np.float32)])
#: of the hot table, as large as a line of the processor's cache: codes, and for each `copies << RANK_BITS | rank`
LINE = np.dtype([("codes", np.uint64, 4), ("found", np.uint64, 4)])
RANK_BITS = 40
#: of a delta: a code, and by how much those before it shift ranks, twice, and 1 more if it is in the index
ENTRY = np.dtype([("code", np.uint64), ("found", np.int64)])
FEW = 4  #: entries after the last, which are above every code
#: of a window of a delta: which of its parts have entries, and by how much those before it shift ranks
SUMMARY = np.dtype([("marks", np.uint32), ("shift", np.int32)])
#: of a leaf that tells where in it there are entries of a delta, and by how much those before it shift ranks
CHANGED_LEAF = np.dtype(
    [("leaf", LEAF), ("shift", np.int32), ("marks", np.uint64), ("twin", np.int32), ("noted", np.int32)]
)
PLACE_SHIFT = 8  #: a place is the row of the first leaf, shifted by so many bits, and log2 of the number of leaves


def places_of(first_rows: Ints, bits: Bits) -> Codes:
    """The places of buckets with `1 << bits` leaves from `first_rows` on.

    >>> places_of(np.array([3]), np.array([2], dtype=np.uint8))
    array([770], dtype=uint64)
    """
    return (first_rows.astype(np.uint64) << np.uint64(PLACE_SHIFT)) | bits


def parts_of(places: Codes) -> tuple[Ints, Codes]:
    """The row of the first leaf of each place, and the number of its leaves.

    >>> parts_of(np.array([770], dtype=np.uint64))
    (array([3]), array([4], dtype=uint64))
    """
    bits = places & np.uint64((1 << PLACE_SHIFT) - 1)
    return (places >> np.uint64(PLACE_SHIFT)).astype(np.int64), np.uint64(1) << bits


def _offsets(record: np.dtype[Any]) -> tuple[int, ...]:
    """Where the fields of a record begin, and where it ends."""
    return (*(record.fields[name][1] for name in record.names or () if record.fields), record.itemsize)


#: the extension states its own, and `engine` compares them
LAYOUT = (
    *(_offsets(BUCKET), _offsets(LEAF), PLACE_SHIFT, _offsets(LINE), RANK_BITS),
    *(_offsets(ENTRY), FEW, _offsets(SUMMARY), _offsets(CHANGED_LEAF)),
)
