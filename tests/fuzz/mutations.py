"""Mutants of JSON documents, safetensors and GGUF files that are nearly right: most pass the parser, few the door."""

from __future__ import annotations

import copy
import json
import math
import struct
from collections.abc import Callable
from random import Random
from typing import Any

__all__ = ["mutated_bytes", "mutated_gguf", "mutated_json", "mutated_json_lines", "mutated_safetensors", "mutated_text"]

HOSTILE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**30,
    0.5,
    -0.0,
    1e308,
    -1e308,
    5e-324,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "0",
    "x" * 100_000,
    "\ud83d",
    "\x1b[31mred\x1b[0m\r\n",
    "\u202eabc\u2066\u2028",
    "../../../etc/passwd",
    "\x00",
    [],
    {},
    [[]],
    {"": {}},
    [None],
    [0] * 10_000,
    ["a", 1, None],
)
"""Values that JSON can hold and that code rarely expects."""

_KEYS = ("", "\ud83d", "\x1b[2J", "__class__", "x" * 100_000, "0", "name")

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

_PATTERNS = {
    "F64": [struct.pack("<d", x) for x in (0.0, math.nan, math.inf, -math.inf, -1.0, 1e300)],
    "F32": [struct.pack("<f", x) for x in (0.0, math.nan, math.inf, -math.inf, -1.0, 1e30, 1e-42)],
    "F16": [struct.pack("<e", x) for x in (0.0, math.nan, math.inf, -math.inf, -1.0, 60000.0, 6e-8)],
    "BF16": [b"\x00\x00", b"\xc0\x7f", b"\x80\x7f", b"\x80\xff", b"\x80\xbf", b"\x7f\x7f"],
}
"""Of each floating-point dtype: zero, NaN, infinities, negative, huge, tiny."""


# JSON


def mutated_json(data: bytes, rng: Random) -> bytes:
    """Change one to three places of a document; one in twelve is changed as text."""
    if rng.random() < 1 / 12:
        return _mutated_json_text(data, rng)
    document = [json.loads(data)]  # in a list, so that the whole can be replaced as any part of it
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _edit_json(document, rng)
    return json.dumps(document[0] if document else None).encode("utf-8", "surrogatepass")


def mutated_json_lines(data: bytes, rng: Random) -> bytes:
    """Change one line of a file of JSON lines."""
    lines = data.splitlines()
    index = rng.randrange(len(lines))
    lines[index] = mutated_json(lines[index], rng).replace(b"\n", b" ")
    return b"\n".join(lines) + b"\n"


def _mutated_json_text(data: bytes, rng: Random) -> bytes:
    start = data.find(b'"')
    return rng.choice(
        (
            lambda: data[: rng.randrange(len(data))],
            lambda: b"[" * 100_000,
            lambda: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
            lambda: rng.choice((b"", b"null", b"[]", b"{}", b"1", b'"a"', b"\xef\xbb\xbf" + data, b"\xff" + data)),
            # a number of more digits than Python converts
            lambda: data.replace(rng.choice((b"0", b"1", b"2", b"4", b"8")), b"9" * 5000, 1),
            # the first key twice
            lambda: data[:start] + data[start : data.find(b":") + 1] + b" null, " + data[start:],
            lambda: json.dumps(json.loads(data)).encode("utf-16"),
            lambda: mutated_bytes(data, rng),
        )
    )()


def _places(value: Any) -> list[tuple[Any, Any]]:
    # Every (container, key) of a document.
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting and len(found) < 5000:
        each = waiting.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        for key in keys:
            found.append((each, key))
            waiting.append(each[key])
    return found


def _edit_json(document: list[Any], rng: Random) -> None:
    places = _places(document)
    if not places:
        return
    # Long lists of numbers would get nearly all edits: half of them go to what has a name.
    named = [place for place in places if isinstance(place[0], dict)]
    container, key = rng.choice(named if named and rng.random() < 0.5 else places)
    edits: tuple[Callable[[Any, Any, Random], None], ...] = (
        *(_put_hostile,) * 4,
        _put_near,
        _delete,
        _swap,
        _rename_or_repeat,
        _nest,
        _retype,
        _add_key,
    )
    if rng.random() < 0.08:  # a copy of another part
        source, name = rng.choice(places)
        container[key] = copy.deepcopy(source[name])
    else:
        rng.choice(edits)(container, key, rng)


def _put_hostile(container: Any, key: Any, rng: Random) -> None:
    container[key] = copy.deepcopy(rng.choice(HOSTILE))


def _put_near(container: Any, key: Any, rng: Random) -> None:
    container[key] = _near(container[key], rng)


def _delete(container: Any, key: Any, rng: Random) -> None:
    del container[key]


