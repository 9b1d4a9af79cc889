"""The command `colm-ds`: what can be done with runs and recipes outside training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from colm_ds.errors import ColmError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; errors of ours are one message and exit code 2."""
    parser = argparse.ArgumentParser(prog="colm-ds", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_report(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except ColmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "report",
        help="compare runs: a table here, report.html, report.md and report.json in a folder",
        description="Compare finished or running runs: quality, time and memory side by side.",
    )
    command.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, in the order to show")
    command.add_argument("--out", default=".", help="folder for report.html, report.md and report.json (default: here)")
    command.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    from colm_ds.report import compare, format_table, load_run

    runs = [load_run(folder) for folder in options.runs]
    compare(runs, options.out)
    print(format_table(runs))
    print(f"Pictures and details: {options.out}/report.html")


if __name__ == "__main__":
    sys.exit(main())
