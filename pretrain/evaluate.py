"""Evaluate a pretrained model: deepspeed --num_gpus N pretrain/evaluate.py MODEL_OR_RUN --data FOLDER"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of an evaluation after pretraining."""
    from colm_ds.evaluation.command_line import run
    from colm_ds.run_folder.write import describe_environment

    description = "Score a pretrained model: WiC, COPA, SQuAD, perplexity per source."
    run(arguments, description=description, tasks="pretrain", environment=describe_environment)


if __name__ == "__main__":
    main()
