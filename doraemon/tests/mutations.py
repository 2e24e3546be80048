"""Files of indexes that somebody changed, with checksums that are right again, and what opening them comes to.

Run `python tests/mutations.py --cases 2000` for long: it stops at the first file that is neither refused with
CorruptFileError nor opened as an index whose answers are right, and names the seed that makes it again.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import random
import signal
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from doraemon import CorruptFileError, Index, checking, storage

ODD: list[Any] = [None, True, False, -1, 0, 1, 2, 7, 63, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64, 10**30, 10**4000]
ODD += [
    0.5,
    1e308,
    math.nan,
    math.inf,
    "",
    "O",
    "<i8",
    "<f8",
    "<u8",
    "|u1",
    "<U3",
    "|V8",
    "<M8[ns]",
    "<i4,<i4",
    "x" * 99,
]
ODD += [[], {}, [[]], [1], [2**40, 2**40], [-1], {"names": 1}, [["a", "<i4"]], "\x00", "run.codes", "delta.net"]
NUMBERS = [0, 1, 2, 3, 20, 21, 255, 256, 2**31, 2**32, 2**38, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
FLOATS = [0.0, -1.0, 1.0, 0.5, 1e-300, 1e18, 1e30, 1e300, math.inf, -math.inf, math.nan]

Part = tuple[dict[str, Any], bytes]


def originals(engine: str) -> list[bytes]:
    """Files of indexes with all the parts that an index may have."""
    rng = np.random.default_rng(1)
    record = np.dtype([("a", "i1"), ("b", [("x", "<f8"), ("y", "<U2")])], align=True)
    keys = np.sort(rng.integers(0, 2**62, 6000).astype(np.uint64))
    searched = Index(keys, engine=engine)
    for part in (slice(0, 600), slice(5000, 5600)):
        searched.searchsorted(np.tile(keys[part], 400))
        searched.adapt()
    searched.extend(keys[:50])
    searched.discard_many(keys[70:90])
    times = np.arange(0, 3000, 3).astype("M8[s]")
    prices = Index(times, np.zeros(1000, record), engine=engine)
    prices.extend(times[:40], np.ones(40, record))
    prices.extend(np.arange(5000, 5020).astype("M8[s]"), np.ones(20, record))
    prices.discard_many(times[100:110])
    floats = Index(rng.standard_normal(5000).astype(np.float32), rng.integers(0, 2, 5000) > 0, engine=engine)
    twice = Index(np.repeat([3, 5, 8], 900).astype(np.int32), engine=engine)
    twice.extend([5] * 9 + [6])
    empty = Index(dtype="float64", engine=engine)
    empty.extend([0.5, -1.0])
    words = Index([f"{'word' * (number % 9)}{number % 700}" for number in range(2500)], engine=engine)
    words.extend(["é", "", "word"])
    words.discard_many(words.keys()[5:20])
    return [saved(index) for index in (searched, prices, floats, twice, empty, words)]


def saved(index: Index) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "index"
        index.save(path)
        return path.read_bytes()


def split(raw: bytes) -> tuple[dict[str, Any], list[Part]]:
    """The header without the arrays, and each array's entry and bytes."""
    length = int.from_bytes(raw[12:16], "little")
    header = json.loads(raw[20 : 20 + length])
    begin = -(-(20 + length) // 64) * 64
    parts = []
    for entry in header.pop("arrays"):
        size = math.prod(entry["shape"]) * storage.parsed(entry["dtype"]).itemsize
        parts.append((entry, raw[begin + entry["offset"] :][:size]))
    return header, parts


def joined(header: dict[str, Any], parts: list[Part]) -> bytes:
    """A file with right checksums and places."""
    body = b""
    for entry, data in parts:
        body += bytes(-len(body) % 64)
        entry |= {"offset": len(body), "crc32": zlib.crc32(data)}
        body += data
    return with_header(header | {"arrays": [entry for entry, _ in parts]}, body)


def with_header(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    head = storage._PREFIX.pack(storage.MAGIC, 1, len(text), zlib.crc32(text)) + text
    return head + bytes(-len(head) % 64) + body


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """The file with one to three changes."""
    header, parts = split(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        change = rng.choice([change_number, change_number, change_number, change_bytes, change_length, swap_arrays])
        change(parts, rng)
    whole = joined(header, parts)
    if rng.random() < 0.7:
        return whole
    length = int.from_bytes(whole[12:16], "little")
    header = json.loads(whole[20 : 20 + length])
    change_header(header, rng)
    return with_header(header, whole[storage._aligned(20 + length) :])


def change_number(parts: list[Part], rng: random.Random) -> None:
    """Set some numbers of one array to other ones of its type."""
    place = rng.randrange(len(parts))
    entry, data = parts[place]
    array = np.frombuffer(data, storage.parsed(entry["dtype"])).copy()
    while array.dtype.names:
        array = array[rng.choice(array.dtype.names)]  # a view: what is set in it is set in the whole
    if array.size == 0 or array.dtype.kind not in "iufb":
        return change_bytes(parts, rng)
    at = np.array([rng.randrange(array.size) for _ in range(rng.choice([1, 1, 2, array.size]))])
    flat = array.reshape(-1)
    with np.errstate(all="ignore"):
        if rng.random() < 0.3:
            flat[at] = flat[at] + np.array(rng.choice([1, -1, 2, -2])).astype(flat.dtype)
        elif rng.random() < 0.4:
            flat[at] = flat[rng.randrange(flat.size)]
        else:
            number = rng.choice(FLOATS) if flat.dtype.kind == "f" else rng.choice(NUMBERS)
            flat[at] = np.array(number).astype(np.float64 if flat.dtype.kind == "f" else np.uint64).astype(flat.dtype)
    base = array
    while base.base is not None:
        base = base.base
    parts[place] = (entry, base.tobytes())
    return None


def change_bytes(parts: list[Part], rng: random.Random) -> None:
    place = rng.randrange(len(parts))
    entry, data = parts[place]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 40]) if changed else 0):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    parts[place] = (entry, bytes(changed))


