# python benchmarks/data_memory.py --gigabytes 0.05 0.5
"""Memory and seconds of a training run's data as its files grow: conversations in JSON lines, Parquet or a JSON array.

Every measurement is `colm-ds train` with a tiny model and two steps, from a file of `messages` rows to a checkpoint:
rows are read, checked and tokenised, examples are held out, and the data's digest is taken. Memory is that of all
processes of the run together, shared pages counted once, sampled every 0.1 s: what they allocated, and with it the
pages of files that they had mapped. The same run on a file of 1 MB is subtracted, so that model, torch and the
libraries are not counted. Seconds are compared with those of pure tokenisation: a loop of `json.loads` and
`tokenizer.apply_chat_template` over rows of the same file.

Rows are those of `--rows`, a file of instructions, repeated with other numbers in them until the file is full; without
it those of the generated mixture; `--join` makes long rows of several. `--tokenizer` is a folder, or package:NAME with
`--gguf-file`, or `digits`, for which a digit is a token and all that lies between two is another: it is quick, so that
what is measured is all the rest, on files that take other tokenizers hours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.result_file import write_result  # noqa: E402
from colm_ds.data.formats import read_records  # noqa: E402
from colm_ds.data.generated.mixture import write_mixture  # noqa: E402

MIB, GB = 1 << 20, 1e9
BASELINE_GB = 0.001
SAMPLED_S = 0.1
MAX_LENGTH = 256
DIGITS = "digits"
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FORMATS = {"jsonl": ".jsonl", "json": ".json", "parquet": ".parquet"}


def rows_with_variation(path: Path, join: int) -> Iterator[dict[str, Any]]:
    """Yield conversations without end: every repetition of the instructions has other digits and its number.

    Args:
        path: file of the instructions.
        join: rows of it that make one question and one answer.
    """
    number = 0
    while True:
        digits = str.maketrans("0123456789", "".join(str((digit + number) % 10) for digit in range(10)))
        some: list[dict[str, Any]] = []
        for _, row in read_records(path):
            some.append(row)
            if len(some) < join:
                continue
            question = "\n".join(each["instruction"] for each in some).translate(digits)
            answer = "\n".join(each["output"] for each in some).translate(digits)
            turns = [
                {"role": "user", "content": f"{question} (variant {number})"},
                {"role": "assistant", "content": answer},
            ]
            yield {"source": row["source"], "messages": turns}
            some = []
        number += 1


def write_rows(rows: Path, gigabytes: float, target: Path, join: int) -> int:
    """Write conversations until the file, as JSON lines, would have the given size; return their number.

    A Parquet file has the row groups that pyarrow makes by default, of a million rows.
    """
    count, num_bytes, pending = 0, 0, []
    writer: Any = None
    with target.open("wb") as file:
        for row in rows_with_variation(rows, join):
            line = json.dumps(row, ensure_ascii=False).encode()
            if target.suffix == ".parquet":
                pending.append(row)
                if len(pending) == 1 << 20:
                    writer, pending = write_group(pending, writer, file), []
            elif target.suffix == ".json":
                file.write((b",\n" if count else b"[") + line)
            else:
                file.write(line + b"\n")
            count, num_bytes = count + 1, num_bytes + len(line) + 1
            if num_bytes >= gigabytes * GB:
                break
        if target.suffix == ".json":
            file.write(b"]\n")
        if pending:
            writer = write_group(pending, writer, file)
        if writer is not None:
            writer.close()
    return count


def write_group(rows: list[dict[str, Any]], writer: Any, file: Any) -> Any:
    """Write a row group; return the writer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows)
    writer = writer or pq.ParquetWriter(file, table.schema)
    writer.write_table(table)
    return writer


