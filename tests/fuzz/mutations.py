"""Mutants of JSON documents, texts, chat templates and cards that are nearly right: most pass the parser."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import struct
from collections.abc import Callable
from random import Random
from typing import Any

__all__ = [
    "FRONT_MATTER",
    "HOSTILE",
    "KEYS",
    "NAMES",
    "mutated_bytes",
    "mutated_card",
    "mutated_json",
    "mutated_json_lines",
    "mutated_listing",
    "mutated_template",
    "mutated_text",
]

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

WORDS = (
    *("rope_scaling", "rope_parameters", "text_config", "vision_config", "quantization_config", "layer_types"),
    *("num_experts", "num_experts_per_tok", "vocab_size", "pad_token_id", "hidden_act", "num_attention_heads"),
    *("num_key_value_heads", "tie_word_embeddings", "model_type", "architectures", "is_encoder_decoder", "max_length"),
    *(
        "type",
        "rope_type",
        "su",
        "longrope",
        "default",
        "mrope_section",
        "Infinity",
        "NaN",
        "llama",
        "qwen2_vl",
        "gelu",
    ),
    *("messages", "conversations", "text", "prompt", "response", "system", "tools", "tool_calls", "role", "content"),
    *("sha256", "version", "use_dora", "use_rslora", "modules_to_save", "bias", "all", "none", "fp8", "mxfp4", "bpw"),
)
"""Keys and values that have a meaning to some reader."""

KEYS = ("", "\ud83d", "\x1b[2J", "__class__", "x" * 100_000, "0", "name")


# JSON


def mutated_json(data: bytes, rng: Random) -> bytes:
    """Change one to three places of a document; one in twelve is changed as text."""
    if rng.random() < 1 / 12:
        return _mutated_json_text(data, rng)
    document = [json.loads(data)]  # in a list, so that the whole can be replaced as any part of it
    try:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            _edit_json(document, rng)
        return json.dumps(document[0] if document else None).encode("utf-8", "surrogatepass")
    except RecursionError:  # nested twice
        return data


def mutated_json_lines(data: bytes, rng: Random) -> bytes:
    """Change one line of a file of JSON lines."""
    lines = data.splitlines()
    index = rng.randrange(len(lines))
    lines[index] = mutated_json(lines[index], rng).replace(b"\n", b" ")
    if rng.random() < 0.7:  # where readers begin
        lines.insert(0, lines.pop(index))
    return b"\n".join(lines) + b"\n"


def _mutated_json_text(data: bytes, rng: Random) -> bytes:
    if rng.random() < 1 / 250:
        return _with_entry(data, _many_keys(), rng)
    return rng.choice(
        (
            lambda: data[: rng.randrange(len(data))],
            lambda: b"[" * 100_000,
            lambda: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
            lambda: rng.choice((b"", b"null", b"[]", b"{}", b"1", b'"a"', b"\xef\xbb\xbf" + data, b"\xff" + data)),
            # a number of more digits than Python converts
            lambda: data.replace(rng.choice((b"0", b"1", b"2", b"4", b"8")), b"9" * 5000, 1),
            lambda: _with_entry(data, b'{"a":' * 900 + b"1" + b"}" * 900, rng),
            lambda: _with_key_twice(data, rng),
            lambda: _with_key_twice(data, rng),
            lambda: json.dumps(json.loads(data)).encode("utf-16"),
            lambda: mutated_bytes(data, rng),
        )
    )()


_KEY = re.compile(rb'(?<=[{,])\s*("(?:[^"\\]|\\.)*"\s*:)')


def _with_key_twice(data: bytes, rng: Random) -> bytes:
    found = list(_KEY.finditer(data))
    if not found:
        return data
    key = rng.choice(found)
    value = json.dumps(rng.choice(HOSTILE)).encode()
    return data[: key.start()] + key[1] + value + b"," + data[key.start() :]


def _with_entry(data: bytes, value: bytes, rng: Random) -> bytes:
    # The value beside another, or in its place as far as readers go by the last of two keys.
    found = list(_KEY.finditer(data))
    if not found:
        return value
    key = rng.choice(found)
    return data[: key.start()] + rng.choice((b'"also":', key[1])) + value + b"," + data[key.start() :]


@functools.cache
def _many_keys() -> bytes:
    return b"{" + b",".join(b'"%d":0' % number for number in range(1_000_000)) + b"}"


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
        _put_word,
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


def _put_word(container: Any, key: Any, rng: Random) -> None:
    container[key] = rng.choice(WORDS)


def _put_near(container: Any, key: Any, rng: Random) -> None:
    container[key] = _near(container[key], rng)


def _delete(container: Any, key: Any, rng: Random) -> None:
    del container[key]


def _swap(container: Any, key: Any, rng: Random) -> None:
    other = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
    container[key], container[other] = container[other], container[key]


def _rename_or_repeat(container: Any, key: Any, rng: Random) -> None:
    if isinstance(container, dict):
        container[rng.choice((*KEYS, *WORDS))] = container.pop(key)
    else:
        container.insert(key, copy.deepcopy(container[key]))


def _nest(container: Any, key: Any, rng: Random) -> None:
    for _ in range(rng.choice((1, 3, 300, 800))):
        container[key] = [container[key]] if rng.random() < 0.5 else {"a": container[key]}


def _retype(container: Any, key: Any, rng: Random) -> None:
    container[key] = str(container[key])[:1000] if rng.random() < 0.5 else [container[key]]


def _add_key(container: Any, key: Any, rng: Random) -> None:
    value = copy.deepcopy(rng.choice(HOSTILE))
    if isinstance(container[key], dict):
        container[key][rng.choice((*KEYS, *WORDS))] = value
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


NAMES = (
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    *("README.md", "adapter_config.json", "adapter_model.safetensors"),
)
"""Contents that a folder's list may name."""

