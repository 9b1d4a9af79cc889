"""Run arms times seeds from one grid file, and write a table, curves and a report."""

from colm_ds.sweep.grid import Grid, LaunchConfig, SweepJob, jobs_of, load_grid
from colm_ds.sweep.jobs import Place, default_ranks, is_done, run_jobs, run_sweep
from colm_ds.sweep.table import format_markdown, is_finished, table_rows

__all__ = [
    "Grid",
    "LaunchConfig",
    "Place",
    "SweepJob",
    "default_ranks",
    "format_markdown",
    "is_done",
    "is_finished",
    "jobs_of",
    "load_grid",
    "run_jobs",
    "run_sweep",
    "table_rows",
]