def change_length(parts: list[Part], rng: random.Random) -> None:
    """Drop or repeat rows of one array, in its shape as well."""
    place = rng.randrange(len(parts))
    entry, data = parts[place]
    if not entry["shape"] or not data:
        return
    row = len(data) // entry["shape"][0]
    rows = rng.choice([0, 1, entry["shape"][0] - 1, entry["shape"][0] + 1, 2 * entry["shape"][0]])
    repeated = (data * 2 + data[:row])[: rows * row]
    parts[place] = ({**entry, "shape": [rows, *entry["shape"][1:]]}, repeated)


def swap_arrays(parts: list[Part], rng: random.Random) -> None:
    """Give an array the contents of another one."""
    a, b = rng.randrange(len(parts)), rng.randrange(len(parts))
    names = parts[a][0]["name"], parts[b][0]["name"]
    parts[a] = ({**parts[b][0], "name": names[0]}, parts[b][1])


def change_header(header: dict[str, Any], rng: random.Random) -> None:
    """Put something odd anywhere into the header, or take something out."""
    at: Any = header
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.8:
            at = at[key]
            continue
        if rng.random() < 0.1:
            del at[key]
        elif isinstance(at, list) and rng.random() < 0.1:
            at.append(at[key])
        else:
            at[key] = rng.choice(ODD)
        return


def expected(path: Path) -> tuple[np.ndarray[Any, Any], list[str] | None]:
    """The keys of a file, and what their values look like, from its arrays alone."""
    header, arrays = storage.read(path, mmap=False, verify=True)
    decode = checking.check(header, arrays, "numpy").opened(arrays, verify=True).decode
    run, delta, net = (arrays[name] for name in ("run.codes", "delta.codes", "delta.net"))
    if "run.values" not in arrays:
        counts = Counter(run.tolist())
        for code, change in zip(delta.tolist(), net.tolist(), strict=True):
            counts[code] += change
        return decode(np.array(sorted(counts.elements()), dtype=np.uint64)), None
    values = dict(zip(run.tolist(), arrays["run.values"], strict=True))
    for code, alive, value in zip(delta.tolist(), arrays["delta.present"] + net, arrays["delta.values"], strict=True):
        values.pop(code, None)
        if alive:
            values[code] = value
    codes = sorted(values)
    return decode(np.array(codes, dtype=np.uint64)), [repr(values[code]) for code in codes]


