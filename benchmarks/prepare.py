# python benchmarks/prepare.py
"""Throughput of `pretrain/prepare.py` and its peak memory as the input grows: generated text, one and more processes.

Every measurement prepares a new store in a fresh process, with a tokenizer trained before, so that the timed part grows
with the input: the scan (sources, digests, bad lines, held-out part) and the tokenising. MB are 10^6 bytes of text.
Throughput is given per process in wall-clock seconds and per second of CPU time, which is more reliable if others use
the cores. Peak memory is that of all processes together (proportional set size, sampled every 50 ms), and what of it an
idle process does not have after its imports. Generated text repeats its sentences, which a tokenizer's cache likes:
`--data` measures files of your own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shlex
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from colm_ds.data.formats import find_files  # noqa: E402
from colm_ds.data.generated.text import write_text  # noqa: E402
from colm_ds.data.pretraining.store_preparation import Preparation, prepare  # noqa: E402
from colm_ds.data.pretraining.token_store import TokenStore  # noqa: E402

MIB, MB = 1 << 20, 1e6
HOLDOUT = 0.02
SPAWN = multiprocessing.get_context("spawn")


def quiet(message: str) -> None:
    """Ignore progress."""


def prepare_once(files: list[str], store: str, tokenizer: str, num_processes: int, said: Any) -> None:
    """Prepare a store, in its own process, when the parent says so; send its seconds and CPU seconds."""
    import transformers  # noqa: F401  imported before memory is measured

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars
    said.send("ready")
    said.recv()
    start, used = time.perf_counter(), cpu_seconds()
    prepare(Preparation(files, Path(store), tokenizer=tokenizer, holdout=HOLDOUT), num_processes, say=quiet)
    wall_s = time.perf_counter() - start
    said.send((wall_s, cpu_seconds() - used))


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its finished children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def memory_of(process: psutil.Process) -> tuple[int, int]:
    """Return the bytes of a process with its children, shared pages counted once; and of the process alone."""
    total = own = 0
    with suppress(psutil.Error):
        own = process.memory_full_info().pss
        for child in process.children(recursive=True):
            with suppress(psutil.Error):
                total += child.memory_full_info().pss
    return own + total, own


def measure(files: list[str], tokenizer: str, num_processes: int, folder: Path) -> dict[str, Any]:
    """Measure one preparation."""
    store = folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=prepare_once, args=(files, str(store), tokenizer, num_processes, theirs))
    load = os.getloadavg()[0]
    process.start()
    ours.recv()
    watched = psutil.Process(process.pid)
    idle = memory_of(watched)[0]
    ours.send("go")
    peak = peak_of_main = 0
    while not ours.poll(0.05):
        total, own = memory_of(watched)
        peak, peak_of_main = max(peak, total), max(peak_of_main, own)
        if not process.is_alive() and not ours.poll():
            raise SystemExit(f"preparation of {files[0]} ended with exit code {process.exitcode}")
    wall_s, cpu_s = ours.recv()
    process.join()
    facts = TokenStore(store).manifest["sources"]
    text_mb = sum(split["text_bytes"] for source in facts.values() for split in source.values()) / MB
    tokens = sum(split["tokens"] for source in facts.values() for split in source.values())
    begun, scanned, done = ((store / name).stat().st_mtime for name in ("settings.json", "scan.json", "manifest.json"))
    return {
        "text_mb": text_mb,
        "file_mb": sum(Path(file).stat().st_size for file in files) / MB,
        "tokens": tokens,
        "store_mb": sum(path.stat().st_size for path in store.rglob("*") if path.is_file()) / MB,
        "processes": num_processes,
        "wall_s": wall_s,
        "scan_s": scanned - begun,
        "tokenise_s": done - scanned,
        "cpu_s": cpu_s,
        "mb_per_s_and_process": text_mb / wall_s / num_processes,
        "mb_per_cpu_s": text_mb / cpu_s,
        "idle_mib": idle / MIB,
        "peak_mib": peak / MIB,
        "peak_of_main_mib": peak_of_main / MIB,
        "load_1min_before": load,
    }


def make_tokenizer(files: list[str], vocabulary: int, sample_mb: float, folder: Path) -> str:
    """Train a tokenizer on a sample of some files; return its folder."""
    wanted = Preparation(files, folder, vocabulary_size=vocabulary, sample_mb=sample_mb, holdout=HOLDOUT)
    prepare(wanted, 1, say=quiet)
    return str(folder / "tokenizer")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the measurements as lines of text."""
    heads = ["text MB", "processes", "s", "scan s", "tokenise s", "MB/s per process", "MB per CPU s"]
    heads += ["peak MiB", "beyond idle", "store MB", "tokens per KB"]
    lines = ["".join(f"{head:>18}" for head in heads)]
    for row in rows:
        cells = [row["text_mb"], row["processes"], row["wall_s"], row["scan_s"], row["tokenise_s"]]
        cells += [row["mb_per_s_and_process"], row["mb_per_cpu_s"], row["peak_mib"], row["peak_mib"] - row["idle_mib"]]
        cells += [row["store_mb"], row["tokens"] / row["text_mb"] / 1000]
        lines.append("".join(f"{cell:>18,.2f}" if isinstance(cell, float) else f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--megabytes", type=float, nargs="+", default=[10, 100], help="sizes of the generated text (10 100)")
    add("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes (1 2)")
    add("--data", nargs="+", metavar="PLACE", help="instead: files and folders in the Pile's format")
    add("--label", default="given files", help="what they are called in the result")
    add("--vocabulary", type=int, default=2048, help="of the tokenizer, which is not timed (2048)")
    add("--sample-mb", type=float, default=4.0, help="megabytes that it is trained on (4)")
    add("--keep", action="store_true", help="keep the result file's rows of other inputs")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "prepare.json", help="result file")
    options = parser.parse_args(arguments)
    from colm_ds.run_folder.environment import describe_environment

    if options.keep and options.out.exists():
        rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
    else:
        rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = folder / "text"
        if not options.data:
            write_text(folder / "sample", 2 * options.sample_mb)
        sample = find_files([Path(place) for place in options.data or [folder / "sample"]])
        tokenizer = make_tokenizer(list(map(str, sample)), options.vocabulary, options.sample_mb, folder / "first")
        for megabytes in [None] if options.data else options.megabytes:
            if megabytes is not None:
                write_text(text, megabytes)
            files = [str(file) for file in (sample if megabytes is None else find_files([text]))]
            what = f"{megabytes:g} MB generated" if megabytes is not None else options.label
            for num_processes in options.processes:
                measured = measure(files, tokenizer, num_processes, folder)
                row = {"input": what, "vocabulary": options.vocabulary, **measured}
                same = [(each["input"], each["processes"]) == (what, num_processes) for each in rows]
                rows = [each for each, is_same in zip(rows, same, strict=True) if not is_same] + [row]
                print(f"{what}, processes: {num_processes}\n{table([row])}", flush=True)
    environment = describe_environment()
    record = {
        "benchmark": "prepare",
        **environment,
        "command": shlex.join(["python", "benchmarks/prepare.py", *arguments]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {**environment["versions"], "python": platform.python_version()},
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
