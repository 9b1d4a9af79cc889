"""A folder is cleared of a run's own files, and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from colm_ds.run_folder.contents import remove_own

REPORT = ("report.html", "report.md", "report.json")


@pytest.mark.parametrize(
    ("numbers", "goes"),
    [({"title": "", "arms": [], "tables": {}}, True), ({"title": "mine"}, False), ([1], False), (None, False)],
)
def test_a_report_goes_with_the_run_and_a_file_of_its_name_stays(tmp_path: Path, numbers: object, goes: bool) -> None:
    for name in ("config.json", "notes.md", *REPORT[:2]):
        (tmp_path / name).write_text("{}")
    if numbers is not None:
        (tmp_path / REPORT[2]).write_text(json.dumps(numbers))
    remove_own(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == ({"notes.md"} if goes else {"notes.md", *REPORT[: 3 if numbers is not None else 2]})
