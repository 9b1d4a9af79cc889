"""Write one JSON line for every answered question at once, so that a killed evaluation can be resumed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from colm_ds.errors import ConfigError, DataError
from colm_ds.evaluation.task import Row
from colm_ds.run_folder.files import replacing, write_whole
from colm_ds.untrusted.json_text import parse_json, read_json
from colm_ds.untrusted.lines import bounded_lines
from colm_ds.untrusted.printable import escaped

_NAME = re.compile(r"\w[\w.-]*")
"""Names of sets, which files are named by."""


class EvaluationFolder:
    """The files of an evaluation: `settings.json`, `NAME.jsonl` of each set, `results.json` and `results.md`.

    While a set is asked, every rank appends to its own part, `NAME.part-RANK.jsonl`; rank 0 merges the parts at the
    end, or when the evaluation is resumed. All ranks must see the folder.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def start(self, model: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]], *, overwrite: bool) -> None:
        """Create the folder, or check that its answers are to the same questions by the same model; rank 0 only.

        Args:
            model: facts that identify the model and how it computes.
            tasks: facts that identify the questions and answers of each set to ask.
            overwrite: discard existing answers.

        Raises:
            ConfigError: listing the differences, or if the folder cannot be written.
        """
        try:
            if overwrite:
                self._remove()
            self.path.mkdir(parents=True, exist_ok=True)
            settings = self._read_json("settings.json")
            earlier = settings.get("tasks", {})
            if not all(isinstance(each, dict) for each in (settings.get("model", {}), earlier, *_values(earlier))):
                raise ConfigError(
                    f"{self.path / 'settings.json'}: is not an evaluation's. Remove the file or the folder."
                )
            answered = {name: values for name, values in earlier.items() if self._has_answers(name)}
            differences = compare(settings.get("model", model), model, "model") if answered else []
            for name, values in tasks.items():
                differences += compare(answered.get(name, values), values, name)
            if differences:
                raise ConfigError(
                    "\n  ".join([f"{self.path}: holds answers of another evaluation:", *differences])
                    + "\nGive another folder with --out, or --overwrite to remove what is there."
                )
            self.write_json("settings.json", {"model": model, "tasks": {**earlier, **tasks}})
        except OSError as error:
            raise ConfigError(f"--out {self.path}: cannot be written: {error.strerror}.") from None

    def _has_answers(self, name: str) -> bool:
        """Return whether a set has a row: a call that was refused before its first one leaves none."""
        if not _NAME.fullmatch(name):  # of a file that others wrote
            return False
        files = [self.path / f"{name}.jsonl", *self.path.glob(f"{name}.part-*.jsonl")]
        return any(file.is_file() and file.stat().st_size for file in files)

    def collect(self, name: str) -> dict[int, Row]:
        """Merge a set's parts into one file in the order of its questions, and return its rows; rank 0 only.

        A line truncated by a kill is left out.
        """
        whole = self.path / f"{name}.jsonl"
        parts = sorted(self.path.glob(f"{name}.part-*.jsonl"))
        rows: dict[int, Row] = {}
        for file in [whole, *parts]:
            rows.update((row["index"], row) for row in read_rows(file))
        if parts:
            with replacing(whole) as lines:
                lines.writelines(_line(rows[index]) for index in sorted(rows))
            for part in parts:
                part.unlink()
        return rows

    def open_part(self, name: str, rank: int) -> TextIO:
        """Open a rank's part of a set, to append to with `append`."""
        return (self.path / f"{name}.part-{rank}.jsonl").open("a", encoding="utf-8")

    def results(self) -> dict[str, Any]:
        """Read `results.json`; empty if there is none."""
        return self._read_json("results.json")

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file atomically."""
        self.write_text(name, escaped(json.dumps(content, indent=2, ensure_ascii=False)) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file in one go."""
        write_whole(self.path / name, text)

    def _remove(self) -> None:
        """Remove the files of an evaluation, and nothing else in the folder."""
        tasks = self._read_json("settings.json").get("tasks")
        # A file that others wrote names no path: `../notes` is none of ours.
        names = [name for name in tasks if _NAME.fullmatch(name)] if isinstance(tasks, dict) else []
        files = [self.path / f"{name}.jsonl" for name in names]
        files += [part for name in names for part in self.path.glob(f"{name}.part-*.jsonl")]
        for file in [*files, *(self.path / name for name in ("results.json", "results.md", "settings.json"))]:
            file.unlink(missing_ok=True)

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            values = read_json(self.path / name)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path / name}: cannot be read: {error}. Remove the file or the folder.") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{self.path / name}: is not a JSON object. Remove the file or the folder.")
        return values


def append(part: TextIO, rows: Iterable[Row]) -> None:
    """Append rows to a part; they are in the file when the call returns.

    Args:
        part: from `EvaluationFolder.open_part`.
        rows: rows with `index`.

    Raises:
        DataError: if the disk is full or broken.
    """
    try:
        part.writelines(map(_line, rows))
        part.flush()
    except OSError as error:
        raise DataError(f"{part.name}: cannot be written: {error.strerror}. Make it writable and run again.") from None


def read_rows(file: Path) -> list[Row]:
    """Read the whole rows of a file; none if it is missing."""
    rows: list[Row] = []
    if file.exists():
        with file.open("rb") as lines:
            for line in bounded_lines(lines):
                try:
                    row = parse_json((line or b"").decode("utf-8", errors="replace"))
                except ValueError:
                    continue
                if isinstance(row, dict) and isinstance(row.get("index"), int):
                    rows.append(row)
    return rows


def compare(earlier: Mapping[str, Any], now: Mapping[str, Any], where: str) -> list[str]:
    """Return one line for each value that differs."""
    earlier, now = json.loads(json.dumps(earlier)), json.loads(json.dumps(now))
    return [
        f"{where}.{key}: {earlier.get(key)!r} there, {now.get(key)!r} here"
        for key in sorted({*earlier, *now})
        if earlier.get(key) != now.get(key)
    ]


def _values(mapping: Any) -> list[Any]:
    return list(mapping.values()) if isinstance(mapping, dict) else []


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=True) + "\n"  # half surrogates, which models can write, survive as escapes