def check_right(index: Index, keys: np.ndarray[Any, Any], values: list[str] | None) -> None:
    """Everything that rests on the numbers of a file, against brute force."""
    rng = np.random.default_rng(0)
    plain = keys.astype(object) if keys.dtype.kind == "T" else keys  # NumPy does not search in StringDType rightly
    for _ in range(3):
        assert len(index) == len(keys)
        np.testing.assert_array_equal(index.keys(), keys)
        asked = keys[rng.integers(0, len(keys), 400)] if len(keys) else keys
        if keys.dtype.kind in "iu":
            asked = np.concatenate([asked, asked + keys.dtype.type(1), [np.iinfo(keys.dtype).max]]).astype(keys.dtype)
        for side in ("left", "right"):
            np.testing.assert_array_equal(
                index.searchsorted(asked, side), np.searchsorted(plain, asked.astype(plain.dtype), side)
            )
        np.testing.assert_array_equal(index.contains(asked), np.isin(asked.astype(plain.dtype), plain))
        if values is not None:
            assert [repr(value) for value in index.values()] == values
        for key in asked[:5]:
            assert index.bisect_left(key) == np.searchsorted(plain, np.array([key], plain.dtype))[0]
        str(index.explain())
        index.searchsorted(np.tile(asked[:20], 200))
        index.adapt()
        pickle.loads(pickle.dumps(index.snapshot()))
        index = index.copy()
        index.compact()


def use(index: Index) -> None:
    """Everything that reads a file's numbers; answers may be wrong, and what is found out may be refused."""
    keys = np.arange(400).astype(index.dtype)
    for ask in (
        lambda: index.keys(),
        lambda: index.searchsorted(keys),
        lambda: index.contains(index.keys()[:300]),
        lambda: index.searchsorted(np.tile(index.keys()[:50], 100), "right"),
        lambda: [index.bisect_left(key) for key in keys[:20]],
        lambda: index.adapt(),
        lambda: index.searchsorted(index.keys()[-300:]),
        lambda: index.discard_many(index.keys()[:5]),
        lambda: index.compact(),
        lambda: index.searchsorted(keys),
    ):
        try:
            ask()
        except (IndexError, ValueError, OverflowError, CorruptFileError):
            continue


def outcome(raw: bytes, path: Path, engine: str, mmap: bool, verify: bool) -> str:
    """ "refused" or "opened"; raises whatever else a file comes to."""
    path.write_bytes(raw)
    try:
        index = Index.open(path, mmap, verify=verify, engine=engine)
    except CorruptFileError as error:
        assert str(error).startswith(str(path))
        return "refused"
    if verify:
        check_right(index, *expected(path))
    else:
        use(index)
    return "opened"


def run(seed: int, files: list[bytes], path: Path, engine: str) -> str:
    """What the mutation of a number comes to."""
    rng = random.Random(seed)
    return outcome(mutated(rng.choice(files), rng), path, engine, mmap=rng.random() < 0.5, verify=rng.random() < 0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--engine", choices=["native", "numpy"], default="native")
    parser.add_argument("--memory", type=int, default=4, help="GB of address space that the process may use; 0: all")
    options = parser.parse_args()
    if options.memory:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (options.memory << 30, options.memory << 30))
    files, counts = originals(options.engine), Counter[str]()
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(options.first, options.first + options.cases):
            signal.alarm(30)  # which ends the process
            try:
                counts[run(seed, files, Path(directory) / "index", options.engine)] += 1
            except BaseException:
                print(f"seed {seed} with engine {options.engine}", file=sys.stderr)
                raise
    print(dict(counts))


if __name__ == "__main__":
    main()