def save_tokenizer(place: str, gguf_file: str | None, folder: Path) -> int:
    """Save a tokenizer in a folder, with a plain chat template if it has none; return the size of its vocabulary."""
    from colm_ds.recipes.model import load_tokenizer
    from colm_ds.recipes.packages import package_folder
    from colm_ds.recipes.sections import ModelConfig

    if place == DIGITS:
        return save_digit_tokenizer(folder)
    path = package_folder(place) or place
    tokenizer = load_tokenizer(ModelConfig.model_validate({"name_or_path": path, "gguf_file": gguf_file}))
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_digit_tokenizer(folder: Path) -> int:
    """Save a tokenizer to which all texts without digits are one token; return the size of its vocabulary."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    digits = {str(digit): 2 + digit for digit in range(10)}
    backend = Tokenizer(models.WordLevel({"text": 0, "<eos>": 1, **digits}, unk_token="text"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[0-9]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="text")
    tokenizer.chat_template = PLAIN_TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def recipe_of(data: Path, vocabulary: int, processes: int, folder: Path) -> dict[str, Any]:
    """Return a recipe whose model is tiny."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "name": "data memory",
        "output_dir": str(folder / "run"),
        "steps": 2,
        "save_every": 2,
        "micro_batch_size": 4,
        "model": {"config": {"model_type": "llama", "vocab_size": vocabulary, **shape}},
        "tokenizer": str(folder / "tokenizer"),
        "data": {
            "train": str(data),
            "max_length": MAX_LENGTH,
            "holdout_per_source": 8,
            "cache_dir": str(folder / "cache"),
            "num_processes": processes,
        },
        "colm": {"preset": "paper", "large_batch_size": 8, "coreset_size": 4, "mask": {"size": 8}},
        "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        "evaluation": {"max_tokens": 512},  # few logits at once: they are the model's share
    }


class Watched:
    """Hold memory and CPU time of all processes of a run together, as sampled.

    Attributes:
        allocated: peak of the bytes that they allocated, shared pages counted once.
        mapped: peak of these and of the pages of files that they had mapped.
    """

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._cpu_s: dict[int, float] = {}  # by process, also of those that have ended
        self.allocated = self.mapped = 0

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU time of all of them."""
        return sum(self._cpu_s.values())

    def sample(self) -> None:
        """Look at them now."""
        allocated = mapped = 0
        with suppress(psutil.Error):
            for each in [self._process, *self._process.children(recursive=True)]:
                with suppress(OSError, psutil.Error):
                    times = each.cpu_times()
                    self._cpu_s[each.pid] = times.user + times.system
                    text = Path(f"/proc/{each.pid}/smaps_rollup").read_text(encoding="ascii")
                    sizes = {key: int(size) << 10 for key, size in re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE)}
                    allocated += sizes.get("Pss_Anon", 0) + sizes.get("Pss_Shmem", 0)
                    mapped += sizes.get("Pss", 0)
        self.allocated, self.mapped = max(self.allocated, allocated), max(self.mapped, mapped)


def train(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train as a recipe says in a process of its own, with nothing cached, and measure it."""
    for leftover in ("run", "cache"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "colm_ds.cli", "train", str(path)]
    log = folder / "log.txt"
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
        watched = Watched(process.pid)
        while process.poll() is None:
            watched.sample()
            time.sleep(SAMPLED_S)
    if process.returncode:
        said = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"the run ended with exit code {process.returncode}:\n{said}")
    cache = sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file())
    return {
        "wall_s": time.perf_counter() - start,
        "cpu_s": watched.cpu_s,
        "allocated_mib": watched.allocated / MIB,
        "mapped_mib": watched.mapped / MIB,
        "cache_mib": cache / MIB,
    }


TOKENISE = """
import json, sys, time
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
wall, used, num_bytes, rows = time.perf_counter(), time.process_time(), 0, 0
with open(sys.argv[2], "rb") as file:
    for line in file:
        tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=True)
        num_bytes, rows = num_bytes + len(line), rows + 1
print(json.dumps({"bytes": num_bytes, "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - used}))
"""


