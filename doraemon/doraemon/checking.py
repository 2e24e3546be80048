"""Whether header and arrays, which may come from anywhere, are those of an index.

Checked always: types, shapes, and every number that a search or `adapt` indexes by, so that no file leads either out
of its arrays or makes it allocate more than a few times the file's size. These checks read the model, the changes and
one key per bucket. What only the keys can tell is checked on request.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import BUCKET, Arrays, Bits, Codes, Ints, places_of
from .choosing import described_type
from .delta import MAX_STAMP, is_compact
from .engine import Engine
from .errors import damaged
from .keytype import KeyType
from .model import MAX_BITS, bucket_scales
from .texts import LexiconType

#: dtype and shape of each array, in sizes that `_sizes` tells; dtypes of values are the user's
_LAYOUT: dict[str, tuple[Any, tuple[str, ...]]] = {
    "run.codes": (np.uint64, ("keys",)),
    "run.trained": (np.float64, ("buckets",)),
    "run.heat": (np.float64, ("buckets",)),
    "model.buckets": (BUCKET, ("bounds",)),
    "model.bits": (np.uint8, ("buckets",)),
    "model.rows": (np.float32, ("rows", "parts")),
    "model.where": (np.int64, ("buckets", "leaf_numbers")),
    "delta.codes": (np.uint64, ("changes",)),
    "delta.net": (np.int64, ("changes",)),
    "delta.present": (np.int64, ("changes",)),
    "delta.stamps": (np.int64, ("changes",)),
    "memory.signatures": (np.float64, ("known", "buckets")),
    "memory.bits": (np.uint8, ("known", "buckets")),
}
_TEXTS: dict[str, Any] = {"keys.bytes": np.uint8, "keys.offsets": np.int64}
_VALUES = {"run.values": "keys", "delta.values": "changes"}
_LAST_CHARACTER = 0x10FFFF


def check(header: Any, arrays: Arrays, engine: Engine) -> KeyType:
    """The type of the keys, if all sizes and numbers fit together.

    Raises CorruptFileError, which names the array and what is wrong with it.
    """
    key_type = _key_type(header, engine)
    _check_layout(arrays, key_type)
    _check_buckets(arrays)
    _check_leaves(arrays)
    _check_shares(arrays)
    _check_memory(header, arrays)
    _check_delta(arrays, key_type)
    ends = arrays["run.codes"][[0, -1]] if len(arrays["run.codes"]) else arrays["run.codes"]
    _require(key_type.has_codes(ends), f"run.codes has codes that no {key_type.dtype} has")
    return key_type


def check_keys(codes: Codes, is_map: bool, key_type: KeyType) -> None:
    """Raise CorruptFileError unless the codes are ascending, in a map distinct, and those of keys. O(n)."""
    ascending = codes[1:] > codes[:-1] if is_map else codes[1:] >= codes[:-1]
    _require(bool(ascending.all()), "run.codes are not in order")
    _require(key_type.has_codes(codes), f"run.codes has codes that no {key_type.dtype} has")


def check_values(name: str, values: NDArray[Any]) -> None:
    """Raise CorruptFileError if a truth value is neither true nor false, or a text has characters that none can."""
    for field in values.dtype.names or ():
        check_values(f"{name}.{field}", values[field])
    if values.dtype.kind == "b":
        _require(bool((np.ascontiguousarray(values).view(np.uint8) <= 1).all()), f"{name} has bytes that are no truth")
    if values.dtype.kind == "U" and values.dtype.itemsize and values.size:
        points = np.ascontiguousarray(values).view(np.uint32)
        _require(int(points.max()) <= _LAST_CHARACTER, f"{name} has characters that do not exist")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise damaged(what)


def _key_type(header: Any, engine: Engine) -> KeyType:
    dtype, memory = header.get("dtype"), header.get("memory")
    _require(isinstance(dtype, str | dict), "its header names no dtype")
    _require(type(memory) is int and memory >= 0, "its header says nothing of the memory")
    try:
        key_type = described_type(dtype, engine)
    except (TypeError, ValueError) as error:
        raise damaged(f"keys of dtype {dtype!r} cannot be") from error
    return key_type


def _check_layout(arrays: Arrays, key_type: KeyType) -> None:
    texts = _TEXTS if isinstance(key_type, LexiconType) else {}
    wanted = set(_LAYOUT) | set(texts) | (set(_VALUES) if set(_VALUES) & set(arrays) else set())
    wrong = sorted(wanted ^ set(arrays))
    _require(not wrong, f"array {wrong[:1]} is missing or too many")
    sizes = _sizes(arrays)
    for name, (dtype, shape) in _LAYOUT.items():
        expected = tuple(sizes[size] for size in shape)
        found = (arrays[name].dtype, arrays[name].shape)
        _require(found == (dtype, expected), f"{name} is {found[0]} {found[1]} instead of {np.dtype(dtype)} {expected}")
    for name, kind in texts.items():
        _require(arrays[name].dtype == kind and arrays[name].ndim == 1, f"{name} is no row of {np.dtype(kind)}")
    for name in wanted & set(_VALUES):
        matches = arrays[name].shape == (sizes[_VALUES[name]],) and arrays[name].dtype == arrays["run.values"].dtype
        _require(matches, f"{name} does not have one value per key")


def _sizes(arrays: Arrays) -> dict[str, int]:
    buckets = len(_rows(arrays, "model.bits"))
    return {
        "keys": len(_rows(arrays, "run.codes")),
        "buckets": buckets,
        "bounds": buckets + 1,
        "rows": len(_rows(arrays, "model.rows")),
        "parts": 3,
        "leaf_numbers": MAX_BITS + 1,
        "changes": len(_rows(arrays, "delta.codes")),
        "known": len(_rows(arrays, "memory.bits")),
    }


def _rows(arrays: Arrays, name: str) -> NDArray[Any]:
    _require(arrays[name].ndim > 0, f"{name} has no length")
    return arrays[name]


def _check_buckets(arrays: Arrays) -> None:
    codes, buckets, bits = arrays["run.codes"], arrays["model.buckets"], arrays["model.bits"]
    starts = buckets["start"]
    divided = starts[0] == 0 and starts[-1] == len(codes) and (starts[1:] > starts[:-1]).all()
    _require(bool(divided), "model.buckets do not divide the keys")
    _require(_are_numbers_of_leaves(bits, starts), "model.bits has numbers of leaves that no bucket can have")
    _require(np.array_equal(buckets["low"][:-1], codes[starts[:-1]]), "model.buckets has other bounds than the keys")
    right = np.array_equal(buckets["scale"][:-1], bucket_scales(codes, starts, bits))
    _require(right, "model.buckets has scales that are not those of its keys")


def _are_numbers_of_leaves(bits: Bits, starts: Ints) -> bool:
    """Whether there are not many more leaves than keys, also where each row has the bits of another model."""
    return bool((bits <= MAX_BITS).all() and ((np.int64(1) << bits.astype(np.int64)) <= 2 * np.diff(starts) + 64).all())


def _check_leaves(arrays: Arrays) -> None:
    rows, where, bits = arrays["model.rows"], arrays["model.where"], arrays["model.bits"]
    sizes = np.int64(1) << np.arange(MAX_BITS + 1)
    inside = (where == -1) | ((where >= 0) & (where <= len(rows) - sizes))
    _require(bool(inside.all()), "model.where leads out of model.rows")
    used = where[np.arange(len(bits)), bits]
    same = (used >= 0).all() and np.array_equal(arrays["model.buckets"]["place"][:-1], places_of(used, bits))
    _require(bool(same), "model.buckets has leaves in other places than model.where")
    # one sum tells whether all are finite: three times as fast as asking each
    _require(bool(np.isfinite(rows.sum(dtype=np.float64))), "model.rows has lines that are not finite")
    _require(bool((rows[:, 2] >= 0).all()), "model.rows has errors below zero")


def _check_shares(arrays: Arrays) -> None:
    heat = arrays["run.heat"]
    _require(bool((heat >= 0).all() and heat.sum() < 2.0**53), "run.heat has counts that cannot be")
    for name, rows in (
        ("run.trained", arrays["run.trained"][None]),
        ("memory.signatures", arrays["memory.signatures"]),
    ):
        whole = np.abs(rows.sum(axis=1) - 1) < 1e-6 if rows.shape[1] else np.ones(len(rows), dtype=np.bool_)
        _require(bool((rows >= 0).all() and whole.all()), f"{name} has shares that do not sum up to one")


def _check_memory(header: Any, arrays: Arrays) -> None:
    known = arrays["memory.bits"]
    _require(len(known) <= header["memory"], "memory.bits has more workloads than are remembered")
    _require(known.size > 0 or len(known) == 0, "memory.bits has workloads of nothing")
    plausible = _are_numbers_of_leaves(known, arrays["model.buckets"]["start"])
    _require(plausible, "memory.bits has numbers of leaves that no bucket can have")


def _check_delta(arrays: Arrays, key_type: KeyType) -> None:
    n, is_map = len(arrays["run.codes"]), "run.values" in arrays
    codes, net, present, stamps = (arrays[f"delta.{part}"] for part in ("codes", "net", "present", "stamps"))
    ordered = bool((codes[1:] > codes[:-1]).all()) and key_type.has_codes(codes)
    _require(ordered, "delta.codes are not codes in order")
    there = (present >= 0) & (present <= (1 if is_map else n))
    _require(bool(there.all()) and int(present.sum()) <= n, "delta.present has counts that the keys cannot have")
    _require(bool((net >= -present).all()), "delta.net takes away what is not there")
    changes = (present > 0) | (net > 0) if is_map else net != 0
    few = bool((net <= 1 - present).all()) if is_map else is_compact(net, n)
    _require(bool(changes.all()) and few, "delta.net has changes that cannot be")
    _require(bool(((stamps >= 0) & (stamps <= MAX_STAMP)).all()), "delta.stamps has writes that cannot be")