_PLACES = (
    *("pytorch_model.bin", "model.safetensors.index.json", "another.safetensors", "additional_chat_templates/a.jinja"),
    *(
        "additional_chat_templates",
        "tokenizer.model",
        "chat_template.jinja",
        "vocab.json",
        "\u202e\x1b.json",
        "a/b.json",
    ),
)


def mutated_listing(data: bytes, rng: Random) -> bytes:
    """Change which names a folder has, and what stands under them: one of ``NAMES``, or a folder."""
    listing = json.loads(data)
    for _ in range(rng.choice((1, 2, 3, 4))):
        name = rng.choice(sorted(listing) or ["config.json"])
        kind = rng.randrange(3)
        if kind == 0:
            listing.pop(name, None)
        elif kind == 1:
            listing[rng.choice((*NAMES, *_PLACES))] = listing.pop(name, "config.json")
        else:
            listing[rng.choice((*NAMES, *_PLACES))] = rng.choice((*NAMES, "adapter_config.json", "folder"))
    return json.dumps(listing).encode()


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


# Chat templates

_HOSTILE_EXPRESSIONS = (
    "1 // 0",
    "messages * 10 ** 9",
    "'x' * 10 ** 10",
    "range(10 ** 12) | list",
    "10 ** 10 ** 9",
    "-0.0",
    "2 ** 63",
    "1e308 * 10",
    "().__class__.__mro__",
    "messages.__class__.__base__.__subclasses__()",
    "namespace(a=1).a.b.c",
    "raise_exception('\\x1b[31m' ~ 'no' * 100000)",
    "strftime_now('%Y')",
    "messages | tojson(indent=10 ** 9)",
    "'\\ud83d'",
    "'\\x1b[2J\\u202e\\x00'",
    "'a' | center(10 ** 10)",
    "'%999999999d' | format(1)",
    "messages | batch(10 ** 9) | list",
    "messages[10 ** 30]",
    "messages[0]['content'] * 3000",
    "messages | map(attribute='content.x.y') | list",
    "messages | tojson | length",
    "not_there.at_all",
    "not_there",
    "bos_token.format_map({})",
    "cycler()",
    "lipsum(n=1000)",
)
_HOSTILE_STATEMENTS = (
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% set a = [] %}{% for m in messages %}{{ a.append(a) }}{% endfor %}{{ a }}",
    "{% include 'a' %}",
    "{% import 'a' as b %}",
    "{% extends 'a' %}",
    "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}",
    "{% break %}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% if " + "(" * 90 + "1" + ")" * 90 + " %}a{% endif %}",
    "{% if " + "(" * 5000 + "1" + ")" * 5000 + " %}a{% endif %}",
    "{% raw %}{{ {% endraw %}",
)


