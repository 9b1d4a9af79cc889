"""Readers of JSON files: every format gives the same records, every defect is named with its line."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from colm_ds.data import find_files, read_records
from colm_ds.data.formats import read_rows
from colm_ds.data.jsonl import split_lines
from colm_ds.errors import DataError

RECORDS = [
    {"text": "line\u2028separator \x85 \x1c inside", "n": 1},
    {"text": "é 数 \U0001f600"},
    {"text": 'quote " and \\n'},
]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def save(path: Path, data: bytes) -> Path:
    if path.name.endswith(".gz"):
        data = gzip.compress(data)
    elif path.name.endswith(".zst"):
        data = pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)
    path.write_bytes(data)
    return path


def failure(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("ending", [b"", b"\n", b"\n\n", b"\n \t\r\n"])
def test_lines_of_every_format(tmp_path: Path, name: str, ending: bytes) -> None:
    path = save(tmp_path / name, LINES.removesuffix(b"\n") + ending)
    assert list(read_records(path)) == [(f"{path}:{line}", record) for line, record in enumerate(RECORDS, start=1)]


def test_array(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(RECORDS, indent=1, ensure_ascii=False), encoding="utf-8")
    assert list(read_records(path)) == [(f"{path}[item {item}]", record) for item, record in enumerate(RECORDS, 1)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_byte_order_mark_and_windows_line_ends(tmp_path: Path, name: str) -> None:
    text = b'{"a": 1}\r\n' if name == "a.jsonl" else b'[{"a": 1}]\r\n'
    assert [record for _, record in read_records(save(tmp_path / name, b"\xef\xbb\xbf" + text))] == [{"a": 1}]


def test_reading_streams(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", b'{"a": 1}\n' * 3 + b"broken")
    records = read_records(path)
    assert [next(records)[1] for _ in range(3)] == [{"a": 1}] * 3
    with pytest.raises(DataError, match=r"a.jsonl:4: not JSON"):
        next(records)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_split_lines_like_a_binary_file(size: int) -> None:
    for data in (b"", b"\n", b"a", b"a\nbc\n\n\rd\x0b\x0c\n", b"\n\nabc", LINES):
        chunks = [data[start : start + size] for start in range(0, len(data), size)]
        assert list(split_lines(chunks)) == [line.removesuffix(b"\n") for line in io.BytesIO(data)]


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (b'{"a": 1}\n{"a": 1\n{"a": 1}\n', [":2: not JSON", "column", "one complete JSON object per line"]),
        (b'{"a": 1}\n[1]\n', [":2: a JSON array, not an object"]),
        (b"null\n", [":1: a JSON null, not an object"]),
        (b"true\n", [":1: a JSON boolean"]),
        (b'"text"\n', [":1: a JSON string"]),
        (b'{"a": 1}\n{"a": "\xff"}\n', [":2: not UTF-8: byte 0xff at byte 8", "Save the file as UTF-8"]),
        (b'{"a": 1}\n\n \n{"a": 1}\n', [":2: a blank line", "remove the line"]),
        (b"", ["no records in the file"]),
        (b" \n\n", ["no records in the file"]),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n", [":1: "]),
        (b'{"a": ' + b"1" * 10_000 + b"}\n", [":1: JSON that cannot be read"]),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_bad_lines(tmp_path: Path, name: str, data: bytes, parts: list[str]) -> None:
    path = save(tmp_path / name, data)
    message = failure(path)
    assert message.startswith(str(path))
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (b'{"a": 1}', ["a JSON object, not an array", ".jsonl"]),
        (b'{"a": 1}\n{"a": 2}\n', ["one object per line: name the file .jsonl"]),
        (b'[{"a": 1},\n{"a": 2}\n', [":3: not JSON", "Close the array"]),
        (b"what", [":1: not JSON", "Write one array"]),
        (b'[{"a": 1}, 3]', ["[item 2]: a JSON number, not an object"]),
        (b"[]", ["no records in the file"]),
        (b"", ["no records in the file"]),
        (b'[{"a": "\xe9"}]', ["not UTF-8: byte 0xe9 at byte 9"]),
        (b"[" * 200_000, ["a.json"]),
    ],
)
def test_bad_arrays(tmp_path: Path, data: bytes, parts: list[str]) -> None:
    message = failure(save(tmp_path / "a.json", data))
    assert [part for part in parts if part not in message] == []


def many_lines() -> bytes:
    return b"".join(b'{"n": %d, "text": "%d"}\n' % (n, n * 2654435761 % 2**32) for n in range(3000))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_cut_off_compressed_file(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a.jsonl.{suffix}", many_lines())
    whole = path.read_bytes()
    assert len(list(read_records(path))) == 3000
    for keep in (5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        message = failure(path)
        assert "after line" in message
        assert f"broken {'zstd' if suffix == 'zst' else 'gzip'} data" in message
        assert "again" in message


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_not_compressed_or_damaged(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(LINES)
    assert "data after line 0" in failure(path)
    damaged = bytearray(save(path, many_lines()).read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(damaged)
    assert str(path) in failure(path)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_several_frames_in_one_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    frames = [save(path, LINES).read_bytes(), save(path, LINES).read_bytes()]
    path.write_bytes(b"".join(frames))
    assert [record for _, record in read_records(path)] == RECORDS * 2


def test_zstandard_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.jsonl.zst", LINES)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "pip install 'colm_ds[data]'" in failure(path)


def test_missing_file_names_similar_ones(tmp_path: Path) -> None:
    save(tmp_path / "train.jsonl.gz", LINES)
    assert "Did you mean train.jsonl.gz?" in failure(tmp_path / "train.jsonl")
    assert "The folder holds train.jsonl.gz" in failure(tmp_path / "something_else")
    assert f"The folder {tmp_path / 'nowhere'} does not exist" in failure(tmp_path / "nowhere" / "train.jsonl")
    (tmp_path / "empty").mkdir()
    assert "is empty" in failure(tmp_path / "empty" / "train.jsonl")


def test_unsupported_suffix_and_folder(tmp_path: Path) -> None:
    save(tmp_path / "a.txt", b"x")
    assert "unsupported kind of file" in failure(tmp_path / "a.txt")
    assert "a folder, not a file" in failure(tmp_path)


def test_find_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "c.jsonl.gz", ".hidden.jsonl", "notes.txt"):
        save(tmp_path / name, LINES)
    (tmp_path / "folder.jsonl").mkdir()
    save(tmp_path / "folder.jsonl" / "d.jsonl.zst", LINES)
    inner = tmp_path / "folder.jsonl"
    assert [file.name for file in find_files(tmp_path)] == ["a.json", "b.jsonl", "c.jsonl.gz"]
    assert find_files(str(tmp_path / "b.jsonl")) == [tmp_path / "b.jsonl"]
    assert [file.name for file in find_files([inner, tmp_path / "b.jsonl"])] == ["d.jsonl.zst", "b.jsonl"]


def test_find_files_errors(tmp_path: Path) -> None:
    save(tmp_path / "a.jsonl", LINES)
    (tmp_path / "empty").mkdir()
    for paths, message in (
        ([], "no data files given"),
        (tmp_path / "empty", "no data files in the folder"),
        ([tmp_path, tmp_path / "a.jsonl"], "listed twice"),
        (tmp_path / "a.jsonk", "Did you mean a.jsonl"),
    ):
        with pytest.raises(DataError, match=message):
            find_files(paths)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_line_without_end_is_refused_while_it_is_read(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 MiB of zeros, which are 40 KB or less when compressed; no more than the bound and a piece are ever held."""
    monkeypatch.setattr("colm_ds.data.jsonl.MAX_LINE_BYTES", 1 << 20)
    good = json.dumps({"a": "x" * 1000}).encode() + b"\n"
    path = save(tmp_path / f"zeros.jsonl{suffix}", good * 2000 + bytes(40 << 20) + b"\n" + good)
    tracemalloc.start()
    message = failure(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"{path}:2001: a line of more than 1 MiB. Write one record per line" in message
    assert peak < 36 << 20  # a piece of zstd may become 4 MiB, and is joined from smaller ones


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_line_of_one_and_a_half_gigabytes(tmp_path: Path, suffix: str) -> None:
    """As others may send it: refused with a process of under 300 MB, torch included."""
    path = tmp_path / f"zeros.jsonl{suffix}"
    if suffix == ".gz":
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(1500):
                file.write(bytes(1 << 20))
    else:
        zstandard = pytest.importorskip("zstandard")
        with path.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as file:
            for _ in range(1500):
                file.write(bytes(1 << 20))
    program = (
        "import sys\nfrom colm_ds.data import read_records\nfrom colm_ds.errors import DataError\n"
        "try: list(read_records(sys.argv[1]))\nexcept DataError as error: print(error)\n"
        "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    said, peak_kib = done.stdout.strip().splitlines()
    assert "a line of more than 64 MiB" in said
    assert int(peak_kib) < 300 * 1000


def test_a_deeply_nested_record(tmp_path: Path) -> None:
    for depth in (100, 950, 10_000):
        deep = b'{"a": ' + b"[" * depth + b"]" * depth + b"}\n"
        assert "nested more than 64 levels deep" in failure(save(tmp_path / "a.jsonl", deep))
        assert "nested more than 64 levels deep" in failure(save(tmp_path / "a.json", b"[" + deep + b"]"))


def test_a_key_that_a_record_has_twice(tmp_path: Path) -> None:
    """Named with its line or item; the records beside it are read."""
    twice = b'{"a": 1, "b": {"c": 1}, "a": 2}'
    lines = save(tmp_path / "x.jsonl", b'{"a": 1}\n' + twice + b'\n{"a": {"a": 3}}\n')
    (rows,) = [list(rows) for rows in read_rows(lines)]
    assert [row for _, row in rows[::2]] == [{"a": 1}, {"a": {"a": 3}}]
    assert str(rows[1][1]) == f"{lines}:2: the key 'a' is there twice. Keep one of them."
    items = save(tmp_path / "x.json", b'[{"a": 1},\n' + twice + b', {"a": {"a": 3}}]')
    (rows,) = [list(rows) for rows in read_rows(items)]
    assert [row for _, row in rows[::2]] == [{"a": 1}, {"a": {"a": 3}}]
    assert str(rows[1][1]) == f"{items}[item 2]: the key 'a' is there twice. Keep one of them."
