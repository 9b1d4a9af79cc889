"""Pretrain as a recipe says: deepspeed --num_gpus N pretrain/train.py RECIPE [key=value ...]"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of a pretraining run."""
    from colm_ds.recipes.recipe import PretrainingRecipe
    from colm_ds.training.command import train_command

    description = "Pretrain a language model on coresets of its batches, as a recipe says; pretrain/prepare.py first."
    train_command(arguments, PretrainingRecipe, description, "pretrain/recipes/demo.yaml")


if __name__ == "__main__":
    main()