def mutated_template(data: bytes, rng: Random) -> bytes:
    """Change expressions and statements of a template that stays one; one in five is changed as text."""
    if rng.random() < 0.2:
        return mutated_text(data, rng)
    text = data.decode()
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(re.finditer(r"\{\{(.*?)\}\}", text))
        kind = rng.randrange(4)
        if kind == 0 or not places:
            at = rng.choice([0, len(text), *(place.end() for place in places)])
            text = text[:at] + rng.choice(_HOSTILE_STATEMENTS) + text[at:]
            continue
        place = rng.choice(places)
        inner = place[1].strip()
        changed = (
            rng.choice(_HOSTILE_EXPRESSIONS),
            f"({inner}) {rng.choice(('+', '~', '*', '-', 'in', '%', '**'))} ({rng.choice(_HOSTILE_EXPRESSIONS)})",
            f"({inner}) | {rng.choice(('length', 'int', 'list', 'trim', 'upper', 'tojson', 'join', 'first', 'items'))}",
        )[kind - 1]
        text = text[: place.start()] + "{{ " + changed + " }}" + text[place.end() :]
    return text.encode("utf-8", "surrogatepass")


# Cards

FRONT_MATTER = re.compile(rb"\A---\n(.*?\n)---\n", re.DOTALL)

_HOSTILE_YAML = (
    "null",
    "~",
    "9223372036854775808",
    "-0.0",
    "1e308",
    ".nan",
    "!!python/object/apply:os.system ['true']",
    "!!binary aGVsbG8=",
    "*nothing",
    "&a [*a]",
    "&a {b: *a}",
    "{<<: {a: 1}}",
    '"\\ud83d"',
    '"\\x1b[31m"',
    '"\\u202e\\u2028"',
    "[" * 300 + "]" * 300,
    "[" * 20_000,
    "|\n  a\n  b",
    ">-\n  a",
    "{a: 1, a: 2}",
    "2001-01-01",
    "x" * 70_000,
    "['" + "a" * 600 + "']",
    "[" + "a," * 300 + "]",
    "'<script>alert(1)</script>'",
    "? [a]\n: b",
    "",
)


def mutated_card(data: bytes, rng: Random) -> bytes:
    """Change entries of a card's front matter that stays YAML, or its body; one in six is changed as text."""
    front = FRONT_MATTER.match(data)
    if front is None or rng.random() < 1 / 6:
        return mutated_text(data, rng)
    if rng.random() < 1 / 12:
        body = data[front.end() :]
        starts = (
            b"---\n\n---\n",
            b"---\n- a\n---\n",
            b"---\na\n---\n",
            b"---\na: b\n",
            b"",
            b"---\n" + b"#" * 100_000 + b"\n---\n",
        )
        return rng.choice(starts) + rng.choice((body, b"a" * 2_000_000))
    entries = re.findall(r"(?m)^[^\s#-].*\n(?:[\s-].*\n)*", front[1].decode())
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(entries))
        key = entries[at].partition(":")[0]
        kind = rng.randrange(6)
        if kind == 0:
            del entries[at]
            entries = entries or ["a: b\n"]
        elif kind == 1:
            entries.insert(at, entries[at])
        elif kind == 2:
            entries[at] = (
                f"{rng.choice(('license', 'language', 'tags', 'x' * 2000, '1', '? a'))}:{entries[at].partition(':')[2]}"
            )
        else:
            entries[at] = f"{key}: {rng.choice(_HOSTILE_YAML)}\n"
    body = data[front.end() :]
    if rng.random() < 0.2:
        body = rng.choice((b"", b"\x1b[31m" + body, body * 5000, mutated_text(body, rng), b"---\n" + body))
    return b"---\n" + "".join(entries).encode("utf-8", "surrogatepass") + b"---\n" + body
