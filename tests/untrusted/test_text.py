"""What others wrote is read within bounds, and shown so that nothing in it is obeyed."""

from __future__ import annotations

import io
import json
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import yaml

from colm_ds.errors import ConfigError, Problems
from colm_ds.untrusted.json_text import MAX_DEPTH, DoubledKeyError, parse_json, read_json
from colm_ds.untrusted.lines import bounded_lines
from colm_ds.untrusted.printable import escaped, visible
from colm_ds.untrusted.yaml_text import parse_yaml, read_yaml

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
MERGED = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 10)
)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_depth_has_a_bound(parse: Any) -> None:
    assert parse(nested(MAX_DEPTH)) == json.loads(nested(MAX_DEPTH))
    flat = json.dumps([[{"a": [1]}]] * 1000)  # many brackets, none of them deep
    assert parse(flat) == json.loads(flat)
    for depth in (MAX_DEPTH + 2, 950, 10_000, 100_000):
        for text in (nested(depth), '{"a":' * depth + "1" + "}" * depth, "[" * depth):
            with pytest.raises(ValueError, match=r"."):
                parse(text)


@pytest.mark.parametrize("text", [LAUGHS, MERGED], ids=["lists", "merged mappings"])
def test_aliases_do_not_multiply(text: str) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"line \d+: stands for more than 100,000 values"):
        parse_yaml(text)
    assert time.monotonic() - start < 5.0


def test_ordinary_aliases_work() -> None:
    text = "base: &base {lr: 1.0e-3, betas: [0.9, 0.95]}\none: *base\ntwo: {<<: *base, lr: 2.0}\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    with pytest.raises(ValueError, match="line 1: 'a' is inside itself"):
        parse_yaml("a: &a [1, *a]")


BAD_YAML = ["a: 2001-13-45", "a: " + "9" * 5000, "!!int ''", "!!float x", "!!timestamp x", "!!bool maybe", "<<: 1", "["]
BAD_YAML += ["!!python/object/apply:os.system [id]", "a: \0", "? [1]\n: 2", "*x", "&a &a b", "%YAML 9", "\t", "a: b: c"]


@pytest.mark.parametrize("text", BAD_YAML)
def test_bad_yaml_is_a_value_error_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        parse_yaml(text)
    assert "\n" not in str(error.value)


def test_files_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for read, module in ((read_json, "json_text"), (read_yaml, "yaml_text")):
        monkeypatch.setattr(f"colm_ds.untrusted.{module}.MAX_FILE_BYTES", 1 << 20)
        (tmp_path / "file").write_bytes(b" " * ((1 << 20) - 2) + b"[]")
        assert read(tmp_path / "file") == []
        (tmp_path / "file").write_bytes(b" " * (1 << 20) + b"[]")
        with pytest.raises(ValueError, match="more than 1 MiB"):
            read(tmp_path / "file")
        (tmp_path / "file").write_bytes(b'["\xff"]')
        with pytest.raises(ValueError, match="utf-8"):
            read(tmp_path / "file")


def test_lines_are_cut_where_split_cuts_them() -> None:
    for text in (
        b"",
        b"a",
        b"a\n",
        b"\n\n",
        b"abcde\nab\n",
        b"abcdef\nab",
        b"abcdefgh",
        b"ab\nabcdefghijklmn\nc",
        b"abcde",
    ):
        for most in (1, 2, 5, 6, 100):
            wanted = [None if len(line.rstrip(b"\n")) > most else line for line in io.BytesIO(text)]
            assert list(bounded_lines(io.BytesIO(text), most)) == wanted, (text, most)


def test_no_character_is_left_that_is_obeyed() -> None:
    """Of all of Unicode: control, formatting and separating characters, but for what scripts and emoji need."""
    kept = {"\t", "\n", "\u200c", "\u200d"}  # joiners change no direction and hide nothing
    everything = "".join(map(chr, range(0x110000)))
    shown = visible(everything)
    assert len(shown) == len(everything)
    for before, after in zip(everything, shown, strict=True):
        kind = unicodedata.category(before)
        bidi = unicodedata.bidirectional(before) in {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
        if before in kept:
            assert after == before
        elif kind in ("Cc", "Zl", "Zp", "Cs") or bidi or before in "\u200b\u200e\u200f\u061c\ufeff\xad":
            assert after == "\ufffd", hex(ord(before))
        elif kind[0] in "LNPS" or kind == "Mn":
            assert after == before or 0xE0000 <= ord(before) < 0xE1000 or before == "\ufffd", hex(ord(before))


def test_escaped_json_is_the_same_value() -> None:
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = ["".join(map(chr, codes[start : start + 64])) for start in range(0, len(codes), 64)]
    value = {text: [text] for text in texts}
    for indent in (None, 1):
        text = escaped(json.dumps(value, ensure_ascii=False, indent=indent))
        assert json.loads(text) == value
        assert visible(text) == text


def test_messages_are_safe_and_short() -> None:
    assert str(ConfigError("source 'a\u202eb\x1b[2J'\n  more")) == "source 'a\ufffdb\ufffd[2J'\n  more"
    problems = Problems("r.yaml")
    problems.add("steps", "x" * 10**6, "wrong")
    problems.add("steps", 10**6000, "wrong")
    with pytest.raises(ConfigError) as error:
        problems.raise_if_any()
    assert len(str(error.value)) < 1000


def test_a_key_that_an_object_has_twice(tmp_path: Path) -> None:
    for text in ('{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', '[[], {"c": [], "c": []}]', '{"c": 1, "\\u0063": 2}'):
        with pytest.raises(DoubledKeyError, match=r"^the key 'c' is there twice$"):
            parse_json(text)
    same = {"a": {"a": [{"a": 1}, {"a": 2}]}, "b": '{"a": 1, "a": 2}'}
    assert parse_json(json.dumps(same)) == same
    (tmp_path / "file.json").write_text('{\n "x": {"lr": 1},\n "lr": "\\n lr",\n "y": [{\n"z": 2}],\n "lr" : 3\n}\n')
    with pytest.raises(DoubledKeyError, match=r"^the key 'lr' is there twice, in line 3 and in line 6$"):
        read_json(tmp_path / "file.json")
    with pytest.raises(DoubledKeyError) as raised:
        parse_json(json.dumps({"x" * 10**6: 1})[:-1] + f', "{"x" * 10**6}": 1}}')
    assert len(str(raised.value)) < 200
