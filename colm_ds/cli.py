"""The command `colm-ds`: what can be done with runs and recipes outside training."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from colm_ds.errors import CoLMError, ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; errors of ours are one message and exit code 2."""
    parser = argparse.ArgumentParser(prog="colm-ds", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_report(commands)
    _add_watch(commands)
    _add_export(commands)
    _add_preview(commands)
    _add_plan(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except CoLMError as error:
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


def _add_watch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "watch",
        help="a run in the terminal while it trains: loss, rate, memory, coreset by source, time left",
        description="Show a run from its metrics.jsonl, live until it ends, or a finished one. Needs the files only: "
        "the folder may be mounted from elsewhere. Without a terminal it prints a line for everything new.",
    )
    command.add_argument("run_folder", metavar="RUN", help="folder of a run")
    command.add_argument("--once", action="store_true", help="show it as it is now and end")
    command.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between looks (default: 2)")
    command.set_defaults(run=_watch)


def _watch(options: argparse.Namespace) -> None:
    from colm_ds.report.watch import watch

    try:
        watch(options.run_folder, once=options.once, every_s=max(0.1, options.every))
    except (KeyboardInterrupt, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to say, not even when closing


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "export",
        help="write a run's weights as a PEFT adapter or a Hugging Face model",
        description="Write a run's weights for use without colm_ds: a PEFT adapter after LoRA, else a whole model. "
        "Needs the run's folder and the base model; no GPU and no launcher.",
    )
    command.add_argument("run_folder", metavar="RUN", help="folder of a run, finished or not")
    command.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="such as step_200 (default: what training wrote at its end, else the newest checkpoint that is whole)",
    )
    command.add_argument("--merge", action="store_true", help="after LoRA: the whole model with the adapter added")
    command.add_argument("--out", metavar="FOLDER", help="folder to write, new or empty (default: in RUN/export)")
    command.add_argument("--model", metavar="PATH", help="base model (default: where the run's recipe says)")
    command.add_argument("--tokenizer", metavar="PATH", help="tokenizer (default: the run's)")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights written (default: the recipe's)"
    )
    command.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # weights are read and written there, on any machine
    from colm_ds.export.run import export_run
    from colm_ds.recipes.model import quiet_libraries

    quiet_libraries()
    done = export_run(
        options.run_folder,
        tag=options.checkpoint,
        merge=options.merge,
        out=options.out,
        model=options.model,
        tokenizer=options.tokenizer,
        dtype=options.dtype,
    )
    for reason in done.passed_over:
        print(f"passed over {reason}", file=sys.stderr)
    step = "" if done.step is None else f" after step {done.step}"
    print(f"{done.num_tensors} trained tensors{step}, from {done.source}")
    print(f"{done.folder}: {done.kind} in {done.dtype}")


def _add_preview(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "preview",
        help="what a recipe would train on: sources, lengths, examples, one selected coreset",
        description="Show without training: sources with counts and which are small, lengths, examples with the "
        "trained tokens between >>> and <<<, and what is kept of the first large batch, from which source and why.",
    )
    command.add_argument("recipe", help="YAML file")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    command.add_argument("--examples", type=int, default=3, help="examples to show (default: 3)")
    command.add_argument("--no-coreset", action="store_true", help="do not load the model and select")
    command.set_defaults(run=_preview)


def _preview(options: argparse.Namespace) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is trained here
    from colm_ds.recipes.model import quiet_libraries
    from colm_ds.recipes.recipe import load_recipe
    from colm_ds.training.preview import preview

    quiet_libraries()
    recipe = load_recipe(options.recipe, options.overrides)
    print(preview(recipe, num_examples=options.examples, with_coreset=not options.no_coreset))


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "plan",
        help="what a recipe will need: memory of every phase, what fits, what to switch on, time",
        description="Plan a run without a GPU, weights, data or network: peak memory per GPU by phase and part, the "
        "largest micro-batch that fits, what every switch saves, and the time of a step by the cost model.",
    )
    command.add_argument("recipe", help="YAML file")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    command.add_argument("--num-gpus", type=int, default=4, help="ranks (default: 4)")
    command.add_argument("--gpu-memory-gib", type=float, default=48.0, help="memory of one GPU (default: 48)")
    command.add_argument(
        "--reserve-gib", type=float, default=2.0, help="of it for context, communication, fragmentation (default: 2)"
    )
    command.add_argument("--tflops", type=float, help="what a GPU achieves, in 1e12 operations a second: gives seconds")
    command.add_argument(
        "--mean-length", type=float, help="mean tokens of an example: for time and replay (default: the longest)"
    )
    command.add_argument("--label-share", type=float, default=1.0, help="share of tokens with labels (default: 1)")
    command.add_argument(
        "--candidate-tokens", type=int, help="classification: tokens of a candidate (default: 1, of copa 16)"
    )
    command.add_argument("--compare", action="store_true", help="peaks over a range of batch sizes (Fig. 2c)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is computed here
    from colm_ds.planner.job import job_of_recipe
    from colm_ds.planner.plan_report import comparison, format_comparison, format_plan, plan_report
    from colm_ds.recipes.model import quiet_libraries
    from colm_ds.recipes.recipe import load_recipe

    quiet_libraries()
    for name in ("num_gpus", "gpu_memory_gib", "label_share", "tflops", "mean_length"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: not more than 0.")
    recipe = load_recipe(options.recipe, options.overrides, needs_files=False)
    job = job_of_recipe(
        recipe,
        options.num_gpus,
        mean_length=options.mean_length,
        label_share=min(1.0, options.label_share),
        candidate_tokens=options.candidate_tokens,
    )
    limits = {"gpu_memory_gib": options.gpu_memory_gib, "reserve_gib": options.reserve_gib}
    if options.compare:
        compared = comparison(job, **limits)
        print(json.dumps(compared, indent=2) if options.json else format_comparison(compared))
    else:
        report = {"name": recipe.name, **plan_report(job, **limits, tflops=options.tflops)}
        print(json.dumps(report, indent=2) if options.json else f"{recipe.name}\n{format_plan(report)}")


if __name__ == "__main__":
    sys.exit(main())
