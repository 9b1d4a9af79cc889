"""Evaluate a pretrained model: deepspeed --num_gpus N pretrain/evaluate.py MODEL_OR_RUN --data FOLDER"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from colm_ds import cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `colm-ds evaluate` with these arguments, None for this process's; --tasks is pretrain by default."""
    return cli.main(["evaluate", "--tasks", "pretrain", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
