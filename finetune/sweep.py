"""Run arms times seeds as a grid says and write a table: python finetune/sweep.py GRID"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 if a run failed, 2 if the grid is wrong."""
    parser = argparse.ArgumentParser(
        description="Run every arm of a grid with every seed, one after another, several at a time or on given device "
        "groups. What is finished is skipped, a run that was stopped goes on, and one that fails does not stop the "
        "others. Writes results.md, results.json, results.html, curves.svg and report.html into the grid's folder."
    )
    parser.add_argument("grid", help="YAML file, for example finetune/grids/table1_cpu.yaml")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes to the recipe for all arms")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="instead of the grid's, for example 0 1")
    parser.add_argument("--list", action="store_true", help="show the runs and whether they are finished, and end")
    options = parser.parse_intermixed_args(arguments)

    from colm_ds.errors import CoLMError
    from colm_ds.sweep import format_markdown, is_done, jobs_of, load_grid, run_sweep

    try:
        grid = load_grid(options.grid, options.changes, options.seeds)
        if options.list:
            for job in jobs_of(grid):
                print(f"{'finished' if is_done(grid, job) else 'to do':9} {job.arm}, seed {job.seed}: {job.folder}")
            return 0
        result = run_sweep(grid, say=lambda line: print(line, flush=True))
    except CoLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(format_markdown(result, grid.baseline))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
