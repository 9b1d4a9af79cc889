"""Write a benchmark's result file."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def write_result(path: Path, benchmark: str, **facts: Any) -> None:
    """Write facts and rows as JSON, with the machine, the versions and the date.

    Args:
        path: the file; its folder is made.
        benchmark: name of the benchmark.
        facts: further keys; those of the environment give way to them.
    """
    from colm_ds.run_folder.environment import describe_environment

    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record = {"benchmark": benchmark, **describe_environment(), "date": date, **facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