def _swap(container: Any, key: Any, rng: Random) -> None:
    other = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
    container[key], container[other] = container[other], container[key]


def _rename_or_repeat(container: Any, key: Any, rng: Random) -> None:
    if isinstance(container, dict):
        container[rng.choice(_KEYS)] = container.pop(key)
    else:
        container.insert(key, copy.deepcopy(container[key]))


def _nest(container: Any, key: Any, rng: Random) -> None:
    for _ in range(rng.choice((1, 3, 300))):
        container[key] = [container[key]] if rng.random() < 0.5 else {"a": container[key]}


def _retype(container: Any, key: Any, rng: Random) -> None:
    container[key] = str(container[key])[:1000] if rng.random() < 0.5 else [container[key]]


def _add_key(container: Any, key: Any, rng: Random) -> None:
    value = copy.deepcopy(rng.choice(HOSTILE))
    if isinstance(container[key], dict):
        container[key][rng.choice(_KEYS)] = value
    else:
        container[key] = value


def _near(value: Any, rng: Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        with_errors: list[Callable[[], Any]] = [
            lambda: value + 1,
            lambda: value - 1,
            lambda: -value,
            lambda: value * 2,
            lambda: value / 2,
            lambda: value * 10**9,
            lambda: float(value),
            lambda: value**8,
        ]
        try:
            return rng.choice(with_errors)()
        except OverflowError:
            return math.inf
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return value[:at] + rng.choice(("", "\ud83d", "\x1b[0m", "a", "\n", "|<b>", value)) + value[at + 1 :]
    if isinstance(value, list):
        return rng.choice((value[::-1], value[:-1], value * 2, value[:1], [*value, None]))
    return {**value, "also": None} if isinstance(value, dict) else 0


# Text and bytes


def mutated_text(data: bytes, rng: Random) -> bytes:
    """Change a text: a piece cut, doubled, moved, or replaced by what parsers trip over."""
    pieces = (
        b"\x1b[31m",
        b"\xff\xfe",
        b"{{",
        b"}}",
        b"{%",
        b"%}",
        b"\x00",
        b"\xf0\x9f\x98",
        b"|",
        b"<b>",
        b"\n" * 9,
        b"9" * 400,
    )
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((0, 1, 2, 5, 20)))
        kind = rng.randrange(4)
        middle = (b"", data[start:end] * 2, rng.choice(pieces), data[end : end + 8] + data[start:end])[kind]
        data = data[:start] + middle + data[end:]
    return data


def mutated_bytes(data: bytes, rng: Random) -> bytes:
    """Flip, set, cut, double or append bytes; the first hundreds, where headers are, more often."""
    if not data:
        return bytes(rng.randrange(256) for _ in range(8))
    image = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        near = min(len(image), 512 if rng.random() < 0.6 else len(image))
        at = rng.randrange(near) if near else 0
        kind = rng.randrange(6)
        if kind == 0 and image:
            image[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and image:
            image[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            image[at : at + 8] = struct.pack("<q", rng.choice((0, -1, 1 << 31, 1 << 40, (1 << 63) - 1, len(data))))
        elif kind == 3:
            del image[at:]
        elif kind == 4:
            del image[at : at + rng.choice((1, 4, 8, 64))]
        else:
            image[at:at] = bytes(rng.choice((1, 8, 1000)))
    return bytes(image)


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
            _edit_tensors(tensors, rng)
    return _safetensors(tensors, metadata)


def _safetensors(tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
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
    name = rng.choice(sorted(tensors))
    dtype, shape, data = tensors[name]
    width = _DTYPE_BYTES[dtype]
    kind = rng.randrange(10)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[rng.choice((*_KEYS[1:], name + ".x", name[:-1], name.upper(), *tensors))] = tensors.pop(name)
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
                values[rng.randrange(len(values))] = rng.randrange(256)
        tensors[name] = (dtype, shape, bytes(values))


# GGUF

_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def mutated_gguf(image: bytes, rng: Random) -> bytes:
    """Change metadata and tensors of a GGUF file that stays one; one in eight is changed as bytes."""
    if rng.random() < 0.12:
        return mutated_bytes(image, rng)
    metadata, tensors, data = _parsed_gguf(image)
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

    def text(self) -> bytes:
        size = self.number("Q")
        self.position += size
        return self.image[self.position - size : self.position]

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.text()
        if kind == 9:
            inner = self.number("I")
            return inner, [self.value(inner) for _ in range(self.number("Q"))]
        return self.number(_GGUF_SCALARS[kind])


def _parsed_gguf(image: bytes) -> tuple[dict[bytes, tuple[int, Any]], list[list[Any]], bytes]:
    cursor = _Cursor(image)
    cursor.position = 8
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
