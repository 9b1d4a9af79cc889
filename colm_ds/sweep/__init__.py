"""Run arms times seeds from one grid file, and write tables and a report."""

from colm_ds.sweep.grid import Grid, LaunchConfig, SweepJob, jobs_of, load_grid
from colm_ds.sweep.jobs import Place, check_arms, default_ranks, is_done, prepare, run_jobs, run_sweep

__all__ = [
    "Grid",
    "LaunchConfig",
    "Place",
    "SweepJob",
    "check_arms",
    "default_ranks",
    "is_done",
    "jobs_of",
    "load_grid",
    "prepare",
    "run_jobs",
    "run_sweep",
]
