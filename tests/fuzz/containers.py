"""Mutants of safetensors, GGUF and imatrix files and of tables that stay what they are: changed inside."""

from __future__ import annotations

import io
import json
import math
import struct
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet

from .mutations import KEYS, mutated_bytes, mutated_json

__all__ = [
    "mutated_arrow",
    "mutated_dat",
    "mutated_gguf",
    "mutated_logits",
    "mutated_parquet",
    "mutated_safetensors",
    "parsed_dat",
    "parsed_gguf",
]

_DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "C64": 8,
}

_SMALL_BYTES = 64

_PATTERNS = {
    "F64": [struct.pack("<d", x) for x in (0.0, math.nan, math.inf, -math.inf, -1.0, 1e300)],
    "F32": [struct.pack("<f", x) for x in (0.0, math.nan, math.inf, -math.inf, -1.0, 1e30, 1e-42)],
    "F16": [struct.pack("<e", x) for x in (0.0, math.nan, math.inf, -math.inf, -1.0, 60000.0, 6e-8)],
    "BF16": [b"\x00\x00", b"\xc0\x7f", b"\x80\x7f", b"\x80\xff", b"\x80\xbf", b"\x7f\x7f"],
}
"""Of each floating-point dtype: zero, NaN, infinities, negative, huge, tiny."""


# safetensors


def mutated_safetensors(image: bytes, rng: Random) -> bytes:
    """Change tensors and metadata of a file that stays one; one in ten is changed in its header or as bytes."""
    if rng.random() < 0.05:
        return mutated_bytes(image, rng)
    size = struct.unpack("<Q", image[:8])[0]
    header = image[8 : 8 + size]
    if rng.random() < 0.05:
        changed = mutated_json(header, rng)
        return struct.pack("<Q", len(changed)) + changed + image[8 + size :]
    entries = json.loads(header)
    metadata = entries.pop("__metadata__", {})
    data = image[8 + size :]
    tensors = {
        name: (entry["dtype"], entry["shape"], data[entry["data_offsets"][0] : entry["data_offsets"][1]])
        for name, entry in entries.items()
    }
    for _ in range(rng.choice((1, 1, 1, 2))):
        if metadata and (not tensors or rng.random() < 0.5):
            _edit_metadata(metadata, rng)
        elif tensors:
            (_put_dense if rng.random() < 0.1 else _edit_tensors)(tensors, rng)
    return _safetensors(tensors, metadata)


