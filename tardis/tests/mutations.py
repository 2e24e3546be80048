"""Edits of a checkpoint as a stranger may hand it in: of headers, JSON files and whole files, drawn by hypothesis."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "X"]
numbers = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 64, 65, 100, 10**6, 2**31, 2**63, 2**64, 10**30, -(2**63)]),
    st.integers(-300, 300),
)
values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=8), st.sampled_from(["relu", "float32"])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=4,
)


def read_header(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(file: Path, header: dict[str, Any], data: bytes) -> None:
    """The inverse of `read_header`."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_header(directory: Path, draw: Draw, bound: bool) -> None:
    """Change what the header of a weight file says of a tensor, or which tensors it has.

    Args:
        directory: of the checkpoint.
        draw: of hypothesis.
        bound: whether contents are compared with a record: without one, exchanged names of like tensors go unnoticed.
    """
    file = draw(st.sampled_from(sorted(directory.glob("*.safetensors"))))
    header, data = read_header(file)
    names = sorted(set(header) - {"__metadata__"})
    name = draw(st.sampled_from(names))
    kind = draw(st.sampled_from(["dtype", "shape", "reshape", "rename", "remove", "add", "offsets", "swap", "all"]))
    entry = header[name]
    if kind == "dtype":
        entry["dtype"] = draw(st.sampled_from(DTYPES))
    elif kind == "all":
        ending = name.rpartition(".")[2]
        dtype = draw(st.sampled_from(DTYPES))
        for each in names:
            if each.endswith(ending):
                header[each]["dtype"] = dtype
    elif kind == "shape":
        entry["shape"] = draw(st.lists(numbers, max_size=4))
    elif kind == "reshape":
        entry["shape"] = draw(st.sampled_from(reshapes(entry["shape"])))
    elif kind == "rename":
        other = draw(
            st.sampled_from([name + "x", "x." + name, name.rpartition(".")[2], "lm_head.weight", "", "tardis.x"])
        )
        header = {other if each == name else each: value for each, value in header.items()}
    elif kind == "remove":
        del header[name]
    elif kind == "add":
        header[name + draw(st.sampled_from([".tardis.low", "x", ".codes"]))] = dict(entry)
    elif kind == "offsets":
        entry["data_offsets"] = draw(st.lists(st.one_of(numbers, st.integers(0, len(data))), min_size=2, max_size=2))
    elif kind == "swap" and bound:
        other = draw(st.sampled_from(names))
        header[name], header[other] = header[other], header[name]
    write_header(file, header, data)


def reshapes(shape: list[int]) -> list[list[int]]:
    """Shapes of as many numbers."""
    total = 1
    for size in shape:
        total *= size
    halves = [[total // n, n] for n in (2, 4, 8, 16, 64) if total % n == 0]
    return [shape[::-1], [total], [1, *shape], [*shape, 1], *halves]


def edit_json(file: Path, draw: Draw, within: tuple[str, ...] = ()) -> None:
    """Change, add or remove a value somewhere in a JSON file.

    Args:
        file: to edit.
        draw: of hypothesis.
        within: keys that lead to where it is.
    """
    whole = json.loads(file.read_text())
    place = whole
    for key in within:
        place = place[key]
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys)) if keys else "added"
        inner = place[key] if keys else None
        if isinstance(inner, dict | list) and inner and draw(st.booleans()):
            place = inner
            continue
        break
    action = draw(st.sampled_from(["set", "set", "set", "remove", "add"]))
    if action == "remove" and keys:
        del place[key]
    elif action == "add" and isinstance(place, dict):
        place[draw(st.sampled_from(["num_labels", "load_in_8bit", "auto_map", "quant_method", "rotation"]))] = draw(
            values
        )
    elif isinstance(place, dict) or keys:
        place[key] = draw(values)
    file.write_text(json.dumps(whole))


def edit_sizes(file: Path, draw: Draw) -> None:
    """Have config.json describe a model of other sizes, or with another activation."""
    config = json.loads(file.read_text())
    sizes = ["n_layer", "n_embd", "n_inner", "n_positions", "num_hidden_layers", "hidden_size", "intermediate_size"]
    known = sorted(set(config) & {*sizes, "vocab_size"})
    if draw(st.booleans()):
        config[draw(st.sampled_from(known))] = draw(st.one_of(numbers, values))
    else:
        name = "activation_function" if "activation_function" in config else "hidden_act"
        config[name] = draw(st.sampled_from(["relu", "gelu", "silu", "quick_gelu", "tanh", "nonsense", 3, None]))
    file.write_text(json.dumps(config))


def damage_text(file: Path, draw: Draw) -> None:
    """Make a text file something else."""
    text = file.read_text()
    file.write_text(draw(st.sampled_from(["", "{", "[]", "null", "1", '"x"', "[" * 100_000, text[: len(text) // 2]])))


def edit_index(directory: Path, draw: Draw) -> None:
    """Have an index name other files."""
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    places = index["weight_map"]
    other = draw(
        st.sampled_from(["../outside/{}", "{dir}/../outside/{}", "/etc/passwd", "sub/{}", "./{}", "..", "", "no"])
    )
    wanted = draw(st.sampled_from(sorted(set(places.values()))))
    new = other.format(wanted, dir=directory)
    whole = draw(st.booleans())
    for name in sorted(places):
        if places[name] == wanted:
            places[name] = new
            if not whole:
                break
    file.write_text(json.dumps(index))


def edit_files(directory: Path, draw: Draw) -> None:
    """Remove, exchange, cut, copy or link a file."""
    files = [file for file in sorted(directory.iterdir()) if file.is_file()]
    file, other = draw(st.sampled_from(files)), draw(st.sampled_from(files))
    kind = draw(st.sampled_from(["remove", "copy", "exchange", "cut", "empty", "folder", "link", "longer"]))
    if kind == "remove":
        file.unlink()
    elif kind == "copy":
        target = directory / draw(st.sampled_from(["model.safetensors", "x.safetensors", other.name, "x.json"]))
        if target != file:
            shutil.copy(file, target)
    elif kind == "exchange" and file != other:
        content = file.read_bytes()
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[: draw(st.integers(0, file.stat().st_size))])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "link":
        outside = directory.parent / f"blob-{file.name}"
        shutil.move(file, outside)
        file.symlink_to(outside)
    elif kind == "longer":
        file.write_bytes(file.read_bytes() + b"\0" * draw(st.sampled_from([1, 8, 4096])))


def edit_bytes(directory: Path, draw: Draw) -> None:
    """Flip a bit of a weight file, of the header or of the data."""
    file = draw(st.sampled_from(sorted(directory.glob("*.safetensors"))))
    content = bytearray(file.read_bytes())
    at = draw(st.one_of(st.integers(0, len(content) - 1), st.integers(0, min(4000, len(content) - 1))))
    content[at] ^= 1 << draw(st.integers(0, 7))
    file.write_bytes(content)
