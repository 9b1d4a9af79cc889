"""Fine-tune as a recipe says: deepspeed --num_gpus N finetune/train.py RECIPE [key=value ...]"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of a fine-tuning run."""
    from colm_ds.recipes.recipe import Recipe
    from colm_ds.training.command import train_command

    description = "Fine-tune a language model on coresets of its batches, as a recipe says."
    train_command(arguments, Recipe, description, "finetune/recipes/demo.yaml")


if __name__ == "__main__":
    main()