def tokenise(rows: Path, megabytes: float, tokenizer: Path, folder: Path, join: int) -> dict[str, Any]:
    """Tokenise rows as JSON lines and nothing else, in a process of its own."""
    write_rows(rows, megabytes / 1000, folder / "pure.jsonl", join)
    command = [sys.executable, "-c", TOKENISE, str(tokenizer), str(folder / "pure.jsonl")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def table(result: dict[str, Any]) -> str:
    """Return the measurements as lines of text."""
    heads = ["format", "GB", "rows", "processes", "s", "CPU s", "to tokenising"]
    heads += ["allocated MiB", "mapped MiB", "cache MiB"]
    lines = ["".join(f"{head:>15}" for head in heads)]
    for row in result["rows"]:
        cells = [row["format"], row["gb"], row["num_rows"], row["processes"], row["wall_s"], row["cpu_s"]]
        cells += [row["to_tokenising"], row["allocated_mib"], row["mapped_mib"], row["cache_mib"]]
        lines.append("".join(f"{cell:>15,.2f}" if isinstance(cell, float) else f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--gigabytes", type=float, nargs="+", default=[0.01, 0.05], help="sizes of the files (0.01 0.05)")
    add("--formats", nargs="+", choices=FORMATS, default=["jsonl"], help="of the files (jsonl)")
    add("--processes", type=int, nargs="+", default=[1], help="processes that tokenise (1)")
    add("--rows", type=Path, help="file of rows with source, instruction and output")
    add("--join", type=int, default=1, help="rows that make one conversation (1)")
    add("--tokenizer", help="folder, package:NAME, or digits (default: the generated mixture's)")
    add("--gguf-file", help="GGUF file in the tokenizer's folder")
    add("--pure-mb", type=float, default=20, help="megabytes of rows for pure tokenisation (20)")
    add("--scratch", type=Path, help="folder for the files, which are removed at the end")
    add("--keep", action="store_true", help="keep the result file's other rows")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "data_memory.json", help="result file")
    options = parser.parse_args(arguments)
    from colm_ds.run_folder.environment import describe_environment

    measured: list[dict[str, Any]] = []
    if options.keep and options.out.exists():
        measured = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
    versions = {**describe_environment()["versions"], "python": platform.python_version()}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        write_mixture(folder / "mixture", seed=0)
        rows = options.rows or folder / "mixture" / "train.jsonl"
        tokenizer = options.tokenizer or str(folder / "mixture" / "tokenizer")
        vocabulary = save_tokenizer(tokenizer, options.gguf_file, folder / "tokenizer")
        pure = tokenise(rows, options.pure_mb, folder / "tokenizer", folder, options.join)
        for kind in options.formats:
            for processes in options.processes:
                nothing: dict[str, Any] | None = None
                for gigabytes in [BASELINE_GB, *options.gigabytes]:
                    data = folder / f"chats{FORMATS[kind]}"
                    num_rows = write_rows(rows, gigabytes, data, options.join)
                    load = os.getloadavg()[0]
                    now = train(recipe_of(data, vocabulary, processes, folder), folder)
                    if nothing is None:
                        nothing = now
                        continue
                    own = {name: now[name] - nothing[name] for name in now}
                    row = {
                        "format": kind,
                        "gb": gigabytes,
                        "num_rows": num_rows,
                        "processes": processes,
                        "join": options.join,
                        "tokenizer": Path(tokenizer).name,
                        **own,
                        "to_tokenising": own["cpu_s"] / (pure["cpu_s"] * gigabytes * GB / pure["bytes"]),
                        "whole_run": now,
                        "same_run_on_1_mb": nothing,
                        "pure": pure,
                        "load_1min_before": load,
                    }
                    key = ("format", "gb", "processes", "tokenizer", "join")
                    measured = [each for each in measured if any(each[name] != row[name] for name in key)] + [row]
                    command = shlex.join(
                        ["python", "benchmarks/data_memory.py", *(Path(word).name for word in arguments)]
                    )
                    write_result(options.out, "data_memory", command=command, versions=versions, rows=measured)
                    print(table({"rows": [row]}), flush=True)
    print(table({"rows": measured}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