def _safetensors(tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    raw = json.dumps(header, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + b"".join(data for _, _, data in tensors.values())


def _edit_metadata(metadata: dict[str, str], rng: Random) -> None:
    key = rng.choice(sorted(metadata))
    try:
        document = isinstance(json.loads(metadata[key]), dict | list)
    except (ValueError, RecursionError):
        document = False
    kind = rng.randrange(10)
    if document and kind < 8:
        metadata[key] = mutated_json(metadata[key].encode(), rng).decode("utf-8", "replace")
    elif kind == 8:
        del metadata[key]
    else:
        metadata[key] = rng.choice(("", "x", "null", "-1", "nan", "{}", "1e400", "\ud83d", "\x1b[31m", "9" * 5000))


def _edit_tensors(tensors: dict[str, tuple[str, list[int], bytes]], rng: Random) -> None:
    # Small ones hold the structure, and there are fewer of them.
    small = sorted(name for name, (_, _, data) in tensors.items() if len(data) <= _SMALL_BYTES)
    name = rng.choice(small if small and rng.random() < 0.3 else sorted(tensors))
    dtype, shape, data = tensors[name]
    width = _DTYPE_BYTES[dtype]
    kind = rng.randrange(10)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[rng.choice((*KEYS[1:], name + ".x", name[:-1], name.upper(), *tensors))] = tensors.pop(name)
    elif kind == 2:  # the same bytes as another dtype
        other = rng.choice(sorted(_DTYPE_BYTES))
        count = len(data) // _DTYPE_BYTES[other]
        same = count * _DTYPE_BYTES[other] == len(data) and _DTYPE_BYTES[other] == width
        tensors[name] = (other, shape if same else [count], data[: count * _DTYPE_BYTES[other]])
    elif kind == 3:  # other dtype, same shape
        other = rng.choice(sorted(_DTYPE_BYTES))
        tensors[name] = (other, shape, bytes(math.prod(shape) * _DTYPE_BYTES[other]))
    elif kind == 4:  # same bytes, other shape
        count = len(data) // width
        shapes = [[count], [1, count], [count, 1], [1, *shape], shape[::-1], [*shape, 1]]
        tensors[name] = (dtype, rng.choice(shapes), data)
    elif kind == 5:  # a row fewer or more, nothing, a scalar
        row = len(data) // shape[0] if shape and shape[0] else width
        choices: list[tuple[list[int], bytes]] = [
            ([0, *shape[1:]] if shape else [0], b""),
            ([], data[:width].ljust(width, b"\0")),
        ]
        if shape and shape[0]:
            choices += [([shape[0] - 1, *shape[1:]], data[:-row] if row else data)]
            choices += [([shape[0] + 1, *shape[1:]], data + data[:row])]
        new_shape, new_data = rng.choice(choices)
        tensors[name] = (dtype, new_shape, new_data)
    elif kind in (6, 7):  # all of it, or one value
        pattern = rng.choice(
            _PATTERNS.get(dtype)
            or [b"\0" * width, b"\xff" * width, b"\xff" * (width - 1) + b"\x7f", b"\x01".ljust(width, b"\0")]
        )
        count = len(data) // width
        at = rng.randrange(count) * width if count else 0
        whole = kind == 6 or not count
        tensors[name] = (dtype, shape, pattern * count if whole else data[:at] + pattern + data[at + width :])
    elif kind == 8:  # exchanged with another
        other_name = rng.choice(sorted(tensors))
        tensors[name], tensors[other_name] = tensors[other_name], tensors[name]
    else:
        values = bytearray(data)
        for _ in range(rng.choice((1, 4, 16))):
            if values:
                values[rng.randrange(len(values))] = rng.choice((rng.randrange(256), rng.randrange(9)))
        tensors[name] = (dtype, shape, bytes(values))


def _put_dense(tensors: dict[str, tuple[str, list[int], bytes]], rng: Random) -> None:
    # In the place of all of a module one weight.
    module = rng.choice(sorted(tensors)).rpartition(".")[0]
    for each in [each for each in tensors if each.rpartition(".")[0] == module]:
        del tensors[each]
    tensors[f"{module}.weight"] = ("F16", [32, 32], bytes(2048))


# GGUF

_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def mutated_gguf(image: bytes, rng: Random) -> bytes:
    """Change metadata and tensors of a GGUF file that stays one; one in eight is changed as bytes."""
    if rng.random() < 0.12:
        return mutated_bytes(image, rng)
    metadata, tensors, data = parsed_gguf(image)
    for _ in range(rng.choice((1, 1, 2))):
        if metadata and rng.random() < 0.5:
            _edit_gguf_entry(metadata, rng)
        elif tensors:
            _edit_gguf_tensor(tensors, rng)
    if rng.random() < 0.3 and data:
        values = bytearray(data)
        for _ in range(rng.choice((1, 8, 64))):
            values[rng.randrange(len(values))] = rng.choice((0, 0x7C, 0x7F, 0xFF))
        data = bytes(values)
    return _gguf(metadata, tensors, data)


class _Cursor:
    def __init__(self, image: bytes) -> None:
        self.image, self.position = image, 0

    def number(self, layout: str) -> Any:
        (value,) = struct.unpack_from(f"<{layout}", self.image, self.position)
        self.position += struct.calcsize(f"<{layout}")
        return value

    def take(self, size: int) -> bytes:
        if not 0 <= size <= len(self.image) - self.position:
            raise ValueError("ends early")
        self.position += size
        return self.image[self.position - size : self.position]

    def text(self) -> bytes:
        return self.take(self.number("Q"))

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.text()
        if kind == 9:
            inner = self.number("I")
            return inner, [self.value(inner) for _ in range(self.number("Q"))]
        return self.number(_GGUF_SCALARS[kind])


def parsed_gguf(image: bytes) -> tuple[dict[bytes, tuple[int, Any]], list[list[Any]], bytes]:
    """Take a file apart: metadata as types and values, tensors as name, shape, type and offset, and the data."""
    cursor = _Cursor(image)
    if cursor.take(4) != b"GGUF" or cursor.number("I") not in (2, 3):
        raise ValueError("no GGUF file")
    tensor_count, entry_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[bytes, tuple[int, Any]] = {}
    for _ in range(entry_count):
        key = cursor.text()
        kind = cursor.number("I")
        metadata[key] = (kind, cursor.value(kind))
    tensors = []
    for _ in range(tensor_count):
        name = cursor.text()
        shape = [cursor.number("Q") for _ in range(cursor.number("I"))]
        tensors.append([name, shape, cursor.number("I"), cursor.number("Q")])
    start = -(-cursor.position // 32) * 32
    return metadata, tensors, image[start:]


def _gguf_value(kind: int, value: Any) -> bytes:
    if kind == 8:
        return struct.pack("<Q", len(value)) + value
    if kind == 9:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(_gguf_value(inner, item) for item in items)
    return struct.pack(f"<{_GGUF_SCALARS[kind]}", value)


def _gguf(metadata: dict[bytes, tuple[int, Any]], tensors: list[list[Any]], data: bytes) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, (kind, value) in metadata.items():
        parts += [_gguf_value(8, key), struct.pack("<I", kind), _gguf_value(kind, value)]
    for name, shape, kind, offset in tensors:
        parts += [_gguf_value(8, name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)]
    head = b"".join(parts)
    return head + bytes(-len(head) % 32) + data


def _edit_gguf_entry(metadata: dict[bytes, tuple[int, Any]], rng: Random) -> None:
    key = rng.choice(sorted(metadata))
    kind = rng.randrange(6)
    values: list[tuple[int, Any]] = [
        (4, rng.choice((0, 1, 2, 3, 7, 2**31, 2**32 - 1))),
        (10, rng.choice((0, 2**63, 2**64 - 1))),
        (5, rng.choice((0, -1, -(2**31)))),
        (6, rng.choice((0.0, -1.0, math.nan, math.inf, 1e30))),
        (12, rng.choice((0.0, 1e300, math.nan))),
        (7, rng.choice((True, False))),
        (8, rng.choice((b"", b"llama", b"\xff\xfe", b"\x1b[31m", b"x" * 5000, b"\xed\xa0\xbd"))),
        (9, (4, [])),
        (9, (5, [rng.randrange(-2, 9) for _ in range(4)])),
        (9, (8, [b"a", b"\xff", b""])),
    ]
    if kind == 0:
        del metadata[key]
    elif kind == 1:
        metadata[rng.choice((key + b"x", b"\x1b[31m", b"\xff", b"general.alignment"))] = metadata.pop(key)
    elif kind == 2:
        other = rng.choice(sorted(metadata))
        metadata[key], metadata[other] = metadata[other], metadata[key]
    else:
        metadata[key] = rng.choice(values)


def _edit_gguf_tensor(tensors: list[list[Any]], rng: Random) -> None:
    tensor = rng.choice(tensors)
    kind = rng.randrange(7)
    if kind == 0:
        tensors.remove(tensor)
    elif kind == 1:
        tensor[0] = rng.choice((tensor[0] + b"x", b"\x1b[31m", b"\xff\xfe", b"", rng.choice(tensors)[0], b"x" * 60))
    elif kind == 2:
        tensor[1] = rng.choice((tensor[1][::-1], [*tensor[1], 1], [math.prod(tensor[1])], [0], [2**40], tensor[1][:1]))
    elif kind == 3:
        tensor[2] = rng.choice((0, 1, 2, 3, 8, 12, 14, 16, 24, 26, 28, 30, 39, 99))
    elif kind == 4:
        tensor[3] = rng.choice((0, 32, 2**63, tensor[3] + 32))
    elif kind == 5:
        other = rng.choice(tensors)
        tensor[1], other[1] = other[1], tensor[1]
    else:
        other = rng.choice(tensors)
        tensor[0], other[0] = other[0], tensor[0]


# Importance matrices in the legacy format


def parsed_dat(image: bytes) -> tuple[list[list[Any]], bytes]:
    """Take a file apart: entries of a name, a number of calls and values, and what comes after them."""
    cursor = _Cursor(image)
    entries = []
    for _ in range(cursor.number("i")):
        name = cursor.take(cursor.number("i"))
        calls = cursor.number("i")
        entries.append([name, calls, cursor.take(4 * cursor.number("i"))])
    return entries, image[cursor.position :]


def mutated_dat(image: bytes, rng: Random) -> bytes:
    """Change entries of a file that stays one; one in eight is changed as bytes."""
    if rng.random() < 0.12:
        return mutated_bytes(image, rng)
    entries, rest = parsed_dat(image)
    entry = rng.choice(entries)
    kind = rng.randrange(6)
    if kind == 0:
        entries.remove(entry)
    elif kind == 1:
        entry[0] = rng.choice((entry[0] + b"x", b"", b"\xff\xfe", b"\x1b[31m", b"x" * 5000, rng.choice(entries)[0]))
    elif kind == 2:
        entry[1] = rng.choice((0, -1, 1, 2**31 - 1, -(2**31)))
    elif kind == 3:
        entry[2] = rng.choice((b"", entry[2][:4], entry[2] * 2, entry[2][4:]))
    elif kind == 4:
        at = 4 * rng.randrange(len(entry[2]) // 4) if entry[2] else 0
        entry[2] = entry[2][:at] + rng.choice(_PATTERNS["F32"]) + entry[2][at + 4 :]
    else:
        rest = rng.choice((b"", b"\0", struct.pack("<i", -1), struct.pack("<ii", 1, 2**31 - 1), rest[:-1], rest + b"x"))
    parts = [struct.pack("<i", len(entries))]
    for name, calls, values in entries:
        parts += [struct.pack("<i", len(name)), name, struct.pack("<ii", calls, len(values) // 4), values]
    return b"".join(parts) + rest


# Base files of llama-perplexity


def mutated_logits(image: bytes, rng: Random) -> bytes:
    """Change sizes, tokens or predictions of a file that keeps its length; one in four is changed as bytes."""
    if rng.random() < 0.25:
        return mutated_bytes(image, rng)
    start, end = rng.choice(((8, 20), (20, 20 + 4 * struct.unpack_from("<i", image, 8)[0]), (20, len(image))))
    at = start + 4 * rng.randrange((end - start) // 4)
    sizes = [struct.pack("<i", value) for value in (0, -1, 1, 2, 3, 2**31 - 1, -(2**31), 1 << 20)]
    return image[:at] + rng.choice((*sizes, *_PATTERNS["F32"])) + image[at + 4 :]


# Tables


def mutated_parquet(image: bytes, rng: Random) -> bytes:
    """Change columns of a Parquet file; one in four is changed as bytes."""
    if rng.random() < 0.25:
        return mutated_bytes(image, rng)
    file = io.BytesIO()
    table = _mutated_table(pyarrow.parquet.read_table(io.BytesIO(image)), rng)
    pyarrow.parquet.write_table(table, file, row_group_size=rng.choice((1, 2, 1000)))
    return file.getvalue()


def mutated_arrow(image: bytes, rng: Random) -> bytes:
    """Change columns of an Arrow file; one in four is changed as bytes."""
    if rng.random() < 0.25:
        return mutated_bytes(image, rng)
    table = _mutated_table(pyarrow.ipc.open_stream(image).read_all(), rng)
    file = io.BytesIO()
    with rng.choice((pyarrow.ipc.new_stream, pyarrow.ipc.new_stream, pyarrow.ipc.new_file))(file, table.schema) as to:
        to.write_table(table)
    return file.getvalue()


def _mutated_table(table: pyarrow.Table, rng: Random) -> pyarrow.Table:
    rows = len(table)
    columns: tuple[Any, ...] = (
        [None] * rows,
        [b"\xff\x00"] * rows,
        [""] * rows,
        ["\x1b[31m\u202e"] * rows,
        ["x" * 100_000] * rows,
        [2**63 - 1] * rows,
        [float("nan")] * rows,
        [-0.0] * rows,
        [True] * rows,
        [[]] * rows,
        [[{"role": "user", "content": None}]] * rows,
        [[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]] * rows,
        [{"a": [{"b": {"c": 1}}]}] * rows,
        [[[[[1]]]]] * rows,
    )
    at = rng.randrange(table.num_columns)
    name = table.column_names[at]
    kind = rng.randrange(5)
    if kind == 0:
        other = rng.choice(("text", "messages", "", "\x1b[31m", "x" * 5000, name + "x", "conversations", "content"))
        return table.rename_columns([other if each == name else each for each in table.column_names])
    if kind == 1:
        return table.slice(0, rng.choice((0, 1)))
    if kind == 2:
        return table.append_column(rng.choice(("text", "extra", "messages")), pyarrow.array(rng.choice(columns)))
    return table.set_column(at, name, pyarrow.array(rng.choice(columns)))
