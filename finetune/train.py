"""Fine-tune as a recipe says: deepspeed --num_gpus N finetune/train.py RECIPE [key=value ...]"""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of a fine-tuning run."""
    from colm_ds.recipe import describe_keys

    parser = argparse.ArgumentParser(
        description="Fine-tune a language model on coresets of its batches, as a recipe says.",
        epilog="Keys of a recipe (default): what they do\n" + "\n".join(describe_keys()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="YAML file, for example finetune/recipes/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes, e.g. steps=20 colm.coreset_size=8")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    options = parser.parse_args(arguments)

    from colm_ds.training import run

    run(options.recipe, options.overrides)


if __name__ == "__main__":
    main()
