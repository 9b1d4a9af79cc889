"""Fine-tune as a recipe says: deepspeed --num_gpus N finetune/train.py RECIPE [key=value ...]"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from colm_ds import cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `colm-ds train` with these arguments; None: this process's."""
    return cli.main(["train", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
