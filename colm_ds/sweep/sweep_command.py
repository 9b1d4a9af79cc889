"""`colm-ds sweep`: run a grid from the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from colm_ds.process.exit_codes import ExitCode
from colm_ds.sweep import check_arms, is_done, jobs_of, load_grid, prepare, run_sweep
from colm_ds.untrusted.printable import visible


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add grid, changes and seeds."""
    parser.add_argument("grid", help="YAML file, for example finetune/grids/table1_cpu.yaml")
    parser.add_argument(
        "changes", nargs="*", default=[], metavar="key=value", help="changes to the recipe for all arms"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="instead of the grid's, for example 0 1")
    parser.add_argument(
        "--parallel", type=int, metavar="N", help="runs at a time, instead of the grid's (launch.parallel)"
    )
    parser.add_argument("--list", action="store_true", help="list the runs and whether they are finished, then exit")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the unfinished runs of a grid and print its tables.

    Returns:
        1 if a run failed, 3 if it was stopped, else 0.

    Raises:
        ConfigError: if the grid, or the recipe or data of an arm, is wrong.
    """

    def say(line: str) -> None:
        print(visible(line), flush=True)

    grid = load_grid(options.grid, options.changes, options.seeds, options.parallel)
    if options.list:
        for job in jobs_of(grid):
            print(f"{'finished' if is_done(grid, job) else 'to do':9} {job.arm}, seed {job.seed}: {job.folder}")
        return ExitCode.DONE
    check_arms(grid, needs_files=False)  # before anything is made or run, which may take hours
    try:
        prepare(grid, say)
        check_arms(grid)
        result = run_sweep(grid, say)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return ExitCode.STOPPED
    print((Path(grid.out) / "results.md").read_text(encoding="utf-8"))
    return ExitCode.FAILED if result["failures"] else ExitCode.DONE
