"""Change bytes, and the values of JSON and YAML, as damage and bad intentions do; all from one seeded generator."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import yaml

PIECES = [
    *(b"\0", b"\xff\xfe", b"\xe2\x80\xae", b"\x1b[2J", b"\xed\xa0\x80", b"\r\n", b"\n\n", b"\t", b" " * 300),
    *(b"{", b"}", b"[", b"]", b'"', b"'", b",", b":", b"\\", b"\\u0000", b"\\ud800", b"#", b"- ", b"? ", b"|", b"%"),
    *(
        b"*a",
        b"&a [*a]",
        b"&a [x, x, x]\nb: [*a, *a]",
        b"<<: ",
        b"!!int x",
        b"!!python/object:os.system",
        b"2001-13-01",
    ),
    *(b"null", b"true", b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1", b"0", b"9" * 400, b"9" * 5000, b"0.1"),
    *(
        b"[" * 2000,
        b'{"a":' * 2000,
        b"- " * 500,
        b"(" * 300,
        b"../" * 30,
        b"/dev/null",
        b"/dev/zero",
        b"/proc/self/mem",
    ),
    *(b"1_0", b"\n" * 50),
]

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 1 << 31, 1 << 63, -(1 << 70), 10**400, 0.5, -0.0, 1e-320, 1e308),
    *(float("nan"), float("inf"), "", "x", "\0", "a\u202eb", "\x1b[2J", "-", "auto", "none", "../..", "/", "/dev/null"),
    *("x" * 5000, "1e5", "0x10", "é" * 10, [], {}, [[]], [None], [1, "a"], {"": 1}, {"a": {"b": {}}}, [{}] * 3),
    ["x"] * 200,
]


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """Return bytes with one to three of: a flipped bit, a cut, a doubled, moved, blanked or inserted piece."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(len(content) + 1)
        size = draw.choice((1, 1, 4, 16, 100, len(content) // 3))
        piece = content[at : at + size]
        kind = draw.randrange(8)
        if kind == 0 and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at] + content[at + size :]
        elif kind == 2:
            content = content[:at] + piece * draw.choice((2, 3, 50)) + content[at + size :]
        elif kind == 3:
            to = draw.randrange(len(content) + 1)
            content = content[:to] + piece + content[to:]
        elif kind == 4:
            content = content[:at]
        elif kind == 5:
            content = content[:at] + bytes(len(piece)) + content[at + size :]
        elif kind == 6:
            content = content[:at] + draw.randbytes(draw.choice((1, 4, 50))) + content[at:]
        else:
            content = content[:at] + draw.choice(PIECES) + content[at + draw.choice((0, 0, 1, 5)) :]
    return content


def changed_value(value: Any, draw: random.Random) -> Any:
    """Return a copy of nested lists and mappings in which one to three places hold something else, or are gone."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return draw.choice(VALUES)
        inside, key = draw.choice(places)
        kind = draw.randrange(6)
        if kind == 0:
            del inside[key]
        elif kind == 1 and isinstance(inside, dict):
            inside[draw.choice(("x", "", "\0", str(key).upper(), f"{key}s", "a\u202eb"))] = inside.pop(key)
        elif kind == 2:
            other, name = draw.choice(places)
            inside[key] = json.loads(json.dumps(other[name])) if _holds(other, name) else None
        elif kind == 3:
            inside[key] = [inside[key]] if draw.random() < 0.5 else {"x": inside[key]}
        else:
            inside[key] = draw.choice(VALUES)
    return value


def _holds(inside: Any, key: Any) -> bool:
    return key in inside if isinstance(inside, dict) else key < len(inside)


def _places(value: Any) -> Any:
    """Yield every place in nested lists and mappings: what it is in, and its key or index."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield value, key
        yield from _places(each)


def changed_header(content: bytes, draw: random.Random) -> bytes:
    """Change the JSON header of a safetensors file by its values, or its length; the tensors stay."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(changed_value(json.loads(content[8 : 8 + size]), draw)).encode()
    length = draw.choice((len(header),) * 6 + (0, len(header) - 1, 1 << 30, (1 << 64) - 1))
    return length.to_bytes(8, "little") + header + content[8 + size :]


def changed_array(content: bytes, draw: random.Random) -> bytes:
    """Change the header of a `.npy` file: its type, order or shape, or text in the place of one of them."""
    size = int.from_bytes(content[8:10], "little")
    old = [b"'<i4'", b"'<i8'", b"'<f2'", b"False", b"'descr'", b"'shape'", b"(", b"}"]
    new = [b"'|O'", b"'<U9'", b"'<f8'", b"True", b"(10**9,)", b"(99999999999,)", b"(-1,)", b"[", b"{" * 99, b"'<i4'"]
    header = content[10 : 10 + size].replace(draw.choice(old), draw.choice(new), 1)
    if draw.random() < 0.5:
        header = re.sub(
            rb"\(\d+,\)", draw.choice((b"(0,)", b"(1,)", b"(3000000000,)", b"(2, 2)", b"()")), header, count=1
        )
    return content[:8] + len(header).to_bytes(2, "little") + header + content[10 + size :]


def doubled_keys(content: bytes, draw: random.Random) -> bytes:
    """Write a key of a JSON text twice, or another object into the middle of it."""
    text = content.decode("utf-8")
    places = [place for place, character in enumerate(text) if character == "{"]
    at = draw.choice(places) + 1
    piece = draw.choice(('"a": 1, "a": 2, ', '"a": {"b": 1, "b": 2}, ', text[at : at + 60].split(",")[0] + ", "))
    return (text[:at] + piece + text[at:]).encode()


def changed_text(content: bytes, draw: random.Random, kind: str) -> bytes:
    """Change a file by its bytes, or by its values where it is JSON, lines of JSON or YAML."""
    if kind in ("safetensors", "npy") and draw.random() < 0.7:
        return changed_header(content, draw) if kind == "safetensors" else changed_array(content, draw)
    if kind == "values":
        return json.dumps(changed_value(json.loads(content), draw)).encode()
    if kind in ("json", "jsonl") and draw.random() < 0.05:
        return doubled_keys(content, draw)
    kind = "bytes" if kind in ("safetensors", "npy") else kind
    if kind == "bytes" or draw.random() < 0.4:
        return changed_bytes(content, draw)
    text = content.decode("utf-8")
    dump: Callable[[Any], str] = json.dumps
    try:
        if kind == "yaml":
            return yaml.safe_dump(changed_value(yaml.safe_load(text), draw), allow_unicode=True).encode()
        if kind == "json":
            return dump(changed_value(json.loads(text), draw)).encode()
        lines = text.splitlines()
        at = draw.randrange(len(lines))
        lines[at] = dump(changed_value(json.loads(lines[at]), draw))
        return "\n".join([*lines, ""]).encode()
    except (ValueError, UnicodeError, yaml.YAMLError, RecursionError):  # this value cannot be written: other bytes then
        return changed_bytes(content, draw)
