"""Time and memory of what is checked of a Hugging Face dataset's rows before training, by every way that takes one.

    python benchmarks/row_check.py                  # a million rows of 100 tokens: about a minute
    python benchmarks/row_check.py --rows 100000

The rows lie in an Arrow file. Each way runs in a process of its own, which has imported everything before it is timed:
`colm_ds.initialize`'s dataset, `CoLMTrainer` with labels in a column, with a collator that makes them, with a dataset
that was shuffled, and with a tenth of the rows as evaluation data.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("initialize", "trainer", "collator", "shuffled", "evaluation")
TOKENS, IDS, SOURCES = 100, 97, 7
_AT_ONCE = 10_000


def write_rows(path: Path, num_rows: int) -> None:
    """Write rows of 10 to 190 tokens; one in a thousand has no label."""
    import pyarrow as pa

    draw = np.random.default_rng(0)
    lists = pa.list_(pa.int64())
    schema = pa.schema({"input_ids": lists, "labels": lists, "source": pa.string()})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for first in range(0, num_rows, _AT_ONCE):
            rows = range(first, min(first + _AT_ONCE, num_rows))
            sizes = draw.integers(10, 2 * TOKENS - 9, len(rows))
            starts = np.concatenate([[0], np.cumsum(sizes)])
            ids = draw.integers(3, IDS, starts[-1])
            labels = ids.copy()
            for place, row in enumerate(rows):
                asked = starts[place] + (sizes[place] if row % 1000 == 999 else sizes[place] // 3)
                labels[starts[place] : asked] = -100
            columns = [pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(each)) for each in (ids, labels)]
            names = pa.array([f"source {row % SOURCES}" for row in rows])
            writer.write_batch(pa.record_batch([*columns, names], schema=schema))


def time_way(way: str, path: Path) -> dict[str, Any]:
    """Return seconds and memory of one way, in this process."""
    sys.path.insert(0, str(ROOT))
    import datasets
    import torch
    from transformers import TrainingArguments

    from colm_ds.batching.loader import RecordDataset
    from colm_ds.integrations.transformers import CoLMTrainer
    from tests.integrations.runs import pad
    from tests.tiny_models import tiny_model

    data: Any = datasets.Dataset.from_file(str(path))
    if way == "shuffled":
        data = data.shuffle(seed=0)
    if way == "collator":
        data = data.remove_columns("labels")
    model = tiny_model("llama")
    args = TrainingArguments(
        str(path.parent / "out"), per_device_train_batch_size=8, use_cpu=True, report_to=[], remove_unused_columns=False
    )
    held = data.select(range(0, len(data), 10)) if way == "evaluation" else None

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        return pad([{**row, "labels": row["input_ids"]} for row in rows])

    collator = collate if way == "collator" else pad
    peak, before, is_done = own_mib(), own_mib(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_done.wait(0.01):
            peak = max(peak, own_mib())

    watching = threading.Thread(target=watch)
    watching.start()
    started, cpu_started = time.perf_counter(), time.thread_time()
    if way == "initialize":
        left = len(RecordDataset(data))
    else:
        trainer = CoLMTrainer(model, args, collator, data, held, colm={"large_batch_size": 16})
        left = len(trainer._rows)
    seconds, cpu_s = time.perf_counter() - started, time.thread_time() - cpu_started
    is_done.set()
    watching.join()
    result = {"rows": len(data), "rows_with_labels": left, "seconds": round(seconds, 2), "cpu_seconds": round(cpu_s, 2)}
    return {**result, "grown_mib": round(peak - before)}


def own_mib() -> float:
    """Return this process's memory without the pages of the file, which the kernel takes back when it likes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the dataset (1,000,000)")
    parser.add_argument("--out", type=Path, help="result file (benchmarks/results/row_check.json)")
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(time_way(options.way[0], Path(options.way[1]))))
        return 0
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    sys.path.insert(0, str(ROOT))
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.arrow"
        write_rows(path, options.rows)
        result["file_mib"] = round(path.stat().st_size / 2**20)
        for way in WAYS:
            done = subprocess.run(
                [sys.executable, __file__, "--way", way, str(path)], check=True, stdout=subprocess.PIPE, text=True
            )
            result[way] = json.loads(done.stdout.splitlines()[-1])
            print(way, result[way], flush=True)
    from benchmarks.result_file import write_result

    out = options.out or ROOT / "benchmarks" / "results" / "row_check.json"
    write_result(out, "row_check", settings={"rows": options.rows}, **result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
