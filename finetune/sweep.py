"""Run arms times seeds as a grid says and write a table: python finetune/sweep.py GRID"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from colm_ds import cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `colm-ds sweep` with these arguments; None: this process's."""
    return cli.main(["sweep", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
