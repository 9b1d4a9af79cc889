"""Evaluate a model or run: deepspeed --num_gpus N finetune/evaluate.py MODEL_OR_RUN --tasks math --data FOLDER"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of an evaluation after fine-tuning."""
    from colm_ds.evaluation.command_line import run
    from colm_ds.run_folder.write import describe_environment

    description = "Score a fine-tuned model: math by programs and words, SuperGLUE, SQuAD."
    run(arguments, description=description, tasks="math", environment=describe_environment)


if __name__ == "__main__":
    main()
