"""The same rows from every format, streamed; and every damaged file named with what to do."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colm_ds.data import formats
from colm_ds.data.formats import describe_places, find_files, find_places, read_place, read_records
from colm_ds.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"source": "a", "instruction": 'say "hi",\nplease', "output": "hi é 你"},
    *({"source": "b", "instruction": f"add {n}", "output": str(n)} for n in range(40)),
]


def write_rows(rows: list[dict[str, Any]], path: Path) -> Path:
    """Write rows in the format that the name says; lists become JSON in a CSV file."""
    import datasets

    name = path.name
    if name.endswith(".json"):
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif ".jsonl" in name:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    elif name.endswith(".csv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    elif name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


FORMATS = ["rows.json", "rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.parquet", "rows"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [512, 7])
def test_rows_are_the_same(tmp_path: Path, name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CHUNK_ROWS", size)
    path = write_rows(ROWS, tmp_path / name)
    read = list(read_place(path))
    assert [row for _, row in read] == ROWS
    named = {"jsonl": f"{path}:41", "csv": f"{path}:43", "json": f"{path}[item 41]"}  # a line more for a line end, one
    assert read[40][0] == named.get(name.split(".")[1] if "." in name else "", f"{path}[row 41]")  # more for the header
    assert max(map(len, formats.read_rows(path))) <= size


def test_a_folder_of_files_and_a_saved_one(tmp_path: Path) -> None:
    for name in FORMATS[:-1]:
        write_rows(ROWS[:1], tmp_path / name)
    write_rows(ROWS[:2], tmp_path / "rows")
    assert len(list(read_place(tmp_path))) == 5
    assert find_places([tmp_path / "rows"]) == [tmp_path / "rows"]


def test_splits_of_a_saved_data_set(tmp_path: Path) -> None:
    import datasets

    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:3])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert len(list(read_records(tmp_path / "both", "train"))) == 41
    assert len(list(read_records(tmp_path / "both", "test"))) == 3
    with pytest.raises(DataError, match=r"both: no split 'dev'. It has 'train', 'test': name one, as in \{path: "):
        list(read_records(tmp_path / "both", "dev"))
    whole = [describe_places([tmp_path / "both"], split) for split in ("train", "test")]
    assert whole[0] != whole[1]


def test_a_shuffled_saved_data_set(tmp_path: Path) -> None:
    """Its rows are looked up by an index that lies beside them."""
    import datasets

    shuffled = datasets.Dataset.from_list(ROWS).shuffle(seed=1)
    shuffled.save_to_disk(tmp_path / "shuffled")
    assert [row for _, row in read_place(tmp_path / "shuffled")] == list(shuffled)
    assert list(shuffled) != ROWS


def test_hub_names_that_are_folders(tmp_path: Path) -> None:
    """The library itself loads them, offline."""
    write_rows(ROWS, tmp_path / "train.jsonl")
    read = list(read_records(f"hub:{tmp_path}", "train"))
    assert [row for _, row in read] == ROWS
    assert read[2][0] == f"hub:{tmp_path}[item 3]"
    with pytest.raises(DataError, match=r"cannot be loaded: .*hub:NAME:CONFIG:SPLIT.*without a connection"):
        list(read_records(f"hub:{tmp_path}::nowhere"))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def without_data(path: Path) -> None:
    for file in path.glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])


def text(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


@pytest.mark.parametrize(
    ("name", "damage", "parts"),
    [
        ("rows.parquet", cut_off, ["not a whole Parquet file", "Copy or write the file again."]),
        ("rows.parquet", text(b"PAR1"), ["not a whole Parquet file"]),
        ("rows", without_data, ["not a whole data set", "Copy or save it again."]),
        ("rows.json", cut_off, ["not JSON", "Close the array."]),
        ("rows.jsonl.gz", cut_off, ["broken gzip data"]),
        ("rows.csv", text(b""), ["no records"]),
        ("rows.csv", text(b"a,b\n"), ["no records"]),
        ("rows.csv", text(b"a,b\n1,2\n1,2,3\n"), [":3: 3 values, but the header names 2 columns. Quote"]),
        ("rows.csv", text(b"a,b\n1\n"), [":2: 1 values"]),
        ("rows.csv", text(b'a,b\n"1,2\n'), [":2: not CSV", "Close every quotation mark"]),
        ("rows.csv", text(b"a,a\n1,2\n"), [":1: the header has 'a' as names of columns"]),
        ("rows.csv", text(b"a,\n1,2\n"), [":1: the header has ''"]),
        ("rows.csv", text(b"a,b\n1,2\n1,\xff\n"), [":3: not UTF-8: byte 0xff at byte 3. Save the file as UTF-8."]),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, damage: Callable[[Path], None], parts: list[str]) -> None:
    path = write_rows(ROWS, tmp_path / name)
    damage(path)
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(str(path))
    assert [part for part in parts if part not in str(caught.value)] == []


def test_files_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith("x.parquet"))
    with pytest.raises(DataError, match=r"x\.parquet: permission denied\. Let this user read it"):
        find_files(tmp_path)


def test_csv_that_begins_with_a_mark_and_has_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext\r\n" + b"x" * 200_000 + b"\r\n\r\nlast\r\n")
    assert [(where, len(row["text"])) for where, row in read_records(path)] == [
        (f"{path}:2", 200_000),
        (f"{path}:4", 4),
    ]


def test_a_long_array_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items across the ends of pieces, numbers at the end of one, and blanks everywhere."""
    from colm_ds.data import jsonl

    items = [{"n": n, "é": "[{,]}\"'" * (n % 9)} for n in range(50)]
    path = tmp_path / "a.json"
    for indent in (None, 1):
        path.write_text(json.dumps(items, indent=indent), encoding="utf-8")
        for size in (1, 2, 3, 10, 64, 1 << 20):
            monkeypatch.setattr(jsonl, "_CHUNK_BYTES", size)
            assert [row for _, row in read_records(path)] == items
    path.write_text(" [ 12 , 345 ] ")
    for size in (1, 2, 5):
        monkeypatch.setattr(jsonl, "_CHUNK_BYTES", size)
        assert list(jsonl._stream_items(path)) == [12, 345]


@pytest.mark.parametrize("broken", ["[", "[{}", "[{},", "[{},]", "[{} {}]", "[{}]]", "[{}] 1", "{}", "1", "[nul]"])
def test_broken_arrays_as_a_whole_parser_sees_them(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(broken)
    with pytest.raises(DataError):
        list(read_records(path))
    for good in ("[]", " [ ] ", "", " \n"):
        path.write_text(good)
        with pytest.raises(DataError, match="no records"):
            list(read_records(path))
