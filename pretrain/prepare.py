"""Make the token store of a recipe: python pretrain/prepare.py RECIPE --data FILE_OR_FOLDER ... [key=value ...]"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from colm_ds import cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `colm-ds prepare` with these arguments; None: this process's."""
    return cli.main(["prepare", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
